"""The encoder of visible tokens only, against the dense one in which hidden cells are never looked at."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from spade3d.faults import UsageFault
from spade3d.networks import visible, windows
from spade3d.networks.swin import CORNERS, SwinTransformer


def encoder(window, *, dtype=torch.float64, seed=0, **settings):
    """Small, with biases that matter."""
    torch.manual_seed(seed)
    window = (window,) * 3 if isinstance(window, int) else window
    network = SwinTransformer(1, 8, heads=(2, 2, 4, 4), window=window, **settings).to(dtype)
    for name, parameter in network.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return network


def hide(size, cell, share, *, samples=2, seed=0):
    """A token mask that hides cells of so many tokens, each with that chance; other cells in each sample."""
    grid = [-(-voxels // 2) for voxels in size]
    hidden = torch.rand(
        samples, *(-(-tokens // cell) for tokens in grid), generator=torch.Generator().manual_seed(seed)
    )
    hidden = (hidden < share).repeat_interleave(cell, 1).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return hidden[:, : grid[0], : grid[1], : grid[2]].contiguous()


def images(size, *, samples=2, dtype=torch.float64, seed=1):
    return torch.randn(samples, 1, *size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense_twin(network, x, hidden):
    """Every token is computed, hidden ones are no keys, and what is computed for them is thrown away."""
    seen = ~hidden
    tokens = network.patch_embed(x) * seen[..., None]
    outputs = [tokens]
    for stage in (network.layers1[0], network.layers2[0], network.layers3[0], network.layers4[0]):
        for block in stage.blocks:
            tokens = tokens + dense_attention(block, tokens, seen)
            tokens = (tokens + block.mlp(block.norm2(tokens))) * seen[..., None]
        odd = [number for size in reversed(tokens.shape[1:4]) for number in (0, size % 2)]
        corners = [(slice(None), *(slice(first, None, 2) for first in corner)) for corner in CORNERS["v1"]]
        seen = torch.stack([F.pad(seen, odd)[corner] for corner in corners]).any(dim=0)
        tokens = stage.downsample(tokens) * seen[..., None]
        outputs.append(tokens)
    outputs = [F.layer_norm(output, output.shape[-1:]) for output in outputs]
    return [rearrange(output, "b i j k c -> b c i j k") for output in outputs]


def dense_attention(block, tokens, seen):
    """Pad, roll, cut into windows, forbid hidden keys and those from the grid's other end, and all the way back."""
    attention, grid = block.attn, tuple(tokens.shape[1:4])
    window, shift = windows.clip_window(grid, attention.window, block.shift)
    wide = [number for size, side in zip(reversed(grid), reversed(window)) for number in (0, -size % side)]
    x, keys = F.pad(block.norm1(tokens), (0, 0, *wide)), F.pad(seen, wide, value=True)
    padded = x.shape[1:4]
    counts = dict(zip("ijk", (size // side for size, side in zip(padded, window))))
    ends = torch.stack(
        torch.meshgrid(*(torch.arange(size) < by for size, by in zip(padded, shift)), indexing="ij"), dim=-1
    )

    def cut(grids):
        rolled = grids.roll([-by for by in shift], (1, 2, 3))
        return rearrange(rolled, "b (i p) (j q) (k r) c -> (b i j k) (p q r) c", **counts)

    heads = attention.relative_position_bias_table.shape[1]
    q, k, v = rearrange(cut(attention.qkv(x)), "w n (part h d) -> part w h n d", part=3, h=heads)
    bias = attention.relative_position_bias_table[windows.relative_position_index(attention.window)]
    places = torch.arange(bias.shape[0]).view(attention.window)[: window[0], : window[1], : window[2]].flatten()
    bias = bias[places][:, places].permute(2, 0, 1)
    ends = cut(ends.expand(len(x), *ends.shape))
    meet = (ends[:, :, None] == ends[:, None, :]).all(dim=-1) & cut(keys[..., None])[:, None, :, 0]
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    weights = scores.masked_fill(~meet[:, None], -1e9).softmax(dim=-1)  # not -inf: a hidden cell may see nothing
    sides = dict(zip("pqr", window))
    out = rearrange(weights @ v, "(b i j k) h (p q r) d -> b (i p) (j q) (k r) (h d)", **counts, **sides)
    out = attention.proj(out.roll(shift, (1, 2, 3)))
    return out[:, : grid[0], : grid[1], : grid[2]] * seen[..., None]


def answers(network, forward, x, hidden):
    """The five maps; the gradients of the parameters and of the image."""
    x = x.clone().requires_grad_()
    outputs = forward(x, hidden)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(output.shape, dtype=x.dtype, generator=generator) for output in outputs]
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, [*network.parameters(), x])


def assert_equal_answers(ours, twins, tolerance):
    for a, b in zip(ours[0], twins[0], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    for a, b in zip(ours[1], twins[1], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


# Tokens 15 x 13 x 9, 17 x 20 x 12, 15 x 13 x 19 and 25 x 10 x 18: odd grids at every level, padded, shifted and
# clipped windows.
@pytest.mark.parametrize(
    ("window", "size", "cell"),
    [(7, (30, 26, 18), 8), (4, (33, 40, 24), 4), (6, (30, 26, 38), 8), ((7, 4, 6), (50, 20, 36), 8)],
)
def test_dropping_hidden_tokens_equals_never_looking_at_them(window, size, cell):
    network, x, hidden = encoder(window), images(size), hide(size, cell, 0.6)
    ours = answers(network, network.forward_visible, x, hidden)
    assert_equal_answers(ours, answers(network, lambda *of: dense_twin(network, *of), x, hidden), 1e-10)


@pytest.mark.parametrize(("window", "size"), [(7, (32, 32, 24)), (4, (33, 40, 24)), ((7, 4, 6), (26, 20, 36))])
def test_in_single_precision_it_equals_the_twin_to_five_digits(window, size):
    """By the kernels of a CPU, which doubles do not take."""
    network, x, hidden = encoder(window, dtype=torch.float32), images(size, dtype=torch.float32), hide(size, 8, 0.6)
    ours = answers(network, network.forward_visible, x, hidden)
    assert_equal_answers(ours, answers(network, lambda *of: dense_twin(network, *of), x, hidden), 1e-5)


@pytest.mark.parametrize(
    "cutting",
    [
        visible.Cutting(scores=1, least_filled=1.0),
        visible.Cutting(scores=2**24, least_filled=0.0),
        visible.ACCELERATOR,
        visible.Cutting(scores=2**10, least_filled=0.5),
    ],
    ids=["one by one", "all together", "as on an accelerator", "few at once"],
)
def test_how_the_work_is_cut_does_not_matter(monkeypatch, cutting):
    size = (22, 18, 24)
    network, x, hidden = encoder(4), images(size), hide(size, 4, 0.5)
    usual = answers(network, network.forward_visible, x, hidden)
    monkeypatch.setattr(visible, "CPU", cutting)
    assert_equal_answers(answers(network, network.forward_visible, x, hidden), usual, 1e-11)


@pytest.mark.parametrize("settings", [{}, {"monai_compatible": True}, {"merging": "v2"}, {"qkv_bias": False}])
def test_with_nothing_hidden_it_is_the_dense_encoder(settings):
    size = (24, 20, 10)
    network, x = encoder(7, **settings), images(size)
    nothing = torch.zeros(2, 12, 10, 5, dtype=torch.bool)
    ours = answers(network, network.forward_visible, x, nothing)
    assert_equal_answers(ours, answers(network, lambda x, _: network(x), x, nothing), 1e-11)


def test_any_mask_will_do_and_a_sample_may_be_hidden_wholly():
    size = (16, 12, 14)
    network, x = encoder(4), images(size)
    hidden = torch.rand(2, 8, 6, 7, generator=torch.Generator().manual_seed(3)) < 0.7
    hidden[1] = True
    ours = answers(network, network.forward_visible, x, hidden)
    assert_equal_answers(ours, answers(network, lambda *of: dense_twin(network, *of), x, hidden), 1e-10)
    assert all(not output[1].any() for output in ours[0])


def test_what_is_hidden_changes_nothing():
    size = (32, 32, 32)
    network, x, hidden = encoder(6), images(size), hide(size, 8, 0.5)
    voxels = F.interpolate(hidden[:, None].double(), scale_factor=2) > 0
    other = torch.where(voxels, images(size, seed=9), x)
    for a, b in zip(network.forward_visible(x, hidden), network.forward_visible(other, hidden), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(network(x), network(other), strict=True))


def test_the_same_step_has_the_same_bits_on_two_threads():
    size = (48, 32, 32)
    network, x, hidden = encoder(7, dtype=torch.float32), images(size, dtype=torch.float32), hide(size, 8, 0.5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        (_, first), (_, second) = (answers(network, network.forward_visible, x, hidden) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_stochastic_depth_skips_the_samples_that_the_dense_encoder_skips():
    size = (16, 16, 16)
    network, x = encoder(4, drop_path=0.5), images(size, samples=4)
    nothing, maps = torch.zeros(4, 8, 8, 8, dtype=torch.bool), []
    for forward in (network, lambda x: network.forward_visible(x, nothing)):
        torch.manual_seed(5)
        maps.append(forward(x))
    for a, b in zip(*maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_half_precision_has_the_same_gradients_roughly_and_in_single():
    size = (32, 32, 32)
    network, x, hidden = encoder(7, dtype=torch.float32), images(size, dtype=torch.float32), hide(size, 8, 0.5)
    exact = answers(network, network.forward_visible, x, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = answers(network, network.forward_visible, x, hidden)
    assert all(gradient.dtype == torch.float32 for gradient in half[1])
    # One gradient alone may be small enough to drown in the rounding: that of a bias at stage 4 does, densely too.
    a, b = (torch.cat([gradient.flatten() for gradient in of]) for of in (half[1], exact[1]))
    assert F.cosine_similarity(a, b, dim=0) > 0.99


def test_what_cannot_be_done_says_so():
    x, hidden = images((16, 16, 16)).float(), hide((16, 16, 16), 4, 0.5)
    network = encoder(4, dtype=torch.float32)
    with pytest.raises(UsageFault, match=r"token mask of \(2, 8, 8, 4\).*\(2, 8, 8, 8\)"):
        network.forward_visible(x, hidden[..., :4])
    with pytest.raises(UsageFault, match="every token of every sample is hidden"):
        network.forward_visible(x, torch.ones_like(hidden))
    with pytest.raises(UsageFault, match="use_v2"):
        encoder(4, dtype=torch.float32, use_v2=True).forward_visible(x, hidden)
