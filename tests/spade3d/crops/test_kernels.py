"""Kernels and their slow twins."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

from spade3d.crops import kernels
from spade3d.crops.crop import rotation

seeds = st.integers(0, 2**32 - 1)
UNCHANGED = np.array([1, 1, 0, 0], dtype=np.float32)


def whole(stored):
    """The box of all that is stored."""
    return np.array([(0, 0, 0), stored.shape])


def random_affine(rng, columns=(0.3, 3.0)):
    """A rotation of voxels of any size."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(rng.uniform(-np.pi, np.pi, 3)) @ np.diag(rng.uniform(*columns, 3))
    return affine


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_resample_equals_map_coordinates(seed):
    rng = np.random.default_rng(seed)
    stored = rng.integers(-2000, 2000, tuple(rng.integers(1, 12, 3))).astype(np.int16)
    out = np.empty(tuple(rng.integers(1, 14, 3)), dtype=np.float32)
    to_stored = random_affine(rng)
    middle = (np.array(out.shape) - 1) / 2
    to_stored[:3, 3] = (np.array(stored.shape) - 1) / 2 + rng.normal(0, 2, 3) - to_stored[:3, :3] @ middle
    # The scan is a box of what is stored, with other voxels around it.
    around = rng.integers(0, 3, (2, 3))
    more = rng.integers(-2000, 2000, around.sum(axis=0) + stored.shape).astype(np.int16)
    box = np.array([around[0], around[0] + stored.shape])
    more[tuple(map(slice, *box))] = stored
    kernels.resample(more, box, to_stored, np.array([-100, 0.01, -5, 5], np.float32), UNCHANGED, 0, out)

    where = np.einsum("xa,aijk->xijk", to_stored[:3, :3], np.indices(out.shape)) + to_stored[:3, 3, None, None, None]
    upper = np.array(stored.shape)[:, None, None, None] - 0.5
    inside = ((where >= -0.5) & (where <= upper)).all(axis=0)
    value = map_coordinates(stored.astype(float), np.clip(where, 0, upper - 0.5), order=1, mode="nearest")
    expected = np.where(inside, np.clip((value + 100) * 0.01, -5, 5), -5)
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 700), (3, 5, 100), (2, 300, 1)])
def test_rows_that_are_cut_together_are_those_cut_alone(shape):
    """Rows go through the stages some at a time, as many as fit; a row longer than that goes alone."""
    rng = np.random.default_rng(0)
    stored = rng.integers(-2000, 2000, (20, 30, 40)).astype(np.int16)
    scaling, colours = np.array([-100, 0.01, -5, 5], np.float32), np.array([1.3, 1.1, 0.1, 0.05], np.float32)
    to_stored = random_affine(rng, (0.05, 0.1))
    to_stored[:3, 3] = (np.array(stored.shape) - 1) / 2 - to_stored[:3, :3] @ ((np.array(shape) - 1) / 2)
    together = np.empty(shape, np.float32)
    kernels.resample(stored, whole(stored), to_stored, scaling, colours, 7, together)
    assert len(np.unique(together)) > 100
    for i, j in itertools.product(range(shape[0]), range(shape[1])):
        alone, moved = np.empty((1, 1, shape[2]), np.float32), to_stored.copy()
        moved[:3, 3] += to_stored[:3, 0] * i + to_stored[:3, 1] * j
        kernels.resample(stored, whole(stored), moved, scaling, UNCHANGED, 0, alone)
        row = alone.ravel().copy()
        kernels.recolour(row, colours, 7, (i * shape[1] + j) * shape[2], scaling[2], scaling[3])
        np.testing.assert_allclose(together[i, j], row, atol=1e-4)


PLAIN = """
import sys, numpy as np
from spade3d.crops import kernels
scaling, colours = np.array([-100, 0.01, -5, 5], np.float32), np.array([1.3, 1.1, 0.1, 0.05], np.float32)
found = []
for shape in (5, 4, 6), (0, 0, 0), (1, 1, 1):
    stored = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    for shift in (0.0, 0.4, 90.0):
        to_stored = np.array([[0.9, 0.2, -0.3, 1 + shift], [-0.2, 1.1, 0.1, 0.5], [0.3, 0.1, -0.8, 4], [0, 0, 0, 1]])
        out = np.empty((2, 3, 4), np.float32)
        kernels.resample(stored, np.array([(0, 0, 0), shape]), to_stored, scaling, colours, 3, out)
        kernels.blur(out, 0.7)
        found.append(out)
np.save(sys.argv[1], found)
"""


def test_plain_python_does_the_same_and_reads_nothing_that_is_not_there(tmp_path):
    """What a debugger runs; it would say where the compiled kernels read beyond an array."""
    answers = []
    for plain in "01":
        path = tmp_path / f"{plain}.npy"
        words = [sys.executable, "-c", PLAIN, str(path)]
        subprocess.run(words, check=True, env={**os.environ, "NUMBA_DISABLE_JIT": plain, "PYTHONWARNINGS": "ignore"})
        answers.append(np.load(path))
    np.testing.assert_allclose(*answers, atol=1e-5)


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("axis", range(3))
def test_a_place_that_is_no_number_is_outside(axis, column):
    stored, out = np.full((4, 5, 6), 7, dtype=np.int16), np.empty((3, 3, 3), dtype=np.float32)
    to_stored = np.eye(4)
    to_stored[axis, column] = np.nan
    kernels.resample(stored, whole(stored), to_stored, np.array([0, 1, -9, 9], np.float32), UNCHANGED, 0, out)
    assert (out == -9).all()


