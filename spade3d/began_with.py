"""What a run began with: the scans that teach it and those held out, as the store had them, and the files that it reads
beside them; a run that is continued is held against it.

Without it, a store that is prepared anew between two parts of a run makes another split, and a subject that has taught
becomes a judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spade3d.configuration import Settings, read_beside
from spade3d.faults import DataFault
from spade3d.provenance import PROVENANCE, write_json
from spade3d.volumes.channels import LABELS_AS_PRIOR
from spade3d.volumes.sealed import checksum_of
from spade3d.volumes.split import Split
from spade3d.volumes.store import StoredCase, VolumeStore

BEGAN_WITH = "began_with.json"  # in the folder of a run
TEACHES, HELD_OUT = "training", "held out"
ALWAYS = ("subject", "fingerprint", "prepared")
SHOWN = 6  # scans that a message names, of each kind of difference

Files = dict[str, dict[str, str]]  # option -> name of each file that it stands for -> checksum
Scans = dict[str, dict[str, Any]]  # name of a scan -> "part", one of the two above, and what is known of it


def keep_beginning(
    out: Path, store: VolumeStore, learned_from: Collection[int], split: Split, settings: Settings
) -> None:
    """Write down, once and when a run begins, what it begins with."""
    names = {str(value): name for value, name in store.label_names.items()}
    scans, files = _now(store, learned_from, split), _files(settings, store, learned_from, split)
    write_json(out / BEGAN_WITH, {"label_names": names, "scans": scans, "files": files})


def check_beginning(
    out: Path,
    store: VolumeStore,
    learned_from: Collection[int],
    split: Split,
    settings: Settings,
    *,
    labels: Collection[int] = (),
    saliency: Collection[int] = (),
) -> None:
    """DataFault unless a run that is continued has before it what it began with: the same scans on either side, of the
    same subjects and voxels; of the cases in `labels` and in `saliency`, and of those that provenance.json says were
    steered by theirs, also the same labels or saliency; and the same bytes in the files that its settings name (of a
    folder, those below the names of its scans).

    Where the data lies, and what else the store came to hold, is of no account. A run of before there was
    began_with.json is held against its provenance.json, which knows no prepared arrays, no labels and no files.
    """
    known, provenance = _read(out / BEGAN_WITH), _read(out / PROVENANCE)
    if known is None and provenance is None:
        raise DataFault(
            f"{out}: neither {BEGAN_WITH} nor {PROVENANCE} is there to say what the run began with; put them back, or "
            "begin a new run with another --out"
        )
    then: Scans = _of_provenance(provenance) if known is None else known["scans"]
    now = _now(store, learned_from, split)
    of_labels, of_saliency = ({store.cases[i].name for i in some} for some in (labels, saliency))
    for case in (provenance or {}).get("cases", ()):
        if "saliency" in case:
            (of_labels if case["saliency"] == LABELS_AS_PRIOR else of_saliency).add(case["name"])
    found = _differences(then, now, of_labels, of_saliency)
    names = {str(value): name for value, name in store.label_names.items()}
    if labels and known is not None and known["label_names"] != names:
        found.append("the names of the labels are others")
    if known is not None and "files" in known:  # a run of before has not written them down
        found += _other_files(known["files"], _files(settings, store, learned_from, split))
    if found:
        raise DataFault(
            f"{out}: the run began with other data than {store.path} and the files of its settings give it now "
            f"({'; '.join(found)}), and what it has learned from would not be what its files say; resume it with the "
            "data as they were, or begin a new run with another --out"
        )


def _files(settings: Settings, store: VolumeStore, learned_from: Collection[int], split: Split) -> Files:
    """What there is to read beside the scans; of a folder, what lies below the names of the run's scans."""
    names = sorted(store.cases[i].name for i in {*learned_from, *split.validation})
    found: Files = {}
    for option, path in read_beside(settings).items():
        within = [one for name in names for one in sorted((path / name).rglob("*")) if one.is_file()]
        there = {one.relative_to(path).as_posix(): one for one in within} if path.is_dir() else {path.name: path}
        found[option] = {name: checksum_of(one) for name, one in there.items() if one.exists()}
    return found


