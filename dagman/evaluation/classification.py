"""How well findings of studies are told: AUROC and average precision, each finding and their mean, over subjects.

    auroc  the chance that a study with the finding scores higher than one without it; ties count half
    ap     average precision: sum over score thresholds of (recall gained) * precision; chance is the prevalence

A finding that all judged studies have, or none, has neither: it is undefined (NaN), counted, and left out of the mean
over findings ("macro"). Labels that are not said are left out. Intervals draw whole subjects, as everywhere.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from dagman.evaluation.statistics import FEW_SUBJECTS
from spade3d.faults import DataFault
from spade3d.whole_file import whole_file

COLUMNS = ("case", "subject", "finding", "label", "probability")
METRICS = ("auroc", "ap")
RESAMPLES = 2000

Row = Mapping[str, str | float]


@dataclass(frozen=True)
class Score:
    """A metric of one finding, or of their mean (`finding` None): its value and 95 % interval over subjects.

    NaN where it is undefined; the interval rests on the resamples in which both kinds of study were drawn.
    """

    finding: str | None
    metric: str
    value: float
    low: float
    high: float
    present: int  # studies with the finding; of the mean: findings that are defined
    absent: int  # studies without it; of the mean: findings that are not
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """Run b less run a on the same studies, drawn together: for one finding, or the mean over findings (None).

    `p` is two-sided, from the same resamples: twice the share on the side of zero where the difference is not, at least
    2 / (resamples + 1).
    """

    finding: str | None
    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


def auroc(labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """Area under the ROC curve over the labels that are said; NaN where only one kind is."""
    return _by_sklearn("roc_auc_score", labels, scores)


def average_precision(labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """Average precision over the labels that are said; NaN where only one kind is."""
    return _by_sklearn("average_precision_score", labels, scores)


def score_findings(rows: Sequence[Row], *, seed: int = 0, resamples: int = RESAMPLES) -> list[Score]:
    """Both metrics of the mean over findings, then of each finding, from the rows of predictions.csv."""
    table = _Table.of(rows)
    drawn = table.drawn(seed, resamples)
    found = []
    for metric in METRICS:
        values = table.values(metric)
        resampled = table.resampled(metric, drawn)
        defined = [n for n, value in enumerate(values) if not math.isnan(value)]
        macro, of_macro = _macro(values, resampled, defined)
        note = table.note(len(defined))
        found.append(Score(None, metric, macro, *_interval(of_macro), len(defined), len(values) - len(defined), note))
        for n, name in enumerate(table.findings):
            present, absent = int((table.labels[:, n] == 1).sum()), int((table.labels[:, n] == 0).sum())
            kind = "" if n in defined else "undefined: " + _one_sided(present, absent)
            found.append(Score(name, metric, values[n], *_interval(resampled[:, n]), present, absent, kind))
    return found


def compare_findings(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, metric: str = "auroc", seed: int = 0, resamples: int = RESAMPLES
) -> list[Difference]:
    """What b gained over a on the same studies: the mean over findings, then each.

    Where rows have a `pair` (a string: of which run of that side they are), it is the mean over the pairs, each asked
    by itself and all with the same drawn subjects. DataFault where the pairs, the studies, the findings or the labels
    are not the same.
    """
    sides = [_tables(rows) for rows in (rows_a, rows_b)]
    if sides[0].keys() != sides[1].keys():
        lone = sorted(map(str, sides[0].keys() ^ sides[1].keys()))
        raise DataFault(f"only one side has {', '.join(lone)}; compare runs with the same seeds")
    a = next(iter(sides[0].values()))
    for b in (table for side in sides for table in side.values()):
        same = a.studies == b.studies and a.findings == b.findings
        if not same or not np.array_equal(a.labels, b.labels, equal_nan=True):
            raise DataFault(
                f"the runs judged {len(a.studies)} and {len(b.studies)} studies for {', '.join(a.findings)} and "
                f"{', '.join(b.findings)}, or with other labels; compare runs of one split and one CSV of findings"
            )
    drawn = a.drawn(seed, resamples)
    values = [np.mean([table.values(metric) for table in side.values()], axis=0).tolist() for side in sides]
    resampled = [np.mean([table.resampled(metric, drawn) for table in side.values()], axis=0) for side in sides]
    defined = [n for n, value in enumerate(values[0]) if not math.isnan(value)]
    macros = [_macro(*one, defined) for one in zip(values, resampled, strict=True)]
    found = [_difference(None, metric, macros[0][0], macros[1][0], macros[1][1] - macros[0][1])]
    for n, name in enumerate(a.findings):
        found.append(_difference(name, metric, values[0][n], values[1][n], resampled[1][:, n] - resampled[0][:, n]))
    return found


def write_predictions(path: Path, rows: Iterable[Row]) -> None:
    """Write predictions.csv: COLUMNS, an empty label where it is not said; whole or not at all."""
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            label = "" if math.isnan(row["label"]) else int(row["label"])
            writer.writerow((row["case"], row["subject"], row["finding"], label, row["probability"]))
        text.detach()


def read_predictions(path: Path) -> list[dict[str, str | float]]:
    """The rows of predictions.csv; DataFault for what cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFault(f"{path}: not a readable predictions.csv ({error}); run dagman-finetune to make it") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        raise DataFault(f"{path}: the columns are {','.join(lines[0]) if lines else 'nothing'}; {','.join(COLUMNS)}")
    try:
        return [
            {"case": case, "subject": who, "finding": what, "label": float(label or "nan"), "probability": float(p)}
            for case, who, what, label, p in lines[1:]
        ]
    except ValueError as error:
        raise DataFault(f"{path}: {error}; run dagman-finetune to make it again") from error


