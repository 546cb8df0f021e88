"""Means with intervals over subjects, and paired comparisons of two runs.

The subject is the unit: two scans of one head, or ten structures of one patient, are not independent, so the
bootstrap draws whole subjects and the test sees one number per subject. NaN (a structure that neither truth nor
prediction holds: see metrics.py) enters no mean; of a pair in which one run alone has a value see pairs.py.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from dagman.evaluation.pairs import (
    PERFECT,
    Row,
    case_means_of_both,
    has,
    invented_by_one,
    matched,
    mean_of,
    pair_of_row,
    value_of,
    values_of_both,
)
from spade3d.faults import DataFault

COMPARABLE = tuple(PERFECT)  # with a better and a worse
_OF_MAPS = ("error_x_mm", "error_y_mm", "error_z_mm", "peak_mm")
SMALLER_IS_BETTER = frozenset({"hd95_mm", "asd_mm", "volume_error_ml", *_OF_MAPS})
OF_ALL_SUBJECTS = frozenset({"auroc", "ap"})  # no subject has one alone: none wins, and p is of the bootstrap
FEW_SUBJECTS = 6  # below this no two-sided signed-rank test can reach 0.05: 2 / 2^5 = 0.0625
RESAMPLES = 9999
MOST_P = 0.05  # of a difference that is called shown


class MeanInterval(NamedTuple):
    """A mean over all values, its 95 % interval over subjects, how many subjects it rests on, and a warning."""

    mean: float
    low: float
    high: float
    subjects: int
    note: str = ""


def mean_with_interval(
    values: Mapping[str, Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> MeanInterval:
    """The mean of all values and its 95 % percentile-bootstrap interval, drawing subjects with all their values.

    values: subject -> its values (cases, seeds); NaN is left out, and so is a subject that has nothing else. With
    one subject the interval is NaN, not a point: one subject says nothing about the next.
    """
    kept = [[value for value in values[subject] if not math.isnan(value)] for subject in sorted(values)]
    sums = np.array([math.fsum(one) for one in kept if one])
    counts = np.array([len(one) for one in kept if one])
    subjects = len(sums)
    if not subjects:
        return MeanInterval(math.nan, math.nan, math.nan, 0, "no subject has a value")
    mean = float(sums.sum() / counts.sum())
    if subjects == 1:
        return MeanInterval(mean, math.nan, math.nan, 1, "1 subject: no interval")
    rng = np.random.default_rng(seed)
    low, high = np.percentile(
        np.concatenate([_resampled(rng, sums, counts, part) for part in _parts(resamples, subjects)]), (2.5, 97.5)
    )
    few = f"only {subjects} subjects: the interval is too narrow to trust" if subjects < FEW_SUBJECTS else ""
    return MeanInterval(mean, float(low), float(high), subjects, few)


def values_by_subject(rows: Iterable[Row], metric: str = "dice", of_class: int | None = None) -> dict[str, list[float]]:
    """One value per case, grouped by subject: of one class, or the case's mean over the classes that have a value."""
    cases: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        if of_class is None or row["class"] == of_class:
            cases[row["subject"], row["case"], pair_of_row(row)].append(value_of(row, metric))
    subjects: dict[str, list[float]] = defaultdict(list)
    for (subject, _, _), values in cases.items():
        subjects[subject].append(mean_of(values))
    return dict(subjects)


@dataclass(frozen=True)
class Comparison:
    """Run b against run a on the same cases: for one class, or for the mean over classes (`class_` is None).

    Of studies classes are findings, and p is as `classification.py` and `finding_means.py` have it.
    """

    name: str
    class_: int | None
    metric: str
    mean_a: float
    mean_b: float
    difference: float  # mean of b - a over the pairs in which both have a value
    low: float  # 95 % interval of the difference, over subjects
    high: float
    p: float  # Wilcoxon signed-rank, two-sided, exact, on the subjects' mean differences; of studies see above
    p_holm: float  # adjusted over the classes; of the mean, which is one question, p itself (see `adjusted_over_sides`)
    smallest_p: float  # what p would be if every subject had changed the same way
    wins: int | None  # subjects for which b is better (for distances: smaller); None of OF_ALL_SUBJECTS
    ties: int | None
    losses: int | None
    subjects: int
    pairs: int
    left_out: int  # pairs in which neither run has a value
    note: str = ""


def paired_comparison(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, metric: str = "dice", seed: int = 0
) -> list[Comparison]:
    """What b gained over a (b - a), paired by case, class and, where rows have one, `pair` (a string) or else `seed`:
    the mean, then each class. `metric` is one of COMPARABLE.

    A structure that one run alone invented counts against that run: the other is given the perfect value (pairs.py),
    and the note says how many there are. Raises DataFault, naming the differing cases, if the runs were not evaluated
    on the same cases and classes, and for a metric that a table does not have.
    """
    if metric not in COMPARABLE:
        raise ValueError(f"metric {metric}; one of {', '.join(COMPARABLE)} has a better and a worse")
    if lacking := [
        run for run, of in (("first", rows_a), ("second", rows_b)) if any(not has(row, metric) for row in of)
    ]:
        raise DataFault(f"the {lacking[0]} run was judged before there was {metric}; judge it anew, or compare another")
    pairs = matched(rows_a, rows_b)
    of_class: dict[int, list[tuple]] = defaultdict(list)
    for pair in pairs:
        of_class[pair[0][2]].append(pair)
    truths = sum(a.get("voxels_true") != b.get("voxels_true") for _, a, b in pairs)
    grids = f"the truth of {truths} pairs has another number of voxels: the runs saw other grids" if truths else ""
    remarks = (_said_of_invented(pairs, metric), grids)
    overall = _compare("mean", None, metric, list(case_means_of_both(pairs, metric)), seed, remarks)
    classes = [
        _compare(
            of[0][1]["name"],
            value,
            metric,
            [(a["subject"], *values_of_both(a, b, metric)) for _, a, b in of],
            seed,
            (_said_of_invented(of, metric),),
        )
        for value, of in sorted(of_class.items())
    ]
    adjusted = holm([one.p for one in classes])
    return [overall, *(replace(one, p_holm=p) for one, p in zip(classes, adjusted))]


