"""The reports of a fine-tuning run and of a comparison of runs: what was found, and no more than was found."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dagman.evaluation.assurances import assurances, coverage, leakage_between, warnings
from dagman.evaluation.case_pictures import HOW_TO_LOOK, CasePicture, case_pictures
from dagman.evaluation.comparison_leakage import leakage_of
from dagman.evaluation.comparison_tables import METRIC_NAMES, parts_of, tested_by
from dagman.evaluation.paired_chart import paired_chart
from dagman.evaluation.pairs import case_means_of_both, has, matched, value_of, values_of_both
from dagman.evaluation.scores import case_means, mean, read_rows, read_summary
from dagman.evaluation.statistics import (
    FEW_SUBJECTS,
    MOST_P,
    REAL,
    SMALLER_IS_BETTER,
    Comparison,
    Row,
    mean_with_interval,
    values_by_subject,
)
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
    "A structure that is absent from truth and prediction alike is undefined: it is left out of every mean and "
    "counted. One that is missed entirely, or invented, has Dice 0, NSD 0 and the image diagonal as HD95 and as its "
    "average surface distance (ASD)."
)
_READ_IT = (
    "Both sides segmented the same cases; each pale dot is one case of one pair of runs. The interval resamples "
    "subjects, not cases. A difference is called shown when its interval leaves out zero and p is at most 0.05; hollow "
    "and grey is no difference shown."
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
    interval = _interval(summary["mean_dice_interval"])
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
        run / "report.html", page("Fine-tuning report", run.resolve().name, lead, sections, footer=_FOOTER)
    )


def _interval(bounds: Sequence[float | int | None] | None, name: str = "95 % interval ") -> str:
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
        others = [mean([value_of(row, one) for row in of if has(row, one)]) for one in (*REAL[1:], "volume_error_ml")]
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
    shown |= {"Labels used": _said(summary.get("labels")), "Seed": _said(summary.get("seed"))}
    shown |= {key.capitalize(): _said(summary[key]) for key in ("draw", "tuning") if key in summary}
    yield facts(shown | {str(k).replace("_", " ").capitalize(): _said(v) for k, v in summary["protocol"].items()})
    yield from assurances(summary)
    yield folded("Training", names_list([str(n) for n in split["train"]]))
    yield folded("Validation", names_list([str(n) for n in split["validation"]]))


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key.replace('_', ' ')}: {_said(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(number(v) for v in value) or "none"
    return "not set" if value is None else number(value)


def _validation(rows: Sequence[Mapping]) -> Iterator[Html]:
    if rows:
        shown = series("validation Dice", rows, lambda row: row["validation"].get("mean_dice"))
        yield line_chart([shown], "Validation Dice while training")


def comparison_report(
    out: Path, comparisons: Mapping[str, Sequence[Comparison]], arms: Mapping[str, Sequence[Path]]
) -> Path:
    """Write OUT/report.html and return its path.

    `arms` gives each side its name and its run folders, the first being the reference; runs at the same place in two
    arms are a pair (one seed). `comparisons` holds, for every other arm, what `paired_comparison` found against the
    reference: the mean over structures first, then each structure.
    """
    reference, *others = arms
    if set(others) != comparisons.keys() or any(len(arms[arm]) != len(arms[reference]) for arm in others):
        raise ValueError(f"arms {list(arms)} and comparisons {list(comparisons)} do not match run by run")
    rows = {arm: [read_rows(run) for run in runs] for arm, runs in arms.items()}
    leakage = leakage_of({arm: map(read_summary, runs) for arm, runs in arms.items()})
    lead, sections = [], []
    for arm in others:
        found = comparisons[arm]
        lead += verdict_of(found[0], reference, arm)
        observed = _differences(found[0].metric, rows[reference], rows[arm])
        title = f"Mean {METRIC_NAMES[found[0].metric]} of each subject"
        pairs = _by_subject(found[0].metric, rows[reference], rows[arm])
        smaller = found[0].metric in SMALLER_IS_BETTER
        paired = paired_chart(pairs, title, (reference, arm), smaller_is_better=smaller)
        shown = (paired, *compared(found, observed, reference, arm))
        sections.append(Section(f"{arm} against {reference}", shown, _READ_IT))
    sections.append(Section("Runs", (_each_run(arms),), "Each run as it stands by itself."))
    title = f"{', '.join(others)} against {reference}"
    lead.append(leakage_between(leakage))
    return write_page(out / "report.html", page("Comparison", title, lead, sections, footer=_FOOTER))


def verdict_of(whole: Comparison, reference: str, arm: str) -> list[Html]:
    """What a page says first of a side: a sentence, its numbers, and what is to be doubted."""
    said = [tag("p", headline(whole, reference, arm), class_="verdict"), _evidence(whole, reference)]
    return said + ([callout("warning" if whole.subjects < FEW_SUBJECTS else "note", whole.note)] if whole.note else [])


def headline(whole: Comparison, reference: str, arm: str) -> str:
    """What a comparison shows, in one sentence that never says more than its interval and its test do."""
    metric = METRIC_NAMES[whole.metric]
    bounds = _interval((whole.low, whole.high))
    counts = f"{counted(whole.pairs, 'pair')} of {counted(whole.subjects, 'subject')}"
    p = f"p = {number(whole.p, 3)}"
    if whole.p_holm > whole.p:
        p += f", {number(whole.p_holm, 3)} adjusted for the number of sides"
    evidence = f"mean difference {_signed(whole.difference)} ({bounds}, {p}) over {counts}"
    side = _side(whole)
    if side:
        return f"{arm} had a {'better' if side > 0 else 'worse'} mean {metric} than {reference}: {evidence}."
    few = f", and {counted(whole.subjects, 'subject')} could not show one" if whole.subjects < FEW_SUBJECTS else ""
    return f"No difference in {metric} shown between {arm} and {reference}{few}: {evidence}."


def _evidence(whole: Comparison, reference: str) -> Html:
    metric = METRIC_NAMES[whole.metric]
    test = tested_by(whole.metric).removesuffix(" signed-rank")
    judged = f"{whole.wins} better, {whole.ties} equal, {whole.losses} worse"
    if whole.wins is None:
        judged = f"{counted(whole.pairs, 'pair')} of studies"
    return figures(
        (f"Mean {metric}", number(whole.mean_b, 3), f"{reference} {number(whole.mean_a, 3)}"),
        ("Difference", _signed(whole.difference), _interval((whole.low, whole.high))),
        ("Subjects", number(whole.subjects), judged),
        ("p", number(whole.p, 3), f"two-sided {test}; the least possible is {number(whole.smallest_p, 3)}"),
    )


def _side(found: Comparison) -> int:
    """1 for better, -1 for worse, 0 where none is shown: only when the interval lies wholly on one side of zero and the
    test, adjusted for the number of structures, agrees. NaN and few subjects show nothing."""
    if not found.p_holm <= MOST_P or found.subjects < FEW_SUBJECTS:
        return 0
    side = int(found.low > 0) - int(found.high < 0)
    return -side if found.metric in SMALLER_IS_BETTER else side


def compared(
    found: Sequence[Comparison], observed: Mapping[int | None, tuple[float, ...]], reference: str, arm: str
) -> Iterator[Html]:
    """A side's differences as a chart and a table. `observed`: what single cases differ by, of each class."""
    metric, parts = METRIC_NAMES[found[0].metric], parts_of(found[0].metric)
    names = [f"All {parts}" if c.class_ is None else c.name for c in found]
    estimates = [
        Estimate(name, observed.get(c.class_, ()), c.difference, c.low, c.high, _side(c) != 0)
        for name, c in zip(names, found, strict=True)
    ]
    lower, higher = (arm, reference) if found[0].metric in SMALLER_IS_BETTER else (reference, arm)
    sides = (f"{lower} better", f"{higher} better")
    yield interval_chart(estimates, f"{metric} of {arm} minus {metric} of {reference}", sides=sides)
    part = parts.capitalize().removesuffix("s")
    columns = [Column(part), Column(reference, 3), Column(arm, 3), Column("Difference"), Column("95 % interval")]
    columns += [Column("p (Holm)", 3), Column("Win/tie/loss"), Column("Pairs"), Column("Left out"), Column("Reading")]
    lines = [
        (
            name,
            c.mean_a,
            c.mean_b,
            _signed(c.difference),
            _interval((c.low, c.high), ""),
            c.p_holm,
            "\u2013" if c.wins is None else f"{c.wins}/{c.ties}/{c.losses}",
            c.pairs,
            c.left_out,
            ("no difference shown", "better", "worse")[_side(c)],
        )
        for name, c in zip(names, found, strict=True)
    ]
    test = tested_by(found[0].metric)
    yield table(columns, lines, f"p: {test} over subjects, adjusted over all {parts} of all sides (Holm).")
    remarks = [f"{name}: {c.note}" for name, c in zip(names, found, strict=True) if c.note and c.class_ is not None]
    if remarks:
        yield folded(f"Remarks on single {parts}", names_list(remarks))


