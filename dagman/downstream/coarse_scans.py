"""Scans of a store at a low resolution: means over blocks of voxels, so that nothing finer is left to alias."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Int16

from spade3d.crops.crop import Crop
from spade3d.volumes.geometry import stretch


class CoarseScans:
    """A store whose scans have voxels of at most `mm`, as near to it as whole numbers of voxels come; what crops read
    of a store. Each scan is read once and then kept (a body at 4 mm has 2 MB)."""

    def __init__(self, store, mm: float):
        self.store = store
        self.blocks = [
            np.clip((mm / np.array(case.spacing) + 1e-6).astype(int), 1, case.shape)  # a side shorter is one block
            for case in store.cases
        ]
        self.cases = tuple(
            replace(
                case,
                shape=tuple((np.array(case.shape) // block).tolist()),
                affine=case.affine @ stretch(block, (block - 1) / 2),
            )
            for case, block in zip(store.cases, self.blocks, strict=True)
        )
        self.kept: dict[int, Int16[np.ndarray, "i j k"]] = {}

    def in_source(self, crop: Crop) -> Crop:
        """The same crop in millimetres of the scan as the store has it: these begin at the centre of its first voxel,
        not of the first block."""
        to_mm = crop.to_mm.copy()
        to_mm[:3, 3] += (self.blocks[crop.case] - 1) / 2 * self.store.cases[crop.case].spacing
        return Crop(crop.case, crop.shape, to_mm)

    def image(self, i: int, box=None) -> Int16[np.ndarray, "i j k"]:
        """The means of a scan's blocks, rounded; or those in a box (start, stop)."""
        if i not in self.kept:
            self.kept[i] = block_means(self.store.image(i), self.blocks[i])
        return self.kept[i] if box is None else self.kept[i][tuple(map(slice, *box))]


def block_means(voxels: Int16[np.ndarray, "i j k"], block: np.ndarray) -> Int16[np.ndarray, "p q r"]:
    """Means over whole blocks; what is left at the far end is less than one and left out."""
    p, q, r = (side // size for side, size in zip(voxels.shape, block.tolist(), strict=True))
    a, b, c = block.tolist()
    cut = voxels[: p * a, : q * b, : r * c].reshape(p, a, q, b, r, c)
    return np.rint(cut.mean(axis=(1, 3, 5), dtype=np.float32)).astype(np.int16)
