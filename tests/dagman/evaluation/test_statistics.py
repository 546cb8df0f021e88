"""Means, intervals and paired tests over subjects, against hand, scipy and enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dagman.evaluation.statistics import (
    adjusted_over_sides,
    holm,
    mean_with_interval,
    paired_comparison,
    signed_rank_p,
    values_by_subject,
)
from spade3d.faults import DataFault

NAN = math.nan


def row(case: str, dice: float, *, value: int = 1, subject: str = "", **more) -> dict:
    return {
        "case": case,
        "subject": subject or case,
        "class": value,
        "name": {1: "liver", 2: "spleen"}[value],
        "dice": dice,
        "hd95_mm": 10 * (1 - dice),
        "nsd": dice / 2,
        "voxels_true": 100,
        "voxels_predicted": 90,
        **more,
    }


def test_mean_is_over_values_and_interval_over_subjects():
    values = {"a": [0.9, 0.8, 0.7], "b": [0.5], "c": [NAN, 0.6], "gone": [NAN]}
    result = mean_with_interval(values)
    assert result.mean == pytest.approx((0.9 + 0.8 + 0.7 + 0.5 + 0.6) / 5)
    assert result.subjects == 3 and "only 3 subjects" in result.note
    # With 3 subjects there are 27 equally likely draws: the bootstrap must find their percentiles.
    sums, counts = {"a": 2.4, "b": 0.5, "c": 0.6}, {"a": 3, "b": 1, "c": 1}
    draws = [sum(map(sums.get, d)) / sum(map(counts.get, d)) for d in itertools.product("abc", repeat=3)]
    assert (result.low, result.high) == pytest.approx((min(draws), max(draws)))
    assert result == mean_with_interval(dict(reversed(values.items()))), "the order of subjects decides nothing"


def test_interval_covers_as_it_says():
    """200 data sets of 25 subjects: about 95 % of the intervals hold the true mean (percentile bootstrap: 93 %)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        result = mean_with_interval(
            {str(i): [value] for i, value in enumerate(rng.normal(0.8, 0.05, 25))}, resamples=999
        )
        held += result.low <= 0.8 <= result.high
    assert 0.88 <= held / 200 <= 0.98
    assert result.note == ""


def test_cases_of_one_subject_move_together():
    """Ten copies of each subject's value carry no more knowledge than one: the interval stays as wide."""
    single = {str(i): [i / 10] for i in range(10)}
    copies = {subject: values * 10 for subject, values in single.items()}
    one, ten = mean_with_interval(single), mean_with_interval(copies)
    assert (ten.mean, ten.low, ten.high) == pytest.approx((one.mean, one.low, one.high))


def test_one_subject_has_no_interval_and_none_has_no_mean():
    alone = mean_with_interval({"a": [0.4, 0.6]})
    assert alone.mean == 0.5 and math.isnan(alone.low) and math.isnan(alone.high) and "no interval" in alone.note
    nobody = mean_with_interval({"a": [NAN]})
    assert math.isnan(nobody.mean) and nobody.subjects == 0 and nobody.note


def test_values_by_subject_take_each_case_once():
    rows = [
        row("head_left", 0.8, subject="head"),
        row("head_left", 0.6, value=2, subject="head"),
        row("head_right", 0.9, subject="head"),
        row("head_right", NAN, value=2, subject="head"),
        row("other", NAN),
    ]
    means = values_by_subject(rows)
    assert means["head"] == pytest.approx([0.7, 0.9]) and math.isnan(means["other"][0])
    assert values_by_subject(rows, "nsd", of_class=1)["head"] == pytest.approx([0.4, 0.45])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_signed_rank_equals_the_enumeration_of_all_signs(differences):
    moved = [abs(d) for d in differences if d]
    ranks = stats.rankdata(moved) if moved else []
    observed = sum(rank for rank, d in zip(ranks, [d for d in differences if d]) if d > 0)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(moved))]
    below, above = (sum(s <= observed for s in sums), sum(s >= observed for s in sums))
    assert signed_rank_p(differences) == pytest.approx(min(1, 2 * min(below, above) / len(sums)))


