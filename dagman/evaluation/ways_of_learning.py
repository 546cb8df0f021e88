"""What runs learned by, where it is not the same in all, in the words of their settings: it names what is compared."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spade3d.configuration import read_yaml

BEGUN = "config.yaml"  # what a run writes first: its settings
# Settings of which no side is made: what they say is compared elsewhere, pairs the runs, or changes no number.
ELSEWHERE = frozenset(
    {"task", "protocol", "findings", "boxes", "init", "labels", "seed", "draw", "fold", "folds", "tokens", "device"}
    | {"compile", "channels_last", "workers", "loaders", "save_every", "skip_bad_batches", "data.path", "data.spacing"}
    | {"draws", "seeds", "from_scratch_twin"}
)
JUDGING = "scoring."  # settings of how runs are judged begin so
HEADS = ("attention", "clarity")  # of runs of studies; they have settings of their own, under their name
LONGEST = 40  # characters of a setting that are said in full


def ways_of_learning(runs: Sequence[Path], folds: Mapping[Path, Hashable]) -> dict[Path, str]:
    """What runs learned by ("optim.lr 0.002, tuning.encoder frozen"), as far as runs of one fold differ in it and have
    the setting: a run says nothing of heads that are not its own.

    What differs from fold to fold alone is no way of learning: crop and steps that were left open follow the scans that
    teach, and those are others in each fold.
    """
    told = {run: _own(_flat(read_yaml(run / BEGUN))) for run in runs}
    values: dict[str, dict[Hashable, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run, of in told.items():
        for key, value in of.items():
            values[key][folds[run]].add(_text(value))
    other = [key for key, of in values.items() if any(len(found) > 1 for found in of.values())]
    return {run: ", ".join(f"{key} {_text(of[key])}" for key in other if key in of) for run, of in told.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted keys; a table of findings is one setting."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and key != "table"
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a side is made of."""
    idle = (JUDGING, *(f"{head}." for head in HEADS if head != settings.get("head")))
    return {key: value for key, value in settings.items() if key not in ELSEWHERE and not key.startswith(idle)}


def _text(value: object) -> str:
    """A setting in words; of a long one eight digits that tell it from others."""
    text = json.dumps(value, sort_keys=True).replace('"', "")
    return text if len(text) <= LONGEST else hashlib.sha256(text.encode()).hexdigest()[:8]
