"""The surface between the voxels: elements of marching cubes with their areas, as DeepMind's surface-distance has it.

An element lies at a corner where eight voxels meet that are not all in the set, nor all outside; what lies outside the
image is outside the set. Which of the eight are in it gives the element its area (Lorensen and Cline 1987, with the
surface half-way between voxel centres): 256 cases, of which MONAI keeps the table. Distances are between corners.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from dagman.evaluation.surfaces import Surface
from spade3d.kernel_cache import compiled


def surface_elements(labels: np.ndarray, value: int, box: np.ndarray, spacing: Sequence[float]) -> tuple:
    """The corners (n, 3) at which `value` has its surface, as a Surface, and the area of each in mm2: (n,) float64.

    labels: (i, j, k) C-contiguous uint16; box: (3, 2) that holds all its voxels; spacing: mm along i, j, k. Corner
    (i, j, k) is where the voxels i - 1 and i, j - 1 and j, k - 1 and k meet.
    """
    corners = np.asarray(box) + (0, 1)
    points, rows, codes = _corners(labels, value, corners)
    return Surface(points, rows, corners), areas_mm2(tuple(spacing))[codes]


@lru_cache(maxsize=8)  # of the spacings of a few cases
def areas_mm2(spacing: tuple[float, float, float]) -> Float[np.ndarray, "256"]:
    """The area of each of the 256 cases; read only."""
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area  # torch is not needed for voxels

    table, _ = create_table_neighbour_code_to_surface_area(spacing)
    areas = table.double().numpy()
    areas.setflags(write=False)
    return areas


@compiled(nogil=True)
def _corners(labels, value, corners):
    """`points` (n, 3) and `rows` as a Surface has them, and each point's case.

    The voxel before the corner along an axis is 0 there and the voxel behind it 1; voxel (a, b, c) is bit
    7 - (4 a + 2 b + c) of the case. Two passes: to count and to fill, or there is no telling how large the arrays are.
    """
    wide_j = corners[1, 1] - corners[1, 0]
    rows = np.zeros((corners[0, 1] - corners[0, 0]) * wide_j + 1, np.int64)
    points, codes = np.empty((0, 3), np.int64), np.empty(0, np.uint8)
    for filling in (False, True):
        found, row = 0, 0
        for i in range(corners[0, 0], corners[0, 1]):
            for j in range(corners[1, 0], corners[1, 1]):
                before = 0  # nothing lies in front of the box
                for k in range(corners[2, 0], corners[2, 1]):
                    behind = _four(labels, value, i, j, k)
                    code = before | (behind >> 1)
                    before = behind
                    if 0 < code < 255:
                        if filling:
                            points[found, 0], points[found, 1], points[found, 2] = i, j, k
                            codes[found] = code
                        found += 1
                row += 1
                rows[row] = found
        if not filling:
            points, codes = np.empty((found, 3), np.int64), np.empty(found, np.uint8)
    return points, rows, codes


@compiled(nogil=True)
def _four(labels, value, i, j, k):
    """Which of the four voxels of plane k about the corner (i, j) are in the set, as bits 7, 5, 3, 1."""
    size_i, size_j, size_k = labels.shape
    bits = 0
    if k < size_k:
        for a in range(2):
            for b in range(2):
                at_i, at_j = i - 1 + a, j - 1 + b
                if 0 <= at_i < size_i and 0 <= at_j < size_j and labels[at_i, at_j, k] == value:
                    bits |= 128 >> (4 * a + 2 * b)
    return bits
