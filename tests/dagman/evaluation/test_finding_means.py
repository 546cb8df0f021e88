"""Means over findings, and differences whose p asks what the difference says: by hand, by a slow twin, under noise."""

import math

import numpy as np
import pytest

from dagman.evaluation.finding_means import difference, macro
from dagman.evaluation.statistics import RESAMPLES
from spade3d.faults import DataFault


def judged(values: dict[tuple[str, str], float]) -> list[dict]:
    """One box a subject and finding."""
    return [{"subject": who, "finding": what, "box": 0, "iou": x} for (who, what), x in values.items()]


def test_the_mean_is_over_boxes_then_over_findings_and_its_interval_draws_subjects():
    values = {("a", "cyst", 0): 1.0, ("a", "cyst", 1): 0.0, ("b", "cyst", 0): 1.0, ("b", "mass", 0): 0.0}
    values[("c", "mass", 0)] = math.nan
    found = macro(values)
    assert found.mean == pytest.approx((2 / 3 + 0) / 2) and found.subjects == 2 and "2 subjects" in found.note
    # Every set of two that can be drawn, by hand: aa 0.5 (no mass), ab and ba 1/3, bb (1 + 0) / 2.
    assert found.low == pytest.approx(1 / 3) and found.high == pytest.approx(0.5)
    assert math.isnan(macro({("a", "cyst", 0): math.nan}).mean) and math.isnan(macro({("a", "cyst", 0): 1.0}).low)


def test_a_difference_is_paired_and_knows_which_way_is_better():
    def rows(values, seed=0):
        return [
            {"subject": who, "finding": "cyst", "box": 0, "seed": seed, "iou": x, "peak_mm": 10 * x}
            for who, x in values.items()
        ]

    a, b = rows({"p": 0.1, "q": 0.5, "r": 0.3}), rows({"p": 0.4, "q": 0.6, "r": 0.3})
    found = difference(a, b, "iou")
    assert found.difference == pytest.approx(0.4 / 3) and (found.wins, found.ties, found.losses) == (2, 1, 0)
    assert found.boxes == found.subjects == 3
    assert found.p == pytest.approx(2 / 27, abs=0.01)  # of the 27 sets that can be drawn one has no gain: r alone
    assert (difference(a, b, "peak_mm").wins, difference(a, b, "peak_mm").losses) == (0, 2)
    # Two seeds of one subject are one subject.
    twice = difference(a + rows({"p": 0.0}, 1), b + rows({"p": 0.1}, 1), "iou")
    assert twice.subjects == 3 and twice.boxes == 4
    with pytest.raises(DataFault, match="1 boxes were judged by one method alone"):
        difference(a, b[1:], "iou")
    assert math.isnan(difference(a[:1], b[:1], "iou").p) and math.isnan(difference([], [], "iou").p)


def test_a_box_that_comes_twice_is_refused():
    a = judged({("p", "cyst"): 0.1, ("q", "cyst"): 0.2})
    with pytest.raises(DataFault, match="q: cyst 0 comes twice in the second method; one row per box and seed"):
        difference(a, [*a, a[1]], "iou")
    seeded = [row | {"seed": seed} for row in a for seed in (0, 1)]
    with pytest.raises(DataFault, match=r"p: cyst 0 \(1\) comes twice in the first method"):
        difference([*seeded, seeded[1]], seeded, "iou")
    assert difference(seeded, seeded, "iou").boxes == 4


def test_p_is_of_the_difference_and_not_of_how_many_subjects_changed():
    """One subject gains 1 in a rare finding, twenty lose 0.04 in another: the mean over findings gains 0.48, and the
    sets of subjects without that one (20/21 to the power of 21, 36 %) lose."""
    changes = {("one", "rare"): 1.0} | {(f"p{n}", "cyst"): -0.04 for n in range(20)}
    found = difference(judged(dict.fromkeys(changes, 0.0)), judged(changes), "iou")
    assert found.difference == pytest.approx(0.48) and (found.wins, found.ties, found.losses) == (1, 0, 20)
    assert found.p == pytest.approx(2 * (20 / 21) ** 21, abs=0.02)
    assert found.low < 0 < found.high


def test_p_is_that_of_a_slow_twin_which_draws_subjects_one_by_one():
    rng = np.random.default_rng(1)
    subjects = [f"p{n}" for n in range(7)]
    changes = {(who, what): float(rng.normal(0.2, 0.6)) for who in subjects for what in ("cyst", "mass")}
    del changes["p2", "mass"], changes["p4", "cyst"], changes["p5", "cyst"]
    times = 400
    below = above = 0
    for counts in np.random.default_rng(3).multinomial(7, [1 / 7] * 7, times):
        drawn = [who for who, count in zip(subjects, counts, strict=True) for _ in range(count)]
        means = []
        for what in ("cyst", "mass"):
            values = [changes[who, what] for who in drawn if (who, what) in changes]
            means += [sum(values) / len(values)] if values else []
        mean = sum(means) / len(means)
        below, above = below + (mean <= 0), above + (mean >= 0)
    a, b = judged(dict.fromkeys(changes, 0.0)), judged(changes)
    found = difference(a, b, "iou", seed=3, resamples=times)
    assert min(below, above) > 1 and found.p == pytest.approx(2 * (min(below, above) + 1) / (times + 1))
    turned = difference(b, a, "iou", seed=3, resamples=times)
    assert (turned.p, turned.difference) == (found.p, pytest.approx(-found.difference))


def test_noise_that_points_both_ways_alike_is_no_difference_and_a_gain_in_all_has_the_smallest_p():
    noise = np.random.default_rng(0).normal(0, 0.1, 15)
    both_ways = {(f"{side}{n}", "cyst"): side * float(x) for n, x in enumerate(noise) for side in (1, -1)}
    flat = dict.fromkeys(both_ways, 0.5)
    assert difference(judged(flat), judged({key: 0.5 + x for key, x in both_ways.items()}), "iou").p > 0.9
    gain = difference(judged(flat), judged(dict.fromkeys(flat, 0.6)), "iou")
    assert gain.p == 2 / (RESAMPLES + 1) and gain.wins == 30
    same = difference(judged(flat), judged({key: 0.5 + 1e-16 + 1e-16 * n for n, key in enumerate(flat)}), "iou")
    assert (same.p, same.ties) == (1.0, 30)  # what differs by the last bit does not differ
