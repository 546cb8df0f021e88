"""Batches of studies: each study once before any again, the same from the same seed, its crops where they say."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dagman.downstream.coarse_scans import CoarseScans
from dagman.downstream.one_scan import ScanRecord
from dagman.downstream.studies import Findings, Study
from dagman.downstream.study_streams import Bag, BagSampling, Cached, Seen, StudyStream, Whole, collate, draw_bag
from dagman.downstream.token_cache import TokenCache
from dagman.downstream.token_grids import CELL, Windows
from spade3d.crops.crop import Crop, Views, body_bounds
from spade3d.volumes.preprocessing import Normalisation

SIDE = 2.0
STILL = Views((False, False, False), 0.0, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.0)  # no chance


@dataclass(frozen=True)
class Ramp:
    """A store of scans whose voxels hold their own place along the first axis in mm; the body is a box in them."""

    cases: tuple

    def image(self, i, box=None):
        voxels = 2 * np.indices(self.cases[i].shape)[0].astype(np.int16)  # means of two are whole
        return voxels if box is None else voxels[tuple(map(slice, *box))]


@pytest.fixture
def ramp() -> Ramp:
    cases = [
        ScanRecord(np.diag([SIDE] * 3 + [1.0]), (40, 40 + n, 48), Normalisation(0.0, SIDE / 2, -1e4, 1e4), body)
        for n, body in enumerate([((8.0, 8.0, 8.0), (72.0, 70.0, 90.0)), ((0.0, 0.0, 0.0), (60.0, 60.0, 60.0))])
    ]
    return Ramp(tuple(cases))


def findings(count: int) -> Findings:
    studies = tuple(Study(f"s{n}", f"s{n}", "", (float(n % 2), float("nan"))) for n in range(count))
    return Findings(("lump", "cyst"), studies, ())


def numbered(case: int, rng: np.random.Generator) -> Seen:
    """A study whose one token is its own number, and a draw."""
    token = torch.tensor([case, rng.random()]).float().view(2, 1, 1, 1)
    return Seen(token, None, torch.zeros(3, 1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool), None)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    first, again, other = (StudyStream(numbered, findings(7), range(7), 3, seed=seed) for seed in (5, 5, 6))
    for step in (4, 0, 2):
        assert torch.equal(first.batch(step).tokens, again.batch(step).tokens)
    assert [b.scans for b in first.stream(2, 5)] == [again.batch(step).scans for step in (2, 3, 4)]
    assert any(first.batch(step).scans != other.batch(step).scans for step in range(3))


def test_each_study_comes_once_before_any_comes_again():
    stream = StudyStream(numbered, findings(7), [1, 2, 4, 5, 6], 2)
    row = [name for batch in stream.stream(0, 10) for name in batch.scans]
    for start in range(0, 20, 5):
        assert sorted(row[start : start + 5]) == ["s1", "s2", "s4", "s5", "s6"]
    assert row[:5] != row[5:10]
    assert StudyStream(numbered, findings(3), [0, 2], 8).batch(0).tokens.shape[0] == 2


def test_each_study_has_its_own_labels_and_teacher():
    teacher = {f"s{n}": np.array([n, -n], np.float32) for n in range(7)}
    batch = StudyStream(numbered, findings(7), range(7), 7, teacher=teacher).batch(0)
    for n, name in enumerate(batch.scans):
        assert batch.tokens[n, 0].item() == int(name[1:]) == batch.teacher[n, 0].item()
        assert batch.labels[n, 0] == int(name[1:]) % 2 and batch.labels[n, 1].isnan()


def test_smaller_grids_are_filled_up_by_cells_that_are_not_valid():
    shapes = ((2, 3, 1), (1, 1, 4))
    seen = [
        Seen(torch.ones(5, *s), None, torch.ones(3, *s), torch.ones(s, dtype=torch.bool), torch.ones(2, *s))
        for s in shapes
    ]
    batch = collate(seen, findings(2), [0, 1], None)
    assert batch.tokens.shape == (2, 5, 2, 3, 4) and batch.allowed.shape == (2, 2, 2, 3, 4)
    for n, (p, q, r) in enumerate(shapes):
        assert batch.valid[n].sum() == p * q * r == batch.tokens[n, 0].sum() and batch.valid[n, :p, :q, :r].all()


def test_crops_of_a_bag_show_the_place_that_their_cells_say(ramp):
    """In the ramp a voxel is its own place: the mean of a cell's voxels is the place of the cell."""
    views = Views((True, False, True), 20.0, (0.9, 1.1), (1.0, 1.0), (1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.0)
    show = Bag(ramp, BagSampling(3, (16, 16, 16), (SIDE,) * 3, views))
    for case in (0, 1):
        seen = show(case, np.random.default_rng(case))
        assert seen.images.shape == (3, 1, 16, 16, 16) and seen.valid.shape == (6, 2, 2)
        low, high = ramp.cases[case].body_box_mm
        means = torch.nn.functional.avg_pool3d(seen.images, CELL)[:, 0].flatten(0, 1)
        mm = low[0] + seen.places[0] * (high[0] - low[0])
        inside = (seen.places > 0.2).all(0) & (seen.places < 0.8).all(0)
        assert inside.sum() >= 4
        torch.testing.assert_close(means[inside], mm[inside], atol=0.05, rtol=0)


def test_the_crops_of_a_bag_are_spread_over_the_body():
    """A body of 2 x 2 x 1 tiles and four crops: one in each, and none beyond the body."""
    bounds = np.array([[10.0, 0.0, 0.0], [74.0, 64.0, 32.0]])
    sampling = BagSampling(4, (16, 16, 16), (SIDE,) * 3, STILL)
    for seed in range(5):
        crops = draw_bag(np.random.default_rng(seed), 0, bounds, sampling)
        first = np.array([crop.to_mm[:3, 3] - 1 for crop in crops])
        # A crop is drawn in its tile, and then kept within the body: its centre stays in the tile.
        tiles = {(bool(x > 42), bool(y > 32)) for x, y, _ in first + 16}
        assert len(tiles) >= 3 or seed
        assert (first >= bounds[0] - 1e-9).all() and (first + 32 <= bounds[1] + 1e-9).all()
    more = draw_bag(np.random.default_rng(0), 0, bounds, BagSampling(6, (16, 16, 16), (SIDE,) * 3, STILL))
    assert len({tuple(crop.to_mm[:3, 3]) for crop in more}) == 6


def test_the_whole_body_is_shown_at_low_resolution_and_its_prior_lies_in_the_source(ramp):
    coarse = CoarseScans(ramp, 4.0)
    asked = []

    def prior(cells):
        asked.append(cells)
        return np.ones((2, *cells.shape), np.float32)

    seen = Whole(coarse, (16, 16, 32), 4.0, STILL, prior)(0, np.random.default_rng(0))
    assert seen.images.shape == (1, 1, 16, 16, 32) and seen.allowed.shape == (2, 2, 2, 4)
    middle = body_bounds(ramp.cases[0]).mean(axis=0)
    (cells,) = asked
    np.testing.assert_allclose(cells.to_mm[:3, :3] @ [0.5, 0.5, 1.5] + cells.to_mm[:3, 3], middle)
    low, high = ramp.cases[0].body_box_mm
    means = torch.nn.functional.avg_pool3d(seen.images, CELL)[0, 0]
    inside = (seen.places > 0.2).all(0) & (seen.places < 0.8).all(0)
    torch.testing.assert_close(means[inside], (low[0] + seen.places[0] * (high[0] - low[0]))[inside], atol=0.1, rtol=0)


class Made(TokenCache):
    """Tokens as if they had been computed: the number of the case."""

    def tokens(self, case):
        return np.full((3, 2, 2, 2), case, np.float16)

    def cells(self, case):
        return Crop(case, (2, 2, 2), np.diag([16.0, 16.0, 16.0, 1.0]))


def test_cached_studies_come_from_the_disk_with_their_prior(ramp, tmp_path):
    cache = Made(ramp, Windows((16,) * 3, (2.0,) * 3), tmp_path, "", 3)
    asked = []
    show = Cached(cache, lambda cells: asked.append(cells) or np.ones((2, *cells.shape)))
    for case in (1, 1, 0):
        seen = show(case, np.random.default_rng(0))
        assert (seen.tokens == case).all()
        assert seen.allowed.shape == (2, 2, 2, 2) and seen.images is None
    assert [cells.case for cells in asked] == [1, 0]


def test_batches_may_be_made_in_other_processes(ramp, tmp_path):
    for show in (
        Cached(Made(ramp, Windows((16,) * 3, (2.0,) * 3), tmp_path, "", 3)),
        Bag(ramp, BagSampling(2, (16,) * 3, (2.0,) * 3, Views())),
        Whole(CoarseScans(ramp, 4.0), (16,) * 3, 4.0, Views()),
    ):
        stream = StudyStream(show, findings(2), [0, 1], 2, seed=1)
        one, other = (each.batch(3) for each in (stream, pickle.loads(pickle.dumps(stream))))
        assert one.scans == other.scans and torch.equal(one.places, other.places)
        assert one.images is None or torch.equal(one.images, other.images)
