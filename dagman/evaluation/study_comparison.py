"""Comparison of runs of classification and localisation: AUROC and AP by study, maps by annotated box, pairs by seed.

A side is what the runs began with and, where the runs learned otherwise, in what: "from scratch, head clarity". What
they are judged by must be the same. AUROC and AP are of all subjects together, with an interval and p of the bootstrap
over subjects; so is what maps are measured by, which is paired by box (`finding_means.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagman.evaluation.classification import METRICS, RESAMPLES, compare_findings, read_predictions
from dagman.evaluation.classification import Difference as Change
from dagman.evaluation.comparison_files import headlines, write_tables
from dagman.evaluation.comparison_leakage import leakage_of
from dagman.evaluation.comparison_sides import first_difference, pairs_of, side_of, sides_of
from dagman.evaluation.finding_means import Difference, difference
from dagman.evaluation.localisation import MEASURES
from dagman.evaluation.scores import read_study_summary
from dagman.evaluation.statistics import FEW_SUBJECTS, Comparison, adjusted_over_sides
from dagman.evaluation.statistics import RESAMPLES as BOX_RESAMPLES
from dagman.evaluation.study_comparison_report import study_comparison_report
from dagman.evaluation.ways_of_learning import ways_of_learning
from spade3d import console
from spade3d.faults import DataFault

MEASURED = (*METRICS, *MEASURES)
PREDICTIONS, LOCALISED = "predictions.csv", "localisation.json"  # of a run
JUDGED_BY = ("name", "split", "spacing_mm", "overlap", "imbalance", "weights", "definitions")  # of a run's protocol

Rows = list[dict[str, Any]]
Runs = Mapping[str, Path]  # pair -> run


def compare_studies(runs: Sequence[Path], out: Path, metric: str = "auroc") -> dict:
    """`compare_runs` for runs of studies. `metric`, one of MEASURED, is what the report is about; the CSV has all that
    all runs have: without localisation.json AUROC and AP alone.

    DataFault where the runs were judged by other studies, labels or boxes, learned from other studies, or do not have
    the metric.
    """
    summaries = {run: read_study_summary(run) for run in runs}
    check_studies(summaries)
    check_judging(summaries)  # before sides are told apart: runs that differ in this alone would be called one side
    ways = ways_of_learning(runs, {run: summary["fold"] for run, summary in summaries.items()})
    names = {run: ", ".join(filter(None, (side_of(summary), ways[run]))) for run, summary in summaries.items()}
    sides = sides_of(summaries, names)
    predictions = {side: _of_pairs(of, lambda run: read_predictions(run / PREDICTIONS)) for side, of in sides.items()}
    by_metric = {one: _studies_compared(predictions, one) for one in METRICS}
    boxes = None
    if all(summary["localisation"] is not None for summary in summaries.values()):
        boxes = {side: _of_pairs(of, read_boxes_judged) for side, of in sides.items()}
        check_boxes(boxes)
        by_metric |= {one: _boxes_compared(boxes, one) for one in MEASURES}
    if metric not in by_metric:
        without = next(run for run, summary in summaries.items() if summary["localisation"] is None)
        raise DataFault(f"{without}: judged no maps and has no {metric}; give its run --boxes, or leave it out")
    console.results_folder(out)
    first = next(iter(summaries.values()))
    said = {"task": first["task"], "findings": list(first["per_finding"]), "fold": first["fold"]}
    said |= {"protocol": {key: first["protocol"].get(key) for key in JUDGED_BY}, "labels": first["labels"]}
    leakage = leakage_of({side: [summaries[run] for run in of.values()] for side, of in sides.items()})
    write_tables(out, metric, by_metric, sides, leakage, said)
    report = study_comparison_report(out, metric, by_metric, sides, boxes)
    return headlines(out, next(iter(sides)), by_metric[metric], leakage, report)


def check_studies(summaries: Mapping[Path, Mapping]) -> None:
    """DataFault where runs do another task, or were judged or taught by other studies."""
    (first, said), *others = summaries.items()
    pairs = pairs_of(summaries)
    taught = {pairs[run]: (run, summary) for run, summary in reversed(summaries.items())}
    for run, summary in others:
        for key, theirs, ours in (
            ("task", said["task"], summary["task"]),
            ("findings", ", ".join(said["per_finding"]), ", ".join(summary["per_finding"])),
            ("fold", said["fold"], summary["fold"]),
            ("protocol", *({key: one["protocol"].get(key) for key in JUDGED_BY} for one in (said, summary))),
            ("labels", said["labels"], summary["labels"]),
        ):
            if theirs != ours:
                other = first_difference(theirs, ours)
                raise DataFault(f"{run}: another {key} than {first} ({other}); compare runs that share it")
        if summary["split"]["validation"] != said["split"]["validation"]:
            raise DataFault(f"{run}: judged on other subjects than {first}; compare runs of one --fold and one dataset")
    for run, summary in summaries.items():
        twin, theirs = taught[pairs[run]]
        if summary["split"]["train"] != theirs["split"]["train"]:
            raise DataFault(f"{run}: learned from other subjects than {twin}, with the same seed; run both anew")
        if summary["taught"] != theirs["taught"]:
            raise DataFault(f"{run}: learned from other labels than {twin}; compare runs of one --findings")


def check_judging(summaries: Mapping[Path, Mapping]) -> None:
    """DataFault where maps were judged otherwise, of the runs that judged any."""
    ways = {
        run: {key: value for key, value in summary["localisation"]["judging"].items() if key != "seed"}
        for run, summary in summaries.items()
        if summary["localisation"] is not None
    }
    for run, how in ways.items():
        first = next(iter(ways))
        if how != ways[first]:
            other = first_difference(ways[first], how)
            raise DataFault(f"{run}: judges maps otherwise than {first} ({other}); compare runs that share it")


def check_boxes(boxes: Mapping[str, Rows]) -> None:
    """DataFault where maps were judged by other boxes; whose are missing, the pairing says."""
    sizes: dict[tuple, float] = {}
    for row in (row for rows in boxes.values() for row in rows):
        key = row["subject"], row["finding"], row["box"]
        if sizes.setdefault(key, row["diameter_mm"]) != row["diameter_mm"]:
            raise DataFault(
                f"{' '.join(map(str, key))}: a box of {sizes[key]:g} mm in one run and of {row['diameter_mm']:g} mm in "
                "another; judge all runs by the same boxes"
            )


def read_boxes_judged(run: Path) -> Rows:
    """The rows of localisation.json, NaN for what has no value; DataFault for what cannot be read."""
    path = run / LOCALISED
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            row |= {name: math.nan if row[name] is None else float(row[name]) for name in (*MEASURES, "diameter_mm")}
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise DataFault(f"{path}: cannot be read ({broken!r}); judge the run again") from broken
    return rows


def _of_pairs(runs: Runs, read) -> Rows:
    """The rows of a side's runs, each with its pair, under the name that either pairing knows."""
    return [{**row, "pair": pair, "seed": pair} for pair, run in runs.items() for row in read(run)]


