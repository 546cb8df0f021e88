"""Integral volumes of saliency, by which the weight in a box costs eight reads, however large the box.

Integral images after Viola and Jones (2001, section 2.1), one axis more. Sums are int64 of stored integers: exact.
Measured against numpy on one core: `integral_volume` of 96^3 voxels in 32^3 cells 5.6 ms instead of 99 (bincount and
cumsum), `box_sums` of 29^3 boxes 0.08 ms instead of 1.35.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from spade3d.kernel_cache import compiled

Mode = Literal["mass", "area", "per_component"]


@compiled(nogil=True)
def integral_volume(weights, to_cell, first, integral):
    """Add each weight (uint8, voxels i, j, k) to the cell that its voxel's centre lies in, then sum over the cells.

    `to_cell` (4, 4) takes voxels to cells; a cell covers [c, c + 1) on each axis, `first` (3,) is the cell that the
    sums begin with, and what lies in none of them is left out. integral (cells + 1 on each axis, int64), zero before:
    afterwards integral[i, j, k] holds all weight in the cells before first + (i, j, k) on every axis.
    """
    ni, nj, nk = integral.shape
    for i in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            for k in range(weights.shape[2]):
                if weights[i, j, k] > 0:
                    x = to_cell[0, 0] * i + to_cell[0, 1] * j + to_cell[0, 2] * k + to_cell[0, 3]
                    y = to_cell[1, 0] * i + to_cell[1, 1] * j + to_cell[1, 2] * k + to_cell[1, 3]
                    z = to_cell[2, 0] * i + to_cell[2, 1] * j + to_cell[2, 2] * k + to_cell[2, 3]
                    p, q, r = np.floor(x) - first[0] + 1, np.floor(y) - first[1] + 1, np.floor(z) - first[2] + 1
                    if 0 < p < ni and 0 < q < nj and 0 < r < nk:  # as floats: NaN as a whole number may be 0
                        integral[int(p), int(q), int(r)] += weights[i, j, k]
    for i in range(1, ni):
        for j in range(1, nj):
            row = 0
            for k in range(1, nk):
                row += integral[i, j, k]
                integral[i, j, k] = row + integral[i - 1, j, k] + integral[i, j - 1, k] - integral[i - 1, j - 1, k]


@compiled(nogil=True)
def box_sums(integral, lowest, size, out):
    """out[i, j, k] = the weight in the box of `size` cells whose lowest cell is lowest + (i, j, k).

    Cells are counted from the first one of `integral`; a box may reach beyond them, where there is no weight.
    """
    mi, mj, mk = np.int64(integral.shape[0] - 1), np.int64(integral.shape[1] - 1), np.int64(integral.shape[2] - 1)
    before, behind = np.empty(out.shape[2], np.int64), np.empty(out.shape[2], np.int64)
    for k in range(out.shape[2]):
        before[k] = min(max(lowest[2] + k, 0), mk)
        behind[k] = min(max(lowest[2] + k + size[2], 0), mk)
    for i in range(out.shape[0]):
        a, b = min(max(lowest[0] + i, 0), mi), min(max(lowest[0] + i + size[0], 0), mi)
        for j in range(out.shape[1]):
            c, d = min(max(lowest[1] + j, 0), mj), min(max(lowest[1] + j + size[1], 0), mj)
            bd, bc, ad, ac = integral[b, d], integral[b, c], integral[a, d], integral[a, c]
            for k in range(out.shape[2]):
                e, f = before[k], behind[k]
                out[i, j, k] = (bd[f] - bd[e]) - (bc[f] - bc[e]) - (ad[f] - ad[e]) + (ac[f] - ac[e])


@dataclass(frozen=True, eq=False)
class Part:
    """What a view has to keep enough of (all that is salient, or one component of it), as weights on cells."""

    first: np.ndarray  # int64 (3,): the cell that the table begins with
    integral: np.ndarray  # int64 (cells + 1 on each axis)

    @property
    def total(self) -> int:
        """All weight of the part."""
        return int(self.integral[-1, -1, -1])

    def inside(self, lowest: np.ndarray, size: np.ndarray, count: np.ndarray) -> np.ndarray:
        """int64 (count): the weight in each box of `size` cells, the first of which begins at the cell `lowest`."""
        out = np.empty(tuple(count), dtype=np.int64)
        box_sums(self.integral, lowest - self.first, size, out)
        return out


def parts_of(saliency: np.ndarray, to_cell: np.ndarray, mode: Mode, within: np.ndarray | None = None) -> list[Part]:
    """The parts of a saliency (uint8, voxels i, j, k); none where nothing is salient.

    `to_cell` (4, 4) takes its voxels to cells; `within` (2, 3) are the cells to be counted, from and up to: all of
    them where left out.
    """
    parts = []
    for start, weights in _weights(saliency, mode):
        moved = to_cell.copy()
        moved[:3, 3] += to_cell[:3, :3] @ start
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in weights.shape]), axis=-1).reshape(-1, 3)
        cells = np.floor(corners @ moved[:3, :3].T + moved[:3, 3]).astype(np.int64)
        # A cell more on each side: the kernel may round the place of a corner into the cell beside ours.
        first, last = cells.min(axis=0) - 1, cells.max(axis=0) + 2
        if within is not None:
            first, last = np.maximum(first, within[0]), np.minimum(last, within[1])
        if (first < last).all():
            part = Part(first, np.zeros(last - first + 1, dtype=np.int64))
            integral_volume(weights, moved, first, part.integral)
            parts.append(part)
    return [part for part in parts if part.total > 0]


def _weights(saliency: np.ndarray, mode: Mode) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The voxel (3,) that each part begins with, and its weights (uint8, i, j, k) in the box that it fills."""
    salient = saliency > 0
    filled = [np.flatnonzero(salient.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    if len(filled[0]) == 0:
        return
    start = np.array([along[0] for along in filled])
    values = np.ascontiguousarray(saliency[tuple(slice(along[0], along[-1] + 1) for along in filled)])
    if mode == "mass":
        yield start, values
    elif mode == "area":
        yield start, (values > 0).view(np.uint8)
    else:  # joined by faces, edges and corners
        named, _ = ndimage.label(values, structure=np.ones((3, 3, 3)))
        for name, where in enumerate(ndimage.find_objects(named), start=1):
            yield start + [axis.start for axis in where], np.where(named[where] == name, values[where], np.uint8(0))
