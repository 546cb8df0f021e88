"""The report of a fine-tuning run: what was found, and no more than was found."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dagman.evaluation.assurances import assurances, coverage, warnings
from dagman.evaluation.case_pictures import HOW_TO_LOOK, CasePicture, case_pictures
from dagman.evaluation.cases_table import REAL
from dagman.evaluation.pairs import Row, has, mean_of, value_of
from dagman.evaluation.scores import case_means, read_rows, read_summary
from dagman.evaluation.statistics import mean_with_interval, values_by_subject
from spade3d.training.charts import Estimate, interval_chart, line_chart
from spade3d.training.page import (
    Column,
    Html,
    Section,
    callout,
    counted,
    facts,
    figures,
    folded,
    number,
    page,
    table,
    tag,
    write_page,
)
from spade3d.training.report import curves, duration, names_list, open_run, origin, series, settings

FOOTER = "One file: nothing is loaded, nothing is sent. Written by dagman. Not for diagnosis."
RULE = (
    "A structure that is absent from truth and prediction alike is undefined: it is left out of every mean and "
    "counted. One that is missed entirely, or invented, has Dice 0, NSD 0 and the image diagonal as HD95 and as its "
    "average surface distance (ASD)."
)


def finetuning_report(run: Path, pictures: Sequence[CasePicture] = ()) -> Path:
    """Write RUN/report.html and return its path.

    Reads config.yaml, log.jsonl, provenance.json, cases.csv and summary.json. Of summary.json's `leakage` it reads
    `validation_in_training` and `validation_in_pretraining`, lists of subjects, and `pretraining`: "none" (from
    scratch), "checked" or "unknown" (the checkpoint does not say what it has seen). `telling_cases` names the cases
    to give as pictures.
    """
    opened, summary, rows = open_run(run), read_summary(run), read_rows(run)
    cases, subjects = len({r["case"] for r in rows}), len({r["subject"] for r in rows})
    names = _names(rows)
    interval = interval_said(summary["mean_dice_interval"])
    over = f"{counted(len(names), 'structure')}, {counted(cases, 'validation case')} of {counted(subjects, 'subject')}"
    verdict = f"Mean Dice {number(summary['mean_dice'], 3)} ({interval}) over {over}."
    top = figures(
        ("Mean Dice", number(summary["mean_dice"], 3), interval),
        ("Mean HD95", f"{number(summary['mean_hd95_mm'], 1)} mm", "95th percentile surface distance"),
        ("Mean NSD", number(summary["mean_nsd"], 3), "share of the surface within tolerance"),
        ("Validation", number(cases), f"{'case' if cases == 1 else 'cases'} of {counted(subjects, 'subject')}"),
    )
    alone = callout(
        "note",
        "This run is compared with nothing here: the number alone does not say whether pretraining helped. "
        "dagman-compare sets it against a run from scratch, case by case.",
    )
    sections = [
        Section("Structures", tuple(_per_class(rows)), RULE),
        Section(
            "Cases",
            (*case_pictures(pictures, names), tag("h3", "Every case"), _per_case(rows)),
            HOW_TO_LOOK if pictures else "",
        ),
        Section("Split and protocol", tuple(_split(summary, cases))),
        Section("Checkpoint", tuple(coverage(summary["coverage"]))),
        Section(
            "Training", (*_validation(opened.validations), *curves(opened.log)), f"It took {duration(opened.log)}."
        ),
        settings(opened),
        origin(opened),
    ]
    notes = (callout("note", note) for note in summary.get("notes", ()))
    lead = (tag("p", verdict, class_="verdict"), top, *warnings(summary), *notes, alone)
    return write_page(
        run / "report.html", page("Fine-tuning report", run.resolve().name, lead, sections, footer=FOOTER)
    )


def interval_said(bounds: Sequence[float | int | None] | None, name: str = "95 % interval ") -> str:
    """An interval as text."""
    if not _bounded(bounds):
        return "no interval: too few subjects"
    return f"{name}{number(bounds[0], 3)}\u00a0to\u00a0{number(bounds[1], 3)}"


def _bounded(bounds: Sequence[float | int | None] | None) -> bool:
    return bounds is not None and all(b is not None and math.isfinite(b) for b in bounds)


def _names(rows: Sequence[Row]) -> dict[int, str]:
    """Structures by label value, in its order."""
    return dict(sorted((row["class"], row["name"]) for row in rows))


def _per_class(rows: Sequence[Row]) -> Iterator[Html]:
    lines, estimates = [], []
    for label, name in _names(rows).items():
        of = [row for row in rows if row["class"] == label]
        absent = sum(math.isnan(row["dice"]) for row in of)
        missed = sum(row["voxels_true"] > 0 and row["voxels_predicted"] == 0 for row in of)
        invented = sum(row["voxels_true"] == 0 and row["voxels_predicted"] > 0 for row in of)
        dice = mean_with_interval(values_by_subject(rows, "dice", label))
        others = [
            mean_of([value_of(row, one) for row in of if has(row, one)]) for one in (*REAL[1:], "volume_error_ml")
        ]
        lines.append((name, dice.mean, *others, len(of) - absent, absent, missed, invented))
        estimates.append(Estimate(name, tuple(row["dice"] for row in of), dice.mean, dice.low, dice.high))
    columns = [Column("Structure"), Column("Dice", 3, bar=True), Column("HD95 (mm)", 1), Column("NSD", 3)]
    columns += [Column("ASD (mm)", 2), Column("Volume (ml)", 1), Column("Volume error (ml)", 1)]
    columns += [Column("Cases"), Column("Undefined"), Column("Missed"), Column("Invented")]
    title = "Dice of each case, and the mean with its 95 % interval over subjects"
    yield interval_chart(estimates, title, axis="Dice", domain=(0.0, 1.0))
    caption = (
        "Means over the cases in which the metric is defined. Volume: predicted minus true; its error: the size of "
        "that in each case. Undefined: absent from truth and prediction alike."
    )
    yield table(columns, lines, caption)


def _per_case(rows: Sequence[Row]) -> Html:
    names = _names(rows)
    dice = {(row["case"], row["class"]): row["dice"] for row in rows}
    subject = {row["case"]: row["subject"] for row in rows}
    columns = [Column("Case"), Column("Subject"), Column("Mean Dice", 3, bar=True)]
    lines = [
        (case, subject[case], value, *(dice.get((case, label), math.nan) for label in names))
        for case, value in case_means(rows).items()
    ]
    caption = "Dice of every validation case, worst first. A dash is undefined. HD95 and NSD stand in cases.csv."
    return table([*columns, *(Column(name, 3) for name in names.values())], lines, caption)


def _split(summary: Mapping, cases: int) -> Iterator[Html]:
    split = summary["split"]
    shown = {"Training cases": len(split["train"]), "Validation cases": cases}
    shown |= {"Labels used": said(summary.get("labels")), "Seed": said(summary.get("seed"))}
    shown |= {key.capitalize(): said(summary[key]) for key in ("draw", "tuning") if key in summary}
    yield facts(shown | {str(k).replace("_", " ").capitalize(): said(v) for k, v in summary["protocol"].items()})
    yield from assurances(summary)
    yield folded("Training", names_list([str(n) for n in split["train"]]))
    yield folded("Validation", names_list([str(n) for n in split["validation"]]))


def said(value: object) -> str:
    """A value of a summary as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key.replace('_', ' ')}: {said(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(number(v) for v in value) or "none"
    return "not set" if value is None else number(value)


def _validation(rows: Sequence[Mapping]) -> Iterator[Html]:
    if rows:
        shown = series("validation Dice", rows, lambda row: row["validation"].get("mean_dice"))
        yield line_chart([shown], "Validation Dice while training")
