"""Every compiled kernel has a slow twin; and whatever lies in memory in whatever order, NaN and nowhere included, comes
through the public ways into the kernels as it should."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dagman.attention.prior_kernels import pool
from dagman.attention.spatial_prior import PriorVolume, pooled
from dagman.downstream.inference import predict_classes
from dagman.evaluation.metrics import case_metrics
from spade3d.crops import kernels
from spade3d.crops.correspondences import match
from spade3d.crops.crop import PLAIN, Crop, Intensity, coloured, cut, cut_labels, cut_together, rotation
from spade3d.crops.focus import soft_mask
from spade3d.crops.focus_kernels import integral_volume, parts_of
from spade3d.crops.focus_rule import Focus
from spade3d.crops.salient import Saliency
from spade3d.crops.selection import Places, alike, apart
from spade3d.networks import windows
from spade3d.networks.sliding import sliding_window
from spade3d.volumes.preprocessing import Normalisation
from spade3d.volumes.registration_kernels import pattern_search, registration, scores_of_ways
from spade3d.volumes.volume import Grid

TESTS = Path(__file__).parent
TWINS = {  # kernel -> the test that holds it against its slow twin; kernels named with _ are parts of these
    "spade3d.crops.kernels.resample": "test_resample_equals_map_coordinates",
    "spade3d.crops.kernels.resample_labels": "test_labels_equal_the_nearest_voxel_of_each_place",
    "spade3d.crops.kernels.recolour": "test_recolour_equals_its_formula",
    "spade3d.crops.kernels.blur": "test_blur_equals_a_truncated_gaussian",
    "spade3d.crops.kernels.match_cells": "test_match_cells_equals_the_k_d_tree",
    "spade3d.crops.kernels.boxes_alike": "test_boxes_alike_equals_its_definition",
    "spade3d.crops.kernels.places_apart": "test_places_apart_equals_its_definition",
    "spade3d.crops.focus_kernels.integral_volume": "test_box_sums_of_an_integral_volume_equal_adding_voxel_by_voxel",
    "spade3d.crops.focus_kernels.box_sums": "test_box_sums_of_an_integral_volume_equal_adding_voxel_by_voxel",
    "spade3d.networks.window_kernels.attend_parts": "test_the_kernels_say_what_the_products_say",
    "spade3d.networks.window_kernels.backward_parts": "test_the_kernels_say_what_the_products_say",
    "spade3d.volumes.registration_kernels.normalised_mutual_information": (
        "test_mutual_information_equals_its_definition"
    ),
    "spade3d.volumes.registration_kernels.score": "test_the_pattern_search_is_the_slow_one",
    "spade3d.volumes.registration_kernels.scores_of_ways": "test_scores_of_ways_are_those_of_each_way",
    "spade3d.volumes.registration_kernels.pattern_search": "test_the_pattern_search_is_the_slow_one",
    "dagman.attention.prior_kernels.pool": "test_pooled_cells_equal_their_samples_one_by_one",
    "dagman.downstream.decision_kernels.decide": "test_slab_by_slab_gives_what_carrying_all_maps_over_gives",
    "dagman.evaluation.surfaces.census": "test_equals_the_slow_twin",
    "dagman.evaluation.surfaces.surface_voxels": "test_equals_the_slow_twin",
    "dagman.evaluation.surfaces.search": "test_search_and_planes_measure_the_same_distances",
    "dagman.evaluation.surfaces.planes": "test_search_and_planes_measure_the_same_distances",
    "dagman.evaluation.surface_elements._corners": "test_elements_of_noise_of_any_shape_equal_deepminds",
}
seeds = st.integers(0, 2**32 - 1)
rng = np.random.default_rng(0)


def test_every_kernel_has_a_slow_twin():
    found = set()
    for path in (path for package in ("spade3d", "dagman") for path in (TESTS.parent / package).rglob("*.py")):
        if "\n@compiled(" in path.read_text(encoding="utf-8"):
            module = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
            kernels_of = vars(importlib.import_module(module)).items()
            found |= {
                f"{module}.{name}" for name, one in kernels_of if hasattr(one, "py_func") and one.__module__ == module
            }
    assert {name for name in found if "._" not in name or name in TWINS} == TWINS.keys()
    said = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    assert [test for test in TWINS.values() if f"def {test}(" not in said] == []


# What comes, and the public ways in


def reversed_axes(array):
    return np.ascontiguousarray(array[(slice(None, None, -1),) * array.ndim])[(slice(None, None, -1),) * array.ndim]


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


LAYOUTS = {
    "first axis fastest": np.asfortranarray,
    "negative strides": reversed_axes,
    "every second value": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "unaligned": lambda array: (
        np.frombuffer(b"-" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    ),
    "read-only": read_only,
}


class Scan:
    """A store of one scan, whose arrays come as they are."""

    def __init__(self, voxels):
        self.voxels = voxels
        case = SimpleNamespace(affine=AFFINE, shape=voxels.shape, normalisation=NORM, saliency=True)
        self.cases = [case]

    def image(self, i, box=None):
        return self.voxels if box is None else self.voxels[tuple(map(slice, *box))]

    labels = saliency = image


CPU = torch.device("cpu")
AFFINE = np.diag([0.8, 1.5, 2.5, 1.0])
NORM = Normalisation(0.0, 1e-3, -1.0, 1.0)
LOOK = Intensity(gamma=1.2, contrast=1.1, brightness=0.1, noise=0.05, blur=0.7, noise_seed=3)
TURNED = np.array([[0.9, 0.2, 0, 1.0], [-0.2, 1.3, 0.1, 2.0], [0.1, 0, 2.1, 1.0], [0, 0, 0, 1]])
CROP = Crop(0, (6, 7, 8), TURNED)  # reaches beyond the scan
FOCUS = Focus()
IMAGE = rng.integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
LABELS = rng.integers(0, 4, (9, 8, 7)).astype(np.uint16)
OTHERS = rng.integers(0, 4, (9, 8, 7)).astype(np.uint16)
SHADES = rng.integers(0, 256, (9, 8, 7)).astype(np.uint8)
UNITS = rng.random((6, 7, 8)).astype(np.float32)
CORNERS = np.sort(rng.normal(0, 10, (20, 2, 3)), axis=1).reshape(20, 6)
SPACES = rng.integers(0, 2, 20)
BINS = np.where(rng.random((9, 10, 11)) < 0.05, -1, rng.uniform(0, 15, (9, 10, 11))).astype(np.float32)
WAYS = np.array([[0.0, 0, 0], [1, 0, 2], [50, 0, 0]])  # the last one leads beyond


def searched(moving, fixed):
    return [scores_of_ways(registration(moving, fixed, 10.0), WAYS)]


def measured(surface):
    return lambda labels: [
        np.array([*row.values()]) for row in case_metrics(labels, OTHERS, (0.8, 1.5, 2.5), (1, 2, 3), surface=surface)
    ]


def answered(intensities):
    """By a network that answers in another order of memory than it was asked in."""
    weights = torch.arange(3.0)[None, :, None, None, None]

    def network(crops):
        return (crops * weights).to(memory_format=torch.channels_last_3d)

    grid = Grid((13, 9, 8), np.diag([0.6, 1.4, 2.2, 1.0]))
    return [
        predict_classes(
            network, intensities, AFFINE, grid, classes=3, window=(4, 5, 6), overlap=0.5, device=CPU, fill=0.0
        ),
        sliding_window(network, intensities, (4, 5, 6), classes=3).numpy(),
    ]


def attended(numbers):
    """Rows and the bias of pairs, both in another order of memory."""
    rows = torch.from_numpy(numbers)
    bias = torch.linspace(-1, 1, 128).reshape(2, 8, 8)
    return [windows.attend(rows, bias.mT.contiguous().mT, (4, 4, 4), (2, 2, 2), (0, 0, 0)).numpy()]


WAYS_IN = {
    "cut": (lambda voxels: [cut(Scan(voxels), replace(CROP, intensity=LOOK))], IMAGE),
    "cut_together": (lambda voxels: cut_together(Scan(voxels), [CROP, replace(CROP, intensity=LOOK)]), IMAGE),
    "cut, affine": (lambda to_mm: [cut(Scan(IMAGE), Crop(0, (6, 7, 8), to_mm))], TURNED),
    "cut_labels": (lambda labels: [cut_labels(Scan(labels), CROP)], LABELS),
    "coloured": (lambda clean: [coloured(clean, LOOK, NORM), coloured(clean, PLAIN, NORM)], UNITS),
    "soft_mask": (lambda values: [soft_mask(Saliency(Scan(values), (0,), FOCUS), CROP)], SHADES),
    "match, between": (lambda to: [match(CROP, CROP, (4, 4, 4), to).cell], TURNED),
    "alike": (lambda boxes: [alike(Places(boxes, SPACES), Places(CORNERS, SPACES), 0.1)], CORNERS),
    "apart": (lambda boxes: [apart(Places(boxes, SPACES), Places(CORNERS, SPACES), 5.0)], CORNERS),
    "apart, spaces": (lambda spaces: [apart(Places(CORNERS, spaces), Places(CORNERS, SPACES), 5.0)], SPACES),
    "parts_of": (lambda values: [part.integral for part in parts_of(values, AFFINE, "mass")], SHADES),
    "parts_of, area": (lambda values: [part.integral for part in parts_of(values, AFFINE, "area")], SHADES),
    "parts_of, each": (lambda values: [part.integral for part in parts_of(values, AFFINE, "per_component")], SHADES),
    "registration, moving": (lambda bins: searched(bins, BINS[1:]), BINS),
    "registration, fixed": (lambda bins: searched(BINS[1:], bins), BINS),
    "attend": (attended, rng.normal(size=(65, 24)).astype(np.float32)),
    "pooled": (
        lambda values: [pooled(PriorVolume(values, np.eye(4)), CROP, (2, 3, 2), (3, 3, 4))],
        np.stack([SHADES, SHADES[::-1], SHADES[:, ::-1]], axis=-1),
    ),
    "predict_classes": (answered, (IMAGE * 1e-3).astype(np.float32)),
    "case_metrics": (measured("voxels"), LABELS),
    "case_metrics, elements": (measured("elements"), LABELS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS_IN)
def test_the_order_in_memory_does_not_show(way, layout):
    into, plain = WAYS_IN[way]
    if way == "attend" and layout not in ("first axis fastest", "every second value"):
        pytest.skip("torch has no such tensors")
    odd = LAYOUTS[layout](plain)
    np.testing.assert_array_equal(odd, plain)
    for seen, wanted in zip(into(odd), into(plain), strict=True):
        np.testing.assert_array_equal(seen, wanted)
    np.testing.assert_array_equal(odd, plain, "it was written into")


# Twins that stand nowhere else


def drawn_affine(chance, reach):
    """Turned, stretched otherwise along each axis, moved: much of what it leads to lies nowhere."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(chance.uniform(-3, 3, 3)) @ np.diag(chance.uniform(0.3, 3, 3))
    affine[:3, 3] = chance.uniform(-reach, reach, 3)
    return affine


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_labels_equal_the_nearest_voxel_of_each_place(seed):
    chance = np.random.default_rng(seed)
    stored = chance.integers(1, 1 << 16, chance.integers(1, 9, 3)).astype(np.uint16)
    to_stored, out = drawn_affine(chance, 8), np.empty(tuple(chance.integers(1, 9, 3)), np.uint16)
    kernels.resample_labels(stored, to_stored, out)
    for voxel in np.ndindex(out.shape):
        nearest = np.floor(to_stored[:3, :3] @ voxel + to_stored[:3, 3] + 0.5).astype(int)
        inside = (nearest >= 0).all() and (nearest < stored.shape).all()
        assert out[voxel] == (stored[tuple(nearest)] if inside else 0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_pooled_cells_equal_their_samples_one_by_one(seed):
    chance = np.random.default_rng(seed)
    values = chance.integers(0, 256, (*chance.integers(1, 6, 3), 2)).astype(np.uint8)
    crop = Crop(0, (4, 6, 5), drawn_affine(chance, 4))
    shares = pooled(PriorVolume(values, np.eye(4)), crop, (2, 3, 5), (2, 2, 1), samples=1)
    for cell in np.ndindex(2, 2, 1):
        place = crop.to_mm[:3, :3] @ ((np.array(cell) + 0.5) * (2, 3, 5) - 0.5) + crop.to_mm[:3, 3]
        np.testing.assert_allclose(shares[cell], trilinear(values / 255, place), atol=1e-5)


def trilinear(values, place):
    """The value at a place, 0 beyond the faces of the outermost voxels."""
    size = np.array(values.shape[:3])
    if (place < -0.5).any() or (place > size - 0.5).any():
        return np.zeros(values.shape[3])
    place = np.clip(place, 0, size - 1)
    low = np.minimum(place.astype(int), np.maximum(size - 2, 0))
    total = 0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, place - low, 1 - place + low))
        total = total + weight * values[tuple(np.minimum(low + corner, size - 1))]
    return total


