"""Boxes: a heat map's components worked out by hand, and overlaps of boxes against their volumes in voxels."""

import numpy as np
import pytest

from dagman.evaluation.boxes import Box, around, boxes_of, diameter_mm, inside, iobb, iou, overlap
from spade3d.faults import UsageFault
from spade3d.volumes.geometry import apply_affine

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


def two_lumps() -> np.ndarray:
    """A faint large lump, and a bright small one whose two voxels touch at a corner."""
    heat = np.zeros((8, 8, 8))
    heat[0:3, 0:3, 0:2] = 0.5
    heat[5, 5, 5] = heat[6, 6, 6] = 1.0
    return heat


def test_components_are_boxed_by_mass_and_touch_at_corners():
    heat = two_lumps()
    faint, bright = Box((0, 0, 0), (3, 3, 2), 9 / 11), Box((5, 5, 5), (7, 7, 7), 2 / 11)
    assert boxes_of(heat, 0.4) == [faint]
    assert boxes_of(heat, 0.5) == [faint]  # what is just at the threshold counts
    assert boxes_of(heat, 0.51) == [Box(bright.start, bright.stop, 1.0)]
    assert boxes_of(heat, 0.4, keep="mass", mass=0.1) == [faint, bright]
    assert boxes_of(heat, 0.4, keep="mass", mass=0.2) == [faint]
    assert boxes_of(heat, 0.4, keep="mass", mass=0.9) == [faint]  # the heaviest always


def test_components_are_those_of_a_flood():
    rng = np.random.default_rng(0)
    heat = rng.random((9, 8, 7))
    above = {tuple(place) for place in np.argwhere(heat >= 0.95 * heat.max())}
    floods = []
    while above:
        flood, waiting = set(), [above.pop()]
        while waiting:
            here = waiting.pop()
            flood.add(here)
            beside = [place for place in above if max(abs(a - b) for a, b in zip(place, here)) == 1]
            above.difference_update(beside)
            waiting += beside
        floods.append(flood)
    floods.sort(key=lambda flood: -sum(heat[place] for place in flood))
    found = boxes_of(heat, 0.95, keep="mass", mass=0.0)
    assert len(found) == len(floods) > 3
    for box, flood in zip(found, floods, strict=True):
        assert box.start == tuple(min(place[n] for place in flood) for n in range(3))
        assert box.stop == tuple(max(place[n] for place in flood) + 1 for n in range(3))


def test_nothing_is_boxed_where_the_map_says_nothing():
    assert boxes_of(np.zeros((3, 3, 3)), 0.5) == []
    assert boxes_of(np.ones((3, 4, 5)), 1.0) == [Box((0, 0, 0), (3, 4, 5), 1.0)]


@pytest.mark.parametrize("wrong", [np.full((2, 2, 2), np.nan), np.full((2, 2, 2), -1.0)])
def test_maps_without_a_maximum_are_refused(wrong):
    with pytest.raises(UsageFault, match="NaN, Inf or values below 0"):
        boxes_of(wrong, 0.5)


def test_wrong_thresholds_and_rules_are_refused():
    for threshold, keep in ((0.0, "largest"), (1.1, "largest"), (0.5, "all")):
        with pytest.raises(UsageFault, match="above 0 to 1, and largest or mass"):
            boxes_of(np.ones((2, 2, 2)), threshold, keep=keep)


def test_a_box_in_mm_reaches_to_the_faces_of_its_voxels():
    mask = np.zeros((6, 6, 6), bool)
    mask[1:3, 2, 3:5] = True
    expected = [[1, 4.5, 10], [5, 7.5, 18]]
    assert around(mask, AFFINE).tolist() == expected
    assert Box((1, 2, 3), (3, 3, 5), 1.0).in_mm(AFFINE).tolist() == expected
    flipped = AFFINE @ np.array([[-1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    assert around(mask[::-1], flipped).tolist() == expected
    assert np.array_equal(inside(np.array(expected), (6, 6, 6), AFFINE), mask)
    with pytest.raises(UsageFault, match="empty mask"):
        around(np.zeros((2, 2, 2), bool), AFFINE)


def test_inside_is_what_asking_every_voxel_gives():
    rng, shape = np.random.default_rng(3), (5, 6, 7)
    for _ in range(60):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] if rng.random() < 0.7 else np.diag(rng.choice([-1.0, 1], 3))
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = turn * rng.uniform(0.5, 3, 3), rng.normal(size=3) * 5
        centres = apply_affine(affine, np.stack(np.indices(shape), axis=-1))
        ends = centres[tuple(rng.integers(0, shape, (2, 3)).T)] + rng.choice([0.0, 4.0]) * rng.normal(size=(2, 3))
        box = np.sort(ends, axis=0)
        asked = ((centres >= box[0] - 1e-6) & (centres <= box[1] + 1e-6)).all(axis=-1)
        assert np.array_equal(inside(box, shape, affine), asked)
    assert not inside(np.array([[500.0] * 3, [600.0] * 3]), shape, affine).any()


def test_overlaps_are_those_of_voxels():
    rng = np.random.default_rng(1)
    for _ in range(50):
        ends = np.sort(rng.integers(0, 7, (2, 2, 3)), axis=1)
        ends[:, 1] += 1  # stop is not in it
        one, other = (Box(tuple(a.tolist()), tuple(b.tolist()), 1.0) for a, b in ends)
        filled = np.zeros((2, 8, 8, 8), bool)
        for n, (low, high) in enumerate(ends):
            filled[n][tuple(map(slice, low, high))] = True
        both, either = (filled[0] & filled[1]).sum(), (filled[0] | filled[1]).sum()
        a, b = one.in_mm(AFFINE), other.in_mm(AFFINE)
        assert overlap(a, b) == pytest.approx(both * 24)
        assert iou(a, b) == pytest.approx(both / either)
        assert iobb(a, b) == pytest.approx(both / filled[1].sum())


def test_a_fifth_too_short_costs_more_in_three_dimensions():
    whole, short = np.array([[0.0] * 3, [10.0] * 3]), np.array([[0.0] * 3, [8.0] * 3])
    assert iou(whole, short) == pytest.approx(0.512) and iobb(whole, short) == 1
    assert iou(whole, whole + 10) == 0 and diameter_mm(np.array([[0.0] * 3, [2.0, 4.0, 8.0]])) == pytest.approx(4)
