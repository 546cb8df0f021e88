"""How well heat maps show where a finding is, judged by the boxes or masks of annotated studies.

Judged are annotated findings alone: a map of a study without the finding has nothing to find. A map becomes a box at a
threshold t, a share of its own maximum (`boxes_of`). No annotated study chooses the threshold that it is judged at:
half of the subjects do for the other half, and these for them (CLARiTy's protocol as far as it is known, with the
halves swapped and averaged); t is the one of the highest mean IoU, for each finding by itself.

Each annotated box is one row, and its measures are:

iou             of the box and that predicted one which fits it best; 0 where the map shows none
t_iou_T         1 if that is T at least: the mean is T(IoU), the share of the boxes that are found. Not to be compared
                with two dimensions: sides a fifth too short leave a square an IoU of 0.64, a cube one of 0.51
iobb, t_iobb_T  the same with intersection over the *predicted* box, which a box that is too small does not lose
centre_inside   1 if the centre of the predicted box lies in the annotated one, however large it is
error_x_mm, ... distance of the two boxes' centres along R, A, S; NaN where the map shows none
pointing        1 if the map's highest voxel lies in an annotation of the finding; if several are highest, their share
pointing_near   the same within a tolerance of it; 0 for both where the map is 0 everywhere
peak_mm         distance of the highest voxel from it, 0 inside; NaN where the map is 0 everywhere
voxel_ap        the area under precision over recall of all voxels; one value everywhere gives the prevalence, and NaN
                an annotation that holds no voxel's centre

Of a finding that has several boxes in a study the last four are of all boxes together, and the same in each row. A mean
is over the boxes of a finding, then over findings; its interval draws subjects. Grids are coarse: no box made of a map
of 48 mm cells can be close to a lesion of 20 mm, so `by_size` says how it went for each size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from dagman.evaluation.annotations import Annotation, HeatMap, annotations_of_labels, read_boxes
from dagman.evaluation.average_precision import average_precision
from dagman.evaluation.boxes import boxes_of, check_heat, diameter_mm, inside, iobb, iou
from dagman.evaluation.chosen_thresholds import tuned
from dagman.evaluation.finding_means import Row, difference, summary
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.geometry import apply_affine, spacing_of

__all__ = [
    "Annotation",
    "HeatMap",
    "Judging",
    "annotations_of_labels",
    "boxes_of",
    "difference",
    "localised",
    "measured",
    "read_boxes",
    "rows_of",
    "scores",
]

THRESHOLDS = tuple(n / 20 for n in range(1, 20))
T_IOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
T_IOBB = (0.1, 0.25, 0.5, 0.75, 0.9)
ERRORS = ("error_x_mm", "error_y_mm", "error_z_mm")
MEASURES = (
    "iou",
    *(f"t_iou_{t:g}" for t in T_IOU),
    "iobb",
    *(f"t_iobb_{t:g}" for t in T_IOBB),
    "centre_inside",
    *ERRORS,
    "pointing",
    "pointing_near",
    "peak_mm",
    "voxel_ap",
)


@dataclass(frozen=True)
class Judging:
    """How maps are judged. UsageFault for values that mean nothing.

    thresholds    shares of the maximum among which one is chosen
    keep, mass    which components of a map become boxes: see boxes_of
    tolerance_mm  of `pointing_near`
    sizes_mm      where lesion sizes (diameter_mm of the annotated box) are divided
    seed          which subjects choose the threshold for which
    """

    thresholds: tuple[float, ...] = THRESHOLDS
    keep: str = "largest"
    mass: float = 0.2
    tolerance_mm: float = 10.0
    sizes_mm: tuple[float, ...] = (10.0, 20.0, 30.0, 40.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0 < t <= 1 for t in self.thresholds):
            raise UsageFault(f"thresholds {self.thresholds}; shares of the maximum, above 0 to 1, are needed")
        if self.tolerance_mm < 0 or list(self.sizes_mm) != sorted(set(self.sizes_mm)):
            raise UsageFault(f"tolerance {self.tolerance_mm:g} mm, sizes {self.sizes_mm}; 0 or more, and rising sizes")


def scores(maps: Iterable[HeatMap], annotations: Sequence[Annotation], how: Judging = Judging()) -> dict[str, Any]:
    """All measures of the maps of one method: `measures` over findings, `by_finding`, `by_size`, the `thresholds` that
    were used, and the `rows` that they are made from.

    A map without annotations is passed by. DataFault where an annotated finding has no map, or two.
    """
    rows = localised(maps, annotations, how)
    findings = sorted({row["finding"] for row in rows})
    edges = (0.0, *how.sizes_mm, math.inf)
    return {
        "judging": {"thresholds": list(how.thresholds), "keep": how.keep, "mass": how.mass, "seed": how.seed}
        | {"tolerance_mm": how.tolerance_mm},
        "boxes": len(rows),
        "subjects": len({row["subject"] for row in rows}),
        "measures": summary(rows, MEASURES),
        "by_finding": {name: summary([row for row in rows if row["finding"] == name], MEASURES) for name in findings},
        "by_size": {
            f"{low:g} to {high:g} mm": {"boxes": len(some), **summary(some, MEASURES)}
            for low, high in zip(edges, edges[1:])
            if (some := [row for row in rows if low <= row["diameter_mm"] < high])
        },
        "thresholds": {name: sorted({row["threshold"] for row in rows if row["finding"] == name}) for name in findings},
        "rows": rows,
    }


def localised(maps: Iterable[HeatMap], annotations: Sequence[Annotation], how: Judging = Judging()) -> list[Row]:
    """A row for each annotated box, at the threshold that the other half of the subjects chose.

    With one annotated subject there is no other half: its measures of boxes are NaN.
    """
    return rows_of(measured(maps, annotations, how), how)


def measured(
    maps: Iterable[HeatMap], annotations: Sequence[Annotation], how: Judging = Judging()
) -> dict[tuple[str, str], Measured]:
    """(subject, finding) -> what its map says at every threshold; the same whatever the seed of the judging."""
    truths: dict[tuple[str, str], list[Annotation]] = defaultdict(list)
    for one in annotations:
        truths[one.subject, one.finding].append(one)
    found: dict[tuple[str, str], Measured] = {}
    for heat in maps:
        key = heat.subject, heat.finding
        if key in found:
            raise DataFault(f"{heat.subject}: two maps of {heat.finding}; boxes in mm are of one scan: give one map")
        if key in truths:
            found[key] = measure(heat, truths[key], how)
    if missing := sorted(truths.keys() - found.keys()):
        said = ", ".join(" ".join(key) for key in missing[:4])
        raise DataFault(f"{len(missing)} annotated findings have no map ({said}); give maps of all annotated studies")
    return found


def rows_of(found: Mapping[tuple[str, str], Measured], how: Judging = Judging()) -> list[Row]:
    """The rows of what was measured, thresholds chosen by halves that `how.seed` draws."""
    judges = tuned({key: one.iou for key, one in found.items()}, how.seed)
    return [row for key, one in found.items() for row in _rows(key, one, judges[key], how)]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one map says of its annotated boxes at every threshold, and what needs no threshold."""

    iou: Float[np.ndarray, "threshold box"]
    iobb: Float[np.ndarray, "threshold box"]
    centre_inside: Float[np.ndarray, "threshold box"]
    error_mm: Float[np.ndarray, "threshold box 3"]
    diameter_mm: Float[np.ndarray, "box"]
    pointing: float
    pointing_near: float
    peak_mm: float
    voxel_ap: float


