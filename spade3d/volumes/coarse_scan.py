"""A stored scan on a coarse grid along R, A, S: what the frames are found on.

The cells are cubes of one size for the whole set, so that a typical scan has about 56 along its longest side: 6 mm for
an abdomen, 1 mm for a crop around a hippocampus. Finer does not pay: two patients differ by more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from spade3d.volumes.body_box import field_of_view
from spade3d.volumes.geometry import resample, stretch

CELLS = 56
UNSEEN = -1.0


@dataclass(frozen=True, eq=False)
class CoarseScan:
    """Brightness float32 (i, j, k) from 0 to 1, UNSEEN where the scan has no voxel; affine (4, 4) cell -> RAS mm."""

    values: np.ndarray
    affine: np.ndarray

    @property
    def cell_mm(self) -> float:
        """The side of a cell."""
        return float(self.affine[0, 0])

    @property
    def centre_mm(self) -> np.ndarray:
        """The middle of the grid."""
        return self.affine[:3, :3] @ ((np.array(self.values.shape) - 1) / 2) + self.affine[:3, 3]


def cell_mm(store, cases: Sequence[int]) -> float:
    """The side of a cell in mm, for all scans of a set."""
    longest = [np.multiply(store.cases[i].shape, store.cases[i].spacing).max() for i in cases]
    return float(np.median(longest)) / CELLS


def coarse_scan(store, i: int, mm: float) -> CoarseScan:
    """Case `i` of a store in cells of `mm`; a scan of fewer voxels is interpolated."""
    case = store.cases[i]
    # At least two voxels a cell are kept, so that the blur below still sees what it must suppress.
    stride = np.maximum(1, (mm / np.array(case.spacing) / 2).astype(int))
    voxels = store.image(i)[tuple(slice(int(step) // 2, None, int(step)) for step in stride)]
    affine = case.affine @ stretch(stride, stride // 2)
    to_unit = case.normalisation
    values = (to_unit.intensity(voxels) - to_unit.low) / (to_unit.high - to_unit.low)
    values = ndimage.gaussian_filter(values, 0.5 * mm / (np.array(case.spacing) * stride), mode="nearest", truncate=2)
    low, high = map(np.array, field_of_view(case.shape, case.affine))
    shape = np.maximum(2, np.round((high - low) / mm)).astype(int)
    grid = stretch(np.full(3, mm), (low + high) / 2 - mm * (shape - 1) / 2)
    i_cells, j_cells, k_cells = map(int, shape)
    return CoarseScan(resample(values, affine, grid, (i_cells, j_cells, k_cells), 1, UNSEEN), grid)
