"""A heat map shows each cell's number and its colour, and takes names for text."""

import re

import numpy as np

from dagman.evaluation.heat_map import DARKEST, heat_map


def test_each_cell_has_its_number_and_the_darker_is_the_more():
    drawn = heat_map(np.array([[1.0, 0.5], [-0.01, np.nan]]), ["1.1", "<b>"], ["x", "y"], "all", ("ours", "theirs"))
    shares = [float(share) for share in re.findall(r"fill-opacity:([\d.]+)", drawn)]
    assert shares == [DARKEST, DARKEST / 2, 0, 0]
    assert re.findall(r'class="name"[^>]*>([^<]*)<', drawn) == ["1.00", "0.50", "−0.01", "–"]
    assert "ours 1.1, theirs y: 0.500" in drawn and "<b>" not in drawn and "&lt;b&gt;" in drawn
