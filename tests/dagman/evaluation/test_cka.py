"""CKA: the paper's formula as a slow twin, and what it does not and does care about."""

import numpy as np
import pytest

from dagman.evaluation.cka import cka_matrix


def rows(n: int, channels: int, seed: int = 0, batches: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batches, n, channels))


def hsic_1(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741  (the letters of the paper)
    """Nguyen et al. 2021, equation 3, in its own order."""
    n, one = len(k), np.ones(len(k))
    k, l = (gram * (1 - np.eye(n)) for gram in (k, l))  # noqa: E741
    both = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one
    return both / (n * (n - 3))


def by_formula(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 2: HSIC_1, over batches."""
    both, ours, theirs = (
        np.mean([hsic_1(a @ a.T, b @ b.T) for a, b in zip(*pair, strict=True)]) for pair in ((x, y), (x, x), (y, y))
    )
    return both / np.sqrt(ours * theirs)


def biased(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019, equation 3: |Y'X|^2 / (|X'X| |Y'Y|) with centred columns."""
    x, y = (one - one.mean(axis=0) for one in (x, y))
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def debiased(x: np.ndarray, y: np.ndarray) -> float:
    return float(cka_matrix([x], [y])[0, 0])


def turned(x: np.ndarray, seed: int) -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((x.shape[-1],) * 2))
    return x @ rotation


def test_the_debiased_estimate_is_the_papers_formula():
    x, y = rows(7, 5), rows(7, 3, seed=1) + rows(7, 5)[..., :3]
    assert debiased(x, y) == pytest.approx(by_formula(x, y))


def test_a_turn_a_shift_and_a_factor_change_nothing_and_a_stretched_channel_does():
    x = rows(40, 6)
    assert debiased(x, x) == pytest.approx(1)
    assert debiased(x, 5 * turned(x, 3) - 2) == pytest.approx(1)
    y = x + 0.5 * rows(40, 6, seed=9)
    assert debiased(turned(x, 1), y) == pytest.approx(debiased(x, turned(y, 2)))
    assert debiased(x, x * np.array([9, 1, 1, 1, 1, 1])) < 0.8


def test_unrelated_wide_layers_are_unrelated_only_without_the_bias():
    x, y = rows(30, 500, seed=4, batches=8), rows(30, 500, seed=5, batches=8)
    assert biased(x[0], y[0]) > 0.9
    assert abs(debiased(x, y)) < 0.05


def test_a_matrix_has_each_pair_of_layers():
    ours, theirs = [rows(9, 3), rows(9, 4, seed=1)], [rows(9, 2, seed=2), rows(9, 3), rows(9, 4, seed=3)]
    found = cka_matrix(ours, theirs)
    assert found == pytest.approx(np.array([[by_formula(a, b) for b in theirs] for a in ours]))
    assert found[0, 1] == pytest.approx(1)
    assert cka_matrix(ours, ours) == pytest.approx(cka_matrix(ours, ours).T)


def test_a_constant_layer_is_like_nothing_and_few_places_are_refused():
    assert np.isnan(debiased(rows(9, 3), np.full((2, 9, 3), 0.1)))
    with pytest.raises(ValueError, match="batches of 3 places"):
        debiased(rows(3, 2), rows(3, 2))
