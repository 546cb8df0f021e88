"""Saliency in a store: what is read is what was written, an interruption leaves a whole store, prepare keeps it."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from spade3d.claim import CLAIM, Overruled
from spade3d.faults import DataFault
from spade3d.volumes import channels
from spade3d.volumes.channels import SALIENCY, SOURCES, saliency_lost, write_saliency
from spade3d.volumes.layouts import Case, Dataset
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.sealed import read_json, write_json
from spade3d.volumes.store import CASES, INDEX, VolumeStore
from spade3d.volumes.volume import write_volume

SHAPES = {"a": (20, 18, 12), "b": (12, 10, 9)}


def dataset(folder):
    folder.mkdir(exist_ok=True)
    cases = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        path = folder / f"{name}.nii.gz"
        if not path.exists():
            write_volume(path, np.random.default_rng(seed).integers(-900, 900, shape).astype(np.int16), np.eye(4))
        cases.append(Case(name, f"S-{name}", path, None, "CT"))
    return Dataset("two", "folder of scans", folder, tuple(cases))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels")
    return dataset(folder / "data"), prepare(dataset(folder / "data"), folder / "store", Preprocessing()).path


@pytest.fixture
def store(plain, tmp_path):
    return shutil.copytree(plain[1], tmp_path / "store")


def maps(seed, names="ab"):
    rng = np.random.default_rng(seed)
    return {name: rng.random(SHAPES[name], dtype=np.float32) for name in names}


def test_what_is_read_is_what_was_written_in_steps_of_one_255th(store):
    given = maps(0, "a")
    after = write_saliency(store, given, "gaze")
    assert [(case.saliency is not None, case.saliency_source) for case in after.cases] == [(True, "gaze"), (False, "")]
    assert after.saliency(0).dtype == np.uint8
    assert np.abs(after.saliency(0) / 255 - given["a"]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(after.saliency(0, ((2, 3, 4), (9, 8, 7))), after.saliency(0)[2:9, 3:8, 4:7])
    assert after.cases[0].files[-1] == after.cases[0].saliency and after.verify() == []
    with pytest.raises(ValueError, match="case b has no saliency"):
        after.saliency(1)


def test_replacing_leaves_one_array_a_case_and_the_others_alone(store):
    write_saliency(store, maps(0), "gaze")
    after = write_saliency(store, iter(maps(1, "b").items()), "predicted")
    assert [case.saliency_source for case in after.cases] == ["gaze", "predicted"]
    assert np.allclose(after.saliency(1) / 255, maps(1, "b")["b"], atol=2e-3)
    assert np.allclose(after.saliency(0) / 255, maps(0)["a"], atol=2e-3)
    assert len(list(store.rglob("saliency*"))) == 2


def test_a_store_from_before_saliency_opens(store):
    content = read_json(store / INDEX)
    for case in content["cases"]:
        del case["saliency"], case["saliency_source"]
    write_json(store / INDEX, content)
    assert [case.saliency for case in VolumeStore.open(store).cases] == [None, None]
    assert write_saliency(store, maps(0), "gaze").cases[1].saliency_source == "gaze"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"c": np.zeros((3, 3, 3))}, "holds no case 'c'"),
        ({"a": np.zeros((20, 18, 11))}, r"\(20, 18, 11\) lies on another grid than the stored scan \(20, 18, 12\)"),
        ({"a": np.full((20, 18, 12), 255.0)}, "from 255 to 255; values from 0 to 1"),
        ({"a": np.full((20, 18, 12), np.nan)}, "values from 0 to 1"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_and_the_store_is_as_before(store, bad, said):
    write_saliency(store, maps(0), "gaze")
    before = {path: path.read_bytes() for path in store.rglob("*.*")}
    with pytest.raises(DataFault, match=said):
        write_saliency(store, {"b": maps(1)["b"]} | bad, "labels")
    assert before == {path: path.read_bytes() for path in store.rglob("*.*")}


def test_an_empty_map_is_written_and_noted_once(store):
    notes = []
    after = write_saliency(store, {name: np.zeros(shape) for name, shape in SHAPES.items()}, "gaze", note=notes.append)
    assert not after.saliency(0).any() and len(notes) == 1
    assert notes[0] == "2 of 2 saliency maps are empty (a, b): written as zeros"


def test_killed_at_any_write_the_store_is_whole(plain, tmp_path):
    """Two arrays, two records, the index: killed after each of them, and before what is left over is removed."""
    for kill_at in range(6):
        store = shutil.copytree(plain[1], tmp_path / f"store{kill_at}")
        write_saliency(store, maps(0), "gaze")
        child = os.fork()
        if child == 0:
            _die_at_write(kill_at)
            write_saliency(store, maps(1), "predicted")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        after = VolumeStore.open(store)
        assert after.verify() == []
        seed, source = (1, "predicted") if kill_at == 5 else (0, "gaze")
        assert {case.saliency_source for case in after.cases} == {source}
        assert np.allclose(after.saliency(0) / 255, maps(seed)["a"], atol=2e-3)
        assert all(case.saliency is not None for case in prepare(plain[0], store, Preprocessing()).cases)
        again = write_saliency(store, maps(1), "predicted")
        assert again.verify() == [] and len(list(store.rglob(SALIENCY))) == 2


def _die_at_write(number):
    written = 0

    def counted(original):
        def write(*arguments):
            nonlocal written
            if written == number:
                os._exit(9)
            written += 1
            return original(*arguments)

        return write

    channels.write_array, channels.write_json = counted(channels.write_array), counted(channels.write_json)
    channels.remove_unused = counted(channels.remove_unused)


def test_prepare_keeps_saliency_and_says_when_it_is_gone(plain, tmp_path):
    data = dataset(tmp_path / "data")
    store = prepare(data, tmp_path / "store", Preprocessing()).path
    write_saliency(store, maps(0), "gaze")
    kept = prepare(data, store, Preprocessing())
    assert [case.saliency_source for case in kept.cases] == ["gaze", "gaze"] and kept.verify() == []

    write_volume(
        data.cases[0].image, np.random.default_rng(9).integers(-900, 900, (21, 18, 12)).astype(np.int16), np.eye(4)
    )
    changed = prepare(data, store, Preprocessing())
    assert [case.saliency_source for case in changed.cases] == ["", "gaze"]
    assert saliency_lost("a") in changed.notes and len(list(store.rglob(SALIENCY))) == 1

    new = write_saliency(store, {"a": np.zeros((21, 18, 12))}, "labels")
    assert new.notes == () and new.cases[0].saliency_source == "labels"
    assert prepare(data, store, Preprocessing()).cases[0].saliency_source == "labels"


def test_damaged_saliency_is_found_and_can_be_replaced(store):
    path = store / write_saliency(store, maps(0), "gaze").cases[0].saliency.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataFault, match="case a: .* bytes.*write the saliency anew with spade-saliency"):
        VolumeStore.open(store)
    assert write_saliency(store, maps(0, "a"), "gaze").verify() == []


def test_who_was_overruled_leaves_the_store_to_the_next(store):
    """The arrays may be the next one's by now; the index is not touched."""
    index = (store / INDEX).read_bytes()

    def slept():
        for name, saliency in maps(0).items():
            if name == "b":
                (store / CLAIM).write_text(json.dumps({"process": 7, "host": "far"}))
            yield name, saliency

    with pytest.raises(Overruled, match="process 7 on far has taken over"):
        write_saliency(store, slept(), "gaze")
    assert (store / INDEX).read_bytes() == index and len(list(store.rglob(SALIENCY))) == 2


def test_a_case_that_is_being_prepared_anew_takes_no_saliency(store):
    record = next((store / CASES).glob("a-*/case.json"))
    write_json(record, read_json(record) | {"signature": "another"})
    with pytest.raises(DataFault, match="case a is being prepared anew; run spade-prepare again"):
        write_saliency(store, maps(0), "gaze")
    assert not list(store.rglob(SALIENCY))
    with pytest.raises(DataFault, match="not a store"):
        write_saliency(record.parent, maps(0), "gaze")
    with pytest.raises(ValueError, match=re.escape(f"saliency source 'wishes'; one of {', '.join(SOURCES)}")):
        write_saliency(store, maps(0), "wishes")
    assert json.loads((store / INDEX).read_text(encoding="utf-8"))["content"]["cases"][0]["saliency"] is None
