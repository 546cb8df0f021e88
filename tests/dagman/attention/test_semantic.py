"""Semantic attention: a side branch whose maps follow its tokens, against a ViT in plain loops over heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from dagman.attention.semantic import SemanticAttention
from spade3d.faults import UsageFault

DIM, HEADS = 12, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 3])
def module(request):
    """Far from its start, where every map is nearly even and a mistake would not show."""
    torch.manual_seed(0)
    made = SemanticAttention(DIM, heads=HEADS, blocks=request.param)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def slow_vit(module, sample):
    """The [CLS] and the last block's maps of one sample (c, cells), every token through every block."""
    tokens = torch.cat([module.class_token[None], sample.T])
    for block in module.blocks:
        normed = F.layer_norm(tokens, (DIM,), block.norm1.weight, block.norm1.bias)
        q, k, v = (normed @ block.qkv.weight.T + block.qkv.bias).split(DIM, dim=1)
        width, seen, maps = DIM // HEADS, [], []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            powers = (q[:, part] @ k[:, part].T / math.sqrt(width)).exp()
            weights = powers / powers.sum(dim=1, keepdim=True)
            seen.append(weights @ v[:, part])
            maps.append(weights[0])
        tokens = tokens + torch.cat(seen, dim=1) @ block.proj.weight.T + block.proj.bias
        normed = F.layer_norm(tokens, (DIM,), block.norm2.weight, block.norm2.bias)
        tokens = tokens + block.mlp(normed)
    return F.layer_norm(tokens[0], (DIM,), module.norm.weight, module.norm.bias), torch.stack(maps)


@pytest.mark.parametrize("grid", [(2, 3, 5), (4, 4, 4), (1, 1, 2), (1, 1, 1)])
def test_summary_and_maps_are_those_of_a_vit(module, grid):
    tokens = normal(2, DIM, *grid)
    attended = module(tokens)
    for b in range(2):
        summary, maps = slow_vit(module, tokens[b].flatten(1))
        torch.testing.assert_close(attended.summary[b], summary, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attended.by_head[b].flatten(1), maps[:, 1:], rtol=1e-4, atol=1e-6)
        assert (maps[:, 1:].sum(dim=1) < 1).all()  # the [CLS] looks at itself, too


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_mirrored_tokens_give_mirrored_maps_and_the_same_summary(module, axis):
    tokens = normal(2, DIM, 2, 3, 5)
    straight, mirrored = module(tokens), module(tokens.flip(axis))
    torch.testing.assert_close(mirrored.by_head, straight.by_head.flip(axis))
    torch.testing.assert_close(mirrored.summary, straight.summary, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_a_symmetric_input_gives_symmetric_maps(module, axis):
    tokens = normal(2, DIM, 4, 4, 4)
    tokens = tokens + tokens.flip(axis)
    attended = module(tokens)
    torch.testing.assert_close(attended.by_head, attended.by_head.flip(axis))
    torch.testing.assert_close(attended.mean, attended.mean.flip(axis - 1))


def test_the_mean_is_the_average_of_the_heads(module):
    attended = module(normal(2, DIM, 2, 3, 5))
    assert attended.mean.shape == (2, 2, 3, 5)
    torch.testing.assert_close(attended.mean, sum(attended.by_head[:, head] for head in range(HEADS)) / HEADS)


def test_an_untrained_class_token_looks_everywhere_alike():
    torch.manual_seed(0)
    by_head = SemanticAttention(48, heads=8)(normal(1, 48, 4, 4, 4)).by_head
    torch.testing.assert_close(by_head, torch.full((1, 8, 4, 4, 4), 1 / 65), rtol=0.1, atol=0)


def test_the_tokens_are_read_and_never_changed(module):
    tokens = normal(2, DIM, 2, 3, 5)
    before = tokens.clone()
    module(tokens)
    assert torch.equal(tokens, before)


def test_the_gradient_reaches_every_parameter_and_the_tokens(module):
    tokens = normal(2, DIM, 2, 3, 5).requires_grad_()
    attended = module(tokens)
    (attended.summary * normal(2, DIM, seed=1)).sum().backward()
    assert tokens.grad.isfinite().all() and tokens.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_a_map_can_be_guided(module):
    """The gradient of a head's map reaches queries and keys of the last block, and moves what it should."""
    tokens = normal(1, DIM, 2, 3, 5)
    before = module(tokens).by_head[0, 1, 1, 2, 3]
    before.log().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all()
                parameter.add_(0.01 * parameter.grad)
    assert module(tokens).by_head[0, 1, 1, 2, 3] > before


def test_maps_are_float32_under_autocast(module):
    tokens = normal(1, DIM, 2, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended = module(tokens)
    assert attended.by_head.dtype == torch.float32
    assert (attended.by_head - module(tokens).by_head).abs().max() < 0.05


def test_samples_do_not_see_each_other(module):
    tokens = normal(3, DIM, 2, 3, 5)
    together, alone = module(tokens), module(tokens[1:2])
    torch.testing.assert_close(together.by_head[1:2], alone.by_head)
    torch.testing.assert_close(together.summary[1:2], alone.summary, rtol=1e-4, atol=1e-5)


def test_heads_that_cannot_share_the_channels_are_refused():
    with pytest.raises(UsageFault, match="5 heads of the semantic attention cannot share 12 channels"):
        SemanticAttention(12, heads=5)


def test_no_blocks_are_refused():
    with pytest.raises(UsageFault, match="0 blocks looks at nothing"):
        SemanticAttention(12, heads=3, blocks=0)
