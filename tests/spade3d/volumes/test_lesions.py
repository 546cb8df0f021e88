"""Phantoms with lesions: the same patient, small lumps in the right organs, and readers who look at them."""

import json

import numpy as np
import pytest
from scipy import ndimage

from spade3d.volumes.layouts import read_layout
from spade3d.volumes.lesions import HOSTS, label_names
from spade3d.volumes.phantoms import KINDS, main, phantom
from spade3d.volumes.volume import read_labels, read_volume, scan_stem

SIZE = {"shape": (44, 40, 30), "spacing": (8.0, 8.0, 8.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_with_lesions_is_the_same_elsewhere(kind):
    without, having = phantom(kind, 11, **SIZE), phantom(kind, 11, lesions=True, **SIZE)
    table = label_names(kind)
    lesion = having.labels == max(table)
    assert lesion.any() and table[max(table)] == "lesion"
    assert np.array_equal(without.labels[~lesion], having.labels[~lesion])
    assert {table[v] for v in np.unique(without.labels[lesion]).tolist()} <= set(HOSTS[kind])
    far = ~ndimage.binary_dilation(lesion, np.ones((3, 3, 3)), iterations=2)  # beyond the scanner's blur
    assert np.array_equal(without.voxels[far], having.voxels[far])
    assert np.abs(without.voxels[lesion].astype(float) - having.voxels[lesion]).mean() > 1
    assert np.array_equal(without.affine, having.affine) and without.readings == ()


def test_readers_look_at_lesions_more_than_chance_does():
    one = phantom("abdomen-ct", 11, lesions=True, **SIZE)
    away = ndimage.distance_transform_edt(one.labels != 14)
    near = [np.mean(away[tuple(np.rint(reading.voxels).astype(int).T)] <= 2) for reading in one.readings]
    assert len(near) == 2 and min(near) > 0.25 > 20 * np.mean(away <= 2)
    assert all((reading.seconds < 0.05).any() and (reading.voxels[:, 2] % 1 == 0).all() for reading in one.readings)


def test_a_data_set_with_lesions_is_read_back_with_its_table_and_its_gaze(tmp_path):
    out = tmp_path / "x"
    arguments = ["--kind", "heart-mr", "--patients", "1", "--unlabelled", "1", "--lesions", "--out", str(out)]
    assert main([*arguments, "--size", "40", "40", "30", "--spacing", "6", "6", "6"]) == 0
    data = read_layout(out)
    assert data.label_names == label_names("heart-mr") and data.label_names[851] == "lesion" and data.notes == ()
    assert [(case.modality, case.labels is None) for case in data.cases] == [("MR", True), ("MR", False)]
    labelled = data.cases[1]
    labels, image = read_labels(labelled.labels), read_volume(labelled.image)
    assert (labels.voxels == 851).any()
    records = json.loads((out / "gaze" / f"{scan_stem(labelled.image)}.json").read_text(encoding="utf-8"))
    assert [record["subject"] for record in records] == [1, 2] and len(list((out / "gaze").iterdir())) == 2
    for record in records:
        assert record["name"] == labelled.image.name and len(record["X"]) == len(record["T"]) == record["length"]
        assert min(record["Z"]) >= 1 and max(record["Z"]) <= 30  # slices counted from 1
    assert np.array_equal(image.affine, labels.affine)


def test_lesions_are_as_large_as_asked_for(tmp_path, capsys):
    usual, larger = (phantom("abdomen-ct", 11, lesions=True, radius_mm=r, **SIZE) for r in (None, (20.0, 24.0)))
    assert (larger.labels == 14).sum() > 3 * (usual.labels == 14).sum() > 0
    own = phantom("abdomen-ct", 11, lesions=True, radius_mm=(5.0, 10.0), **SIZE)
    assert np.array_equal(own.labels, usual.labels)
    for wrong in (["--radius", "9", "5", "--lesions"], ["--radius", "5", "9"]):
        with pytest.raises(SystemExit):
            main(["--kind", "abdomen-ct", "--patients", "1", "--out", str(tmp_path / "x"), *wrong])
        assert "--radius" in capsys.readouterr().err
