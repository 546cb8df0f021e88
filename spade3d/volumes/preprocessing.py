"""Preprocessing: a scan as it was read becomes int16 voxels on canonical axes, and the map that makes them intensities.

The same dataclass prepares the scans of pretraining, of fine-tuning and of prediction, and is saved with the store.

CT is stored as Hounsfield units, rounded (error at most 0.5 HU), and shown through the window `window_hu` as [0, 1].
Everything else (MR, PET, unknown) has no unit, so its brightness comes from its own foreground:
"percentile" maps two percentiles to [0, 1] and clips; "zscore" is (x - mean) / sd, clipped to +-5.

*Foreground*: the voxels brighter than the background peak, which is the mode of the histogram when it lies in the
lowest quarter of the range; where there is no such peak (a crop inside the body) every voxel. The lower percentile
is taken over all voxels: lung, bone and flow voids are as dark as air and must not be cut off with it.

*Rounding*: integers within int16 that need no resampling are stored as they are. All else is stored in 65536 equal
steps over its range; what lies more than one clip width outside the clip is saturated (it would be clipped anyway),
so the error is at most 3 / 131070 of the clip width: 2.3e-5 of [0, 1], 2.3e-4 standard deviations for "zscore".
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.body_box import body_box, boxed
from spade3d.volumes.geometry import canonical_flips, resample, spacing_of
from spade3d.volumes.volume import Grid, Volume, guess_modality

SAME_SPACING_MM = 1e-3  # below this two spacings are one, and nothing is resampled
BODY_MARGIN_MM = 10.0
ZSCORE_LIMIT = 5.0
LEAST_SPAN_HU = 10.0  # a "CT" of less contrast than this is not in Hounsfield units
LEAST_SPAN, LARGEST = 1e-30, 1e30  # beyond, float32 arithmetic breaks down; no scanner measures so
SAMPLES = 4_000_000  # voxels that the percentiles are taken from
INT16 = np.iinfo(np.int16)
UINT16 = np.iinfo(np.uint16)


@dataclass(frozen=True)
class Normalisation:
    """How stored int16 voxels become intensities: clip((stored - offset) * scale, low, high)."""

    offset: float
    scale: float
    low: float
    high: float

    def intensity(self, stored: np.ndarray) -> np.ndarray:
        """The intensities (float32) of stored voxels of any shape."""
        return np.clip(
            (stored.astype(np.float32) - np.float32(self.offset)) * np.float32(self.scale), self.low, self.high
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan ready to be stored or shown to a network: voxels (i, j, k) along R, A, S."""

    voxels: np.ndarray  # int16
    labels: np.ndarray | None  # uint16, values as in the file
    affine: np.ndarray  # (4, 4) stored voxel -> mm
    normalisation: Normalisation
    modality: str
    source_grid: Grid  # of the volume as it was given: where a prediction is written back
    body_box_mm: tuple[tuple[float, float, float], tuple[float, float, float]]
    rounding: float  # largest error of a stored voxel that is not saturated, in the units of the scan


