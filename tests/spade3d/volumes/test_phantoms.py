"""Phantoms: the same seed gives the same patient, other seeds other patients, and every value is one that exists."""

from functools import cache

import numpy as np
import pytest

from spade3d.faults import DataFault
from spade3d.volumes.geometry import spacing_of
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.organs import BTCV, MM_WHS
from spade3d.volumes.phantoms import KINDS, draw_anatomy, main, phantom, ramp, write_dataset
from spade3d.volumes.shapes import blob, moved, tube
from spade3d.volumes.volume import guess_modality, read_labels, read_volume

SMALL = {"abdomen-ct": ((64, 56, 44), (6.0, 6.0, 6.0)), "heart-ct": ((60, 60, 44), (5.0, 5.0, 5.0))}
SMALL["heart-mr"] = SMALL["heart-ct"]


@cache
def small(kind: str, seed: int):
    """One patient, coarse; each is drawn once for all tests."""
    shape, spacing = SMALL[kind]
    return phantom(kind, seed, shape=shape, spacing=spacing)


def table(kind: str) -> dict[int, str]:
    return dict(BTCV if kind == "abdomen-ct" else MM_WHS)


def test_in_the_ramp_each_voxel_holds_its_own_place():
    affine = np.array([[2, 0, 0, -10], [0, 0, 3, 5], [0, -1, 0, 7], [0, 0, 0, 1.0]])
    places = ramp((4, 5, 6), affine)
    assert places.shape == (4, 5, 6, 3)
    assert places[1, 2, 3].tolist() == [2 * 1 - 10, 3 * 3 + 5, -2 + 7]
    assert ramp((2, 2, 2), affine, np.float32).dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_voxels(kind):
    shape, spacing = SMALL[kind]
    one, again, other = small(kind, 3), phantom(kind, 3, shape=shape, spacing=spacing), small(kind, 4)
    assert one.voxels.tobytes() == again.voxels.tobytes() and one.labels.tobytes() == again.labels.tobytes()
    assert np.array_equal(one.affine, again.affine)
    assert not np.array_equal(one.voxels, other.voxels)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_published_values_and_nearly_all_are_there(kind):
    seen = [set(np.unique(small(kind, seed).labels).tolist()) - {0} for seed in range(4)]
    assert all(values <= set(table(kind)) for values in seen)
    assert set.union(*seen) == set(table(kind))
    assert all(len(values) >= len(table(kind)) - 4 for values in seen)


def test_abdomen_has_the_hounsfield_units_of_an_abdomen():
    one = small("abdomen-ct", 0)
    assert one.voxels.dtype == np.int16 and one.voxels[0, 0, 0] < -950 and guess_modality(one.voxels) == "CT"
    middle = {name: float(np.median(one.voxels[one.labels == value])) for value, name in BTCV.items()}
    assert 20 < middle["liver"] < 150 and 25 < middle["spleen"] < 160 and 30 < middle["aorta"] < 350
    left, right = (np.argwhere(one.labels == value)[:, 0].mean() for value in (3, 2))
    assert left < right  # RAS: x grows to the patient's right


def test_heart_ct_is_bright_on_the_left_and_heart_mr_has_no_fixed_scale():
    ct = small("heart-ct", 1)
    ventricle, wall = (np.median(ct.voxels[ct.labels == value]) for value in (500, 205))
    assert 200 < ventricle < 560 and 40 < wall < 180
    scales = [float(np.median((one := small("heart-mr", seed)).voxels[one.labels == 500])) for seed in range(5)]
    assert min(scales) > 0 and max(scales) > 2 * min(scales)


def test_the_ventricle_lies_within_its_wall():
    one = small("heart-ct", 0)
    inside = one.labels == 500
    for axis in range(3):
        for step in (-1, 1):
            beside = np.roll(inside, step, axis) & ~inside
            assert np.mean(np.isin(one.labels[beside], (205, 420, 820))) > 0.7


def test_brightness_alone_does_not_tell_the_organ():
    """Over patients, the ranges of spleen, liver and aorta overlap."""
    means = np.array(
        [
            [
                np.median(one.voxels[one.labels == value]) if (one.labels == value).any() else np.nan
                for value in (1, 6, 8)
            ]
            for one in (small("abdomen-ct", seed) for seed in range(8))
        ]
    )
    low, high = np.nanmin(means, axis=0), np.nanmax(means, axis=0)
    assert (high - low > 25).all()
    assert low.max() < high.min()


