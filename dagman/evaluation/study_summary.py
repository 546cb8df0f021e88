"""summary.json of a run of classification or localisation: its result, with everything needed to judge it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dagman.evaluation.classification import METRICS, Row, Score, score_findings

DEFINITIONS = {
    "auroc": "chance that a study with the finding scores higher than one without it; ties count half",
    "ap": "average precision, sum over thresholds of recall gained times precision; chance is the prevalence",
    "undefined": "a finding that all judged studies have, or none: no AUROC, no AP, left out of the mean, counted",
    "macro": "mean over the findings that are defined; the intervals resample subjects (bootstrap, 95 %)",
}
CONTROL = (
    "no checkpoint and a frozen encoder: the tokens are those of random weights. This is the control that a pretrained "
    "encoder must beat, not a model"
)
LARGE = ("rows", "baselines_by_finding")  # of localisation.json alone
SHOWN = {
    "cached": "cached tokens: the frozen encoder ran once over the whole body, window by window",
    "bag": "bag of crops of the body, drawn anew each step; judged on all windows of the body together",
    "whole": "the whole body at a low resolution",
}


def summarise_studies(
    rows: Sequence[Row],
    work,
    coverage: Mapping | None,
    leakage: Mapping,
    localised: Mapping | None,
    told: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that summary.json says.

    rows       of predictions.csv
    work       settings, store, findings, split and the cases that taught
    coverage   of the checkpoint, None from scratch
    localised  what the judge of maps says, None where no map was judged
    told       notes on the annotations that maps are judged by, and on a teacher
    """
    settings, findings, split, store = work.settings, work.findings, work.split, work.store
    found = {(score.finding, score.metric): score for score in score_findings(rows)}
    macro = {metric: found[None, metric] for metric in METRICS}
    subjects = {store.cases[i].subject for i in work.taught}
    control = coverage is None and settings.tuning == "frozen"
    notes = [*findings.notes, *told, macro["auroc"].note, CONTROL if control else ""]
    notes += preparation_notes(store, coverage)
    return {
        "task": settings.task,
        **{f"macro_{metric}": plain(score.value) for metric, score in macro.items()},
        **{f"macro_{metric}_interval": interval(score) for metric, score in macro.items()},
        "undefined": [name for name in findings.names if math.isnan(found[name, "auroc"].value)],
        "per_finding": {name: _of_finding(found, name) for name in findings.names},
        "cases": len({row["case"] for row in rows}),
        "subjects": len({row["subject"] for row in rows}),
        "taught": findings.counts(work.taught),
        "protocol": {
            "name": "holdout",
            "split": split.rule,
            "arrangement": settings.arrangement,
            "shown": SHOWN[settings.arrangement],
            "head": settings.head,
            "tuning": settings.tuning,
            "spacing_mm": list(settings.data.spacing),
            "low_resolution_mm": settings.low_mm,
            "window": list(settings.crop.shape),
            "overlap": settings.scoring.overlap,
            "imbalance": "labels weigh as they come; heads begin at the prevalence",
            "weights": "the last ones; the best in looks at the validation studies are apart, in checkpoints/best.pt",
            "definitions": DEFINITIONS,
        },
        "localisation": None if localised is None else {k: v for k, v in localised.items() if k not in LARGE},
        "coverage": coverage,
        "labels": len(subjects),
        "labelled_scans": len(work.taught),
        "seed": settings.seed,
        "fold": settings.fold,
        "split": {
            "train": sorted(subjects),
            "validation": sorted({store.cases[i].subject for i in split.validation}),
        },
        "leakage": leakage,
        "left_out": [dict(rejected) for rejected in store.rejected],
        "notes": [note for note in notes if note],
    }


def preparation_notes(store, coverage: Mapping | None) -> list[str]:
    """Where the scans are not prepared as those were that a frozen encoder knows."""
    theirs, ours = (coverage or {}).get("preprocessing"), store.preprocessing.to_dict()
    if theirs is None:
        return []
    other = [
        f"{key} {ours[key]} instead of {theirs[key]}"
        for key in ("spacing", "window_hu", "mr")
        if ours[key] != theirs.get(key)
    ]
    return [f"scans are prepared otherwise than for the pretraining: {', '.join(other)}"] if other else []


def interval(score: Score) -> list[float | None]:
    """Its ends, for JSON."""
    return [plain(score.low), plain(score.high)]


def plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(float(value), 6)


def _of_finding(found: Mapping[tuple[str | None, str], Score], name: str) -> dict[str, Any]:
    of = {metric: found[name, metric] for metric in METRICS}
    values = {key: value for metric, score in of.items() for key, value in
              ((metric, plain(score.value)), (f"{metric}_interval", interval(score)))}  # fmt: skip
    return values | {"present": of["auroc"].present, "absent": of["auroc"].absent, "note": of["auroc"].note}
