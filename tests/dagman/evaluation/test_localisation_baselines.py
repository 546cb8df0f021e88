"""Maps that know nothing: the centre's boxes, an organ's middle, and chance that has the cells of a method."""

import numpy as np
import pytest

from dagman.evaluation.boxes import boxes_of
from dagman.evaluation.localisation_baselines import (
    centre_map,
    organ_core_map,
    organ_map,
    random_map,
    truth_on_cells,
)


def test_the_centre_is_a_box_of_the_volumes_form_at_every_threshold():
    heat = centre_map((20, 40, 10))
    assert heat.max() == pytest.approx(0.95, abs=0.06) and heat.min() >= 0
    # half of the maximum: about half of each side, in the middle
    (box,) = boxes_of(heat, 0.5)
    assert np.allclose(np.add(box.start, box.stop), (20, 40, 10))
    assert np.allclose(np.subtract(box.stop, box.start), (10, 20, 5), atol=2)
    sizes = [np.prod(np.subtract(one.stop, one.start)) for t in (0.2, 0.5, 0.8) for one in boxes_of(heat, t)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_chance_has_the_cells_of_the_method_and_comes_from_its_generator():
    one, again = (random_map((16, 16, 12), (8, 8, 8), np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one, again) and one.min() >= 0 and one.max() <= 1
    assert not np.array_equal(one, random_map((16, 16, 12), (8, 8, 8), np.random.default_rng(4)))
    cells = np.random.default_rng(3).random((2, 2, 2))
    assert random_map((16, 16, 12), (8, 8, 8), np.random.default_rng(3))[0, 0, 0] == cells[0, 0, 0]  # before any centre
    between = random_map((16, 16, 12), (8, 8, 8), np.random.default_rng(3))[7:9, 0, 0].mean()
    assert between == pytest.approx(cells[:, 0, 0].mean())


def test_an_organ_is_one_in_it_and_its_core_is_deepest():
    organ = np.zeros((30, 20, 20), bool)
    organ[2:11, 5:14, 5:14] = True  # a pair: each has its own middle
    organ[18:27, 5:14, 5:14] = True
    organ[0, 0, 0] = True  # a stray voxel has none
    assert np.array_equal(organ_map(organ), organ)
    core = organ_core_map(organ, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert {tuple(place) for place in np.argwhere(core == core.max())} == {(6, 9, 9), (22, 9, 9)}
    assert core.max() == 1 and core[~organ].max() == 0 and core[0, 0, 0] == 0
    assert core[2, 9, 9] == pytest.approx(1 / 5)
    assert not organ_core_map(np.zeros((3, 3, 3), bool), np.eye(4)).any()


def test_an_organ_that_the_scan_cuts_ends_there():
    organ = np.zeros((9, 9, 9), bool)
    organ[:, :, :5] = True
    core = organ_core_map(organ, np.eye(4))
    assert core[4, 4, 2] == 1 and core[4, 4, 0] == pytest.approx(1 / 3)


def test_truth_on_cells_is_the_share_of_each_cell_and_linear_between():
    truth = np.zeros((16, 16, 10), bool)
    truth[:8, :8, :4] = True
    heat = truth_on_cells(truth, (8, 8, 8))
    assert heat[:4, :4, :4] == pytest.approx(0.5) and heat[12:, :, :].max() == 0
    assert heat[7:9, 0, 0].mean() == pytest.approx(0.25) and heat[0, 0, 9] < heat[0, 0, 0]
    assert np.array_equal(truth_on_cells(truth, (1, 1, 1)), truth)
