"""A store of one scan, decompressed once, because windows that overlap read it again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int16

from spade3d.volumes.geometry import spacing_of
from spade3d.volumes.preprocessing import Normalisation, Prepared


@dataclass(frozen=True, eq=False)
class ScanRecord:
    """What crops read of a case."""

    affine: np.ndarray
    shape: tuple[int, int, int]
    normalisation: Normalisation
    body_box_mm: tuple[tuple[float, float, float], tuple[float, float, float]]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between voxels along i, j, k."""
        return spacing_of(self.affine)


class OneScan:
    """What crops read of a store, for a scan in memory: its record and its voxels."""

    def __init__(self, case: Any, voxels: Int16[np.ndarray, "i j k"]):
        i, j, k = voxels.shape
        self.cases = (ScanRecord(case.affine, (i, j, k), case.normalisation, case.body_box_mm),)
        self.voxels = voxels

    def image(self, _: int, box=None) -> Int16[np.ndarray, "_ _ _"]:
        """The voxels, or those in a box (start, stop)."""
        return self.voxels if box is None else self.voxels[tuple(map(slice, *box))]


def one_scan(store, i: int) -> OneScan:
    """Case `i` of a store."""
    return OneScan(store.cases[i], store.image(i))


def prepared_scan(ready: Prepared) -> OneScan:
    """A scan that was just prepared."""
    return OneScan(ready, ready.voxels)
