"""DICOM trees -> cases: one per series that may be a volume; localisers, contours and reports are noted."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from spade3d.faults import DataFault
from spade3d.volumes import naming
from spade3d.volumes.cases import Case
from spade3d.volumes.dicom import dicom_series, is_dicom_folder
from spade3d.volumes.walking import some

# What often lies beside scans and is no DICOM; not opened to find out.
_OTHER_SUFFIXES = frozenset({
    ".json", ".csv", ".tsv", ".txt", ".md", ".xml", ".yaml", ".yml", ".html", ".pdf", ".png", ".jpg", ".jpeg",
    ".raw", ".zraw", ".gz", ".zip", ".py", ".xlsx", ".bval", ".bvec", ".npy", ".npz", ".hdr", ".img",
})  # fmt: skip


def cases_of_series(root: Path, files: Iterable[Path]) -> tuple[tuple[Case, ...], tuple[str, ...], tuple[Path, ...]]:
    """Cases from `files` (below `root`, none of them a scan by suffix), notes, and the files that are not DICOM."""
    folders: dict[Path, set[Path]] = {}
    others: list[Path] = []
    for file in files:
        if file.suffix.lower() in _OTHER_SUFFIXES:
            others.append(file)
        else:
            folders.setdefault(file.parent, set()).add(file)
    cases: list[Case] = []
    notes: list[str] = []
    homes: dict[str, Path] = {}
    for folder, found in folders.items():
        if not is_dicom_folder(folder):
            others += sorted(found)
            continue
        here, why = _cases_in(root, folder, found)
        cases += here
        notes += why
        for case in here:
            if case.series and (home := homes.setdefault(case.series, folder)) != folder:
                notes.append(f"one DICOM series lies in two folders, {home.name} and {folder.name}: a copy or a half")
    if len(cases) > 2 and len({case.subject for case in cases}) == 1:
        notes.append(f"all {len(cases)} DICOM series carry one PatientID; several patients need a subjects.csv")
    return tuple(cases), tuple(notes), tuple(others)


def _cases_in(root: Path, folder: Path, found: set[Path]) -> tuple[list[Case], list[str]]:
    """The cases among the files `found` in one DICOM folder, and notes on the rest of them."""
    here = folder.resolve().name
    by_path = naming.modality_of(*reversed(folder.relative_to(root).parts), root.resolve().name)
    try:
        every = dicom_series(folder)
    except DataFault:  # a damaged slice: reading the case will say which, and leave it out or stop
        return [Case(here, here, folder, None, by_path)], []
    notes, scans = [], []
    rest = sorted(file.name for file in found - {one.path for series in every.values() for one in series.slices})
    if rest:
        notes.append(f"left out, {here}: no slices of a scan (contours, reports, others): {some(rest)}")
    for uid, series in every.items():
        single = len(series.slices) == 1 and series.slices[0].frames == 1
        if series.localiser or single:
            notes.append(f"left out, {here}: series {uid} is {'a localiser' if series.localiser else 'a single slice'}")
        else:
            scans.append(series)
    cases = []
    for number, series in enumerate(scans, start=1):
        name = f"{here}_series{number}" if len(scans) > 1 else here
        modality = by_path if series.modality == "unknown" else series.modality
        cases.append(Case(name, _pseudonym(series.patient) or here, folder, None, modality, series.uid))
    return cases, notes


def _pseudonym(patient_id: str) -> str:
    """Equal for equal patients, without showing the hospital's number; it can be guessed at, so no anonymisation."""
    digest = hashlib.sha256(f"spade3d {patient_id.strip()}".encode()).hexdigest()
    return f"patient-{digest[:12]}" if patient_id.strip() else ""