def test_signed_rank_equals_scipy_and_knows_its_limits():
    for n in (4, 12, 40):
        differences = np.random.default_rng(n).normal(0.3, 1, n)
        assert signed_rank_p(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)
    assert [signed_rank_p([1.0] * n) for n in (4, 5, 6)] == pytest.approx([0.125, 0.0625, 0.03125])
    assert signed_rank_p([0.0, 0.0]) == signed_rank_p([NAN]) == 1.0
    assert signed_rank_p([NAN, 0.1, 0.2]) == signed_rank_p([0.1, 0.2])
    assert signed_rank_p(np.random.default_rng(0).normal(1, 1, 300)) < 1e-6


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    adjusted = holm([NAN, 0.02, 0.04])
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.04, 0.04])
    assert holm([]) == []


def test_comparison_by_hand():
    """Seven patients: b gains 0.1 on the liver in six and loses 0.2 in one; the spleen does not change."""
    gains = [0.1] * 6 + [-0.2]
    a = [row(f"p{i}", 0.5 + i / 100) for i in range(7)] + [row(f"p{i}", 0.7, value=2) for i in range(7)]
    b = [row(f"p{i}", 0.5 + i / 100 + gains[i]) for i in range(7)] + [row(f"p{i}", 0.7, value=2) for i in range(7)]
    mean, liver, spleen = paired_comparison(a, b[::-1])
    assert [one.name for one in (mean, liver, spleen)] == ["mean", "liver", "spleen"]
    assert [one.class_ for one in (mean, liver, spleen)] == [None, 1, 2]
    assert liver.difference == pytest.approx(0.4 / 7) and liver.low < liver.difference < liver.high
    assert (liver.wins, liver.ties, liver.losses, liver.subjects, liver.pairs) == (6, 0, 1, 7, 7)
    # The one negative change has rank 7, the six tied gains 3.5 each. As few as 7 negative ranks have: nothing, one
    # gain (6 ways), two gains (15), the loss (1): 23 of the 128 sign patterns, in each of the two tails.
    assert liver.p == pytest.approx(2 * 23 / 128)
    assert liver.p_holm == pytest.approx(2 * liver.p) and mean.p_holm == mean.p == liver.p
    assert (spleen.difference, spleen.p, spleen.ties) == (0.0, 1.0, 7)
    assert mean.difference == pytest.approx(0.2 / 7) and mean.mean_b - mean.mean_a == pytest.approx(mean.difference)
    assert liver.smallest_p == 2**-6 and liver.note == ""
    turned = paired_comparison(b, a)[1]
    assert (turned.difference, turned.wins) == (pytest.approx(-liver.difference), 1)


@pytest.mark.parametrize("metric", ["hd95_mm", "asd_mm"])
def test_smaller_is_better_for_distances(metric):
    a, b = ([row(f"p{i}", 0.5 + gain * (1 + i), asd_mm=5 - gain * i) for i in range(6)] for gain in (0.0, 0.02))
    liver = paired_comparison(a, b, metric=metric)[1]
    assert liver.difference < 0 and (liver.wins, liver.losses) == (6 - (metric == "asd_mm"), 0)


def test_a_metric_that_has_no_better_or_that_a_table_lacks_is_refused():
    a = [row(f"p{i}", 0.5) for i in range(3)]
    with pytest.raises(DataFault, match="the second run was judged before there was asd_mm"):
        paired_comparison([one | {"asd_mm": 1.0} for one in a], a, metric="asd_mm")
    with pytest.raises(ValueError, match="volume_difference_ml; one of dice, hd95_mm, nsd, asd_mm"):
        paired_comparison(a, a, metric="volume_difference_ml")


def test_several_sides_are_adjusted_for_all_that_is_looked_at():
    """Two sides, two structures: the means are a family of two, the structures one of four."""
    reference = [row(f"p{i}", 0.5, value=value) for i in range(8) for value in (1, 2)]
    rng = np.random.default_rng(0)
    sides = {
        name: [one | {"dice": one["dice"] + gain + 0.1 * rng.random()} for one in reference]
        for name, gain in (("good", 0.0), ("mixed", -0.05))
    }
    alone = {name: paired_comparison(reference, rows) for name, rows in sides.items()}
    together = adjusted_over_sides(alone)
    assert [of[0].p_holm for of in together.values()] == holm([of[0].p for of in alone.values()])
    structures = [one.p_holm for of in together.values() for one in of[1:]]
    assert structures == holm([one.p for of in alone.values() for one in of[1:]])
    assert together["good"][1].p_holm == pytest.approx(4 * 2 / 2**8)
    assert together["good"][1].p_holm > alone["good"][1].p_holm
    assert adjusted_over_sides({"good": alone["good"]})["good"] == alone["good"], "one side is as it was"