def measure(heat: HeatMap, truths: Sequence[Annotation], how: Judging) -> Measured:
    """One map against all annotations of its finding in its study."""
    check_heat(heat.values)
    of_boxes = np.full((len(how.thresholds), len(truths), 6), np.nan)
    of_boxes[..., :3] = 0
    shown, affine = heat.values, heat.affine
    for n in np.argsort(how.thresholds):  # what a threshold leaves holds all that a higher one does
        threshold = how.thresholds[n]
        shown, affine = _left(shown, affine, threshold)
        predicted = [box.in_mm(affine) for box in boxes_of(shown, threshold, keep=how.keep, mass=how.mass)]
        for m, truth in enumerate(truths):
            if predicted:
                best = max(predicted, key=lambda box: iou(truth.box_mm, box))
                centre, error = best.mean(axis=0), np.abs(best.mean(axis=0) - truth.box_mm.mean(axis=0))
                held = bool(((centre >= truth.box_mm[0]) & (centre <= truth.box_mm[1])).all())
                highest = max(iobb(truth.box_mm, box) for box in predicted)
                of_boxes[n, m] = iou(truth.box_mm, best), highest, held, *error
    pointing, near, peak_mm = _pointed(heat, truths, how.tolerance_mm)
    region = _region(heat, truths)
    return Measured(
        of_boxes[..., 0],
        of_boxes[..., 1],
        of_boxes[..., 2],
        of_boxes[..., 3:],
        np.array([diameter_mm(truth.box_mm) for truth in truths]),
        pointing,
        near,
        peak_mm,
        average_precision(heat.values, region),
    )


