"""Means over findings with intervals over subjects, and what one method's rows have more than another's.

A row is one annotated box: subject, finding, box (its number), some measures by name and, of several runs, `seed`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from dagman.evaluation.statistics import FEW_SUBJECTS, RESAMPLES, MeanInterval
from spade3d.faults import DataFault

Row = dict[str, Any]


def summary(rows: Sequence[Row], measures: Sequence[str], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """measure -> its mean over boxes, then over findings, with the 95 % interval over subjects."""
    return {
        name: macro({(*_who(row), n): row[name] for n, row in enumerate(rows)}, seed=seed)._asdict()
        for name in measures
    }


@dataclass(frozen=True)
class Difference:
    """What method b has more than a (b - a) in one measure, over the boxes for which both have a value; the means of
    both over these.

    p is two-sided, from the resamples of the interval: twice the share on the side of zero where the difference is not,
    at least 2 / (resamples + 1); NaN of one subject. wins, ties and losses count subjects by the mean over all their
    boxes; b is better where it is larger, of the distances in mm where it is smaller. They say how many changed, not
    what is tested: one subject with a rare finding may weigh more in the mean over findings than many with another.
    """

    measure: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int
    subjects: int
    boxes: int
    note: str = ""


def difference(
    a: Sequence[Row], b: Sequence[Row], measure: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """b against a, paired by subject, finding, box and, where rows have one, `seed`. DataFault where they judged other
    boxes, and where a method judged a box twice."""
    first, second = _keyed("first", a), _keyed("second", b)
    if lone := sorted(first.keys() ^ second.keys(), key=str):
        said = ", ".join(" ".join(map(str, key)) for key in lone[:4])
        raise DataFault(f"{len(lone)} boxes were judged by one method alone ({said}); judge both on the same")
    changes = {key: second[key][measure] - first[key][measure] for key in first}
    changes = {key: change for key, change in changes.items() if not math.isnan(change)}
    means_of = [_mean({key: side[key][measure] for key in changes}) for side in (first, second)]
    of_subject: dict[str, list[float]] = defaultdict(list)
    for (subject, *_), change in changes.items():
        of_subject[subject].append(change)
    means = [round(math.fsum(one) / len(one), 9) for one in of_subject.values()]
    better = [-mean if measure.endswith("_mm") else mean for mean in means]
    found, p = macro(changes, seed=seed, resamples=resamples), _p_of(_resampled(changes, seed, resamples))
    counts = (sum(x > 0 for x in better), sum(x == 0 for x in better), sum(x < 0 for x in better))
    return Difference(
        measure, *means_of, found.mean, found.low, found.high, p, *counts, len(means), len(changes), found.note
    )


def macro(values: Mapping[tuple, float], *, seed: int = 0, resamples: int = RESAMPLES) -> MeanInterval:
    """Of (subject, finding, ...) -> value: the mean over values of each finding, then over findings, and its 95 %
    percentile-bootstrap interval, which draws subjects with all that they have.

    NaN is left out, and so is, of a drawn set of subjects, a finding that none of them has. One subject: no interval.
    """
    kept = {key: value for key, value in values.items() if not math.isnan(value)}
    subjects = len({subject for subject, *_ in kept})
    if not kept:
        return MeanInterval(math.nan, math.nan, math.nan, 0, "no subject has a value")
    if subjects == 1:
        return MeanInterval(_mean(kept), math.nan, math.nan, 1, "1 subject: no interval")
    low, high = np.percentile(_resampled(kept, seed, resamples), (2.5, 97.5))
    note = f"only {subjects} subjects: the interval is too narrow to trust" if subjects < FEW_SUBJECTS else ""
    return MeanInterval(_mean(kept), float(low), float(high), subjects, note)


def _resampled(kept: Mapping[tuple, float], seed: int, resamples: int) -> Float[np.ndarray, " t"]:
    """The mean of each drawn set of subjects; none of fewer than two subjects."""
    subjects, findings = (sorted({key[n] for key in kept}) for n in (0, 1))
    if len(subjects) < 2:
        return np.zeros(0)
    sums, counts = np.zeros((2, len(subjects), len(findings)))
    for (subject, finding, *_), value in kept.items():
        place = subjects.index(subject), findings.index(finding)
        sums[place] += value
        counts[place] += 1
    drawn = _drawn(len(subjects), seed, resamples)
    with np.errstate(invalid="ignore"):
        return np.nanmean((drawn @ sums) / (drawn @ counts), axis=1)


def _p_of(changes: Float[np.ndarray, " t"]) -> float:
    """Two-sided, of resampled differences; NaN of none."""
    if not len(changes):
        return math.nan
    changes = changes.round(9)  # or what does not differ is told from zero by the last bit
    beyond = min((changes <= 0).sum(), (changes >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(changes) + 1)))


def _mean(kept: Mapping[tuple, float]) -> float:
    """Over the values of each finding, then over findings; NaN of none."""
    of: dict[str, list[float]] = defaultdict(list)
    for (_, finding, *_), value in kept.items():
        of[finding].append(value)
    return math.fsum(math.fsum(one) / len(one) for one in of.values()) / len(of) if of else math.nan


@lru_cache(maxsize=2)  # all measures of the same subjects draw the same
def _drawn(subjects: int, seed: int, resamples: int) -> np.ndarray:
    """How often each subject is in each drawn set of as many."""
    counts = np.random.default_rng(seed).multinomial(subjects, np.full(subjects, 1 / subjects), resamples)
    return counts.astype(np.float64)


def _who(row: Row) -> tuple[str, str, int]:
    return row["subject"], row["finding"], row["box"]


def _keyed(method: str, rows: Sequence[Row]) -> dict[tuple, Row]:
    """Rows by (subject, finding, box, seed); the same twice is a fault."""
    keyed: dict[tuple, Row] = {}
    for row in rows:
        key = (*_who(row), row.get("seed"))
        if key in keyed:
            subject, finding, box, seed = key
            said = f"{finding} {box}" + ("" if seed is None else f" ({seed})")
            raise DataFault(f"{subject}: {said} comes twice in the {method} method; one row per box and seed")
        keyed[key] = row
    return keyed
