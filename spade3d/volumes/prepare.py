"""Prepare: every case of a dataset read, checked, preprocessed and written into a VolumeStore, in parallel.

It may be killed at any instant and started again: a case is done once its record lies beside its arrays, which is
written last and by renaming; a case is skipped when its files are sound and neither its sources (size and time of
change), nor the preprocessing, nor the label table has changed. The index is written at the very end.

A scan that cannot be used is named, with the reason, in `rejected`, and the others go on. That holds for a reader
that crashes, too: the cases in hand when a worker process dies are tried again, each in a process of its own.

Saliency that `channels.py` added stays with a case that is skipped. A case that is prepared anew loses it, since it
described other voxels: the store's notes say so until it is written again.

Labels keep the values of their file, but for stray ones (case_labels.py). A background-only label map is kept (an
absent structure is a finding) and noted.
"""

import hashlib
import json
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from spade3d.claim import claimed
from spade3d.cores import usable_cores
from spade3d.faults import DataFault
from spade3d.volumes.case_labels import label_table, read_case_labels, stray_share
from spade3d.volumes.channels import SALIENCY, remove_unused, saliency_lost
from spade3d.volumes.geometry import canonical_flips
from spade3d.volumes.layouts import Case, Dataset
from spade3d.volumes.likeness import likeness
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.sealed import (
    Damaged,
    checksum_fault,
    read_json,
    size_fault,
    write_array,
    write_json,
)
from spade3d.volumes.store import (
    CASES,
    INDEX,
    RECORD,
    Contents,
    StoredCase,
    VolumeStore,
    case_key,
    is_store,
    read_index,
)
from spade3d.volumes.volume import read_volume, voxel_fingerprint
from spade3d.volumes.workers import outcomes
from spade3d.whole_file import remove_leftovers

Progress = Callable[[int, int, str], None]

MOST_WORKERS = 8  # by default; reading is bound by the disk beyond
FEW_CASES = 8  # up to here, or
SMALL_BYTES = 50_000_000  # below this, starting processes costs more than they save


@dataclass(frozen=True)
class Job:
    """All that one case needs, small enough to be sent to a worker."""

    case: Case
    store: Path
    preprocessing: Preprocessing
    label_names: Mapping[int, str]
    stray: float = 0.0  # share of labelled voxels that may have values outside the table


@dataclass(frozen=True)
class Rejection:
    """A case that cannot be used, and why."""

    name: str
    reason: str


def prepare(
    dataset: Dataset,
    out: Path,
    preprocessing: Preprocessing,
    *,
    workers: int = 0,
    strict: bool = False,
    labelled_only: bool = False,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
) -> VolumeStore:
    """Make, finish or renew the store of a dataset in the folder `out`, and open it.

    workers       0: in this process for a few or small scans, else one per core, at most 8; n: n processes
    strict        raise the first rejection instead of going on without that case
    labelled_only leave out the cases without labels
    only          names of the cases that are wanted, None for all; what is said of the set stays said of all of it
    progress      called as (done, total, name of the case) after each case, and once with a sentence for a name while
                  another process is preparing in the same folder

    Raises DataFault where no case can be used, and where `out` holds something else or another preprocessing.
    """
    jobs = _jobs(dataset, out, preprocessing, labelled_only, only)
    report = progress or (lambda done, total, name: None)

    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    _make(dataset, out, preprocessing)
    all_outcomes = _outcomes(jobs, workers)
    with claimed(out, lambda who: report(0, len(jobs), who)) as renew_claim, closing(all_outcomes):
        _check_out(dataset, out, preprocessing)  # another process may have finished it while we waited
        remove_leftovers(out)
        gone = _gone(dataset, out)
        done: dict[str, StoredCase] = {}
        rejected: list[dict[str, str]] = []
        for outcome in all_outcomes:
            renew_claim()
            if isinstance(outcome, Rejection):
                rejected.append({"name": outcome.name, "reason": outcome.reason})
                if strict:
                    break
            else:
                done[outcome.name] = outcome
            report(len(done) + len(rejected), len(jobs), outcome.name)
        if done and not (strict and rejected):
            if gone:
                some = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
                warnings.warn(
                    f"{out}: {len(gone)} of its scans are no longer in {dataset.root} ({some}): left out of the store",
                    stacklevel=2,
                )
            write_json(out / INDEX, _contents(dataset, preprocessing, jobs[0].label_names, done, rejected).to_dict())
    if strict and rejected:
        _undo(new)
        raise DataFault(f"case {rejected[0]['name']}: {rejected[0]['reason']}")
    if not done and len(jobs) == 1:
        _undo(new)
        raise DataFault(rejected[0]["reason"])
    if not done:
        _undo(new)
        some = "; ".join(f"{one['name']}: {one['reason']}" for one in rejected[:3])
        raise DataFault(
            f"{dataset.root}: none of {len(jobs)} cases can be used ({some}{' ...' if len(rejected) > 3 else ''})"
        )
    return VolumeStore.open(out)


