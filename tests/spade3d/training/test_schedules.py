"""The schedules at points worked out by hand."""

import math

import pytest

from spade3d.training.schedules import linear, momentum, warmup_cosine


@pytest.mark.parametrize(
    ("progress", "factor"),
    [
        (0.0, 0.0),
        (0.05, 0.5),
        (0.1, 1.0),
        (0.55, 0.01 + 0.99 / 2),
        (1.0, 0.01),
        (0.325, 0.01 + 0.99 * (2 + 2**0.5) / 4),
    ],
)
def test_warmup_cosine_by_hand(progress, factor):
    assert warmup_cosine(progress, warmup=0.1, floor=0.01) == pytest.approx(factor, abs=1e-12)


def test_a_run_may_have_no_warmup_or_nothing_else():
    assert warmup_cosine(0.0, warmup=0.0, floor=0.0) == 1.0
    assert warmup_cosine(1.0, warmup=1.0, floor=0.0) == 1.0
    assert warmup_cosine(0.25, warmup=1.0, floor=0.0) == 0.25


@pytest.mark.parametrize(("progress", "value"), [(0.0, 0.996), (0.5, 0.998), (1.0, 1.0), (1 / 3, 0.997)])
def test_momentum_by_hand(progress, value):
    assert momentum(progress, start=0.996) == pytest.approx(value, abs=1e-12)


def test_the_teacher_never_speeds_up():
    values = [momentum(step / 100, start=0.99) for step in range(101)]
    assert all(math.isfinite(v) for v in values) and values == sorted(values)


def test_linear_ramps_then_holds():
    ramp = [linear(p, start=0.04, end=0.07, until=0.5) for p in (0.0, 0.25, 0.5, 0.9)]
    assert ramp == pytest.approx([0.04, 0.055, 0.07, 0.07], abs=1e-12)
    assert linear(0.0, start=0.04, end=0.07, until=0.0) == 0.07  # no ramp at all
