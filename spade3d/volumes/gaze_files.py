"""Gaze files -> fixations: where readers looked, by case, in the numbers of the file.

Three kinds are read (papers/span_focuscontrast_clarity.md, 2.7):

CT-ScanGaze JSON  one object or a list of them: name, subject (the reader), X[], Y[], Z[] (slice), T[] (seconds that
                  each fixation lasted); counted from 1, as the authors' code does
GazeMedSeg CSV    IMAGE ("CASE_12.jpg": case and slice), CURRENT_FIX_X and _Y (shares of the slice's width and height),
                  CURRENT_FIX_DURATION (ms); instead of the number in IMAGE there may be a column SLICE
plain CSV         case, x, y, z (voxels), duration_s; a column reader is kept

Records and lines that cannot be read are left out one by one, and the rest is kept, as long as that is half of it.

X runs along the first axis of the scan's own file, Y along the second, Z along the third. No file says which way its
viewer showed the scan: gaze that was recorded on flipped or turned slices must be turned back first.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.volume import scan_stem

LONG_S = 10.0  # longer than eyes rest: where half of a file's durations are, they are no seconds
FEW = 5  # fixations: that fewer of them come in the order of their durations happens by chance
STRAY = 0.5  # share of a recording that is wrong above which all of it is of another kind, or of another scan
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


LeaveOut = Callable[[DataFault, int], None]  # told what is left out of a file, and how many fixations that is


def leave_nothing_out(fault: DataFault, fixations: int) -> None:
    """The first fault ends the reading."""
    raise fault


def read_fixations(
    path: Path, *, first_slice: int | None = None, leave_out: LeaveOut = leave_nothing_out
) -> list[Fixations]:
    """Every fixation of a file, or of the .json and .csv files below a folder.

    first_slice  the number that the files give to the first slice, 0 or 1; None: 1 in JSON, 0 in CSV
    leave_out    called for records and lines that cannot be read; by default the first is a DataFault
    DataFault for a file that cannot be read, lacks a column or mostly holds something else than numbers.
    """
    if first_slice not in (None, 0, 1):
        raise ValueError(f"first_slice {first_slice}: 0 or 1")
    return [found for file in gaze_files(path) for found in _read(file, first_slice, leave_out)]


def gaze_files(path: Path) -> list[Path]:
    """The file itself, or the .json and .csv files below a folder; DataFault where there is none."""
    files = sorted(file for kind in ("*.json", "*.csv") for file in path.rglob(kind)) if path.is_dir() else [path]
    if not files:
        raise DataFault(f"{path}: holds no gaze, that is no .json and no .csv file; give the file or its folder")
    return files


def _read(file: Path, first: int | None, leave_out: LeaveOut) -> Iterator[Fixations]:
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
        yield from _read_json(file, text, 1 if first is None else first, leave_out)
    else:
        yield from _read_csv(file, text, 0 if first is None else first, leave_out)


def _read_json(file: Path, text: str, first: int, leave_out: LeaveOut) -> Iterator[Fixations]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DataFault(f"{file}: damaged JSON ({problem}); export it again") from problem
    if content == []:
        raise DataFault(f"{file}: no fixations (an empty list); export it again, or leave it out")
    for number, record in enumerate(content if isinstance(content, list) else [content]):
        try:
            yield _of_record(f"{file}, record {number + 1}", record, first, leave_out)
        except DataFault as fault:
            leave_out(fault, _longest(record))


def _of_record(where: str, record: Any, first: int, leave_out: LeaveOut) -> Fixations:
    if not isinstance(record, dict):
        raise DataFault(f"{where}: a {type(record).__name__}; an object with {', '.join(JSON_KEYS)} is needed")
    missing = [key for key in JSON_KEYS if key not in record]
    if missing:
        found = ", ".join(sorted(map(str, record))[:12])
        raise DataFault(f"{where}: no {', '.join(missing)} (found: {found}); {', '.join(JSON_KEYS)} are needed")
    lists = {key: record[key] if isinstance(record[key], list) else [record[key]] for key in "XYZT"}
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataFault(f"{where}: lists of different lengths {lengths}; one entry a fixation is needed in each")
    rows, faults = [], []
    for number, cells in enumerate(zip(*lists.values(), strict=True), start=1):
        at = f"{where}, fixation {number}"
        try:
            place = [_number(at, *of) for of in zip("XYZ", cells[:3], strict=True)]
            rows.append([*place, _duration(at, "T", cells[3])])
        except DataFault as fault:
            faults.append(fault)
    if not rows and not faults:
        raise DataFault(f"{where}: no fixations (its lists are empty); export it again, or leave it out")
    _leave_out_few(faults, len(rows), leave_out)
    values = np.array(rows, dtype=np.float64).reshape(-1, 4)
    reader = str(record.get("subject", ""))
    return Fixations(str(record["name"]), reader, values[:, :3], values[:, 3], first, False, where)


def _longest(record: Any) -> int:
    """How many fixations a record that cannot be read may have held."""
    lists = [record[key] for key in "XYZT" if key in record] if isinstance(record, dict) else []
    return max((len(values) for values in lists if isinstance(values, list)), default=0)


def _read_csv(file: Path, text: str, first: int, leave_out: LeaveOut) -> Iterator[Fixations]:
    rows = list(csv.reader(text.splitlines()))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    per_slice = set(PER_SLICE) <= set(header)
    if not per_slice and not set(PLAIN) <= set(header):
        raise DataFault(f"{file}: columns {', '.join(rows[0]) if rows else 'none'}; {NEEDED}")
    table: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    read, faults = 0, []
    for number, cells in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        try:
            of, values = _of_line(f"{file}, line {number}", header, cells, per_slice)
        except DataFault as fault:
            faults.append(fault)
        else:
            table.setdefault(of, []).append(values)
            read += 1
    if not read and not faults:
        raise DataFault(f"{file}: no fixations (only a header); export it again, or leave it out")
    _leave_out_few(faults, read, leave_out)
    for (case, reader), fixations in table.items():
        values = np.array(fixations)
        yield Fixations(case, reader, values[:, :3], values[:, 3], first, per_slice, str(file))


def _of_line(
    where: str, header: Sequence[str], cells: Sequence[str], per_slice: bool
) -> tuple[tuple[str, str], tuple[float, float, float, float]]:
    """((case, reader), (x, y, slice, seconds)) of a line of a table."""
    if len(cells) != len(header):
        raise DataFault(f"{where}: {len(cells)} cells under {len(header)} columns; correct the line")
    row = dict(zip(header, cells, strict=True))
    case, z = _slice_of(where, row) if per_slice else (row["case"].strip(), row["z"])
    x, y, duration = PER_SLICE[1:] if per_slice else ("x", "y", "duration_s")
    seconds = _duration(where, duration, row[duration]) * (1e-3 if per_slice else 1.0)
    place = (_number(where, x, row[x]), _number(where, y, row[y]), _number(where, "slice", z))
    return (case, row.get("reader", "").strip()), (*place, seconds)


def _leave_out_few(faults: Sequence[DataFault], read: int, leave_out: LeaveOut) -> None:
    """Leave out what could not be read beside `read` fixations that could; where it is most, that is the fault."""
    if not faults:
        return
    if len(faults) > STRAY * (len(faults) + read):
        raise faults[0]
    more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
    leave_out(DataFault(f"{faults[0]}{more}"), len(faults))


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


def _duration(where: str, name: str, value: Any) -> float:
    number = _number(where, name, value)
    if number < 0:
        raise DataFault(f"{where}: {name} is {number:g}, and nothing lasts less than 0; correct it")
    return number


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise DataFault(f"{where}: {name} holds {str(value).lower()}, which is no number; correct it")
    try:
        number = float(value)
    except (TypeError, ValueError) as problem:
        raise DataFault(f"{where}: {name} holds what is no number ({problem}); correct it") from problem
    if not math.isfinite(number):
        raise DataFault(f"{where}: {name} holds NaN or infinity; correct it, or leave that fixation out")
    return number


def last_too_long(fixations: Sequence[Fixations]) -> bool:
    """Whether half of what a file says lasted longer than eyes rest, as where milliseconds stand for seconds."""
    return bool(np.median(np.concatenate([one.seconds for one in fixations])) > LONG_S)


def never_shorter(fixations: Sequence[Fixations]) -> bool:
    """Whether in half of the recordings of a file each duration is as long as the one before, as times are."""
    many = [one.seconds for one in fixations if len(one.seconds) >= FEW]
    rising = [bool((np.diff(seconds) >= 0).all() and seconds[-1] > seconds[0]) for seconds in many]
    return 2 * sum(rising) >= len(rising) > 0


def match_case(name: str, known: Mapping[str, str]) -> str | None:
    """The case that a gaze file means, whatever ending or folder it writes with the name; None if there is none.

    known: case name -> path of its scan.
    """
    if name in known:
        return name
    wanted = scan_stem(Path(name))
    fitting = [case for case, scan in known.items() if wanted in (case, Path(case).name, scan_stem(Path(scan)))]
    return fitting[0] if len(fitting) == 1 else None
