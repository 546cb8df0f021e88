"""A path -> cases: every layout in which people keep their scans, told by what lies there.

Tried in this order; the first that fits is taken:

1. one scan file;
2. a JSON list given as the path; `dataset.json` in the folder (nnU-Net v2 if it names channels or a file ending,
   else MSD, which AMOS and WORD follow); the only `dataset*.json` or `datalist*.json` in it (MONAI, nnssl);
3. `CASE/ct.nii.gz` + `CASE/segmentations/*.nii.gz`: TotalSegmentator, AbdomenAtlas;
4. `sub-*/[ses-*/]anat`: BIDS;
5. anything else, by name: folders of images and labels (`images` + `labels`, `imagesTr` + `labelsTr`, `img` +
   `label`), image and labels side by side (`X_image`, `X_label`), DICOM series, plain scans, and mixtures. File names
   as BTCV, AMOS and MM-WHS publish them are recognised here and bring their label tables along.

Whose a scan is: `subjects.csv` (columns file,subject) beside the folders; else what the layout says (BIDS sub-xx,
TotalSegmentator's folder, DICOM PatientID as a pseudonym); else the file name without the end that tells the scan
(`P7_ED`, `P7_t2` -> P7). Where a name says no more than the kind of scan (`ct.nii.gz`, `MR_T1_image.nii.gz`) its
folder is one patient, and so are the names that begin with it (`ct_slab.nii.gz`). In doubt two scans are one
patient's, because a patient on both sides of a split is the worse fault.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spade3d.faults import DataFault
from spade3d.volumes import naming, organs
from spade3d.volumes.cases import (
    Case,
    Dataset,
    case_of,
    cases_by_name,
    files_of,
    is_scan,
    note_on_the_rest,
    with_labels_json,
    with_names_made_unique,
    with_subjects_csv,
)
from spade3d.volumes.descriptions import Json, read_entries, read_json, read_label_names, resolve_inside
from spade3d.volumes.dicom_cases import cases_of_series
from spade3d.volumes.organs import canonical_organ
from spade3d.volumes.volume import SCAN_SUFFIXES, scan_stem
from spade3d.volumes.walking import some, walk

__all__ = ["Case", "Dataset", "canonical_organ", "read_layout"]


def read_layout(path: Path, *, allow_outside: bool = False) -> Dataset:
    """Recognise what lies at `path` and list its cases; no voxel is read.

    `allow_outside`: let a JSON list name files outside its own folder.
    DataFault: nothing there, nothing readable, or a description that is broken or contradicts itself.
    """
    path = Path(path)
    if _is_folder(path):
        dataset = next(found for layout in _LAYOUTS if (found := layout(path, allow_outside)) is not None)
    elif path.suffix.lower() == ".json":
        dataset = _from_json(path, allow_outside)
    elif is_scan(path):
        dataset = Dataset(scan_stem(path), "one scan", path.parent, (case_of(path.parent, path),))
    else:
        kinds = f"needed is a scan ({', '.join(SCAN_SUFFIXES)}), a JSON list or a folder"
        raise DataFault(f"{path}: no scan by its name; {kinds} (for DICOM: the folder of the series)")
    if not dataset.cases:
        raise DataFault(f"{path}: lists no scan ({dataset.layout}); add scans, or give the folder that holds them")
    return with_subjects_csv(with_names_made_unique(dataset))


def _is_folder(path: Path) -> bool:
    """Whether it is a folder; DataFault if it is neither a folder nor a regular file, or may not be read."""
    wanted = "give a scan, a JSON list or a folder of scans"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataFault(f"{path}: {error.strerror}; {wanted}") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise DataFault(f"{path}: neither a file nor a folder; {wanted}")
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        raise DataFault(f"{path}: may not be read; change its permissions")
    return stat.S_ISDIR(mode)


# --- described by a file -------------------------------------------------------------------------------------------


def _described(root: Path, allow_outside: bool) -> Dataset | None:
    if (root / "dataset.json").is_file():
        return _from_json(root / "dataset.json", allow_outside)
    lists = [*root.glob("dataset*.json"), *root.glob("datalist*.json"), *root.glob("pretrain_data.json")]
    return _from_json(lists[0], allow_outside) if len(lists) == 1 else None


def _from_json(file: Path, allow_outside: bool) -> Dataset:
    root, content = file.parent, read_json(file)
    about = content if isinstance(content, dict) else {}
    name = about["name"] if isinstance(about.get("name"), str) else root.resolve().name
    label_names = read_label_names(about["labels"], file) if "labels" in about else {}
    dataset = Dataset(name, "MSD" if "labels" in about else "JSON list", root, (), label_names)
    if "channel_names" in about or "file_ending" in about:
        return _nnunet(replace(dataset, layout="nnU-Net v2"), about, file)
    return _listed(dataset, content, file, allow_outside)


def _nnunet(dataset: Dataset, about: dict[str, Any], file: Path) -> Dataset:
    channels, ending = about.get("channel_names", {"0": ""}), about.get("file_ending", ".nii.gz")
    if not (isinstance(channels, dict) and channels and all(key.isdecimal() for key in channels)):
        raise DataFault(f'{file}: channel_names must be an object such as {{"0": "CT"}}')
    if len(channels) > 1:
        files = ", ".join(f"CASE_{int(key):04d}{ending} is {name!r}" for key, name in channels.items())
        raise DataFault(f"{file}: one channel is read for now, but there are {len(channels)} ({files}); keep one")
    if ending not in SCAN_SUFFIXES:
        raise DataFault(f"{file}: file_ending {ending!r} cannot be read; known are {', '.join(SCAN_SUFFIXES)}")
    scans = _in_part_folders(dataset.root)
    cases, notes = cases_by_name(dataset.root, scans)
    rest = note_on_the_rest(dataset.root, scans, dataset.layout)
    return replace(dataset, cases=_told_modality(cases, channels), notes=(*notes, *rest))


def _listed(dataset: Dataset, content: Json, file: Path, allow_outside: bool) -> Dataset:
    """The cases a list names; of the parts that it does not speak of, those in imagesTr, imagesVa, imagesTs."""
    root, (entries, parts) = dataset.root, read_entries(content, file)
    listed: dict[Path, Case] = {}
    notes: list[str] = []
    for entry in entries:
        image = _with_channel(resolve_inside(root, entry.image, file, allow_outside))
        labels = resolve_inside(root, entry.labels, file, allow_outside) if entry.labels else None
        case = case_of(root, image, labels, entry.part)
        before = listed.setdefault(image, case)
        if before.part != case.part and "training" in (before.part, case.part):
            raise DataFault(f"{file}: {entry.image!r} is listed in {before.part} and in {case.part}; keep one")
        if before is not case:
            notes.append(f"{entry.image} is listed more than once, and read once")
    if listed and not any(image.exists() for image in listed):
        raise DataFault(f"{file}: none of its {len(listed)} scans is there (the first: {entries[0].image!r})")
    scans = _in_part_folders(root) if dataset.layout == "MSD" else []
    found, more = cases_by_name(root, scans)
    cases = (*listed.values(), *(case for case in found if case.part not in parts and case.image not in listed))
    if dataset.layout == "MSD":
        seen = files_of(cases) if listed else scans
        notes += [*(() if listed else more), *note_on_the_rest(root, seen, "MSD")]
    dataset = replace(dataset, notes=tuple(notes))
    if cases and all(re.fullmatch(r"amos_\d{4}", case.name) for case in cases):
        return replace(dataset, layout="AMOS", cases=_amos_modality(cases))
    about = content if isinstance(content, dict) else {}
    channels = about.get("modality", about.get(""))  # one published BTCV list has the key ""
    return replace(dataset, cases=_told_modality(cases, channels))


def _with_channel(image: Path) -> Path:
    """nnU-Net v1 lists CASE.nii.gz and stores CASE_0000.nii.gz."""
    stem = scan_stem(image)
    stored = image.with_name(f"{stem}_0000{image.name[len(stem) :]}")
    return stored if not image.exists() and stored.exists() else image


def _in_part_folders(root: Path) -> list[Path]:
    """The scan files in imagesTr, imagesVa (or Val), imagesTs, and in the labels folders beside them."""
    folders = [path for path in sorted([*root.glob("images[TV]*"), *root.glob("labels[TV]*")]) if path.is_dir()]
    return [file for folder in folders for file in walk(folder).files if is_scan(file)]


def _told_modality(cases: Iterable[Case], channels: Any) -> tuple[Case, ...]:
    """With the modality that a description states, where it states one and we know it."""
    told = [str(value) for value in channels.values()] if isinstance(channels, dict) else []
    modality = naming.modality_of(told[0]) if len(told) == 1 else "unknown"
    return tuple(replace(case, modality=modality) if modality != "unknown" else case for case in cases)


# --- described by folders ------------------------------------------------------------------------------------------


def _structures(root: Path, _: bool) -> Dataset | None:
    """TotalSegmentator and AbdomenAtlas: a folder per case, a mask per structure, the split in meta.csv if there."""
    parts = _parts_of_meta(root / "meta.csv")
    cases = []
    for folder in [root, *sorted(path for path in root.iterdir() if path.is_dir())]:
        image = next((scan for kind in ("ct", "mri", "mr") if (scan := folder / f"{kind}.nii.gz").is_file()), None)
        masks = {scan_stem(mask): mask for mask in sorted((folder / "segmentations").glob("*.nii*"))}
        if image and (masks or folder != root):
            who = folder.resolve().name
            modality = naming.modality_of(scan_stem(image))
            cases.append(Case(who, who, image, masks or None, modality, part=parts.get(who, "")))
    structures = sorted({name for case in cases if case.labels for name in case.labels})
    if not structures:
        return None
    notes = note_on_the_rest(root, files_of(cases), "TotalSegmentator")
    table = dict(enumerate(structures, start=1))
    return Dataset(root.resolve().name, "TotalSegmentator", root, tuple(cases), table, notes)


def _parts_of_meta(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    header, *rows = [line.split(";") for line in file.read_text("utf-8-sig", errors="replace").splitlines()] or [[]]
    if not {"image_id", "split"} <= set(header):
        return {}
    case, part = header.index("image_id"), header.index("split")
    return {row[case]: naming.part_of(row[part]) for row in rows if len(row) == len(header)}


def _bids(root: Path, _: bool) -> Dataset | None:
    scans = [file for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*") for file in root.glob(pattern) if is_scan(file)]
    if not scans:
        return None
    cases, notes = cases_by_name(root, scans)
    anatomical = tuple(
        replace(
            case,
            name=scan_stem(case.image),
            subject=case.image.relative_to(root).parts[0],
            modality="MR" if case.modality == "unknown" else case.modality,  # `anat` is MR unless the name says CT
        )
        for case in cases
    )
    notes = (*notes, *note_on_the_rest(root, scans, "BIDS (anat)"))
    return with_labels_json(Dataset(root.resolve().name, "BIDS", root, anatomical, notes=notes))


# --- by name -------------------------------------------------------------------------------------------------------


def _plain(root: Path, _: bool) -> Dataset:
    """Folders of images and labels, pairs by name, DICOM series, plain scans, and mixtures of these."""
    walked = walk(root)
    cases, notes = cases_by_name(root, [file for file in walked.files if is_scan(file)])
    series, more, others = cases_of_series(root, [file for file in walked.files if not is_scan(file)])
    suffixes = Counter(file.suffix.lower() for file in others if file.name not in ("subjects.csv", "labels.json"))
    what = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common())
    notes = (*walked.notes, *notes, *more, *([f"files that are no scans: {what}"] if what else []))
    if not cases and not series:
        found = "; ".join(notes) or "the folder is empty"
        raise DataFault(
            f"{root}: no scan found ({found}); needed are {', '.join(SCAN_SUFFIXES)} or DICOM files, alone or as an "
            "MSD or nnU-Net dataset.json, a MONAI datalist, BTCV, AMOS, MM-WHS, TotalSegmentator, BIDS, or folders of "
            "images and labels"
        )
    nested = [str(file.parent.relative_to(root)) for file in walked.files if file.name == "dataset.json"]
    if nested:
        cases = tuple(replace(case, labels=None) for case in cases)
        notes = (*notes, f"labels not used, several datasets: give one that has a dataset.json alone: {some(nested)}")
    paired = [case for case in cases if isinstance(case.labels, Path)]
    if paired:
        apart = any(case.image.parent != case.labels.parent for case in paired)
        layout = "folders of images and labels" if apart else "images and labels by name"
    else:
        layout = "DICOM series" if series and not cases else "folder of scans"
    dataset = Dataset(root.resolve().name, layout, root, (*cases, *series), notes=notes)
    return _published(dataset) or with_labels_json(dataset)


def _amos_modality(cases: Iterable[Case]) -> tuple[Case, ...]:
    """AMOS22: CT up to id 500, MR above."""
    return tuple(replace(case, modality="CT" if int(case.name[-4:]) <= 500 else "MR") for case in cases)


def _published(dataset: Dataset) -> Dataset | None:
    """The datasets that ship no table but are known by their file names: BTCV, AMOS, MM-WHS."""

    def all_named(image: str, labels: str) -> bool:
        return any(case.labels for case in dataset.cases) and all(
            re.fullmatch(image, scan_stem(case.image))
            and (not isinstance(case.labels, Path) or re.fullmatch(labels, scan_stem(case.labels)))
            for case in dataset.cases
        )

    if all_named(r"img\d{4}", r"label\d{4}"):
        cases = tuple(replace(case, modality="CT") for case in dataset.cases)
        return replace(dataset, layout="BTCV", cases=cases, label_names=organs.BTCV)
    if all_named(r"amos_\d{4}", r"amos_\d{4}"):
        return replace(dataset, layout="AMOS", cases=_amos_modality(dataset.cases), label_names=organs.AMOS)
    if all_named(r"(ct|mr)_(train|test)_\d{4}_image", r"(ct|mr)_(train|test)_\d{4}_label"):
        cases = tuple(
            replace(case, modality=modality.upper(), part=naming.part_of(part))
            for case in dataset.cases
            for modality, part, *_ in [case.name.split("_")]
        )
        return replace(dataset, layout="MM-WHS", cases=cases, label_names=organs.MM_WHS)
    return None


_LAYOUTS: tuple[Callable[[Path, bool], Dataset | None], ...] = (_described, _structures, _bids, _plain)
