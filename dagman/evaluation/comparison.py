"""Comparison of fine-tuning runs: sides by their encoder, pairs by case, seed and draw; all else must be the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dagman.evaluation.comparison_files import headlines, write_tables
from dagman.evaluation.comparison_sides import first_difference, pair_of, runs_in, side_of, sides_of
from dagman.evaluation.report import comparison_report
from dagman.evaluation.scores import of_studies, read_rows, read_summary
from dagman.evaluation.statistics import COMPARABLE, Comparison, Row, adjusted_over_sides, paired_comparison
from dagman.evaluation.study_comparison import MEASURED, compare_studies
from spade3d import console
from spade3d.faults import DataFault, UsageFault


def compare_runs(runs: Sequence[Path], out: Path, metric: str | None = None) -> dict:
    """Write OUT/comparison.json, .csv, .md, .tex and OUT/report.html; returns the headline numbers of each side minus
    the reference.

    `runs`: folders of runs, or of several runs each (`runs_in`), of segmentation, or all of studies
    (`compare_studies`). The reference is the side from scratch, else the side of the first run. `metric`, one of
    COMPARABLE (of MEASURED for studies), is what the report is about: Dice, or AUROC, where it is left open; the CSV
    has every metric that all runs have. Raises DataFault where protocol, labels, judges or cases differ, UsageFault
    where there is one side only or the sides were not run with the same seeds and draws.
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
    sides = sides_of(summaries, {run: side_of(summary) for run, summary in summaries.items()})
    rows = {side: _rows_of(of) for side, of in sides.items()}
    by_metric = {one: _compared(rows, one) for one in COMPARABLE if one == metric or _all_have(rows, one)}
    console.results_folder(out)
    said = {key: next(iter(summaries.values()))[key] for key in ("protocol", "labels")}
    write_tables(out, metric, by_metric, sides, said)
    report = comparison_report(out, by_metric[metric], {side: list(of.values()) for side, of in sides.items()})
    return headlines(out, next(iter(sides)), by_metric[metric], report)


def check_protocols(summaries: Mapping[Path, Mapping]) -> None:
    """Only the encoder may differ: same protocol, same number of labels, same judges, same learning subjects a pair."""
    (first, said), *others = summaries.items()
    learned = {pair_of(summary): (run, summary["split"]["train"]) for run, summary in summaries.items()}
    for run, summary in others:
        for key in ("protocol", "labels"):
            if summary[key] != said[key]:
                other = first_difference(said[key], summary[key])
                raise DataFault(f"{run}: another {key} than {first} ({other}); compare runs that share it")
        if summary["split"]["validation"] != said["split"]["validation"]:
            raise DataFault(f"{run}: judged on other subjects than {first}; compare runs of one --fold and one dataset")
    for run, summary in summaries.items():
        twin, subjects = learned[pair_of(summary)]
        if summary["split"]["train"] != subjects:
            raise DataFault(f"{run}: learned from other subjects than {twin}, with the same seed; run both anew")


def _rows_of(runs: Mapping[str, Path]) -> list[Row]:
    return [row | {"pair": pair} for pair, run in runs.items() for row in read_rows(run)]


def _all_have(rows: Mapping[str, Sequence[Row]], metric: str) -> bool:
    return all(metric in row for of in rows.values() for row in of)


def _compared(rows: Mapping[str, Sequence[Row]], metric: str) -> dict[str, list[Comparison]]:
    reference, *others = rows
    return adjusted_over_sides({side: paired_comparison(rows[reference], rows[side], metric=metric) for side in others})
