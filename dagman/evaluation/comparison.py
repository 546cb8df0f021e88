"""Comparison of fine-tuning runs: sides by what they began with and learned by, pairs by case, seed, draw and fold.

What judges the runs must be the same (JUDGED_BY); how they learned names the sides. Cases of several folds are pooled:
where all folds of a split were run, each case is judged once, which is that protocol's own number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dagman.evaluation.comparison_files import headlines, write_tables
from dagman.evaluation.comparison_leakage import leakage_of
from dagman.evaluation.comparison_report import comparison_report
from dagman.evaluation.comparison_sides import beginnings, first_difference, pairs_of, runs_in, sides_of
from dagman.evaluation.folds import check_subjects, fold_of, missing_folds, split_rule
from dagman.evaluation.pairs import has
from dagman.evaluation.scores import of_studies, read_rows, read_summary
from dagman.evaluation.statistics import COMPARABLE, Comparison, Row, adjusted_over_sides, paired_comparison
from dagman.evaluation.study_comparison import MEASURED, compare_studies
from dagman.evaluation.ways_of_learning import BEGUN, ways_of_learning
from spade3d import console
from spade3d.configuration import read_yaml
from spade3d.faults import DataFault, UsageFault

# Of a run's protocol. Its `training` and `tuning`, and whatever is not here, is how it learned.
JUDGED_BY = ("name", "split", "spacing_mm", "grid", "background", "overlap", "tolerance_mm", "tolerances_mm")
JUDGED_BY += ("surface", "weights", "definitions", "flips", "largest_component")


def compare_runs(runs: Sequence[Path], out: Path, metric: str | None = None) -> dict:
    """Write OUT/comparison.json, .csv, .md, .tex and OUT/report.html; returns the headline numbers of each side minus
    the reference.

    `runs`: folders of runs, or of several runs each (`runs_in`), of segmentation, or all of studies
    (`compare_studies`). The reference is the side from scratch, else the side of the first run. `metric`, one of
    COMPARABLE (of MEASURED for studies), is what the report is about: Dice, or AUROC, where it is left open; the CSV
    has every metric that all runs have. Raises DataFault where protocol, labels, judges or cases differ, UsageFault
    where there is one side only or the sides were not run with the same seeds, draws and folds.
    """
    folders = runs_in(runs)
    if len(folders) < 2:
        raise UsageFault(f"{len(folders)} runs given; a comparison needs at least two")
    studies = one_kind(folders)
    known = MEASURED if studies else COMPARABLE
    if metric is not None and metric not in known:
        kind = "classification and localisation" if studies else "segmentation"
        raise UsageFault(f"--metric {metric}: runs of {kind} are compared in one of {', '.join(known)}")
    if studies:
        return compare_studies(folders, out, metric or "auroc")
    return compare_segmentations(folders, out, metric or "dice")


def one_kind(runs: Sequence[Path]) -> bool:
    """Whether the runs are of studies; UsageFault where some are and others segment."""
    kinds = {run: of_studies(run) for run in runs}
    if len(set(kinds.values())) > 1:
        told, segments = (next(run for run, studies in kinds.items() if studies == kind) for kind in (True, False))
        raise UsageFault(
            f"{told} tells findings of studies and {segments} segments; nothing of them compares: give runs of one kind"
        )
    return kinds[runs[0]]


def compare_segmentations(runs: Sequence[Path], out: Path, metric: str) -> dict:
    """`compare_runs` for runs of segmentation."""
    summaries = {run: read_summary(run) for run in runs}
    check_protocols(summaries)
    check_labels(summaries)
    check_subjects(summaries, pairs_of(summaries))
    ways = ways_of_learning(runs, {run: fold_of(summary) for run, summary in summaries.items()})
    names = {run: ", ".join(filter(None, (begun, ways[run]))) for run, begun in beginnings(summaries).items()}
    sides = sides_of(summaries, names)
    rows = {side: _rows_of(of) for side, of in sides.items()}
    unfinished = missing_folds(summaries)
    by_metric = {one: _compared(rows, one, unfinished) for one in COMPARABLE if one == metric or _all_have(rows, one)}
    console.results_folder(out)
    leakage = leakage_of({side: [summaries[run] for run in of.values()] for side, of in sides.items()})
    write_tables(out, metric, by_metric, sides, leakage, _protocol_said(summaries))
    report = comparison_report(out, by_metric[metric], {side: list(of.values()) for side, of in sides.items()})
    return headlines(out, next(iter(sides)), by_metric[metric], leakage, report)


def check_protocols(summaries: Mapping[Path, Mapping]) -> None:
    """DataFault where runs were judged otherwise. How they learned may differ: that is what is compared."""
    (first, said), *others = summaries.items()
    ours = judged_by(said)
    for run, summary in others:
        theirs = judged_by(summary)
        # A definition that only one of them has is of a metric that only one of them has.
        shared = ours["definitions"].keys() & theirs["definitions"].keys()
        a, b = (
            of | {"definitions": {name: text for name, text in of["definitions"].items() if name in shared}}
            for of in (ours, theirs)
        )
        if a != b:
            raise DataFault(
                f"{run}: another protocol than {first} ({first_difference(a, b)}); compare runs that share it"
            )


def check_labels(summaries: Mapping[Path, Mapping]) -> None:
    """DataFault where runs of one fold learned from another number of subjects. Those of two folds may, where folds
    are not of one size: then both were told the same (all of them, or a share)."""
    counts: dict[int | None, tuple[Path, int]] = {}
    for run, summary in summaries.items():
        twin, labels = counts.setdefault(fold_of(summary), (run, summary["labels"]))
        if summary["labels"] != labels:
            other = first_difference(labels, summary["labels"])
            raise DataFault(f"{run}: another labels than {twin} ({other}); compare runs that share it")
    if len({labels for _, labels in counts.values()}) > 1:
        told = {run: read_yaml(run / BEGUN).get("labels") or "all" for run, _ in counts.values()}
        first, asked = next(iter(told.items()))
        for run, labels in told.items():
            if labels != asked:
                other = first_difference({"--labels": asked}, {"--labels": labels})
                raise DataFault(f"{run}: another labels than {first} ({other}); compare runs that share it")


def judged_by(summary: Mapping) -> dict:
    """What of a run's protocol judges it, whatever its fold."""
    older = {"split": "", "definitions": {}, "flips": "none", "largest_component": False, "surface": "voxels"}
    protocol = older | summary["protocol"]
    return {key: protocol.get(key) for key in JUDGED_BY} | {"split": split_rule(protocol["split"])}


