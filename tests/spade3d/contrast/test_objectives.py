"""Objectives, against their formula in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F

from spade3d.contrast.objectives import info_nce, regression


def unit(count, dim, seed):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def masks(queries, keys, seed):
    """Positives and negatives of every kind: rows with both, with one and with none of them."""
    drawn = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed))
    positive, negative = drawn < 0.3, drawn > 0.6
    positive[1], negative[2] = False, False
    positive[3], negative[3] = False, False
    return positive, negative


def slow_info_nce(queries, keys, positive, negative, t):
    terms = []
    for q, attract, repel in zip(queries.tolist(), positive.tolist(), negative.tolist(), strict=True):
        against = [math.exp(dot(q, k) / t) for k, r in zip(keys.tolist(), repel, strict=True) if r]
        towards = [math.exp(dot(q, k) / t) for k, a in zip(keys.tolist(), attract, strict=True) if a]
        if against and towards:
            terms.append(sum(-math.log(p / (p + sum(against))) for p in towards) / len(towards))
    return sum(terms) / len(terms) if terms else 0.0


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("t", [0.07, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_info_nce_equals_its_definition(seed, t):
    queries, keys = unit(7, 5, seed), unit(9, 5, seed + 100)
    positive, negative = masks(7, 9, seed)
    expected = slow_info_nce(queries.double(), keys.double(), positive, negative, t)
    assert info_nce(queries, keys, positive, negative, t).item() == pytest.approx(expected, rel=1e-5)


def test_keys_after_those_that_attract_only_repel():
    queries, keys = unit(7, 5, 3).requires_grad_(), unit(9, 5, 103)
    positive, negative = masks(7, 9, 3)
    positive[:, 4:] = False
    whole, first = (info_nce(queries, keys, some, negative, 0.2) for some in (positive, positive[:, :4]))
    assert whole.item() == first.item() > 0
    gradients = [torch.autograd.grad(loss, queries)[0] for loss in (whole, first)]
    torch.testing.assert_close(*gradients)


def test_info_nce_worked_out_by_hand():
    """One positive at the query itself, one negative opposite, t = 1: - log(e / (e + 1 / e))."""
    query, keys = torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    loss = info_nce(query, keys, torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]]), 1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_the_gradient_is_finite_and_reaches_only_who_is_told_apart():
    queries, keys = unit(7, 5, 0).requires_grad_(), unit(9, 5, 1).requires_grad_()
    positive, negative = masks(7, 9, 2)
    info_nce(queries, keys, positive, negative, 0.01).backward()
    assert queries.grad.isfinite().all() and keys.grad.isfinite().all()
    told = positive.any(dim=1) & negative.any(dim=1)
    assert torch.equal(queries.grad.abs().sum(dim=1) > 0, told) and 0 < told.sum() < 7
    silent = ~(positive[told] | negative[told]).any(dim=0)
    assert (keys.grad[silent] == 0).all()


def test_the_gradient_equals_finite_differences():
    queries, keys = unit(5, 3, 0).double().requires_grad_(), unit(6, 3, 1).double().requires_grad_()
    positive, negative = masks(5, 6, 3)
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, positive, negative, 0.3), (queries, keys))


@pytest.mark.parametrize("queries", [0, 4])
@pytest.mark.parametrize("keys", [0, 6])
@pytest.mark.parametrize("missing", ["positives", "negatives", "both"])
def test_where_nothing_can_be_told_apart_the_loss_asks_for_nothing(queries, keys, missing):
    q, k = unit(queries, 3, 0).requires_grad_(), unit(keys, 3, 1)
    some, none = torch.ones(queries, keys, dtype=torch.bool), torch.zeros(queries, keys, dtype=torch.bool)
    positive, negative = none if missing != "negatives" else some, none if missing != "positives" else some
    loss = info_nce(q, k, positive, negative)
    loss.backward()
    assert loss.item() == 0 and (q.grad == 0).all()


def test_the_loss_falls_as_positives_come_nearer():
    query, negative = unit(1, 8, 0), unit(1, 8, 1)
    masks = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    losses = [
        info_nce(query, torch.cat([F.normalize(negative.lerp(query, a), dim=-1), negative]), *masks).item()
        for a in (0.0, 0.3, 0.6, 1.0)
    ]
    assert losses == sorted(losses, reverse=True) and losses[0] == pytest.approx(math.log(2))


@pytest.mark.parametrize("seed", range(4))
def test_regression_equals_its_definition(seed):
    predictions, targets = unit(7, 5, seed), unit(9, 5, seed + 100)
    positive, _ = masks(7, 9, seed)  # rows 1 and 3 have none
    distances = [
        [math.dist(q, k) ** 2 for k, a in zip(targets.tolist(), attract, strict=True) if a]
        for q, attract in zip(predictions.tolist(), positive.tolist(), strict=True)
    ]
    means = [sum(row) / len(row) for row in distances if row]
    assert len(means) < 7
    assert regression(predictions, targets, positive).item() == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_regression_runs_from_0_to_4_and_asks_for_nothing_without_positives():
    here, one = torch.tensor([[1.0, 0]]).requires_grad_(), torch.tensor([[True]])
    assert regression(here, here.detach(), one).item() == 0
    assert regression(here, -here.detach(), one).item() == 4
    loss = regression(here, -here.detach(), ~one)
    loss.backward()
    assert loss.item() == 0 and (here.grad == 0).all()


def test_the_gradient_of_regression_equals_finite_differences():
    predictions, targets = unit(5, 3, 0).double().requires_grad_(), unit(6, 3, 1).double()
    positive, _ = masks(5, 6, 3)
    assert torch.autograd.gradcheck(lambda q: regression(q, targets, positive), (predictions,))
