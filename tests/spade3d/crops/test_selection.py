"""Selection: who attracts, who repels, and who is left alone, worked out by hand."""

import numpy as np
import pytest

from spade3d.crops.selection import BODY, Places, alike, apart


def boxes(*centres, space=BODY, size=10.0):
    centre = np.array(centres, dtype=float)
    return Places(np.concatenate([centre - size / 2, centre + size / 2], axis=1), np.full(len(centre), space))


def test_boxes_are_alike_from_the_asked_overlap_on():
    anchor = boxes((0, 0, 0))
    # Moved by x of 10 mm they share 10 - x of 10 + x: a third at 5 mm.
    keys = boxes((0, 0, 0), (4.9, 0, 0), (5.1, 0, 0), (30, 0, 0))
    assert alike(anchor, keys, 1 / 3).tolist() == [[True, True, False, False]]
    assert alike(anchor, keys, 0.0).tolist() == [[True, True, True, False]]  # what shares nothing is never alike


def test_apart_compares_centres_and_leaves_the_band_alone():
    anchor = boxes((0, 0, 0))
    keys = boxes((59, 0, 0), (61, 0, 0), (36, 36, 36))  # sqrt(3) 36 = 62.4
    assert apart(anchor, keys, 60.0).tolist() == [[False, True, True]]
    assert not alike(anchor, keys, 0.5).any()  # 59 mm away: neither positive nor negative


def test_another_space_is_neither_alike_nor_apart():
    here = boxes((0, 0, 0), (500, 0, 0))
    there = boxes((0, 0, 0), (500, 0, 0), space=3)
    assert not alike(here, there, 0.0).any() and not apart(here, there, 1.0).any()
    assert alike(there, there, 0.5).tolist() == [[True, False], [False, True]]
    assert apart(there, there, 1.0).tolist() == [[False, True], [True, False]]


def test_points_and_boxes_compare_by_their_centres():
    points = Places(np.array([[0.0, 0, 0], [100, 0, 0]]), np.array([BODY, BODY]))
    assert points.centres is points
    np.testing.assert_array_equal(boxes((1, 2, 3)).centres.mm, [[1, 2, 3]])
    assert apart(points, boxes((0, 0, 0)), 50.0).tolist() == [[False], [True]]


def test_places_are_joined_in_order_and_may_be_none():
    none = Places(np.zeros((0, 6)), np.zeros(0, dtype=np.int64))
    both = Places.joined([boxes((0, 0, 0)), none, boxes((1, 1, 1), (2, 2, 2), space=4)])
    assert len(both) == 3 and both.space.tolist() == [BODY, 4, 4]
    assert alike(none, both, 0.5).shape == (0, 3) and apart(both, none, 0.5).shape == (3, 0)


def test_places_are_kept_in_columns_whatever_they_are_made_of():
    mm = np.arange(24.0).reshape(4, 6)
    alone, part = Places(mm[:1], np.zeros(1, dtype=np.int64)), Places(mm[::2], np.arange(4)[::2])
    for places in (alone, part, part.centres, part.rolled(1), Places.joined([alone, alone, part])):
        assert places.mm.flags.f_contiguous and places.mm.dtype == np.float32
        assert places.space.flags.c_contiguous and places.space.dtype == np.int32
    np.testing.assert_array_equal(part.mm, mm[::2])


def test_far_from_the_origin_tenths_of_a_micrometre_are_lost_and_no_more():
    here, there = (boxes((1000 + x, -900, 1800), size=144.0) for x in (0.0, 100.0))
    assert apart(here, there, 99.999).all() and not apart(here, there, 100.001).any()
    moved, shares = boxes((1048.0, -900, 1800), size=144.0), 0.5  # 96 of 144 mm shared, 192 covered
    assert alike(here, moved, shares - 1e-6).all() and not alike(here, moved, shares + 1e-6).any()
    assert alike(here, here, 1.0).all()


@pytest.mark.parametrize(("mm", "space"), [((2, 4), 2), ((2, 3), 3), ((6,), 1)])
def test_places_of_another_shape_are_refused(mm, space):
    with pytest.raises(ValueError, match="needed"):
        Places(np.zeros(mm), np.zeros(space, dtype=np.int64))
