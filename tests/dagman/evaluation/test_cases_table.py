"""cases.csv there and back; a damaged one is named."""

import math

import numpy as np
import pytest

from dagman.evaluation.cases_table import COLUMNS, LATER, read_cases, write_cases
from spade3d.faults import DataFault

NAN = math.nan


def row(case: str, dice: float, **more) -> dict:
    judged = {"case": case, "subject": case, "class": 1, "name": "liver", "dice": dice, "hd95_mm": 5.0, "nsd": 0.25}
    return judged | {"voxels_true": 100, "voxels_predicted": 90} | more


def test_cases_csv_there_and_back(tmp_path):
    rows = [
        row('odd, "name"\nü', 1 / 3),
        row("q", NAN, **{"class": 2}, name="spleen", hd95_mm=NAN, nsd=NAN, voxels_true=0),
    ]
    rows[0].update(dice=np.float64(1 / 3), voxels_true=np.int64(7))
    path = tmp_path / "cases.csv"
    write_cases(path, rows)
    assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(COLUMNS)
    assert path.read_text(encoding="utf-8").splitlines()[-1] == "q,q,2,spleen,,,,0,90"
    there, empty = read_cases(path)
    assert there == rows[0] and isinstance(there["voxels_true"], int)
    assert math.isnan(empty["dice"]) and math.isnan(empty["hd95_mm"]) and empty["voxels_predicted"] == 90
    assert [file.name for file in tmp_path.iterdir()] == ["cases.csv"]
    # Later columns come after the frozen ones, and an older table has none of them, not even empty.
    assert "asd_mm" not in there
    newer = tmp_path / "newer.csv"
    write_cases(newer, [one | {"asd_mm": 1.5, "volume_difference_ml": NAN} for one in rows])
    assert newer.read_text(encoding="utf-8").splitlines()[0] == ",".join((*COLUMNS, *LATER))
    again = read_cases(newer)[0]
    assert again["asd_mm"] == 1.5 and math.isnan(again["volume_difference_ml"]) and again["dice"] == there["dice"]
    # A failure half-way leaves the old table whole.
    with pytest.raises(KeyError):
        write_cases(path, [rows[0], {"case": "broken"}])
    assert read_cases(path)[0] == there


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a readable cases.csv"),
        ("", "the columns are nothing"),
        ("case,dice\n", "the columns are case,dice"),
        (",".join(COLUMNS) + ",hausdorff\n", "after them at most asd_mm,volume_difference_ml"),
        (",".join(COLUMNS) + ",volume_difference_ml\n", "after them at most asd_mm,volume_difference_ml"),
        (",".join(COLUMNS) + ",asd_mm\np,p,1,liver,1,1,1,5,5,far\n", r"row 2 \(p\).*'far'"),
        (",".join(COLUMNS) + "\np,p,1,liver,0.5\n", "row 2 has 5 cells; 9 are needed"),
        (",".join(COLUMNS) + "\np,p,1,liver,high,1,1,5,5\n", r"row 2 \(p\).*'high'"),
        (",".join(COLUMNS) + "\np,p,1.5,liver,1,1,1,5,5\n", r"row 2 \(p\).*'1.5'"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, text, message):
    path = tmp_path / "cases.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(DataFault, match=message):
        read_cases(path)