def _left(values: np.ndarray, affine: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The part of a map that holds all that a threshold leaves, and its affine."""
    highest = values.max(initial=0)
    if highest <= 0:
        return values, affine
    (part,) = ndimage.find_objects((values >= threshold * highest).astype(np.int8))
    moved = affine.copy()
    moved[:3, 3] = apply_affine(affine, np.array([side.start for side in part]))
    return values[part], moved


def _pointed(heat: HeatMap, truths: Sequence[Annotation], tolerance_mm: float) -> tuple[float, float, float]:
    """Of the highest voxels: the share inside an annotation, the share within the tolerance, the mean distance."""
    highest = heat.values.max(initial=0)
    if highest <= 0:
        return 0.0, 0.0, math.nan
    peaks = np.argwhere(heat.values == highest)
    distances = np.min([_distances(peaks, heat, truth) for truth in truths], axis=0)
    return float((distances <= 0).mean()), float((distances <= tolerance_mm).mean()), float(distances.mean())


def _distances(voxels: np.ndarray, heat: HeatMap, truth: Annotation) -> np.ndarray:
    """In mm from voxel centres (n, 3) to the nearest point of a box, or to the nearest voxel centre of a mask."""
    if truth.mask is None:
        points = apply_affine(heat.affine, voxels)
        outside = np.maximum(np.maximum(truth.box_mm[0] - points, points - truth.box_mm[1]), 0)
        outside[outside < 1e-6] = 0
        return np.linalg.norm(outside, axis=-1)
    _check_grid(heat, truth)
    return ndimage.distance_transform_edt(~truth.mask, sampling=spacing_of(heat.affine))[tuple(voxels.T)]


def _region(heat: HeatMap, truths: Sequence[Annotation]) -> np.ndarray:
    """The voxels of all annotations together: of a mask its own, of a box those whose centres it holds."""
    region = np.zeros(heat.values.shape, bool)
    for truth in truths:
        if truth.mask is not None:
            _check_grid(heat, truth)
        region |= inside(truth.box_mm, heat.values.shape, heat.affine) if truth.mask is None else truth.mask
    return region


def _check_grid(heat: HeatMap, truth: Annotation) -> None:
    if truth.mask.shape != heat.values.shape:
        raise DataFault(
            f"{heat.subject}: the mask of {heat.finding} {truth.mask.shape} lies on another grid than its map "
            f"{heat.values.shape}; resample the map onto the grid of the mask, or give the box alone"
        )


def _rows(key: tuple[str, str], of: Measured, chosen: int | None, how: Judging) -> list[Row]:
    rows = []
    for box, size in enumerate(of.diameter_mm.tolist()):
        row: Row = {"subject": key[0], "finding": key[1], "box": box, "diameter_mm": size}
        row["threshold"] = math.nan if chosen is None else how.thresholds[chosen]
        row |= dict.fromkeys(MEASURES, math.nan)
        row |= {
            "pointing": of.pointing,
            "pointing_near": of.pointing_near,
            "peak_mm": of.peak_mm,
            "voxel_ap": of.voxel_ap,
        }
        if chosen is not None:
            best_iou, best_iobb = float(of.iou[chosen, box]), float(of.iobb[chosen, box])
            row |= {"iou": best_iou, "iobb": best_iobb, "centre_inside": float(of.centre_inside[chosen, box])}
            row |= {f"t_iou_{t:g}": float(best_iou >= t) for t in T_IOU}
            row |= {f"t_iobb_{t:g}": float(best_iobb >= t) for t in T_IOBB}
            row |= dict(zip(ERRORS, of.error_mm[chosen, box].tolist(), strict=True))
        rows.append(row)
    return rows
