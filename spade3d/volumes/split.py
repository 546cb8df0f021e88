"""Which subjects train and which judge: one rule for pretraining and fine-tuning, so that nobody trains on a judge.

The split is by subject, never by file (two files may be the two sides of one head, or two phases of one heart), and
depends on the subjects' names alone: the same data gives the same split on every machine, in every command.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spade3d.faults import DataFault, UsageFault


@dataclass(frozen=True)
class Split:
    """Indices of a store's cases, and the rule in words."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    rule: str


def split_cases(cases: Sequence, folds: int, fold: int) -> Split:
    """The dataset's own validation part where it names one with labels and leaves somebody to train; else fold `fold`
    of the labelled subjects.

    `cases` have `subject`, `part` and `has_labels`. Train holds every other case, labelled or not, that shares no
    subject with validation; unlabelled cases of a validation subject are in neither. Without labels nobody judges:
    all cases train. UsageFault for a fold that is not there: the dataset's own part is one, and has no others.
    """
    labelled = [i for i, case in enumerate(cases) if case.has_labels]
    if not labelled:
        return Split(tuple(range(len(cases))), (), "no labels: every scan trains, none judges")
    named = [i for i in labelled if cases[i].part in ("validation", "test")]
    subjects = sorted({cases[i].subject for i in labelled}, key=_shuffled)
    judges = {cases[i].subject for i in named}
    if judges and any(case.subject not in judges for case in cases):
        if fold:
            raise UsageFault(
                f"fold {fold} asked for, but the dataset's own validation part judges ({len(judges)} subjects), and "
                "has no folds; leave out --fold"
            )
        rule = f"the dataset's own validation part: {len(judges)} subjects"
    elif len(subjects) < 2:
        return Split(tuple(range(len(cases))), (), f"one labelled subject ({subjects[0]}): it trains, none judges")
    else:
        count = min(folds, len(subjects))
        if fold >= count:
            raise UsageFault(f"fold {fold} of {count} asked for; folds are counted from 0 to {count - 1}: lower --fold")
        judges = set(subjects[fold::count])
        rule = f"fold {fold} of {count} by subject: {len(judges)} of {len(subjects)} labelled subjects judge"
    validation = tuple(i for i in labelled if cases[i].subject in judges)
    train = tuple(i for i, case in enumerate(cases) if case.subject not in judges)
    return Split(train, validation, rule)


def split_named(cases: Sequence, subjects: Sequence[str], source: str) -> Split:
    """Some subjects by name are held out, all others train; DataFault for a name that no scan has, or that leaves
    nobody to train. Empty names are skipped."""
    judges = {name.strip() for name in subjects} - {""}
    if strangers := sorted(judges - {case.subject for case in cases}):
        raise DataFault(f"{source}: no scan is of {', '.join(strangers[:6])}; give subjects as the store names them")
    train = tuple(i for i, case in enumerate(cases) if case.subject not in judges)
    if not train:
        raise DataFault(f"{source}: holds all {len(cases)} scans out, and nobody is left to learn from; name fewer")
    validation = tuple(i for i, case in enumerate(cases) if case.subject in judges)
    return Split(train, validation, f"by name: {len(judges)} subjects of {source} are held out")


def draw_labelled(cases: Sequence, train: Sequence[int], labels: int | float | None, draw: int) -> tuple[int, ...]:
    """The labelled training cases of `labels` subjects: a count, a share below 1, or None for all.

    Drawn by subject and nested: the 4 subjects of a draw are among its 8. `draw` is the seed of this chance alone, so
    that runs which begin otherwise can learn from the same subjects. Draws are independent of each other: of very few
    subjects two may be the same.
    """
    labelled = [i for i in train if cases[i].has_labels]
    subjects = sorted({cases[i].subject for i in labelled})
    if not subjects:
        raise DataFault(f"no labelled scan is left to train on ({len(train)} scans without labels); add labelled scans")
    if labels is None:
        return tuple(labelled)
    wanted = max(1, round(labels * len(subjects))) if 0 < labels < 1 else int(labels)
    if labels <= 0 or (labels >= 1 and labels != wanted):
        raise UsageFault(f"--labels {labels:g}: a whole number of subjects, or a share between 0 and 1, is needed")
    if wanted > len(subjects):
        raise UsageFault(f"--labels {wanted}: only {len(subjects)} labelled subjects may train; ask for fewer")
    order = np.random.default_rng([draw, 0x5EED]).permutation(len(subjects))
    chosen = {subjects[i] for i in order[:wanted]}
    return tuple(i for i in labelled if cases[i].subject in chosen)


def _shuffled(subject: str) -> str:
    return hashlib.sha256(subject.encode("utf-8", "surrogateescape")).hexdigest()
