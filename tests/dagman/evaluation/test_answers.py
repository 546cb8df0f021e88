"""Signs of a frozen encoder's stages: a part that all places share is no collapse, one point and one line are."""

import numpy as np
import pytest

from dagman.evaluation.answers import collapse, signs_of
from dagman.evaluation.layers import stage_name


def signs(rows: np.ndarray) -> dict:
    """Of an encoder whose every stage says `rows` (place, channel)."""
    return signs_of({stage_name(stage): rows[None].astype(np.float32) for stage in range(5)})["stage 4"]


def test_a_common_part_is_no_collapse_but_one_point_and_one_line_are():
    rng = np.random.default_rng(0)
    alive = rng.standard_normal((100, 40))
    shared = alive + 100.0
    assert collapse(signs(alive)) is None and collapse(signs(shared)) is None
    assert signs(shared)["spread"] < 0.05 < signs(alive)["spread"]  # what would alarm a training
    assert signs(shared)["rank"] == pytest.approx(signs(alive)["rank"], rel=1e-3)
    assert "differ by less than rounding" in collapse(signs(np.ones((100, 40)) + 1e-5 * alive))
    line = 5 + alive[:, :1] * rng.standard_normal((1, 40))
    assert "effective rank 1.0 of 40" in collapse(signs(line))


def test_of_few_places_nothing_is_said():
    assert collapse(signs(np.ones((4, 40)))) is None
