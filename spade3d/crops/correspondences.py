"""Correspondences: which cell of one crop shows the place that a cell of another crop shows, in closed form.

The map between two crops of one scan is affine and known, so the nearest cell is one 3 x 4 product and a rounding
away: O(cells), exact, with the remaining distance in millimetres. Between two scans the same holds after the body
frames have carried one scan's millimetres onto the other's (Spade, abstract: "spatial correspondences between 3D
scans"; how the paper extracts them is not public, see docs/concepts.md). That is for whoever compares scans place by
place: the counterparts that Spade draws are whole boxes (`bodies.py`).
"""

import math
from dataclasses import dataclass

import numpy as np

from spade3d.crops import kernels
from spade3d.crops.crop import Crop


@dataclass(frozen=True, eq=False)
class Matches:
    """For each cell of the first crop's grid, flattened: its nearest cell in the second crop's grid."""

    cell: np.ndarray  # int64 (cells of a,): flat index into the grid of b, -1 where there is none
    distance_mm: np.ndarray  # float32 (cells of a,): between the two cell centres, inf where there is none

    @property
    def valid(self) -> np.ndarray:
        """bool (cells of a,): the place lies within the second crop's grid."""
        return self.cell >= 0


def match(a: Crop, b: Crop, grid: tuple[int, int, int], between: np.ndarray | None = None) -> Matches:
    """Match the feature grid of crop `a` with that of crop `b`; both have `grid` cells.

    `between` (4, 4) carries millimetres of a's scan to millimetres of b's scan; left out, the two are one scan.
    The rounding finds the truly nearest cell as long as b's voxel axes are orthogonal in millimetres, which holds for
    every crop that `draw_view` makes (rotation and zoom are composed in millimetres).
    """
    a_to_b_mm = cell_to_mm(a, grid) if between is None else between @ cell_to_mm(a, grid)
    b_to_mm = cell_to_mm(b, grid)
    cells = math.prod(grid)
    cell, distance_mm = np.empty(cells, dtype=np.int64), np.empty(cells, dtype=np.float32)
    kernels.match_cells(np.linalg.solve(b_to_mm, a_to_b_mm), b_to_mm, grid, grid, cell, distance_mm)
    return Matches(cell, distance_mm)


def cell_to_mm(crop: Crop, grid: tuple[int, int, int]) -> np.ndarray:
    """The affine (4, 4) that takes a cell of a crop's feature grid, as (i, j, k) index, to scan millimetres."""
    i, j, k = (size / cells for size, cells in zip(crop.shape, grid, strict=True))
    centre = [(i - 1) / 2, (j - 1) / 2, (k - 1) / 2]
    return crop.to_mm @ np.array([[i, 0, 0, centre[0]], [0, j, 0, centre[1]], [0, 0, k, centre[2]], [0, 0, 0, 1]])


def cell_places(crop: Crop, grid: tuple[int, int, int]) -> np.ndarray:
    """The centres of all cells in scan millimetres, float64 (cells, 3), in flat order."""
    to_mm = cell_to_mm(crop, grid)
    return np.stack(np.indices(grid), axis=-1).reshape(-1, 3) @ to_mm[:3, :3].T + to_mm[:3, 3]


def voxels_at(crop: Crop, places_mm: np.ndarray) -> np.ndarray:
    """Where places (n, 3) of the scan lie in a crop, in its voxels (n, 3), fractional."""
    to_voxel = np.linalg.inv(crop.to_mm)
    return places_mm @ to_voxel[:3, :3].T + to_voxel[:3, 3]
