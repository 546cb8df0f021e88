"""Body frames are found once for a set of scans, and kept with their store."""

import os
import shutil

import numpy as np
import pytest

from spade3d.faults import DataFault
from spade3d.recipes import placing
from spade3d.recipes.placing import KEPT, placed
from spade3d.recipes.spade import SpadeSettings
from spade3d.scans import open_scans
from spade3d.volumes.body_frame import box_frames
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.store import VolumeStore


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearts")
    write_dataset("heart-mr", folder / "scans", patients=0, unlabelled=3, seed=2, shape=(40, 32, 24))
    return open_scans(folder / "scans", folder / "store", SpadeSettings().data).path


@pytest.fixture
def store(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "store")
    return VolumeStore.open(tmp_path / "store")


@pytest.fixture
def asked(monkeypatch):
    """What was looked for; the second scan cannot be placed."""
    calls = []

    def finding(store, cases, method, *, seed, progress):
        calls.append((tuple(cases), method, seed))
        frames = box_frames([store.cases[i].body_box_mm for i in cases])
        return {i: None if i == 1 else frame for i, frame in zip(cases, frames, strict=True)}

    monkeypatch.setattr(placing, "place_scans", finding)
    return calls


def test_the_same_scans_method_and_seed_are_placed_once(store, asked, capsys):
    found = placed(store, [0, 1, 2], "affine", seed=3, alone="they wait")
    again = placed(VolumeStore.open(store.path), [0, 1, 2], "affine", seed=3, alone="they wait")
    assert asked == [((0, 1, 2), "affine", 3)]
    assert found[1] is None and again[1] is None
    assert all(np.array_equal(found[i].to_frame, again[i].to_frame) for i in (0, 2))
    said = capsys.readouterr().err
    assert said.count(f"1 of 3 scans could not be placed in the body ({store.cases[1].name}): they wait") == 2
    assert said.count("as an earlier run found them") == 1
    for cases, method, seed in [([0, 2], "affine", 3), ([0, 1, 2], "learned", 3), ([0, 1, 2], "affine", 4)]:
        placed(store, cases, method, seed=seed, alone="")
    assert len(asked) == 4


def test_a_scan_that_was_prepared_anew_is_placed_anew(store, asked):
    placed(store, [0, 1], "affine", seed=0, alone="")
    object.__setattr__(store.cases[0], "signature", "of another file")
    placed(store, [0, 1], "affine", seed=0, alone="")
    assert len(asked) == 2


def test_boxes_are_not_kept(store, asked):
    for _ in range(2):
        placed(store, [0, 1], "box", seed=0, alone="")
    assert len(asked) == 2 and not (store.path / KEPT).exists()


def test_a_store_that_cannot_be_written_keeps_nothing_and_says_so(store, asked, capsys, monkeypatch):
    def refused(*_, **__):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(placing, "save_frames", refused)
    assert placed(store, [0, 2], "affine", seed=0, alone="").keys() == {0, 2}
    assert f"not kept with the store ({store.path / KEPT}: Read-only file system)" in capsys.readouterr().err


def test_a_kept_file_that_is_none_is_refused(store, asked):
    placed(store, [0, 2], "affine", seed=0, alone="")
    (kept,) = (store.path / KEPT).iterdir()
    whole = kept.read_text()
    for harmed, said in (
        ("{", "not a file of body frames; remove it"),
        (whole.replace('"affine"', '"learned"'), "holds learned frames.*remove it"),
        (whole.replace(store.cases[2].name, "another"), "not those of all scans; remove it"),
    ):
        kept.write_text(harmed)
        with pytest.raises(DataFault, match=said):
            placed(store, [0, 2], "affine", seed=0, alone="")
