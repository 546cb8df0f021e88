"""The batches of studies of a run, each a pure function of (seed, step); three ways to show a study to a network.

cached  the tokens that a frozen encoder gave for the whole body, read from disk
bag     a few crops of the body, drawn anew each step, all of one study: they have one label, together
whole   the whole body at a low resolution
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from dagman.downstream.coarse_scans import CoarseScans
from dagman.downstream.studies import Findings, StudyBatch
from dagman.downstream.token_cache import TokenCache
from dagman.downstream.token_grids import cells_of, places_of
from spade3d.crops.crop import Box, Crop, Triple, Views, body_bounds, cut, draw_view, keep_inside
from spade3d.crops.pairs import as_images

Prior = Callable[[Crop], Float[np.ndarray, "f p q r"]]  # a grid of cells -> the share of each where a finding may be
Teacher = Mapping[str, Float[np.ndarray, " f"]]  # a scan's name -> logits


@dataclass(frozen=True, eq=False)
class Seen:
    """One study as it is shown once; the cells of several crops lie one behind the other along p."""

    tokens: Float[Tensor, "c p q r"] | None
    images: Float[Tensor, "k 1 i j k2"] | None
    places: Float[Tensor, "3 p q r"]
    valid: Bool[Tensor, "p q r"]
    allowed: Float[Tensor, "f p q r"] | None


Geometry = tuple[Tensor, Tensor, Tensor | None]  # places, valid, allowed
Show = Callable[[int, np.random.Generator], Seen]  # a case of the store -> how it is shown


class StudyStream:
    """Batches of studies without end and without state: each study comes once before any comes again."""

    def __init__(
        self,
        show: Show,
        findings: Findings,
        cases: Sequence[int],
        size: int,
        *,
        seed: int = 0,
        teacher: Teacher | None = None,
    ):
        if not cases:
            raise ValueError("no studies to draw from")
        self.show, self.findings, self.cases, self.seed, self.teacher = show, findings, list(cases), seed, teacher
        self.size = min(size, len(self.cases))

    def stream(self, start: int, stop: int) -> Iterator[StudyBatch]:
        return (self.batch(step) for step in range(start, stop))

    def batch(self, step: int) -> StudyBatch:
        rng = np.random.default_rng([self.seed, step])
        cases = [self.turn(step * self.size + n) for n in range(self.size)]
        return collate([self.show(case, rng) for case in cases], self.findings, cases, self.teacher)

    def turn(self, place: int) -> int:
        """The case at a place of the endless row: all of them in a drawn order, then all in another."""
        row, within = divmod(place, len(self.cases))
        return self.cases[np.random.default_rng([self.seed, 0x57D1, row]).permutation(len(self.cases))[within]]


def collate(seen: Sequence[Seen], findings: Findings, cases: Sequence[int], teacher: Teacher | None) -> StudyBatch:
    """Studies side by side, grids filled up at their far end by cells that are not valid."""
    grid = tuple(map(max, zip(*(one.valid.shape for one in seen), strict=True)))
    names = tuple(findings.studies[case].name for case in cases)

    def side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.stack([_filled(part, grid) for part in parts])

    return StudyBatch(
        tokens=side_by_side([one.tokens for one in seen]),
        images=None if seen[0].images is None else torch.stack([one.images for one in seen]),
        places=side_by_side([one.places for one in seen]),
        valid=side_by_side([one.valid for one in seen]),
        labels=findings.table(cases),
        allowed=side_by_side([one.allowed for one in seen]),
        teacher=None if teacher is None else torch.from_numpy(np.stack([teacher[name] for name in names])).float(),
        scans=names,
    )


@dataclass(frozen=True, eq=False)
class Cached:
    """Shows studies by the tokens on disk, which were filled in before. What stays from step to step is kept."""

    cache: TokenCache
    prior: Prior | None = None
    kept: dict[int, Geometry] = field(default_factory=dict)

    def __call__(self, case: int, _: np.random.Generator) -> Seen:
        if case not in self.kept:
            self.kept[case] = _geometry(self.cache.store, [self.cache.cells(case)], self.prior)
        return Seen(torch.from_numpy(self.cache.tokens(case)), None, *self.kept[case])


@dataclass(frozen=True)
class BagSampling:
    """Crops of a bag: how many, of how many voxels and of which spacing in mm, and how chance changes their looks."""

    crops: int
    shape: tuple[int, int, int]
    spacing: Triple
    views: Views


@dataclass(frozen=True, eq=False)
class Bag:
    """Shows studies by crops spread over the body's box: it is laid out in tiles as large as a crop, and a crop is
    drawn in each of `crops` of them, no tile twice before all were taken."""

    store: Any
    sampling: BagSampling
    prior: Prior | None = None

    def __call__(self, case: int, rng: np.random.Generator) -> Seen:
        crops = draw_bag(rng, case, body_bounds(self.store.cases[case]), self.sampling)
        images = as_images([cut(self.store, crop) for crop in crops])
        return Seen(None, images, *_geometry(self.store, [cells_of(crop) for crop in crops], self.prior))


def draw_bag(
    rng: np.random.Generator, case: int, bounds: Float[np.ndarray, "2 3"], sampling: BagSampling
) -> list[Crop]:
    """The crops of one study at one step."""
    size = np.asarray(sampling.shape) * sampling.spacing
    tiles = np.maximum(1, np.ceil((bounds[1] - bounds[0]) / size - 1e-9)).astype(int)
    places = np.stack(np.unravel_index(np.arange(tiles.prod()), tuple(tiles.tolist())), axis=-1)
    rounds = -(-sampling.crops // len(places))
    chosen = np.concatenate([rng.permutation(places) for _ in range(rounds)])[: sampling.crops]
    centres = bounds[0] + (chosen + rng.random(chosen.shape)) * (bounds[1] - bounds[0]) / tiles
    boxes = [Box(tuple(keep_inside(centre, size, bounds)), tuple(size)) for centre in centres]
    return [draw_view(rng, case, box, sampling.shape, sampling.views) for box in boxes]


@dataclass(frozen=True, eq=False)
class Whole:
    """Shows studies by the middle of the body's box in `shape` voxels of `mm`, turned and coloured a little, anew each
    step. The prior is of the store that the coarse scans are made from."""

    scans: CoarseScans
    shape: tuple[int, int, int]
    mm: float
    views: Views
    prior: Prior | None = None

    def __call__(self, case: int, rng: np.random.Generator) -> Seen:
        centre = body_bounds(self.scans.cases[case]).mean(axis=0)
        box = Box(tuple(centre), tuple(self.mm * np.asarray(self.shape, dtype=float)))
        view = draw_view(rng, case, box, self.shape, self.views)
        of_source = None if self.prior is None else lambda cells: self.prior(self.scans.in_source(cells))
        return Seen(None, as_images([cut(self.scans, view)]), *_geometry(self.scans, [cells_of(view)], of_source))


def _geometry(store, grids: Sequence[Crop], prior: Prior | None) -> Geometry:
    """Places, valid and allowed of grids of one scan, one behind the other."""
    places, valid = zip(*(places_of(store.cases[grid.case], grid) for grid in grids), strict=True)
    allowed: Float32[np.ndarray, "f p q r"] | None = None
    if prior is not None:
        allowed = np.concatenate([prior(grid) for grid in grids], axis=1).astype(np.float32)
    return (
        torch.from_numpy(np.concatenate(places, axis=1)),
        torch.from_numpy(np.concatenate(valid, axis=0)),
        None if allowed is None else torch.from_numpy(allowed),
    )


def _filled(part: Tensor, grid: Sequence[int]) -> Tensor:
    p, q, r = (whole - there for whole, there in zip(grid, part.shape[-3:], strict=True))
    return F.pad(part, (0, r, 0, q, 0, p))
