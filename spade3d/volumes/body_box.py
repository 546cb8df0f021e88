"""The box of the body in a scan, which places lie in the body itself, and parts of a grid that a box in mm cuts out.

The body is cheap (voxels about 4 mm apart) and rough by intent. A scan that shows only part of the body has the
box of that part.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from spade3d.volumes.geometry import apply_affine, spacing_of

Box = tuple[tuple[float, float, float], tuple[float, float, float]]  # lowest and highest corner, mm along R, A, S

COARSE_MM = 4.0
AIR_HU = -400.0
TABLE_MM = 12.0  # slabs thinner than this (a CT table, a blanket) are opened away
PART = 0.25  # a component this large beside the largest is body too: the other leg


def body_box(voxels: np.ndarray, affine: np.ndarray, modality: str) -> Box:
    """The box in mm, along the world's axes, of the body in canonical voxels (i, j, k).

    Foreground is above -400 HU in CT, otherwise above half of Otsu's threshold; opened, so that the table falls off;
    then the largest component and those at least a quarter as large. Where nothing stands out: the field of view.
    """
    body, to_mm = _body(voxels, affine, modality)
    cells = np.argwhere(body) if body.any() else np.argwhere(np.ones_like(body))
    centres = apply_affine(to_mm, cells.astype(np.float64))
    half = np.abs(to_mm[:3, :3]).sum(axis=1) / 2
    # The last coarse cell may reach beyond the scan.
    lowest, highest = field_of_view(voxels.shape, affine)
    low = np.maximum(centres.min(axis=0) - half, lowest)
    high = np.minimum(centres.max(axis=0) + half, highest)
    return _corner(low), _corner(high)


def in_body(points_mm: np.ndarray, voxels: np.ndarray, affine: np.ndarray, modality: str) -> np.ndarray:
    """bool (n,): which places (n, 3), in mm of the world, lie in the body of canonical voxels, lungs and gas included.

    What is dark lies in the body where that is seen on three of four sides within its axial plane: a field of view
    that ends within a lung leaves one side open. Where nothing stands out, everywhere in the field of view.
    """
    body, to_mm = _body(voxels, affine, modality)
    if not body.any():
        body = np.ones_like(body)
    across = [axis for axis in range(3) if axis != int(np.abs(affine[2, :3] / spacing_of(affine)).argmax())]
    seen = np.zeros(body.shape, dtype=np.uint8)
    for axis in across:
        seen += np.logical_or.accumulate(body, axis=axis)
        seen += np.flip(np.logical_or.accumulate(np.flip(body, axis), axis=axis), axis)
    inside = body | (seen >= 3)
    cells = np.rint(apply_affine(np.linalg.inv(to_mm), points_mm)).astype(int)
    nearest = np.clip(cells, 0, np.array(body.shape) - 1)  # the last coarse cell may end before the scan does
    return inside[tuple(nearest.T)] & (np.abs(cells - nearest) <= 1).all(axis=1)


def field_of_view(shape: Sequence[int], affine: np.ndarray) -> Box:
    """The box in mm that just holds a whole grid, to the outer faces of its voxels."""
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape], indexing="ij")).reshape(3, -1).T
    points = apply_affine(affine, corners)
    return _corner(points.min(axis=0)), _corner(points.max(axis=0))


def boxed(
    shape: Sequence[int], affine: np.ndarray, box: Box, margin_mm: float
) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """The slices of the part of a grid inside a box in mm and a margin around it, and the affine of that part."""
    low, high = np.array(box[0]) - margin_mm, np.array(box[1]) + margin_mm
    corners = np.array(np.meshgrid(*zip(low, high, strict=True), indexing="ij")).reshape(3, -1).T
    index = apply_affine(np.linalg.inv(affine), corners)
    start = np.clip(np.floor(index.min(axis=0) + 0.5), 0, np.array(shape) - 2).astype(int)
    stop = np.clip(np.ceil(index.max(axis=0) + 0.5), start + 2, shape).astype(int)
    i, j, k = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    return (i, j, k), affine @ _scaling(np.ones(3), start)


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold (1979): of 256 bins, the split with the largest variance between its two classes.

    A few very bright voxels (vessels, wrapped noise) would stretch the bins: the range ends at the 99.5th percentile.
    """
    values = values.astype(np.float64)  # numpy's percentile of int16 overflows between far neighbours
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    if high <= low:
        return low
    counts, edges = np.histogram(np.minimum(values, high), bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sum_below = np.cumsum(counts * centres)[:-1]
    sum_above = (counts * centres).sum() - sum_below
    # The first bin holds the minimum and the last one the cap, so neither class is ever empty.
    between = below * above * (sum_below / below - sum_above / above) ** 2.0
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))  # the empty bins between two classes are all as good
    return float(edges[1 + best].mean())


def _body(voxels: np.ndarray, affine: np.ndarray, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """The body in coarse cells, bool (p, q, r), False throughout where nothing stands out; and the affine from cells to
    mm."""
    wanted = np.ceil(COARSE_MM / np.array(spacing_of(affine)) - 0.1)
    stride = np.clip(wanted, 1, np.maximum(1, np.array(voxels.shape) // 8)).astype(int)
    coarse = voxels[tuple(slice(int(step) // 2, None, int(step)) for step in stride)]
    to_mm = affine @ _scaling(stride, (stride - 1) / 2)  # a coarse cell covers `stride` voxels

    # Half of Otsu: it parts bright tissue from dark as readily as tissue from air, and dark tissue is body, too.
    threshold = AIR_HU if modality == "CT" else (float(coarse.min()) + otsu(coarse)) / 2
    return _largest(_opened(coarse > threshold, spacing_of(to_mm))), to_mm


def _opened(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Without what is thinner than TABLE_MM. The body goes on beyond the field of view, so its cut faces stay."""
    size = [2 * int(TABLE_MM / mm / 2) + 1 for mm in spacing_mm]
    size = [n if n < side else 1 for n, side in zip(size, mask.shape, strict=True)]
    # With the edge repeated a minimum and a maximum filter are the erosion and the dilation, one axis at a time.
    opened = ndimage.maximum_filter(ndimage.minimum_filter(mask, size, mode="nearest"), size, mode="nearest")
    return opened if opened.any() else mask


def _largest(mask: np.ndarray) -> np.ndarray:
    components, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return (sizes >= PART * sizes.max())[components]


def _scaling(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    matrix = np.diag([*scale.tolist(), 1.0])
    matrix[:3, 3] = shift
    return matrix


def _corner(point: np.ndarray) -> tuple[float, float, float]:
    r, a, s = point.tolist()
    return r, a, s