def _tables(rows: Sequence[Row]) -> dict[str | None, _Table]:
    """The table of each run of a side."""
    _check_rows(rows)
    of: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        of[row.get("pair")].append(row)
    return {pair: _Table.of(some) for pair, some in of.items()}


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise DataFault("0 predictions of studies; one row for each study and finding is needed: let a study judge")


@dataclass(frozen=True, eq=False)
class _Table:
    """Labels and scores (study, finding), in the order of names, and each study's subject as a number."""

    studies: tuple[tuple[str, str], ...]
    findings: tuple[str, ...]
    labels: Float[np.ndarray, "n f"]
    scores: Float[np.ndarray, "n f"]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Table:
        _check_rows(rows)
        studies = tuple(sorted({(row["subject"], row["case"]) for row in rows}))
        findings = tuple(dict.fromkeys(row["finding"] for row in rows))
        labels, scores = (np.full((len(studies), len(findings)), np.nan) for _ in range(2))
        place = {study: n for n, study in enumerate(studies)}, {name: n for n, name in enumerate(findings)}
        for row in rows:
            at = place[0][row["subject"], row["case"]], place[1][row["finding"]]
            labels[at], scores[at] = row["label"], row["probability"]
        if np.isnan(scores).any():
            raise DataFault("predictions of some studies lack a finding; one row for each study and finding is needed")
        return cls(studies, findings, labels, scores)

    @property
    def subjects(self) -> list[int]:
        number = {subject: n for n, subject in enumerate(dict.fromkeys(subject for subject, _ in self.studies))}
        return [number[subject] for subject, _ in self.studies]

    def drawn(self, seed: int, resamples: int) -> Float[np.ndarray, "t n"]:
        """How often each study counts in each resample: as often as its subject was drawn."""
        of_study = np.array(self.subjects)
        count = int(of_study.max()) + 1
        times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
        return times[:, of_study].astype(np.float64)

    def values(self, metric: str) -> list[float]:
        ask = {"auroc": auroc, "ap": average_precision}[metric]
        return [ask(self.labels[:, n], self.scores[:, n]) for n in range(len(self.findings))]

    def resampled(self, metric: str, drawn: Float[np.ndarray, "t n"]) -> Float[np.ndarray, "t f"]:
        ask = {"auroc": weighted_auroc, "ap": weighted_ap}[metric]
        columns = []
        for labels, scores in zip(self.labels.T, self.scores.T, strict=True):
            said = ~np.isnan(labels)
            columns.append(ask(labels[said] == 1, scores[said], drawn[:, said]))
        return np.stack(columns, axis=1)

    def note(self, defined: int) -> str:
        subjects = len(set(self.subjects))
        few = f"only {subjects} subjects: the intervals are too narrow to trust" if subjects < FEW_SUBJECTS else ""
        return few if defined else "no finding is both present and absent among the judged studies"