@dataclass(frozen=True)
class Preprocessing:
    """What is done to each scan. Refuses impossible settings with a UsageFault."""

    spacing: tuple[float, float, float] | None = None  # mm along R, A, S; None keeps each scan's own
    window_hu: tuple[float, float] = (-175.0, 250.0)
    mr: str = "percentile"
    percentiles: tuple[float, float] = (0.5, 99.5)
    crop_to_body: bool = False
    version: int = 1  # of the code below: raised when the same settings come to give other voxels

    def __post_init__(self) -> None:
        for name in ("spacing", "window_hu", "percentiles"):  # (2, 2, 2) has the fingerprint of (2.0, 2.0, 2.0)
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(map(float, value)))
        spacing = (1.0, 1.0, 1.0) if self.spacing is None else self.spacing
        if len(spacing) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
            raise UsageFault(f"spacing {spacing}: three lengths in mm, each above 0, are needed, or none at all")
        for name, pair in {"window_hu": self.window_hu, "percentiles": self.percentiles}.items():
            if len(pair) != 2 or not all(map(math.isfinite, pair)) or pair[0] >= pair[1]:
                raise UsageFault(f"{name} {pair}: two finite numbers are needed, the lower one first")
        if self.percentiles[0] < 0 or self.percentiles[1] > 100:
            raise UsageFault(f"percentiles {self.percentiles}: must lie between 0 and 100")
        if self.mr not in ("percentile", "zscore"):
            raise UsageFault(f"mr {self.mr!r}: must be 'percentile' or 'zscore'")

    def prepare(self, volume: Volume, labels: np.ndarray | None = None) -> Prepared:
        """Prepare a scan in any orientation; `labels` are integers on its grid, in its orientation.

        Raises DataFault for a scan that is not 3-D, holds NaN or Inf, is constant, or has a side of one voxel; for a
        "CT" that is not in Hounsfield units; for labels of another shape or outside 0..65535.
        """
        who = str(volume.path or volume.subject or "volume")
        modality = volume.modality if volume.modality != "unknown" else guess_modality(volume.voxels)
        _check(who, volume.voxels, modality, labels)

        to_canonical = canonical_flips(volume.affine, volume.shape)
        voxels, affine = to_canonical.apply(volume.voxels), to_canonical.affine(volume.affine)
        clip, statistics = (None, None) if modality == "CT" else self._brightness(voxels)
        if labels is not None:
            labels = to_canonical.apply(labels).astype(np.uint16)
        if self.crop_to_body:
            box, affine = boxed(voxels.shape, affine, body_box(voxels, affine, modality), BODY_MARGIN_MM)
            voxels, labels = voxels[box], None if labels is None else labels[box]
        target = self._target_grid(who, voxels.shape, affine)
        if target is not None:
            voxels = resample(voxels, affine, target.affine, target.shape, 1, float(voxels.min()))
            labels = None if labels is None else resample(labels, affine, target.affine, target.shape, 0, 0)
            affine = target.affine

        if modality == "CT":
            low, high = self.window_hu
            stored, rounding = _as_hounsfield(voxels)
            normalisation = Normalisation(low, 1 / (high - low), 0.0, 1.0)
        else:
            stored, base, step, rounding = _quantised(voxels, *clip)
            centre, width, limits = statistics
            normalisation = Normalisation((centre - base) / step, step / width, *limits)
        return Prepared(
            voxels=stored,
            labels=None if labels is None else np.ascontiguousarray(labels, dtype=np.uint16),
            affine=affine,
            normalisation=normalisation,
            modality=modality,
            source_grid=Grid(volume.shape, volume.affine),
            body_box_mm=body_box(stored, affine, modality),
            rounding=rounding,
        )

    def _brightness(self, voxels: np.ndarray) -> tuple[tuple[float, float], tuple[float, float, tuple[float, float]]]:
        """The clip (low, high) in the scan's units; and the centre, the width and the limits of the intensities."""
        sample = _sample(voxels)
        foreground = foreground_of(sample)
        if self.mr == "zscore":
            mean, sd = float(foreground.mean()), float(foreground.std())
            if sd == 0:  # e.g. a mask given as a scan: all foreground is one value
                sd = float(voxels.max()) - float(voxels.min())
            clip = (mean - ZSCORE_LIMIT * sd, mean + ZSCORE_LIMIT * sd)
            return clip, (mean, sd, (-ZSCORE_LIMIT, ZSCORE_LIMIT))
        low = float(np.percentile(sample, self.percentiles[0]))
        high = float(np.percentile(foreground, self.percentiles[1]))
        if high <= low:  # nearly all voxels are one value
            low, high = float(voxels.min()), float(voxels.max())
        return (low, high), (low, high - low, (0.0, 1.0))

    def _target_grid(self, who: str, shape: tuple[int, ...], affine: np.ndarray) -> Grid | None:
        """The grid of the wanted spacing over the same field of view; None if the scan is already on it.

        The new grid shares the centre of the old one, so preparing a flipped scan gives the flipped result, and stays
        within its outermost voxel centres: nothing is extrapolated, and each old centre is within half a new voxel.
        """
        own = spacing_of(affine)
        if self.spacing is None or np.allclose(own, self.spacing, rtol=0, atol=SAME_SPACING_MM):
            return None
        old, factor = np.array(shape), np.array(self.spacing) / np.array(own)
        new = np.floor((old - 1) / factor + 1 + 1e-6).astype(int)
        if new.min() < 2:
            raise DataFault(
                f"{who}: {_by(shape)} voxels of {_mm(own)} leave {_by(new)} at {_mm(self.spacing)}; at least 2 along "
                "each axis are needed: choose a finer --spacing, or leave this scan out"
            )
        index_map = np.eye(4)  # new index -> old index
        index_map[:3, :3] = np.diag(factor)
        index_map[:3, 3] = (old - 1) / 2 - factor * (new - 1) / 2
        return Grid((int(new[0]), int(new[1]), int(new[2])), affine @ index_map)

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON and YAML keep exactly."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`; DataFault for settings that this version does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown or values.get("version", cls.version) > cls.version:
            what = f"settings {unknown}" if unknown else f"version {values['version']}"
            raise DataFault(
                f"preprocessing {what} not known here: made by a newer spade3d; install it, or prepare again"
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly if all settings are."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def choose_spacing(grids: list[Grid]) -> tuple[float, float, float]:
    """The median spacing in mm along R, A, S over a set of scans; headers suffice."""
    if not grids:
        raise ValueError("no grids to take the median spacing of")
    spacings = [spacing_of(canonical_flips(grid.affine, grid.shape).affine(grid.affine)) for grid in grids]
    r, a, s = np.median(np.array(spacings, dtype=np.float64), axis=0).round(6).tolist()
    return r, a, s


def foreground_of(sample: np.ndarray) -> np.ndarray:
    """The values above the background peak (see the head of this file); all of them where there is no such peak."""
    low, high = np.percentile(sample, (0.1, 99.9))
    if high <= low:
        low, high = sample.min(), sample.max()
    counts, edges = np.histogram(sample, bins=256, range=(float(low), float(high)))
    peak = int(counts.argmax())
    above = sample[sample > edges[peak + 1]] if peak < len(counts) // 4 else sample
    return above if above.size else sample


def _check(who: str, voxels: np.ndarray, modality: str, labels: np.ndarray | None) -> None:
    if voxels.ndim != 3 or min(voxels.shape) < 2:
        raise DataFault(f"{who}: shape {_by(voxels.shape)}; a volume of three axes, each at least 2 voxels, is needed")
    if not np.issubdtype(voxels.dtype, np.integer):
        bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        if bad:
            raise DataFault(
                f"{who}: {bad} of {voxels.size} voxels are NaN or Inf; all must be finite: export the scan again"
            )
    low, high = voxels.min(), voxels.max()
    if float(high) - float(low) < LEAST_SPAN:
        raise DataFault(f"{who}: constant, every voxel is {low:g}; a scan with contrast is needed: leave it out")
    if max(-float(low), float(high)) > LARGEST:
        raise DataFault(f"{who}: values from {low:g} to {high:g} are no measurement: export the scan again")
    if modality == "CT" and float(high) - float(low) < LEAST_SPAN_HU:
        raise DataFault(
            f"{who}: said to be CT, but its values span only {low:g} to {high:g}; Hounsfield units are needed: undo "
            "the rescaling, or name the modality MR"
        )
    if labels is None:
        return
    if labels.shape != voxels.shape:
        raise DataFault(f"{who}: labels {_by(labels.shape)} lie on another grid than the image {_by(voxels.shape)}")
    if labels.size and (labels.min() < 0 or labels.max() > UINT16.max):
        raise DataFault(
            f"{who}: label values {labels.min()} to {labels.max()}; values from 0 to {UINT16.max} are needed"
        )


def _sample(voxels: np.ndarray) -> np.ndarray:
    """At most SAMPLES values, evenly spread; the odd stride does not walk along one column of the scan."""
    stride = -(-voxels.size // SAMPLES) | 1
    return np.asarray(voxels).ravel()[::stride].astype(np.float64)


def _as_hounsfield(voxels: np.ndarray) -> tuple[np.ndarray, float]:
    exact = np.issubdtype(voxels.dtype, np.integer)
    rounded = voxels if exact else np.rint(voxels)
    return np.ascontiguousarray(np.clip(rounded, INT16.min, INT16.max).astype(np.int16)), 0.0 if exact else 0.5


def _quantised(voxels: np.ndarray, low: float, high: float) -> tuple[np.ndarray, float, float, float]:
    """(stored, base, step, error): voxels = base + step * stored within `error`, exactly for integers within int16."""
    least, most = float(voxels.min()), float(voxels.max())
    if INT16.min <= least and most <= INT16.max and _whole(voxels):
        return np.ascontiguousarray(voxels, dtype=np.int16), 0.0, 1.0, 0.0
    width = high - low
    least, most = max(least, low - width), min(most, high + width)
    step = (most - least) / (INT16.max - INT16.min)
    base = least - INT16.min * step
    stored = np.empty(voxels.shape, dtype=np.int16)
    for i, plane in enumerate(voxels):  # plane by plane: no float64 copy of the whole scan
        stored[i] = np.clip(np.rint((plane.astype(np.float64) - base) / step), INT16.min, INT16.max)
    return stored, base, step, step / 2


def _whole(voxels: np.ndarray) -> bool:
    return np.issubdtype(voxels.dtype, np.integer) or all(bool(np.all(plane == np.rint(plane))) for plane in voxels)


def _by(shape: Any) -> str:
    return "x".join(str(int(n)) for n in shape)


def _mm(spacing: Any) -> str:
    return " x ".join(f"{mm:g}" for mm in spacing) + " mm"
