"""Where a finding may be: a table of findings and organs, and priors of those organs, on the cells of a study.

CLARiTy's abstract (arXiv 2512.16700) speaks of explicit anatomical priors and does not say what they are. These are the
priors that heads may follow in pretraining (`dagman.attention.prior_sources`), cut into allowed and forbidden cells as
AxialNet does with organ masks (Draelos and Carin 2021, its code), with all sides of an organ whose side is not named.
AxialNet allows any cell that holds some of the organ; here a cell is allowed that is the organ's nearly alone. A cell
across its border has fat or air in it, which stands out more than any finding does: with such cells among the allowed
ones, labels of studies taught next to nothing (docs/log.md). A margin in mm brings the others back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float32
from scipy import ndimage

from dagman.attention.spatial_prior import Priors, is_mirrored
from dagman.downstream.token_grids import CELL, body_crop, cells_of
from spade3d.crops.crop import Crop, Triple
from spade3d.faults import UsageFault
from spade3d.volumes.organs import canonical_organ

SAMPLES = 3  # of a prior along each axis of a cell, at most, and whatever the grid, so that shares compare
SHOWN_WELL = 0.1  # of what the best cell of the body holds of an organ: one of a cell lies across eight others


@dataclass(frozen=True)
class Where:
    """The organs in which a finding may be, and how far from them, in mm; no organs: anywhere."""

    organs: tuple[str, ...] = ()
    margin_mm: float = 0.0


def allowed_in(priors: Priors, where: Sequence[Where], *, least: float = 0.9) -> AllowedCells:
    """A function from a grid of cells (a `Crop` whose voxels are cells) to 1 where each finding may be, 0 elsewhere.

    A cell belongs to an organ where its prior is at least `least` of what the prior is in the organ's best cell: that
    of the crop where it shows the organ well, else that of the whole body. Allowed are those cells and all within
    `margin_mm` of them (between centres). A finding
    of no organs, or whose organs the prior does not find anywhere in the body of this scan, may be anywhere: a finding
    that is present is somewhere. UsageFault for an organ that is not among the regions of the priors.
    """
    rows = [[row for organ in place.organs for row in matching(organ, priors.regions)] for place in where]
    return AllowedCells(priors, tuple(where), rows, least)


@dataclass(frozen=True, eq=False)
class AllowedCells:
    """What `allowed_in` gives; no closure, because processes that make batches are sent it.

    rows  for each finding the regions that are its organs
    kept  what was found in whole bodies
    """

    priors: Priors
    where: tuple[Where, ...]
    rows: Sequence[Sequence[int]]
    least: float
    kept: dict[tuple[int, Triple], np.ndarray] = field(default_factory=dict)

    def __call__(self, cells: Crop) -> Float32[np.ndarray, "f p q r"]:
        found = _regions(self.priors, cells, self.rows, self.where, self.least, self.best(cells))
        if not found.any(axis=(1, 2, 3)).all():
            found[~self.somewhere(cells)] = True
        return found.astype(np.float32)

    def somewhere(self, cells: Crop) -> Bool[np.ndarray, " f"]:
        """Whether each finding has an allowed cell in the whole body."""
        found, places = self.best(cells) > 0, zip(self.rows, self.where, strict=True)
        return np.array([not place.organs or found[of].any() for of, place in places])

    def best(self, cells: Crop) -> Float[np.ndarray, " region"]:
        """What the prior of each region is in its best cell of the body, of cells about as large, in the picture: a
        mirrored one shows each side's organ on the other."""
        i, j, k = np.exp2(np.round(2 * np.log2(_sides_mm(cells))) / 2).tolist()
        found = self.of_body(cells.case, (i, j, k))
        if not is_mirrored(cells.to_mm, self.priors.store.cases[cells.case].affine):
            return found
        here = dict(zip(self.priors.regions, found, strict=True)) | {None: 0.0}
        return np.array([here[self.priors.mirror[region]] for region in self.priors.regions])

    def of_body(self, case: int, mm: Triple) -> Float[np.ndarray, " region"]:
        """The same as the scan lies, for cells of some mm."""
        if (case, mm) not in self.kept:
            body = cells_of(body_crop(case, self.priors.store.cases[case], tuple(side / CELL for side in mm)))
            self.kept[case, mm] = _shares(self.priors, _grown(body, np.ones(3, int))).max(axis=(1, 2, 3))
        return self.kept[case, mm]


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
    priors: Priors,
    cells: Crop,
    rows: Sequence[Sequence[int]],
    where: Sequence[Where],
    least: float,
    best: Float[np.ndarray, " region"],
) -> Bool[np.ndarray, "f p q r"]:
    """The allowed cells, before anything is said of findings that have none."""
    sides = np.array(_sides_mm(cells))
    beyond = np.ceil(max(place.margin_mm for place in where) / sides).astype(int)
    held = _shares(priors, _grown(cells, beyond))
    inner = tuple(slice(n, side - n) for n, side in zip(beyond.tolist(), held.shape[1:], strict=True))
    # Cells of a turned crop lie otherwise in an organ than the body's own: what shows it well is asked by its own best.
    own = held[:, *inner].max(axis=(1, 2, 3))
    needed = least * np.where(own >= SHOWN_WELL * best, own, best)
    here = (held >= needed[:, None, None, None]) & (needed > 0)[:, None, None, None]
    return np.stack([_spread(here[of], place, sides)[inner] for of, place in zip(rows, where, strict=True)])


def _spread(organs: Bool[np.ndarray, "n p q r"], place: Where, sides: np.ndarray) -> Bool[np.ndarray, "p q r"]:
    if not place.organs:
        return np.ones(organs.shape[1:], dtype=bool)
    near = organs.any(axis=0)
    if place.margin_mm and near.any():
        near = ndimage.distance_transform_edt(~near, sampling=sides) <= place.margin_mm
    return near


def _shares(priors: Priors, cells: Crop) -> Float32[np.ndarray, "region p q r"]:
    """The prior of each cell."""
    return priors.of_crop(cells, 1, SAMPLES)


def _grown(cells: Crop, by: np.ndarray) -> Crop:
    to_mm = cells.to_mm.copy()
    to_mm[:3, 3] -= to_mm[:3, :3] @ by
    i, j, k = (np.array(cells.shape) + 2 * by).tolist()
    return Crop(cells.case, (i, j, k), to_mm)


def _sides_mm(cells: Crop) -> tuple[float, float, float]:
    i, j, k = np.linalg.norm(cells.to_mm[:3, :3], axis=0).round(6).tolist()
    return i, j, k
