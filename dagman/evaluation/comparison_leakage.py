"""What a comparison says of leakage: which judges the encoder of a side had seen, and of which side nobody knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SEEN = "judges that were seen in pretraining"
MOST = 6  # subjects that are named

Leakage = Mapping[str, Mapping[str, Any]]  # side -> what its runs say together


def leakage_of(sides: Mapping[str, Iterable[Mapping]]) -> dict[str, dict[str, Any]]:
    """Of each side, from the summaries of its runs: `pretraining` (what its runs say: "none", "checked", "unknown"),
    and the subjects among its judges that are `seen` there, `suspected` there, or `in_training`, which is the split's
    own fault."""
    found = {}
    for side, summaries in sides.items():
        summaries = list(summaries)
        told = [summary["leakage"] for summary in summaries]
        both = {who for one in summaries for who in {*one["split"]["train"]} & {*one["split"]["validation"]}}
        found[side] = {
            "pretraining": sorted({one["pretraining"] for one in told}),
            "seen": _subjects(told, "validation_in_pretraining"),
            "suspected": _subjects(told, "suspected_in_pretraining"),
            "in_training": sorted(both | {*_subjects(told, "validation_in_training")}),
        }
    return found


def judges_seen(leakage: Leakage) -> str:
    """All of that in a line; "none" only where every encoder says what it learned from, or is from scratch."""
    said = []
    for side, of in leakage.items():
        told = [_counted(of["seen"])] if of["seen"] else []
        told += [f"perhaps {_counted(of['suspected'])}"] if of["suspected"] else []
        told += (
            ["unknown, its encoder does not say what it was pretrained on"] if "unknown" in of["pretraining"] else []
        )
        told += [f"{_counted(of['in_training'])} even taught it"] if of["in_training"] else []
        said += [f"{side}: {', '.join(told)}"] if told else []
    return "; ".join(said) or "none"


def leaks(leakage: Leakage) -> bool:
    """Whether there is anything to warn of."""
    return judges_seen(leakage) != "none"


def _subjects(told: Iterable[Mapping], key: str) -> list[str]:
    return sorted({who for one in told for who in one.get(key, ())})  # older runs suspect nobody


def _counted(subjects: list[str]) -> str:
    more = f" and {len(subjects) - MOST} more" if len(subjects) > MOST else ""
    return f"{len(subjects)} ({', '.join(subjects[:MOST])}{more})"