def _other_files(then: Files, now: Files) -> list[str]:
    """Which files differ, in words, option by option."""
    found = []
    for option in sorted(then.keys() | now.keys()):
        before, after = then.get(option, {}), now.get(option, {})
        if differ := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
            found.append(f"files of {option} that were changed, added or removed: {_some(differ)}")
    return found


def _now(store: VolumeStore, learned_from: Collection[int], split: Split) -> Scans:
    sides = dict.fromkeys(split.validation, HELD_OUT) | dict.fromkeys(learned_from, TEACHES)
    return {store.cases[i].name: {"part": sides[i], **_known_of(store.cases[i])} for i in sorted(sides)}


def _known_of(case: StoredCase) -> dict[str, Any]:
    """Of a scan: whose, its voxels as they came, all that is read of it as prepared, its labels and its saliency."""
    normalisation, affine = asdict(case.normalisation), np.asarray(case.affine).tolist()
    prepared = [case.image.xxh3, affine, normalisation, case.body_box_mm, case.modality]
    labels = [array.xxh3 for array in (case.labels, case.truth) if array is not None]
    saliency = None if case.saliency is None else case.saliency.xxh3
    return {
        "subject": case.subject,
        "fingerprint": case.fingerprint,
        "prepared": hashlib.sha256(json.dumps(prepared).encode()).hexdigest()[:16],
        "labels": labels,
        "saliency": saliency,
        "saliency_source": case.saliency_source,
    }


def _of_provenance(provenance: Mapping[str, Any]) -> Scans:
    """What provenance.json knows of it; a scan that its labels or nothing steered has no `saliency_source` there."""
    scans: Scans = {}
    for side, part in (("held_out", HELD_OUT), ("cases", TEACHES)):
        for case in provenance.get(side, ()):
            steered = case.get("saliency")
            source = {} if steered in (None, LABELS_AS_PRIOR) else {"saliency_source": steered}
            scans[case["name"]] = {"part": part, **{key: case[key] for key in ALWAYS if key in case}, **source}
    return scans


def _differences(then: Scans, now: Scans, of_labels: set[str], of_saliency: set[str]) -> list[str]:
    """What differs, in words: scans added, removed, on the other side, and changed, by what of them."""
    gone = {"added": [n for n in now if n not in then], "removed": [n for n in then if n not in now]}
    found = [f"{what}: {_some(names)}" for what, names in gone.items() if names]
    both = [name for name in then if name in now]
    moved = [
        f"{name} ({now[name]['part']} now, {then[name]['part']} before)"
        for name in both
        if then[name]["part"] != now[name]["part"]
    ]
    changed = []
    for name in both:
        keys = [*ALWAYS, *(("labels",) if name in of_labels else ())]
        keys += ("saliency_source", "saliency") if name in of_saliency else ()
        differ = [key for key in keys if key in then[name] and then[name][key] != now[name][key]]
        changed += [f"{name} ({', '.join(_in_words(key, then[name], now[name]) for key in differ)})"] if differ else []
    found += [f"on the other side: {_some(moved)}"] if moved else []
    return found + ([f"changed: {_some(changed)}"] if changed else [])


def _in_words(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if key in ("subject", "saliency_source"):
        what = "subject" if key == "subject" else "saliency from"
        return f"{what} {now[key] or 'nothing'}, {then[key] or 'nothing'} before"
    return {"fingerprint": "its voxels", "prepared": "its preparation"}.get(key, f"its {key}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no file; DataFault for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise DataFault(
            f"{path}: cannot be read ({problem}), and says what the run began with; put it back, or begin a new run "
            "with another --out"
        ) from problem
