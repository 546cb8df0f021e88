"""Where findings may be: cells counted by hand on a drawn prior, whatever crop they are asked for in."""

import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from dagman.attention.spatial_prior import Priors, PriorVolume, in_steps, mirror_by_name
from dagman.downstream.allowed import Where, allowed_in, groups_of, matching
from spade3d.crops.crop import Crop, mm_to_stored
from spade3d.faults import UsageFault
from spade3d.volumes.body_box import field_of_view

SHAPE, CELL_MM = (64, 48, 40), 8.0
REGIONS = ("liver", "right kidney", "left kidney")
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])


def priors_of(values, *, known=True):
    """Priors whose one volume lies on the voxels (1 mm) of a store's one scan."""
    case = SimpleNamespace(affine=AFFINE, shape=SHAPE, body_box_mm=field_of_view(SHAPE, AFFINE))
    volume = PriorVolume(in_steps(values), mm_to_stored(case)) if known else None
    store = SimpleNamespace(cases=(case,))
    return Priors(REGIONS, mirror_by_name(REGIONS), "drawn", store, partial(_always, volume))


def _always(volume, case):
    return volume


@pytest.fixture
def organs():
    """A liver of 2 x 2 x 2 cells, from cell (1, 1, 1) on; a kidney a side, one cell each; half as sure as the liver."""
    values = np.zeros((*SHAPE, 3))
    values[8:24, 8:24, 8:24, 0] = 1.0
    values[48:56, 8:16, 8:16, 1] = values[48:56, 32:40, 8:16, 2] = 0.5
    return values


def cells(start=(0, 0, 0), shape=(8, 6, 5), mm=CELL_MM):
    """A grid of cells whose first corner is at cell `start`."""
    to_mm = np.diag([mm] * 3 + [1.0])
    to_mm[:3, 3] = np.array(start) * mm + (mm - 1) / 2
    return Crop(0, shape, to_mm)


def test_allowed_are_the_cells_that_the_organ_fills(organs):
    organs[24:28, 8:24, 8:24, 0] = 1.0  # half of the next cells: fat or air has the rest
    allowed = allowed_in(priors_of(organs), [Where(("liver",)), Where(("right kidney",))])(cells())
    liver, kidney = np.zeros((2, 8, 6, 5))
    liver[1:3, 1:3, 1:3] = 1
    kidney[6, 1, 1] = 1
    np.testing.assert_array_equal(allowed, np.stack([liver, kidney]))
    assert allowed.dtype == np.float32


def test_an_organ_without_a_side_is_both_and_a_finding_of_no_organ_is_anywhere(organs):
    kidney, right, left, anywhere = allowed_in(
        priors_of(organs), [Where(("kidney",)), Where(("right kidney",)), Where(("left kidney",)), Where()]
    )(cells())
    np.testing.assert_array_equal(kidney, np.maximum(right, left))
    assert (anywhere == 1).all() and 0 < right.sum() == left.sum()


def test_a_margin_is_counted_in_mm_between_centres(organs):
    allowed = allowed_in(priors_of(organs), [Where(("liver",), 8.0), Where(("liver",), 7.9)])
    wide, narrow = allowed(cells())
    place = np.indices(wide.shape)
    apart = np.maximum(0, np.maximum(1 - place, place - 2))  # cells beyond the liver's
    np.testing.assert_array_equal(wide, (apart**2).sum(axis=0) <= 1)
    assert narrow.sum() == 2**3


@pytest.mark.parametrize("start", [(0, 0, 0), (3, 2, 1), (4, 3, 2)])
def test_a_crop_is_allowed_what_the_whole_is_there(organs, start):
    allowed = allowed_in(priors_of(organs), [Where(("liver",), 10.0), Where(("kidney",))])
    part = allowed(cells(start, (4, 3, 3)))
    i, j, k = (slice(s, s + n) for s, n in zip(start, (4, 3, 3), strict=True))
    np.testing.assert_array_equal(part, allowed(cells())[:, i, j, k])


@pytest.mark.parametrize("degrees", [0, 10, 45])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_crop_that_shows_a_small_organ_has_a_cell_of_it_however_its_grid_lies(organs, shift, degrees):
    """A kidney of one cell of the body's own grid lies across eight of another."""
    angle = np.radians(degrees)
    turned = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    middle = np.array([51.5, 11.5, 11.5])
    to_mm = np.eye(4)
    to_mm[:3, :3] = turned * CELL_MM
    to_mm[:3, 3] = middle - turned @ np.full(3, (2 + shift) * CELL_MM)
    crop = Crop(0, (5, 5, 5), to_mm)
    kidney = allowed_in(priors_of(organs), [Where(("right kidney",))])(crop)[0]
    centres = to_mm[:3, :3] @ np.argwhere(kidney).T + to_mm[:3, 3:]
    assert 1 <= kidney.sum() <= 8 and np.abs(centres - middle[:, None]).max() <= CELL_MM


