"""Values outside the table: reported always; of the published datasets a few do not cost a case, many do."""

import numpy as np
import pytest

from spade3d.volumes.case_labels import STRAY_SHARE, stray_share
from spade3d.volumes.layouts import Dataset, read_layout
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import write_volume

SHAPE = (10, 10, 10)


def write_heart(folder, number, labels, spacing=2.0):
    image = np.random.default_rng(number).integers(0, 900, SHAPE).astype(np.int16)
    affine = np.diag([spacing] * 3 + [1.0])
    folder.mkdir(parents=True, exist_ok=True)
    write_volume(folder / f"mr_train_{number}_image.nii.gz", image, affine)
    write_volume(folder / f"mr_train_{number}_label.nii.gz", labels.astype(np.uint16), affine)


def hearts(stray: int, value: int = 421, labelled: int = 1000):
    """Labels with so many labelled voxels of the left atrium, `stray` of which have another value."""
    labels = np.zeros(1000, int)
    labels[:labelled] = 420
    labels[:stray] = value
    return labels.reshape(SHAPE)


def prepared(tmp_path, **settings):
    return prepare(read_layout(tmp_path / "mr_train"), tmp_path / "store", Preprocessing(**settings))


@pytest.fixture
def folder(tmp_path):
    write_heart(tmp_path / "mr_train", 1001, hearts(0))
    return tmp_path / "mr_train"


def test_a_stray_value_is_noted_and_becomes_background(tmp_path, folder):
    write_heart(folder, 1002, hearts(3))
    store = prepared(tmp_path)
    assert [case.name for case in store.cases] == ["mr_train_1001", "mr_train_1002"]
    where = folder / "mr_train_1002_label.nii.gz"
    note = "its 3 voxels, 0.300% of the labelled ones, are taken as background"
    assert store.notes == (f"{where}: label value 421 is not in the table; {note}",)
    assert np.unique(store.labels(1), return_counts=True)[1].tolist() == [3, 997]
    assert store.cases[1].label_values == (420,)


def test_it_is_background_for_scoring_too(tmp_path, folder):
    """`truth` is on the grid of the file, whatever the spacing of the store."""
    write_heart(folder, 1002, hearts(3))
    truth = prepared(tmp_path, spacing=(4.0, 4.0, 4.0)).truth(1)
    assert truth.shape == SHAPE and np.unique(truth).tolist() == [0, 420]


@pytest.mark.parametrize(("stray", "labelled", "kept"), [(10, 1000, True), (11, 1000, False), (1, 99, False)])
def test_above_one_in_a_hundred_labelled_voxels_the_case_is_refused(tmp_path, folder, stray, labelled, kept):
    write_heart(folder, 1002, hearts(stray, labelled=labelled))
    store = prepared(tmp_path)
    assert len(store) == 1 + kept and len(store.rejected) == 1 - kept
    if not kept:
        assert f"label values 421 ({stray} voxels) are not in the table (205 left vent" in store.rejected[0]["reason"]


def test_several_stray_values_count_together(tmp_path, folder):
    labels = hearts(6)
    labels.ravel()[6:10] = 7
    write_heart(folder, 1002, labels)
    labels.ravel()[10] = 7
    write_heart(folder, 1003, labels)
    store = prepared(tmp_path)
    assert [note.split("; ")[0].split(": ")[1] for note in store.notes] == [
        "label value 7 is not in the table",
        "label value 421 is not in the table",
    ]
    assert [case.name for case in store.cases] == ["mr_train_1001", "mr_train_1002"]


def test_65535_is_the_mark_of_a_bad_cast_and_refused_always(tmp_path, folder):
    write_heart(folder, 1002, hearts(1, value=65535))
    (rejected,) = prepared(tmp_path).rejected
    assert (
        "1 voxels have the label value 65535: after a bad cast, -1 or no number written into 16 bits"
        in (rejected["reason"])
    )


def test_a_table_of_ones_own_allows_no_stray_value(tmp_path):
    assert stray_share(Dataset("x", "MSD", tmp_path, ())) == 0
    assert all(stray_share(Dataset("x", layout, tmp_path, ())) == STRAY_SHARE for layout in ("BTCV", "AMOS", "MM-WHS"))
