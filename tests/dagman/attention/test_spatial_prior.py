"""Spatial priors: cut as the image is cut, mirrored as the patient is mirrored, and wrong only where asked."""

import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dagman.attention.spatial_prior import (
    Kept,
    Priors,
    PriorVolume,
    in_steps,
    is_mirrored,
    mirror_by_name,
    wrong_atlas,
)
from spade3d.crops.crop import Box, Crop, Views, box_to_mm, cut, draw_box, draw_view, mm_to_stored, scan_bounds
from spade3d.faults import UsageFault
from spade3d.volumes.preprocessing import Normalisation

SHAPE = (21, 17, 12)
OBLIQUE = np.array([[1.2, 0.2, 0, 40], [-0.2, 1.2, 0, -7], [0, 0, 2.5, 300], [0, 0, 0, 1]])
KIDNEYS = ("liver", "right kidney", "left kidney")
seeds = st.integers(0, 2**32 - 1)
ORIENTATIONS = [
    np.diag([1.0, 1.5, 2.0, 1.0]),
    np.diag([-1.0, -1.5, 2.0, 1.0]),  # LPS
    np.array([[0, 0, -2.0, 5], [1.0, 0, 0, 6], [0, 1.5, 0, 7], [0, 0, 0, 1]]),  # left to right is the last axis
]


def of_values(store, values, regions=KIDNEYS):
    """Priors whose one volume lies on the voxels of a store's scans."""
    volume = PriorVolume(in_steps(values), mm_to_stored(store.cases[0]))
    return Priors(regions, mirror_by_name(regions), "drawn", store, partial(_always, volume))


def _always(volume, case):
    return volume


def whole(case, shape, linear=None):
    """A crop of all that a scan shows."""
    low, high = scan_bounds(case)
    return Crop(0, shape, box_to_mm(Box(tuple((low + high) / 2), tuple(high - low)), shape, linear))


@pytest.fixture(scope="module")
def scan(in_memory):
    """A store of one oblique scan of random values 0..255, shown as 0..1."""
    image = np.random.default_rng(0).integers(0, 256, SHAPE)
    return in_memory([image], affines=[OBLIQUE], normalisation=Normalisation(0.0, 1 / 255, 0.0, 1.0))


