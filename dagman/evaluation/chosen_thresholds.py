"""Thresholds that are chosen on half of the subjects for the other half, and on these for the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float


def halves(subjects: Iterable[str], seed: int) -> dict[str, int]:
    """Each subject's half, 0 or 1, drawn; the first has one more where they are odd."""
    names = sorted(set(subjects))
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[place]: rank % 2 for rank, place in enumerate(order.tolist())}


def tuned(
    values: Mapping[tuple[str, str], Float[np.ndarray, "threshold box"]], seed: int
) -> dict[tuple[str, str], int | None]:
    """(subject, finding) -> the index of the threshold at which it is judged: that of the highest mean value over the
    boxes of the same finding in the *other* half of the subjects, the lowest of several.

    A finding that the other half does not show takes the threshold that is best for all of its findings; None where
    the other half has no subject.
    """
    half = halves((subject for subject, _ in values), seed)
    chosen: dict[tuple[str, str], int | None] = {}
    for subject, finding in values:
        others = {key: one for key, one in values.items() if half[key[0]] != half[subject]}
        same = [one for (_, name), one in others.items() if name == finding] or list(others.values())
        means = np.concatenate(same, axis=1).mean(axis=1) if same else None
        chosen[subject, finding] = None if means is None else int(np.argmax(means.round(9)))
    return chosen