def test_scores_of_ways_are_those_of_each_way():
    scans = registration(BINS, BINS[1:], 10.0)
    for way, score in zip(WAYS, scores_of_ways(scans, WAYS), strict=True):
        assert pattern_search(scans, np.array([0, 0, 0, *way]), 0.1, 2.0)[0] == score  # no step is as long as 2


# What is no number, and what lies nowhere

NOWHERE = [math.nan, math.inf, -math.inf, 1e300, -1e300]


@pytest.mark.parametrize("nowhere", NOWHERE)
@pytest.mark.parametrize("axis", range(3))
def test_what_lies_nowhere_has_no_label_no_saliency_and_no_prior(axis, nowhere):
    affine = np.eye(4)
    affine[axis, 3] = nowhere
    labels, integral = np.full((3, 3, 3), 9, np.uint16), np.zeros((5, 5, 5), np.int64)
    kernels.resample_labels(LABELS, affine, labels)
    integral_volume(SHADES, affine, np.zeros(3, np.int64), integral)
    centres, prior = np.array([[0.0], [1.0]]), np.ones((2, 2, 2, 1), np.float32)
    pool(SHADES[..., None], affine, centres, centres, centres, prior)
    assert not labels.any() and not integral.any() and not prior.any()
    # In plain Python, too, which a debugger runs, and which cannot make NaN a whole number.
    labels[:] = 9
    kernels.resample_labels.py_func(LABELS, affine, labels)
    integral_volume.py_func(SHADES[:2, :2, :2], affine, np.zeros(3, np.int64), integral)
    assert not labels.any() and not integral.any()


