"""Priors in files: volumes of values 0..1 that lie in patient space, checked before a run begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from dagman.attention.spatial_prior import in_steps
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.body_box import field_of_view
from spade3d.volumes.geometry import apply_affine, same_grid, stretch
from spade3d.volumes.volume import Grid, read_grid, read_volume

ROUNDING = 1e-3  # beyond 0..1: of whoever made the file
LEAST_COVERED = 0.5  # of the body in a scan: a file with less is taken for one of another place
WELL_COVERED = 0.9
CHECKED_VOXELS = 2**28  # before a run begins: about ten seconds
PLACES = 16  # along each axis of a scan: where it is asked what a file covers


def check_files(store, files: Mapping, frames: Mapping | None) -> list[str]:
    """The regions of the files; see `prior_sources.from_files` for what they must be."""
    if not files:
        raise UsageFault("no files of priors; give region -> file, or case name -> (region -> file)")
    by_scan = isinstance(next(iter(files.values())), Mapping)
    if by_scan == (frames is not None):
        raise UsageFault(
            "files of single scans lie in those scans' own space: leave `frames` out"
            if by_scan
            else "one file for all scans lies in the body frame: `frames` is needed"
        )
    if not by_scan:
        _check_together(list(files.values()))
        return list(files)
    regions = list(next(iter(files.values())))
    cases = {case.name: case for case in store.cases}
    for name, of_scan in files.items():
        if name not in cases:
            raise UsageFault(f"{name}: priors for a scan that the store does not hold")
        if sorted(of_scan) != sorted(regions):
            raise UsageFault(f"{name}: priors for {sorted(of_scan)}; those of other scans are for {sorted(regions)}")
        grid = _check_together(list(of_scan.values()))
        share = covered(cases[name], grid)
        if share < LEAST_COVERED:
            theirs, ours = field_of_view(grid.shape, grid.affine), field_of_view(cases[name].shape, cases[name].affine)
            raise DataFault(
                f"{of_scan[regions[0]]}: lies from {_mm(theirs[0])} to {_mm(theirs[1])}, the scan {name} from "
                f"{_mm(ours[0])} to {_mm(ours[1])}, so that {100 * share:.0f} % of the scan's body box is covered; a "
                f"prior must lie in the patient space of its scan and cover {100 * LEAST_COVERED:.0f} %: resample it "
                "onto the scan's grid"
            )
    return regions


def partly_covered(store, files: Mapping[str, Mapping[str, Path]]) -> dict[str, float]:
    """Of files of single scans, the share of the body that is covered of each scan where it is below WELL_COVERED."""
    cases = {case.name: case for case in store.cases}
    shares = {name: covered(cases[name], read_grid(next(iter(of.values())))) for name, of in files.items()}
    return {name: share for name, share in shares.items() if share < WELL_COVERED}


def covered(case, grid: Grid) -> float:
    """The share of what a scan shows of its body box, where crops are drawn, that lies within a grid."""
    places = (np.indices((PLACES,) * 3).reshape(3, -1).T + 0.5) / PLACES * case.shape - 0.5
    points = apply_affine(case.affine, places)
    low, high = case.body_box_mm
    inside = ((points >= low) & (points <= high)).all(axis=1)
    points = points[inside] if inside.any() else points  # a box thinner than the places are apart
    there = apply_affine(np.linalg.inv(grid.affine), points)
    return float(((there >= -0.5) & (there <= np.array(grid.shape) - 0.5)).all(axis=1).mean())


def check_values(files: Mapping[str, Mapping[str, Path]], most: int = CHECKED_VOXELS) -> None:
    """DataFault for values outside 0..1, and for NaN, in the files of single scans.

    Where all hold more than `most` voxels, files of every second, third ... scan are read; those of the others are
    checked when a run reads them (`volume_of_files`).
    """
    voxels = [sum(math.prod(read_grid(path).shape) for path in of.values()) for of in files.values()]
    among = max(1, math.ceil(sum(voxels) / most))
    for of_scan in list(files.values())[::among]:
        for region, path in of_scan.items():
            _check_values(region, path, read_volume(path).voxels)


def _check_values(region: str, path: Path, voxels: np.ndarray) -> None:
    bad = ~np.isfinite(voxels)
    if bad.any():
        at = ", ".join(str(int(place)) for place in np.unravel_index(bad.argmax(), bad.shape))
        raise DataFault(
            f"{path}: {np.count_nonzero(bad)} of {voxels.size} voxels for {region} are NaN or Inf, the first "
            f"at ({at}); write 0 where the region is not"
        )
    low, high = float(voxels.min()), float(voxels.max())
    if low < -ROUNDING or high > 1 + ROUNDING:
        remedy = "divide it by its maximum" if low >= -ROUNDING else "set what is below to 0, and what is above to 1"
        raise DataFault(f"{path}: values from {low:g} to {high:g} for {region}; a prior holds 0 to 1: {remedy}")


def volume_of_files(
    files: Mapping[str, Path], resolution_mm: float
) -> tuple[UInt8[np.ndarray, "i j k region"], Float[np.ndarray, "4 4"]]:
    """Values in blocks of about `resolution_mm`, and the affine of the blocks; DataFault for values outside 0..1."""
    volumes = [read_volume(path) for path in files.values()]
    for (region, path), volume in zip(files.items(), volumes, strict=True):
        _check_values(region, path, volume.voxels)
    block = np.maximum(1, np.round(resolution_mm / np.array(volumes[0].spacing))).astype(int)
    values = np.stack([_means(volume.voxels, block) for volume in volumes], axis=-1)
    return in_steps(values), volumes[0].affine @ stretch(block, (block - 1) / 2)


def _means(voxels: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Means over blocks; beyond the volume lies nothing."""
    filled = np.pad(voxels.astype(np.float32), [(0, -size % side) for size, side in zip(voxels.shape, block.tolist())])
    (i, j, k), (a, b, c) = filled.shape, block.tolist()
    return filled.reshape(i // a, a, j // b, b, k // c, c).mean(axis=(1, 3, 5))


def _check_together(paths: Sequence[Path]) -> Grid:
    """The one grid of some files."""
    grids = [read_grid(Path(path)) for path in paths]
    for path, grid in zip(paths, grids, strict=True):
        difference = same_grid(grids[0].shape, grids[0].affine, grid.shape, grid.affine)
        if difference:
            raise DataFault(f"{path}: lies on another grid than {paths[0]}: {difference}; resample one onto the other")
    return grids[0]


def _mm(corner: Sequence[float]) -> str:
    return "(" + ", ".join(f"{mm:.0f}" for mm in corner) + ") mm"
