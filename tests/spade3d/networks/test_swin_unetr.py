"""The network on any size of crop, hidden tokens, attention on request, and repeatability."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from spade3d.faults import UsageFault
from spade3d.networks.convolutions import channels_last
from spade3d.networks.foreign import load_encoder, save_encoder
from spade3d.networks.swin import AttentionMap
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training import ranks


@pytest.fixture(scope="module")
def network() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(1, 2, feature_size=12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 8), (35, 50, 36), (33, 8, 17), (64, 32, 5)])
@pytest.mark.parametrize("use_v2", [False, True])
def test_any_size_comes_back_as_it_went_in(shape, use_v2):
    torch.manual_seed(1)
    network = SwinUNETR(1, 2, feature_size=12, use_v2=use_v2).train()
    features = network(torch.randn(1, 1, *shape))
    logits = network.logits(features)
    assert logits.shape == (1, 2, *shape)
    assert features.decoded[-1].shape == (1, 12, *shape)
    for stage, output in enumerate(features.stages):
        assert output.shape == (1, 12 * 2**stage, *(-(-size // 2 ** (stage + 1)) for size in shape))
    logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_a_single_cell_at_the_bottleneck_trains(network):
    network.train()
    features = network(torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(2)))
    assert features.stages[-1].shape[2:] == (1, 1, 1)
    assert network.logits(features).isfinite().all()


def test_without_decoding_only_the_encoder_runs(network):
    assert network(torch.zeros(1, 1, 16, 16, 16), finest=None).decoded == ()


def test_hidden_tokens_are_hidden_everywhere(network):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 9, 8, 8, generator=generator) < 0.5
    images = torch.randn(2, 1, 17, 16, 16, generator=generator)
    voxels = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None, :17]
    others = torch.where(voxels, torch.randn(images.shape, generator=generator), images)
    with torch.no_grad():
        seen, same = network(images, mask), network(others, mask)
        token = network(images, mask, finest=None, mask_token=torch.arange(12.0)).stages[0]
    assert torch.equal(seen.decoded[-1], same.decoded[-1])
    assert seen.stages[0].movedim(1, -1)[mask].count_nonzero() == 0
    wanted = torch.nn.functional.layer_norm(torch.arange(12.0), (12,))
    torch.testing.assert_close(token.movedim(1, -1)[mask], wanted.expand(int(mask.sum()), -1))
    assert not torch.equal(seen.decoded[-1], network(images).decoded[-1])


def test_attention_maps_are_what_the_block_used(network):
    network.eval()
    images = torch.randn(2, 1, 36, 32, 20, generator=torch.Generator().manual_seed(4))
    encoder = network.swinViT
    for stage, (grid, heads) in enumerate([((18, 16, 10), 3), ((9, 8, 5), 6), ((5, 4, 3), 12), ((3, 2, 2), 24)], 1):
        maps = encoder.attention_maps(images, stage)
        assert len(maps) == 2
        for attention in maps:
            assert attention.grid == grid and attention.weights.shape[:1] + attention.weights.shape[2:3] == (2, heads)
            torch.testing.assert_close(attention.weights.sum(-1), torch.ones(attention.weights.shape[:-1]))
            received = attention.received()
            assert received.shape == (2, heads, *grid) and received.isfinite().all()

    # The weights, applied by hand to the values of stage 3, are the block's own attention.
    block = encoder.layers3[0].blocks[1]
    tokens = encoder._embed(images, None, None)
    with torch.no_grad():
        for stage in (1, 2):
            tokens = encoder._stage(stage)(tokens)
        tokens = encoder._stage(3).blocks[0](tokens)
        normed = block.norm1(tokens)
        attention = encoder.attention_maps(images, 3)[1]
        values = block.attn.qkv(normed)[..., 96:].reshape(2, 60, 12, 4)
        by_hand = torch.empty(2, 60, 12, 4)
        for window, cells in enumerate(attention.cells):
            real = cells >= 0
            assert real.all()
            seen = attention.weights[:, window] @ values[:, cells].transpose(1, 2)
            by_hand[:, cells] = seen.transpose(1, 2)
        expected = block.attn.proj(by_hand.reshape(tokens.shape))
        torch.testing.assert_close(block.attn(normed, block.shift), expected, atol=1e-5, rtol=1e-5)


def test_received_attention_by_hand():
    # One window of three places over a grid of two cells: the cells get 0.5 and 0.25 on average, padding the rest.
    weights = torch.tensor([[0.6, 0.2, 0.2], [0.4, 0.3, 0.3], [0.0, 1.0, 0.0]]).view(1, 1, 1, 3, 3)
    received = AttentionMap(weights, torch.tensor([[1, 0, -1]]), (1, 2, 1)).received()
    torch.testing.assert_close(received.flatten(), torch.tensor([0.25, 0.5]))


def test_the_same_seed_gives_the_same_gradients():
    def gradients():
        torch.manual_seed(5)
        network = SwinUNETR(1, 1, feature_size=12, drop_path=0.2).train()
        network.logits(network(torch.randn(2, 1, 20, 16, 16))).square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(6)
    block = SwinUNETR(feature_size=12, drop_path=0.5).swinViT.layers4[0].blocks[1]
    dropped = block._drop(torch.ones(4000, 1, 1, 1, 1))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean() == pytest.approx(1, abs=0.06)
    assert torch.equal(block.eval()._drop(torch.ones(3, 1, 1, 1, 1)), torch.ones(3, 1, 1, 1, 1))


def test_every_rank_skips_the_samples_that_one_process_alone_would(monkeypatch):
    torch.manual_seed(0)
    encoder = SwinUNETR(feature_size=12, window=2, drop_path=0.9).swinViT.train()
    x, nothing = torch.rand(4, 1, 8, 8, 8), torch.zeros(4, 4, 4, 4, dtype=torch.bool)

    def last(images):
        """Densely, and of visible tokens alone."""
        for forward in (encoder, lambda some: encoder.forward_visible(some, nothing[: len(some)])):
            torch.manual_seed(8)
            yield forward(images)[-1]

    whole, parts = list(last(x)), []
    monkeypatch.setattr(ranks, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(list(last(ranks.own(x))))
    for alone, *shared in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat(shared), alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_close(network):
    network.eval()
    images = torch.randn(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(images, finest=None).stages
    full = network(images, finest=None).stages
    for a, b in zip(half, full, strict=True):
        assert (a.float() - b).abs().mean() < 0.05
    sum(stage.float().square().mean() for stage in half[3:]).backward()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageFault, match="3 heads cannot share the 16 channels of stage 1"):
        SwinUNETR(feature_size=16)


def test_a_compiled_encoder_is_one_graph_and_says_the_same():
    """In a process of its own: torch.compile does not read the shape checks of these tests."""
    script = Path(__file__).with_name("compiled_encoder.py")
    utf8 = os.environ | {"PYTHONUTF8": "1"}  # torch.compile reads its own files by the locale
    said = subprocess.run([sys.executable, script], env=utf8, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("equal") == 2


def test_channels_last_changes_where_weights_lie_and_not_what_is_learnt(tmp_path):
    torch.manual_seed(0)
    plain = SwinUNETR(1, 2, feature_size=12, window=3, use_v2=True).train()
    last = deepcopy(plain)
    channels_last(last)
    images, found = torch.randn(2, 1, 20, 16, 18), []
    for network in (plain, last):
        adamw = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        losses = []
        for _ in range(3):
            losses.append(network.logits(network(images)).square().mean())
            losses[-1].backward()
            adamw.step()
            adamw.zero_grad()
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
    before, after = plain.decoder5.conv_block.conv1.conv.weight, last.decoder5.conv_block.conv1.conv.weight
    assert before.is_contiguous() and after.is_contiguous(memory_format=torch.channels_last_3d)
    assert not after.is_contiguous() and before.shape == after.shape
    save_encoder(tmp_path / "encoder.safetensors", last)
    again = SwinUNETR(1, 2, feature_size=12, window=3, use_v2=True)
    load_encoder(again, tmp_path / "encoder.safetensors")
    for ours, its in zip(last.swinViT.state_dict().values(), again.swinViT.state_dict().values(), strict=True):
        assert torch.equal(ours, its)
