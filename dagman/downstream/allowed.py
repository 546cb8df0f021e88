"""Where a finding may be: a table of findings and organs, and priors of those organs, on the cells of a study.

CLARiTy's abstract (arXiv 2512.16700) speaks of explicit anatomical priors and does not say what they are. These are the
priors that heads may follow in pretraining (`dagman.attention.prior_sources`), cut into allowed and forbidden cells as
AxialNet does with organ masks (Draelos and Carin 2021, its code), with all sides of an organ whose side is not named.
AxialNet allows any cell that holds some of the organ; here a cell is allowed that is the organ's nearly alone. A cell
across its border has fat or air in it, which stands out more than any finding does: with such cells among the allowed
ones, labels of studies taught nothing (docs/log.md). A margin in mm brings the others back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Float32
from scipy import ndimage

from dagman.attention.spatial_prior import Priors
from dagman.downstream.token_grids import CELL, body_crop, cells_of
from spade3d.crops.crop import Crop
from spade3d.faults import UsageFault
from spade3d.volumes.organs import canonical_organ

SAMPLES = 3  # of a prior along each axis of a cell, at most, and whatever the grid, so that shares compare
AT_ONCE = 50_000  # samples that a prior takes at once


@dataclass(frozen=True)
class Where:
    """The organs in which a finding may be, and how far from them, in mm; no organs: anywhere."""

    organs: tuple[str, ...] = ()
    margin_mm: float = 0.0


def allowed_in(
    priors: Priors, where: Sequence[Where], *, least: float = 0.9
) -> Callable[[Crop], Float32[np.ndarray, "f p q r"]]:
    """A function from a grid of cells (a `Crop` whose voxels are cells) to 1 where each finding may be, 0 elsewhere.

    A cell belongs to an organ where its prior is at least `least` of what the prior is in the organ's best cell of that
    scan. Allowed are those cells and all within `margin_mm` of them (between centres). A finding
    of no organs, or whose organs the prior does not find anywhere in the body of this scan, may be anywhere: a finding
    that is present is somewhere. UsageFault for an organ that is not among the regions of the priors.
    """
    rows = [[row for organ in place.organs for row in matching(organ, priors.regions)] for place in where]

    @lru_cache(maxsize=4096)
    def best(case: int, mm: tuple[float, float, float]) -> Float[np.ndarray, " region"]:
        """What the prior of each region is in its best cell of the whole body."""
        body = body_crop(case, priors.store.cases[case], tuple(side / CELL for side in mm))
        return _shares(priors, cells_of(body)).max(axis=(1, 2, 3))

    def regions(cells: Crop) -> Bool[np.ndarray, "f p q r"]:
        return _regions(priors, cells, rows, where, least * best(cells.case, _sides_mm(cells)))

    def somewhere(cells: Crop) -> Bool[np.ndarray, " f"]:
        """Whether each finding has an allowed cell in the whole body."""
        found = best(cells.case, _sides_mm(cells)) > 0
        return np.array([not place.organs or found[of].any() for of, place in zip(rows, where, strict=True)])

    def allowed(cells: Crop) -> Float32[np.ndarray, "f p q r"]:
        found = regions(cells)
        if not found.any(axis=(1, 2, 3)).all():
            found[~somewhere(cells)] = True
        return found.astype(np.float32)

    return allowed


def groups_of(where: Sequence[Where]) -> tuple[int | None, ...]:
    """For each finding the number of its foreground: the same for the same organs and margin, None for anywhere."""
    kinds = list(dict.fromkeys(place for place in where if place.organs))
    return tuple(kinds.index(place) if place.organs else None for place in where)


def matching(organ: str, regions: Sequence[str]) -> list[int]:
    """Which regions are an organ, by canonical name; both sides where the name has none."""
    names = [canonical_organ(region) for region in regions]
    asked = canonical_organ(organ)
    found = [n for n, name in enumerate(names) if asked in (name, re.sub(r"^(left|right) ", "", name))]
    if not found:
        raise UsageFault(f"a finding in {organ!r}: there is no prior for it; there are {', '.join(regions)}")
    return found


def _regions(
    priors: Priors, cells: Crop, rows: Sequence[Sequence[int]], where: Sequence[Where], least: np.ndarray
) -> Bool[np.ndarray, "f p q r"]:
    """The allowed cells, before anything is said of findings that have none."""
    sides = np.array(_sides_mm(cells))
    beyond = 1 + np.ceil(max(place.margin_mm for place in where) / sides).astype(int)
    held = _shares(priors, _grown(cells, beyond))
    here = (held >= least[:, None, None, None]) & (least > 0)[:, None, None, None]
    inner = tuple(slice(n, -n) for n in beyond.tolist())
    return np.stack([_spread(here[of], place, sides)[inner] for of, place in zip(rows, where, strict=True)])


def _spread(organs: Bool[np.ndarray, "n p q r"], place: Where, sides: np.ndarray) -> Bool[np.ndarray, "p q r"]:
    if not place.organs:
        return np.ones(organs.shape[1:], dtype=bool)
    near = organs.any(axis=0)
    if place.margin_mm and near.any():
        near = ndimage.distance_transform_edt(~near, sampling=sides) <= place.margin_mm
    return near


def _shares(priors: Priors, cells: Crop) -> Float32[np.ndarray, "region p q r"]:
    """The prior of each cell, slab by slab, so that a large grid is not sampled more thinly than a small one."""
    slabs = int(np.ceil(SAMPLES**3 * np.prod(cells.shape) / AT_ONCE))
    parts = np.array_split(np.arange(cells.shape[0]), min(slabs, cells.shape[0]))
    return np.concatenate([priors.of_crop(_slab(cells, int(p[0]), len(p)), 1, SAMPLES) for p in parts], axis=1)


def _slab(cells: Crop, first: int, count: int) -> Crop:
    to_mm = cells.to_mm.copy()
    to_mm[:3, 3] += to_mm[:3, 0] * first
    return Crop(cells.case, (count, *cells.shape[1:]), to_mm)


def _grown(cells: Crop, by: np.ndarray) -> Crop:
    to_mm = cells.to_mm.copy()
    to_mm[:3, 3] -= to_mm[:3, :3] @ by
    i, j, k = (np.array(cells.shape) + 2 * by).tolist()
    return Crop(cells.case, (i, j, k), to_mm)


def _sides_mm(cells: Crop) -> tuple[float, float, float]:
    i, j, k = np.linalg.norm(cells.to_mm[:3, :3], axis=0).round(6).tolist()
    return i, j, k
