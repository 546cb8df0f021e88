"""Frames in which two patients' places compare: the box, the choice among them, and their file."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.body_frame import (
    BodyFrame,
    box_frames,
    load_frames,
    of_typical_size,
    save_frames,
)
from spade3d.volumes.frame_methods import place_scans
from spade3d.volumes.geometry import stretch


@given(
    low=st.tuples(*[st.floats(-500, 400)] * 3),
    size=st.tuples(*[st.floats(1, 600)] * 3),
    others=st.integers(0, 4),
)
@settings(max_examples=50, deadline=None)
def test_frames_centre_each_body_and_give_it_the_median_size(low, size, others):
    low, size = np.array(low), np.array(size)
    boxes = [(tuple(low.tolist()), tuple((low + size).tolist()))]
    boxes += [((0.0, 0.0, 0.0), (300.0 + n, 200.0, 400.0 - n)) for n in range(others)]
    median = np.median([np.subtract(high, low) for low, high in boxes], axis=0)
    for (low_mm, high_mm), frame in zip(boxes, box_frames(boxes), strict=True):
        placed = frame.place(np.array([low_mm, high_mm]))
        assert np.allclose(placed, [-median / 2, median / 2], atol=1e-6)


def test_one_scan_alone_keeps_its_millimetres():
    (frame,) = box_frames([((10.0, 20.0, 30.0), (110.0, 60.0, 50.0))])
    assert frame.place(np.array([60.0, 40.0, 47.0])) == pytest.approx([0, 0, 7])
    assert box_frames([]) == []
    with pytest.raises(ValueError, match="without extent"):
        box_frames([((0.0, 0.0, 0.0), (0.0, 1.0, 1.0))])


def test_box_places_the_cases_that_are_asked_for(in_memory):
    store = in_memory([np.zeros((10, 8, 6))] * 2 + [np.zeros((20, 8, 6))])
    placed = place_scans(store, [2, 0], "box")
    assert list(placed) == [2, 0]
    assert placed[2].place(np.array([9.5 + 10, 3.5, 2.5])) == pytest.approx([7.5, 0, 0])  # 20 mm shown as 15
    with pytest.raises(UsageFault, match="'afine'.*box, affine, learned"):
        place_scans(store, [0], "afine")


def test_the_typical_scan_keeps_its_millimetres():
    found = {n: (stretch(np.full(3, scale), np.ones(3)), 0.5) for n, scale in enumerate((0.5, 0.8, 2.0))} | {7: None}
    frames = of_typical_size(found)
    assert np.allclose(frames[1].to_frame, stretch(np.ones(3), np.full(3, 1.25)))
    assert frames[7] is None
    assert of_typical_size({0: None}) == {0: None}


def test_frames_come_back_to_the_last_digit(tmp_path):
    matrix = np.diag([1 / 3, np.nextafter(1, 2), 1e-17, 1.0])
    save_frames(tmp_path / "frames.json", {"a": BodyFrame(matrix, 0.1), "b": None}, "affine")
    frames, method = load_frames(tmp_path / "frames.json")
    assert method == "affine" and frames["b"] is None
    assert frames["a"].to_frame.tobytes() == matrix.tobytes() and frames["a"].confidence == 0.1


@pytest.mark.parametrize(
    "change", [{"scans": {"a": {"to_frame": [[1]], "confidence": 1}}}, {"scans": 3}, {"format": "x"}]
)
def test_a_file_of_something_else_is_named(tmp_path, change):
    path = tmp_path / "frames.json"
    save_frames(path, {"a": BodyFrame(np.eye(4))}, "box")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))
    with pytest.raises(DataFault, match="frames.json: .*remove it"):
        load_frames(path)
    with pytest.raises(DataFault, match="cannot be read"):
        load_frames(tmp_path / "none.json")