@pytest.mark.parametrize("step", [0.0, 1e-300, -1e-300, 1e300])
def test_resample_stands_rows_that_never_or_always_leave_the_scan(step):
    stored, out = np.full((4, 5, 6), 7, dtype=np.int16), np.empty((3, 3, 3), dtype=np.float32)
    to_stored = np.diag([1.0, 1, step, 1])
    kernels.resample(stored, whole(stored), to_stored, np.array([0, 1, -9, 9], np.float32), UNCHANGED, 0, out)
    assert (out[..., 0] == 7).all() and (out == (7 if abs(step) < 1 else out)).all() and np.isin(out, (7, -9)).all()


@pytest.mark.parametrize(
    ("gamma", "contrast", "brightness"), [(0.7, 1, 0), (1.5, 1, 0), (1, 1.3, -0.1), (0.5, 0.8, 0.2), (3.0, 1.0, 0.0)]
)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-5.0, 5.0)])
def test_recolour_equals_its_formula(gamma, contrast, brightness, low, high):
    x = np.linspace(low, high, 1001, dtype=np.float32)
    seen = x.copy()
    colours = np.array([gamma, contrast, brightness, 0], np.float32)
    kernels.recolour(seen, colours, 0, 0, np.float32(low), np.float32(high))
    share = (x.astype(float) - low) / (high - low)
    expected = np.clip(contrast * (low + (high - low) * share**gamma) + brightness, low, high)
    np.testing.assert_allclose(seen, expected, atol=1e-6 * (high - low))


def noise(count, seed, begin=0):
    values = np.zeros(count, dtype=np.float32)
    kernels.recolour(values, np.array([1, 1, 0, 1], np.float32), seed, begin, np.float32(-10), np.float32(10))
    return values


def test_noise_is_nearly_gaussian():
    drawn = noise(200_000, seed=11)
    standard_error = 1 / math.sqrt(len(drawn))
    assert abs(drawn.mean()) < 4 * standard_error and abs(drawn.var() - 1) < 8 * standard_error
    assert abs((drawn**3).mean()) < 0.03 and (drawn**4).mean() == pytest.approx(3 - 6 / 5 / 4, abs=0.05)
    assert np.abs(drawn).max() <= 2 * math.sqrt(3)  # where Irwin-Hall of four ends
    for lag in (1, 2, 96, 96 * 96):
        assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 5 * standard_error


def test_noise_depends_on_seed_and_voxel_alone():
    whole = noise(1000, seed=3)
    np.testing.assert_array_equal(noise(1000, seed=3), whole)
    np.testing.assert_array_equal(np.concatenate([noise(1, 3, begin) for begin in range(50)]), whole[:50])
    np.testing.assert_array_equal(noise(300, 3, 700), whole[700:])
    assert abs(np.corrcoef(whole, noise(1000, seed=4))[0, 1]) < 0.15
    assert np.isfinite(noise(10, seed=2**63 - 1)).all()


def test_noise_of_a_row_is_noise_of_the_volume():
    """The one pass colours row by row; the place of a voxel in the crop decides its noise, not its row."""
    stored, out = np.zeros((4, 4, 4), np.int16), np.empty((2, 3, 4), np.float32)
    scaling, colours = np.array([0, 1, -9, 9], np.float32), np.array([1, 1, 0, 1], np.float32)
    kernels.resample(stored, whole(stored), np.eye(4), scaling, colours, 5, out)
    np.testing.assert_array_equal(out.ravel(), noise(24, seed=5))


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 12)] * 3), sigma=st.floats(0.05, 3.0), seed=seeds)
def test_blur_equals_a_truncated_gaussian(shape, sigma, seed):
    sharp = np.random.default_rng(seed).random(shape, dtype=np.float32)
    soft = sharp.copy()
    kernels.blur(soft, sigma)
    twin = gaussian_filter(sharp.astype(float), sigma, mode="nearest", radius=math.ceil(3 * sigma))
    np.testing.assert_allclose(soft, twin, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_match_cells_equals_the_k_d_tree(seed):
    rng = np.random.default_rng(seed)
    grid_a, grid_b = (tuple(rng.integers(1, 7, 3).tolist()) for _ in range(2))
    a_to_mm, b_to_mm = random_affine(rng, (1.0, 8.0)), random_affine(rng, (1.0, 8.0))
    b_to_mm[:3, 3] = rng.normal(0, 6, 3)
    cells = math.prod(grid_a)
    cell, distance_mm = np.empty(cells, np.int64), np.empty(cells, np.float32)
    kernels.match_cells(np.linalg.inv(b_to_mm) @ a_to_mm, b_to_mm, grid_a, grid_b, cell, distance_mm)

    a, b = (centres(to_mm, grid) for to_mm, grid in ((a_to_mm, grid_a), (b_to_mm, grid_b)))
    nearest_mm, _ = cKDTree(b).query(a)
    in_b = (a - b_to_mm[:3, 3]) @ np.linalg.inv(b_to_mm[:3, :3]).T
    valid = ((in_b >= -0.5) & (in_b < np.array(grid_b) - 0.5)).all(axis=1)
    np.testing.assert_array_equal(cell >= 0, valid)
    np.testing.assert_allclose(distance_mm[valid], nearest_mm[valid], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a[valid] - b[cell[valid]], axis=1), nearest_mm[valid], atol=1e-5)
    assert np.isinf(distance_mm[~valid]).all() and (cell[~valid] == -1).all()


