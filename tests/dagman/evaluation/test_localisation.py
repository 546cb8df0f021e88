"""Scores of localisation: volumes worked out by hand, slow twins, and thresholds that never see what they judge."""

import math
from itertools import product

import numpy as np
import pytest

from dagman.evaluation.annotations import Annotation, HeatMap, annotations_of_labels, read_boxes
from dagman.evaluation.boxes import around
from dagman.evaluation.chosen_thresholds import halves, tuned
from dagman.evaluation.localisation import Judging, localised, measure, scores
from spade3d.faults import DataFault, UsageFault

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
SHAPE = (8, 8, 8)


def block(low, high, shape=SHAPE) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, low, high))] = True
    return mask


def boxed(mask, subject="a", finding="cyst") -> Annotation:
    return Annotation(subject, finding, around(mask, AFFINE))


def test_one_map_worked_out_by_hand():
    truth = block((2, 2, 2), (4, 4, 4))
    heat = np.zeros(SHAPE)
    heat[2:6, 2:4, 2:4] = 0.5  # twice as long as the lesion, along x
    heat[4, 2, 2] = 1.0  # the peak is just outside: 2 mm from its last voxel's centre, 1 mm from its face
    found = measure(HeatMap("a", "cyst", heat, AFFINE), [boxed(truth)], Judging(thresholds=(0.4, 0.6)))
    assert found.iou[:, 0].tolist() == pytest.approx([0.5, 0.0])
    assert found.iobb[:, 0].tolist() == pytest.approx([0.5, 0.0])
    assert found.centre_inside[:, 0].tolist() == [1, 0]  # the centre lies on the lesion's face
    # centres: of the lesion voxel 2.5 of each axis, of the boxes (3.5, 2.5, 2.5) and (4, 2, 2)
    assert found.error_mm[:, 0].tolist() == [[2, 0, 0], [3, 1.5, 2]]
    assert (found.pointing, found.pointing_near, found.peak_mm) == (0.0, 1.0, 1.0)
    of_mask = measure(
        HeatMap("a", "cyst", heat, AFFINE),
        [Annotation("a", "cyst", around(truth, AFFINE), truth)],
        Judging(tolerance_mm=1.5),
    )
    assert (of_mask.pointing, of_mask.pointing_near, of_mask.peak_mm) == (0.0, 0.0, 2.0)
    # voxels by value: 1 false; then 8 true and 7 false at once -> all recall at 8 of 16
    assert of_mask.voxel_ap == found.voxel_ap == pytest.approx(0.5)
    assert found.diameter_mm.tolist() == pytest.approx([(4 * 6 * 8) ** (1 / 3)])


def test_thresholds_may_come_in_any_order():
    heat = np.random.default_rng(4).random(SHAPE) ** 4
    heat, truths = HeatMap("a", "cyst", heat, AFFINE), [boxed(block((2, 2, 2), (4, 4, 4)))]
    rising, falling = (measure(heat, truths, Judging(thresholds=some)) for some in ((0.2, 0.4, 0.8), (0.8, 0.4, 0.2)))
    for name in ("iou", "iobb", "error_mm"):
        assert np.array_equal(getattr(rising, name), getattr(falling, name)[::-1], equal_nan=True)
    assert np.isfinite(rising.error_mm).all()


def test_the_row_says_which_thresholds_were_reached():
    truth = block((2, 2, 2), (4, 4, 4))
    maps = [HeatMap(who, "cyst", truth.astype(float), AFFINE) for who in "ab"]
    longer = truth | block((4, 2, 2), (6, 4, 4))
    maps[1] = HeatMap("b", "cyst", longer.astype(float), AFFINE)
    rows = {row["subject"]: row for row in localised(maps, [boxed(truth, who) for who in "ab"])}
    assert [rows["a"][f"t_iou_{t}"] for t in (0.1, 0.5, 0.7)] == [1, 1, 1] and rows["a"]["iou"] == 1
    assert [rows["b"][f"t_iou_{t}"] for t in (0.4, 0.5, 0.6)] == [1, 1, 0]
    assert [rows["b"][f"t_iobb_{t}"] for t in (0.25, 0.5, 0.75)] == [1, 1, 0]
    assert rows["a"]["pointing"] == 1 and rows["b"]["pointing"] == 0.5  # its highest voxels: half inside