def test_a_family_too_large_for_so_few_subjects_says_so():
    """With 6 subjects the smallest p is 0.03125: of two structures none can be shown, however large the gain."""
    a = [row(f"p{i}", 0.5, value=value) for i in range(6) for value in (1, 2)]
    b = [one | {"dice": 0.6} for one in a]
    mean, liver, _ = adjusted_over_sides({"b": paired_comparison(a, b)})["b"]
    assert mean.note == "" and mean.p_holm == 2**-5
    assert "over 2 structures and sides the smallest possible p of 6 subjects is 0.0625" in liver.note


def test_a_structure_that_was_not_tested_is_in_no_family():
    """The spleen is absent everywhere: of two structures one is tested, and 0.03125 is within reach."""
    a = [row(f"p{i}", 0.5) for i in range(6)] + [row(f"p{i}", 0.0, value=2) | ABSENT for i in range(6)]
    b = [one | ({"dice": 0.6} if one["class"] == 1 else {}) for one in a]
    (_, liver, spleen), *_ = adjusted_over_sides({"b": paired_comparison(a, b)}).values()
    assert math.isnan(spleen.p_holm) and (liver.p_holm, liver.note) == (2**-5, "")
    two = adjusted_over_sides({side: paired_comparison(a, b) for side in "bc"})["b"]
    assert "over 2 sides the smallest possible p of 6 subjects is 0.0625" in two[0].note
    assert "over 2 structures and sides the smallest possible p of 6 subjects is 0.0625" in two[1].note


def test_too_few_subjects_say_so():
    """Four cases of two subjects are two: no p below 0.5 can come out, whatever the gain."""
    a = [row(f"{head}_{side}", 0.5, subject=head) for head in "xy" for side in "lr"]
    b = [row(f"{head}_{side}", 0.9, subject=head) for head in "xy" for side in "lr"]
    mean = paired_comparison(a, b)[0]
    assert (mean.subjects, mean.pairs, mean.wins, mean.p) == (2, 4, 2, 0.5)
    assert "only 2 subjects" in mean.note and "smallest possible p is 0.5" in mean.note


def test_seeds_are_paired_and_averaged_within_a_subject():
    a = [row("p", 0.5, seed=0), row("p", 0.7, seed=1), row("q", 0.5, seed=0), row("q", 0.5, seed=1)]
    b = [row("p", 0.6, seed=0), row("p", 0.7, seed=1), row("q", 0.4, seed=0), row("q", 0.6, seed=1)]
    mean, liver = paired_comparison(a, b)
    assert (liver.subjects, liver.pairs, liver.wins, liver.ties) == (2, 4, 1, 1)
    assert mean.difference == pytest.approx((0.1 + 0 - 0.1 + 0.1) / 4)


def test_pairs_are_told_by_seed_and_draw():
    """Two draws of one seed are two pairs; without `pair` the seed tells, and a pair that one side lacks is named."""
    a = [row("p", 0.5, seed=0, pair=f"seed 0, draw {draw}") for draw in (0, 1)]
    b = [one | {"dice": 0.6 + draw / 10} for draw, one in enumerate(a)]
    (mean, *_) = paired_comparison(a, b[::-1])
    assert (mean.pairs, mean.subjects, mean.difference) == (2, 1, pytest.approx(0.15))
    with pytest.raises(DataFault, match=r"only the first run has p \(class 1, seed 0, draw 1\)"):
        paired_comparison(a, b[:1])
    with pytest.raises(DataFault, match="p: class 1 comes twice"):
        paired_comparison([{**one, "pair": "seed 0"} for one in a], b)


