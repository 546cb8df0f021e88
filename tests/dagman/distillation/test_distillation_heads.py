"""The head of a distillation: unit prototypes that may stand still."""

import math

import pytest
import torch
import torch.nn.functional as F

from dagman.distillation.heads import PrototypeHead


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def head():
    torch.manual_seed(0)
    return PrototypeHead(6, prototypes=11, hidden=16, bottleneck=5)


def test_logits_are_cosines_to_the_prototypes(head):
    features = normal(7, 6)
    x = features
    for index in (0, 2, 4):
        x = x @ head.mlp[index].weight.T + head.mlp[index].bias
        if index < 4:
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    for n, vector in enumerate(x.tolist()):
        for k, prototype in enumerate(head.prototypes.tolist()):
            dot = sum(a * b for a, b in zip(vector, prototype))
            expected = dot / math.hypot(*vector) / math.hypot(*prototype)
            assert head(features)[n, k].item() == pytest.approx(expected, abs=1e-5)


def test_the_last_layer_keeps_unit_rows_whatever_training_makes_of_it(head):
    features = normal(7, 6)
    before = head(features)
    with torch.no_grad():
        head.prototypes.mul_(torch.linspace(0.1, 50, 11)[:, None])
    torch.testing.assert_close(head(features), before)
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.5)
    for _ in range(5):
        optimiser.zero_grad()
        head(features).exp().sum().backward()
        optimiser.step()
    assert not torch.allclose(head(features), before, atol=0.1)
    # A prototype's own direction as the bottleneck's vector has the cosine, and so the logit, 1.
    with torch.no_grad():
        head.mlp[4].weight.zero_()
        head.mlp[4].bias.copy_(head.prototypes[3])
    logits = head(features)
    torch.testing.assert_close(logits[:, 3], torch.ones(7))
    assert logits.abs().max() <= 1 + 1e-6


def test_prototypes_that_stand_still_take_no_gradient_and_no_decay(head):
    features, before = normal(7, 6), head.prototypes.detach().clone()
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    assert torch.equal(head(features, still=True), head(features))
    head(features, still=True).square().sum().backward()
    optimiser.step()
    assert head.prototypes.grad is None and torch.equal(head.prototypes, before)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.mlp.parameters())
    head(features).square().sum().backward()
    assert head.prototypes.grad.isfinite().all() and head.prototypes.grad.abs().sum() > 0


def test_there_is_no_gain_to_learn(head):
    assert {name for name, p in head.named_parameters() if not name.startswith("mlp")} == {"prototypes"}


def test_logits_are_float32_under_autocast(head):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(normal(7, 6))
    assert logits.dtype == torch.float32
    assert (logits - head(normal(7, 6))).abs().max() < 0.02


def test_what_all_rows_have_in_common_is_taken_out(head):
    """Rows that hardly differ: the bare head says the same of all, the standardised one does not."""
    alike = 1 + 0.03 * normal(7, 6)
    torch.manual_seed(0)
    other = PrototypeHead(6, prototypes=11, hidden=16, bottleneck=5, standardise=True)
    with torch.no_grad():
        bare, apart = (F.pdist(one.vectors(alike)).mean() for one in (head, other))
        assert bare < 0.2 and apart > 0.8
        torch.testing.assert_close(other(alike), other(3 * alike - 5), atol=0.02, rtol=0.1)
        features = normal(4, 6)
        rows = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
        reduced = other.mlp(rows)
        expected = (reduced - reduced.mean(0)) / (reduced.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(other.vectors(features), F.normalize(expected, dim=-1), atol=1e-4, rtol=1e-4)


def test_prototypes_begin_small_and_different(head):
    assert 0.01 < head.prototypes.std() < 0.03 and F.pdist(head.prototypes).min() > 0
