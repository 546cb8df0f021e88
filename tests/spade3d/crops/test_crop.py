"""Crops: on the ramp, where each voxel holds its own place, a cut is right or wrong, never nearly."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade3d.crops.crop import (
    Box,
    Crop,
    Intensity,
    Views,
    body_bounds,
    box_to_mm,
    coloured,
    cut,
    cut_from,
    cut_labels,
    cut_together,
    draw_box,
    draw_partner,
    draw_view,
    mm_to_stored,
    rotation,
    scan_bounds,
    scan_to_world,
)
from spade3d.volumes.preprocessing import Normalisation

SHAPE = (21, 17, 12)
OBLIQUE = np.array([[0.0, -1.2, 0, 40], [0.8, 0, 0, -7], [0, 0, 2.5, 300], [0, 0, 0, 1]])  # spacing 0.8, 1.2, 2.5 mm
SPACING = np.array([0.8, 1.2, 2.5])
WILD = Views(rotation_deg=180.0, zoom=(0.4, 2.5))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def ramp(ramps):
    return ramps(SHAPE, OBLIQUE)


def places(crop):
    """The mm of each voxel of a crop, (i, j, k, 3)."""
    return np.stack(np.indices(crop.shape), -1) @ crop.to_mm[:3, :3].T + crop.to_mm[:3, 3]


def seen(crop, spacing=SPACING, shape=SHAPE):
    """What a cut of the ramp has to hold: each voxel's own place in mm, and whether it lies in the scan."""
    mm = places(crop)
    last = (np.array(shape) - 1) * spacing
    inside = ((mm >= -spacing / 2) & (mm <= last + spacing / 2)).all(-1)
    return np.clip(mm, 0, last), inside


def check_on_ramp(ramp, crop, **grid):
    mm, inside = seen(crop, **grid)
    for axis in range(3):
        voxels = cut(ramp[axis], crop.plain())
        assert voxels.dtype == np.float32 and voxels.shape == crop.shape
        assert np.abs(voxels - mm[..., axis])[inside].max(initial=0) < 1e-3
        assert (voxels[~inside] == -1e4).all()
    return inside


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_every_voxel_of_a_cut_comes_from_its_own_place(ramp, seed):
    rng = np.random.default_rng(seed)
    box = draw_box(rng, tuple(rng.uniform(2, 30, 3)), scan_bounds(ramp[0].cases[0]))
    check_on_ramp(ramp, draw_view(rng, 0, box, tuple(rng.integers(1, 14, 3).tolist()), WILD))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_reverses_the_cut(ramp, axis):
    box, shape = Box((8.0, 9.0, 14.0), (6.0, 7.0, 9.0)), (5, 6, 4)
    signs = np.ones(3)
    signs[axis] = -1
    plain, flipped = (Crop(0, shape, box_to_mm(box, shape, linear)) for linear in (np.eye(3), np.diag(signs)))
    for store in ramp:
        np.testing.assert_allclose(np.flip(cut(store, plain), axis), cut(store, flipped), atol=1e-4)


def test_a_quarter_turn_swaps_the_axes(ramp):
    box = Box((8.0, 9.0, 14.0), (6.0, 6.0, 6.0))
    turned = Crop(0, (4, 4, 4), box_to_mm(box, (4, 4, 4), rotation(np.radians([0, 0, 90.0]))))
    straight = Crop(0, (4, 4, 4), box_to_mm(box, (4, 4, 4)))
    # R about k takes x to y: what lies along i of the turned crop lies along j of the scan.
    np.testing.assert_allclose(cut(ramp[1], turned), cut(ramp[1], straight).transpose(1, 0, 2), atol=1e-4)


def test_zoom_magnifies():
    box = Box((0.0, 0.0, 0.0), (8.0, 8.0, 8.0))
    crop = draw_view(np.random.default_rng(0), 0, box, (8, 8, 8), Views(zoom=(2.0, 2.0)))
    np.testing.assert_allclose(np.linalg.norm(crop.to_mm[:3, :3], axis=0), 0.5)
    assert np.linalg.norm(crop.to_mm @ [3.5, 3.5, 3.5, 1] - [0, 0, 0, 1]) < 1e-12


def test_the_unturned_box_is_cut_voxel_by_voxel(in_memory):
    image = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7))
    store = in_memory([image], spacing=(2.0, 2.0, 3.0))
    # Voxels 2 to 5, 1 to 3, 4 to 6: from half a voxel before the first centre to half a voxel beyond the last one.
    crop = Crop(0, (4, 3, 3), box_to_mm(Box((7.0, 4.0, 15.0), (8.0, 6.0, 9.0)), (4, 3, 3)))
    np.testing.assert_array_equal(cut(store, crop), image[2:6, 1:4, 4:7])


@pytest.mark.parametrize("shift", [(100, 0, 0), (0, -60, 0), (0, 0, 90), (200, 200, 200)])
def test_a_crop_outside_the_scan_holds_its_lowest_value(ramp, shift):
    crop = Crop(0, (5, 5, 5), box_to_mm(Box(tuple(np.add((8.0, 9.0, 14.0), shift)), (6.0, 6.0, 6.0)), (5, 5, 5)))
    assert not check_on_ramp(ramp, crop).any()
    assert not cut_labels(ramp[0], crop).any()