def test_a_map_that_says_nothing_finds_nothing():
    truth = block((2, 2, 2), (4, 4, 4))
    empty = [HeatMap(who, "cyst", np.zeros(SHAPE), AFFINE) for who in "ab"]
    for row in localised(empty, [boxed(truth, who) for who in "ab"]):
        assert row["iou"] == row["iobb"] == row["centre_inside"] == row["pointing"] == row["pointing_near"] == 0
        assert math.isnan(row["error_x_mm"]) and math.isnan(row["peak_mm"])
        assert row["voxel_ap"] == pytest.approx(8 / 512)
    same = [HeatMap(who, "cyst", np.ones(SHAPE), AFFINE) for who in "ab"]
    for row in localised(same, [boxed(truth, who) for who in "ab"]):
        assert row["pointing"] == row["voxel_ap"] == row["iou"] == pytest.approx(8 / 512)


def test_of_two_lesions_each_has_its_row_and_the_peak_counts_in_either():
    labels = np.zeros(SHAPE, np.int64)
    labels[1:3, 1:3, 1:3] = 2
    labels[5:7, 5:7, 5:7] = 2
    annotations = [one for who in "ab" for one in annotations_of_labels(who, labels, AFFINE, {2: "cyst", 3: "none"})]
    assert len(annotations) == 4 and annotations[0].box_mm.tolist() == [[1, 1.5, 2], [5, 7.5, 10]]
    heat = np.where(labels == 2, 1.0, 0.0)
    heat[1:3, 1:3, 1:3] = 0.9
    maps = [HeatMap(who, "cyst", heat, AFFINE) for who in "ab"]
    one = [row["iou"] for row in localised(maps, annotations) if row["subject"] == "a"]
    both = [row["iou"] for row in localised(maps, annotations, Judging(keep="mass")) if row["subject"] == "a"]
    assert one == [0, 1] and both == [1, 1]
    assert [row["pointing"] for row in localised(maps, annotations)] == [1] * 4


def test_a_lesion_smaller_than_a_voxel_has_no_voxel_ap_but_can_be_pointed_at():
    small = Annotation("a", "cyst", np.array([[2.5, 3.5, 4.5], [3.5, 4.5, 5.5]]))  # between the centres
    heat = np.zeros(SHAPE)
    heat[1, 1, 1] = 1  # centre (2, 3, 4): half a mm away along each axis
    found = measure(HeatMap("a", "cyst", heat, AFFINE), [small], Judging())
    assert math.isnan(found.voxel_ap) and found.peak_mm == pytest.approx(0.75**0.5) and found.pointing_near == 1


# --- the threshold -------------------------------------------------------------------------------------------------


def test_a_threshold_never_sees_the_half_that_it_judges():
    # The lesions of one half fit the map at a low threshold, those of the other at a high one. Who tuned on what is
    # scored, or on all, would find the fit; who tunes on the other half always takes the wrong one.
    subjects = [f"p{n}" for n in range(8)]
    half = halves(subjects, seed=0)
    assert sorted(half.values()) == [0] * 4 + [1] * 4
    small, large = block((3, 3, 3), (5, 5, 5)), block((1, 1, 1), (7, 7, 7))
    heat = np.where(small, 1.0, np.where(large, 0.3, 0.0))
    maps = [HeatMap(who, "cyst", heat, AFFINE) for who in subjects]
    annotations = [boxed(large if half[who] else small, who) for who in subjects]
    rows = localised(maps, annotations, Judging(thresholds=(0.2, 0.9)))
    worst = 8 / 216
    assert [row["iou"] for row in rows] == pytest.approx([worst] * 8)
    assert {row["threshold"] for row in rows if half[row["subject"]]} == {0.9}
    assert {row["threshold"] for row in rows if not half[row["subject"]]} == {0.2}
    cheating = [max(measure(heat, [truth], Judging()).iou[:, 0]) for heat, truth in zip(maps, annotations)]
    assert cheating == [1.0] * 8


def test_a_score_does_not_depend_on_the_own_annotation_of_its_half():
    # The same half with all its truths replaced takes the same thresholds.
    rng = np.random.default_rng(0)
    subjects = [f"p{n}" for n in range(6)]
    half = halves(subjects, seed=3)
    values = {(who, "cyst"): rng.random((5, 2)) for who in subjects}
    other = {key: rng.random((5, 2)) if half[key[0]] else value for key, value in values.items()}
    first, second = tuned(values, seed=3), tuned(other, seed=3)
    assert all(first[key] == second[key] for key in first if half[key[0]])