def test_organs_lie_some_millimetres_elsewhere_in_each_patient():
    places = []
    for seed in range(10):
        one = small("abdomen-ct", seed)
        where = np.argwhere(one.labels == 6).mean(axis=0) * spacing_of(one.affine) + one.affine[:3, 3]
        places.append(where)
    spread = np.std(places, axis=0)
    assert (spread > 2).all() and (spread < 30).all()


def test_some_patients_lack_a_gallbladder_or_a_kidney():
    chances = map(np.random.default_rng, range(20))
    bodies = [{part.name for part in draw_anatomy("abdomen-ct", rng).parts} for rng in chances]
    assert 1 <= sum("gallbladder" not in names for names in bodies) <= 10
    assert any("right kidney" not in names or "left kidney" not in names for names in bodies)
    assert all("liver" in names for names in bodies)


def test_a_data_set_is_written_as_it_is_published(tmp_path):
    shape, spacing = (16, 16, 12), (20.0, 20.0, 22.0)
    write_dataset("abdomen-ct", tmp_path / "a", patients=2, unlabelled=1, seed=5, shape=shape, spacing=spacing)
    abdomen = read_layout(tmp_path / "a")
    assert abdomen.layout == "BTCV" and abdomen.label_names == BTCV
    assert [(case.name, case.part, case.labels is None) for case in abdomen.cases] == [
        ("img0001", "training", False),
        ("img0002", "training", False),
        ("img0061", "test", True),
    ]
    for kind, modality in (("heart-ct", "CT"), ("heart-mr", "MR")):
        write_dataset(kind, tmp_path / kind, patients=1, unlabelled=1, shape=shape, spacing=spacing)
        heart = read_layout(tmp_path / kind)
        assert heart.layout == "MM-WHS" and heart.label_names == MM_WHS
        assert [(case.part, case.modality) for case in heart.cases] == [("test", modality), ("training", modality)]
    first = abdomen.cases[0]
    image, labels = read_volume(first.image), read_labels(first.labels)
    assert image.voxels.dtype == np.int16 and image.shape == labels.shape == shape
    assert np.allclose(image.affine, labels.affine)


def test_a_patient_does_not_depend_on_how_many_follow(tmp_path):
    size = {"shape": (16, 16, 12), "spacing": (20.0, 20.0, 22.0), "seed": 2}
    few = write_dataset("heart-ct", tmp_path / "few", patients=1, **size)
    many = write_dataset("heart-ct", tmp_path / "many", patients=2, **size)
    assert np.array_equal(read_volume(few[0]).voxels, read_volume(many[0]).voxels)
    with pytest.raises(DataFault, match="not empty"):
        write_dataset("heart-ct", tmp_path / "few", patients=1, **size)


def test_the_command_line(tmp_path, capsys):
    arguments = ["--kind", "heart-mr", "--patients", "1", "--out", str(tmp_path / "x"), "--size", "16", "16", "12"]
    assert main([*arguments, "--spacing", "20", "20", "20"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "x") and "1/1" in said.err
    assert main(arguments) == 3
    with pytest.raises(SystemExit) as stopped:
        main(["--kind", "knee", "--patients", "1", "--out", "x"])
    assert stopped.value.code == 2


def test_shapes_hold_what_they_should():
    points = np.array([[0, 0, 0], [9.9, 0, 0], [0, 5.1, 0], [0, 4.9, 0]], float).T
    ellipsoid = blob((0, 0, 0), (10, 5, 5))
    assert ellipsoid.holds(points).tolist() == [True, True, False, True]
    turned = blob((0, 0, 0), (10, 5, 5), turned=(0, 0, 90))
    assert turned.holds(points).tolist() == [True, False, True, True]
    low, high = turned.bounds()
    assert np.allclose(high, (5, 10, 5)) and np.allclose(low, -high)
    (pipe,) = tube([(0, 0, 0), (10, 0, 0)], [1, 3], pieces=1)
    assert pipe.holds(np.array([[5, 1.9, 0], [5, 2.1, 0], [-0.5, 0, 0], [-1.5, 0, 0]]).T).tolist() == [1, 0, 1, 0]
    twice = np.column_stack([2 * np.eye(3), (1, 0, 0)])
    larger = moved(ellipsoid, np.zeros(3), twice)
    assert np.allclose(larger.centre, (1, 0, 0)) and np.allclose(larger.radii, (20, 10, 10))