def test_a_cell_holds_the_share_that_the_region_takes(in_memory):
    store = in_memory([np.zeros((8, 8, 4))])
    values = np.zeros((8, 8, 4, 3))
    values[:3, ..., 0] = 1.0  # the first three planes of eight
    values[..., 2] = 0.6
    priors = of_values(store, values)
    shares = priors.of_crop(whole(store.cases[0], (8, 8, 4)), 4)
    assert shares.dtype == np.float32 and shares.shape == (3, 2, 2, 1)
    assert shares[0, :, 0, 0] == pytest.approx([0.75, 0.0])
    assert not shares[1].any() and shares[2] == pytest.approx(0.6)
    assert priors.of_crop(whole(store.cases[0], (8, 8, 4)), (8, 4, 2))[0] == pytest.approx(0.375)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_a_prior_is_cut_as_the_image_is_cut(scan, seed):
    rng = np.random.default_rng(seed)
    priors = of_values(scan, scan.images[0][..., None] / 255, ("liver",))
    box = draw_box(rng, tuple(rng.uniform(2, 30, 3)), scan_bounds(scan.cases[0]))
    crop = draw_view(rng, 0, box, tuple(rng.integers(2, 14, 3).tolist()), Views(rotation_deg=180.0, zoom=(0.4, 2.5)))
    fine = replace(crop, to_mm=crop.to_mm * [[0.02, 0.02, 0.02, 1]])  # less than a voxel a cell: one sample each
    np.testing.assert_allclose(priors.of_crop(fine, 1)[0], cut(scan, fine.plain()), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_cells_are_means_of_samples_that_are_spread_over_them(scan, seed):
    rng = np.random.default_rng(seed)
    priors = of_values(scan, scan.images[0][..., None] / 255, ("liver",))
    box = draw_box(rng, (14.0, 12.0, 16.0), scan_bounds(scan.cases[0]))
    crop = draw_view(rng, 0, box, (8, 6, 4), Views(rotation_deg=30.0))
    # The same box in voxels a quarter as large, cut as an image: its samples lie at the same places.
    shape = (32, 24, 16)
    finer = crop.to_mm @ np.array([[0.25, 0, 0, -0.375], [0, 0.25, 0, -0.375], [0, 0, 0.25, -0.375], [0, 0, 0, 1]])
    exact = cut(scan, Crop(0, shape, finer)).reshape(2, 16, 2, 12, 2, 8).mean(axis=(1, 3, 5))
    assert np.abs(priors.of_crop(crop, (4, 3, 2))[0] - exact).max() < 0.1  # of noise, the worst that a prior can be


def test_the_last_cell_of_an_odd_size_is_what_the_crop_shows_of_it(in_memory):
    store = in_memory([np.zeros((8, 8, 8))])
    priors = of_values(store, np.ones((8, 8, 8, 1)), ("liver",))
    crop = Crop(0, (5, 6, 7), box_to_mm(Box((3.5, 3.5, 3.5), (5.0, 6.0, 7.0)), (5, 6, 7)))
    assert priors.of_crop(crop, 4) == pytest.approx(np.ones((1, 2, 2, 2)))


def test_nothing_is_known_beyond_the_volume(in_memory):
    store = in_memory([np.zeros((8, 8, 8))])
    priors = of_values(store, np.ones((8, 8, 8, 1)), ("liver",))
    half_out = Crop(0, (8, 8, 8), box_to_mm(Box((7.5, 3.5, 3.5), (8.0, 8.0, 8.0)), (8, 8, 8)))
    assert priors.of_crop(half_out, 4)[0, :, 0, 0] == pytest.approx([1.0, 0.0])
    unknown = replace(priors, volume=partial(_always, None))
    assert unknown.of_crop(half_out, 4).shape == (1, 2, 2, 2) and not unknown.of_crop(half_out, 4).any()


def test_the_priors_of_a_batch_are_those_of_its_crops(scan):
    priors, rng = of_values(scan, np.random.default_rng(1).random((*SHAPE, 3))), np.random.default_rng(2)
    crops = [draw_view(rng, 0, Box((12.0, 9.0, 14.0), (9.0, 9.0, 9.0)), (8, 8, 8), Views()) for _ in range(3)]
    together = priors.of_crops(crops, 4)
    assert together.shape == (3, 3, 2, 2, 2)
    for crop, shares in zip(crops, together, strict=True):
        np.testing.assert_array_equal(shares, priors.of_crop(crop, 4))


def test_a_crop_of_one_cell_is_refused(scan):
    priors = of_values(scan, np.ones((*SHAPE, 1)), ("liver",))
    with pytest.raises(UsageFault, match="16x16x16 voxels is one cell of 16x16x16.*larger crop"):
        priors.of_crop(whole(scan.cases[0], (16, 16, 16)), 16)


@pytest.mark.parametrize("affine", ORIENTATIONS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_left_and_right_change_over_only_in_a_left_right_flip(in_memory, affine, axis):
    rng = np.random.default_rng(3)
    store = in_memory([np.zeros((8, 8, 8))], affines=[affine])
    priors = of_values(store, rng.random((8, 8, 8, 3)))
    signs = np.ones(3)
    signs[axis] = -1
    plain, flipped = (priors.of_crop(whole(store.cases[0], (8, 8, 8), linear), 2) for linear in (None, np.diag(signs)))
    liver, right, left = np.flip(plain, 1 + axis)
    leftwards = affine[0, axis] != 0
    expected = np.stack([liver, left, right] if leftwards else [liver, right, left])
    np.testing.assert_allclose(flipped, expected, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(seed=seeds, orientation=st.integers(0, 2))
def test_a_turn_mirrors_nothing(seed, orientation):
    rng = np.random.default_rng(seed)
    affine = ORIENTATIONS[orientation]
    left_right = int(np.abs(affine[0, :3]).argmax())
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * rng.uniform(0, np.radians(89.9))).as_matrix()
    signs = rng.choice([-1.0, 1.0], 3)
    to_mm = np.eye(4)
    to_mm[:3, :3] = turn @ np.diag(signs * rng.uniform(0.5, 3, 3))
    assert is_mirrored(to_mm, affine) == (signs[left_right] < 0)


def test_a_quarter_turn_mirrors_nothing():
    for axis in np.eye(3):
        for degrees in (90, -90):
            to_mm = np.eye(4)
            to_mm[:3, :3] = Rotation.from_rotvec(axis * degrees, degrees=True).as_matrix()
            assert not is_mirrored(to_mm, np.eye(4))


def test_regions_with_a_side_change_places_however_they_are_written():
    names = ("left_kidney", "kidney_right", "Liver", "left ventricle", "right ventricle", "right lung")
    assert mirror_by_name(names) == {
        "left_kidney": "kidney_right",
        "kidney_right": "left_kidney",
        "Liver": "Liver",
        "left ventricle": "left ventricle",  # chambers are no mirror images of each other
        "right ventricle": "right ventricle",
        "right lung": None,  # the left one is not among them
    }
    brain = ("Left-Lateral-Ventricle", "Right-Lateral-Ventricle")
    assert mirror_by_name(brain) == dict(zip(brain, brain[::-1], strict=True))


def test_a_region_without_its_other_side_is_unknown_in_a_mirrored_crop(in_memory):
    store = in_memory([np.zeros((8, 8, 8))])
    priors = of_values(store, np.ones((8, 8, 8, 2)), ("right kidney", "liver"))
    mirrored = priors.of_crop(whole(store.cases[0], (8, 8, 8), np.diag([-1.0, 1, 1])), 4)
    assert not mirrored[0].any() and mirrored[1] == pytest.approx(1.0)


@pytest.mark.parametrize("linear", [np.eye(3), np.diag([-1.0, 1, 1])])
def test_permuted_priors_are_those_of_the_next_region_in_any_crop(scan, linear):
    priors = of_values(scan, np.random.default_rng(4).random((*SHAPE, 3)))
    crop, wrong = whole(scan.cases[0], (8, 8, 8), linear), wrong_atlas(priors, "permuted")
    np.testing.assert_array_equal(wrong.of_crop(crop, 4), np.roll(priors.of_crop(crop, 4), -1, axis=0))
    assert wrong.regions == priors.regions and "wrong on purpose: permuted" in wrong.source


def test_shifted_priors_hold_as_much_in_other_places(in_memory):
    store = in_memory([np.zeros((9, 9, 9))])
    values = np.zeros((9, 9, 9, 1))
    values[3:6, 3:6, 3:6] = 1.0
    priors = of_values(store, values, ("liver",))
    crop = whole(store.cases[0], (9, 9, 9))
    right, wrong = priors.of_crop(crop, 3), wrong_atlas(priors, "shifted").of_crop(crop, 3)
    assert right.sum() == pytest.approx(wrong.sum()) and right[0, 1, 1, 1] == wrong[0, 2, 2, 2] == 1.0
    assert not (right * wrong).any()


def test_a_control_that_cannot_be_is_refused(scan):
    priors = of_values(scan, np.ones((*SHAPE, 1)), ("liver",))
    with pytest.raises(UsageFault, match="'turned'.*permuted, shifted"):
        wrong_atlas(priors, "turned")
    with pytest.raises(UsageFault, match="one region .liver. cannot be permuted.*shifted"):
        wrong_atlas(priors, "permuted")


def _cube(made, case):
    made.append(case)
    return None if case == 9 else PriorVolume(np.zeros((10, 10, 10, 1), dtype=np.uint8), np.eye(4))


def test_volumes_are_made_once_and_the_oldest_are_dropped():
    made: list[int] = []
    kept = Kept(partial(_cube, made), 2500)  # room for two of 1000 bytes
    for case in (0, 1, 0, 2, 0, 1, 9, 9):
        kept(case)
    assert made == [0, 1, 2, 1, 9]  # 1 was used longest ago when 2 came, and is made again
    assert pickle.loads(pickle.dumps(kept))(3).values.shape == (10, 10, 10, 1)
