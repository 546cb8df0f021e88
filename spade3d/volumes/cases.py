"""Case and Dataset: what a layout yields; and the rules that hold for every layout: names, subjects, pairs by name."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from spade3d.volumes import naming
from spade3d.volumes.descriptions import read_json, read_label_names, read_subjects
from spade3d.volumes.organs import canonical_organ
from spade3d.volumes.volume import SCAN_SUFFIXES, scan_stem
from spade3d.volumes.walking import some, walk


@dataclass(frozen=True)
class Case:
    """One scan. `image`: a file, or the folder of DICOM `series`; `labels`: a label map, one mask per structure by
    name, or None; `modality`: "CT", "MR", "PT" or "unknown"; `part`: "training", "validation", "test" or ""."""

    name: str
    subject: str
    image: Path
    labels: Path | Mapping[str, Path] | None
    modality: str
    series: str | None = None
    part: str = ""

    @property
    def has_labels(self) -> bool:
        return self.labels is not None


@dataclass(frozen=True)
class Dataset:
    """Cases sorted by name. `layout`: which was recognised; `label_names`: value -> name without background, {} if
    nothing tells; `notes`: what the user should know, above all what was left out and why."""

    name: str
    layout: str
    root: Path
    cases: tuple[Case, ...]
    label_names: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_scan(file: Path) -> bool:
    """Whether a file is a scan (or a label map) by its suffix."""
    return file.name.lower().endswith(SCAN_SUFFIXES)


def folders_between(root: Path, image: Path) -> tuple[str, ...]:
    """The folders on the way from the dataset to a scan; none where the scan lies elsewhere."""
    return image.relative_to(root).parts[:-1] if image.is_relative_to(root) else ()


def case_of(root: Path, image: Path, labels: Path | None = None, part: str = "") -> Case:
    """A case with what its path alone says; the subject is "" where the file name tells only the kind of scan."""
    stem = scan_stem(image)
    modality = naming.modality_of(stem, *reversed(folders_between(root, image)), root.resolve().name)
    return Case(naming.case_name(stem), naming.patient_of(stem), image, labels, modality, part=part)


def cases_by_name(root: Path, scans: Iterable[Path]) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Cases from scan files by their names; label files that belong to no image are noted, never taken for scans."""
    pairing = naming.pair(scan.relative_to(root) for scan in scans)
    # Beside ct.nii.gz, ct_slab.nii.gz is the same patient's: names that begin with one that tells only the kind.
    kinds: dict[Path, set[tuple[str, ...]]] = defaultdict(set)
    for image in pairing.images:
        if not naming.patient_of(scan_stem(image)):
            kinds[image.parent].add(naming.words(scan_stem(image)))
    cases = []
    for image, labels in pairing.images.items():
        case = case_of(root, root / image, labels and root / labels, naming.read_name(image).part)
        words = naming.words(scan_stem(image))
        same_patient = any(words[: end + 1] in kinds[image.parent] for end in range(len(words)))
        cases.append(replace(case, subject="") if same_patient else case)
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, reason in pairing.left.items():
        reasons[reason].append(path.as_posix())
    return tuple(cases), tuple(f"label files not used, {why}: {some(files)}" for why, files in reasons.items())


def note_on_the_rest(root: Path, seen: Iterable[Path], layout: str) -> tuple[str, ...]:
    """A note on the scan files below `root` that a layout passes by; `seen`: those it has dealt with."""
    known = set(seen)
    rest = [file.relative_to(root).as_posix() for file in walk(root).files if is_scan(file) and file not in known]
    return (f"scans that are no part of a dataset laid out as {layout}: {some(rest)}",) if rest else ()


def files_of(cases: Iterable[Case]) -> set[Path]:
    """Every file that the cases stand for."""
    files: set[Path] = set()
    for case in cases:
        masks = case.labels.values() if isinstance(case.labels, Mapping) else [case.labels]
        files.update([case.image, *(mask for mask in masks if mask is not None)])
    return files


def with_labels_json(dataset: Dataset) -> Dataset:
    """With the names in labels.json ({"1": "spleen"}), which hold for the label files below it.

    Where the tables of two folders disagree, or only some label files have one, a value means two things: then no
    labels are taken, which pretraining can do without, and a note says so.
    """
    tables: dict[Path | None, dict[int, str]] = {}
    for case in dataset.cases:
        if isinstance(case.labels, Path):
            above = [folder / "labels.json" for folder in case.labels.parents if folder.is_relative_to(dataset.root)]
            file = next((file for file in above if file.is_file()), None)
            if file not in tables:
                tables[file] = read_label_names(read_json(file), file) if file else {}
    names: dict[int, str] = {}
    at_odds = None in tables and len(tables) > 1
    for table in tables.values():
        at_odds |= any(
            canonical_organ(names.get(value, name)) != canonical_organ(name) for value, name in table.items()
        )
        names |= table
    if not at_odds:
        return replace(dataset, label_names=dict(sorted(names.items())))
    note = "labels not used, because one value has several meanings in labels.json of several folders: give one folder"
    cases = tuple(replace(case, labels=None) for case in dataset.cases)
    return replace(dataset, cases=cases, notes=(*dataset.notes, note))


def with_names_made_unique(dataset: Dataset) -> Dataset:
    """Folders are put before a name that two cases share, and before a file name that alone does not tell the patient.

    Folders that only say the kind of scan (images, ct, pre) do not tell patients apart.
    """

    def patient_folders(case: Case) -> tuple[str, ...]:
        folders = folders_between(dataset.root, case.image)
        telling = naming.read_name(Path(*folders, "x")).folders
        return tuple(folder for folder in telling if naming.patient_of(folder))

    shared = Counter(case.name for case in dataset.cases)
    homes: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for case in dataset.cases:
        homes[case.subject].add(patient_folders(case))
    cases: dict[str, Case] = {}
    for case in sorted(dataset.cases, key=lambda case: (case.image, case.series or "")):
        where, name, subject = patient_folders(case), case.name, case.subject
        if shared[name] > 1 or (where and not subject):
            name = "_".join((*(where if shared[name] == 1 else folders_between(dataset.root, case.image)), name))
        if not subject:
            subject = "_".join(where) or dataset.root.resolve().name
        elif len(homes[subject]) > 1 and case.series is None and subject not in where:
            subject = "_".join((*where, subject))
        stem, number = name, 2
        while name in cases:
            name, number = f"{stem}-{number}", number + 1
        cases[name] = replace(case, name=name, subject=subject)
    return replace(dataset, cases=tuple(cases[name] for name in sorted(cases)))


def with_subjects_csv(dataset: Dataset) -> Dataset:
    """With the subjects stated by the nearest subjects.csv above a scan, by path below that table or by file name."""
    tables: dict[Path, dict[str, str]] = {}
    cases, unknown = [], []
    for case in dataset.cases:
        above = [folder for folder in case.image.parents if folder.is_relative_to(dataset.root)]
        folder = next((folder for folder in above if (folder / "subjects.csv").is_file()), None)
        if folder is not None:
            if folder not in tables:
                tables[folder] = read_subjects(folder / "subjects.csv")
            table = tables[folder]
            told = table.get(case.image.relative_to(folder).as_posix(), table.get(case.image.name))
            unknown += [case.name] if told is None else []
            case = replace(case, subject=told or case.subject)
        cases.append(case)
    note = (f"not in subjects.csv, so the file name tells whose they are: {some(unknown)}",) if unknown else ()
    return replace(dataset, cases=tuple(cases), notes=(*dataset.notes, *note))
