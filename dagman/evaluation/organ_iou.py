"""Whether maps lie in the right organ, where nothing but the organs is known: no box, no mask of a finding.

Of what is at least a share t of a map's maximum, the part that lies in the organs where the finding may be (the
"OrganIoU" of Draelos & Carin 2021, arXiv 2111.12215: inside / (inside + outside); it is a precision, not an IoU, and a
single voxel in the organ has all of it). It says nothing of where in the organ: the organ itself as a map has 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from dagman.evaluation.annotations import HeatMap
from dagman.evaluation.boxes import check_heat
from dagman.evaluation.chosen_thresholds import tuned
from dagman.evaluation.finding_means import summary
from spade3d.faults import DataFault

MEASURE = "organ_iou"


def organ_iou(heat: Shaped[np.ndarray, "i j k"], organ: Bool[np.ndarray, "i j k"], threshold: float) -> float:
    """Of the voxels at `threshold` (0 to 1) of the maximum and above, the share in the organ; 0 for a map that is 0
    everywhere, which shows nothing, and NaN where the scan does not show the organ."""
    check_heat(heat)
    if not organ.any():
        return math.nan
    highest = heat.max(initial=0)
    return float(organ[heat >= threshold * highest].mean()) if highest > 0 else 0.0


def organ_scores(
    maps: Iterable[tuple[HeatMap, Bool[np.ndarray, "i j k"]]], thresholds: tuple[float, ...], seed: int = 0
) -> dict[str, Any]:
    """The mean over the maps of each finding, then over findings, with its interval over subjects, and the rows.

    maps  of studies that have the finding, each with the voxels of the organs where it may be

    The threshold is chosen as for boxes, on half of the subjects for the other half. DataFault for two maps of a
    finding in one subject.
    """
    values: dict[tuple[str, str], np.ndarray] = {}
    for heat, organ in maps:
        key = heat.subject, heat.finding
        if key in values:
            raise DataFault(f"{heat.subject}: two maps of {heat.finding}; give one")
        values[key] = np.array([[organ_iou(heat.values, organ, threshold)] for threshold in thresholds])
    values = {key: one for key, one in values.items() if not np.isnan(one).any()}
    rows = [
        {"subject": subject, "finding": finding, "box": 0}
        | {"threshold": math.nan if n is None else thresholds[n]}
        | {MEASURE: math.nan if n is None else float(values[subject, finding][n, 0])}
        for (subject, finding), n in tuned(values, seed).items()
    ]
    return summary(rows, [MEASURE]) | {"rows": rows}
