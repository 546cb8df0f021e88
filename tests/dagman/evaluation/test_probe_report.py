"""The verdict on an encoder: what its interval and its test show, beside what is free."""

import pytest

from dagman.evaluation.probe_report import verdict

MEASURE = "linear.accuracy.features"


def result(difference: float, low: float | None, high: float | None, p: float) -> dict:
    gain = {"difference": difference, "low": low, "high": high, "p": p}
    one = {"mean": 0.6, "low": 0.55, "high": 0.65}
    return {
        "encoders": {"run": {"measures": {MEASURE: one}, "gains": {MEASURE: gain}}},
        "controls": {"measures": {"linear.accuracy.position": {"mean": 0.7}, "linear.accuracy.patch": {"mean": 0.5}}},
    }


@pytest.mark.parametrize(
    ("gain", "reading"),
    [
        ((0.05, 0.02, 0.08, 0.01), "more than random weights"),
        ((-0.05, -0.08, -0.02, 0.01), "less than random weights"),
        ((0.05, 0.02, 0.08, 0.0625), "no more than can be told from random weights"),  # too few subjects for the test
        ((0.05, -0.01, 0.08, 0.01), "no more than can be told from random weights"),
        ((0.05, None, None, 1.0), "no more than can be told from random weights"),  # one subject
    ],
)
def test_a_gain_is_claimed_only_where_interval_and_test_agree(gain, reading):
    said = verdict("run", result(*gain))
    assert f"knows {reading}." in said
    assert "0.600 (0.550 to 0.650)" in said.replace("\u00a0", " ")
    assert "position alone finds 0.700, raw intensities alone 0.500" in said
