"""Dice, HD95, NSD, average surface distance and volume difference of one case, each with its definition, its grid and
its empty case.

For a class with voxel sets T (truth) and P (prediction) on one grid, which is that of the two maps given (the input's
own, or the prepared one: summary.json's `grid` says which), d(x, S) the distance in mm between voxel centres from x to
the nearest voxel of S, and S_T, S_P their surfaces: voxels with one of the 6 neighbours outside the set; what lies
outside the image is outside the set. D_P are the distances d(x, S_T) of all x in S_P, D_T those d(x, S_P) of x in S_T.

    dice                  2 |T n P| / (|T| + |P|)
    hd95_mm               the larger of the 95th percentiles (linear interpolation) of D_P and of D_T
    nsd                   (|{d in D_P: d <= tolerance}| + |{d in D_T: d <= tolerance}|) / (|S_P| + |S_T|)
    asd_mm                (sum of D_P + sum of D_T) / (|S_P| + |S_T|), the average symmetric surface distance
    volume_difference_ml  (|P| - |T|) * the volume of a voxel: above 0 where too much was segmented

These are MONAI's `compute_hausdorff_distance(percentile=95)`, `compute_surface_dice(use_subvoxels=False)` and
`compute_average_surface_distance(symmetric=True)`, and the tests hold them to 4 decimals.

With `surface="elements"` S_T and S_P are those of DeepMind's surface-distance, which the tests hold to 4 decimals, too:
elements between the voxels (`surface_elements.py`), each counted by its area. In the formulas above |.| and sums are
then weighted by area, d(x, S) goes from element to element, and the percentile of D_P is the smallest distance within
which 95 % of the area lies. asd_mm is of both surfaces together, where surface-distance gives one number for each.

The two differ by more than methods do. On the smooth random shapes of the tests ASD is 1.5 to 1.65 times as large of
voxels as of elements, HD95 1.05 to 1.85 times, and NSD at 1 and 2 mm is lower by 0.01 to 0.1. Numbers of one surface do
not compare with those of the other.

The rule for empty sets:

    T and P both empty      all are NaN: nothing was asked and nothing was said. NaN is left out of every mean, and
                            counted.
    only one of them empty  dice 0, nsd 0, hd95_mm and asd_mm the diagonal of the image in mm (|shape * spacing|): a
                            missed or an invented structure is never left out and never the best score. (MONAI gives
                            NaN or infinity, and its aggregate of HD95 prints 0.0.) The volume difference is all of it.

A relative volume difference has no value for an invented structure; the voxels counted are there to make one.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dagman.evaluation.surface_elements import surface_elements
from dagman.evaluation.surfaces import Surface, census, distances_mm, surface_voxels
from spade3d.faults import DataFault, UsageFault

METRICS = ("dice", "hd95_mm", "nsd", "asd_mm", "volume_difference_ml")
SURFACES = ("voxels", "elements")
# Two surfaces exactly `tolerance_mm` apart agree, however 0.7 mm * 3 was rounded; 10 nm decide nothing else.
ROUNDING_MM = 1e-5
ROUNDING = 1e-6  # of areas, which MONAI's table holds as float32: a share that is met exactly is met

Spacing = Sequence[float | int]  # mm along i, j, k


def case_metrics(
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: Spacing,
    classes: Sequence[int],
    tolerance_mm: float | Sequence[float] = 2.0,
    surface: str = "voxels",
) -> list[dict[str, float | int]]:
    """The metrics of every class of one case, in the order of `classes`.

    truth, prediction: label maps (i, j, k) of whole numbers on one grid; spacing: mm along i, j, k; tolerance_mm: of
    the NSD, for all classes or for each (`tolerances_of` makes them from names); surface: one of SURFACES, above. A row
    holds `class`, METRICS, `voxels_true` and `voxels_predicted`. Raises DataFault for two grids, for a spacing that is
    not positive, for label values outside 0 to 65535.
    """
    truth, prediction = _label_map("truth", truth), _label_map("prediction", prediction)
    if truth.shape != prediction.shape:
        raise DataFault(
            f"prediction {prediction.shape} lies on another grid than the truth {truth.shape}; "
            "bring both onto the grid of the truth"
        )
    spacing = tuple(float(step) for step in spacing)
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise DataFault(f"spacing {spacing} mm; three positive numbers are needed")
    if surface not in SURFACES:
        raise ValueError(f"surface {surface!r}; it is one of {', '.join(SURFACES)}")
    if len(set(classes)) < len(classes) or not all(0 <= value < 1 << 16 for value in classes):
        raise ValueError(f"classes {list(classes)}; different label values from 0 to 65535 are needed")
    tolerances = [tolerance_mm] * len(classes) if isinstance(tolerance_mm, float | int) else list(tolerance_mm)
    if len(tolerances) != len(classes) or not all(math.isfinite(one) and one >= 0 for one in tolerances):
        raise ValueError(f"tolerances {tolerances} mm for {len(classes)} classes; one for each, not below 0")
    index_of = np.full(1 << 16, -1, np.int64)
    index_of[list(classes)] = range(len(classes))
    counts, boxes = census(truth, prediction, index_of, len(classes))
    diagonal_mm = math.dist((0, 0, 0), [size * step for size, step in zip(truth.shape, spacing)])

    rows = []
    for index, value in enumerate(classes):
        true, predicted, both = (int(count) for count in counts[index])
        if not true and not predicted:
            scores = (math.nan,) * 4
        elif not true or not predicted:
            scores = (0.0, diagonal_mm, 0.0, diagonal_mm)
        else:
            overlap = 2 * both / (true + predicted)
            if surface == "elements":
                sides = [(labels, value, boxes[side, index]) for side, labels in enumerate((truth, prediction))]
                scores = (overlap, *_of_elements(*sides, spacing, tolerances[index]))
            else:
                of_truth = Surface(*surface_voxels(truth, value, boxes[0, index], true), boxes[0, index])
                of_prediction = Surface(*surface_voxels(prediction, value, boxes[1, index], predicted), boxes[1, index])
                missed = distances_mm(of_truth, of_prediction, spacing)
                invented = distances_mm(of_prediction, of_truth, spacing)
                scores = (overlap, *_of_surfaces(missed, invented, tolerances[index]))
        difference_ml = (predicted - true) * math.prod(spacing) / 1000 if true or predicted else math.nan
        row = {"class": int(value), **dict(zip(METRICS, (*scores, difference_ml)))}
        rows.append(row | {"voxels_true": true, "voxels_predicted": predicted})
    return rows


def _of_surfaces(missed: np.ndarray, invented: np.ndarray, tolerance_mm: float) -> tuple[float, float, float]:
    """HD95, NSD and ASD from the distances (n,) of both surfaces in mm."""
    surface = len(missed) + len(invented)
    agreed = sum(np.count_nonzero(distances <= tolerance_mm + ROUNDING_MM) for distances in (missed, invented))
    return (
        float(max(np.percentile(missed, 95), np.percentile(invented, 95))),
        float(agreed / surface),
        float((missed.sum() + invented.sum()) / surface),
    )


def _of_elements(
    true: tuple, predicted: tuple, spacing: tuple[float, float, float], tolerance_mm: float
) -> tuple[float, float, float]:
    """HD95, NSD and ASD of two surfaces between the voxels, each of (labels, value, box)."""
    (of_truth, area_true), (of_prediction, area_predicted) = (
        surface_elements(*one, spacing) for one in (true, predicted)
    )
    missed = distances_mm(of_truth, of_prediction, spacing)
    invented = distances_mm(of_prediction, of_truth, spacing)
    whole = area_true.sum() + area_predicted.sum()
    sides = ((missed, area_true), (invented, area_predicted))
    agreed = sum(areas[distances <= tolerance_mm + ROUNDING_MM].sum() for distances, areas in sides)
    return (
        max(_share_within(distances, areas, 0.95) for distances, areas in sides),
        float(agreed / whole),
        float((missed @ area_true + invented @ area_predicted) / whole),
    )


def _share_within(distances: np.ndarray, areas: np.ndarray, share: float) -> float:
    """The smallest of the distances (n,) within which that share of the area lies."""
    order = np.lexsort((areas, distances))
    within = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order[np.searchsorted(within, share - ROUNDING)]])


def tolerances_of(names: Sequence[str], default_mm: float, by_name: Mapping[str, float]) -> list[float]:
    """The tolerance of each class in mm: its own where it has one, else the default. UsageFault for a name that no
    class has."""
    if unknown := sorted(by_name.keys() - set(names)):
        raise UsageFault(f"a tolerance for {', '.join(unknown)}; the classes are {', '.join(names)}")
    return [float(by_name.get(name, default_mm)) for name in names]


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of two masks (i, j, k): 2 |T n P| / (|T| + |P|); NaN if both are empty."""
    total = np.count_nonzero(truth) + np.count_nonzero(prediction)
    return 2 * np.count_nonzero(np.logical_and(truth, prediction)) / total if total else math.nan