def _protocol_said(summaries: Mapping[Path, Mapping]) -> dict:
    """What comparison.json says of the protocol: what judged all runs, and every setting in which one left it."""
    first = next(iter(summaries.values()))
    left = {one: None for said in summaries.values() for one in said["protocol"].get("deviations", ())}
    stated = {"stated": first["protocol"]["stated"]} if "stated" in first["protocol"] else {}
    folds = sorted({fold for said in summaries.values() if (fold := fold_of(said)) is not None})
    return {
        "protocol": judged_by(first) | stated | {"deviations": list(left)},
        "labels": first["labels"],
        "folds": folds,
    }


def _rows_of(runs: Mapping[str, Path]) -> list[Row]:
    return [row | {"pair": pair} for pair, run in runs.items() for row in read_rows(run)]


def _all_have(rows: Mapping[str, Sequence[Row]], metric: str) -> bool:
    return all(has(row, metric) for of in rows.values() for row in of)


def _compared(rows: Mapping[str, Sequence[Row]], metric: str, remark: str) -> dict[str, list[Comparison]]:
    """Each side against the reference; `remark` is what is to be said of every mean."""
    reference, *others = rows
    found = {}
    for side in others:
        whole, *classes = paired_comparison(rows[reference], rows[side], metric=metric)
        found[side] = [replace(whole, note="; ".join(filter(None, (remark, whole.note)))), *classes]
    return adjusted_over_sides(found)
