"""Leakage: validation subjects that the checkpoint had already seen, and by what they are known: subject, path, voxels.

`found` is what is sure enough to refuse a run over (--strict), `suspected` what a person should look at:

    subject          the same subject of the same data set                                        found
    subject's name   the same, of two folders of one name, where the voxels are strangers         suspected
    path             the same absolute path, links resolved                                       found
    exact voxels     the same voxels, whatever name, header, order of axes and type               found
    similar voxels   their likeness (spade3d/volumes/likeness.py) differs by at most LIKE         found
                     or by at most ALIKE                                                          suspected
    path ending      the last PARTS of the path are the same, or all of a relative one            suspected

A name alone proves little: where the voxels of the two scans are strangers, an equal path is suspected and an equal
ending is nothing. A subject of the same name in another data set is nobody. Data sets that number their subjects
(NUMBERED) are known by their name; of others the name is that of a folder, and everybody has a folder "scans".
Voxels of checkpoints and stores older than likeness are compared exactly or not at all; `compared_by_voxels` says how
many scans of the pretraining could be.

Views that a pretraining took from label maps (focused ones, of a saliency of labels), and heads that it guided to
priors made of them, have used these labels: `steered` counts the scans of which this is so and whose labels the run
itself does not learn from. A judge whose own labels did this is found like any other. It counts scans, too, whose views
followed the attention of an encoder of which nobody knows whether labels taught it, under the name of that source.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spade3d.faults import DataFault
from spade3d.volumes.channels import OF_LABELS, OF_NETWORKS, OF_UNKNOWN
from spade3d.volumes.likeness import ALIKE, LIKE, unlikenesses
from spade3d.volumes.split import Split
from spade3d.volumes.store import StoredCase, VolumeStore

NUMBERED = frozenset({"MSD", "nnU-Net v2", "BTCV", "AMOS", "MM-WHS"})  # layouts
PARTS = 3  # of a path that must agree at its end: a folder and a file name are the same in many data sets


@dataclass(frozen=True)
class Evidence:
    """One reason to think that a validation scan was in the pretraining."""

    case: str
    seen_as: str  # the name of the scan in the pretraining
    by: str  # "subject", "subject's name", "path", "exact voxels", "similar voxels" or "path ending"
    sure: bool  # found, else suspected
    unlikeness: float | None  # of the two scans; None where one of them has no likeness


def find_leakage(
    store: VolumeStore,
    split: Split,
    pretraining: Mapping[str, Any] | None,
    *,
    strict: bool,
    taught: Sequence[int] | None = None,
) -> dict:
    """What the report says of subjects on both sides: in training (by the split, or by voxels under another name) and
    in the pretraining.

    `pretraining` is the provenance that travels with the encoder: None for a run from scratch, empty where the
    checkpoint does not say. With `strict`, what is found there is a DataFault, and so is an encoder that does not say
    what it has seen; what is suspected never is. `taught`: the cases whose label maps the run learns from; None for a
    run that learns from none.

    Returns, besides the lists of subjects `validation_in_training`, `validation_in_pretraining` (found) and
    `suspected_in_pretraining`: `pretraining` ("none", "checked" or "unknown"), `evidence` by subject, and
    `compared_by_voxels`: how many scans of the pretraining have a likeness, of how many; `steered`: scans of the
    pretraining by how labels which this run does not learn from steered it, or may have; `steered_by_validation`: who
    of those found had labels that did.
    """
    judges = [store.cases[i] for i in split.validation]
    others = [store.cases[i] for i in split.train]
    trained = {case.subject for case in others} | {
        judge.subject for judge in judges if judge.fingerprint in {case.fingerprint for case in others}
    }
    known = "none" if pretraining is None else "checked" if pretraining.get("cases") else "unknown"
    if known == "unknown" and strict and judges:
        raise DataFault(
            "the file of the encoder does not say what it was pretrained on, so nobody can tell whether it has seen "
            f"the {len({judge.subject for judge in judges})} validation subjects; give an encoder of spade-pretrain, "
            "which says so, or drop --strict to run with a warning in the report"
        )
    seen = pretraining["cases"] if known == "checked" else []
    evidence: dict[str, list[Evidence]] = defaultdict(list)
    if seen:
        apart = unlikenesses([judge.likeness for judge in judges], [case.get("likeness", "") for case in seen])
        theirs = pretraining["dataset"]
        same_data = theirs["name"] == store.dataset
        numbered = {store.layout, theirs.get("layout", store.layout)} <= NUMBERED
        for judge, row in zip(judges, apart.tolist(), strict=True):
            evidence[judge.subject] += _evidence(judge, seen, row, same_data=same_data, numbered=numbered)
    found = sorted(who for who, of in evidence.items() if any(one.sure for one in of))
    theirs = {case["name"] for case in seen if case.get("saliency") in OF_LABELS}
    own = sorted(who for who in found if any(one.sure and one.seen_as in theirs for one in evidence[who]))
    if found and strict:
        of_labels = f"; the labels of {', '.join(own[:6])} even steered it" if own else ""
        said = "; ".join(f"{who} by {reasons(map(asdict, evidence[who]))}" for who in found[:3])
        raise DataFault(
            f"{len(found)} validation subjects were in the pretraining ({', '.join(found[:6])}): {said}{of_labels}; "
            "pretrain without them (spade-pretrain with the same --protocol and --fold, or --hold-out FILE), or drop "
            "--strict to run with a warning in the report"
        )
    return {
        "pretraining": known,
        "validation_in_training": sorted({judge.subject for judge in judges} & trained),
        "validation_in_pretraining": found,
        "suspected_in_pretraining": sorted(who for who, of in evidence.items() if of and who not in found),
        "evidence": {who: [asdict(one) for one in of] for who, of in sorted(evidence.items()) if of},
        "compared_by_voxels": [sum(bool(case.get("likeness")) for case in seen), len(seen)],
        "steered": _steered(seen, [store.cases[i] for i in taught or ()]),
        "steered_by_validation": own,
    }


def say_leakage(leakage: Mapping[str, Any]) -> None:
    """A warning on standard error where subjects that judge were in the pretraining, or nobody can tell; the report has
    the evidence."""
    if found := leakage["validation_in_pretraining"]:
        some = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        print(
            f"warning: {len(found)} validation subjects were in the pretraining ({some}), so the result flatters; "
            "pretrain with the same --protocol and --fold, or with --hold-out FILE",
            file=sys.stderr,
        )
    if steered := leakage["steered"]:
        print(f"warning: {steered_said(steered)}", file=sys.stderr)
    if leakage["pretraining"] == "unknown":
        print(
            "note: the file of the encoder does not say what it was pretrained on, so nobody can tell whether it has "
            "seen validation subjects; look at what its authors say",
            file=sys.stderr,
        )


def steered_said(steered: Mapping[str, int]) -> str:
    """What labels that this run does not learn from did in the pretraining, or may have done."""
    told = ", ".join(f"{source}: {count} scans" for source, count in steered.items())
    if set(steered) <= set(OF_UNKNOWN):
        return (
            f"a network of which nobody knows whether labels taught it steered the views of the pretraining ({told}), "
            "so the result may be one of more labels than it says; look at what its authors say, or pretrain with gaze"
        )
    return (
        f"labels that this run does not learn from steered the pretraining, its views or its heads ({told}), so the "
        "result is one of more labels than it says; pretrain with gaze and without a prior made of labels, or let only "
        "labels steer it that this run learns from"
    )


def reasons(evidence: Iterable[Mapping[str, Any]]) -> str:
    """Evidence of one subject in words: for each scan and its double, all that speaks for it."""
    of: dict[str, list[str]] = defaultdict(list)
    for one in evidence:
        close = f", {one['unlikeness']:.0%} of the bits differ" if one["by"] == "similar voxels" else ""
        of[f"{one['case']} was seen as {one['seen_as']}"].append(one["by"] + close)
    told = [f"{', '.join(by)} ({scans})" for scans, by in of.items()]
    return "; ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")


def _evidence(
    judge: StoredCase, seen: Sequence[Mapping[str, Any]], apart: Sequence[float], *, same_data: bool, numbered: bool
) -> list[Evidence]:
    """All that speaks for a scan being among those seen; `apart` is its unlikeness to each. `same_data`: both data sets
    have one name; `numbered`: which tells who their subjects are."""
    found = []
    here = _whole_path(judge.source)
    for case, unlike in zip(seen, apart, strict=True):
        comparable = bool(judge.likeness and case.get("likeness"))
        exact = case["fingerprint"] == judge.fingerprint
        strangers = comparable and not exact and unlike > ALIKE
        reason = {}
        if same_data and case["subject"] == judge.subject:
            sure = numbered or not strangers
            reason["subject" if sure else "subject's name"] = sure
        source = case.get("source", "")
        if here is not None and _whole_path(source) == here:
            reason["path"] = not strangers
        elif _same_ending(judge.source, source) and not strangers:
            reason["path ending"] = False
        if exact:
            reason["exact voxels"] = True
        elif comparable and not strangers:
            reason["similar voxels"] = unlike <= LIKE
        found += [
            Evidence(judge.name, case["name"], by, sure, round(unlike, 4) if comparable else None)
            for by, sure in reason.items()
        ]
    return found


def _steered(seen: Sequence[Mapping[str, Any]], taught: Sequence[StoredCase]) -> dict[str, int]:
    """Scans whose labels steered views or heads, by how, less those whose own label maps did it and teach this run,
    too. Of a network nobody knows whose labels taught it, or even whether some did."""
    known = {case.fingerprint for case in taught}
    steered = [case for case in seen if case.get("saliency") in (*OF_LABELS, *OF_UNKNOWN)]
    by_networks = (*OF_NETWORKS, *OF_UNKNOWN)
    beyond = [c for c in steered if c["saliency"] in by_networks or c["fingerprint"] not in known]
    return dict(sorted(Counter(case["saliency"] for case in beyond).items()))


def _whole_path(source: str) -> Path | None:
    """An absolute path with its links resolved; None for a relative one, which says nothing from another folder."""
    path = Path(source)
    return path.resolve() if source and path.is_absolute() else None


def _same_ending(one: str, other: str) -> bool:
    """Whether two paths end alike: in PARTS parts, or in all (two or more) of the shorter where that is relative."""
    a, b = sorted((Path(one), Path(other)), key=lambda path: len(path.parts))
    needed = PARTS if a.is_absolute() else min(PARTS, len(a.parts))
    return needed >= 2 and a.parts[-needed:] == b.parts[-needed:]
