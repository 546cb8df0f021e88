"""Folds of one split: which of them a run judged, what rule all of them share, and which were not run.

The runs of all folds together judge each case once: that is the number of a protocol with folds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from spade3d.faults import DataFault

_FOLD = re.compile(r"\bfold (\d+) of (\d+)")  # as the rules of spade3d/volumes/split.py and named_splits.py say it


def fold_of(summary: Mapping) -> int | None:
    """The fold that a run judged; None where its split has no folds, whatever --fold was."""
    said = _FOLD.search(summary["protocol"].get("split", ""))
    return int(said[1]) if said else None


def split_rule(rule: str) -> str:
    """A split's rule without what is another in each fold: its number, who judges and how many.

    >>> split_rule("fold 1 of 4 by subject: 2 of 8 labelled subjects judge")
    'one of 4 folds by subject: 8 labelled subjects'
    """
    if not _FOLD.search(rule):
        return rule
    rule = _FOLD.sub(r"one of \2 folds", rule)
    rule = re.sub(r"\d+ of (\d+) labelled subjects judge", r"\1 labelled subjects", rule)
    return re.sub(r": [^:]* judge, the other \d+ teach$", "", rule)


def check_subjects(summaries: Mapping[Path, Mapping], pairs: Mapping[Path, str]) -> None:
    """DataFault where runs of one pair learned from other subjects, runs of one fold judged others, or a subject is
    judged in two folds. `pairs`: of each run."""
    judged: dict[int | None, tuple[Path, list]] = {}
    taught: dict[str, tuple[Path, list]] = {}
    for run, summary in summaries.items():
        train, judges = summary["split"]["train"], summary["split"]["validation"]
        first, theirs = judged.setdefault(fold_of(summary), (run, judges))
        if judges != theirs:
            raise DataFault(
                f"{run}: judged on other subjects than {first}; compare runs of one --folds and one dataset"
            )
        twin, subjects = taught.setdefault(pairs[run], (run, train))
        if train != subjects:
            raise DataFault(f"{run}: learned from other subjects than {twin}, with the same seed; run both anew")
    seen: dict[str, Path] = {}
    for run, judges in judged.values():
        if twice := sorted(seen.keys() & set(judges)):
            raise DataFault(
                f"{run}: judged {', '.join(twice[:6])}, as did {seen[twice[0]]} in another fold; pool folds of one "
                "split of one dataset"
            )
        seen |= dict.fromkeys(judges, run)


def missing_folds(summaries: Mapping[Path, Mapping]) -> str:
    """Which folds were not run, in a sentence; nothing where all were, or one alone is looked at."""
    folds = {fold for summary in summaries.values() if (fold := fold_of(summary)) is not None}
    if len(folds) < 2:
        return ""
    count = max(int(_FOLD.search(summary["protocol"]["split"])[2]) for summary in summaries.values())
    missing = [str(fold) for fold in range(count) if fold not in folds]
    if not missing:
        return ""
    return f"fold {', '.join(missing)} of {count} was not run: this is not yet the number of all cases"
