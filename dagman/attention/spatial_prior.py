"""Spatial priors: where regions are likely in a scan, carried into any crop of it and pooled to cells.

SPAN (Miao et al. 2022, arXiv 2209.03745, abstract) assigns attention heads "priors over semantic regions". Here a prior
is a volume of values 0..1 for each region, in millimetres of a scan. It goes through the crop's own affine, so that it
lies on the image after every cut, turn, flip and zoom. Where the volumes come from is in `prior_sources.py`, how heads
follow them in `guidance.py`.

A crop may show the patient mirrored. What lies on the left of such a picture is the right kidney, and a network that
sees only the picture must call it the left one: regions with a side change places (`Priors.mirror`).
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from threading import Lock

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dagman.attention import prior_kernels
from spade3d.crops.crop import Crop
from spade3d.faults import UsageFault
from spade3d.volumes.organs import canonical_organ

STEPS = 255  # a value 0..1 is kept in so many: a prior is not known to a hundredth
SAMPLES = 50_000  # of a crop: 1 to 2 ms for 8 regions
CHAMBERS = {"ventricle", "ventricular", "atrium", "atrial", "heart", "myocardium", "coronary"}
OF_THE_BRAIN = {"lateral", "brain", "cerebral"}
WRONG = ("permuted", "shifted")


@dataclass(frozen=True, eq=False)
class PriorVolume:
    """The regions in and around one scan, in steps of 1/255; `from_scan` takes mm of the scan to voxels of `values`."""

    values: UInt8[np.ndarray, "i j k region"]  # C order, whatever it is made of
    from_scan: Float[np.ndarray, "4 4"]

    def __post_init__(self):
        object.__setattr__(self, "values", np.ascontiguousarray(self.values))


VolumeOf = Callable[[int], PriorVolume | None]  # of a case; None: nothing is known of this scan


@dataclass(frozen=True, eq=False)
class Priors:
    """The priors of the cases of a store.

    regions  their names
    mirror   for each region the one whose place it takes in a mirrored crop: itself, its other side, or None where
             the other side is not among the regions (nothing is known then)
    source   what the priors were made from, for logs
    store    whose cases they are
    volume   the prior of a case; the first use of a scan may read it whole
    """

    regions: tuple[str, ...]
    mirror: Mapping[str, str | None]
    source: str
    store: object
    volume: VolumeOf

    def of_crop(
        self, crop: Crop, cell: int | tuple[int, int, int], samples: int | None = None
    ) -> Float32[np.ndarray, "region p q r"]:
        """The share (0..1) of each cell that a region takes, for cells of `cell` voxels of the crop.

        samples  along each axis of a cell, at most and whatever the crop, so that shares of two crops compare; None: as
                 many as the crop has room for (SAMPLES)

        The last cell of an odd size is what the crop shows of it. All is 0 outside the prior's volume and for a scan
        of which nothing is known. UsageFault where the whole crop is one cell: there is no place to look at.
        """
        cell = (cell,) * 3 if isinstance(cell, int) else cell
        grid = cells_of(crop.shape, cell)
        volume = self.volume(crop.case)
        if volume is None:
            return np.zeros((len(self.regions), *grid), dtype=np.float32)
        shares = pooled(volume, crop, cell, grid, samples)
        if not is_mirrored(crop.to_mm, self.store.cases[crop.case].affine):
            return np.ascontiguousarray(np.moveaxis(shares, -1, 0))
        here = {region: n for n, region in enumerate(self.regions)}
        mirrored = np.zeros((len(self.regions), *grid), dtype=np.float32)
        for n, region in enumerate(self.regions):
            other = self.mirror[region]
            if other is not None:
                mirrored[n] = shares[..., here[other]]
        return mirrored

    def of_crops(
        self, crops: Sequence[Crop], cell: int | tuple[int, int, int]
    ) -> Float32[np.ndarray, "crop region p q r"]:
        """`of_crop` of crops of one shape, as the images of a batch."""
        return np.stack([self.of_crop(crop, cell) for crop in crops])


def cells_of(shape: tuple[int, int, int], cell: tuple[int, int, int]) -> tuple[int, int, int]:
    """Cells along i, j, k, the last ones as large as the shape leaves them; UsageFault where there is only one."""
    i, j, k = (ceil(size / side) for size, side in zip(shape, cell, strict=True))
    if i * j * k < 2:
        raise UsageFault(
            f"a crop of {_by(shape)} voxels is one cell of {_by(cell)}, and its attention is 1 whatever it shows; at "
            "least two cells are needed to guide attention: choose a larger crop, or guide an earlier stage"
        )
    return i, j, k


def pooled(
    volume: PriorVolume,
    crop: Crop,
    cell: tuple[int, int, int],
    grid: tuple[int, int, int],
    samples: int | None = None,
) -> Float32[np.ndarray, "p q r region"]:
    """The mean of a volume over each cell of a crop, from as many samples a cell as it holds voxels of the volume
    (along an axis; not more than `samples`, or than all cells together have room for)."""
    to_volume = volume.from_scan @ crop.to_mm
    room = samples or max(1, int((SAMPLES / prod(grid)) ** (1 / 3) + 1e-9))
    extents = np.linalg.norm(to_volume[:3, :3], axis=0) * cell
    at = [
        _samples(size, side, min(room, max(1, ceil(extent - 1e-6))))
        for size, side, extent in zip(crop.shape, cell, extents.tolist(), strict=True)
    ]
    out = np.empty((*grid, volume.values.shape[-1]), dtype=np.float32)
    prior_kernels.pool(volume.values, to_volume, *at, out)
    out /= STEPS * prod(places.shape[1] for places in at)
    return out


def _samples(size: int, cell: int, count: int) -> Float[np.ndarray, "cell sample"]:
    """Where the samples of each cell lie along an axis of `size` voxels, evenly over what the crop shows of it."""
    starts = np.arange(0, size, cell)
    shown = np.minimum(cell, size - starts)
    return starts[:, None] - 0.5 + (np.arange(count) + 0.5) / count * shown[:, None]


def is_mirrored(to_mm: Float[np.ndarray, "4 4"], affine: Float[np.ndarray, "4 4"]) -> bool:
    """Whether a crop shows left and right changed over, against the stored array of its scan.

    A crop's axes are those of the array, flipped and then turned. No affine tells a turn by half from two flips: those
    flips are taken that leave the least turn, so that a turn of up to 90 degrees about any axis never mirrors. Which
    axis of the array is left to right, the scan's `affine` (stored voxel -> RAS+ mm) says.
    """
    axes = to_mm[:3, :3] / np.linalg.norm(to_mm[:3, :3], axis=0)
    left_right = int(np.abs(affine[0, :3] / np.linalg.norm(affine[:3, :3], axis=0)).argmax())
    hand = np.sign(np.linalg.det(axes))
    flips = [signs for signs in itertools.product((1, -1), repeat=3) if prod(signs) == hand]
    # The fewest flips first, because the first of equals is taken: a quarter turn is a turn.
    flips.sort(key=lambda signs: signs.count(-1))
    unturned = [round(float(axes.diagonal() @ signs), 9) for signs in flips]  # 1 + 2 cos of the turn that is left
    return flips[int(np.argmax(unturned))][left_right] < 0


def mirror_by_name(regions: Sequence[str]) -> dict[str, str | None]:
    """For each region the one that it becomes in a mirrored body: left and right change over; None where the other
    side is not among the regions.

    Chambers of the heart are named after sides but are no mirror images of each other: the thick-walled ventricle is
    the left one in any mirror.
    """
    named = {canonical_organ(region): region for region in regions}
    return {region: named.get(_other_side(canonical_organ(region))) for region in regions}


def _other_side(name: str) -> str:
    words = set(name.split())
    if words & CHAMBERS and not words & OF_THE_BRAIN:
        return name
    return re.sub(r"^(left|right)\b", lambda side: "right" if side[0] == "left" else "left", name)


def wrong_atlas(priors: Priors, how: str) -> Priors:
    """A negative control: priors of the same make that tell the wrong place. UsageFault for any other `how`.

    "permuted"  each region has the prior of the next one in the list
    "shifted"   each volume is moved by a third of its size along every axis, and comes in again on the other side
    """
    if how not in WRONG:
        raise UsageFault(f"wrong atlas {how!r}: there is no such control; choose one of {', '.join(WRONG)}")
    source = f"{priors.source}; wrong on purpose: {how}"
    if how == "shifted":
        return replace(priors, source=source, volume=partial(_shifted, priors.volume))
    if len(priors.regions) < 2:
        raise UsageFault(f"one region ({priors.regions[0]}) cannot be permuted; use the shifted control")
    following = dict(zip(priors.regions, np.roll(priors.regions, -1).tolist(), strict=True))
    before = {then: region for region, then in following.items()}
    # What a mirrored crop gives is permuted as well: the region before the one that the next one becomes.
    becomes = {region: priors.mirror[following[region]] for region in priors.regions}
    mirror = {region: None if other is None else before[other] for region, other in becomes.items()}
    return replace(priors, source=source, mirror=mirror, volume=partial(_permuted, priors.volume))


def _permuted(volume_of: VolumeOf, case: int) -> PriorVolume | None:
    volume = volume_of(case)
    return None if volume is None else replace(volume, values=np.roll(volume.values, -1, axis=-1))


def _shifted(volume_of: VolumeOf, case: int) -> PriorVolume | None:
    volume = volume_of(case)
    if volume is None:
        return None
    return replace(volume, values=np.roll(volume.values, [side // 3 for side in volume.values.shape[:3]], (0, 1, 2)))


class Kept:
    """The volumes of the scans used last, up to `most_bytes`: `make(case)` is asked again for one that was dropped."""

    def __init__(self, make: VolumeOf, most_bytes: int):
        self.make, self.most_bytes = make, most_bytes
        self._empty()

    def __call__(self, case: int) -> PriorVolume | None:
        with self._lock:
            if case in self._volumes:
                self._volumes.move_to_end(case)
            else:
                self._volumes[case] = self.make(case)
                while len(self._volumes) > 1 and self._bytes() > self.most_bytes:
                    self._volumes.popitem(last=False)
            return self._volumes[case]

    def _empty(self) -> None:
        self._volumes: OrderedDict[int, PriorVolume | None] = OrderedDict()
        self._lock = Lock()

    def _bytes(self) -> int:
        return sum(volume.values.nbytes for volume in self._volumes.values() if volume is not None)

    def __getstate__(self) -> dict:
        return {"make": self.make, "most_bytes": self.most_bytes}  # a worker makes its own

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._empty()


def in_steps(values: np.ndarray) -> np.ndarray:
    """Values 0..1 as a PriorVolume keeps them: uint8, C order."""
    return np.ascontiguousarray(np.rint(np.clip(values, 0, 1) * STEPS).astype(np.uint8))


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
