"""Heads: each is its formula, maps add up to the logit, and what is not valid is not seen."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dagman.downstream.study_heads import AttentionPooling, LinearProbe, begin_at_prevalence, mean_token, place_codes
from dagman.downstream.whitening import Moments


@pytest.fixture
def given():
    rng = torch.Generator().manual_seed(0)
    tokens, places = torch.randn(2, 5, 3, 2, 2, generator=rng), torch.rand(2, 3, 3, 2, 2, generator=rng)
    valid = torch.rand(2, 3, 2, 2, generator=rng) > 0.3
    valid[:, 0, 0, 0] = True
    return tokens, places, valid


def test_a_linear_probe_reads_the_whitened_mean_of_the_valid_cells(given):
    tokens, places, valid = given
    torch.manual_seed(0)
    head = LinearProbe(5, 2)
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.whitening.mean)
    torch.nn.init.normal_(head.whitening.root)
    for b in range(2):
        cells = [tokens[b, :, i, j, k] for i, j, k in valid[b].nonzero().tolist()]
        mean = sum(cells) / len(cells)
        x = head.whitening.root.T @ (mean - head.whitening.mean)
        expected = head.linear.weight @ x + head.linear.bias
        output = head(tokens, places, valid)
        torch.testing.assert_close(output.logits[b], expected)
    assert output.maps is None


def test_the_means_of_studies_are_brought_to_the_size_of_cells():
    cells, means = torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 1.0]))
    head = LinearProbe(2, 1)
    head.whiten(Moments(torch.zeros(2), cells, 99), Moments(torch.ones(2), means, 9))
    ridge = 0.01 * (4 + 9) / 2
    root = [1 / math.sqrt(4 + ridge), 1 / math.sqrt(9 + ridge)]
    spread = math.sqrt((root[0] ** 2 + root[1] ** 2) / 2)
    assert head.whitening.root.diagonal().tolist() == pytest.approx([side / spread for side in root])
    assert head.whitening.mean.tolist() == [1, 1]


def test_a_head_on_a_gpu_is_told_moments_that_are_on_the_cpu():
    """On a device that computes nothing, which refuses to be mixed with the CPU as a GPU does."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        head = LinearProbe(2, 1)
        with torch.device("cuda"):
            head.whitening.root, head.whitening.mean = torch.zeros(2, 2), torch.zeros(2)
        head.whitening.fit = lambda found: None  # needs numbers
        head.whiten(Moments(torch.zeros(2), torch.eye(2)), Moments(torch.zeros(2), torch.eye(2)))
        assert head.whitening.root.device.type == "cuda"


def test_attention_pooling_is_its_formula_cell_by_cell(given):
    tokens, places, valid = given
    torch.manual_seed(1)
    head = AttentionPooling(5, 2, dim=8).requires_grad_(False)
    torch.nn.init.normal_(head.whitening.mean)
    torch.nn.init.normal_(head.whitening.root)
    output = head(tokens, places, valid)
    for b in range(2):
        cells = valid[b].nonzero().tolist()
        h = []
        for i, j, k in cells:
            x = head.embed(head.whitening.root.T @ (tokens[b, :, i, j, k] - head.whitening.mean))
            h.append(torch.nn.functional.gelu(x + head.place(place_codes(places[b, :, i, j, k]))))
        for f in range(2):
            scores = [head.look.weight[f] @ (head.gate(one).tanh() * head.show(one).sigmoid()) for one in h]
            total = sum(math.exp(s) for s in scores)
            evidence = [float(head.speak.weight[f] @ one) for one in h]
            looks = [math.exp(s) / total for s in scores]
            logit = sum(a * e for a, e in zip(looks, evidence, strict=True)) + float(head.bias[f])
            assert output.logits[b, f].item() == pytest.approx(logit, abs=1e-5)
            for (i, j, k), a, e in zip(cells, looks, evidence, strict=True):
                assert output.maps[b, f, i, j, k].item() == pytest.approx(a * max(e, 0.0), abs=1e-6)
    assert (output.maps * ~valid[:, None]).abs().max() == 0


@pytest.mark.parametrize("make", [LinearProbe, AttentionPooling])
def test_padding_and_what_it_holds_change_nothing(make, given):
    tokens, places, valid = given
    torch.manual_seed(0)
    head = make(5, 2)
    before = head(tokens, places, valid).logits
    grown = [torch.nn.functional.pad(x, (0, 2, 0, 1, 0, 3), value=9.0) for x in (tokens, places)]
    after = head(*grown, torch.nn.functional.pad(valid, (0, 2, 0, 1, 0, 3)))
    torch.testing.assert_close(after.logits, before)
    assert after.maps is None or after.maps.shape[2:] == (6, 3, 4)


def test_an_order_of_cells_is_not_seen(given):
    """A bag: crops may come in any order."""
    tokens, places, valid = given
    torch.manual_seed(0)
    head = AttentionPooling(5, 2)
    turned = [x.flip(-3) for x in given]
    torch.testing.assert_close(head(*turned).logits, head(*given).logits)


def test_heads_begin_at_the_prevalence(given):
    nan = float("nan")
    labels = torch.tensor([[1.0, nan], [0.0, nan], [0.0, 1.0], [nan, 1.0]])
    bias = torch.zeros(2)
    begin_at_prevalence(bias, labels)
    assert bias.tolist() == pytest.approx([math.log(2 / 3), math.log(3 / 1)])


def test_the_mean_of_a_study_without_valid_cells_is_no_nan(given):
    tokens, _, valid = given
    assert mean_token(tokens, torch.zeros_like(valid)).abs().max() == 0


def test_codes_tell_places_apart_and_mirror_images_too():
    places = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 5)] * 3, indexing="ij"), dim=-1).view(-1, 3)
    codes = place_codes(places)
    assert codes.shape == (125, 36)
    apart = torch.cdist(codes, codes) + 9 * torch.eye(125)
    assert apart.min() > 0.5
