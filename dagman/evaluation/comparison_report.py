"""The report of a comparison of runs: what a side had more than the reference, and no more than was found.

Of runs of studies `study_comparison_report.py` says the same with the sentences and tables of this one.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dagman.evaluation.assurances import leakage_between
from dagman.evaluation.comparison_leakage import leakage_of
from dagman.evaluation.comparison_tables import METRIC_NAMES, parts_of, tested_by
from dagman.evaluation.paired_chart import paired_chart
from dagman.evaluation.pairs import Row, case_means_of_both, matched, mean_of, values_of_both
from dagman.evaluation.report import FOOTER, interval_said, said
from dagman.evaluation.scores import read_rows, read_summary
from dagman.evaluation.statistics import FEW_SUBJECTS, MOST_P, SMALLER_IS_BETTER, Comparison
from spade3d.training.charts import Estimate, interval_chart
from spade3d.training.page import (
    Column,
    Html,
    Section,
    callout,
    counted,
    figures,
    folded,
    number,
    page,
    table,
    tag,
    write_page,
)
from spade3d.training.report import names_list

_READ_IT = (
    "Both sides segmented the same cases; each pale dot is one case of one pair of runs. The interval resamples "
    "subjects, not cases. A difference is called shown when its interval leaves out zero and p is at most 0.05; hollow "
    "and grey is no difference shown."
)


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
    return write_page(out / "report.html", page("Comparison", title, lead, sections, footer=FOOTER))


def verdict_of(whole: Comparison, reference: str, arm: str) -> list[Html]:
    """What a page says first of a side: a sentence, its numbers, and what is to be doubted."""
    first = [tag("p", headline(whole, reference, arm), class_="verdict"), _evidence(whole, reference)]
    return first + ([callout("warning" if whole.subjects < FEW_SUBJECTS else "note", whole.note)] if whole.note else [])


def headline(whole: Comparison, reference: str, arm: str) -> str:
    """What a comparison shows, in one sentence that never says more than its interval and its test do."""
    metric = METRIC_NAMES[whole.metric]
    bounds = interval_said((whole.low, whole.high))
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
    least = number(float(f"{whole.smallest_p:.2g}"))  # of a bootstrap it has no digit among the first three
    judged = f"{whole.wins} better, {whole.ties} equal, {whole.losses} worse"
    if whole.wins is None:
        judged = f"{counted(whole.pairs, 'pair')} of studies"
    return figures(
        (f"Mean {metric}", number(whole.mean_b, 3), f"{reference} {number(whole.mean_a, 3)}"),
        ("Difference", _signed(whole.difference), interval_said((whole.low, whole.high))),
        ("Subjects", number(whole.subjects), judged),
        ("p", number(whole.p, 3), f"two-sided {test}; the least possible is {least}"),
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
            interval_said((c.low, c.high), ""),
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
    return [(subject, mean_of(before), mean_of(after)) for subject, (before, after) in sorted(of.items())]


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
        chosen = (source, *(said(summary.get(key)) for key in ("labels", "seed", "fold")))
        dice = (summary["mean_dice"], interval_said(summary["mean_dice_interval"], ""))
        lines.append((arm, run.resolve().name, *chosen, *dice, summary["mean_hd95_mm"], summary["mean_nsd"]))
    return table(columns, lines)
