"""The store: what is read is what was written, damage is found, and prepare may be killed at any instant."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade3d.faults import DataFault
from spade3d.volumes.layouts import Case, Dataset, read_layout
from spade3d.volumes.prepare import prepare, prepare_part
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.sealed import write_json
from spade3d.volumes.store import CASES, INDEX, VolumeStore, is_store
from spade3d.volumes.volume import write_volume
from spade3d.whole_file import PARTIAL, whole_file

LPS = np.array([[-1.0, 0, 0, 40.0], [0, -1.0, 0, 50.0], [0, 0, 2.0, -30.0], [0, 0, 0, 1]])
RAS = np.diag([1.0, 1.0, 2.0, 1.0])
TABLE = {1: "liver", 2: "spleen"}


def scan(seed, shape=(20, 18, 12)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def case(folder, name, voxels, labels=None, affine=LPS, labels_affine=None, **known):
    """A CT case on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    write_volume(folder / f"{name}.nii.gz", voxels, affine)
    path = None
    if labels is not None:
        path = folder / f"{name}_label.nii.gz"
        write_volume(path, labels.astype(np.uint8), affine if labels_affine is None else labels_affine)
    return Case(name, f"S-{name}", folder / f"{name}.nii.gz", path, known.pop("modality", "CT"), **known)


def dataset(folder, *cases, label_names=None, notes=()):
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    return Dataset("phantoms", "folder of scans", folder, ordered, TABLE if label_names is None else label_names, notes)


def three_cases(folder):
    labels = (scan(7) > 500).astype(np.uint8) + (scan(8) > 900)
    return dataset(
        folder,
        case(folder, "a", scan(0), labels, part="training"),
        case(folder, "b", scan(1, (70, 40, 33)), modality="MR"),
        case(folder, "c", scan(2), labels),
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return prepare(three_cases(folder / "data"), folder / "store", Preprocessing())


def test_what_is_stored_is_what_was_prepared(stored):
    assert [c.name for c in stored.cases] == ["a", "b", "c"]
    assert (len(stored), stored.index_of("c"), stored.rejected) == (3, 2, [])
    assert (stored.dataset, stored.layout, stored.label_names) == ("phantoms", "folder of scans", TABLE)
    a, b, _ = stored.cases
    assert (a.subject, a.part, a.modality, b.modality) == ("S-a", "training", "CT", "MR")
    assert np.array_equal(stored.image(0), scan(0)[::-1, ::-1])
    assert stored.image(0).dtype == np.int16
    assert stored.labels(0).dtype == np.uint16
    assert a.label_values == tuple(np.unique(stored.labels(0))[1:].tolist())
    assert (a.has_labels, b.has_labels, b.label_values) == (True, False, ())
    assert a.spacing == (1.0, 1.0, 2.0)
    assert np.array_equal(a.source_grid.affine, LPS)
    with pytest.raises(ValueError, match="case b has no labels"):
        stored.labels(1)
    with pytest.raises(KeyError):
        stored.index_of("d")


def test_reopening_and_pickling_give_the_same_to_the_last_digit(stored):
    for again in (VolumeStore.open(stored.path), pickle.loads(pickle.dumps(stored))):
        for one, other in zip(stored.cases, again.cases, strict=True):
            assert one.to_dict() == other.to_dict()
        assert again.preprocessing == stored.preprocessing
        assert np.array_equal(again.image(1), stored.image(1))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_box_is_that_part_of_the_whole(stored, data):
    i = data.draw(st.integers(0, 2))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in stored.cases[i].shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, stored.cases[i].shape, strict=True))
    part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert np.array_equal(stored.image(i, (start, stop)), stored.image(i)[part])
    if stored.cases[i].has_labels:
        assert np.array_equal(stored.labels(i, (start, stop)), stored.labels(i)[part])


@pytest.mark.parametrize("box", [((-1, 0, 0), (4, 4, 4)), ((0, 0, 0), (21, 4, 4)), ((3, 3, 3), (3, 4, 4))])
def test_a_box_outside_the_array_is_a_mistake(stored, box):
    with pytest.raises(ValueError, match="leaves the"):
        stored.image(0, box)


