"""The report of a comparison of runs of classification or localisation: what was found, and no more than was found."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dagman.evaluation.assurances import leakage_between
from dagman.evaluation.comparison_leakage import leakage_of
from dagman.evaluation.comparison_report import compared, verdict_of
from dagman.evaluation.comparison_tables import METRIC_NAMES, Found, signed
from dagman.evaluation.paired_chart import paired_chart
from dagman.evaluation.pairs import mean_of
from dagman.evaluation.scores import read_study_summary
from dagman.evaluation.statistics import OF_ALL_SUBJECTS, SMALLER_IS_BETTER, Comparison
from dagman.evaluation.study_report import between
from spade3d.training.page import Column, Html, Section, page, table, write_page

_FOOTER = "One file: nothing is loaded, nothing is sent. Written by dagman. Not for diagnosis."
_READ_IT = (
    "Both sides told findings of the same studies. The interval resamples subjects, not studies, and draws the same "
    "subjects for both sides and for all pairs of runs; p is from the same resamples. A difference is called shown "
    "when its interval leaves out zero, p is at most 0.05 and there are 6 subjects at least; hollow and grey is no "
    "difference shown. Of maps the difference is the mean over findings, while better, equal and worse count subjects "
    "by the mean over all their boxes: a rare finding weighs more in the former."
)
_LEADING = ("t_iou_0.3", "pointing", "voxel_ap")

Rows = Sequence[Mapping[str, Any]]


def study_comparison_report(
    out: Path,
    metric: str,
    by_metric: Mapping[str, Found],
    sides: Mapping[str, Mapping[str, Path]],
    boxes: Mapping[str, Rows] | None,
) -> Path:
    """Write OUT/report.html, about one metric, and return its path.

    sides  side -> pair -> run, the reference first
    boxes  of each side the rows that maps were judged by, with `pair`; None where none were
    """
    reference, *others = sides
    leakage = leakage_of({side: map(read_study_summary, of.values()) for side, of in sides.items()})
    lead, sections = [], []
    for side in others:
        found = by_metric[metric][side]
        lead += verdict_of(found[0], reference, side)
        shown = (
            _paired(found, reference, side, boxes),
            *compared(found, {}, reference, side),
            _every_measure({one: of[side][0] for one, of in by_metric.items()}, reference, side),
        )
        sections.append(Section(f"{side} against {reference}", shown, _READ_IT))
    sections.append(Section("Runs", (_each_run(sides),), "Each run as it stands by itself."))
    title = f"{', '.join(others)} against {reference}"
    lead.append(leakage_between(leakage))
    return write_page(out / "report.html", page("Comparison", title, lead, sections, footer=_FOOTER))


def _paired(found: Sequence[Comparison], reference: str, side: str, boxes: Mapping[str, Rows] | None) -> Html:
    """A line for each subject; of what no subject has alone, a line for each finding."""
    metric = found[0].metric
    if metric in OF_ALL_SUBJECTS:
        title = f"{METRIC_NAMES[metric]} of each finding"
        pairs = [(one.name, one.mean_a, one.mean_b) for one in found[1:] if not math.isnan(one.difference)]
    else:
        title = f"Mean {METRIC_NAMES[metric]} of each subject"
        pairs = by_subject(boxes[reference], boxes[side], metric)
    return paired_chart(pairs, title, (reference, side), smaller_is_better=metric in SMALLER_IS_BETTER)


def by_subject(a: Rows, b: Rows, measure: str) -> list[tuple[str, float, float]]:
    """(subject, mean of a, mean of b) over the boxes for which both have a value."""
    after = {(row["subject"], row["finding"], row["box"], row["pair"]): row[measure] for row in b}
    of: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in a:
        pair = row[measure], after[row["subject"], row["finding"], row["box"], row["pair"]]
        of[row["subject"]] += [] if math.isnan(sum(pair)) else [pair]
    return [(who, mean_of([x for x, _ in pairs]), mean_of([y for _, y in pairs])) for who, pairs in sorted(of.items())]


def _every_measure(wholes: Mapping[str, Comparison], reference: str, side: str) -> Html:
    columns = [Column("Measure"), Column(reference, 3), Column(side, 3), Column("Difference"), Column("95 % interval")]
    columns += [Column("p (Holm over sides)", 3), Column("Pairs"), Column("Subjects")]
    lines = [
        (
            METRIC_NAMES[one],
            whole.mean_a,
            whole.mean_b,
            signed(whole.difference),
            between((whole.low, whole.high), ""),
            whole.p_holm,
            whole.pairs,
            whole.subjects,
        )
        for one, whole in wholes.items()
    ]
    return table(columns, lines, "Every measure, mean over findings. p is not adjusted over measures.")


def _each_run(sides: Mapping[str, Mapping[str, Path]]) -> Html:
    summaries = [(side, run, read_study_summary(run)) for side, of in sides.items() for run in of.values()]
    measures = _LEADING if all(said["localisation"] is not None for _, _, said in summaries) else ()
    columns = [Column("Side"), Column("Run"), Column("Encoder from"), Column("Labels"), Column("Seed")]
    columns += [Column("Mean AUROC", 3, bar=True), Column("95 % interval"), Column("Mean AP", 3)]
    columns += [Column(METRIC_NAMES[measure], 3) for measure in measures]
    return table(columns, [tuple(_run(side, run, said, measures)) for side, run, said in summaries])


def _run(side: str, run: Path, said: Mapping, measures: Sequence[str]) -> Iterator[object]:
    yield from (side, run.resolve().name, said["coverage"]["source"] if said["coverage"] else "scratch")
    yield from (said["labels"], said["seed"], said["macro_auroc"], between(said["macro_auroc_interval"], ""))
    yield said["macro_ap"]
    yield from (said["localisation"]["measures"][measure]["mean"] for measure in measures)
