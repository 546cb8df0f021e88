"""Gaze -> saliency: the fixations of all readers of a scan as one map, 0..1 on the stored grid.

    S(x) = sum_i w_i exp(-1/2 |(x - x_i) / sigma|^2),  then (S - min S) / (max S - min S)

with x in mm along the axes of the scan, sigma one length within the slices that were read and another across them, and
w_i how long fixation i lasted. FocusContrast's paper convolves points with a kernel that it does not print; its code
implies a sigma of 1.7 to 3.8 % of the image's side, and weights nothing (papers/span_focuscontrast_clarity.md, 2.3 and
2.8.1). Durations as weights, a sigma across slices and the drop rules are our reading, after GazeMedSeg.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.body_box import in_body
from spade3d.volumes.gaze_files import STRAY, Fixations
from spade3d.volumes.geometry import apply_affine, canonical_flips, inverse, spacing_of
from spade3d.volumes.store import StoredCase
from spade3d.volumes.volume import Grid

SHORTEST_S = 0.05  # below this the eye has not settled (GazeMedSeg)
FIELD_SHARE = 0.03  # sigma within slices by default: 3 % of the field of view
REACH = 4.0  # sigmas; beyond, a Gaussian is below 3.4e-4 of its peak


class CountedOtherwise(DataFault):
    """Slices that fit a scan if the first has another number: then all that was recorded like this is off by one."""


@dataclass(frozen=True)
class Blur:
    """Standard deviations in mm, within the slices of the source and across them; None follows the scan.

    By default 3 % of the field of view within, and half of that across, but two slices at least: readers scroll.
    """

    in_plane_mm: float | None = None
    through_plane_mm: float | None = None

    def of(self, grid: Grid) -> tuple[float, float]:
        """(within, across) in mm for a scan on this grid."""
        i, j, k = spacing_of(grid.affine)
        within = self.in_plane_mm or FIELD_SHARE * float(np.sqrt(i * grid.shape[0] * j * grid.shape[1]))
        return within, self.through_plane_mm or max(2 * k, within / 2)


@dataclass(frozen=True, eq=False)
class GazeMap:
    """A saliency map float32 (i, j, k) on the stored grid, and what became of the fixations."""

    saliency: np.ndarray
    used: int
    short: int  # under 50 ms
    beside: int  # outside the slices, or in one that the scan does not have: the reader looked beside the image
    outside: int  # in the image, outside the body


def gaze_map(
    case: StoredCase, voxels: np.ndarray, fixations: Sequence[Fixations], *, blur: Blur | None = None
) -> GazeMap:
    """The saliency of a stored scan (its `voxels` (i, j, k)) from all that was recorded of it; zeros where no fixation
    is left.

    DataFault where those of one reader cannot be of this scan, as most lie beside it; CountedOtherwise where they
    could, if the first slice had another number.
    """
    grid = case.source_grid
    points = np.concatenate([located(one, grid) for one in fixations]) if fixations else np.zeros((0, 3))
    seconds = np.concatenate([one.seconds for one in fixations]) if fixations else np.zeros(0)
    long = seconds >= SHORTEST_S
    inside = ((points >= -0.5) & (points <= np.array(grid.shape) - 0.5)).all(axis=1)
    world = apply_affine(grid.affine, points)
    body = in_body(world, voxels, case.affine, case.modality)
    kept = long & inside & body
    places = apply_affine(inverse(case.affine), world[kept])
    within, across = (blur or Blur()).of(grid)
    # The stored axes are the source's, turned and flipped: the one that was its third goes across its slices.
    axes = canonical_flips(grid.affine, grid.shape).axes
    sigma_mm = np.array([across if axis == 2 else within for axis in axes])
    saliency = splat(places, seconds[kept], sigma_mm / np.array(case.spacing), case.shape)
    low_value, high_value = float(saliency.min()), float(saliency.max())
    if high_value > low_value:
        saliency = (saliency - low_value) / (high_value - low_value)
    dropped = (~long, long & ~inside, long & inside & ~body)
    short, beside, outside = (int(np.count_nonzero(some)) for some in dropped)
    return GazeMap(saliency, len(places), short, beside, outside)


def located(fixations: Fixations, grid: Grid) -> np.ndarray:
    """The fixations (n, 3) as voxels of the source's grid, centres at integers; those beside its slices as they are.

    DataFault where more than half of the points lie beside the image, or in slices that the scan does not have.
    """
    shape, points = np.array(grid.shape), fixations.points.copy()
    if len(points) == 0:
        return points
    _check_count(fixations, grid.shape)
    points[:, 2] -= fixations.first
    if fixations.shares:
        points[:, :2] = points[:, :2] * shape[:2] - 0.5
    else:
        points[:, :2] -= fixations.first
    beside = ((points[:, :2] < -0.5) | (points[:, :2] > shape[:2] - 0.5)).any(axis=1)
    if beside.mean() > STRAY:
        low, high = fixations.points.min(axis=0), fixations.points.max(axis=0)
        unit = "shares from 0 to 1" if fixations.shares else f"voxels of its {shape[0]} x {shape[1]} slices"
        raise DataFault(
            f"{fixations.source}: {np.count_nonzero(beside)} of {len(beside)} fixations lie beside case "
            f"{fixations.case} (x {low[0]:g} to {high[0]:g}, y {low[1]:g} to {high[1]:g}); {unit} are needed: give the "
            "fixations in the scan's own grid"
        )
    return points


def _check_count(fixations: Fixations, shape: Sequence[int]) -> None:
    """Refuse slices that mostly are not in the scan, and those of which more fit a count from the other number.

    A few impossible slices among many are a tracker's slips, and beside the image as others are.
    """
    numbers, first, depth = fixations.points[:, 2], fixations.first, shape[2]
    other = 1 - first

    def fitting(count_from: int) -> int:
        above, below = count_from - 0.5 - 1e-9, count_from + depth - 0.5 + 1e-9
        return int(np.count_nonzero((numbers > above) & (numbers < below)))

    said = (
        f"slices {numbers.min():g} to {numbers.max():g}, but case {fixations.case} has {depth} "
        f"(counted from {first}: {first} to {depth - 1 + first})"
    )
    if fitting(other) > fitting(first):
        raise CountedOtherwise(
            f"{fixations.source}: {said}; they fit slices counted from {other}: give --first-slice {other}"
        )
    if fitting(first) < (1 - STRAY) * len(numbers):
        raise DataFault(
            f"{fixations.source}: {said}; they fit no count of its slices: is this gaze of another scan, or of another "
            "axis?"
        )


def count_in_slices(fixations: Fixations, shape: Sequence[int]) -> int | None:
    """The count that x and y hint at: 0 where one of them is 0, 1 where one is the width or the height; else None.

    Only whole numbers within the image are indices of voxels. Where both ends are met a tracker kept to the image's
    edges, and nothing is told. One fixation at an edge is enough: no more than a hint.
    """
    if fixations.shares:
        return None
    places, size = fixations.points[:, :2], np.array(shape[:2])
    if (places % 1 != 0).any() or (places < 0).any() or (places > size).any():
        return None
    from_zero, from_one = bool((places == 0).any()), bool((places == size).any())
    return None if from_zero == from_one else int(from_one)


def splat(places: np.ndarray, weights: np.ndarray, sigma: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """sum_i weight_i exp(-1/2 |(x - place_i) / sigma|^2) at each voxel, float32 (i, j, k); all lengths in voxels.

    A Gaussian reaches 4 sigma along each axis, so that the work is fixations x support, whatever the size of the scan.
    """
    total = np.zeros(shape, dtype=np.float32)
    for place, weight in zip(places, weights, strict=True):
        start = np.clip(np.ceil(place - REACH * sigma), 0, shape).astype(int)
        stop = np.clip(np.floor(place + REACH * sigma) + 1, start, shape).astype(int)
        i, j, k = (
            np.exp(-0.5 * ((np.arange(a, b) - at) / width) ** 2).astype(np.float32)
            for a, b, at, width in zip(start, stop, place, sigma, strict=True)
        )
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        total[box] += (np.float32(weight) * i)[:, None, None] * (j[:, None] * k)
    return total