def test_threads_may_read_one_store(stored):
    whole = stored.image(1)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda k: stored.image(1, ((k, 0, 0), (k + 8, 40, 33))), range(60)))
    assert all(np.array_equal(part, whole[k : k + 8]) for k, part in enumerate(parts))


def test_a_second_prepare_does_nothing_and_a_changed_source_is_done_again(tmp_path):
    data, out = three_cases(tmp_path / "data"), tmp_path / "store"
    first = prepare(data, out, Preprocessing())
    before = {path: path.stat().st_mtime_ns for path in (out / CASES).rglob("*.*")}
    seen = []
    prepare(data, out, Preprocessing(), progress=lambda done, total, name: seen.append((done, total, name)))
    assert seen == [(1, 3, "a"), (2, 3, "b"), (3, 3, "c")]
    assert before == {path: path.stat().st_mtime_ns for path in (out / CASES).rglob("*.*")}
    write_volume(data.cases[0].image, scan(99), LPS)
    os.utime(data.cases[0].image, ns=(1, 1))
    again = prepare(data, out, Preprocessing())
    assert np.array_equal(again.image(0), scan(99)[::-1, ::-1])
    assert again.cases[0].fingerprint != first.cases[0].fingerprint
    changed = {path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {path for path in before if path.parent.name.startswith("a-")}


def test_a_flipped_bit_is_found_and_prepare_mends_it(tmp_path):
    data, out = three_cases(tmp_path / "data"), tmp_path / "store"
    store = prepare(data, out, Preprocessing())
    assert store.verify() == []
    damaged = out / store.cases[1].image.file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    reopened = VolumeStore.open(out)
    assert np.array_equal(reopened.image(0), scan(0)[::-1, ::-1])
    with pytest.raises(DataFault, match=r"case b: .*image\.b2nd is damaged.*run spade-prepare again"):
        reopened.image(1, ((0, 0, 0), (1, 1, 1)))
    assert [str(fault).count("case b") for fault in reopened.verify()] == [1]
    assert prepare(data, out, Preprocessing()).verify() == []


def test_a_store_that_cannot_be_trusted_is_not_opened(tmp_path):
    out = tmp_path / "store"
    store = prepare(three_cases(tmp_path / "data"), out, Preprocessing())
    index = (out / INDEX).read_text(encoding="utf-8")

    def refusal():
        with pytest.raises(DataFault) as refused:
            VolumeStore.open(out)
        return str(refused.value)

    (out / INDEX).write_text(index.replace('"shape"', '"shope"', 1))
    assert "checksum" in refusal()
    (out / INDEX).write_text(index[: len(index) // 2])
    assert "damaged" in refusal()
    (out / INDEX).write_text(json.dumps(json.loads(index) | {"schema": 99}))
    assert "newer spade3d (schema 99" in refusal()
    with pytest.raises(DataFault, match="schema 99"):
        prepare(three_cases(tmp_path / "data"), out, Preprocessing())
    sealed = json.loads(index)["content"]
    write_json(out / INDEX, sealed | {"preprocessing": sealed["preprocessing"] | {"version": 99}})
    with pytest.raises(DataFault, match="newer spade3d"):
        prepare(three_cases(tmp_path / "data"), out, Preprocessing())
    assert is_store(out)
    assert not is_store(tmp_path / "data")
    (out / INDEX).unlink()
    assert is_store(out)
    assert "not finished; run spade-prepare again" in refusal()
    (out / INDEX).write_text(index)
    array = out / store.cases[2].image.file
    array.write_bytes(array.read_bytes()[:-1])
    assert "case c" in refusal()
    array.unlink()
    assert "cannot be read" in refusal()
    with pytest.raises(DataFault, match="no such folder"):
        VolumeStore.open(tmp_path / "nowhere")
    with pytest.raises(DataFault, match="not a store"):
        VolumeStore.open(tmp_path / "data")


def test_bad_cases_are_named_and_left_out_and_strict_stops(tmp_path):
    folder = tmp_path / "data"
    labels = np.zeros((20, 18, 12), dtype=np.uint8)
    labels[0, 0, :5], labels[1, 1, :3], labels[2, 2, 2] = 7, 9, 1
    shifted = LPS.copy()
    shifted[0, 3] += 0.5
    nan = scan(4).astype(np.float32)
    nan[0, 0, 0] = np.nan
    (folder / "sub").mkdir(parents=True)
    (folder / "text.nii.gz").write_text("no scan")
    data = dataset(
        folder,
        case(folder, "good", scan(0), (labels == 1).astype(np.uint8)),
        case(folder, "values", scan(1), labels),
        case(folder, "shape", scan(2), labels[:-1]),
        case(folder, "origin", scan(3), labels * 0, labels_affine=shifted),
        case(folder, "nan", nan),
        case(folder, "constant", np.full((5, 5, 5), 3, dtype=np.int16)),
        Case("gone", "", folder / "gone.nii.gz", None, "CT"),
        Case("text", "", folder / "text.nii.gz", None, "CT"),
    )
    store = prepare(data, tmp_path / "store", Preprocessing())
    assert [c.name for c in store.cases] == ["good"]
    reasons = {one["name"]: one["reason"] for one in store.rejected}
    assert list(reasons) == ["constant", "gone", "nan", "origin", "shape", "text", "values"]
    assert "label values 7 (5 voxels), 9 (3 voxels) are not in the table (1 liver, 2 spleen)" in reasons["values"]
    assert "another grid than its image: shape" in reasons["shape"]
    assert "origins 0.5 mm apart" in reasons["origin"]
    assert "1 of 4320 voxels are NaN or Inf" in reasons["nan"]
    assert "constant" in reasons["constant"]
    assert "cannot be read" in reasons["gone"]
    assert VolumeStore.open(tmp_path / "store").rejected == store.rejected
    with pytest.raises(DataFault, match="case constant"):
        prepare(data, tmp_path / "strict", Preprocessing(), strict=True)
    only_bad = replace(data, cases=tuple(c for c in data.cases if c.name != "good"))
    with pytest.raises(DataFault, match="none of 7 cases can be used"):
        prepare(only_bad, tmp_path / "none", Preprocessing())
    assert not (tmp_path / "none").exists()
    alone = replace(data, cases=tuple(c for c in data.cases if c.name == "constant"))
    with pytest.raises(DataFault, match=r"^\S+constant\.nii\.gz: constant"):
        prepare(alone, tmp_path / "none", Preprocessing())


def test_what_a_reader_warns_of_is_noted_whoever_reads(tmp_path):
    data = dataset(tmp_path / "scans", *(case(tmp_path / "scans", name, scan(n)) for n, name in enumerate("ab")))
    nib.save(nib.Nifti1Image(scan(0), None), tmp_path / "scans" / "b.nii.gz")
    for workers in (0, 1):
        with warnings.catch_warnings(action="error"):
            store = prepare(data, tmp_path / f"store{workers}", Preprocessing(), workers=workers)
        assert sum("b.nii.gz: neither sform nor qform is set" in note for note in store.notes) == 1


def test_labels_in_another_axis_order_on_the_same_grid_are_turned(tmp_path):
    labels = np.zeros((20, 18, 12), dtype=np.uint8)
    labels[3:9, 4:6, 7:9] = 2
    turned_affine = LPS @ np.array([[0, -1, 0, 19.0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # stored j, -i, k
    turned = labels[::-1].transpose(1, 0, 2)
    data = dataset(tmp_path / "data", case(tmp_path / "data", "a", scan(0), turned, labels_affine=turned_affine))
    store = prepare(data, tmp_path / "store", Preprocessing())
    assert store.rejected == []
    assert np.array_equal(store.labels(0), labels[::-1, ::-1])


@pytest.mark.parametrize("table", [{5: "spleen", 6: "liver"}, {}])
def test_masks_of_structures_become_one_map(tmp_path, table):
    folder = tmp_path / "data"
    liver, spleen = np.zeros((2, 20, 18, 12), dtype=np.uint8)
    liver[2:6], spleen[5:8] = 255, 1
    one = case(folder, "a", scan(0))
    masks = {}
    for name, mask in {"liver": liver, "spleen": spleen}.items():
        masks[name] = folder / f"{name}.nii.gz"
        write_volume(masks[name], mask, LPS)
    store = prepare(dataset(folder, replace(one, labels=masks), label_names=table), tmp_path / "store", Preprocessing())
    table = table or {1: "liver", 2: "spleen"}  # numbered by name where no one says
    value = {name: number for number, name in table.items()}
    assert store.label_names == table
    expected = np.where(liver, value["liver"], 0)
    expected[spleen > 0] = np.maximum(expected, value["spleen"])[spleen > 0]
    assert np.array_equal(store.labels(0), expected[::-1, ::-1])
    assert any("216 voxels lie in more than one mask" in note for note in store.notes)


def test_what_the_user_should_know_is_noted(tmp_path):
    folder = tmp_path / "data"
    empty = np.zeros((20, 18, 12), dtype=np.uint8)
    thin = empty.copy()
    thin[5, :, :] = 3
    data = dataset(
        folder,
        case(folder, "one", scan(0), empty),
        case(folder, "copy", scan(0)[::-1, ::-1], affine=RAS),
        case(folder, "thin", scan(1), thin),
        label_names={},
        notes=("ignored: readme.txt",),
    )
    store = prepare(data, tmp_path / "store", Preprocessing(spacing=(9.0, 1.0, 2.0)))
    assert store.notes[0] == "ignored: readme.txt"
    assert "one: the labels hold background only" in store.notes
    assert "the same voxels under 2 names: copy, one" in store.notes
    assert store.cases[1].has_labels
    assert "thin: label values [3] vanish at this spacing or outside the body" in store.notes
    assert store.label_names == {}
    labelled = prepare(data, tmp_path / "labelled", Preprocessing(), labelled_only=True)
    assert [c.name for c in labelled.cases] == ["one", "thin"]
    assert labelled.label_names == {3: "label 3"}
    unlabelled = replace(data, cases=(data.cases[0],))
    with pytest.raises(DataFault, match="none of 1 cases has labels"):
        prepare(unlabelled, tmp_path / "no", Preprocessing(), labelled_only=True)


def test_nothing_else_is_written_over(tmp_path):
    data, out = three_cases(tmp_path / "data"), tmp_path / "store"
    prepare(data, out, Preprocessing())
    with pytest.raises(DataFault, match=r"mr percentile there, zscore asked for.*another --out"):
        prepare(data, out, Preprocessing(mr="zscore"))
    other = dataset(tmp_path / "other", case(tmp_path / "other", "z", scan(5)))
    with pytest.raises(DataFault, match="another dataset"):
        prepare(other, out, Preprocessing())
    with pytest.raises(DataFault, match="holds files that are no store"):
        prepare(data, tmp_path / "data", Preprocessing())
    with pytest.raises(DataFault, match="is a file"):
        prepare(data, data.cases[0].image, Preprocessing())
    with pytest.raises(DataFault, match="several cases are named a"):
        prepare(replace(data, cases=(data.cases[0], data.cases[0])), tmp_path / "twice", Preprocessing())
    assert VolumeStore.open(out).verify() == []


def test_another_dataset_with_some_of_the_names_does_not_replace_a_store(tmp_path):
    """Patient 1 of one hospital is not patient 1 of another; the store is left as it is."""
    prepare(three_cases(tmp_path / "ours"), tmp_path / "store", Preprocessing())
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}
    theirs = tmp_path / "theirs"
    other = dataset(theirs, case(theirs, "a", scan(50)), case(theirs, "z", scan(51)))
    said = r"store of another dataset \(phantoms, .*ours\), whose scan a has other voxels than .*theirs/a\.nii\.gz;"
    for start in (prepare, lambda *given: prepare_part(*given, 2, 2)):
        with pytest.raises(DataFault, match=said):
            start(other, tmp_path / "store", Preprocessing())
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")} == before
    broken = dataset(tmp_path / "none", Case("a", "", tmp_path / "none" / "a.nii.gz", None, "CT"))
    with pytest.raises(DataFault, match="store of another dataset"):
        prepare(broken, tmp_path / "store", Preprocessing())


def test_a_dataset_that_was_moved_or_copied_keeps_its_store(tmp_path):
    first = prepare(three_cases(tmp_path / "data"), tmp_path / "store", Preprocessing())
    (tmp_path / "data").rename(tmp_path / "moved")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / CASES).rglob("*.*")}

    def found(folder):
        known = {"a": folder / "a_label.nii.gz", "c": folder / "c_label.nii.gz"}
        return [Case(n, f"S-{n}", folder / f"{n}.nii.gz", known.get(n), "MR" if n == "b" else "CT") for n in "abc"]

    prepare(dataset(tmp_path / "moved", *found(tmp_path / "moved")), tmp_path / "store", Preprocessing())
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "a case was prepared anew"
    copied = shutil.copytree(tmp_path / "moved", tmp_path / "copied", copy_function=shutil.copyfile)
    more = dataset(copied, *found(copied), case(copied, "d", scan(9)))
    again = prepare(more, tmp_path / "store", Preprocessing())
    assert [one.name for one in again.cases] == ["a", "b", "c", "d"]
    assert [one.fingerprint for one in again.cases][:3] == [one.fingerprint for one in first.cases]


def test_scans_that_are_gone_from_the_data_leave_the_store_and_are_named(tmp_path):
    data, out = three_cases(tmp_path / "data"), tmp_path / "store"
    prepare(data, out, Preprocessing())
    fewer = replace(data, cases=(data.cases[1], case(tmp_path / "data", "d", scan(9))))
    with pytest.warns(UserWarning, match=r"2 of its scans are no longer in .*data \(a, c\): left out of the store"):
        store = prepare(fewer, out, Preprocessing())
    assert [one.name for one in store.cases] == ["b", "d"]


def test_case_names_of_any_kind_get_a_folder(tmp_path):
    names = ["../up", "ü/ß\n", "x" * 300, "x" * 299 + "y", ".hidden"]
    folder = tmp_path / "data"
    cases = [replace(case(folder, str(k), scan(k)), name=name) for k, name in enumerate(names)]
    store = prepare(dataset(folder, *cases), tmp_path / "store", Preprocessing())
    for k, name in enumerate(names):
        assert np.array_equal(VolumeStore.open(store.path).image(store.index_of(name)), scan(k)[::-1, ::-1])
    assert len(list((tmp_path / "store" / CASES).iterdir())) == len(names)


class Deadly(type(Path())):
    """The path of a scan that kills the process which is handed it, as a crashing reader would."""

    def __reduce__(self):
        return os.abort, ()


def test_a_reader_that_crashes_costs_its_case_only(tmp_path):
    folder = tmp_path / "data"
    cases = [case(folder, name, scan(k)) for k, name in enumerate("abc")]
    cases[1] = replace(cases[1], image=Deadly(cases[1].image))
    store = prepare(dataset(folder, *cases), tmp_path / "store", Preprocessing(), workers=1)
    assert [c.name for c in store.cases] == ["a", "c"]
    assert [one["name"] for one in store.rejected] == ["b"]
    assert "the process that read it died" in store.rejected[0]["reason"]
    assert store.verify() == []


PROCESSES = """
    import os, signal, sys
    import numpy as np
    from pathlib import Path
    from spade3d.faults import DataFault
    from spade3d.volumes.layouts import read_layout
    from spade3d.volumes.prepare import prepare, prepare_part
    from spade3d.volumes.preprocessing import Preprocessing
    from spade3d.volumes.store import VolumeStore
    assert "torch" not in sys.modules, "workers must stay light"
    data, root = read_layout(Path(sys.argv[1])), Path(sys.argv[2])

    def child(work):
        pid = os.fork()
        if pid:
            return pid
        work()
        os._exit(0)

    def killed_at(instant, out):
        # Every fsync and every rename is an instant: the file is written but not there, there but not recorded ...
        calls = 0
        def counted(function):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)
            return call
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        prepare(data, out, Preprocessing())

    # 1. Killed at each instant in turn, always in the same folder, which never opens with anything wrong in it.
    out, kills = root / "killed", 0
    for instant in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 14, 15):
        _, status = os.waitpid(child(lambda: killed_at(instant, out)), 0)
        kills += os.WIFSIGNALED(status)
        try:
            assert VolumeStore.open(out).verify() == []
        except DataFault as fault:
            assert "not finished" in str(fault)
    store = prepare(data, out, Preprocessing())
    assert kills >= 5, kills
    assert store.verify() == [] and len(store) == len(data.cases)
    assert not list(out.rglob("*.partial")) and not (out / "claim").exists()

    # 2. Two at once in one folder: neither fails, the result is whole.
    both = [child(lambda: prepare(data, root / "both", Preprocessing())) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in both] == [0, 0]
    assert VolumeStore.open(root / "both").verify() == []

    # 3. Four processes that inherited the same open arrays read different boxes at once.
    whole = [store.image(i) for i in range(len(store))]
    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            i = int(rng.integers(len(store)))
            start = tuple(int(rng.integers(n)) for n in store.cases[i].shape)
            stop = tuple(int(rng.integers(a, n)) + 1 for a, n in zip(start, store.cases[i].shape))
            part = tuple(map(slice, start, stop))
            assert np.array_equal(store.image(i, (start, stop)), whole[i][part])
    readers = [child(lambda: read(seed)) for seed in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in readers] == [0] * 4
    print("all well")
"""


def test_processes_that_are_killed_or_work_at_once(tmp_path):
    for name in "abc":
        case(tmp_path / "data", name, scan(ord(name)))
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROCESSES), tmp_path / "data", tmp_path],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert ended.stdout == "all well\n", ended.stderr


def test_leftovers_of_a_crash_are_cleared_away(tmp_path):
    data, out = three_cases(tmp_path / "data"), tmp_path / "store"
    store = prepare(data, out, Preprocessing())
    folder = out / Path(store.cases[0].image.file).parent
    killed = "import os, sys; from pathlib import Path; from spade3d.whole_file import whole_file\n"
    killed += "with whole_file(Path(sys.argv[1])) as file: os._exit(9)"
    subprocess.run([sys.executable, "-c", killed, folder / "image.b2nd"], check=False)
    (folder / f".image.b2nd.elsewhere.1{PARTIAL}").write_bytes(b"half")
    os.utime(folder / f".image.b2nd.elsewhere.1{PARTIAL}", (1, 1))
    assert len(list(folder.glob(f".*{PARTIAL}"))) == 2
    write_json(folder / "case.json", {"not": "a case"})
    assert prepare(data, out, Preprocessing()).verify() == []
    assert not list(out.rglob(f"*{PARTIAL}"))


def test_what_a_living_process_is_writing_is_no_leftover(tmp_path):
    """Another machine's part, or body frames that a run keeps with the store, take no claim on it."""
    data, out = three_cases(tmp_path / "data"), tmp_path / "store"
    prepare(data, out, Preprocessing())
    (out / "body_frames").mkdir()
    elsewhere = out / CASES / f".image.b2nd.elsewhere.1{PARTIAL}"
    elsewhere.write_bytes(b"half")
    with whole_file(out / "body_frames" / "affine.json") as file:
        file.write(b"{")
        prepare(data, out, Preprocessing())
        file.write(b"}")
    assert (out / "body_frames" / "affine.json").read_bytes() == b"{}" and elsewhere.exists()


def test_real_broken_files_are_refused_one_by_one(shared_data, tmp_path):
    store = prepare(read_layout(shared_data / "odd" / "corrupt"), tmp_path / "store", Preprocessing())
    assert {"constant", "crc_error", "empty", "nan_block", "truncated"} <= {one["name"] for one in store.rejected}
    assert store.verify() == []
