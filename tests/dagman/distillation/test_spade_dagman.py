"""Both tasks on one encoder: one look of the student at each crop, one teacher for keys, mask and targets."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dagman.attention.guidance import GuidedHeads
from dagman.distillation.co_distillation import DistillationTerms
from dagman.distillation.guided import Guidance
from dagman.distillation.head_looks import LooksAtHeads
from dagman.distillation.masking import expand
from dagman.distillation.spade_dagman import SpadeDagman
from spade3d.contrast.spade import SpadeTerms
from spade3d.crops.pairs import PairStream, Sampling
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.volumes.preprocessing import Normalisation

SPADE = SpadeTerms(
    far_mm=8.0, far_local_mm=6.0, global_memory=16, local_memory=40, global_dim=8, local_dim=6, restoration_weight=0.0
)
DISTILL = DistillationTerms(stage=2, semantic_heads=2, head_width=16, bottleneck=8, prototypes=12)


@pytest.fixture(scope="module")
def batches(in_memory):
    rng = np.random.default_rng(0)
    place = np.indices((44, 40, 42)).sum(axis=0) * 10
    images = [place + rng.integers(0, 300, place.shape) for _ in range(3)]
    store = in_memory(images, normalisation=Normalisation(0.0, 1 / 1600, 0.0, 1.0))
    sampling = Sampling((24, 24, 24), (1.0, 1.0, 1.0), grid=(6, 6, 6), places=9, one_geometry=True)
    return PairStream(store, range(3), dict.fromkeys(range(3), np.eye(4)), sampling)


def made(spade=SPADE, distill=DISTILL, seed=0, **more):
    torch.manual_seed(seed)
    # Windows of 3 tokens see past a cell of 2, so that what is hidden still differs by what is shown beside it.
    network = SwinUNETR(feature_size=12, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), window=3)
    return SpadeDagman(network, spade, distill, **more).train()


@pytest.fixture(scope="module")
def calibrated(batches):
    task = made()
    task.calibrate(batches.stream(100, 102))
    return task


@pytest.fixture
def task(calibrated):
    return copy.deepcopy(calibrated)


def learn(task, optimiser, batch, progress=0.5):
    losses = task.losses(batch, progress)
    optimiser.zero_grad()
    sum(losses.values()).backward()
    optimiser.step()
    task.after_step(progress)
    return {name: loss.item() for name, loss in losses.items()}


def test_the_terms_of_both_tasks(task, batches):
    task.losses(batches.batch(1), 0.5)
    task.after_step(0.5)  # something to be told apart from
    losses = task.losses(batches.batch(0), 0.5)
    assert list(losses) == ["global", "local", "AMIP", "AMPD", "AITD", "GITD"]
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values())


def test_the_student_looks_once_at_every_crop_and_the_teacher_twice(task, batches):
    looks = {"student": [], "teacher": []}
    for who, encoder in (
        ("student", task.student.spade.network.swinViT),
        ("teacher", task.teacher.copied.spade.network.swinViT),
    ):
        encoder.register_forward_pre_hook(lambda _, given, who=who: looks[who].append((len(given[0]), given[1])))
    batch = batches.batch(0)
    task.losses(batch, 0.5)
    ((crops, hidden),) = looks["student"]
    assert crops == len(batch.student) and (hidden.flatten(1).float().mean(dim=1) > 0.4).all()
    (whole, shown), (noisy, dropped) = looks["teacher"]
    assert whole == noisy == len(batch.teacher) and shown is None
    assert (dropped.flatten(1).sum(dim=1) == int(0.7 * 12**3)).all()


def test_one_gradient_of_both_reaches_the_encoder(task, batches):
    """Gradients add up: that of the sum is that of Spade's terms and that of DAGMaN's."""
    batch = batches.batch(0)
    weight = task.student.spade.network.swinViT.patch_embed.proj.weight
    gradients = []
    for names in (("global", "local"), ("AMIP", "AMPD", "AITD", "GITD"), None):
        torch.manual_seed(0)
        losses = task.losses(batch, 0.5)
        chosen = [loss for name, loss in losses.items() if names is None or name in names]
        (gradient,) = torch.autograd.grad(sum(chosen), [weight])
        assert gradient.any()
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], rtol=1e-3, atol=1e-5)


def test_keys_come_from_the_whole_crop_as_the_teacher_sees_it(task, batches):
    batch = batches.batch(0)
    task.losses(batch, 0.5)
    task.after_step(1.0)
    _, v_g, v_l = task.teacher.copied.spade(batch.teacher, batch.key_crop, batch.key_voxel)
    torch.testing.assert_close(task.contrast.global_memory.vectors, v_g)
    torch.testing.assert_close(task.contrast.local_memory.vectors, v_l)


def test_what_is_hidden_is_hidden_from_both_tasks(task, batches):
    batch = batches.batch(0)
    torch.manual_seed(3)
    losses = task.losses(batch, 0.5)
    torch.manual_seed(3)
    task.distillation.noise(batch.teacher)
    with torch.no_grad():
        masked = task.mask(task.teacher(batch.teacher).stages, len(batch.student))
    scribbled = batch.student.masked_fill(expand(masked.hidden, (24, 24, 24))[:, None], 7.0)
    torch.manual_seed(3)
    again = task.losses(replace(batch, student=scribbled), 0.5)
    for name, loss in losses.items():
        torch.testing.assert_close(again[name], loss, msg=name)


def test_the_mask_follows_the_look_that_is_asked_for(batches):
    task, batch, seen = made(distill=replace(DISTILL, attention_from="noisy")), batches.batch(0), []
    task.student.spade.network.swinViT.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    torch.manual_seed(3)
    task.losses(batch, 0.5)
    torch.manual_seed(3)
    noise = task.distillation.noise(batch.teacher)
    with torch.no_grad():
        of_looks = [
            task.mask(task.teacher(batch.teacher, dropped).stages, len(batch.student)) for dropped in (noise, None)
        ]
    noisy, clean = (expand(masked.hidden, (12, 12, 12)) for masked in of_looks)
    assert torch.equal(seen[0], noisy) and not torch.equal(noisy, clean)


@pytest.mark.parametrize(("attachment", "stage", "grid"), [("native", 4, 2), ("windowed", 2, 6)])
def test_a_stages_own_attention_is_guided(batches, attachment, stage, grid):
    task = made(guidance=Guidance(GuidedHeads(2, ("bright",)), attachment, stage=stage))
    batch = batches.batch(0)
    losses = task.losses(replace(batch, priors=torch.rand(len(batch.student), 1, grid, grid, grid)), 0.5)
    assert losses["prior"] > 0 and task.notes["prior.active"] == 1
    attention = task.student.spade.network.swinViT.get_submodule(f"layers{stage}.0.blocks")[-1].attn.qkv.weight
    (gradient,) = torch.autograd.grad(losses["prior"], [attention])
    assert gradient.any()


def test_the_diversity_of_heads_is_noted_when_it_is_due(batches):
    task = made(diversity=LooksAtHeads(2, (1.0, 1.0, 1.0)))
    task.losses(batches.batch(0), 0.1)
    assert not task.notes
    task.losses(batches.batch(0), 0.5)
    assert task.notes["stage1.entropy"] > 0 and task.notes["stage3.entropy"] > 0


def test_without_places_and_with_restoration(batches):
    task = made(replace(SPADE, local_weight=0.0, restoration_weight=2.0, restoration_cell=4))
    batch, restored = batches.batch(0), []
    task.restorer.head.register_forward_hook(lambda _, given, voxels: restored.append(voxels))
    losses = task.losses(batch, 0.5)
    assert list(losses) == ["global", "restoration", "AMIP", "AMPD", "AITD", "GITD"]
    torch.testing.assert_close(losses["restoration"], 2 * ((restored[0] - batch.clean) ** 2).mean())
    task.after_step(0.5)
    assert len(task.contrast.local_memory) == 0 < len(task.contrast.global_memory)


def test_the_teacher_only_follows(task, batches):
    sum(task.losses(batches.batch(0), 0.5).values()).backward()
    assert not task.teacher.training and all(parameter.grad is None for parameter in task.teacher.parameters())


def test_a_step_that_was_not_finite_leaves_nothing_behind(task, batches):
    task.losses(batches.batch(0), 0.5)
    task.after_skip()
    task.after_step(0.5)
    assert len(task.contrast.global_memory) == 0
    assert not any(centre.value.any() for centre in task.distillation.centres.values())


def test_a_task_goes_on_from_its_state(task, batches):
    """Teacher, memories and centres: after loading the losses are the same to the last digit."""
    optimiser = torch.optim.SGD(task.student.parameters(), lr=0.01)
    for step in range(2):
        learn(task, optimiser, batches.batch(step), (step + 1) / 6)
    other = made(seed=9)
    other.load_state_dict(copy.deepcopy(task.state_dict()))
    others = torch.optim.SGD(other.student.parameters(), lr=0.01)
    chance, said = torch.get_rng_state(), []
    for one, its in ((task, optimiser), (other, others)):
        torch.set_rng_state(chance)
        said.append([learn(one, its, batches.batch(step), (step + 1) / 6) for step in range(2, 4)])
    assert said[0] == said[1] and np.isfinite([list(losses.values()) for losses in said[0]]).all()
