"""VolumeStore: prepared scans as chunked compressed arrays that many processes read crops from, each array checked.

    STORE/index.json                        what is in it and how it was prepared; written last
    STORE/prepared_cases/<key>/image.b2nd   int16 (i, j, k), Blosc2: Zstd 5, shuffle, chunks 64^3 of blocks 32^3
    STORE/prepared_cases/<key>/labels.b2nd  uint16, the values of the file; only where there are labels
    STORE/prepared_cases/<key>/truth.b2nd   uint16, the labels on their own grid, where the scan was resampled
    STORE/prepared_cases/<key>/saliency-<checksum>.b2nd  uint8, 255 = 1; only where `channels.py` added it
    STORE/prepared_cases/<key>/case.json    the case's record; written after its arrays
    STORE/body_frames/<method>-<key>.json   where scans lie in the body, once a run has found it (recipes/placing.py)

The size of every array is checked when the store is opened, its checksum the first time that a process reads it.
`prepare.py` writes stores; `channels.py` adds saliency to one that is there.
"""

import gc
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.geometry import spacing_of
from spade3d.volumes.preprocessing import Normalisation, Preprocessing
from spade3d.volumes.sealed import AGAIN, READING, ArrayFile, Damaged, checksum_fault, read_json, size_fault
from spade3d.volumes.volume import Grid

INDEX, RECORD = "index.json", "case.json"
CASES = "prepared_cases"  # no dataset has a folder of this name: by it a store is known, finished or not

SALIENCY_AGAIN = "write the saliency anew with spade-saliency"

VoxelBox = tuple[tuple[int, int, int], tuple[int, int, int]]  # start and stop, along i, j, k


@dataclass(frozen=True, eq=False)
class StoredCase:
    """All that is known of one stored scan, short of its voxels."""

    name: str
    subject: str
    part: str  # "training", "validation", "test" or "" where the dataset does not say
    modality: str
    affine: np.ndarray  # (4, 4) stored voxel -> mm
    shape: tuple[int, int, int]
    normalisation: Normalisation
    source: str  # path of the image as given
    source_grid: Grid
    label_values: tuple[int, ...]  # present in the stored labels, background left out
    has_labels: bool
    body_box_mm: tuple[tuple[float, float, float], tuple[float, float, float]]
    fingerprint: str  # sha256 of the decoded voxels of the source, whatever its header says
    notes: tuple[str, ...]
    signature: str  # of the source files and of all that decides what is stored: prepared anew when it changes
    image: ArrayFile
    labels: ArrayFile | None
    truth: ArrayFile | None  # the labels on the source's grid, where that is another one
    saliency: ArrayFile | None = None  # where to look, on the stored grid; none in stores older than it
    saliency_source: str = ""  # one of SOURCES (channels.py); "" without saliency
    likeness: str = ""  # what the source shows, whatever its grid and units (likeness.py); "" in stores older than it

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between stored voxels along i, j, k."""
        return spacing_of(self.affine)

    @property
    def files(self) -> tuple[ArrayFile, ...]:
        """The arrays of this case."""
        arrays = (self.image, self.labels, self.truth, self.saliency)
        return tuple(array for array in arrays if array is not None)

    def remedy(self, array: ArrayFile) -> str:
        """What to do when one of `files` is damaged."""
        return SALIENCY_AGAIN if array == self.saliency else AGAIN

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON keeps to the last digit."""
        values = asdict(self)
        grid = {"shape": list(self.source_grid.shape), "affine": np.asarray(self.source_grid.affine).tolist()}
        return values | {"affine": np.asarray(self.affine).tolist(), "source_grid": grid}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StoredCase":
        """The inverse of `to_dict`; KeyError or TypeError for anything else."""
        (r0, a0, s0), (r1, a1, s1) = values["body_box_mm"]
        grid = values["source_grid"]
        return cls(
            **{name: values[name] for name in ("name", "subject", "part", "modality", "source", "has_labels")},
            **{name: values[name] for name in ("fingerprint", "signature")},
            affine=np.array(values["affine"], dtype=np.float64),
            shape=_three(values["shape"]),
            normalisation=Normalisation(**values["normalisation"]),
            source_grid=Grid(_three(grid["shape"]), np.array(grid["affine"], dtype=np.float64)),
            label_values=tuple(values["label_values"]),
            body_box_mm=((r0, a0, s0), (r1, a1, s1)),
            notes=tuple(values["notes"]),
            image=ArrayFile(**values["image"]),
            **{name: None if values[name] is None else ArrayFile(**values[name]) for name in ("labels", "truth")},
            saliency=None if values.get("saliency") is None else ArrayFile(**values["saliency"]),
            saliency_source=values.get("saliency_source", ""),
            likeness=values.get("likeness", ""),
        )


