"""Rows of two runs as pairs: who is silent, who invents, and the one number that they differ by."""

import math

import pytest

from dagman.evaluation.pairs import PERFECT, case_means_of_both, matched, mean_gain, value_of, values_of_both
from dagman.evaluation.statistics import COMPARABLE, SMALLER_IS_BETTER, paired_comparison

NAN = math.nan


def row(case: str, value: int, dice: float, **more) -> dict:
    return {"case": case, "subject": case, "class": value, "name": f"organ {value}", "dice": dice} | more


def test_the_perfect_value_is_the_best_that_a_metric_has():
    assert set(PERFECT) == set(COMPARABLE)
    assert {metric for metric, best in PERFECT.items() if best == 0} == set(COMPARABLE) & SMALLER_IS_BETTER
    for metric, best in PERFECT.items():
        said, silent = (row("p", 1, 0.3, **dict.fromkeys(("hd95_mm", "nsd", "asd_mm"), x)) for x in (0.3, NAN))
        said, silent = said | {"volume_difference_ml": -0.3}, silent | {"dice": NAN, "volume_difference_ml": NAN}
        assert values_of_both(silent, said, metric) == (best, 0.3)
        assert values_of_both(said, silent, metric) == (0.3, best)
        assert all(map(math.isnan, values_of_both(silent, silent, metric)))


def test_the_volume_error_is_the_size_of_the_difference():
    assert [value_of({"volume_difference_ml": ml}, "volume_error_ml") for ml in (-3.0, 3.0)] == [3.0, 3.0]


def test_the_gain_of_a_pair_is_what_its_comparison_says():
    """Organ 2 is absent in both cases: of p the second run invents it, of q the first, of r both are silent."""
    a = [row("p", 1, 0.5), row("p", 2, NAN), row("q", 1, 0.5), row("q", 2, 0.0), row("r", 1, 0.5), row("r", 2, NAN)]
    b = [row("p", 1, 0.9), row("p", 2, 0.0), row("q", 1, 0.9), row("q", 2, NAN), row("r", 1, 0.9), row("r", 2, NAN)]
    assert [means for _, *means in case_means_of_both(matched(a, b), "dice")] == [
        pytest.approx(means) for means in ([0.75, 0.45], [0.25, 0.95], [0.5, 0.9])
    ]
    gain = mean_gain(a, b, "dice")
    assert gain == pytest.approx((-0.3 + 0.7 + 0.4) / 3) == paired_comparison(a, b)[0].difference
    # The unpaired means of the two tables differ by another number: what one invents is in its mean alone.
    assert gain != pytest.approx(((0.45 + 0.9 + 0.9) - (0.5 + 0.25 + 0.5)) / 3)
    assert math.isnan(mean_gain([row("p", 1, NAN)], [row("p", 1, NAN)], "dice"))
