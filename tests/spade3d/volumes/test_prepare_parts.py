"""A store prepared on many machines at once, each with its share, is the store that one machine makes."""

import json

import numpy as np

from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.prepare import prepare, prepare_part
from spade3d.volumes.preprocessing import Preprocessing

HOW = Preprocessing(spacing=(12.0, 12.0, 12.0))


def test_parts_and_the_last_call_make_the_store_of_one_machine(tmp_path):
    write_dataset("abdomen-ct", tmp_path / "scans", patients=5, shape=(24, 24, 16), spacing=(14.0, 14.0, 14.0))
    (tmp_path / "scans" / "RawData" / "Training" / "img" / "img0002.nii.gz").write_bytes(b"damaged")
    scans, shared = read_layout(tmp_path / "scans"), tmp_path / "shared"
    left_out = [prepare_part(scans, shared, HOW, part, 3) for part in (3, 1, 2)]
    assert sorted(len(one) for one in left_out) == [0, 0, 1] and not (shared / "index.json").exists()
    written = {path: path.stat().st_mtime_ns for path in shared.glob("prepared_cases/*/*.b2nd")}

    both = prepare(scans, shared, HOW), prepare(scans, tmp_path / "alone", HOW)
    assert {path.parent.name[:7] for path in written} == {"img0001", "img0003", "img0004", "img0005"}
    assert {path: path.stat().st_mtime_ns for path in shared.glob("prepared_cases/*/*.b2nd")} == written, (
        "a case was prepared twice"
    )
    ours, its = (
        json.loads((tmp_path / name / "index.json").read_text(encoding="utf-8")) for name in ("shared", "alone")
    )
    assert ours == its
    assert all(np.array_equal(both[0].image(case), both[1].image(case)) for case in range(4))
