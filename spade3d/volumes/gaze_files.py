"""Gaze files -> fixations: where readers looked, by case, in the numbers of the file.

Three kinds are read (papers/span_focuscontrast_clarity.md, 2.7):

CT-ScanGaze JSON  one object or a list of them: name, subject (the reader), X[], Y[], Z[] (slice), T[] (seconds that
                  each fixation lasted); counted from 1, as the authors' code does
GazeMedSeg CSV    IMAGE ("CASE_12.jpg": case and slice), CURRENT_FIX_X and _Y (shares of the slice's width and height),
                  CURRENT_FIX_DURATION (ms); instead of the number in IMAGE there may be a column SLICE
plain CSV         case, x, y, z (voxels), duration_s; a column reader is kept

X runs along the first axis of the scan's own file, Y along the second, Z along the third. No file says which way its
viewer showed the scan: gaze that was recorded on flipped or turned slices must be turned back first.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.volume import scan_stem

JSON_KEYS = ("name", "X", "Y", "Z", "T")
PLAIN = ("case", "x", "y", "z", "duration_s")
PER_SLICE = ("image", "current_fix_x", "current_fix_y", "current_fix_duration")
NEEDED = (
    "needed are case, x, y, z, duration_s; or IMAGE, CURRENT_FIX_X, CURRENT_FIX_Y, CURRENT_FIX_DURATION (case and "
    "slice number in IMAGE, or the slice in SLICE)"
)


@dataclass(frozen=True, eq=False)
class Fixations:
    """What one file says of one reader and one case.

    points  (n, 3): x, y, z as written: voxels counted from `first`, or with `shares` x and y as shares 0..1 of the
            slice (its left and upper faces are 0); z is always a slice counted from `first`
    """

    case: str
    reader: str
    points: np.ndarray
    seconds: np.ndarray  # (n,)
    first: int  # the number of the first slice (and voxel): 0 or 1
    shares: bool
    source: str  # of the file, for messages


def read_fixations(path: Path, *, first_slice: int | None = None) -> list[Fixations]:
    """Every fixation of a file, or of the .json and .csv files below a folder.

    first_slice  the number that the files give to the first slice, 0 or 1; None: 1 in JSON, 0 in CSV
    DataFault for a file that cannot be read, lacks a column or holds something else than numbers.
    """
    if first_slice not in (None, 0, 1):
        raise ValueError(f"first_slice {first_slice}: 0 or 1")
    return [found for file in gaze_files(path) for found in _read(file, first_slice)]


def gaze_files(path: Path) -> list[Path]:
    """The file itself, or the .json and .csv files below a folder; DataFault where there is none."""
    files = sorted(file for kind in ("*.json", "*.csv") for file in path.rglob(kind)) if path.is_dir() else [path]
    if not files:
        raise DataFault(f"{path}: holds no gaze, that is no .json and no .csv file; give the file or its folder")
    return files


def _read(file: Path, first: int | None) -> Iterator[Fixations]:
    kind = file.suffix.lower()
    if kind not in (".json", ".csv"):
        raise DataFault(f"{file}: {kind or 'no ending'} is no kind of gaze file that is known; .json or .csv is needed")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise DataFault(f"{file}: cannot be read ({problem.strerror}); check the path") from problem
    except UnicodeDecodeError as problem:
        raise DataFault(f"{file}: is no text ({problem.reason}); a .json or .csv of fixations is needed") from problem
    if kind == ".json":
        yield from _read_json(file, text, 1 if first is None else first)
    else:
        yield from _read_csv(file, text, 0 if first is None else first)


def _read_json(file: Path, text: str, first: int) -> Iterator[Fixations]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DataFault(f"{file}: damaged JSON ({problem}); export it again") from problem
    for number, record in enumerate(content if isinstance(content, list) else [content]):
        where = f"{file}, record {number + 1}"
        if not isinstance(record, dict):
            raise DataFault(f"{where}: a {type(record).__name__}; an object with {', '.join(JSON_KEYS)} is needed")
        missing = [key for key in JSON_KEYS if key not in record]
        if missing:
            found = ", ".join(sorted(map(str, record))[:12])
            raise DataFault(f"{where}: no {', '.join(missing)} (found: {found}); {', '.join(JSON_KEYS)} are needed")
        x, y, z, seconds = (_numbers(where, key, record[key]) for key in "XYZT")
        lengths = {key: len(record[key]) for key in "XYZT"}
        if len(set(lengths.values())) > 1:
            raise DataFault(f"{where}: lists of different lengths {lengths}; one entry a fixation is needed in each")
        points = np.stack([x, y, z], axis=1)
        reader = str(record.get("subject", ""))
        yield Fixations(str(record["name"]), reader, points, seconds, first, False, where)


def _read_csv(file: Path, text: str, first: int) -> Iterator[Fixations]:
    rows = list(csv.reader(text.splitlines()))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    per_slice = set(PER_SLICE) <= set(header)
    if not per_slice and not set(PLAIN) <= set(header):
        raise DataFault(f"{file}: columns {', '.join(rows[0]) if rows else 'none'}; {NEEDED}")
    table: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for number, cells in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise DataFault(f"{file}, line {number}: {len(cells)} cells under {len(header)} columns; correct the line")
        row = dict(zip(header, cells, strict=True))
        where = f"{file}, line {number}"
        case, z = _slice_of(where, row) if per_slice else (row["case"].strip(), row["z"])
        x, y, duration = PER_SLICE[1:] if per_slice else ("x", "y", "duration_s")
        values = [*(_numbers(where, name, [row[name]])[0] for name in (x, y)), _numbers(where, "slice", [z])[0]]
        seconds = _numbers(where, duration, [row[duration]])[0] * (1e-3 if per_slice else 1.0)
        table.setdefault((case, row.get("reader", "").strip()), []).append((*map(float, values), float(seconds)))
    for (case, reader), fixations in table.items():
        values = np.array(fixations)
        yield Fixations(case, reader, values[:, :3], values[:, 3], first, per_slice, str(file))


def _slice_of(where: str, row: Mapping[str, str]) -> tuple[str, str]:
    """Case and slice number of a row: from a column SLICE, else from the end of IMAGE."""
    image = row["image"].strip()
    stem = re.sub(r"\.(jpe?g|png|bmp|tiff?|dcm)$", "", image, flags=re.IGNORECASE)
    if row.get("slice", "").strip():
        return stem, row["slice"]
    parts = re.fullmatch(r"(.+?)[_-](\d+)", stem)
    if parts is None:
        raise DataFault(f"{where}: IMAGE {image!r} ends in no slice number; CASE_12.jpg or a column SLICE is needed")
    return parts[1], parts[2]


def _numbers(where: str, name: str, values: Sequence[Any]) -> np.ndarray:
    try:
        numbers = np.array([float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise DataFault(f"{where}: {name} holds what is no number ({problem}); correct it") from problem
    if not np.isfinite(numbers).all():
        raise DataFault(f"{where}: {name} holds NaN or infinity; correct it, or leave those fixations out")
    return numbers


def match_case(name: str, known: Mapping[str, str]) -> str | None:
    """The case that a gaze file means, whatever ending or folder it writes with the name; None if there is none.

    known: case name -> path of its scan.
    """
    if name in known:
        return name
    wanted = scan_stem(Path(name))
    fitting = [case for case, scan in known.items() if wanted in (case, Path(case).name, scan_stem(Path(scan)))]
    return fitting[0] if len(fitting) == 1 else None