def _studies_compared(rows: Mapping[str, Rows], metric: str) -> dict[str, list[Comparison]]:
    reference, *others = rows
    found = {}
    for side in others:
        changes = compare_findings(rows[reference], rows[side], metric=metric)
        found[side] = [_of_change(n, change, rows[reference]) for n, change in enumerate(changes)]
    return adjusted_over_sides(found, "findings")


def _of_change(n: int, change: Change, rows: Rows) -> Comparison:
    """A row of the comparison; `n` counts findings from 1."""
    whole = change.finding is None
    of = [row for row in rows if whole or row["finding"] == change.finding]
    known = [row for row in of if not math.isnan(row["label"])]
    studies, judged = ({(row["case"], row["pair"]) for row in some} for some in (of, known))
    subjects = len({row["subject"] for row in known})
    return Comparison(
        name="mean" if whole else change.finding,
        class_=None if whole else n,
        metric=change.metric,
        **_numbers(change),
        smallest_p=2 / (RESAMPLES + 1),
        wins=None,
        ties=None,
        losses=None,
        subjects=subjects,
        pairs=len(judged),
        left_out=len(studies) - len(judged),
        note="; ".join(filter(None, _doubts(change, subjects, [] if whole else known))),
    )


def _numbers(change: Change | Difference) -> dict[str, float]:
    """What either comparison found, under the names of a row; p is corrected once all rows are there."""
    same = {name: getattr(change, name) for name in ("difference", "low", "high", "p")}
    return same | {"mean_a": change.a, "mean_b": change.b, "p_holm": change.p}


def _doubts(change: Change, subjects: int, known: Rows) -> tuple[str, ...]:
    """Why a difference should not be trusted. `known`: the rows of one finding that have a label."""
    few = f"only {subjects} subjects: the interval is too narrow to trust" if subjects < FEW_SUBJECTS else ""
    if math.isnan(change.difference):
        return (few, "undefined: it takes studies with the finding and studies without it")
    kinds = [len({row["subject"] for row in known if row["label"] == kind}) for kind in (1, 0)]
    rare = f"subjects with it {kinds[0]}, without it {kinds[1]}: few" if known and min(kinds) < FEW_SUBJECTS else ""
    return (few, rare)


def _boxes_compared(rows: Mapping[str, Rows], measure: str) -> dict[str, list[Comparison]]:
    reference, *others = rows
    findings = sorted({row["finding"] for row in rows[reference]})
    found = {}
    for side in others:
        whole = _of_boxes(None, "mean", len(rows[side]), difference(rows[reference], rows[side], measure))
        found[side] = [whole]
        for n, finding in enumerate(findings, start=1):
            a, b = ([row for row in rows[one] if row["finding"] == finding] for one in (reference, side))
            found[side].append(_of_boxes(n, finding, len(b), difference(a, b, measure)))
    return adjusted_over_sides(found, "findings")


def _of_boxes(n: int | None, name: str, boxes: int, change: Difference) -> Comparison:
    return Comparison(
        name=name,
        class_=n,
        metric=change.measure,
        **_numbers(change),
        smallest_p=2 / (BOX_RESAMPLES + 1),
        wins=change.wins,
        ties=change.ties,
        losses=change.losses,
        subjects=change.subjects,
        pairs=change.boxes,
        left_out=boxes - change.boxes,
        note=change.note,
    )
