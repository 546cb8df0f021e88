"""A grid in the body frame, and what some scans hold in its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Shaped
from scipy import ndimage

from spade3d.crops import kernels
from spade3d.volumes.body_box import field_of_view
from spade3d.volumes.coarse_scan import coarse_scan
from spade3d.volumes.geometry import apply_affine, inverse, resample, stretch

SAMPLES = 4  # a cell, along each axis, at most: how much of it a structure takes, to a 64th
MOST_CELLS = 4_000_000

Frames = Mapping[int, np.ndarray | None]  # case -> RAS+ mm of the scan to mm of the body frame; None: not placed


@dataclass(frozen=True, eq=False)
class FrameGrid:
    """Cells of `mm` in the body frame; `to_frame` takes cells to its millimetres."""

    shape: tuple[int, int, int]
    mm: float
    to_frame: Float[np.ndarray, "4 4"]

    def to_stored(self, case, frame: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
        """Cells -> stored voxels of a scan of that frame."""
        return inverse(frame @ case.affine) @ self.to_frame

    def blurred(self, values: Float[np.ndarray, "i j k *region"], sigma_mm: float) -> Float[np.ndarray, "..."]:
        """Under a Gaussian; beyond the grid lies nothing."""
        sigma = [sigma_mm / self.mm] * 3 + [0.0] * (values.ndim - 3)
        return ndimage.gaussian_filter(values, sigma, mode="constant", truncate=3)


def grid_over(store, cases: Sequence[int], frames: Frames, mm: float) -> FrameGrid:
    """Cells of `mm` over all that these scans show, larger ones where that would be more than MOST_CELLS."""
    views = [field_of_view(store.cases[i].shape, store.cases[i].affine) for i in cases]
    corners = [
        apply_affine(frames[i], np.stack(np.meshgrid(*zip(*view, strict=True)), axis=-1).reshape(-1, 3))
        for i, view in zip(cases, views, strict=True)
    ]
    low, high = np.concatenate(corners).min(axis=0), np.concatenate(corners).max(axis=0)
    mm = max(mm, float((high - low).prod() / MOST_CELLS) ** (1 / 3))
    shape = np.ceil((high - low) / mm - 1e-6).astype(int)
    i, j, k = map(int, np.maximum(shape, 1))
    centre = (low + high) / 2
    return FrameGrid((i, j, k), mm, stretch(np.full(3, mm), centre - mm * (np.array([i, j, k]) - 1) / 2))


def labels_on(
    grid: FrameGrid, store, i: int, frame: Float[np.ndarray, "4 4"], values: Sequence[int]
) -> tuple[Float32[np.ndarray, "i j k region"], Float32[np.ndarray, "i j k"]]:
    """The share of each cell that each structure takes in one labelled scan, and the share that the scan shows."""
    to_stored = grid.to_stored(store.cases[i], frame)
    fine = int(np.clip(np.ceil(np.linalg.norm(to_stored[:3, :3], axis=0).max()), 1, SAMPLES))
    which = np.ones(1 << 16, dtype=np.uint16)  # 0 beyond the scan, 1 none of the structures
    which[list(values)] = np.arange(len(values)) + 2
    found = np.empty([side * fine for side in grid.shape], dtype=np.uint16)
    of_sample = stretch(np.full(3, 1 / fine), np.full(3, 0.5 / fine - 0.5))
    kernels.resample_labels(which[store.labels(i)], to_stored @ of_sample, found)
    p, q, r = grid.shape
    found = found.reshape(p, fine, q, fine, r, fine)

    def share(mask: Shaped[np.ndarray, "..."]) -> np.ndarray:
        return mask.mean(axis=(1, 3, 5), dtype=np.float32)

    return np.stack([share(found == n + 2) for n in range(len(values))], axis=-1), share(found > 0)


def mean_image_on(
    grid: FrameGrid, store, cases: Sequence[int], frames: Frames
) -> tuple[Float[np.ndarray, "i j k"], Float[np.ndarray, "i j k"]]:
    """The mean brightness (0..1 of each scan's range) of the scans that show a cell, and how many do."""
    total, count = np.zeros(grid.shape), np.zeros(grid.shape)
    for i in cases:
        coarse = coarse_scan(store, i, grid.mm)
        affine = frames[i] @ coarse.affine
        # An unseen cell must not be mixed into its neighbours: what is seen is resampled apart.
        seen = resample((coarse.values >= 0).astype(np.float32), affine, grid.to_frame, grid.shape, 1, 0.0) > 0.99
        values = resample(coarse.values, affine, grid.to_frame, grid.shape, 1, 0.0)
        total[seen] += values[seen]
        count += seen
    return total / np.maximum(count, 1), count
