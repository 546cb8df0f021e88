"""Gaze files: the three kinds are read to the last number, and what is wrong with one is said."""

import json

import numpy as np
import pytest

from spade3d.faults import DataFault
from spade3d.volumes.gaze_files import PER_SLICE, last_too_long, match_case, never_shorter, read_fixations

RECORD = {"name": "P1.nii.gz", "subject": 2, "X": [10, 11.5], "Y": [20, 21], "Z": [3, 4], "T": [0.25, 0.5], "task": "x"}


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_ct_scangaze_json_counts_from_one(tmp_path):
    one, other = read_fixations(written(tmp_path, "g.json", [RECORD, RECORD | {"subject": 1, "T": [1, 2]}]))
    assert (one.case, one.reader, one.first, one.shares) == ("P1.nii.gz", "2", 1, False)
    assert one.points.tolist() == [[10, 20, 3], [11.5, 21, 4]] and one.seconds.tolist() == [0.25, 0.5]
    assert (other.reader, other.seconds.tolist()) == ("1", [1.0, 2.0])
    (zero,) = read_fixations(written(tmp_path, "h.json", RECORD), first_slice=0)
    assert zero.first == 0


def test_gazemedseg_csv_tells_case_and_slice_by_the_image(tmp_path):
    rows = "IMAGE,CURRENT_FIX_INDEX,CURRENT_FIX_X,CURRENT_FIX_Y,CURRENT_FIX_DURATION,CURRENT_FIX_PUPIL\n"
    rows += "Prostate3T-01-0027_14.jpg,1,0.48,0.49,770,2484\nDx_8.png,1,0.25,0.75,49,1\n"
    rows += "Prostate3T-01-0027_15.jpg,2,1,0,50,1\n"
    first, second = read_fixations(written(tmp_path, "fix.csv", rows))
    assert (first.case, first.shares, first.first) == ("Prostate3T-01-0027", True, 0)
    assert first.points.tolist() == [[0.48, 0.49, 14], [1, 0, 15]] and np.allclose(first.seconds, [0.77, 0.05])
    assert (second.case, second.points.tolist()) == ("Dx", [[0.25, 0.75, 8]])
    named = rows.replace("IMAGE,", "image,").replace("CURRENT_FIX_PUPIL", "SLICE")
    assert {one.case for one in read_fixations(written(tmp_path, "s.csv", named))} == {
        "Prostate3T-01-0027_14", "Prostate3T-01-0027_15", "Dx_8"
    }  # fmt: skip


