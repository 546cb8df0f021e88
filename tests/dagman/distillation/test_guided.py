"""Guidance in a task: the chosen attention, the warm-up, what is logged; and that guided heads learn to look."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dagman.attention.guidance import GuidedHeads, guidance
from dagman.attention.semantic import Attended
from dagman.distillation.co_distillation import Dagman, DistillationTerms
from dagman.distillation.guided import Guidance, Tap, guide, tap
from spade3d.crops.crop import Views
from spade3d.crops.pairs import PairStream, Sampling
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.volumes.preprocessing import Normalisation

PLAIN = Views((False,) * 3, 0.0, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.0)
TERMS = DistillationTerms(
    stage=2,
    semantic_heads=4,
    head_width=16,
    bottleneck=8,
    prototypes=12,
    masking="none",
    voxel_weight=0.0,
    token_weight=0.0,
)
HEADS = GuidedHeads(4, ("bright", "dark"))


@pytest.fixture(scope="module")
def store(in_memory):
    """Two bright cubes in the dark, somewhere."""
    rng, images = np.random.default_rng(0), []
    for _ in range(3):
        image = rng.integers(0, 100, (40, 40, 40))
        for i, j, k in rng.integers(0, 30, (4, 3)):
            image[i : i + 10, j : j + 10, k : k + 10] += 800
        images.append(image)
    return in_memory(images, normalisation=Normalisation(0.0, 0.001, 0.0, 1.0))


@pytest.fixture(scope="module")
def batches(store):
    def prior(crop):
        corner = np.rint(crop.to_mm[:3, 3]).astype(int)
        i, j, k = (slice(int(start), int(start) + 24) for start in corner)
        image = np.zeros((24, 24, 24))
        part = store.image(crop.case)[i, j, k]
        image[: part.shape[0], : part.shape[1], : part.shape[2]] = part > 500
        bright = image.reshape(3, 8, 3, 8, 3, 8).mean(axis=(1, 3, 5))
        return np.stack([bright, 1 - bright])

    sampling = Sampling((24, 24, 24), (1.0, 1.0, 1.0), anchors=3, scans=1, places=1, views=PLAIN, one_geometry=True)
    return PairStream(store, range(3), dict.fromkeys(range(3), np.eye(4)), sampling, prior=prior)


def made(guided):
    torch.manual_seed(0)
    network = SwinUNETR(feature_size=12, depths=(1, 1, 1, 2), heads=(2, 2, 2, 4), window=2)
    return Dagman(network.swinViT, 12, TERMS, guided).train()


def test_the_weight_warms_up():
    how = Guidance(HEADS, weight=0.2, warmup=0.5)
    assert [how.at(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.1, 0.2, 0.2])
    assert Guidance(HEADS, weight=0.2, warmup=0.0).at(0.0) == 0.2


def test_cells_are_those_of_the_attention():
    assert Guidance(HEADS, "semantic", stage=3).cell == 16  # tokens after the merging of stage 3
    assert Guidance(HEADS, "native", stage=4).cell == 16  # cells that stage 4 works on, before its merging
    assert Guidance(HEADS, "windowed", stage=2).cell == 4


def test_the_term_is_the_guidance_of_the_guided_heads_of_the_chosen_samples():
    looked = Attended(torch.rand(2, 5), torch.rand(2, 4, 3, 3, 3))
    priors = torch.rand(6, 2, 3, 3, 3)
    samples = torch.tensor([4, 1])
    losses, notes = guide(Guidance(HEADS, weight=0.3), looked, Tap(), priors, samples, 1.0)
    expected, active = guidance(looked.by_head[:, :2], priors[samples], "ce", 0.002)
    torch.testing.assert_close(losses["prior"], 0.3 * expected)
    assert notes["prior.active"] == active == 1
    assert guide(None, looked, Tap(), None, samples, 1.0) == ({}, {})


@pytest.mark.parametrize(("attachment", "stage", "grid"), [("native", 4, 2), ("windowed", 3, 3)])
def test_a_stages_own_attention_is_caught_with_its_gradient(attachment, stage, grid):
    encoder = made(None).student.encoder
    images = torch.rand(2, 1, 24, 24, 24)
    how = Guidance(HEADS if stage == 4 else GuidedHeads(2, ("bright",)), attachment, stage=stage)
    with tap(encoder, how) as caught:
        encoder(images)
    assert caught.map.grid == (grid,) * 3
    prior = torch.rand(2, len(how.heads.regions), grid, grid, grid)
    losses, _ = guide(how, None, caught, prior, torch.tensor([0, 1]), 1.0)
    losses["prior"].backward()
    block = encoder.get_submodule(f"layers{stage}.0.blocks")[-1].attn
    assert block.qkv.weight.grad.any() and encoder.patch_embed.proj.weight.grad.any()
    expected = encoder.attention_maps(images, stage)[-1].weights
    torch.testing.assert_close(caught.map.weights.detach(), expected)
    with tap(encoder, None) as nothing:
        encoder(images)
    assert nothing.map is None and not block._forward_pre_hooks  # the hook is gone


@pytest.mark.parametrize(
    ("attachment", "stage", "regions", "grid"), [("native", 4, ("bright", "dark"), 2), ("windowed", 3, ("bright",), 3)]
)
def test_a_task_guides_a_stages_own_attention(batches, attachment, stage, regions, grid):
    task = made(Guidance(GuidedHeads(2 * len(regions), regions), attachment, stage=stage))
    batch = batches.batch(0)
    priors = torch.rand(len(batch.student), len(regions), grid, grid, grid)
    losses = task.losses(replace(batch, priors=priors), 0.5)
    assert losses["prior"] > 0 and task.notes["prior.active"] == 1
    attention = task.student.encoder.get_submodule(f"layers{stage}.0.blocks")[-1].attn.qkv.weight
    (gradient,) = torch.autograd.grad(losses["prior"], [attention])
    assert gradient.any()


def test_guided_heads_learn_to_look_where_their_region_is(batches):
    how = Guidance(HEADS, stage=2, weight=1.0, warmup=0.0)
    task = made(how)
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    batch = batches.batch(0)
    assert batch.priors[:, 0].any()

    def inside():
        with torch.no_grad():
            maps = task.student.looks.semantic(task.student(batch.student)[2]).by_head[:, :2].flatten(2)
        maps = maps / maps.sum(dim=-1, keepdim=True)
        return (maps * batch.priors.flatten(2)).sum(dim=-1).mean(dim=0)

    before = inside()
    for _ in range(25):
        losses = task.losses(batch, 0.5)
        assert list(losses) == ["AITD", "GITD", "prior"]
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
        task.after_step(0.5)
    assert (inside() > before + 0.03).all() and inside()[0] > 1.2 * before[0]
    assert 0 < float(task.notes["prior.active"]) <= 1


def test_without_weight_heads_stay_free(batches):
    free, unguided = made(Guidance(HEADS, stage=2, weight=0.0)), made(None)
    torch.manual_seed(1)
    losses = free.losses(batches.batch(0), 0.5)
    assert losses["prior"] == 0
    torch.manual_seed(1)
    for name, loss in unguided.losses(replace(batches.batch(0), priors=None), 0.5).items():
        torch.testing.assert_close(loss, losses[name])
