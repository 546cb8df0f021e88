"""A stored scan in blocks of a few millimetres: what a prior that reads the image is made on, once a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int16, Shaped
from scipy import ndimage

from spade3d.crops.crop import mm_to_stored
from spade3d.volumes.body_box import AIR_HU
from spade3d.volumes.coarse_scan import cell_mm
from spade3d.volumes.geometry import stretch
from spade3d.volumes.preprocessing import foreground_of

THIN_MM, THIN_SHARE = 8.0, 1 / 40  # of the longest side: what is thinner (a table, a blanket) is not body by itself


@dataclass(frozen=True, eq=False)
class ScanBlocks:
    """Every n-th stored voxel of a scan, along each axis so that a block holds one or two of them.

    stored     which of the stored voxels these are, along i, j, k
    voxels     int16 as stored
    affine     (4, 4): these voxels -> RAS+ mm
    block      voxels of a block along i, j, k; the last block holds what is left
    from_scan  (4, 4): millimetres of the scan -> blocks
    """

    stored: tuple[slice, slice, slice]
    voxels: Int16[np.ndarray, "i j k"]
    affine: Float[np.ndarray, "4 4"]
    block: tuple[int, int, int]
    from_scan: Float[np.ndarray, "4 4"]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between these voxels."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return i, j, k

    def mean(self, values: Shaped[np.ndarray, "i j k"]) -> Float32[np.ndarray, "p q r"]:
        """The mean of values on these voxels in each block."""
        values = values.astype(np.float32)
        for axis, (size, side) in enumerate(zip(values.shape, self.block, strict=True)):
            if side > 1:
                starts = np.arange(0, size, side)
                counts = np.minimum(side, size - starts).astype(np.float32)
                counts = counts.reshape([-1 if a == axis else 1 for a in range(3)])
                values = np.add.reduceat(values, starts, axis=axis) / counts
        return values


def scan_blocks(store, i: int, resolution_mm: float) -> ScanBlocks:
    """Case `i` of a store in blocks of about `resolution_mm`, or of one voxel where voxels are larger."""
    case = store.cases[i]
    spacing = np.array(case.spacing)
    # Two voxels a block along each axis are enough to tell how much of it is what.
    stride = np.maximum(1, (resolution_mm / spacing / 2).astype(int))
    block = np.maximum(1, np.round(resolution_mm / (spacing * stride))).astype(int)
    first = stride // 2
    a, b, c = (slice(start, None, step) for start, step in zip(first.tolist(), stride.tolist(), strict=True))
    voxels = np.ascontiguousarray(store.image(i)[a, b, c])
    to_stored = stretch(stride, first)
    of_block = to_stored @ stretch(block, (block - 1) / 2)
    p, q, r = map(int, block)
    return ScanBlocks(
        (a, b, c), voxels, case.affine @ to_stored, (p, q, r), np.linalg.inv(of_block) @ mm_to_stored(case)
    )


def resolution_of(store, cases: Sequence[int], most_mm: float) -> float:
    """`most_mm`, or finer where the scans are small: about a 56th of their longest side."""
    return min(most_mm, cell_mm(store, cases))


def body_mask(
    values: Shaped[np.ndarray, "i j k"], affine: Float[np.ndarray, "4 4"], least: float
) -> Bool[np.ndarray, "i j k"]:
    """The body: the largest component of what is at least as bright as `least`, lungs and gas in it filled.

    Holes are filled slice by slice across the patient's long axis, because the field of view cuts the lungs open above
    and below. All of the grid where nothing is so bright.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    thin_mm = min(THIN_MM, THIN_SHARE * float((spacing * values.shape).max()))
    size = [2 * int(thin_mm / mm / 2) + 1 for mm in spacing]
    size = [n if n < side else 1 for n, side in zip(size, values.shape, strict=True)]
    bright = values >= least
    # A minimum and a maximum filter with the edge repeated: the body goes on beyond the field of view.
    opened = ndimage.maximum_filter(ndimage.minimum_filter(bright, size, mode="nearest"), size, mode="nearest")
    body = largest(opened if opened.any() else bright, 1)
    along = int(np.abs(affine[2, :3] / spacing).argmax())
    for plane in np.moveaxis(body, along, 0):
        plane[...] = ndimage.binary_fill_holes(plane)
    return body if body.any() else np.ones_like(body)


def body_of(blocks: ScanBlocks, modality: str) -> Bool[np.ndarray, "i j k"]:
    """`body_mask` of a scan: above -400 HU in CT, otherwise brighter than the background peak, all without one."""
    is_ct = modality == "CT"
    least = np.nextafter(AIR_HU, np.inf) if is_ct else foreground_of(blocks.voxels.ravel()).min()
    return body_mask(blocks.voxels, blocks.affine, float(least))


def largest(mask: Shaped[np.ndarray, "i j k"], count: int | None, least: float = 0.0) -> Shaped[np.ndarray, "i j k"]:
    """The `count` largest components of a mask (all for None), of those at least `least` times the largest."""
    components, found = ndimage.label(mask)
    if found == 0:
        return mask
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    kept = sizes >= max(1.0, least * sizes.max())
    if count is not None:
        kept &= np.isin(np.arange(len(sizes)), np.argsort(-sizes, kind="stable")[:count])
    return kept[components]