def test_a_plain_csv_is_read_by_case_and_reader(tmp_path):
    rows = "case,reader,x,y,z,duration_s\na,r1,1,2,3,0.5\n\na,r2,4,5,6,0.1\nb,r1,7,8,9,1\n"
    found = read_fixations(written(tmp_path, "plain.csv", rows))
    assert [(one.case, one.reader, one.points.tolist(), one.seconds.tolist()) for one in found] == [
        ("a", "r1", [[1, 2, 3]], [0.5]), ("a", "r2", [[4, 5, 6]], [0.1]), ("b", "r1", [[7, 8, 9]], [1.0])
    ]  # fmt: skip
    assert not any(one.shares for one in found)
    written(tmp_path, "g.json", RECORD)
    assert len(read_fixations(tmp_path)) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("g.csv", "case,x,y,frame\na,1,2,3\n", "columns case, x, y, frame; needed are case, x, y, z, duration_s; or"),
        ("g.csv", "", "columns none; needed are"),
        ("g.csv", "case,x,y,z,duration_s\na,1,2,3\n", "line 2: 4 cells under 5 columns"),
        ("g.csv", "case,x,y,z,duration_s\na,1,2,?,1\n", "line 2: slice holds what is no number"),
        ("g.csv", "case,x,y,z,duration_s\na,1,nan,2,1\n", "y holds NaN"),
        ("g.csv", f"{','.join(PER_SLICE)}\nabc.jpg,0,0,9\n", "'abc.jpg' ends in no slice number"),
        ("g.json", {"name": "a", "X": [1], "Y": [2]}, "no Z, T .found: X, Y, name.; name, X, Y, Z, T are needed"),
        ("g.json", RECORD | {"T": [1]}, "lists of different lengths .*'T': 1"),
        ("g.json", RECORD | {"X": ["a", "b"]}, "record 1, fixation 1: X holds what is no number"),
        ("g.json", RECORD | {"X": [True, 2]}, "record 1, fixation 1: X holds true, which is no number"),
        ("g.json", RECORD | {"T": [0.2, -0.3]}, "record 1, fixation 2: T is -0.3, and nothing lasts less than 0"),
        ("g.csv", "case,x,y,z,duration_s\na,1,2,3,-1\n", "line 2: duration_s is -1, and nothing lasts less"),
        ("g.csv", f"{','.join(PER_SLICE)}\nabc_1.jpg,0,0,-9\n", "line 2: current_fix_duration is -9"),
        ("g.json", "[]", "g.json: no fixations .an empty list"),
        ("g.json", RECORD | {"X": [], "Y": [], "Z": [], "T": []}, "record 1: no fixations .its lists are empty"),
        ("g.csv", "case,x,y,z,duration_s\n", "g.csv: no fixations .only a header"),
        ("g.json", "[1]", "record 1: a int; an object"),
        ("g.json", "{", "damaged JSON"),
        ("g.txt", "", ".txt is no kind of gaze file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, said):
    with pytest.raises(DataFault, match=said):
        read_fixations(written(tmp_path, name, content))


def test_what_cannot_be_read_is_left_out_and_the_rest_is_kept(tmp_path):
    """By record, by line and by fixation; each told once, with how many fixations it held."""
    told = []

    def leave_out(fault, fixations):
        told.append((str(fault), fixations))

    short = RECORD | {"subject": 3, "X": [1, 2, 3]}
    slips = RECORD | {"subject": 4, "X": [1, "?", 3, 4, 5], "Y": [1] * 5, "Z": [1] * 5, "T": [1, 1, 1, None, 1]}
    found = read_fixations(written(tmp_path, "g.json", [short, RECORD, "P2", slips]), leave_out=leave_out)
    assert [(one.reader, one.points[:, 0].tolist()) for one in found] == [("2", [10, 11.5]), ("4", [1, 3, 5])]
    assert [fixations for _, fixations in told] == [3, 0, 2]
    assert "record 1: lists of different lengths" in told[0][0] and "record 3: a str" in told[1][0]
    assert "record 4, fixation 2: X holds what is no number" in told[2][0] and "(and 1 more like it)" in told[2][0]

    told.clear()
    lines = [f"a,{n},2,3,0.5" for n in range(9)]
    lines[4], lines[6] = "a,4,2,?,0.5", "a,6,2,0.5"
    table = "\n".join(["case,x,y,z,duration_s", *lines])
    (one,) = read_fixations(written(tmp_path, "g.csv", table), leave_out=leave_out)
    assert one.points[:, 0].tolist() == [0, 1, 2, 3, 5, 7, 8]
    assert len(told) == 1 and told[0][1] == 2 and "line 6: slice holds what is no number" in told[0][0]
    with pytest.raises(DataFault, match="line 6: slice holds"):
        read_fixations(tmp_path / "g.csv")
    mostly = "\n".join(["case,x,y,z,duration_s", *["a,1,2,?,1"] * 6, *lines[:4]])
    with pytest.raises(DataFault, match="line 2: slice holds what is no number"):
        read_fixations(written(tmp_path, "m.csv", mostly), leave_out=leave_out)
    assert len(told) == 1


def test_a_negative_duration_and_a_truth_value_are_left_out_like_other_bad_values(tmp_path):
    told = []
    record = RECORD | {key: [*range(1, 9)] for key in "XYZ"} | {"T": [0.3, -0.3, *[0.3] * 6]}
    record["X"][4] = True
    (one,) = read_fixations(
        written(tmp_path, "g.json", record), leave_out=lambda fault, many: told.append((str(fault), many))
    )
    assert one.points[:, 1].tolist() == [1, 3, 4, 6, 7, 8] and (one.seconds > 0).all()
    assert len(told) == 1 and told[0][1] == 2 and "T is -0.3" in told[0][0] and "(and 1 more like it)" in told[0][0]


def test_durations_that_are_no_seconds_or_times_are_doubted(tmp_path):
    def of(*seconds):
        some = {key: [1] * len(seconds) for key in "XYZ"}
        return read_fixations(written(tmp_path, "g.json", RECORD | some | {"T": list(seconds)}))

    assert last_too_long(of(200, 350, 90)) and not last_too_long(of(0.2, 0.35, 90))
    assert never_shorter(of(0.2, 0.5, 0.9, 0.9, 1.4)) and not never_shorter(of(0.2, 0.5, 0.9, 1.4))
    assert not never_shorter(of(0.2, 0.5, 0.9, 0.8, 1.4)) and not never_shorter(of(*[0.3] * 6))


def test_a_folder_without_gaze_is_refused(tmp_path):
    with pytest.raises(DataFault, match="holds no gaze"):
        read_fixations(tmp_path)


def test_a_case_is_known_with_its_ending_and_by_its_file():
    known = {"img0001": "/d/img0001.nii.gz", "x/scan": "/d/x/scan.nrrd", "y/scan": "/d/y/scan.nrrd"}
    assert match_case("img0001.nii.gz", known) == match_case("img0001", known) == "img0001"
    assert match_case("x/scan", known) == "x/scan"
    assert match_case("scan.nrrd", known) is None  # two are meant
    assert match_case("img1", known) is None