def _said_of_invented(pairs: Sequence[tuple], metric: str) -> str:
    by_a, by_b = invented_by_one(pairs, metric)
    if not by_a + by_b:
        return ""
    return (
        f"absent structures that one run alone invented: {by_a} by the reference, {by_b} by the other; "
        "the run that rightly said nothing counts as perfect there"
    )


def adjusted_over_sides(
    found: Mapping[str, Sequence[Comparison]], parts: str = "structures"
) -> dict[str, list[Comparison]]:
    """Several sides against one reference: `p_holm` anew, over all that a reader of the table looks at.

    Whoever compares five pretrainings picks the best: so the means of all sides are one family, and the structures of
    all sides another. With one side nothing changes. Where a family is so large that no p of so few subjects survives
    it, the note says so. `parts`: what structures are called there.
    """
    means = holm([whole.p for whole, *_ in found.values()])
    structures = holm([one.p for _, *classes in found.values() for one in classes])
    left = iter(structures)
    families = [sum(not math.isnan(p) for p in tested) for tested in (means, structures)]
    return {
        side: [
            _with_holm(whole, p, families[0], "sides"),
            *(_with_holm(one, next(left), families[1], f"{parts} and sides") for one in classes),
        ]
        for (side, (whole, *classes)), p in zip(found.items(), means)
    }


def _with_holm(one: Comparison, p_holm: float, family: int, of: str) -> Comparison:
    out_of_reach = one.smallest_p <= MOST_P < one.smallest_p * family
    said = f"over {family} {of} the smallest possible p of {one.subjects} subjects is {one.smallest_p * family:.3g}"
    note = "; ".join(remark for remark in (one.note, said if out_of_reach else "") if remark)
    return replace(one, p_holm=p_holm, note=note)


def signed_rank_p(differences: Iterable[float | int]) -> float:
    """Two-sided Wilcoxon signed-rank p, exact for every n, with ties too; differences of zero are left out,
    and so is NaN.

    Under the null each rank is positive or negative with probability 1/2; the distribution of the sum of positive
    ranks is built rank by rank. Tied ranks are halves, so twice the rank counts. p is 1 if nothing differs.
    """
    moved = np.array([difference for difference in differences if difference and not math.isnan(difference)])
    if not len(moved):
        return 1.0
    ranks = np.rint(2 * rankdata(np.abs(moved))).astype(int)
    chance = np.zeros(ranks.sum() + 1)
    chance[0] = 1.0
    for rank in ranks:
        shifted = np.zeros_like(chance)
        shifted[rank:] = chance[:-rank]
        chance = (chance + shifted) / 2
    positive = ranks[moved > 0].sum()
    return float(min(1.0, 2 * min(chance[: positive + 1].sum(), chance[positive:].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the i-th smallest of m times m - i + 1, never below the one before, at most 1.

    NaN (nothing was tested) stays NaN and is not counted in m.
    """
    adjusted = [math.nan] * len(p_values)
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    running = 0.0
    for done, (p, index) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - done)))
        adjusted[index] = running
    return adjusted


def _compare(
    name: str,
    class_: int | None,
    metric: str,
    pairs: Sequence[tuple[str, float, float]],
    seed: int,
    remarks: Iterable[str] = (),
) -> Comparison:
    """One row of the comparison from (subject, value of a, value of b)."""
    usable = [pair for pair in pairs if not math.isnan(pair[1] + pair[2])]
    changes: dict[str, list[float]] = defaultdict(list)
    for subject, value_a, value_b in usable:
        changes[subject].append(value_b - value_a)
    interval = mean_with_interval(changes, seed=seed)
    by_subject = [round(mean_of(values), 9) for values in changes.values()]  # or ties are broken by the last bit
    better = [-change if metric in SMALLER_IS_BETTER else change for change in by_subject]
    p = signed_rank_p(by_subject) if by_subject else math.nan
    smallest = min(1.0, 2.0 ** (1 - len(by_subject))) if by_subject else math.nan
    reach = f"with {len(by_subject)} subjects the smallest possible p is {smallest:.3g}" if smallest > MOST_P else ""
    return Comparison(
        name=name,
        class_=class_,
        metric=metric,
        mean_a=mean_of([value for _, value, _ in usable]),
        mean_b=mean_of([value for _, _, value in usable]),
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        p=p,
        p_holm=p,
        smallest_p=smallest,
        wins=sum(change > 0 for change in better),
        ties=sum(change == 0 for change in better),
        losses=sum(change < 0 for change in better),
        subjects=interval.subjects,
        pairs=len(usable),
        left_out=len(pairs) - len(usable),
        note="; ".join(remark for remark in (interval.note, reach, *remarks) if remark),
    )


def _resampled(rng: np.random.Generator, sums: np.ndarray, counts: np.ndarray, times: int) -> np.ndarray:
    drawn = rng.integers(len(sums), size=(times, len(sums)))
    return sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)


def _parts(resamples: int, subjects: int, cells: int = 1 << 22) -> list[int]:
    """`resamples` in parts of bounded memory: a thousand subjects would otherwise draw 10 million numbers at once."""
    part = max(1, cells // subjects)
    return [min(part, resamples - start) for start in range(0, resamples, part)]