def weighted_auroc(
    present: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], weights: Float[np.ndarray, "t n"]
) -> Float[np.ndarray, " t"]:
    """AUROC under each row of weights; NaN where one kind has none."""
    of_present, of_absent = _by_score(present, scores, weights)
    below = np.cumsum(of_absent, axis=1) - of_absent / 2
    return _ratio((of_present * below).sum(axis=1), of_present.sum(axis=1) * of_absent.sum(axis=1))


def weighted_ap(
    present: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], weights: Float[np.ndarray, "t n"]
) -> Float[np.ndarray, " t"]:
    """Average precision under each row of weights; NaN where one kind has none."""
    of_present, of_absent = (part[:, ::-1] for part in _by_score(present, scores, weights))
    hits, called = np.cumsum(of_present, axis=1), np.cumsum(of_present + of_absent, axis=1)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    both = (of_present.sum(axis=1) > 0) & (of_absent.sum(axis=1) > 0)
    return _ratio((of_present * precision).sum(axis=1), np.where(both, hits[:, -1] if hits.shape[1] else 0.0, 0.0))


def _by_score(present, scores, weights) -> tuple[np.ndarray, np.ndarray]:
    """Weights of studies with and without the finding (resample, distinct score), lowest score first."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    present, weights = present[order], weights[:, order]
    if not len(first):
        return np.zeros((len(weights), 0)), np.zeros((len(weights), 0))
    return np.add.reduceat(weights * present, first, axis=1), np.add.reduceat(weights * ~present, first, axis=1)


def _by_sklearn(name: str, labels: np.ndarray, scores: np.ndarray) -> float:
    from sklearn import metrics

    said = ~np.isnan(labels)
    if len(np.unique(labels[said])) < 2:
        return math.nan
    return float(getattr(metrics, name)(labels[said] == 1, scores[said]))


def _macro(values: Sequence[float], resampled: np.ndarray, defined: Sequence[int]) -> tuple[float, np.ndarray]:
    """The mean over the findings that are defined; of a resample, over those of them that are defined there, too."""
    if not defined:
        return math.nan, np.full(len(resampled), np.nan)
    of_defined = resampled[:, list(defined)]
    there = ~np.isnan(of_defined)
    means = _ratio(np.where(there, of_defined, 0.0).sum(axis=1), there.sum(axis=1).astype(np.float64))
    return float(np.mean([values[n] for n in defined])), means


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of what is defined."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _difference(finding: str | None, metric: str, a: float, b: float, changes: np.ndarray) -> Difference:
    low, high = _interval(changes)
    changes = changes[~np.isnan(changes)]
    beyond = min((changes <= 0).sum(), (changes >= 0).sum())
    p = math.nan if math.isnan(b - a) else min(1.0, 2 * (beyond + 1) / (len(changes) + 1))
    return Difference(finding, metric, a, b, b - a, low, high, float(p))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _one_sided(present: int, absent: int) -> str:
    if not present + absent:
        return "nothing is said of it"
    return f"all {present} have it" if present else f"none of {absent} has it"