def hd95_mm(truth: np.ndarray, prediction: np.ndarray, spacing: Spacing) -> float:
    """HD95 of two masks in mm; NaN if both are empty, the image's diagonal if one is."""
    return case_metrics(truth != 0, prediction != 0, spacing, (1,))[0]["hd95_mm"]


def nsd(truth: np.ndarray, prediction: np.ndarray, spacing: Spacing, tolerance_mm: float = 2.0) -> float:
    """Normalised surface distance of two masks: NaN if both are empty, 0 if one is."""
    return case_metrics(truth != 0, prediction != 0, spacing, (1,), tolerance_mm)[0]["nsd"]


def asd_mm(truth: np.ndarray, prediction: np.ndarray, spacing: Spacing) -> float:
    """Average symmetric surface distance of two masks in mm; NaN if both are empty, the image's diagonal if one is."""
    return case_metrics(truth != 0, prediction != 0, spacing, (1,))[0]["asd_mm"]


def _label_map(name: str, labels: np.ndarray) -> np.ndarray:
    """The same values as C-contiguous uint16 (i, j, k), the one type the kernels are compiled for."""
    if labels.ndim != 3 or labels.dtype.kind not in "bui":
        raise DataFault(f"{name}: {labels.ndim}-D {labels.dtype} array; a 3-D map of whole numbers is needed")
    if not np.can_cast(labels.dtype, np.uint16) and labels.size and not 0 <= labels.min() <= labels.max() < 1 << 16:
        raise DataFault(f"{name}: label values from {labels.min()} to {labels.max()}; they must lie in 0 to 65535")
    return np.ascontiguousarray(labels, dtype=np.uint16)