def test_the_chosen_threshold_is_the_best_mean_of_the_other_half():
    rng = np.random.default_rng(1)
    subjects, findings = [f"p{n}" for n in range(7)], ("cyst", "mass")
    values = {key: rng.random((6, 1 + n % 2)) for n, key in enumerate(product(subjects, findings))}
    half = halves(subjects, seed=5)
    for (subject, finding), chosen in tuned(values, seed=5).items():
        means = []
        for n in range(6):
            those = [
                float(x) for (s, f), one in values.items() if half[s] != half[subject] and f == finding for x in one[n]
            ]
            means.append(sum(those) / len(those))
        assert chosen == means.index(max(means))


def test_a_finding_that_the_other_half_lacks_takes_the_threshold_of_all_and_one_subject_none():
    low, high = np.array([[0.9], [0.1]]), np.array([[0.1], [0.9]])
    half = halves("abcd", seed=0)
    here, there = ([who for who in "abcd" if half[who] == side] for side in (0, 1))
    values = {(here[0], "rare"): low, (there[0], "cyst"): high, (there[1], "mass"): high, (here[1], "cyst"): low}
    assert tuned(values, seed=0)[here[0], "rare"] == 1
    assert tuned({("a", "cyst"): low}, seed=0) == {("a", "cyst"): None}
    truth = block((2, 2, 2), (4, 4, 4))
    (row,) = localised([HeatMap("a", "cyst", truth.astype(float), AFFINE)], [boxed(truth)])
    assert math.isnan(row["iou"]) and row["pointing"] == 1


# --- all findings together -----------------------------------------------------------------------------------------


def test_scores_hold_every_finding_and_every_size():
    rng = np.random.default_rng(0)
    subjects = [f"p{n}" for n in range(4)]
    small, large = block((3, 3, 3), (4, 4, 4)), block((0, 0, 0), (7, 7, 7))
    annotations = [one for who in subjects for one in (boxed(small, who), boxed(large, who, "mass"))]  # 2.9 and 20.2 mm
    maps = [HeatMap(one.subject, one.finding, rng.random(SHAPE), AFFINE) for one in annotations]
    maps.append(HeatMap("p0", "unheard of", rng.random(SHAPE), AFFINE))
    found = scores(iter(maps), annotations, Judging(sizes_mm=(10.0,)))
    assert (found["boxes"], found["subjects"], set(found["by_finding"])) == (8, 4, {"cyst", "mass"})
    assert {name: of["boxes"] for name, of in found["by_size"].items()} == {"0 to 10 mm": 4, "10 to inf mm": 4}
    cyst, mass = (found["by_finding"][name]["iou"]["mean"] for name in ("cyst", "mass"))
    assert found["measures"]["iou"]["mean"] == pytest.approx((cyst + mass) / 2)
    assert found["by_size"]["0 to 10 mm"]["iou"] == found["by_finding"]["cyst"]["iou"]
    assert all(1 <= len(of) <= 2 for of in found["thresholds"].values())
    assert scores([], [])["boxes"] == 0


def test_what_cannot_be_judged_is_refused():
    truth = block((2, 2, 2), (4, 4, 4))
    heat = HeatMap("a", "cyst", truth.astype(float), AFFINE)
    with pytest.raises(DataFault, match="1 annotated findings have no map .b cyst."):
        scores([heat], [boxed(truth), boxed(truth, "b")])
    with pytest.raises(DataFault, match="two maps of cyst"):
        scores([heat, heat], [boxed(truth)])
    with pytest.raises(DataFault, match="lies on another grid"):
        scores([heat], [Annotation("a", "cyst", around(truth, AFFINE), truth[:4])])
    with pytest.raises(UsageFault, match="shares of the maximum"):
        Judging(thresholds=(0.0,))
    with pytest.raises(UsageFault, match="rising sizes"):
        Judging(sizes_mm=(3.0, 2.0))


def test_boxes_are_read_from_their_table(tmp_path):
    path = tmp_path / "boxes.csv"
    head = "subject,finding,x0,y0,z0,x1,y1,z1\n"
    path.write_text(head + "\na,cyst,1,2,3,4,5,6.5\n\n")
    (one,) = read_boxes(path)
    assert (one.subject, one.finding, one.box_mm.tolist()) == ("a", "cyst", [[1, 2, 3], [4, 5, 6.5]])
    for text, said in (
        ("subject,box\n", "columns are subject,box"),
        (head + "a,cyst,1,2,3,4,5\n", "line 2"),
        (head + "a,cyst,1,2,3,4,5,x\n", "line 2"),
        (head + "a,cyst,1,2,3,4,5,3\n", "line 2: the box goes from"),
    ):
        path.write_text(text)
        with pytest.raises(DataFault, match=said):
            read_boxes(path)
