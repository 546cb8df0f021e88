"""Dice, HD95 and NSD of one case, each with its definition and its empty case.

For a class with voxel sets T (truth) and P (prediction) on one grid, d(x, S) the distance in mm between voxel
centres from x to the nearest voxel of S, and S_T, S_P their surfaces: voxels with one of the 6 neighbours outside
the set; what lies outside the image is outside the set.

    dice     2 |T n P| / (|T| + |P|)
    hd95_mm  the larger of the two directed 95th percentiles (linear interpolation) of d(S_P, S_T) and d(S_T, S_P)
    nsd      (|{x in S_P: d(x, S_T) <= tolerance}| + |{x in S_T: d(x, S_P) <= tolerance}|) / (|S_P| + |S_T|)

These are MONAI's `compute_hausdorff_distance(percentile=95)` and `compute_surface_dice(use_subvoxels=False)`, and the
tests hold them to 4 decimals; other tools define HD95 otherwise and differ by a third on rough masks.

The rule for empty sets:

    T and P both empty     all three are NaN: nothing was asked and nothing was said. NaN is left out of every mean,
                           and counted.
    only one of them empty  dice 0, nsd 0, hd95_mm the diagonal of the image in mm (|shape * spacing|): a missed or an
                           invented structure is never left out and never the best score. (MONAI gives NaN, and its
                           aggregate prints 0.0.)
"""

import math
from collections.abc import Sequence

import numpy as np

from dagman.evaluation.surfaces import Surface, census, distances_mm, surface_voxels
from spade3d.faults import DataFault

METRICS = ("dice", "hd95_mm", "nsd")
# Two surfaces exactly `tolerance_mm` apart agree, however 0.7 mm * 3 was rounded; 10 nm decide nothing else.
ROUNDING_MM = 1e-5

Spacing = Sequence[float | int]  # mm along i, j, k


def case_metrics(
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: Spacing,
    classes: Sequence[int],
    tolerance_mm: float = 2.0,
) -> list[dict[str, float | int]]:
    """The metrics of every class of one case, in the order of `classes`.

    truth, prediction: label maps (i, j, k) of whole numbers on one grid; spacing: mm along i, j, k.
    A row holds `class, dice, hd95_mm, nsd, voxels_true, voxels_predicted`. Raises DataFault for two grids, for a
    spacing that is not positive, for label values outside 0 to 65535.
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
    if len(set(classes)) < len(classes) or not all(0 <= value < 1 << 16 for value in classes):
        raise ValueError(f"classes {list(classes)}; different label values from 0 to 65535 are needed")
    index_of = np.full(1 << 16, -1, np.int64)
    index_of[list(classes)] = range(len(classes))
    counts, boxes = census(truth, prediction, index_of, len(classes))
    diagonal_mm = math.dist((0, 0, 0), [size * step for size, step in zip(truth.shape, spacing)])

    rows = []
    for index, value in enumerate(classes):
        true, predicted, both = (int(count) for count in counts[index])
        if not true and not predicted:
            scores = (math.nan, math.nan, math.nan)
        elif not true or not predicted:
            scores = (0.0, diagonal_mm, 0.0)
        else:
            of_truth = Surface(*surface_voxels(truth, value, boxes[0, index], true), boxes[0, index])
            of_prediction = Surface(*surface_voxels(prediction, value, boxes[1, index], predicted), boxes[1, index])
            missed = distances_mm(of_truth, of_prediction, spacing)
            invented = distances_mm(of_prediction, of_truth, spacing)
            agreed = np.count_nonzero(missed <= tolerance_mm + ROUNDING_MM)
            agreed += np.count_nonzero(invented <= tolerance_mm + ROUNDING_MM)
            scores = (
                2 * both / (true + predicted),
                float(max(np.percentile(missed, 95), np.percentile(invented, 95))),
                agreed / (len(missed) + len(invented)),
            )
        row = {"class": int(value), **dict(zip(METRICS, scores)), "voxels_true": true, "voxels_predicted": predicted}
        rows.append(row)
    return rows


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


def _label_map(name: str, labels: np.ndarray) -> np.ndarray:
    """The same values as C-contiguous uint16 (i, j, k), the one type the kernels are compiled for."""
    if labels.ndim != 3 or labels.dtype.kind not in "bui":
        raise DataFault(f"{name}: {labels.ndim}-D {labels.dtype} array; a 3-D map of whole numbers is needed")
    if not np.can_cast(labels.dtype, np.uint16) and labels.size and not 0 <= labels.min() <= labels.max() < 1 << 16:
        raise DataFault(f"{name}: label values from {labels.min()} to {labels.max()}; they must lie in 0 to 65535")
    return np.ascontiguousarray(labels, dtype=np.uint16)
