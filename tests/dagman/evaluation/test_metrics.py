"""Dice, HD95, NSD, ASD, volumes: by hand, by brute force, by MONAI and by DeepMind; and what an empty set is worth."""

import math

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import (
    DiceMetric,
    HausdorffDistanceMetric,
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist

from dagman.evaluation import surfaces
from dagman.evaluation.metrics import METRICS, asd_mm, case_metrics, dice, hd95_mm, nsd, tolerances_of
from dagman.evaluation.surface_elements import surface_elements
from spade3d.faults import DataFault, UsageFault


def blobs(seed: int, shape: tuple[int, int, int], classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A label map of smooth blobs and a worse copy of it, with outliers."""
    rng = np.random.default_rng(seed)
    fields = np.stack([gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(classes + 1)])
    noise = np.stack([gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(classes + 1)])
    truth, prediction = fields.argmax(0).astype(np.uint8), (fields + 0.2 * noise).argmax(0).astype(np.uint8)
    prediction[tuple(rng.integers(0, size, 5) for size in shape)] = rng.integers(0, classes + 1, 5)
    return truth, prediction


def ball(
    shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float, spacing=(1, 1, 1)
) -> np.ndarray:
    away = sum(((index - at) * step) ** 2 for index, at, step in zip(np.indices(shape), centre, spacing))
    return away <= radius**2


def slow_twin(truth: np.ndarray, prediction: np.ndarray, spacing, tolerance_mm: float) -> tuple[float, ...]:
    """The definitions again: every surface voxel against every other."""
    of_truth, of_prediction = (
        np.argwhere(mask & ~binary_erosion(mask)) * np.array(spacing) for mask in (truth, prediction)
    )
    apart = cdist(of_truth, of_prediction)
    missed, invented = apart.min(axis=1), apart.min(axis=0)
    within = (missed <= tolerance_mm + 1e-6).sum() + (invented <= tolerance_mm + 1e-6).sum()
    return (
        2 * (truth & prediction).sum() / (truth.sum() + prediction.sum()),
        max(np.quantile(missed, 0.95), np.quantile(invented, 0.95)),
        within / (len(missed) + len(invented)),
        np.concatenate([missed, invented]).mean(),
        (prediction.sum() - truth.sum()) * np.prod(spacing) / 1000,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.5, 3.3)])
def test_equals_monai_on_blobs(seed, spacing):
    truth, prediction = blobs(seed, (40, 33, 27))
    rows = case_metrics(truth, prediction, spacing, (1, 2, 3), 2.0)
    of_truth, of_prediction = (
        torch.stack([torch.from_numpy(labels == value) for value in (1, 2, 3)])[None].float()
        for labels in (truth, prediction)
    )
    everything = {"include_background": True}
    hd95 = compute_hausdorff_distance(of_prediction, of_truth, percentile=95, spacing=spacing, **everything)[0]
    surface = compute_surface_dice(of_prediction, of_truth, [2.0] * 3, spacing=spacing, **everything)[0]
    overlap = DiceMetric(reduction="none", **everything)(of_prediction, of_truth)[0]
    average = compute_average_surface_distance(of_prediction, of_truth, symmetric=True, spacing=spacing, **everything)
    assert [row["class"] for row in rows] == [1, 2, 3]
    assert [row["hd95_mm"] for row in rows] == pytest.approx(hd95.tolist(), abs=1e-4)
    assert [row["nsd"] for row in rows] == pytest.approx(surface.tolist(), abs=1e-4)
    assert [row["dice"] for row in rows] == pytest.approx(overlap.tolist(), abs=1e-4)
    assert [row["asd_mm"] for row in rows] == pytest.approx(average[0].tolist(), abs=1e-4)


def deepmind(truth: np.ndarray, prediction: np.ndarray, spacing, tolerance_mm: float) -> dict[str, float]:
    """What surface-distance says; of its two averages the one of both surfaces together."""
    found = surface_distance.compute_surface_distances(truth, prediction, spacing)
    areas = [found[f"surfel_areas_{side}"].sum() for side in ("gt", "pred")]
    return {
        "dice": surface_distance.compute_dice_coefficient(truth, prediction),
        "hd95_mm": surface_distance.compute_robust_hausdorff(found, 95),
        "nsd": surface_distance.compute_surface_dice_at_tolerance(found, tolerance_mm),
        "asd_mm": np.average(surface_distance.compute_average_surface_distance(found), weights=areas),
    }


SPACINGS = [(1.0, 1.0, 1.0), (0.7, 1.5, 3.3), (2.0, 0.5, 1.0)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance_mm", [1.0, 2.0])
def test_elements_equal_deepminds_surface_distance(seed, spacing, tolerance_mm):
    truth, prediction = blobs(seed, (40, 33, 27))
    rows = case_metrics(truth, prediction, spacing, (1, 2, 3), tolerance_mm, surface="elements")
    for row in rows:
        theirs = deepmind(truth == row["class"], prediction == row["class"], spacing, tolerance_mm)
        assert {name: row[name] for name in theirs} == pytest.approx(theirs, abs=1e-4)


OF_NOISE = {
    "seed": st.integers(0, 10**6),
    "shape": st.tuples(*[st.integers(1, 7)] * 3),
    "spacing": st.tuples(*[st.sampled_from([0.3, 1.0, 2.5, 8.0])] * 3),
    "filled": st.floats(0.02, 0.98),
}


def images_of_noise(seed, shape, filled):
    """Truth and prediction, neither of them empty."""
    rng = np.random.default_rng(seed)
    truth, prediction = rng.random(shape) < filled, rng.random(shape) < filled
    truth.flat[rng.integers(truth.size)] = prediction.flat[rng.integers(truth.size)] = True
    return truth, prediction


@settings(max_examples=60, deadline=None)
@given(**OF_NOISE)
def test_elements_of_noise_of_any_shape_equal_deepminds(seed, shape, spacing, filled):
    """Every one of the 256 neighbourhoods, sets that touch the image's edge, images of one voxel."""
    truth, prediction = images_of_noise(seed, shape, filled)
    (row,) = case_metrics(truth, prediction, spacing, (1,), 2.4, surface="elements")
    theirs = deepmind(truth, prediction, spacing, 2.4)
    assert [row["nsd"], row["asd_mm"]] == pytest.approx([theirs["nsd"], theirs["asd_mm"]], abs=1e-4)
    # Where exactly 95 % lie within a distance, rounding chooses for them between this one and the next.
    found = surface_distance.compute_surface_distances(truth, prediction, spacing)
    low, high = (surface_distance.compute_robust_hausdorff(found, 95 + way) for way in (-1e-3, 1e-3))
    assert low - 1e-4 <= row["hd95_mm"] <= high + 1e-4


def test_elements_of_empty_structures_follow_the_rule_and_agree_with_deepmind_that_nothing_was_found(monkeypatch):
    """surface-distance calls the HD95 of a missed structure infinite, and of what neither has it knows nothing."""
    monkeypatch.setattr(np, "Inf", math.inf, raising=False)  # the name that it knows is gone since numpy 2
    truth, prediction = np.zeros((2, 6, 8, 10), np.uint8)
    truth[4:, 4:, 4:], prediction[0, 6:, 6:] = 2, 3
    of_elements, of_voxels = (
        case_metrics(truth, prediction, (1.0, 1.5, 2.0), (2, 3, 4), surface=surface)
        for surface in ("elements", "voxels")
    )
    assert all(row == pytest.approx(twin, nan_ok=True) for row, twin in zip(of_elements, of_voxels, strict=True))
    missed, _, absent = of_elements
    theirs = surface_distance.compute_surface_distances(truth == 2, prediction == 2, (1.0, 1.5, 2.0))
    assert surface_distance.compute_surface_dice_at_tolerance(theirs, 2.0) == missed["nsd"] == 0.0
    assert math.isinf(surface_distance.compute_robust_hausdorff(theirs, 95))
    assert missed["hd95_mm"] == missed["asd_mm"] == pytest.approx(math.hypot(6 * 1.0, 8 * 1.5, 10 * 2.0))
    assert all(math.isnan(absent[metric]) for metric in METRICS)


def test_elements_of_a_single_voxel_by_hand():
    """Eight corners, each cut by a triangle between the middles of three edges: an octahedron of half the area
    8 * sqrt(3) / 8; of another voxel 2 mm away the four inner corners lie 1 mm from it, the four outer ones 2 mm."""
    truth, prediction = np.zeros((2, 5, 5, 5), bool)
    truth[2, 2, 1] = prediction[2, 2, 3] = True
    labels, box = truth.astype(np.uint16), np.array([[2, 3], [2, 3], [1, 2]])
    surface, areas = surface_elements(labels, 1, box, (1.0, 1.0, 1.0))
    assert len(surface.points) == 8 and areas == pytest.approx(np.full(8, math.sqrt(3) / 8))
    assert {tuple(point) for point in surface.points} == {(i, j, k) for i in (2, 3) for j in (2, 3) for k in (1, 2)}
    (row,) = case_metrics(truth, prediction, (1.0, 1.0, 1.0), (1,), 1.0, surface="elements")
    assert [row[name] for name in ("hd95_mm", "nsd", "asd_mm")] == pytest.approx([2.0, 0.5, 1.5])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_voxels_and_elements_differ_by_as_much_as_the_page_says(seed, spacing):
    """Were either twice as large as it is, this would say so."""
    truth, prediction = (labels == 1 for labels in blobs(seed, (40, 33, 27)))
    for tolerance_mm in (1.0, 2.0):
        (row,) = case_metrics(truth, prediction, spacing, (1,), tolerance_mm)
        theirs = deepmind(truth, prediction, spacing, tolerance_mm)
        assert 1.5 <= row["asd_mm"] / theirs["asd_mm"] <= 1.65
        assert 1.05 <= row["hd95_mm"] / theirs["hd95_mm"] <= 1.85
        assert 0.0 <= theirs["nsd"] - row["nsd"] <= 0.1


def test_equals_deepmind_where_the_definitions_meet():
    """Two boxes, one shifted along an axis by whole voxels: the largest distance is the shift, for both."""
    truth, prediction = np.zeros((2, 24, 24, 24), bool)
    truth[4:14, 5:15, 6:16] = prediction[4:14, 5:15, 10:20] = True
    theirs = surface_distance.compute_surface_distances(truth, prediction, (1.0, 1.0, 2.0))
    ours = case_metrics(truth, prediction, (1.0, 1.0, 2.0), (1,), 2.0)[0]
    assert ours["hd95_mm"] == surface_distance.compute_robust_hausdorff(theirs, 95) == 8.0
    assert ours["dice"] == surface_distance.compute_dice_coefficient(truth, prediction)


@settings(max_examples=60, deadline=None)
@given(**OF_NOISE)
def test_equals_the_slow_twin(seed, shape, spacing, filled):
    truth, prediction = images_of_noise(seed, shape, filled)
    (row,) = case_metrics(truth, prediction, spacing, (1,), 2.5)
    assert [row[metric] for metric in METRICS] == pytest.approx(slow_twin(truth, prediction, spacing, 2.5))
    assert (row["voxels_true"], row["voxels_predicted"]) == (truth.sum(), prediction.sum())


@pytest.mark.parametrize("seed", range(3))
def test_search_and_planes_measure_the_same_distances(seed):
    """Whichever way is taken, and wherever the search gives up, the distances are the same."""
    truth, prediction = (labels.astype(np.uint16) for labels in blobs(seed, (25, 30, 20)))
    index_of = np.full(1 << 16, -1, np.int64)
    index_of[1] = 0
    counts, boxes = surfaces.census(truth, prediction, index_of, 1)
    goal_points, goal_rows = surfaces.surface_voxels(prediction, 1, boxes[1, 0], counts[0, 1])
    starts, _ = surfaces.surface_voxels(truth, 1, boxes[0, 0], counts[0, 0])
    goal, spacing = (goal_points, goal_rows, boxes[1, 0]), (0.8, 1.0, 2.5)
    searched, swept = np.empty(len(starts)), np.empty(len(starts))
    assert surfaces.search(starts, *goal, spacing, searched, 10**9) == len(starts)
    assert surfaces.search(starts, *goal, spacing, swept, 100) < len(starts)
    surfaces.planes(starts, np.lexsort((starts[:, 1], starts[:, 2])), *goal, spacing, swept)
    expected = cdist(starts * np.array(spacing), goal_points * np.array(spacing)).min(axis=1)
    np.testing.assert_allclose(np.sqrt(searched), expected, atol=1e-9)
    np.testing.assert_allclose(np.sqrt(swept), expected, atol=1e-9)


def test_far_apart_surfaces_are_swept_and_right():
    """Noise on one side makes the search give up; the numbers stay the slow twin's."""
    truth = np.zeros((30, 30, 12), bool)
    truth[:3, :3, :3] = True
    prediction = np.random.default_rng(0).random(truth.shape) < 0.5
    (row,) = case_metrics(truth, prediction, (1.0, 2.0, 3.0), (1,))
    assert [row[metric] for metric in METRICS] == pytest.approx(slow_twin(truth, prediction, (1, 2, 3), 2.0))


def test_a_shifted_box_by_hand():
    """A box 9 x 9 x 9 shifted by 3 along k (2 mm): the faces across k lie 6 mm apart, the sides overlap."""
    truth, prediction = np.zeros((2, 20, 20, 20), bool)
    truth[5:14, 5:14, 4:13] = True
    prediction[5:14, 5:14, 7:16] = True
    spacing = (1.0, 1.0, 2.0)
    assert dice(truth, prediction) == pytest.approx(6 / 9)
    assert hd95_mm(truth, prediction, spacing) == pytest.approx(6.0)
    # Of 9^3 - 7^3 = 386 surface voxels the outer face (81) lies 6 mm away, the two rims (32 each) that the other box
    # does not hold 4 and 2 mm, the middle of the inner face 4 mm from the nearest side, all others less.
    assert nsd(truth, prediction, spacing, 3.9) == pytest.approx((386 - 81 - 32 - 1) / 386)
    assert nsd(truth, prediction, spacing, 6.0) == 1.0
    assert nsd(truth, truth, spacing, 0.0) == 1.0


def test_concentric_balls_lie_their_radii_apart():
    truth, prediction = (ball((50, 50, 50), (24.5, 24.5, 24.5), radius) for radius in (12, 18))
    assert hd95_mm(truth, prediction, (1.0, 1.0, 1.0)) == pytest.approx(6.0, abs=0.5)
    assert hd95_mm(truth, prediction, (0.5, 0.5, 0.5)) == pytest.approx(3.0, abs=0.25)
    assert asd_mm(truth, prediction, (0.5, 0.5, 0.5)) == pytest.approx(3.0, abs=0.25)
    (row,) = case_metrics(truth, prediction, (0.5, 0.5, 0.5), (1,))
    assert row["volume_difference_ml"] == pytest.approx(4 / 3 * math.pi * (9**3 - 6**3) / 1000, rel=0.01)
    assert dice(truth, prediction) == pytest.approx(2 * 12**3 / (12**3 + 18**3), abs=0.01)
    assert nsd(truth, prediction, (1.0, 1.0, 1.0), 5.0) == 0.0
    assert nsd(truth, prediction, (1.0, 1.0, 1.0), 7.0) == 1.0


def test_the_same_ball_on_a_coarser_grid_scores_alike():
    """Millimetres, not voxels: 3 mm apart is 3 mm apart on 1 x 1 x 1 and on 1 x 1 x 3 mm."""
    fine = [ball((48, 48, 48), (24, 24, at), 12) for at in (22.5, 25.5)]
    coarse = [ball((48, 48, 16), (24, 24, at), 12, (1, 1, 3)) for at in (7, 8)]
    assert hd95_mm(*coarse, (1.0, 1.0, 3.0)) == pytest.approx(hd95_mm(*fine, (1.0, 1.0, 1.0)), abs=0.5)


def test_empty_structures_follow_the_rule():
    """1: found; 2: missed; 3: invented; 4: absent and called absent."""
    truth, prediction = np.zeros((2, 6, 8, 10), np.uint8)
    truth[1:3, 1:3, 1:3] = prediction[1:3, 1:3, 1:3] = 1
    truth[4:, 4:, 4:] = 2
    prediction[0, 6:, 6:] = 3
    diagonal_mm = math.hypot(6 * 1.0, 8 * 1.5, 10 * 2.0)
    found, missed, invented, absent = case_metrics(truth, prediction, (1.0, 1.5, 2.0), (1, 2, 3, 4))
    scores = {"dice": 1, "hd95_mm": 0, "nsd": 1, "asd_mm": 0, "volume_difference_ml": 0}
    assert found == {"class": 1, **scores, "voxels_true": 8, "voxels_predicted": 8}
    for row in (missed, invented):
        assert (row["dice"], row["nsd"]) == (0.0, 0.0)
        assert row["hd95_mm"] == row["asd_mm"] == pytest.approx(diagonal_mm)
    assert missed["volume_difference_ml"] == pytest.approx(-2 * 4 * 6 * 3.0 / 1000)
    assert invented["volume_difference_ml"] == pytest.approx(2 * 4 * 3.0 / 1000)
    assert (missed["voxels_true"], missed["voxels_predicted"]) == (2 * 4 * 6, 0)
    assert (invented["voxels_true"], invented["voxels_predicted"]) == (0, 2 * 4)
    assert all(math.isnan(absent[metric]) for metric in METRICS)
    empty, full = np.zeros((3, 4, 12), bool), np.ones((3, 4, 12), bool)
    assert math.isnan(dice(empty, empty)) and math.isnan(hd95_mm(empty, empty, (1, 1, 1)))
    assert math.isnan(nsd(empty, empty, (1, 1, 1)))
    assert (dice(full, empty), hd95_mm(empty, full, (1, 1, 1)), nsd(full, empty, (1, 1, 1))) == (0.0, 13.0, 0.0)


def test_a_missed_organ_is_the_worst_score_here_and_the_best_in_monai():
    """MONAI calls the HD95 of a missed organ NaN, and its mean over the cases 0.0, as if every surface had been met."""
    truth, prediction = np.zeros((2, 10, 10, 10), bool)
    truth[2:6, 2:6, 2:6] = True
    of_truth, of_prediction = (torch.from_numpy(mask)[None, None].float() for mask in (truth, prediction))
    theirs = HausdorffDistanceMetric(include_background=True, percentile=95, reduction="mean")
    single = theirs(of_prediction, of_truth)
    assert not torch.isfinite(single).any() and theirs.aggregate().item() == 0.0
    (row,) = case_metrics(truth, prediction, (1.0, 1.0, 1.0), (1,))
    assert row["hd95_mm"] == row["asd_mm"] == pytest.approx(math.sqrt(300)) and row["dice"] == row["nsd"] == 0.0


def test_each_class_may_have_its_own_tolerance():
    truth, prediction = np.zeros((2, 12, 12, 12), np.uint8)
    for value, at in ((1, 1), (2, 7)):
        truth[1:5, 1:5, at : at + 3] = prediction[2:6, 1:5, at : at + 3] = value
    names = ["liver", "spleen"]
    tolerances = tolerances_of(names, 0.5, {"spleen": 1.0})
    assert tolerances == [0.5, 1.0]
    liver, spleen = case_metrics(truth, prediction, (1.0, 1.0, 1.0), (1, 2), tolerances)
    assert liver["nsd"] < 1.0 == spleen["nsd"]
    assert [row["nsd"] for row in case_metrics(truth, prediction, (1.0, 1.0, 1.0), (1, 2), 1.0)] == [1.0, 1.0]
    with pytest.raises(UsageFault, match="a tolerance for lung; the classes are liver, spleen"):
        tolerances_of(names, 2.0, {"lung": 1.0})
    with pytest.raises(ValueError, match="one for each"):
        case_metrics(truth, prediction, (1.0, 1.0, 1.0), (1, 2), [1.0])


def test_a_surface_a_rounding_error_beyond_the_tolerance_counts():
    """Three voxels of 0.7 mm are 2.0999999999999996 mm, or 2.1000000000000001: both are 2.1 mm."""
    truth, prediction = np.zeros((2, 12, 3, 3), bool)
    truth[2, 1, 1] = prediction[5, 1, 1] = True
    for step in (0.7, 0.1, 0.3, 1.1):
        assert nsd(truth, prediction, (step, 1.0, 1.0), 3 * step) == 1.0
        assert nsd(truth, prediction, (step, 1.0, 1.0), 3 * step - 1e-3) == 0.0


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, np.uint16, ">i4"])
def test_label_values_of_any_integer_type_and_memory_order(kind):
    """MM-WHS calls its structures 205 and 850; SimpleITK hands out transposed views."""
    high = 205 if np.dtype(kind).itemsize == 1 else 850
    truth, prediction = (np.asfortranarray((labels == 1) * high).astype(kind) for labels in blobs(5, (12, 14, 16)))
    expected = case_metrics(truth == high, prediction == high, (1, 1, 1), (1,))[0]
    assert case_metrics(truth, prediction, (1, 1, 1), (high,))[0] == {**expected, "class": high}


def test_what_cannot_be_measured_is_said():
    labels = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(DataFault, match="another grid"):
        case_metrics(labels, labels[:3], (1, 1, 1), (1,))
    with pytest.raises(DataFault, match="three positive numbers"):
        case_metrics(labels, labels, (1, 0, 1), (1,))
    with pytest.raises(DataFault, match="whole numbers"):
        case_metrics(labels.astype(float), labels, (1, 1, 1), (1,))
    with pytest.raises(DataFault, match="from -1 to 0"):
        case_metrics(labels, labels.astype(np.int16) - np.eye(4, dtype=np.int16), (1, 1, 1), (1,))
    with pytest.raises(ValueError, match="different label values"):
        case_metrics(labels, labels, (1, 1, 1), (1, 2, 1))
    with pytest.raises(ValueError, match="surface 'edges'; it is one of voxels, elements"):
        case_metrics(labels, labels, (1, 1, 1), (1,), surface="edges")
