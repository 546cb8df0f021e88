"""Average precision: the formula, its ties, and scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dagman.evaluation.average_precision import average_precision
from spade3d.faults import UsageFault


def slow(scores, truth):
    """The same sum, threshold by threshold."""
    total, before, area = sum(truth), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        passed = [true for score, true in zip(scores, truth, strict=True) if score >= threshold]
        recall = sum(passed) / total
        area += (recall - before) * sum(passed) / len(passed)
        before = recall
    return area


def test_average_precision_of_five_voxels_by_hand():
    # Right at ranks 1, 3 and 4: (1 + 2/3 + 3/4) / 3.
    scores, truth = np.array([0.9, 0.8, 0.7, 0.6, 0.1]), np.array([True, False, True, True, False])
    assert average_precision(scores, truth) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


@pytest.mark.parametrize("values", [3, 10, 1000])
def test_average_precision_equals_its_definition_with_ties_and_in_any_order(values):
    rng = np.random.default_rng(values)
    for _ in range(10):
        scores, truth = rng.integers(values, size=(4, 5, 3)).astype(np.float32), rng.random((4, 5, 3)) < 0.3
        found = average_precision(scores, truth)
        assert found == pytest.approx(slow(scores.ravel().tolist(), truth.ravel().tolist()), abs=1e-12)
        order = rng.permutation(scores.size)
        again = average_precision(scores.ravel()[order], truth.ravel()[order])
        assert again == pytest.approx(found, abs=1e-12)  # voxels of one value have no order among them
        assert average_precision(3 * scores + 1, truth) == pytest.approx(found, abs=1e-12)


def test_what_says_the_same_everywhere_gets_the_prevalence_and_what_knows_all_gets_one():
    truth = np.arange(20).reshape(4, 5) < 7
    assert average_precision(np.zeros((4, 5)), truth) == pytest.approx(7 / 20)
    assert average_precision(truth.astype(float), truth) == 1.0
    assert average_precision(np.arange(20.0).reshape(4, 5), np.ones((4, 5), bool)) == 1.0


def test_where_nothing_is_true_there_is_no_precision():
    assert np.isnan(average_precision(np.ones(4), np.zeros(4, bool)))


def test_scores_without_order_are_refused():
    with pytest.raises(UsageFault, match="not finite"):
        average_precision(np.array([0.0, np.nan]), np.array([True, False]))


@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.95])
def test_it_is_scikit_learns_with_voxels_of_one_value_too(zeros):
    rng = np.random.default_rng(3)
    scores = np.where(rng.random((9, 8, 7)) < zeros, 0.0, rng.random((9, 8, 7)).round(2))
    truth = rng.random((9, 8, 7)) < 0.1
    expected = average_precision_score(truth.ravel(), scores.ravel())
    assert average_precision(scores, truth) == pytest.approx(expected, abs=1e-12)
