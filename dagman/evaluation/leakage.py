"""Leakage: validation subjects that the checkpoint had already seen, by subject, by name and by voxels."""

from collections.abc import Mapping
from typing import Any

from spade3d.faults import DataFault
from spade3d.volumes.split import Split
from spade3d.volumes.store import VolumeStore


def find_leakage(store: VolumeStore, split: Split, pretraining: Mapping[str, Any] | None, *, strict: bool) -> dict:
    """What the report says of subjects on both sides: in training (never, by the split) and in the pretraining.

    `pretraining` is the provenance that travels with the encoder: None for a run from scratch, empty where the
    checkpoint does not say. The same scan under another name is found by the fingerprint of its voxels; the same
    subject in another dataset only if it has the same name there. With `strict`, leakage is an error.
    """
    judges = {store.cases[i].subject for i in split.validation}
    trained = {store.cases[i].subject for i in split.train}
    seen: set[str] = set()
    known = "none" if pretraining is None else "checked" if pretraining.get("cases") else "unknown"
    if known == "checked":
        same_data = pretraining["dataset"]["name"] == store.dataset
        subjects = {case["subject"] for case in pretraining["cases"]} if same_data else set()
        voxels = {case["fingerprint"] for case in pretraining["cases"]}
        for i in split.validation:
            case = store.cases[i]
            if case.subject in subjects or case.fingerprint in voxels:
                seen.add(case.subject)
    if seen and strict:
        raise DataFault(
            f"{len(seen)} validation subjects were in the pretraining ({', '.join(sorted(seen)[:6])}); pretrain "
            "without them (the same --fold in both commands), or drop --strict to run with a warning in the report"
        )
    return {
        "pretraining": known,
        "validation_in_training": sorted(judges & trained),
        "validation_in_pretraining": sorted(seen),
    }
