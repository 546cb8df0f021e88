"""Correspondences: a match is right when both crops show the ramp's same place there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from spade3d.crops.correspondences import cell_places, cell_to_mm, match, voxels_at
from spade3d.crops.crop import Box, Crop, Views, box_to_mm, cut, draw_box, draw_partner, draw_view, scan_bounds

SHAPE, SPACING = (30, 26, 14), np.array([0.9, 1.1, 3.0])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def ramp(ramps):
    return ramps(SHAPE, np.diag([*SPACING, 1.0]))


def draw_two(seed, bounds):
    rng = np.random.default_rng(seed)
    a = draw_box(rng, (16.0, 14.0, 20.0), bounds)
    b = draw_partner(rng, a, bounds, (0.3, 0.9))
    views = Views(rotation_deg=180.0)
    return draw_view(rng, 0, a, (12, 10, 8), views), draw_view(rng, 0, b, (12, 10, 8), views)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_matched_places_show_the_same_place(ramp, seed):
    a, b = draw_two(seed, scan_bounds(ramp[0].cases[0]))
    grid = (6, 5, 4)
    where = cell_places(a, grid)[match(a, b, grid).valid]
    voxels_a, voxels_b = voxels_at(a, where), voxels_at(b, where)
    # The eight voxels around a place must lie between the scan's outermost centres to hold a ramp.
    whole = np.ones(len(where), dtype=bool)
    last = (np.array(SHAPE) - 1) * SPACING
    for crop, voxels in ((a, voxels_a), (b, voxels_b)):
        whole &= ((voxels >= 0) & (voxels <= np.array(crop.shape) - 1)).all(axis=1)
        reach = np.abs(crop.to_mm[:3, :3]).sum(axis=1)
        whole &= ((where >= reach) & (where <= last - reach)).all(axis=1)
    for axis, store in enumerate(ramp):
        for crop, voxels in ((a, voxels_a), (b, voxels_b)):
            read = map_coordinates(cut(store, crop.plain()).astype(float), voxels[whole].T, order=1)
            np.testing.assert_allclose(read, where[whole, axis], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_a_match_is_the_nearest_cell(ramp, seed):
    a, b = draw_two(seed, scan_bounds(ramp[0].cases[0]))
    grid = (6, 5, 4)
    found = match(a, b, grid)
    here, there = cell_places(a, grid), cell_places(b, grid)
    distance = np.linalg.norm(here[:, None] - there[None], axis=-1)
    np.testing.assert_allclose(found.distance_mm[found.valid], distance.min(axis=1)[found.valid], atol=1e-4)
    rows = np.flatnonzero(found.valid)
    np.testing.assert_allclose(distance[rows, found.cell[rows]], distance.min(axis=1)[rows], atol=1e-9)
    reverse = match(b, a, grid)
    # Nearest is not mutual, but whoever is matched both ways is as near either way.
    mutual = rows[reverse.cell[found.cell[rows]] == rows]
    np.testing.assert_allclose(found.distance_mm[mutual], reverse.distance_mm[found.cell[mutual]], atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_matches_are_symmetric_wherever_cells_are_nearer_than_half_a_cell(ramp, seed):
    """However two crops are turned: a cell of b so near to one of a is nearer to no other, so b names it, too."""
    a, b = draw_two(seed, scan_bounds(ramp[0].cases[0]))
    grid = (6, 5, 4)
    there, back = match(a, b, grid), match(b, a, grid)
    side = np.linalg.norm(cell_to_mm(a, grid)[:3, :3], axis=0).min()
    near = np.flatnonzero(there.distance_mm < side / 2 - 1e-3)
    np.testing.assert_array_equal(back.cell[there.cell[near]], near)
    np.testing.assert_allclose(back.distance_mm[there.cell[near]], there.distance_mm[near], atol=1e-4)
    both = np.flatnonzero(there.valid & (back.cell[there.cell] >= 0))  # farther ones are at least as near back
    assert (back.distance_mm[there.cell[both]] <= there.distance_mm[both] + 1e-4).all()


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_matches_of_crops_of_one_cell_size_are_the_same_pairs_both_ways(ramp, seed):
    """Moved and flipped, but neither turned nor zoomed: which cells belong together does not depend on who asks."""
    rng = np.random.default_rng(seed)
    bounds, still = scan_bounds(ramp[0].cases[0]), Views(rotation_deg=0.0, zoom=(1.0, 1.0))
    box = draw_box(rng, (16.0, 14.0, 20.0), bounds)
    partner = draw_partner(rng, box, bounds, (0.3, 0.9))
    a, b = (draw_view(rng, 0, of, (12, 10, 8), still) for of in (box, partner))
    there, back = match(a, b, (6, 5, 4)), match(b, a, (6, 5, 4))
    asked = {(x, int(there.cell[x])) for x in np.flatnonzero(there.valid).tolist()}
    answered = {(int(back.cell[y]), y) for y in np.flatnonzero(back.valid).tolist()}
    assert asked == answered and len(asked) > 5


def test_a_crop_matches_itself_cell_by_cell():
    crop = draw_view(np.random.default_rng(0), 0, Box((0.0, 0.0, 0.0), (10.0, 20.0, 30.0)), (8, 8, 8), Views())
    found = match(crop, crop, (4, 4, 4))
    np.testing.assert_array_equal(found.cell, np.arange(64))
    assert found.distance_mm.max() < 1e-5


def test_crops_apart_have_nothing_in_common():
    a, b = (Crop(0, (8, 8, 8), box_to_mm(Box((x, 0.0, 0.0), (10.0, 10.0, 10.0)), (8, 8, 8))) for x in (0.0, 11.0))
    found = match(a, b, (4, 4, 4))
    assert not found.valid.any() and np.isinf(found.distance_mm).all()


def test_between_carries_one_scan_onto_another():
    """A scan moved by 100 mm and stretched by two: its counterpart crop matches cell by cell."""
    between = np.diag([2.0, 2, 2, 1])
    between[:3, 3] = 100
    a = draw_view(np.random.default_rng(1), 0, Box((5.0, 6.0, 7.0), (10.0, 10.0, 10.0)), (8, 8, 8), Views())
    b = Crop(1, a.shape, between @ a.to_mm)
    found = match(a, b, (4, 4, 4), between)
    np.testing.assert_array_equal(found.cell, np.arange(64))
    assert found.distance_mm.max() < 1e-5


def test_cells_tile_the_crop_also_unevenly():
    crop = Crop(0, (10, 8, 9), box_to_mm(Box((0.0, 0.0, 0.0), (10.0, 8.0, 9.0)), (10, 8, 9)))
    places = cell_places(crop, (5, 3, 9)).reshape(5, 3, 9, 3)
    np.testing.assert_allclose(places[:, 0, 0, 0], [-4, -2, 0, 2, 4])  # two voxels of 1 mm a cell
    np.testing.assert_allclose(places[0, :, 0, 1], [-8 / 3, 0, 8 / 3], atol=1e-12)
    np.testing.assert_allclose(places.mean(axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(cell_to_mm(crop, crop.shape), crop.to_mm)
    np.testing.assert_allclose(voxels_at(crop, cell_places(crop, crop.shape))[-1], [9, 7, 8])
