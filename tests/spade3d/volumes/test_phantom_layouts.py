"""Phantoms in published layouts: the numbers, the folders and the label values of the download, to the letter."""

import json

import numpy as np
import pytest

from spade3d.faults import UsageFault
from spade3d.volumes import phantoms
from spade3d.volumes.layouts import canonical_organ, read_layout
from spade3d.volumes.organs import AMOS, BTCV, MM_WHS
from spade3d.volumes.phantom_layouts import LAYOUTS
from spade3d.volumes.volume import read_labels

SIZE = {"shape": (8, 8, 8), "spacing": (40.0, 40.0, 40.0)}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A data set of one patient over and over, whose labels are all values of its kind, and what is read of it."""

    def write(kind, **settings):
        one = phantoms.phantom(kind, 0, **SIZE)
        table = BTCV if kind == "abdomen-ct" else MM_WHS
        labels = np.resize([0, *table], one.labels.shape).astype(np.uint16)
        same = phantoms.Phantom(one.voxels, labels, one.affine)
        monkeypatch.setattr(phantoms, "phantom", lambda *args, **more: same)
        phantoms.write_dataset(kind, tmp_path / "x", **settings)
        return read_layout(tmp_path / "x"), same

    return write


def files(dataset):
    return {case.image.relative_to(dataset.root).as_posix() for case in dataset.cases}


def test_btcv_numbers_its_labelled_scans_with_a_gap(written):
    dataset, one = written("abdomen-ct", patients=30, unlabelled=20, layout="btcv")
    assert dataset.layout == "BTCV" and dataset.label_names == BTCV and dataset.notes == ()
    labelled = [case.name for case in dataset.cases if case.labels]
    assert labelled == [f"img{n:04d}" for n in (*range(1, 11), *range(21, 41))]
    assert [case.name for case in dataset.cases if not case.labels] == [f"img{n:04d}" for n in range(61, 81)]
    assert {"RawData/Training/img/img0001.nii.gz", "RawData/Testing/img/img0080.nii.gz"} <= files(dataset)
    first = dataset.cases[0]
    assert first.labels.relative_to(dataset.root).as_posix() == "RawData/Training/label/label0001.nii.gz"
    assert np.array_equal(read_labels(first.labels).voxels, one.labels)


def test_amos_has_its_own_values_by_name_and_three_parts(written):
    dataset, one = written("abdomen-ct", patients=7, unlabelled=2, layout="amos")
    assert dataset.layout == "AMOS" and dataset.notes == ()
    assert {value: canonical_organ(name) for value, name in dataset.label_names.items()} == {
        value: canonical_organ(name) for value, name in AMOS.items()
    }
    parts = {part: [case.name for case in dataset.cases if case.part == part] for part in ("training", "validation")}
    assert parts == {
        "training": ["amos_0001", "amos_0002", "amos_0004", "amos_0005", "amos_0007"],
        "validation": ["amos_0003", "amos_0006"],
    }
    assert all(case.modality == "CT" for case in dataset.cases)
    assert {"imagesTr/amos_0001.nii.gz", "imagesVa/amos_0003.nii.gz", "imagesTs/amos_0301.nii.gz"} <= files(dataset)
    said = json.loads((dataset.root / "dataset.json").read_text(encoding="utf-8"))
    assert said["labels"]["8"] == "arota" and said["labels"]["9"] == "postcava"  # as the official file spells them
    stored = read_labels(dataset.cases[0].labels).voxels
    for value, name in BTCV.items():
        theirs = next((number for number, organ in AMOS.items() if organ == name), 0)
        assert set(stored[one.labels == value].tolist()) == {theirs}
    assert set(stored[one.labels == 10].tolist()) == {0}  # portal and splenic veins: none in AMOS, where 10 is pancreas


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_mmwhs_keeps_its_values_and_numbers(written, modality):
    dataset, one = written(f"heart-{modality}", patients=2, unlabelled=1, layout="mmwhs")
    assert dataset.layout == "MM-WHS" and dataset.label_names == MM_WHS
    train, test = f"{modality}_train", f"{modality}_test"
    assert files(dataset) == {
        f"{train}/{train}_1001_image.nii.gz",
        f"{train}/{train}_1002_image.nii.gz",
        f"{test}/{test}_2001_image.nii.gz",
    }
    labels = read_labels(dataset.root / train / f"{train}_1001_label.nii.gz").voxels
    assert set(np.unique(labels)) == {0, *MM_WHS} and np.array_equal(labels, one.labels)


def test_msd_counts_its_values_from_one_and_describes_itself(written):
    dataset, _ = written("heart-mr", patients=2, unlabelled=1, layout="msd")
    assert dataset.layout == "MSD" and list(dataset.label_names) == [1, 2, 3, 4, 5, 6, 7]
    assert set(dataset.label_names.values()) == set(MM_WHS.values())
    assert [(case.name, case.part, case.modality) for case in dataset.cases] == [
        ("heart_001", "training", "MR"),
        ("heart_002", "training", "MR"),
        ("heart_501", "test", "MR"),
    ]
    assert set(np.unique(read_labels(dataset.cases[0].labels).voxels)) == set(range(8))


@pytest.mark.parametrize(
    ("layout", "kind", "patients", "unlabelled", "said"),
    [
        ("btcv", "heart-ct", 1, 0, "layout btcv holds abdomen-ct, not heart-ct"),
        ("mmwhs", "abdomen-ct", 1, 0, "holds heart-ct or heart-mr"),
        ("btcv", "abdomen-ct", 31, 0, "has numbers for 30 labelled and 20 other scans, not for 31 and 0"),
        ("mmwhs", "heart-mr", 1, 41, "not for 1 and 41"),
    ],
)
def test_what_a_layout_does_not_hold_is_refused(tmp_path, layout, kind, patients, unlabelled, said):
    with pytest.raises(UsageFault, match=said):
        phantoms.write_dataset(kind, tmp_path / "x", patients=patients, unlabelled=unlabelled, layout=layout)
    assert not (tmp_path / "x").exists()


def test_every_amos_ct_has_an_id_of_at_most_500():
    layout = LAYOUTS["amos"]
    wanted = [(n, labelled) for labelled, most in zip((True, False), layout.most, strict=True) for n in range(most)]
    names = [layout.place("abdomen-ct", n, labelled)[0] for n, labelled in wanted]
    ids = [int(name[-11:-7]) for name in names]
    assert len(set(ids)) == 500 and min(ids) == 1 and max(ids) == 500
    assert sum("imagesTr" in name for name in names) == 200 and sum("imagesVa" in name for name in names) == 100


def test_the_command_line(tmp_path, capsys):
    arguments = ["--kind", "heart-mr", "--layout", "msd", "--patients", "1", "--out", str(tmp_path / "x")]
    assert phantoms.main([*arguments, "--size", "8", "8", "8", "--spacing", "40", "40", "40"]) == 0
    assert (tmp_path / "x" / "labelsTr" / "heart_001.nii.gz").is_file()
    capsys.readouterr()
    assert phantoms.main([*arguments, "--kind", "abdomen-ct", "--layout", "mmwhs"]) == 2
    assert "layout mmwhs holds heart-ct or heart-mr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        phantoms.main([*arguments, "--lesions"])
    assert "--lesions and --layout at once" in capsys.readouterr().err
