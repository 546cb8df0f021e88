"""Largest-component clean-up: pieces that touch by a corner are one, and only the asked classes lose theirs."""

import numpy as np

from dagman.downstream.components import keep_largest

LIVER, KIDNEYS, AORTA = 205, 3, 820


def body() -> np.ndarray:
    labels = np.zeros((12, 10, 8), dtype=np.uint16)
    labels[1:4, 1:4, 1:4] = LIVER
    labels[4, 4, 4] = LIVER  # touches by a corner
    labels[8, 8, 6:8] = LIVER  # an island
    labels[1:3, 6:8, 5:7] = labels[8:10, 1:3, 1:3] = KIDNEYS
    labels[6, 6, :] = AORTA
    return labels


def test_only_the_largest_piece_stays():
    labels, expected = body(), body()
    expected[8, 8, 6:8] = 0
    assert keep_largest(labels, (LIVER, AORTA)) == {LIVER: 2, AORTA: 0}
    np.testing.assert_array_equal(labels, expected)


def test_of_equal_pieces_the_first_stays():
    labels = body()
    assert keep_largest(labels, (KIDNEYS,)) == {KIDNEYS: 8}
    assert (labels[1:3, 6:8, 5:7] == KIDNEYS).all() and not (labels[8:10] == KIDNEYS).any()


def test_a_class_that_encloses_another_is_told_apart_from_it():
    labels = np.ones((5, 5, 5), dtype=np.uint8)
    labels[2, 2, 2], labels[0, 0, 0] = 2, 2
    assert keep_largest(labels, (1, 2)) == {1: 0, 2: 1}
    assert labels[0, 0, 0] == 2 and labels[2, 2, 2] == 0 and (labels == 1).sum() == 123


def test_what_is_not_there_is_left():
    labels = np.zeros((3, 3, 3), np.uint8)
    assert keep_largest(labels, (1, 2)) == {} and not labels.any()
    labels = body()
    assert keep_largest(labels, ()) == {} and np.array_equal(labels, body())


def test_agrees_with_flooding_by_hand():
    labels = (np.random.default_rng(0).random((7, 6, 8)) < 0.12).astype(np.uint8)
    left, pieces = {tuple(place) for place in np.argwhere(labels).tolist()}, []
    while left:
        piece, edge = set(), [left.pop()]
        while edge:
            here = edge.pop()
            piece.add(here)
            near = {other for other in left if max(abs(a - b) for a, b in zip(here, other)) == 1}
            left -= near
            edge += near
        pieces.append(piece)
    assert len(pieces) > 3
    sizes = sorted(map(len, pieces))
    assert sizes[-1] > sizes[-2]
    keep_largest(labels, (1,))
    assert {tuple(place) for place in np.argwhere(labels).tolist()} == max(pieces, key=len)
