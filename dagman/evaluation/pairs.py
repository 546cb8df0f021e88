"""Rows of two runs set against each other, by pair of runs, case and class: what both say of one structure.

A run that says nothing of a structure, because it is absent and was not predicted, has no value (NaN: see metrics.py).
Where the other run invented the structure, that silence was the right answer, and counts as such: the pair gets the
perfect value against what an invented structure has (Dice and NSD 0, HD95 and ASD the diagonal of the image, all of its
volume). Else a run that invents structures would pay nothing for it. Only where both are silent is there no pair.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from spade3d.faults import DataFault

Row = Mapping[str, str | int | float]
Key = tuple[str | None, str, int]  # pair of runs, case, class

PERFECT = {"dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0, "asd_mm": 0.0, "volume_error_ml": 0.0}
OF = {"volume_error_ml": "volume_difference_ml"}  # of a metric that no table has: what it is the size of


def value_of(row: Row, metric: str) -> float:
    """A metric of a row, NaN where it is undefined."""
    return abs(float(row[OF[metric]])) if metric in OF else float(row[metric])


def has(row: Row, metric: str) -> bool:
    """Whether the row's table has the metric."""
    return OF.get(metric, metric) in row


def pair_of_row(row: Row) -> str | None:
    """Which runs belong together: what the run says (seed, draw and fold), else its seed; None for a run by itself."""
    seed = row.get("seed")
    return row.get("pair", None if seed is None else f"seed {seed}")


def matched(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[tuple[Key, Row, Row]]:
    """The rows of two runs that are about the same structure, in order of their keys.

    DataFault, naming what differs, where the runs were not judged on the same cases and classes.
    """
    a, b = _keyed("the first run", rows_a), _keyed("the second run", rows_b)
    _check_same(a, b)
    return [(key, a[key], b[key]) for key in sorted(a, key=str)]


def values_of_both(a: Row, b: Row, metric: str) -> tuple[float, float]:
    """A metric of both; where one alone is silent its value is the perfect one, and NaN is only where both are."""
    value_a, value_b = value_of(a, metric), value_of(b, metric)
    if math.isnan(value_a) and math.isnan(value_b):
        return value_a, value_b
    return tuple(PERFECT[metric] if math.isnan(value) else value for value in (value_a, value_b))


def case_means_of_both(pairs: Sequence[tuple[Key, Row, Row]], metric: str) -> Iterator[tuple[str, float, float]]:
    """(subject, mean of a, mean of b) of every case of every pair of runs, over the structures that have a value: the
    same ones for both. NaN where none has."""
    of: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for (pair, case, _), a, b in pairs:
        values = values_of_both(a, b, metric)
        of[a["subject"], case, pair] += [] if math.isnan(sum(values)) else [values]
    for (subject, _, _), values in of.items():
        yield subject, mean_of([one for one, _ in values]), mean_of([other for _, other in values])


def mean_gain(rows_a: Sequence[Row], rows_b: Sequence[Row], metric: str) -> float:
    """What run b gained over run a (b - a): the mean over cases, of each over the structures that have a value."""
    return mean_of([after - before for _, before, after in case_means_of_both(matched(rows_a, rows_b), metric)])


def mean_of(values: Sequence[float]) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def invented_by_one(pairs: Sequence[tuple[Key, Row, Row]], metric: str) -> tuple[int, int]:
    """How many absent structures the first run alone invented, and how many the second alone."""
    silent = [tuple(math.isnan(value_of(row, metric)) for row in (a, b)) for _, a, b in pairs]
    return silent.count((False, True)), silent.count((True, False))


def _keyed(run: str, rows: Sequence[Row]) -> dict[Key, Row]:
    """Rows by (pair, case, class); the same twice is a fault."""
    keyed: dict[Key, Row] = {}
    for row in rows:
        key = (pair_of_row(row), row["case"], row["class"])
        if key in keyed:
            raise DataFault(f"{row['case']}: class {row['class']} comes twice in {run}; one row per case and class")
        keyed[key] = row
    return keyed


def _check_same(a: Mapping[Key, Row], b: Mapping[Key, Row]) -> None:
    """Both runs must have judged the same cases, classes and pairs, and agree on whose scan and what class each is."""
    for run, more, less in (("first", a, b), ("second", b, a)):
        lone = sorted({_said(key) for key in more.keys() - less.keys()})
        if lone:
            shown = ", ".join(lone[:8]) + (f" and {len(lone) - 8} more" if len(lone) > 8 else "")
            raise DataFault(f"only the {run} run has {shown}; compare runs that share split, classes and seeds")
    moved = sorted({key[1] for key in a if a[key]["subject"] != b[key]["subject"]})
    if moved:
        raise DataFault(f"the runs give other subjects to {', '.join(moved[:8])}; use one subjects.csv for both")
    renamed = {key[2]: f"{a[key]['name']} and {b[key]['name']}" for key in a if a[key]["name"] != b[key]["name"]}
    if renamed:
        said = ", ".join(f"class {value} is {names}" for value, names in sorted(renamed.items())[:8])
        raise DataFault(f"the runs call structures by other names ({said}); compare runs of one dataset")


def _said(key: Key) -> str:
    pair, case, value = key
    return f"{case} (class {value})" if pair is None else f"{case} (class {value}, {pair})"
