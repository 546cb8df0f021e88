"""Crops of an image with the saliency of the same places: what a saliency predictor learns from.

Both are cut by one exact code, so that they stay on top of each other through every turn, flip and zoom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spade3d.crops.crop import Box, Crop, Views, cut, draw_box, draw_view, keep_inside, scan_bounds
from spade3d.crops.pairs import as_images
from spade3d.volumes.preprocessing import Normalisation

REMEMBERED = 4096  # salient voxels kept of each scan, to centre crops on
MILD = Views(
    flip=(False, False, False),  # a reader looks for a liver lesion on the side of the liver
    rotation_deg=10.0,
    zoom=(0.85, 1.18),
    gamma=(0.8, 1.25),
    contrast=(0.9, 1.1),
    brightness=0.05,
    blur=(0.0, 0.7),
    blur_chance=0.1,
    noise=0.03,
)


@dataclass(frozen=True, eq=False)
class SaliencyBatch:
    """Crops and where to look in them."""

    images: Tensor  # float32 (n, 1, i, j, k)
    saliency: Tensor  # float32 (n, 1, i, j, k), 0..1
    scans: tuple[str, ...]  # n: their names

    def to(self, device: torch.device) -> SaliencyBatch:
        images, saliency = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.saliency))
        return SaliencyBatch(images, saliency, self.scans)

    def pin_memory(self) -> SaliencyBatch:
        """In memory from which a GPU copies while it computes."""
        return SaliencyBatch(self.images.pin_memory(), self.saliency.pin_memory(), self.scans)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class SalientSampling:
    """Crop in voxels and mm; a share `salient` of the crops is centred near a voxel drawn in proportion to saliency."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    crops: int = 2
    salient: float = 0.67
    views: Views = MILD


class SaliencyStream:
    """Batches of crops with saliency from a store, without end and without state."""

    def __init__(self, store, cases: Sequence[int], sampling: SalientSampling, *, seed: int = 0):
        if not cases:
            raise ValueError("no cases with saliency to draw from")
        self.store, self.cases, self.sampling, self.seed = store, list(cases), sampling, seed
        self.maps = SaliencyAsImage(store)
        self.spots = {case: self.find_spots(case) for case in self.cases}

    def find_spots(self, case: int) -> np.ndarray:
        """Voxels (n, 3) in mm of the scan, drawn in proportion to their saliency; none where the map is empty.

        Plane by plane: summed up, the map of a large CT would take 16 times the memory."""
        weights = self.store.saliency(case)
        planes = weights.sum(axis=(1, 2), dtype=np.int64)
        until = planes.cumsum()
        if until[-1] == 0:
            return np.zeros((0, 3))
        drawn = np.random.default_rng([self.seed, case]).random(REMEMBERED) * until[-1]
        spots = np.empty((REMEMBERED, 3))
        of = np.searchsorted(until, drawn, side="right")
        for plane in np.unique(of).tolist():
            mine = of == plane
            within = np.cumsum(weights[plane], dtype=np.int64)
            voxel = np.searchsorted(within, drawn[mine] - (until[plane] - planes[plane]), side="right")
            spots[mine] = np.column_stack([np.full(len(voxel), plane), *np.unravel_index(voxel, weights.shape[1:])])
        return spots * np.asarray(self.store.cases[case].spacing)

    def stream(self, start: int, stop: int) -> Iterator[SaliencyBatch]:
        return (self.batch(step) for step in range(start, stop))

    def batch(self, step: int) -> SaliencyBatch:
        rng = np.random.default_rng([self.seed, step])
        crops = [self.draw(rng) for _ in range(self.sampling.crops)]
        return SaliencyBatch(
            as_images([cut(self.store, crop) for crop in crops]),
            as_images([cut(self.maps, crop.plain()) for crop in crops]),
            tuple(self.store.cases[crop.case].name for crop in crops),
        )

    def draw(self, rng: np.random.Generator) -> Crop:
        """A view of a scan: around something salient in a share of cases, anywhere in the others."""
        sampling = self.sampling
        size = np.asarray(sampling.shape) * sampling.spacing
        case = self.cases[rng.integers(len(self.cases))]
        spots, bounds = self.spots[case], scan_bounds(self.store.cases[case])
        box = draw_box(rng, tuple(size), bounds)
        if len(spots) and rng.random() < sampling.salient:
            centre = spots[rng.integers(len(spots))] + (rng.random(3) - 0.5) * size / 2
            box = Box(tuple(keep_inside(centre, size, bounds)), tuple(size))
        return draw_view(rng, case, box, sampling.shape, sampling.views)


class SaliencyAsImage:
    """The saliency of a store in the place of its images: `cut` gives it as 0..1, and 0 outside the scan."""

    def __init__(self, store):
        self.store = store
        scale = Normalisation(0.0, 1 / 255, 0.0, 1.0)
        self.cases = tuple(_Placed(case.shape, case.affine, scale) for case in store.cases)

    def image(self, i: int, box=None) -> np.ndarray:
        return self.store.saliency(i, box).astype(np.int16)


@dataclass(frozen=True, eq=False)
class _Placed:
    """What `cut` asks of a case."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    normalisation: Normalisation
