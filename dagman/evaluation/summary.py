"""summary.json: the result of a run in one page of numbers, with everything needed to judge it."""

import math
from collections.abc import Sequence
from typing import Any

from dagman.evaluation.cases_table import REAL
from dagman.evaluation.statistics import MeanInterval, Row, mean_with_interval, values_by_subject
from spade3d.volumes.split import Split

LATER_MEANS = (*REAL[2:], "volume_error_ml")
DEFINITIONS = {
    "dice": "2 |T n P| / (|T| + |P|)",
    "hd95_mm": "max of the two directed 95th percentiles of 6-connected surface distances, mm",
    "nsd": "share of both surfaces within the tolerance of the other",
    "asd_mm": "mean distance of both surfaces to the other, mm (average symmetric surface distance)",
    "volume_difference_ml": "volume predicted minus true, ml; above 0 where too much was segmented",
    "volume_error_ml": "size of the volume difference, ml, whichever way it points",
    "grid": "voxel centres of the grid that `grid` names; surfaces are voxels with one of 6 neighbours outside",
    "empty": "absent from both: undefined, left out, counted; missed or invented: dice 0, nsd 0, hd95 and asd the "
    "diagonal of the image, all of the volume as its difference",
    "mean": "of a case over its structures, then over cases; the interval resamples subjects (bootstrap, 95 %)",
}
OF_ELEMENTS = {
    "hd95_mm": "max of the two directed distances within which 95 % of the area of surface elements lies, mm",
    "nsd": "share of the area of both surfaces within the tolerance of the other",
    "asd_mm": "mean distance of both surfaces to the other, weighted by the area of their elements, mm",
    "grid": "voxel centres of the grid that `grid` names; surfaces are elements of marching cubes between them, as "
    "DeepMind's surface-distance has them",
}


def summarise(rows: Sequence[Row], settings, store, split: Split, taught: Sequence[int], coverage, leakage) -> dict:
    """Everything that summary.json says. `rows` as in cases.csv; `coverage` of the checkpoint, None from scratch."""
    means = {metric: mean_with_interval(values_by_subject(rows, metric)) for metric in REAL}
    subjects = [store.cases[i].subject for i in taught]
    between = settings.scoring.surface == "elements"
    return {
        "mean_dice": _plain(means["dice"].mean),
        "mean_dice_interval": _interval(means["dice"]),
        "mean_hd95_mm": _plain(means["hd95_mm"].mean),
        "mean_nsd": _plain(means["nsd"].mean),
        "mean_asd_mm": _plain(means["asd_mm"].mean),
        "per_class": {name: _of_class(rows, value) for value, name in sorted({(r["class"], r["name"]) for r in rows})},
        "cases": len({row["case"] for row in rows}),
        "subjects": len({row["subject"] for row in rows}),
        "protocol": {
            "name": settings.protocol,
            "split": split.rule,
            "grid": {"input": "the input's own", "prepared": "the prepared scan's"}[settings.scoring.grid],
            "background": "counted as a structure" if settings.scoring.background else "left out",
            "spacing_mm": "native" if settings.data.spacing == "native" else list(settings.data.spacing),
            "crop": list(settings.crop.shape),
            "overlap": settings.scoring.overlap,
            "tolerance_mm": settings.scoring.tolerance_mm,
            **({"tolerances_mm": dict(own)} if (own := settings.scoring.tolerances_mm) else {}),
            **({"surface": "elements between voxels"} if between else {}),
            "training": {
                "steps": settings.steps,
                "precision": settings.precision,
                "optim": settings.optim.model_dump(mode="json"),
                "crops": settings.crop.model_dump(mode="json"),
                "network": settings.network.model_dump(mode="json"),
            },
            "weights": "the last ones; the best in looks at a few validation cases are apart, in checkpoints/best.pt",
            "definitions": DEFINITIONS | (OF_ELEMENTS if between else {}),
        },
        "coverage": coverage,
        "labels": len(set(subjects)),
        "labelled_scans": len(taught),
        "seed": settings.seed,
        "fold": settings.fold,
        "split": {
            "train": sorted(set(subjects)),
            "validation": sorted({store.cases[i].subject for i in split.validation}),
        },
        "leakage": leakage,
        "left_out": [dict(rejected) for rejected in store.rejected],
        "notes": [note for note in (means["dice"].note,) if note],
    }


def _of_class(rows: Sequence[Row], value: int) -> dict[str, Any]:
    """One structure: means over cases, and what was undefined, missed or invented."""
    of = [row for row in rows if row["class"] == value]
    dice = mean_with_interval(values_by_subject(of, "dice"))
    return {
        "dice": _plain(dice.mean),
        "dice_interval": _interval(dice),
        "hd95_mm": _plain(mean_with_interval(values_by_subject(of, "hd95_mm")).mean),
        **{metric: _plain(mean_with_interval(values_by_subject(of, metric)).mean) for metric in LATER_MEANS},
        "cases": len(of),
        "undefined": sum(math.isnan(row["dice"]) for row in of),
        "missed": sum(row["voxels_true"] > 0 and row["voxels_predicted"] == 0 for row in of),
        "invented": sum(row["voxels_true"] == 0 and row["voxels_predicted"] > 0 for row in of),
    }


def _interval(found: MeanInterval) -> list[float | None]:
    return [_plain(found.low), _plain(found.high)]


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(float(value), 6)