def test_a_mirrored_crop_asks_each_side_by_the_organ_that_it_shows_there(organs):
    organs[48:56, 32:40, 8:16, 2] = 0.1  # the left kidney is hardly sure of itself
    mirrored = cells()
    to_mm = mirrored.to_mm @ np.diag([-1.0, 1, 1, 1])
    to_mm[:3, 3] += mirrored.to_mm[:3, 0] * 7
    right, left = allowed_in(priors_of(organs), [Where(("right kidney",)), Where(("left kidney",))])(
        Crop(0, (8, 6, 5), to_mm)
    )
    assert np.argwhere(right).tolist() == [[1, 4, 1]] and np.argwhere(left).tolist() == [[1, 1, 1]]


def test_a_crop_beside_the_organ_forbids_everything(organs):
    assert allowed_in(priors_of(organs), [Where(("liver",))])(cells((5, 0, 0), (3, 6, 5))).sum() == 0


def test_what_the_prior_does_not_find_in_the_whole_body_may_be_anywhere(organs):
    organs[..., 0] = 0
    liver, kidney = allowed_in(priors_of(organs), [Where(("liver",)), Where(("kidney",))])(cells((5, 0, 0), (3, 6, 5)))
    assert (liver == 1).all() and 0 < kidney.mean() < 1
    unknown = allowed_in(priors_of(organs, known=False), [Where(("kidney",))])(cells())
    assert (unknown == 1).all()


@pytest.mark.parametrize(("least", "counted"), [(0.1, 8), (0.6, 0)])
def test_what_counts_as_the_organ_is_a_share_of_its_best_cell(organs, least, counted):
    organs[8:24, 8:24, 8:24, 0] = 0.3  # of the best cell, which is elsewhere
    organs[40:48, 40:48, 32:40, 0] = 0.6
    found = allowed_in(priors_of(organs), [Where(("liver",))], least=least)(cells())
    assert found[0, :4, :4, :4].sum() == counted


def test_an_organ_smaller_than_a_cell_has_its_best_cell(organs):
    organs[..., 1] = 0
    organs[49:51, 9:11, 9:11, 1] = 1.0
    kidney = allowed_in(priors_of(organs), [Where(("right kidney",))])(cells())[0]
    assert kidney.sum() == 1 == kidney[6, 1, 1]


def test_a_large_grid_is_sampled_as_densely_as_a_small_one():
    """An organ of 2 mm in a grid of 40,000 cells, which one look would sample once a cell."""
    values = np.zeros((*SHAPE, 3))
    values[10:12, 10:12, 10:12, 0] = 1.0
    allowed = allowed_in(priors_of(values), [Where(("liver",))], least=0.9)
    fine = allowed(cells(shape=(8, 6, 5)))
    large = allowed(cells((0, 0, 0), (40, 32, 32)))
    np.testing.assert_array_equal(large[0, :8, :6, :5], fine[0])
    assert fine[0, 1, 1, 1] and fine.sum() == 1


def test_names_are_canonical_and_an_unknown_organ_is_refused():
    assert matching("Kidney_Right", REGIONS) == [1]
    assert matching("kidney", REGIONS) == [1, 2]
    with pytest.raises(UsageFault, match="'lung'.*liver, right kidney, left kidney"):
        matching("lung", REGIONS)


def test_findings_of_the_same_organs_and_margin_share_a_foreground():
    where = [Where(("liver",)), Where(), Where(("liver",), 5.0), Where(("liver",))]
    assert groups_of(where) == (0, None, 1, 0)


def test_processes_that_make_batches_can_be_sent_it(organs):
    """With what was found in whole bodies, and with nothing found yet."""
    allowed = allowed_in(priors_of(organs), [Where(("liver",), 8.0), Where(("right kidney",)), Where()])
    fresh = pickle.loads(pickle.dumps(allowed))
    found = allowed(cells((1, 1, 1), (4, 4, 3)))
    for sent in (fresh, pickle.loads(pickle.dumps(allowed))):
        np.testing.assert_array_equal(sent(cells((1, 1, 1), (4, 4, 3))), found)
