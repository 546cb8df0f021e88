"""Maps that know nothing of the finding: what a map must beat before it may be said to have found anything.

They pass through the same judge: as many thresholds, chosen in the same way, so that the box of the centre, too, has
the size that fits best. A map of the centre alone beats attention at finding slices in several CT sets ("Normal
Guidance is what Attention Needs", 2026, by its abstract), and an organ's own place is half the answer to a question
that names the organ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from spade3d.volumes.geometry import spacing_of


def random_map(
    shape: tuple[int, int, int], cell: Sequence[int], rng: np.random.Generator
) -> Float[np.ndarray, "i j k"]:
    """Chance: each cell of `cell` voxels its own value of 0 to 1, enlarged as the maps of such cells are."""
    return _enlarged(rng.random([-(-side // step) for side, step in zip(shape, cell, strict=True)]), shape, cell)


def truth_on_cells(truth: Bool[np.ndarray, "i j k"], cell: Sequence[int]) -> Float[np.ndarray, "i j k"]:
    """The share of each cell of `cell` voxels that the finding takes, enlarged as maps are: what cells of this size
    allow. No map of them can be expected to do better; it is no baseline but the ceiling."""
    padded = np.pad(truth.astype(np.float64), [(0, -side % step) for side, step in zip(truth.shape, cell, strict=True)])
    for axis, step in enumerate(cell):
        padded = np.add.reduceat(padded, np.arange(0, padded.shape[axis], step), axis=axis) / step
    return _enlarged(padded, truth.shape, cell)


def centre_map(shape: tuple[int, int, int]) -> Float[np.ndarray, "i j k"]:
    """1 in the middle of the volume, falling to 0 at its faces: a share t of the maximum is a box of the volume's form
    with sides 1 - t as long."""
    distance = np.zeros(shape)
    for axis, side in enumerate(shape):
        off = np.abs(np.arange(side) - (side - 1) / 2) / (side / 2)
        distance = np.maximum(distance, off.reshape([-1 if n == axis else 1 for n in range(3)]))
    return 1 - distance


def organ_map(organ: Bool[np.ndarray, "i j k"]) -> Float[np.ndarray, "i j k"]:
    """The place of the finding's organs and nothing else: 1 in them, 0 elsewhere."""
    return organ.astype(np.float64)


def organ_core_map(organ: Bool[np.ndarray, "i j k"], affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "i j k"]:
    """How deep a voxel lies in the finding's organs, of the deepest: a box about an organ's middle, as large as fits
    best, which is the most that an organ says of a lesion in it. Of a pair of organs each has its own middle."""
    pieces, count = ndimage.label(organ, np.ones((3, 3, 3)))
    # A layer of voxels around, so that an organ that the field of view cuts ends there.
    depth = ndimage.distance_transform_edt(np.pad(organ, 1), sampling=spacing_of(affine))[1:-1, 1:-1, 1:-1]
    if not count:
        return depth
    deepest = np.concatenate([[1.0], np.atleast_1d(ndimage.maximum(depth, pieces, range(1, count + 1)))])
    small = np.bincount(pieces.ravel(), minlength=count + 1) < 0.1 * np.bincount(pieces.ravel())[1:].max()
    return np.where(small[pieces], 0.0, depth / deepest[pieces])


def _enlarged(cells: np.ndarray, shape: Sequence[int], cell: Sequence[int]) -> np.ndarray:
    """Values of cells at voxels: linear between the cells' centres, constant beyond the outer ones."""
    places = [(np.arange(side) + 0.5) / step - 0.5 for side, step in zip(shape, cell, strict=True)]
    grid = np.meshgrid(*places, indexing="ij")
    return np.clip(ndimage.map_coordinates(cells, grid, order=1, mode="nearest"), 0, 1)
