"""Channels: saliency added to a store that is there already, or replaced, case by case.

It may be killed at any instant. Each new array takes a name of its own (its checksum is part of it), then the cases'
records, then the index are renamed into place, and what nothing names any more is removed last: until the index is
written the store is the one from before, from then on the new one, and in both every array that it names is there.
`prepare.py` keeps the saliency of a case that it skips; one that it prepares anew loses it, and a note says so.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from spade3d.claim import Overruled, claimed
from spade3d.faults import DataFault
from spade3d.volumes.sealed import AGAIN, ArrayFile, read_json, write_array, write_json
from spade3d.volumes.store import CASES, INDEX, RECORD, Contents, StoredCase, VolumeStore, case_key, finished_index

GAZE, LABELS = "gaze", "labels"
PREDICTED, TAUGHT_BY_LABELS = "predicted", "predicted (taught by labels)"
ATTENTION, ATTENTION_OF_LABELS = "attention", "attention (taught by labels)"
PREDICTED_UNKNOWN, ATTENTION_UNKNOWN = "predicted (of unknown teaching)", "attention (of unknown teaching)"
OF_PREDICTORS = (PREDICTED, TAUGHT_BY_LABELS, PREDICTED_UNKNOWN)
OF_UNKNOWN = (PREDICTED_UNKNOWN, ATTENTION_UNKNOWN)  # whoever learns from these may have used labels
SOURCES = (GAZE, LABELS, ATTENTION, ATTENTION_OF_LABELS, ATTENTION_UNKNOWN, *OF_PREDICTORS)
LABELS_AS_PRIOR = "labels, as a prior"  # of regions that heads are guided to
OF_NETWORKS = (TAUGHT_BY_LABELS, ATTENTION_OF_LABELS)  # which do not say whose labels taught them
OF_LABELS = (LABELS, LABELS_AS_PRIOR, *OF_NETWORKS)  # whoever learns from these has used labels
SALIENCY = "saliency-*.b2nd"
TOLERANCE = 1e-4  # beyond [0, 1]: rounding of whoever made the map, not another scale


def write_saliency(
    path: Path,
    maps: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    source: str,
    *,
    note: Callable[[str], None] | None = None,
) -> VolumeStore:
    """Add saliency maps to the store at `path`, or replace those of these cases, and open it.

    maps    case name -> (i, j, k) on the stored grid, 0..1; a stream of pairs is taken one map at a time
    source  one of SOURCES: what the maps are made of
    note    told once of the maps that are empty (they are written as they are: all zeros), and who is waited for where
            another process is writing there

    Steps of 1/255 are kept: far below what any of the sources is good for. Raises DataFault, leaving the store as it
    was, for an unknown case, a map on another grid or with values outside 0..1, and a store that is not finished.
    """
    if source not in SOURCES:
        raise ValueError(f"saliency source {source!r}; one of {', '.join(SOURCES)}")
    finished_index(path)  # refused before anything is written there
    added: dict[str, ArrayFile] = {}
    fresh: list[Path] = []
    empty = []
    with claimed(path, note) as renew_claim:
        # The index alone: a damaged map must not keep a store shut against the one that replaces it.
        contents = finished_index(path)
        cases = {case.name: case for case in contents.cases}
        try:
            for name, saliency in maps.items() if isinstance(maps, Mapping) else maps:
                steps = _steps(path, cases.get(name), name, saliency)
                empty += [] if steps.any() else [name]
                added[name], is_new = _write(path, f"{CASES}/{case_key(name)}", steps)
                fresh += [path / added[name].file] if is_new else []
                renew_claim()
            _commit(path, contents, added, source)
        except Overruled:  # arrays are named by what they hold: whoever took over may be about to name these
            raise
        except BaseException:
            _take_back(path, fresh)
            raise
    if empty and note is not None:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        note(f"{len(empty)} of {len(added)} saliency maps are empty ({shown}): written as zeros")
    return VolumeStore.open(path)


def saliency_lost(name: str) -> str:
    """The note of a case that was prepared anew and had saliency: it described the voxels of before."""
    return f"{name}: prepared anew, and without its saliency; run spade-saliency on the store again"


def remove_unused(folder: Path, used: ArrayFile | None) -> None:
    """Remove the saliency arrays of a case that its record does not name."""
    for file in folder.glob(SALIENCY):
        if used is None or file.name != Path(used.file).name:
            file.unlink(missing_ok=True)


def _steps(path: Path, case: StoredCase | None, name: str, saliency: np.ndarray) -> np.ndarray:
    """A map 0..1 as uint8, checked."""
    if case is None:
        raise DataFault(f"{path}: holds no case {name!r}; give saliency for its own cases")
    if saliency.shape != case.shape:
        raise DataFault(
            f"{path}: case {name}: the saliency {saliency.shape} lies on another grid than the stored scan "
            f"{case.shape}; give it on the stored grid"
        )
    low, high = float(saliency.min()), float(saliency.max())  # NaN if there is one
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise DataFault(f"{path}: case {name}: saliency from {low:g} to {high:g}; values from 0 to 1 are needed")
    return np.rint(np.clip(saliency, 0, 1) * 255).astype(np.uint8)


def _write(path: Path, folder: str, steps: np.ndarray) -> tuple[ArrayFile, bool]:
    """Write an array under a name that follows from its content, so that it never takes the place of another; and
    whether it was not there yet."""
    written = write_array(path, f"{folder}/saliency-new.b2nd", steps)
    named = replace(written, file=f"{folder}/saliency-{written.xxh3}.b2nd")
    is_new = not (path / named.file).exists()
    (path / written.file).replace(path / named.file)
    return named, is_new


def _commit(path: Path, contents: Contents, added: Mapping[str, ArrayFile], source: str) -> None:
    """Records, then the index, then the arrays that nothing names any more."""
    answered = {saliency_lost(name) for name in added}

    def unanswered(notes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(note for note in notes if note not in answered)

    changed = {
        case.name: replace(case, saliency=added[case.name], saliency_source=source, notes=unanswered(case.notes))
        for case in contents.cases
        if case.name in added
    }
    records = {name: path / CASES / case_key(name) / RECORD for name in added}
    for name, record in records.items():
        there = read_json(record)
        if name not in changed or there is None or there["signature"] != changed[name].signature:
            raise DataFault(f"{path}: case {name} is being prepared anew; {AGAIN}, then add its saliency")
    for name, record in records.items():
        write_json(record, changed[name].to_dict())
    cases = tuple(changed.get(case.name, case) for case in contents.cases)
    write_json(path / INDEX, replace(contents, cases=cases, notes=unanswered(contents.notes)).to_dict())
    for name, case in changed.items():
        remove_unused(records[name].parent, case.saliency)


def _take_back(path: Path, fresh: list[Path]) -> None:
    """Remove the arrays of an attempt that failed, unless a record or the index came to name them before it did."""
    for file in fresh:
        record = read_json(file.parent / RECORD)
        if record is None or (record.get("saliency") or {}).get("file") != str(file.relative_to(path)):
            file.unlink(missing_ok=True)