def centres(to_mm, grid):
    return np.array(list(itertools.product(*map(range, grid)))) @ to_mm[:3, :3].T + to_mm[:3, 3]


@pytest.mark.parametrize("grid_a", [(0, 3, 3), (3, 3, 0), (1, 1, 1), (1, 1, 40)])
def test_match_cells_stands_thin_and_empty_grids_and_places_of_no_number(grid_a):
    cells = math.prod(grid_a)
    cell, distance_mm = np.empty(cells, np.int64), np.empty(cells, np.float32)
    kernels.match_cells(np.eye(4), np.eye(4), grid_a, (1, 1, 2), cell, distance_mm)
    assert cell.tolist() == [0, 1, *[-1] * 38][:cells] and (distance_mm == ([0, 0] + [np.inf] * 38)[:cells]).all()
    for nowhere in (np.nan, np.inf, -1e300, 1e300):
        kernels.match_cells(np.full((4, 4), nowhere), np.eye(4), grid_a, (1, 1, 2), cell, distance_mm)
        assert (cell == -1).all() and np.isinf(distance_mm).all()


def columns(places, space):
    """Places (n, 3 or 6) as the selection kernels take them."""
    return np.ascontiguousarray(places.T, dtype=np.float32), space.astype(np.int32)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, iou=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_boxes_alike_equals_its_definition(seed, iou):
    rng = np.random.default_rng(seed)
    boxes = []
    for count in (4, 37):  # more than one vector of keys, and a rest
        low = rng.integers(0, 6, (count, 3)).astype(float)  # whole numbers, so that faces touch and boxes coincide
        boxes.append((np.concatenate([low, low + rng.integers(1, 6, (count, 3))], axis=1), rng.integers(0, 3, count)))
    (queries, query_space), (keys, key_space) = boxes
    out = np.empty((4, 37), dtype=np.bool_)
    kernels.boxes_alike(*columns(queries, query_space), *columns(keys, key_space), iou, out)
    for q, k in np.ndindex(out.shape):
        cubes_q, cubes_k = unit_cubes(queries[q]), unit_cubes(keys[k])
        shared, both = len(cubes_q & cubes_k), len(cubes_q | cubes_k)
        assert out[q, k] == (query_space[q] == key_space[k] and shared > 0 and shared / both >= iou)


def unit_cubes(box):
    """The unit cubes that fill a box of whole numbers."""
    return set(itertools.product(*(range(int(low), int(high)) for low, high in zip(box[:3], box[3:], strict=True))))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, far_mm=st.sampled_from([0.0, 3.0, 5.0, 20.0]))
def test_places_apart_equals_its_definition(seed, far_mm):
    rng = np.random.default_rng(seed)
    (queries, query_space), (keys, key_space) = (
        (rng.integers(-4, 5, (count, 3)).astype(float), rng.integers(0, 3, count)) for count in (5, 37)
    )
    out = np.empty((5, 37), dtype=np.bool_)
    kernels.places_apart(*columns(queries, query_space), *columns(keys, key_space), far_mm, out)
    for q, k in np.ndindex(out.shape):
        assert out[q, k] == (query_space[q] == key_space[k] and math.dist(queries[q], keys[k]) > far_mm)


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2500])
def test_selection_of_many_keys_is_that_of_each(count):
    """The keys are taken in pieces; where they are parted must not show."""
    rng = np.random.default_rng(count)
    low = rng.uniform(0, 20, (count, 3))
    keys, key_space = np.concatenate([low, low + rng.uniform(1, 20, (count, 3))], axis=1), rng.integers(0, 2, count)
    for kernel, width, bound in ((kernels.boxes_alike, 6, 0.3), (kernels.places_apart, 3, 10.0)):
        places, (few, few_space) = columns(keys[:, :width], key_space), columns(keys[:3, :width], key_space[:3])
        whole, single = np.empty((3, count), dtype=np.bool_), np.empty((3, 1), dtype=np.bool_)
        kernel(few, few_space, *places, bound, whole)
        for k in range(count):
            kernel(few, few_space, *columns(keys[k : k + 1, :width], key_space[k : k + 1]), bound, single)
            np.testing.assert_array_equal(whole[:, k : k + 1], single)
        assert 0 < whole.mean() < 1
