"""DATA becomes a store: made beside the run, or opened as it is; never one with other settings than were asked for."""

import numpy as np
import pytest

from spade3d.commands import prepare
from spade3d.configuration import Data
from spade3d.faults import DataFault, UsageFault
from spade3d.scans import open_scans, prepare_share, typical_grid
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import read_volume, write_volume

SPACINGS = ((0.78125, 0.78125, 2.5), (0.9765625, 0.9765625, 2.5), (0.78125, 0.78125, 3.0))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three CT scans, each of its own spacing and shape."""
    folder = tmp_path_factory.mktemp("scans")
    for number, spacing in enumerate(SPACINGS):
        voxels = np.random.default_rng(number).integers(-1000, 1000, (16 + number, 18, 12)).astype(np.int16)
        write_volume(folder / f"s{number}.nii.gz", voxels, np.diag([*spacing, 1.0]))
    return folder


@pytest.fixture(scope="module")
def store(scans, tmp_path_factory):
    return open_scans(scans, tmp_path_factory.mktemp("run") / "store", Data())


def test_spacing_left_to_the_data_is_the_median_of_the_set(store):
    assert store.preprocessing.spacing == (0.78125, 0.78125, 2.5)
    assert len(store) == 3 and store.path.name == "store"


def test_of_scans_that_are_wanted_alone_the_whole_set_still_says_how(scans, store, tmp_path):
    alone = open_scans(scans, tmp_path / "store", Data(), only={"s2"})
    assert [case.name for case in alone.cases] == ["s2"]
    assert alone.preprocessing == store.preprocessing  # its own spacing is another


def test_a_store_is_opened_as_it_is(store, tmp_path):
    for asked in (
        Data(),
        Data(spacing=None),
        Data(spacing=(0.78125, 0.78125, 2.5), window_hu=(-175.0, 250.0), mr="percentile"),
    ):
        again = open_scans(store.path, tmp_path / "beside", asked)
        assert again.path == store.path and not (tmp_path / "beside").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Data(spacing=(1.0, 1.0, 2.5)), r"data.spacing \(1.0, 1.0, 2.5\) asked for, the store has \(0.78125, "),
        (Data(window_hu=(0.0, 80.0)), r"data.window_hu \(0.0, 80.0\) asked for, the store has \(-175.0, 250.0\)"),
        (Data(mr="zscore"), "data.mr zscore asked for, the store has percentile"),
    ],
)
def test_a_store_prepared_otherwise_is_refused(store, tmp_path, asked, message):
    with pytest.raises(UsageFault, match=message):
        open_scans(store.path, tmp_path / "beside", asked)


def test_what_was_chosen_prepares_the_same_store_again(scans, store, tmp_path):
    """To the last digit: 0.7812 in a configuration would be another spacing than 0.78125."""
    shape, spacing = typical_grid(store, range(len(store)))
    again = open_scans(scans, tmp_path / "again", Data(spacing=spacing))
    assert again.preprocessing == store.preprocessing
    for i in range(len(store)):
        np.testing.assert_array_equal(again.image(i), store.image(i))
    assert shape.tolist() == np.median([case.shape for case in store.cases], axis=0).tolist()
    assert typical_grid(store, [1])[1] == spacing  # whoever is looked at


@pytest.fixture(scope="module")
def native(scans, tmp_path_factory):
    return open_scans(scans, tmp_path_factory.mktemp("native") / "store", Data(spacing="native"))


def test_native_keeps_each_scans_own_voxels(scans, native, tmp_path):
    assert native.preprocessing.spacing is None
    assert [case.spacing for case in native.cases] == [pytest.approx(spacing) for spacing in SPACINGS]
    for i, case in enumerate(native.cases):
        np.testing.assert_array_equal(native.image(i), np.asarray(read_volume(scans / f"{case.name}.nii.gz").voxels))
    assert open_scans(native.path, tmp_path / "beside", Data(spacing="native")).path == native.path


def test_spade_prepare_is_told_so_by_the_word(scans, native, tmp_path):
    with pytest.raises(SystemExit) as end:
        prepare([str(scans), "--out", str(tmp_path / "store"), "--spacing", "native"])
    assert end.value.code == 0
    assert VolumeStore.open(tmp_path / "store").preprocessing == native.preprocessing


def test_crops_of_any_spacing_are_cut_from_a_native_store(native, tmp_path):
    """So that the configuration of a run on it, whose spacing is that of the crops, repeats the run."""
    _, spacing = typical_grid(native, range(3))
    assert spacing == (0.78125, 0.78125, 2.5)
    assert open_scans(native.path, tmp_path / "beside", Data(spacing=spacing)).path == native.path


def test_a_store_of_one_spacing_is_not_native(store, tmp_path):
    with pytest.raises(UsageFault, match=r"data.spacing native asked for, the store has \(0.78125, "):
        open_scans(store.path, tmp_path / "beside", Data(spacing="native"))


def test_a_header_that_cannot_be_read_has_no_say_in_the_spacing(scans, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "bad.nii.gz").write_bytes(b"")
    with pytest.raises(DataFault, match="bad.nii.gz: is empty"):
        open_scans(folder, tmp_path / "none", Data())
    (folder / "good.nii.gz").write_bytes((scans / "s1.nii.gz").read_bytes())
    found = open_scans(folder, tmp_path / "store", Data())
    assert found.preprocessing.spacing == pytest.approx(SPACINGS[1], abs=1e-6)
    assert [one["name"] for one in found.rejected] == ["bad"]
    with pytest.raises(DataFault, match="case bad"):
        open_scans(folder, tmp_path / "strict", Data(), strict=True)
    assert not (tmp_path / "strict").exists() and not (tmp_path / "none").exists()


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataFault, match="nowhere: no such file or folder; a folder of scans"):
        open_scans(tmp_path / "nowhere", tmp_path / "store", Data())


def test_parts_prepared_apart_become_the_store_that_one_machine_makes(scans, store, tmp_path):
    shares = tmp_path / "shares"
    assert [prepare_share(scans, shares, Data(), part, 2) for part in (1, 2)] == [[], []]
    with pytest.raises(DataFault, match="was not finished"):
        VolumeStore.open(shares)
    records = {path: path.stat().st_mtime_ns for path in shares.rglob("case.json")}
    assert len(records) == len(store.cases)
    finished = open_scans(scans, shares, Data())
    assert {path: path.stat().st_mtime_ns for path in shares.rglob("case.json")} == records  # nothing was done twice
    assert finished.preprocessing == store.preprocessing
    assert [case.fingerprint for case in finished.cases] == [case.fingerprint for case in store.cases]
    for i in range(len(store.cases)):
        assert (finished.image(i) == store.image(i)).all()
