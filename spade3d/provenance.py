"""Where a run comes from: versions, scans and subjects. It travels with the encoder, so that leakage can be found."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spade3d.volumes.split import Split
from spade3d.volumes.store import VolumeStore
from spade3d.whole_file import whole_file

PROVENANCE = "provenance.json"  # in the folder of a run
PACKAGES = ("spade3d", "torch", "monai", "numpy", "numba", "nibabel", "SimpleITK", "blosc2")


def describe(
    store: VolumeStore, learned_from: Sequence[int], split: Split, saliency: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """What a run learned from and what it left alone, by name, subject, source and voxels: their exact fingerprint, and
    their likeness, which copies on another grid share. `saliency`: case -> source of the saliency that was learned from
    or looked at, or how its labels steered the run; of the whole, how many scans had it from where."""
    looked = saliency or {}
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "dataset": {"name": store.dataset, "layout": store.layout, "notes": list(store.notes)},
        "split": split.rule,
        "saliency": dict(sorted(Counter(looked[i] for i in learned_from if i in looked).items())),
        "cases": [_case(store, i) | ({"saliency": looked[i]} if i in looked else {}) for i in learned_from],
        "held_out": [_case(store, i) for i in split.validation],
        "rejected": [dict(rejected) for rejected in store.rejected],
    }


def _case(store: VolumeStore, i: int) -> dict[str, str]:
    case = store.cases[i]
    return {
        "name": case.name,
        "subject": case.subject,
        "modality": case.modality,
        "source": case.source,
        "fingerprint": case.fingerprint,
        "likeness": case.likeness,
    }


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all: a temporary file, synced, takes the name. ValueError for NaN, which JSON has not."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """The same with None for each NaN, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())
