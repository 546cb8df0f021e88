"""Which class each voxel of a scan has, on the grid that the scan was given on, without ever holding all its logits.

The logits of a prepared scan come in slabs (`spade3d/networks/sliding.py`, which says what a slab takes). As soon as
the prepared voxels around a voxel of the source's grid are final, its logits are interpolated between them (trilinear)
and the highest wins: smoother borders than resampled labels. This is, up to rounding, what carrying the map of each
class over whole and then comparing them would give. Beside the slab there is in memory

    2 * classes * A * B * 4 bytes   the last plane of the slab before, and the first of this one, A x B voxels
    5 * ROOM * 4 bytes              logits on their way, on a GPU; a row on a CPU
    1 byte a voxel of the source    the result
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dagman.downstream.decision_kernels import decide
from spade3d.faults import Fault
from spade3d.networks.sliding import Predict, Size, slab_axis, slabs
from spade3d.volumes.geometry import canonical_flips, compose, inverse
from spade3d.volumes.volume import Grid

ROOM = 2**24  # logits carried to another grid at a time, where torch does it
HALF = 0.5 + 1e-6  # a voxel reaches half an index beyond its centre; a millionth for rounding
WHOLE = 1e-4  # an index so near to a whole number is meant to be it: affines lie rounded in files
ASKEW = 1e-3  # voxels that one grid may turn away from the other over its whole length


def predict_classes(
    logits: Predict,
    intensities: Float[np.ndarray, "i j k"],
    affine: Float[np.ndarray, "4 4"],
    source: Grid,
    *,
    classes: int,
    window: Size,
    overlap: float,
    device: torch.device,
    fill: float,
    batch: int | None = None,
) -> UInt8[np.ndarray, "_ _ _"]:
    """Classes of a prepared scan on its source's grid, canonical axes; 0 where nothing was prepared.

    logits: crops (b, 1, *window) on `device` -> (b, classes, *window). fill: the intensity around a scan that is
    shorter than the window; its lowest, as crops of training have it. batch: windows at once; None: as many as suit the
    device. Fault where the network's answers are no finite numbers.
    """
    turn = canonical_flips(source.affine, source.shape)
    ways = ways_between(affine, intensities.shape, turn.affine(source.affine), turn.canonical_shape)
    found, axis = np.zeros(turn.canonical_shape, dtype=np.uint8), slab_axis(intensities.shape, window)
    way, before = ways[axis], None
    for start, slab in slabs(logits, intensities, window, overlap, batch, classes, device, fill=fill):
        along = 1 + axis
        stop = start + slab.shape[along]
        if before is not None:  # what lies between the last plane of the slab before and the first of this one
            between = torch.cat([before, slab.narrow(along, 0, 1)], along)
            _decide(between, replaced(ways, axis, way.between(start - 1)), found)
        _decide(slab, replaced(ways, axis, way.among(start, stop)), found)
        before = slab.narrow(along, stop - start - 1, 1).clone()
    return found


@dataclass(frozen=True, eq=False)
class Way:
    """From one axis of a grid to that of another: voxel first + n of the new one lies share[n] of the way from voxel
    low[n] of the old one to the next, both in order; the other voxels of the new one lie beyond the old one."""

    first: int
    low: Int[np.ndarray, "n"]
    share: Float[np.ndarray, "n"]

    def among(self, start: int, stop: int) -> Way:
        """To what lies among the planes from `start` to before `stop`, counted from `start`."""
        begin, end = np.searchsorted(self.low, start), np.searchsorted(self.low + (self.share > 0), stop)
        return self._part(start, int(begin), int(end))

    def between(self, plane: int) -> Way:
        """To what lies between this plane and the next, on neither of them, counted from `plane`."""
        begin, end = np.searchsorted(self.low, plane), np.searchsorted(self.low, plane, side="right")
        return self._part(plane, int(begin + np.count_nonzero(self.share[begin:end] == 0)), int(end))

    def _part(self, base: int, begin: int, end: int) -> Way:
        return Way(self.first + begin, self.low[begin:end] - base, self.share[begin:end])


def replaced(ways: list[Way], axis: int, way: Way) -> list[Way]:
    """The ways with another one along `axis`."""
    return [*ways[:axis], way, *ways[axis + 1 :]]


def ways_between(
    affine: Float[np.ndarray, "4 4"], shape: Size, affine_to: Float[np.ndarray, "4 4"], shape_to: Size
) -> list[Way]:
    """From a prepared grid to its source's: along R, A, S both, so each axis goes its own way.

    Beyond the outermost voxel centres the edge value holds for half a voxel, as far as a voxel reaches.
    """
    to_from = compose(inverse(affine), affine_to)
    turned = np.abs(to_from[:3, :3] - np.diag(to_from.diagonal()[:3])) @ np.array(shape_to)
    if turned.max() > ASKEW or (to_from.diagonal() <= 0).any():
        raise ValueError(f"grids with the affines {affine.tolist()} and {affine_to.tolist()} are not parallel")
    return [_way(to_from[a, a], to_from[a, 3], shape[a], shape_to[a]) for a in range(3)]


def _way(step: float, offset: float, size: int, size_to: int) -> Way:
    place = offset + step * np.arange(size_to)
    place = np.where(np.abs(place - np.round(place)) < WHOLE, np.round(place), place)
    inside = np.flatnonzero((place >= -HALF) & (place <= size - 1 + HALF))
    place = np.clip(place[inside], 0, size - 1)
    low = np.floor(place).astype(np.int64)
    return Way(int(inside[0]) if len(inside) else 0, low, (place - low).astype(np.float32))


def _decide(logits: Float[Tensor, "classes i j k"], ways: list[Way], found: UInt8[np.ndarray, "_ _ _"]) -> None:
    """Write the classes of all voxels that the ways lead to."""
    i, j, k = (slice(way.first, way.first + len(way.low)) for way in ways)
    there = found[i, j, k]
    if there.size and not (_by_kernel if logits.is_cpu else _by_torch)(logits, ways, there):
        raise Fault("the network answers NaN or Inf; its training came apart, or its file is damaged: train again")


def _by_kernel(logits: Float[Tensor, "classes i j k"], ways: list[Way], there: UInt8[np.ndarray, "_ _ _"]) -> bool:
    """On a CPU, where it takes a tenth of the time of `_by_torch`. Returns whether all logits are finite."""
    if logits.stride(3) != 1:
        logits = logits.contiguous()
    count = len(logits.untyped_storage()) // logits.element_size()
    flat = logits.as_strided((count,), (1,), 0).numpy()
    strides = np.array([*logits.stride()[:3], len(logits)])
    places = [part for way in ways for part in (way.low, way.share)]
    return decide(flat, logits.storage_offset(), strides, *places, np.array(logits.shape[1:]) - 1, there)


def _by_torch(logits: Float[Tensor, "classes i j k"], ways: list[Way], there: UInt8[np.ndarray, "_ _ _"]) -> bool:
    """On any device, some rows at a time. Returns whether all logits are finite."""
    rows = max(1, ROOM // (len(logits) * there[0].size))
    finite = True
    for row in range(0, len(there), rows):
        carried = logits
        some = Way(0, ways[0].low[row : row + rows], ways[0].share[row : row + rows])
        for axis, way in enumerate([some, *ways[1:]], start=1):
            carried = _carried(carried, axis, way)
        finite &= bool(carried.isfinite().all())
        there[row : row + rows] = carried.argmax(dim=0).to(torch.uint8).cpu().numpy()
    return finite


def _carried(values: Tensor, axis: int, way: Way) -> Tensor:
    """Values at the places that the way along one axis leads to."""
    at = _taken(values, axis, way.low)
    if not way.share.any():
        return at
    following = _taken(values, axis, np.minimum(way.low + 1, values.shape[axis] - 1))
    share = torch.from_numpy(way.share).to(values.device)
    return at.lerp(following, share.view(-1, *[1] * (values.ndim - 1 - axis)))


def _taken(values: Tensor, axis: int, places: Int[np.ndarray, "n"]) -> Tensor:
    """The values at some places along an axis, as a view where they follow each other."""
    if (np.diff(places) == 1).all():
        return values.narrow(axis, int(places[0]), len(places))
    return values[(slice(None),) * axis + (torch.from_numpy(places).to(values.device),)]