@dataclass(frozen=True, eq=False)
class Contents:
    """What index.json says."""

    dataset: str
    layout: str
    root: str
    notes: tuple[str, ...]
    label_names: Mapping[int, str]
    preprocessing: Preprocessing
    cases: tuple[StoredCase, ...]
    rejected: tuple[dict[str, str], ...]  # {"name": ..., "reason": ...}

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON keeps to the last digit."""
        return {
            **{name: getattr(self, name) for name in ("dataset", "layout", "root")},
            "notes": list(self.notes),
            "label_names": {str(value): name for value, name in self.label_names.items()},
            "preprocessing": self.preprocessing.to_dict(),
            "cases": [case.to_dict() for case in self.cases],
            "rejected": list(self.rejected),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Contents":
        """The inverse of `to_dict`; KeyError or TypeError for anything else."""
        return cls(
            **{name: values[name] for name in ("dataset", "layout", "root")},
            notes=tuple(values["notes"]),
            label_names={int(value): name for value, name in values["label_names"].items()},
            preprocessing=Preprocessing.from_dict(values["preprocessing"]),
            cases=tuple(map(StoredCase.from_dict, values["cases"])),
            rejected=tuple(values["rejected"]),
        )


class VolumeStore:
    """Prepared scans, read box by box. Open with `VolumeStore.open`; may be pickled to workers, and forked."""

    def __init__(self, path: Path, contents: Contents):
        self.path = path
        self.dataset, self.layout, self.root = contents.dataset, contents.layout, contents.root
        self.notes = contents.notes
        self.label_names = dict(contents.label_names)
        self.preprocessing = contents.preprocessing
        self.cases = contents.cases
        self.rejected = list(contents.rejected)
        self._positions = {case.name: i for i, case in enumerate(self.cases)}
        self._arrays = _Arrays()

    @classmethod
    def open(cls, path: Path | str) -> "VolumeStore":
        """The store in a folder; DataFault if there is none, or it is unfinished, damaged, or of a newer program."""
        path = Path(path)
        contents = finished_index(path)
        for case in contents.cases:
            for array in case.files:
                fault = size_fault(path, array)
                if fault:
                    raise DataFault(f"{path}: case {case.name}: {fault}; {case.remedy(array)}")
        return cls(path, contents)

    def __len__(self) -> int:
        return len(self.cases)

    def index_of(self, name: str) -> int:
        """Where the case of that name stands in `cases`; KeyError if it is not there."""
        return self._positions[name]

    def image(self, i: int, box: VoxelBox | None = None) -> np.ndarray:
        """The stored int16 voxels of a case, or of a box (start, stop) within it: only its chunks are decompressed.

        ValueError for a box that leaves the array; DataFault for an array that is damaged on disk.
        """
        return self._read(self.cases[i], self.cases[i].image, box)

    def labels(self, i: int, box: VoxelBox | None = None) -> np.ndarray:
        """The stored uint16 label values, as `image`; ValueError for a case without labels."""
        array = self.cases[i].labels
        if array is None:
            raise ValueError(f"case {self.cases[i].name} has no labels")
        return self._read(self.cases[i], array, box)

    def saliency(self, i: int, box: VoxelBox | None = None) -> np.ndarray:
        """Where a reader looked, uint8 on the stored grid (0..255 is saliency 0..1), as `image`; the case's
        `saliency_source` says what it is made of. ValueError for a case without saliency.
        """
        array = self.cases[i].saliency
        if array is None:
            raise ValueError(f"case {self.cases[i].name} has no saliency")
        return self._read(self.cases[i], array, box)

    def truth(self, i: int) -> np.ndarray:
        """The uint16 label values on the grid of the case's source, canonical axes: what a prediction is held against.

        Resampled labels would judge a prediction by what resampling lost. ValueError for a case without labels.
        """
        case = self.cases[i]
        return self.labels(i) if case.truth is None else self._read(case, case.truth, None)

    def verify(self) -> list[DataFault]:
        """Read every file of the store anew; what is wrong with it, nothing if all is well."""
        faults = []
        for case in self.cases:
            for array in case.files:
                fault = size_fault(self.path, array) or checksum_fault(self.path, array)
                if fault:
                    faults.append(DataFault(f"{self.path}: case {case.name}: {fault}; {case.remedy(array)}"))
        return faults

    def _read(self, case: StoredCase, array: ArrayFile, box: VoxelBox | None) -> np.ndarray:
        opened = self._arrays.of_this_process()
        handle = opened.get(array.file)
        if handle is None:
            fault = size_fault(self.path, array) or checksum_fault(self.path, array)
            if fault:
                raise DataFault(f"{self.path}: case {case.name}: {fault}; {case.remedy(array)}")
            handle = opened[array.file] = blosc2.open(str(self.path / array.file), mode="r", dparams=READING)
        start, stop = box if box is not None else ((0, 0, 0), handle.shape)
        if not all(0 <= a < b <= n for a, b, n in zip(start, stop, handle.shape, strict=True)):
            raise ValueError(f"box {start} to {stop} leaves the {handle.shape} voxels of case {case.name}, or is empty")
        return handle[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_arrays": _Arrays()})


class _Arrays(threading.local):
    """Open arrays by file: of one process and one thread, since a handle stands neither a fork nor two threads."""

    def __init__(self) -> None:
        self.process, self.handles = os.getpid(), {}

    def of_this_process(self) -> dict[str, Any]:
        if self.process != os.getpid():
            self.process, self.handles = os.getpid(), {}
        return self.handles


def is_store(path: Path) -> bool:
    """Whether spade-prepare wrote into this folder, finished or not."""
    return (path / CASES).is_dir()


def case_key(name: str) -> str:
    """A folder name for a case: legible, of bounded length, one per name whatever characters that holds."""
    legible = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:64]
    return f"{legible}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:10]}"


def read_index(store: Path) -> Contents | None:
    """What the index of a store says, None if it has none; DataFault if that cannot be read."""
    try:
        with uncollected():
            content = read_json(store / INDEX)
            return None if content is None else Contents.from_dict(content)
    except (KeyError, TypeError, ValueError) as problem:
        raise Damaged(f"{store / INDEX}: damaged, not the index of a store; {AGAIN}") from problem


def finished_index(store: Path) -> Contents:
    """What the index of a store says; DataFault where there is no store, or an unfinished one."""
    contents = read_index(store)
    if contents is not None:
        return contents
    if is_store(store):
        raise DataFault(f"{store}: the store was not finished; {AGAIN}")
    found = "not a store (it holds no index.json)" if store.is_dir() else "no such folder"
    raise DataFault(f"{store}: {found}; give the folder that spade-prepare wrote")


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the search for cycles of garbage: it looks at all that an index holds again and again while that is read,
    longer for each case the more there are (10,000 cases: 0.7 of the time without it)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _three(values: Any) -> tuple[int, int, int]:
    i, j, k = map(int, values)
    return i, j, k