@pytest.mark.parametrize("column", range(6))
def test_a_place_that_is_no_number_is_neither_alike_nor_apart(column):
    odd = CORNERS.copy()
    odd[3, column] = math.nan
    one_space = np.zeros(20, int)
    broken, whole = Places(odd, one_space), Places(CORNERS, one_space)
    for rule, bound in ((alike, 0.0), (apart, 0.0)):
        assert not rule(broken, whole, bound)[3].any() and not rule(whole, broken, bound)[:, 3].any()
        others = np.arange(20) != 3
        np.testing.assert_array_equal(rule(broken, whole, bound)[others], rule(whole, whole, bound)[others])


@pytest.mark.parametrize(
    "look",
    [PLAIN, Intensity(gamma=1.3), Intensity(contrast=1.2), Intensity(noise=0.1), Intensity(blur=0.4), LOOK],
    ids=["as it is", "gamma", "contrast", "noise", "blur", "all"],
)
def test_a_voxel_that_is_no_number_stays_none_and_spoils_no_more_than_a_blur_reaches(look):
    broken, at = UNITS.copy(), (3, 3, 4)
    broken[at] = math.nan
    radius = math.ceil(3 * look.blur)
    reached = (np.abs(np.indices(broken.shape) - np.reshape(at, (3, 1, 1, 1))) <= radius).all(axis=0)
    seen = coloured(broken, look, NORM)
    np.testing.assert_array_equal(np.isnan(seen), reached)
    np.testing.assert_array_equal(seen[~reached], coloured(UNITS, look, NORM)[~reached])


@pytest.mark.parametrize("which", ["moving", "fixed"])
def test_a_cell_of_a_coarse_scan_that_is_no_number_is_unseen(which):
    odd = np.where(BINS < 0, math.nan, BINS)
    there = (odd, BINS[1:]) if which == "moving" else (BINS[1:], odd)
    plain = (BINS, BINS[1:]) if which == "moving" else (BINS[1:], BINS)
    np.testing.assert_array_equal(searched(*there), searched(*plain))