def test_a_crop_may_reach_beyond_the_scan_on_every_side(ramp):
    whole = Box(tuple((np.array(SHAPE) - 1) * SPACING / 2), tuple(np.array(SHAPE) * SPACING + 20))
    inside = check_on_ramp(ramp, Crop(0, (30, 25, 20), box_to_mm(whole, (30, 25, 20))))
    assert inside.any() and not inside.all() and not inside[[0, -1]].any()


@pytest.mark.parametrize("shape", [(1, 17, 12), (21, 1, 12), (21, 17, 1), (1, 1, 1)])
def test_scans_of_one_voxel_along_an_axis(ramps, shape):
    thin, rng = ramps(shape, np.diag([*SPACING, 1.0])), np.random.default_rng(4)
    box = Box(tuple((np.array(shape) - 1) * SPACING / 2), (9.0, 9.0, 9.0))
    for _ in range(5):
        check_on_ramp(thin, draw_view(rng, 0, box, (9, 9, 9), WILD), shape=shape)


def test_labels_are_those_of_the_nearest_voxel(in_memory):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 60000, SHAPE).astype(np.uint16)
    store = in_memory([labels > 0], affines=[OBLIQUE], labels=[labels])
    for _ in range(10):
        box = draw_box(rng, (12.0, 12.0, 12.0), scan_bounds(store.cases[0]))
        crop = draw_view(rng, 0, box, (6, 7, 8), WILD)
        nearest = np.floor(places(crop) / SPACING + 0.5).astype(int)
        inside = ((nearest >= 0) & (nearest < SHAPE)).all(-1)
        expected = np.where(inside, labels[tuple(np.where(inside[..., None], nearest, 0).transpose(3, 0, 1, 2))], 0)
        np.testing.assert_array_equal(cut_labels(store, crop), expected)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_a_cut_is_the_plain_cut_coloured(in_memory, seed):
    rng = np.random.default_rng(seed)
    low, high = [(0.0, 1.0), (-5.0, 5.0)][seed % 2]  # percentiles, z-scores
    image = rng.integers(-1000, 1000, (10, 11, 12))
    store = in_memory([image], normalisation=Normalisation(-900.0, (high - low) / 1500, low, high))
    views = replace(WILD, blur=(0.4, 1.5), blur_chance=0.5)
    crop = draw_view(rng, 0, draw_box(rng, (8.0, 8.0, 8.0), scan_bounds(store.cases[0])), (9, 8, 7), views)
    plain, before = cut(store, crop.plain()), cut(store, crop.plain())
    whole = cut(store, crop)
    np.testing.assert_allclose(whole, coloured(plain, crop.intensity, store.cases[0].normalisation), atol=1e-6)
    np.testing.assert_array_equal(plain, before)  # colouring leaves what it was given
    assert whole.min() >= low and whole.max() <= high and np.isfinite(whole).all()


def counting(store):
    """A store that notes what is read of it."""
    reads = []
    return SimpleNamespace(cases=store.cases, image=lambda i, box: reads.append(box) or store.image(i, box)), reads


def voxels_of(boxes):
    return sum(math.prod(np.subtract(stop, start).tolist()) for start, stop in boxes)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, count=st.integers(1, 3))
def test_crops_cut_together_are_those_cut_alone_and_never_read_more(in_memory, seed, count):
    rng = np.random.default_rng(seed)
    store = in_memory([rng.integers(-1000, 1000, SHAPE)])
    beyond = scan_bounds(store.cases[0]) + [[-8.0], [8.0]]  # some lie outside the scan
    crops = [draw_view(rng, 0, draw_box(rng, (5.0, 6.0, 7.0), beyond), (7, 8, 9), WILD) for _ in range(count)]
    (alone, alone_reads), (together, together_reads) = counting(store), counting(store)
    for crop, voxels in zip(crops, cut_together(together, crops), strict=True):
        np.testing.assert_array_equal(voxels, cut(alone, crop))
        np.testing.assert_array_equal(voxels, cut_from(store.image(0), (0, 0, 0), store.cases[0], crop))
    assert voxels_of(together_reads) <= voxels_of(alone_reads)


def test_two_views_of_a_box_are_read_once(in_memory):
    store, reads = counting(in_memory([np.arange(6 * 7 * 8).reshape(6, 7, 8)]))
    rng, box = np.random.default_rng(0), Box((3.0, 3.0, 3.0), (4.0, 4.0, 4.0))
    cut_together(store, [draw_view(rng, 0, box, (8, 8, 8), Views()) for _ in range(2)])
    assert len(reads) == 1


