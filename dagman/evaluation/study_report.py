"""The report of a run of classification or localisation: what was found, and no more than was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dagman.evaluation.assurances import assurances, coverage, warnings
from dagman.evaluation.case_pictures import CasePicture, case_pictures
from dagman.evaluation.classification import Row, read_predictions
from dagman.evaluation.scores import read_study_summary
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

_FOOTER = "One file: nothing is loaded, nothing is sent. Written by dagman. Not for diagnosis."
RULE = (
    "AUROC is the chance that a study with the finding scores higher than one without it; 0.5 is chance. Chance of AP "
    "is the prevalence. A finding that all judged studies have, or none, has neither: it is left out of the mean."
)
MAPS_RULE = (
    "Judged on annotated findings alone. The threshold that makes a box of a map was chosen on the other half of the "
    "subjects. In 3-D an IoU of 0.5 is closer than it sounds: a cube whose sides are a fifth too short has 0.51."
)
LOOK = (
    "What is called truth is the annotated box or mask; what is called prediction are the voxels of the map above the "
    "share of its maximum that the other half of the subjects chose."
)
_MEASURES = {
    "t_iou_0.1": Column("T(IoU) 0.1", 3),
    "t_iou_0.3": Column("T(IoU) 0.3", 3),
    "t_iou_0.5": Column("T(IoU) 0.5", 3),
    "iou": Column("IoU", 3),
    "t_iobb_0.25": Column("T(IoBB) 0.25", 3),
    "t_iobb_0.5": Column("T(IoBB) 0.5", 3),
    "t_iobb_0.75": Column("T(IoBB) 0.75", 3),
    "pointing": Column("Pointing", 3),
    "pointing_near": Column("Pointing, near", 3),
    "voxel_ap": Column("Voxel AP", 3),
    "error_x_mm": Column("Off along R, mm", 1),
    "error_y_mm": Column("Off along A, mm", 1),
    "error_z_mm": Column("Off along S, mm", 1),
}
_BASELINES = {
    "random": "Chance",
    "centre": "Middle of the volume",
    "prior": "The prior alone",
    "organ": "True organ of the scan",
    "organ, its middle": "True organ, its middle",
    "grad-cam": "Grad-CAM of this head",
}
BASELINES_RULE = (
    "What this run has more than maps that know nothing of the finding, or its organ alone, on the same boxes with "
    "thresholds chosen by the same halves; intervals over subjects. A map that is not above the organ has shown where "
    "the organ is."
)
OFF = "Off: how far the centre of the box lies from that of the annotated one."
_OVER = ("iou", "t_iou_0.3", "pointing", "voxel_ap")


def study_report(run: Path, pictures: Sequence[CasePicture] = ()) -> Path:
    """Write RUN/report.html and return its path.

    Reads config.yaml, log.jsonl, provenance.json, predictions.csv and summary.json. `pictures`: findings and their maps
    (truth and prediction are 0 or 1).
    """
    opened, summary, rows = open_run(run), read_study_summary(run), read_predictions(run / "predictions.csv")
    defined = len(summary["per_finding"]) - len(summary["undefined"])
    over = f"{counted(defined, 'finding')}, {counted(summary['cases'], 'study', 'studies')} of " + counted(
        summary["subjects"], "subject"
    )
    found = between(summary["macro_auroc_interval"])
    verdict = f"Mean AUROC {number(summary['macro_auroc'], 3)} ({found}) over {over}."
    top = figures(
        ("Mean AUROC", number(summary["macro_auroc"], 3), found),
        ("Mean AP", number(summary["macro_ap"], 3), between(summary["macro_ap_interval"])),
        ("Findings", number(defined), f"{len(summary['undefined'])} undefined"),
        ("Validation", counted(summary["cases"], "study", "studies"), counted(summary["subjects"], "subject")),
    )
    sections = [Section("Findings", tuple(_findings(summary)), RULE)]
    if summary["localisation"] is not None:
        sections.append(Section("Where", tuple(_where(summary["localisation"], pictures)), MAPS_RULE))
    sections += [
        Section("Studies", (folded("Every study", _studies(rows)),)),
        Section("Split and protocol", tuple(_split(summary))),
        Section("Checkpoint", tuple(coverage(summary["coverage"]))),
        Section("Training", (*_looks(opened.validations), *curves(opened.log)), f"It took {duration(opened.log)}."),
        settings(opened),
        origin(opened),
    ]
    notes = (callout("note", note) for note in summary["notes"])
    lead = (tag("p", verdict, class_="verdict"), top, *warnings(summary), *notes)
    title = f"{summary['task'].capitalize()} report"
    return write_page(run / "report.html", page(title, run.resolve().name, lead, sections, footer=_FOOTER))


def _findings(summary: Mapping) -> Iterator[Html]:
    of = summary["per_finding"]
    defined = {name: one for name, one in of.items() if one["auroc"] is not None}
    if defined:
        estimates = [
            Estimate(name, (), one["auroc"], *(math.nan if end is None else end for end in one["auroc_interval"]))
            for name, one in defined.items()
        ]
        title = "AUROC of each finding, with its 95 % interval over subjects"
        yield interval_chart(estimates, title, axis="AUROC", domain=(0.0, 1.0))
    columns = [Column("Finding"), Column("AUROC", 3, bar=True), Column("95 % interval"), Column("AP", 3)]
    columns += [Column("95 % interval"), Column("Present"), Column("Absent"), Column("Remark")]
    lines = [
        (
            name,
            one["auroc"],
            between(one["auroc_interval"], ""),
            one["ap"],
            between(one["ap_interval"], ""),
            one["present"],
            one["absent"],
            one["note"],
        )
        for name, one in of.items()
    ]
    yield table(columns, lines, "Present and absent: validation studies in which the finding is said to be so.")


def _where(found: Mapping, pictures: Sequence[CasePicture]) -> Iterator[Html]:
    columns = [Column("Finding"), *_MEASURES.values()]
    baselines = found.get("baselines", {})  # older runs, and those that were told so, judged none
    groups = {"All findings": found["measures"], **found["by_finding"]}
    groups |= {f"{_BASELINES[name]} (all findings)": of["measures"] for name, of in baselines.items()}
    lines = [(name, *(of[measure]["mean"] for measure in _MEASURES)) for name, of in groups.items()]
    judged = f"{counted(found['boxes'], 'box', 'boxes')} of {counted(found['subjects'], 'subject')}."
    yield table(columns, lines, f"{judged} {OFF}")
    if baselines:
        lines = [(_BASELINES[name], *(_more(of["over"][one]) for one in _OVER)) for name, of in baselines.items()]
        titles = [Column("This run minus"), *(Column(_MEASURES[one].heading) for one in _OVER)]
        yield table(titles, lines, BASELINES_RULE)
    if left_out := found.get("baselines_left_out"):
        yield facts({f"{_BASELINES[name]}, not judged": why for name, why in left_out.items()})
    if found["by_size"]:
        lines = [
            (size, of["boxes"], *(of[measure]["mean"] for measure in _MEASURES))
            for size, of in found["by_size"].items()
        ]
        sizes = [Column("Size"), Column("Boxes"), *_MEASURES.values()]
        yield table(sizes, lines, "The same by the size of what is annotated.")
    if pictures:
        yield tag("p", LOOK, class_="lead")
        yield from case_pictures(pictures, {1: "the finding"})


def _more(of: Mapping) -> str:
    """A difference with its interval."""
    ends = between((of["low"], of["high"]), "")
    return "–" if of["difference"] is None else f"{of['difference']:+.3f} ({ends})"


def _studies(rows: Sequence[Row]) -> Html:
    findings = list(dict.fromkeys(row["finding"] for row in rows))
    told: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        sign = {1.0: " (present)", 0.0: ""}.get(row["label"], " (not said)")
        told.setdefault((row["case"], row["subject"]), {})[row["finding"]] = number(row["probability"], 3) + sign
    lines = [(case, subject, *(of[name] for name in findings)) for (case, subject), of in told.items()]
    return table([Column("Study"), Column("Subject"), *map(Column, findings)], lines, "Probability of each finding.")


def _split(summary: Mapping) -> Iterator[Html]:
    shown = {"Subjects that taught": summary["labels"], "Studies that taught": summary["labelled_scans"]}
    shown |= {"Seed": summary["seed"]}
    shown |= {key.replace("_", " ").capitalize(): _said(value) for key, value in summary["protocol"].items()}
    yield facts(shown)
    columns = [Column("Finding"), Column("Present"), Column("Absent"), Column("Not said")]
    lines = [(name, of["present"], of["absent"], of["unknown"]) for name, of in summary["taught"].items()]
    yield table(columns, lines, "In the studies that taught.")
    yield from assurances(summary)
    for side in ("train", "validation"):
        yield folded({"train": "Training", "validation": "Validation"}[side], names_list(summary["split"][side]))


def _said(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(number(one) for one in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_said(one)}" for key, one in value.items())
    return "not set" if value is None else number(value)


def _looks(rows: Sequence[Mapping]) -> Iterator[Html]:
    if rows:
        shown = series("mean AUROC", rows, lambda row: row["validation"].get("macro_auroc"))
        yield line_chart([shown], "Mean AUROC of the validation studies while training (it chooses nothing)")


def between(ends: Sequence[float | None], name: str = "95 % interval ") -> str:
    """An interval as text."""
    if any(end is None or math.isnan(end) for end in ends):
        return "no interval" if name else "–"
    return f"{name}{number(ends[0], 3)}\u00a0to\u00a0{number(ends[1], 3)}"
