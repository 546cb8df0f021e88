"""Attention as maps of a crop: cells lie where they are, 1 is the average, and networks are left as they were."""

import pytest
import torch

from dagman.attention.maps import Looker, attention_pictures, enlarged, relative_maps
from dagman.attention.semantic import SemanticAttention
from spade3d.faults import UsageFault
from spade3d.networks.swin import SwinTransformer

SHAPE = (24, 20, 17)


@pytest.fixture(scope="module")
def encoder() -> SwinTransformer:
    torch.manual_seed(0)
    return SwinTransformer(1, 12, heads=(3, 2, 4, 6), window=(3, 3, 3), drop_path=0.5).eval()


@pytest.fixture(scope="module")
def semantic() -> SemanticAttention:
    torch.manual_seed(1)
    module = SemanticAttention(48, heads=4).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # at its start [CLS] looks everywhere alike
    return module


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(2))


def test_cells_lie_where_they_are_and_are_cut_off_at_the_far_end():
    cells = torch.tensor([0.0, 4.0]).reshape(1, 1, 2, 1, 1)
    # Centres at 0.5 and 2.5: a quarter of the way lies half a voxel in, and nothing changes beyond the outermost.
    for size, expected in ((4, [0, 1, 3, 4]), (3, [0, 1, 3])):
        found = enlarged(cells, (2, 3, 1), (size, 2, 1))
        assert found.shape == (1, 1, size, 2, 1) and found[0, 0, :, 1, 0].tolist() == expected


def test_the_class_token_s_attention_is_shown_over_its_mean_in_each_crop(encoder, semantic, images):
    looker = Looker(encoder, 2, semantic)
    assert (looker.cell, looker.heads) == ((8, 8, 8), 4) and looker.said.startswith("[CLS] attention")
    found = relative_maps(looker, images)
    attended = semantic(encoder(images)[2])
    assert found.shape == (2, 5, *SHAPE) and attended.by_head.shape[2:] == (3, 3, 3)
    for crop in range(2):
        for channel, cells in enumerate([attended.mean[crop], *attended.by_head[crop]]):
            twin = enlarged((cells / (cells.sum() / 27))[None, None], (8, 8, 8), SHAPE)[0, 0]
            torch.testing.assert_close(found[crop, channel], twin, rtol=1e-5, atol=1e-4)
            assert found[crop, channel].max() > 1 > found[crop, channel].min() >= 0


@pytest.mark.parametrize("stage, cell, heads", [(1, 2, 3), (3, 8, 4), (4, 16, 6)])
def test_without_a_class_token_it_is_what_cells_receive_in_the_last_block(encoder, images, stage, cell, heads):
    looker = Looker(encoder, stage)
    assert (looker.cell, looker.heads, looker.window) == ((cell,) * 3, heads, (3 * cell,) * 3)
    assert looker.said.startswith(f"attention that cells receive in the last block of stage {stage} ")
    received = encoder.attention_maps(images, stage)[-1].received()
    found = relative_maps(looker, images)
    mean = received.mean(dim=1)
    twin = torch.cat([mean[:, None], received], dim=1)
    twin = twin / twin.flatten(2).mean(dim=2)[:, :, None, None, None]
    torch.testing.assert_close(found, enlarged(twin, looker.cell, SHAPE))


def test_a_brighter_or_darker_sum_does_not_show(encoder, semantic, images, monkeypatch):
    """However much of a head's attention stays on [CLS] itself, its map is the same."""
    looker = Looker(encoder, 2, semantic)
    before, attended = relative_maps(looker, images), looker.by_head(images)
    monkeypatch.setattr(Looker, "by_head", lambda self, crops: attended * 0.01)
    torch.testing.assert_close(relative_maps(looker, images), before)


def test_pictures_are_volumes_by_name_and_leave_a_training_as_it_was(encoder, semantic, images):
    looker = Looker(encoder, 2, semantic)
    expected = relative_maps(looker, images[:1])[0].numpy()
    encoder.train(), semantic.train()
    chance = torch.get_rng_state()
    shown = attention_pictures(looker, images[:1], most_heads=2)
    assert encoder.training and semantic.training and torch.equal(torch.get_rng_state(), chance)
    encoder.eval(), semantic.eval()
    crop, *maps = shown.values()
    assert (crop == images[0, 0].numpy()).all()
    assert list(shown)[1:] == ["[CLS] attention, mean of 4 heads", "[CLS] attention, head 1", "[CLS] attention, head 2"]
    assert all((found == twin).all() for found, twin in zip(maps, expected[:3], strict=True))
    assert "attention of stage 3, mean of 4 heads" in attention_pictures(Looker(encoder, 3), images[:1])


def test_a_stage_that_there_is_not_is_refused(encoder):
    with pytest.raises(UsageFault, match="attention of stage 5: an encoder has stages 1 to 4"):
        Looker(encoder, 5)