@pytest.mark.parametrize("gamma", [0.4, 0.5, 0.7, 1.5, 2.0])
def test_blurred_air_stays_dark(in_memory, gamma):
    """The weights of a blur sum to one only nearly; what is rounded below the lowest value has no power."""
    store = in_memory([np.zeros((12, 12, 12))], normalisation=Normalisation(1e3, 1.0, -5.0, 5.0))
    to_mm = box_to_mm(Box((5.5, 5.5, 5.5), (12.0, 12.0, 12.0)), (12, 12, 12))
    for sigma in np.linspace(0.3, 1.5, 20):
        air = cut(store, Crop(0, (12, 12, 12), to_mm, Intensity(gamma=gamma, blur=float(sigma))))
        np.testing.assert_allclose(air, -5, atol=0.03)


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_a_box_lies_in_its_bounds_where_it_fits_and_in_their_middle_where_not(seed):
    rng = np.random.default_rng(seed)
    bounds = np.sort(rng.uniform(-50, 50, (2, 3)), axis=0)
    size, room = rng.uniform(1, 60, 3), bounds[1] - bounds[0]
    low, high = draw_box(rng, tuple(size), bounds).corners.reshape(2, 3)
    np.testing.assert_allclose(high - low, size)
    fits = size <= room
    assert (low >= bounds[0] - 1e-9)[fits].all() and (high <= bounds[1] + 1e-9)[fits].all()
    np.testing.assert_allclose(((low + high) / 2)[~fits], bounds.mean(axis=0)[~fits])


@settings(max_examples=50, deadline=None)
@given(seed=seeds, low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_partner_shares_the_part_that_was_asked_for(seed, low, high):
    low, high = sorted((low, high))
    rng = np.random.default_rng(seed)
    box = Box(tuple(rng.uniform(-9, 9, 3)), tuple(rng.uniform(1, 60, 3)))
    far = np.array([[-1e3] * 3, [1e3] * 3])
    assert low - 1e-9 <= overlap(box, draw_partner(rng, box, far, (low, high))) <= high + 1e-9
    near = box.corners.reshape(2, 3) + np.array([[-5.0], [5.0]])
    partner = draw_partner(rng, box, near, (low, high))
    assert overlap(box, partner) >= low - 1e-9  # kept inside, it can only share more
    assert (partner.corners[:3] >= near[0] - 1e-9).all() and (partner.corners[3:] <= near[1] + 1e-9).all()


def overlap(a, b):
    """The share of a's volume that lies in b."""
    sides = np.minimum(a.corners[3:], b.corners[3:]) - np.maximum(a.corners[:3], b.corners[:3])
    return np.prod(np.maximum(sides, 0)) / np.prod(a.size)


def test_chance_decides_once():
    box = Box((1.0, 2.0, 3.0), (30.0, 30.0, 30.0))
    first, second, other = (draw_view(np.random.default_rng(s), 0, box, (8, 8, 8), Views()) for s in (7, 7, 8))
    np.testing.assert_array_equal(first.to_mm, second.to_mm)
    assert first.intensity == second.intensity != other.intensity
    assert first.plain().intensity == Intensity() and first.plain().to_mm is first.to_mm


def test_views_stay_within_what_chance_may_do():
    rng, views = np.random.default_rng(0), Views(flip=(True, False, False), blur_chance=0.5)
    looks, flipped = [], 0
    for _ in range(300):
        crop = draw_view(rng, 0, Box((0.0, 0.0, 0.0), (8.0, 8.0, 8.0)), (8, 8, 8), views)
        looks.append(crop.intensity)
        scale = np.linalg.norm(crop.to_mm[:3, :3], axis=0)
        assert np.ptp(scale) < 1e-12 and 0.8 <= scale[0] <= 1.25
        flipped += np.linalg.det(crop.to_mm[:3, :3]) < 0
        # Three turns by at most 15 degrees take no axis further than 45 from where it was.
        assert (np.diag(crop.to_mm[:3, :3])[1:] / scale[1:] > np.cos(np.radians(45))).all()
    assert 100 < flipped < 200
    for name, (low, high) in {"gamma": (0.7, 1.5), "contrast": (0.8, 1.2), "brightness": (-0.1, 0.1)}.items():
        drawn = [getattr(look, name) for look in looks]
        assert low <= min(drawn) and max(drawn) <= high and np.ptp(drawn) > 0.9 * (high - low)
    assert 0.4 < np.mean([look.blur > 0 for look in looks]) < 0.6


def test_millimetres_of_an_oblique_scan(ramp):
    case = ramp[0].cases[0]
    voxel = np.array([3.0, 4, 5, 1])
    mm = np.array([*(voxel[:3] * SPACING), 1])
    np.testing.assert_allclose(mm_to_stored(case) @ mm, voxel)
    np.testing.assert_allclose(scan_to_world(case) @ mm, OBLIQUE @ voxel)
    np.testing.assert_allclose(scan_bounds(case), [-SPACING / 2, (np.array(SHAPE) - 0.5) * SPACING])
    np.testing.assert_allclose(body_bounds(case), scan_bounds(case))  # here the body is the field of view


def test_the_body_never_leaves_the_scan(ramps):
    case = ramps((10, 10, 10), np.diag([2.0, 2, 2, 1]))[0].cases[0]
    case.body_box_mm = ((4.0, -50.0, 6.0), (12.0, 8.0, 500.0))
    np.testing.assert_allclose(body_bounds(case), [[4, -1, 6], [12, 8, 19]])