def _differences(
    metric: str, reference: Sequence[Sequence[Row]], arm: Sequence[Sequence[Row]]
) -> dict[int | None, tuple[float, ...]]:
    """What each pair of runs differs by: for every structure one value a case, and under None the case's mean."""
    of: dict[int | None, list[float]] = {None: []}
    for before, after in zip(reference, arm, strict=True):
        pairs = matched(before, after)
        for (_, _, label), *both in pairs:
            first, second = values_of_both(*both, metric)
            of.setdefault(label, []).append(second - first)
        of[None] += [second - first for _, first, second in case_means_of_both(pairs, metric)]
    return {label: tuple(differences) for label, differences in of.items()}


def _by_subject(
    metric: str, reference: Sequence[Sequence[Row]], arm: Sequence[Sequence[Row]]
) -> list[tuple[str, float, float]]:
    """(subject, mean of the reference, mean of the arm), over what both have a value for: what is tested."""
    of: dict[str, tuple[list[float], list[float]]] = {}
    for before, after in zip(reference, arm, strict=True):
        for subject, *means in case_means_of_both(matched(before, after), metric):
            for side, value in zip(of.setdefault(subject, ([], [])), means, strict=True):
                side.append(value)
    return [(subject, mean(before), mean(after)) for subject, (before, after) in sorted(of.items())]


def _signed(value: float) -> str:
    return ("+" if round(value, 3) > 0 else "") + number(value, 3)


def _each_run(arms: Mapping[str, Sequence[Path]]) -> Html:
    columns = [Column("Side"), Column("Run"), Column("Encoder from"), Column("Labels"), Column("Seed")]
    columns += [
        Column("Fold"),
        Column("Mean Dice", 3, bar=True),
        Column("95 % interval"),
        Column("HD95 (mm)", 1),
        Column("NSD", 3),
    ]
    lines = []
    for arm, run in ((arm, run) for arm, runs in arms.items() for run in runs):
        summary = read_summary(run)
        source = summary["coverage"]["source"] if summary["coverage"] else "scratch"
        chosen = (source, *(_said(summary.get(key)) for key in ("labels", "seed", "fold")))
        dice = (summary["mean_dice"], _interval(summary["mean_dice_interval"], ""))
        lines.append((arm, run.resolve().name, *chosen, *dice, summary["mean_hd95_mm"], summary["mean_nsd"]))
    return table(columns, lines)
