"""Scores of saliency maps: values worked out by hand, and slow twins."""

import math

import numpy as np
import pytest

from spade3d.networks.saliency_scores import cc, kl, nss, scores

P = np.array([[1.0, 2.0], [3.0, 2.0]])
Q = np.array([[0.0, 1.0], [1.0, 0.0]])


def test_values_by_hand():
    assert cc(P, Q) == pytest.approx(0.5 / math.sqrt(2.0 * 1.0) * 2)  # sum of products 1, sums of squares 2 and 1
    assert kl(P, Q) == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.375))
    assert nss(P, Q > 0) == pytest.approx(0.5 / math.sqrt(0.5))


def test_slow_twins():
    rng = np.random.default_rng(0)
    p, q = rng.random((3, 4, 5)), rng.random((3, 4, 5)) ** 3
    flat_p, flat_q = p.ravel().tolist(), q.ravel().tolist()
    assert cc(p, q) == pytest.approx(np.corrcoef(flat_p, flat_q)[0, 1])
    shares = [(a / sum(flat_p), b / sum(flat_q)) for a, b in zip(flat_p, flat_q, strict=True)]
    assert kl(p, q) == pytest.approx(sum(b * math.log(b / a) for a, b in shares))
    mean, sd = sum(flat_p) / 60, math.sqrt(sum((a - sum(flat_p) / 60) ** 2 for a in flat_p) / 60)
    hit = [a for a, b in zip(flat_p, flat_q, strict=True) if b > 0.5]
    assert nss(p, q > 0.5) == pytest.approx((sum(hit) / len(hit) - mean) / sd)


def test_a_map_foretells_itself_perfectly_and_scale_does_not_matter():
    assert cc(P, 7 * P) == pytest.approx(1) and kl(P, 7 * P) == pytest.approx(0)
    assert scores(P, (255 * P / 3).astype(np.uint8))["nss"] > 0
    assert 10 < kl(1 - Q, Q) < math.inf


def test_what_is_not_defined_is_nan():
    empty = np.zeros((2, 2))
    assert all(map(math.isnan, (cc(P, empty), kl(P, empty), kl(empty, Q), nss(P, Q > 9), nss(empty, Q > 0))))
    assert all(map(math.isnan, scores(P, empty).values()))