DIAGONAL_MM = 500.0
ABSENT = {"voxels_true": 0, "voxels_predicted": 0, "dice": NAN, "hd95_mm": NAN, "nsd": NAN, "asd_mm": NAN} | {
    "volume_difference_ml": NAN
}
INVENTED = (
    ABSENT
    | {"voxels_predicted": 90, "dice": 0.0, "hd95_mm": DIAGONAL_MM, "nsd": 0.0, "asd_mm": DIAGONAL_MM}
    | {"volume_difference_ml": 9.0}
)


def three_with_an_absent_spleen() -> tuple[list[dict], list[dict]]:
    """The spleen of q is absent: a says so, b invents one. Of r both say so."""
    a, b = (
        [row(c, dice, value=v, asd_mm=2.0, volume_difference_ml=-4.0) for c in "pqr" for v in (1, 2)]
        for dice in (0.5, 0.6)
    )
    for rows, what in ((a, ABSENT), (b, INVENTED)):
        rows[3] |= what
        rows[5] |= ABSENT
    return a, b


@pytest.mark.parametrize(
    ("metric", "perfect", "invented", "p", "gain"),
    [
        ("dice", 1.0, 0.0, (0.5, 0.6), 0.1),
        ("nsd", 1.0, 0.0, (0.25, 0.3), 0.05),
        ("hd95_mm", 0.0, DIAGONAL_MM, (5.0, 4.0), -1.0),
        ("asd_mm", 0.0, DIAGONAL_MM, (2.0, 2.0), 0.0),
        ("volume_error_ml", 0.0, 9.0, (4.0, 4.0), 0.0),
    ],
)
def test_who_invents_an_absent_structure_pays_for_it(metric, perfect, invented, p, gain):
    a, b = three_with_an_absent_spleen()
    mean, liver, spleen = paired_comparison(a, b, metric=metric)
    assert (spleen.pairs, spleen.left_out) == (2, 1), "of r both are silent: nothing to compare"
    assert (spleen.mean_a, spleen.mean_b) == pytest.approx(((p[0] + perfect) / 2, (p[1] + invented) / 2))
    assert spleen.difference == pytest.approx((gain + invented - perfect) / 2)
    assert liver.difference == pytest.approx(gain) and liver.note.count("invented") == 0
    # Cases: p (both gain), q (liver gains, spleen is invented), r (liver alone).
    assert mean.difference == pytest.approx((gain + (gain + invented - perfect) / 2 + gain) / 3)
    assert (mean.pairs, mean.left_out) == (3, 0)
    assert "that one run alone invented: 0 by the reference, 1 by the other" in mean.note and "1 by" in spleen.note
    turned = paired_comparison(b, a, metric=metric)
    assert turned[2].difference == pytest.approx(-spleen.difference) and "1 by the reference, 0 by" in turned[0].note


def test_to_invent_structures_is_never_better_than_to_be_silent():
    """A run that is right where something is, and invents a spleen in all who have none, loses to one that does not."""
    a = [row(f"p{i}", 0.8) for i in range(6)] + [row(f"p{i}", 0.0, value=2) | ABSENT for i in range(6)]
    b = [one | (INVENTED if one["class"] == 2 else {}) for one in a]
    mean, _, spleen = paired_comparison(a, b)
    assert (mean.losses, mean.p, mean.difference) == (6, 2**-5, pytest.approx(-0.5))
    assert (spleen.mean_a, spleen.mean_b, spleen.losses) == (1.0, 0.0, 6)


def test_runs_on_other_cases_are_not_compared():
    a, b = [row("p", 0.5), row("q", 0.5)], [row("p", 0.5), row("r", 0.5)]
    with pytest.raises(DataFault, match=r"only the first run has q \(class 1\); compare runs that share"):
        paired_comparison(a, b)
    with pytest.raises(DataFault, match=r"only the second run has q \(class 1\)"):
        paired_comparison(a[:1], a)
    with pytest.raises(DataFault, match="p: class 1 comes twice in the first run"):
        paired_comparison([*a, a[0]], a)
    with pytest.raises(DataFault, match="other subjects to q"):
        paired_comparison(a, [a[0], row("q", 0.5, subject="z")])
    with pytest.raises(DataFault, match="other names .class 1 is liver and spleen"):
        paired_comparison(a, [one | {"name": "spleen"} for one in a])
    elsewhere = paired_comparison(a, [a[0], row("q", 0.5, voxels_true=99)])
    assert "1 pairs has another number of voxels" in elsewhere[0].note