def prepare_part(
    dataset: Dataset,
    out: Path,
    preprocessing: Preprocessing,
    part: int,
    of: int,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[Rejection]:
    """Prepare the `part`-th of `of` shares of a dataset's cases, from 1, and write no index; the cases left out.

    For many machines at once, each with a part of its own, in one folder that all of them see. `prepare` then checks
    what is there, prepares what is missing, and writes the index. DataFault as `prepare`, but for cases that cannot be
    used: `prepare` will name them again.
    """
    jobs = _jobs(dataset, out, preprocessing, labelled_only=False)[part - 1 :: of]
    report = progress or (lambda done, total, name: None)
    _make(dataset, out, preprocessing)
    rejected = []
    for done, outcome in enumerate(_outcomes(jobs, workers), start=1):
        rejected += [outcome] if isinstance(outcome, Rejection) else []
        report(done, len(jobs), outcome.name)
    return rejected


def _jobs(
    dataset: Dataset,
    out: Path,
    preprocessing: Preprocessing,
    labelled_only: bool,
    only: Collection[str] | None = None,
) -> list[Job]:
    """What is to be prepared, in the order of the dataset; DataFault where that is nothing, or not told apart."""
    cases = tuple(case for case in dataset.cases if case.labels is not None or not labelled_only)
    if not cases:
        raise DataFault(
            f"{dataset.root}: none of {len(dataset.cases)} cases has labels, no labelled scan can be learned from; add "
            "labels where a known layout has them (images/X and labels/X, X_image and X_label, a dataset.json)"
        )
    if only is not None:
        cases = tuple(case for case in cases if case.name in only)
    twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        raise DataFault(
            f"{dataset.root}: several cases are named {', '.join(twice[:5])}; names must differ: rename the files"
        )
    label_names, stray = label_table(dataset), stray_share(dataset)
    return [Job(case, out, preprocessing, label_names, stray) for case in cases]


def _make(dataset: Dataset, out: Path, preprocessing: Preprocessing) -> None:
    """The folder of a store, if it may be written there."""
    _check_out(dataset, out, preprocessing)
    try:
        (out / CASES).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataFault(f"{out}: cannot be made ({problem.strerror}); choose another --out") from problem


def _undo(made: list[Path]) -> None:
    """Take back the folder of a store that was refused, and the folders made for it; one that was there stays."""
    for folder in made[:1]:
        shutil.rmtree(folder)
    for folder in made[1:]:
        folder.rmdir()


def prepare_case(job: Job) -> StoredCase | Rejection:
    """Prepare one case, unless that is done; runs in a worker. Fault where the store cannot be written."""
    case, folder = job.case, f"{CASES}/{case_key(job.case.name)}"
    try:
        signature = _signature(job)
        known = _done(job.store, folder, signature)
        if known is not None:
            return replace(known, subject=case.subject or known.subject, part=case.part, source=str(case.image))
        with warnings.catch_warnings(record=True) as warned:  # a worker's standard error is nobody's: noted instead
            warnings.simplefilter("always")
            volume = read_volume(case.image, modality=case.modality, subject=case.subject, **_series(case))
            labels, notes = read_case_labels(case, volume, job.label_names, job.stray)
        notes = [*(str(warning.message) for warning in warned), *notes]
        prepared = job.preprocessing.prepare(volume, labels)
        fingerprint, shown = voxel_fingerprint(volume), likeness(volume)
    except DataFault as fault:
        return Rejection(case.name, str(fault))
    except MemoryError:
        return Rejection(case.name, f"{case.image}: does not fit into memory; prepare with fewer --workers")
    except Exception as surprise:  # one odd file must not end a night's work: named and reported like the others
        return Rejection(
            case.name, f"{case.image}: {type(surprise).__name__}: {surprise} (unexpected: please report it)"
        )

    if prepared.labels is not None:
        present = np.flatnonzero(np.bincount(prepared.labels.ravel()))
        lost = sorted(set(np.unique(labels).tolist()) - set(present.tolist()))
        notes += [f"{case.name}: the labels hold background only"] if not present.any() else []
        notes += [f"{case.name}: label values {lost} vanish at this spacing or outside the body"] if lost else []
    to_canonical = canonical_flips(volume.affine, volume.shape)
    moved = prepared.labels is not None and not np.allclose(prepared.affine, to_canonical.affine(volume.affine))
    truth = to_canonical.apply(labels).astype(np.uint16) if moved else None
    notes += [saliency_lost(case.name)] if _had_saliency(job.store / folder) else []
    (job.store / folder / RECORD).unlink(missing_ok=True)  # from here on the case is not done
    record = StoredCase(
        name=case.name,
        subject=volume.subject,
        part=case.part,
        modality=prepared.modality,
        affine=prepared.affine,
        shape=prepared.voxels.shape,
        normalisation=prepared.normalisation,
        source=str(case.image),
        source_grid=prepared.source_grid,
        label_values=() if prepared.labels is None else tuple(v for v in present.tolist() if v),
        has_labels=prepared.labels is not None,
        body_box_mm=prepared.body_box_mm,
        fingerprint=fingerprint,
        likeness=shown,
        notes=tuple(notes),
        signature=signature,
        image=write_array(job.store, f"{folder}/image.b2nd", prepared.voxels),
        labels=None if prepared.labels is None else write_array(job.store, f"{folder}/labels.b2nd", prepared.labels),
        truth=write_array(job.store, f"{folder}/truth.b2nd", truth) if moved else None,
    )
    write_json(job.store / folder / RECORD, record.to_dict())
    remove_unused(job.store / folder, None)
    return record


def _contents(
    dataset: Dataset,
    preprocessing: Preprocessing,
    label_names: Mapping[int, str],
    done: Mapping[str, StoredCase],
    rejected: list[dict[str, str]],
) -> Contents:
    cases = tuple(done[name] for name in sorted(done))
    same = defaultdict(list)
    for case in cases:
        same[case.fingerprint].append(case.name)
    copies = [
        f"the same voxels under {len(names)} names: {', '.join(names)}" for names in same.values() if len(names) > 1
    ]
    found = sorted({value for case in cases for value in case.label_values})
    return Contents(
        dataset=dataset.name,
        layout=dataset.layout,
        root=str(dataset.root.resolve()),
        notes=(*dataset.notes, *(note for case in cases for note in case.notes), *copies),
        label_names=label_names or {value: f"label {value}" for value in found},
        preprocessing=preprocessing,
        cases=cases,
        rejected=tuple(sorted(rejected, key=lambda one: one["name"])),
    )


def _check_out(dataset: Dataset, out: Path, preprocessing: Preprocessing) -> None:
    """Refuse to write over anything but this dataset's store of this preprocessing, finished or not."""
    if out.exists() and not out.is_dir():
        raise DataFault(f"{out}: is a file; a folder for the store is needed: choose another --out")
    if out.is_dir() and any(out.iterdir()) and not is_store(out):
        raise DataFault(f"{out}: holds files that are no store; choose another --out, or an empty folder")
    try:
        there = read_index(out)
    except Damaged:  # a damaged index is written anew; the cases carry their own records
        return
    if there is None:
        return
    old, new = there.preprocessing.to_dict(), preprocessing.to_dict()
    differing = [f"{name} {old.get(name)} there, {new[name]} asked for" for name in new if old.get(name) != new[name]]
    if differing:
        raise DataFault(f"{out}: holds a store of another preprocessing ({'; '.join(differing)}); choose another --out")
    if there.root != str(dataset.root.resolve()):
        _check_moved(dataset, out, preprocessing, there)


def _check_moved(dataset: Dataset, out: Path, preprocessing: Preprocessing, there: Contents) -> None:
    """Refuse a dataset of another place than the store's, unless it is that one, moved or copied: some scans have the
    same names, and those have the same voxels. Scans that cannot be read tell nothing."""
    another = f"{out}: holds the store of another dataset ({there.dataset}, {there.root})"
    stored, table = {case.name: case for case in there.cases}, label_table(dataset)
    shared = [Job(case, out, preprocessing, table) for case in dataset.cases if case.name in stored]
    found = None
    for job in shared:
        case = stored[job.case.name]
        try:
            signature = _signature(job)
        except DataFault:
            continue
        if signature != case.signature:
            fingerprint = _fingerprint(job.case.image, job.case.modality, job.case.series, signature)
            if fingerprint not in (None, case.fingerprint):
                raise DataFault(
                    f"{another}, whose scan {case.name} has other voxels than {job.case.image}; choose another --out, "
                    f"or remove {out} if that store is no longer needed"
                )
            found = found or fingerprint
        else:
            found = signature
    if found is None:
        raise DataFault(f"{another}; choose another --out")


@cache
def _fingerprint(image: Path, modality: str, series: str | None, signature: str) -> str | None:
    """The fingerprint of a scan whose files have this signature; None where they cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd is noted as it is prepared
            return voxel_fingerprint(read_volume(image, modality=modality, **({"series": series} if series else {})))
    except Exception:  # as it is prepared this is named and reported
        return None


def _gone(dataset: Dataset, out: Path) -> list[str]:
    """The cases of a store that its dataset no longer has."""
    try:
        there = read_index(out)
    except Damaged:
        return []
    return sorted({case.name for case in there.cases} - {case.name for case in dataset.cases}) if there else []


def _series(case: Case) -> dict[str, str]:
    return {} if case.series is None else {"series": case.series}


def _sources(case: Case) -> list[Path]:
    """Every file of a case: all of a DICOM folder, and the voxels that lie beside a detached header."""
    labels = case.labels.values() if isinstance(case.labels, Mapping) else [case.labels] if case.labels else []
    files = []
    for path in (case.image, *labels):
        if path.is_dir():
            files += sorted(slice_file for slice_file in path.rglob("*") if slice_file.is_file())
        elif path.suffix.lower() in (".nhdr", ".mhd"):
            files += sorted(beside for beside in path.parent.iterdir() if beside.name.startswith(path.stem))
        else:
            files.append(path)
    return files


def _signature(job: Job) -> str:
    """Of all that decides what is stored for a case. DataFault for a source that is not there."""
    case, files = job.case, []
    for path in _sources(case):
        try:
            status = path.stat()
        except OSError as problem:
            raise DataFault(
                f"{path}: cannot be read ({problem.strerror}); check the path and its permissions"
            ) from problem
        files.append([path.name, status.st_size, status.st_mtime_ns])
    table = {str(value): name for value, name in job.label_names.items()} if case.labels is not None else {}
    masks = sorted(case.labels) if isinstance(case.labels, Mapping) else []
    decisive = [files, case.series, case.modality, masks, table, job.preprocessing.fingerprint()]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def _done(store: Path, folder: str, signature: str) -> StoredCase | None:
    """The record of a case that is prepared as wanted and sound on disk, to the last byte; else None."""
    try:
        content = read_json(store / folder / RECORD)
        record = None if content is None else StoredCase.from_dict(content)
    except (Damaged, KeyError, TypeError, ValueError):  # it is prepared again
        return None
    if record is None or record.signature != signature:
        return None
    sound = not any(size_fault(store, array) or checksum_fault(store, array) for array in record.files)
    return record if sound else None


def _had_saliency(folder: Path) -> bool:
    """Whether a case has, or had before an interruption, saliency beside its arrays."""
    return any(folder.glob(SALIENCY))


def _outcomes(jobs: list[Job], workers: int) -> Generator[StoredCase | Rejection, None, None]:
    """What became of each job, in the order in which they end."""
    if workers == 0 and (len(jobs) <= FEW_CASES or _bytes(jobs) < SMALL_BYTES):
        yield from map(prepare_case, jobs)
    else:
        count = workers or min(MOST_WORKERS, usable_cores())
        yield from outcomes(prepare_case, jobs, min(count, len(jobs)), _died)


def _died(job: Job) -> Rejection:
    reason = "the process that read it died (its reader crashed, or memory ran out)"
    return Rejection(job.case.name, f"{job.case.image}: {reason}; leave it out, or prepare with fewer --workers")


def _bytes(jobs: list[Job]) -> int:
    sizes = (path.stat().st_size for job in jobs for path in _sources(job.case) if path.exists())
    return sum(sizes)
