"""The table cases.csv that a run of segmentation leaves: one row a case and structure, what it was judged by.

COLUMNS are frozen; what is judged since stands after them.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from dagman.evaluation.pairs import Row
from spade3d.faults import DataFault
from spade3d.whole_file import whole_file

COLUMNS = ("case", "subject", "class", "name", "dice", "hd95_mm", "nsd", "voxels_true", "voxels_predicted")
LATER = ("asd_mm", "volume_difference_ml")  # after COLUMNS, which are frozen; older tables have none or the first few
WHOLE = ("class", "voxels_true", "voxels_predicted")
REAL = ("dice", "hd95_mm", "nsd", *LATER)


def write_cases(path: Path, rows: Iterable[Row]) -> None:
    """Write `cases.csv`: exactly COLUMNS and those of LATER that the rows have, an empty cell for NaN, all digits of a
    number; whole or not at all."""
    rows = list(rows)
    columns = (*COLUMNS, *(name for name in LATER if rows and name in rows[0]))
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow("" if row[name] != row[name] else row[name] for name in columns)
        text.detach()


def read_cases(path: Path) -> list[dict[str, str | int | float]]:
    """The rows of `cases.csv`, an empty metric as NaN. Raises DataFault with the line that cannot be read.

    The columns are COLUMNS and after them none, the first or all of LATER. What an older table does not have, its rows
    do not have, either: no number is made up for it.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFault(f"{path}: not a readable cases.csv ({error}); run dagman-finetune to make it") from error
    columns = tuple(lines[0]) if lines else ()
    if len(columns) < len(COLUMNS) or columns != (*COLUMNS, *LATER)[: len(columns)]:
        found = ",".join(columns) or "nothing"
        raise DataFault(
            f"{path}: the columns are {found}; {','.join(COLUMNS)} are needed, and after them at most {','.join(LATER)}"
        )
    return [_parsed(path, columns, number, line) for number, line in enumerate(lines[1:], start=2)]


def _parsed(path: Path, columns: tuple[str, ...], number: int, line: list[str]) -> dict[str, str | int | float]:
    if len(line) != len(columns):
        raise DataFault(f"{path}: row {number} has {len(line)} cells; {len(columns)} are needed")
    row: dict[str, str | int | float] = dict(zip(columns, line))
    try:
        row.update({name: int(row[name]) for name in WHOLE})
        row.update({name: float(row[name] or "nan") for name in REAL if name in row})
    except ValueError as error:
        raise DataFault(f"{path}: row {number} ({row['case']}): {error}") from error
    return row
