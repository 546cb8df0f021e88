"""The Spade task: what it asks of the student, how the teacher follows, and what is remembered."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spade3d.contrast.objectives import info_nce
from spade3d.contrast.spade import Spade, SpadeTerms, contrast
from spade3d.crops.pairs import PairStream, Sampling
from spade3d.crops.selection import Places, apart
from spade3d.networks.features import CELLS, Features
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.volumes.preprocessing import Normalisation

TERMS = SpadeTerms(far_mm=6.0, far_local_mm=4.0, global_memory=16, local_memory=40, global_dim=8, local_dim=6)


class TinyNetwork(nn.Module):
    """The least that has a bottleneck, decoded maps of 4 and 1 voxels, and logits."""

    bottleneck_channels = 8

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(1, 8, 4, stride=4)
        self.full = nn.Conv3d(1, 6, 3, padding=1)
        self.out = nn.Conv3d(6, 1, 1)

    def decoded_channels(self, cell):
        return 6

    def forward(self, images, token_mask=None, finest=1):
        if token_mask is not None:
            images = images.masked_fill(F.interpolate(token_mask[:, None].float(), scale_factor=2) > 0, 0)
        full = self.full(images).tanh()
        coarse = F.avg_pool3d(full, 4)
        return Features((self.down(images).tanh(),), (coarse, coarse, coarse, full, full))

    def logits(self, features):
        return self.out(features.decoded[-1])


@pytest.fixture(scope="module")
def batches(in_memory):
    rng = np.random.default_rng(0)
    place = np.indices((24, 22, 20)).sum(axis=0) * 10
    images = [place + rng.integers(0, 100, place.shape) for _ in range(3)]
    store = in_memory(images, normalisation=Normalisation(0.0, 1 / 740, 0.0, 1.0))
    sampling = Sampling(shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0), scans=2, grid=(4, 4, 4), places=5)
    return PairStream(store, range(3), dict.fromkeys(range(3), np.eye(4)), sampling)


@pytest.fixture
def task(batches):
    torch.manual_seed(0)
    made = Spade(TinyNetwork(), TERMS).train()
    made.calibrate(batches.stream(100, 104))
    return made


def learn(task, optimiser, batch, progress=0.0):
    losses = task.losses(batch, progress)
    optimiser.zero_grad()
    sum(losses.values()).backward()
    optimiser.step()
    task.after_step(progress)
    return {name: loss.item() for name, loss in losses.items()}


def test_losses_have_names_and_are_weighted(task, batches):
    batch = batches.batch(0)
    task.losses(batches.batch(1), 0.0)
    task.after_step(0.0)  # something to be told apart from
    losses = task.losses(batch, 0.0)
    assert list(losses) == ["global", "local", "restoration"]
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values())
    task.terms = task.contrast.terms = replace(TERMS, global_weight=2.0, local_weight=0.0, restoration_weight=3.0)
    again = task.losses(batch, 0.0)
    assert list(again) == ["global", "restoration"]  # what weighs nothing is not computed
    for name, weight in (("global", 2.0), ("restoration", 3.0)):
        torch.testing.assert_close(again[name], weight * losses[name])


def test_without_a_local_weight_no_place_is_read(task, batches):
    task.terms = task.contrast.terms = replace(TERMS, local_weight=0.0, restoration_weight=0.0)
    task.losses(batches.batch(0), 0.0)
    task.after_step(0.0)
    assert len(task.contrast.local_memory) == 0 < len(task.contrast.global_memory)


def test_restoration_alone_asks_no_teacher(task, batches):
    task.terms = task.contrast.terms = replace(TERMS, global_weight=0.0, local_weight=0.0)
    assert list(task.losses(batches.batch(0), 0.0)) == ["restoration"]
    task.after_step(0.0)
    assert task.embedding is None and len(task.contrast.global_memory) == len(task.contrast.local_memory) == 0


def test_what_is_hidden_from_the_student_is_restored_all_the_same(task, batches):
    batch = batches.batch(0)
    hidden = torch.zeros(4, 4, 4, 4, dtype=torch.bool)
    hidden[:, :2] = True
    losses = task.losses(replace(batch, hidden=hidden), 0.0)
    blind = batch.student.clone()
    blind[:, :, :4] = 0
    restored = task.student.network.logits(task.student.network(blind))
    torch.testing.assert_close(losses["restoration"], F.mse_loss(restored, batch.clean))


def test_calibration_spreads_what_both_branches_say(task, batches):
    batch = batches.batch(7)
    for branch in (task.student, task.teacher):
        _, v_g, v_l = branch(batch.student, batch.query_crop, batch.query_voxel)
        raw = Spade(TinyNetwork(), TERMS).student(batch.student, batch.query_crop, batch.query_voxel)
        for ours, without in ((v_g, raw[1]), (v_l, raw[2])):
            assert (ours @ ours.T).mean() < (without @ without.T).mean() - 0.1


def slowly_restored(task, features, cell):
    """The voxels (b, 1, i, j, k): the decoder's own output, or one linear map of each decoded cell to its voxels."""
    if cell == 1:
        return task.student.network.logits(features)
    decoded, linear = features.decoded[CELLS.index(cell)], task.restorer.head.linear
    crops, _, *grid = decoded.shape
    restored = torch.zeros(crops, 1, *(cell * side for side in grid))
    for b, *at in np.ndindex(crops, *grid):
        i, j, k = (slice(cell * place, cell * (place + 1)) for place in at)
        restored[b, 0, i, j, k] = (linear.weight @ decoded[b, :, *at] + linear.bias).view(cell, cell, cell)
    return restored


@pytest.mark.parametrize("cell", [1, 4])
def test_restoration_is_the_square_of_what_is_missing(batches, cell):
    batch = batches.batch(0)
    torch.manual_seed(0)
    task = Spade(TinyNetwork(), replace(TERMS, restoration_cell=cell)).train()
    restored = slowly_restored(task, task.student.network(batch.student), cell)
    missing = ((restored - batch.clean) ** 2).mean()
    loss = task.losses(batch, 0.0)["restoration"]
    torch.testing.assert_close(loss, missing)
    loss.backward()  # what restores is learned together with what it restores from
    learned = task.student.network.out if cell == 1 else task.restorer.head
    assert all(part.grad.any() for module in (learned, task.student.network.full) for part in module.parameters())


def test_the_teacher_takes_no_gradient_and_never_trains(task, batches):
    losses = task.losses(batches.batch(0), 0.0)
    sum(losses.values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.student.parameters())
    assert task.student.training and not any(module.training for module in task.teacher.modules())
    trained = {id(p) for group in task.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for p in task.student.parameters()}


def test_both_branches_begin_as_one(task, batches):
    batch = batches.batch(0)
    seen = batch.student, batch.query_crop, batch.query_voxel
    for ours, its in zip(task.student(*seen)[1:], task.teacher(*seen)[1:], strict=True):
        torch.testing.assert_close(ours, its)
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(len(ours)))


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_teacher_follows_along_a_cosine(task, progress):
    before = copy.deepcopy(task.teacher.state_dict())
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    task.after_step(progress)
    m = 1 - (1 - TERMS.momentum) * (1 + math.cos(math.pi * progress)) / 2
    for name, ours in task.student.state_dict().items():
        torch.testing.assert_close(
            task.teacher.state_dict()[f"copied.{name}"], m * before[f"copied.{name}"] + (1 - m) * ours
        )


def test_the_teacher_s_vectors_are_remembered_after_the_step(task, batches):
    batch = batches.batch(0)
    task.losses(batch, 0.0)
    assert len(task.contrast.global_memory) == len(task.contrast.local_memory) == 0
    _, t_g, t_l = task.teacher(batch.teacher, batch.key_crop, batch.key_voxel)
    task.after_step(0.0)
    torch.testing.assert_close(task.contrast.global_memory.vectors, t_g)
    torch.testing.assert_close(task.contrast.local_memory.vectors, t_l)
    np.testing.assert_array_equal(task.contrast.global_memory.places.mm, batch.boxes.mm)
    np.testing.assert_array_equal(task.contrast.local_memory.places.mm, batch.places.mm)
    for step in range(1, 6):
        task.losses(batches.batch(step), 0.0)
        task.after_step(0.0)
    assert len(task.contrast.global_memory) == 16 and len(task.contrast.local_memory) == 40  # full


def test_accumulated_batches_are_all_remembered(task, batches):
    for step in range(3):
        task.losses(batches.batch(step), 0.0)
    task.after_step(0.0)
    assert len(task.contrast.global_memory) == 12 and not task.contrast.unremembered


def test_a_step_that_was_skipped_leaves_nothing(task, batches):
    before = copy.deepcopy(task.teacher.state_dict())
    task.losses(batches.batch(0), 0.0)
    task.after_skip()
    assert not task.contrast.unremembered and len(task.contrast.global_memory) == len(task.contrast.local_memory) == 0
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())


def test_signs_of_life_get_both_embeddings(task, batches):
    task.losses(batches.batch(0), 0.0)
    places = len(batches.batch(0).query_crop)
    assert task.embedding.shape == task.paired.shape == (places, TERMS.local_dim)  # of many places
    assert not task.embedding.requires_grad and "embedding" not in task.state_dict()
    task.terms = task.contrast.terms = replace(TERMS, local_weight=0.0)
    task.losses(batches.batch(0), 0.0)
    assert task.embedding.shape == task.paired.shape == (4, TERMS.global_dim)  # or, without them, of crops


def test_a_fixed_batch_is_learned(task, batches):
    optimiser = torch.optim.AdamW(task.student.parameters(), lr=5e-3)
    for step in range(1, 5):
        learn(task, optimiser, batches.batch(step))
    history = [learn(task, optimiser, batches.batch(0)) for _ in range(25)]
    for name, share in {"global": 0.97, "local": 0.97, "restoration": 0.7}.items():
        assert history[-1][name] < share * history[0][name]


def test_a_task_goes_on_from_its_state(task, batches):
    """Teacher, memories and their places: the losses after loading are the same to the last digit."""
    optimiser = torch.optim.SGD(task.student.parameters(), lr=0.01)
    for step in range(3):
        learn(task, optimiser, batches.batch(step), progress=0.1)
    torch.manual_seed(9)
    other = Spade(TinyNetwork(), TERMS).train()
    other.load_state_dict(copy.deepcopy(task.state_dict()))
    others = torch.optim.SGD(other.student.parameters(), lr=0.01)
    for step in range(3, 6):
        assert learn(task, optimiser, batches.batch(step)) == learn(other, others, batches.batch(step))


def test_contrast_selects_by_place(task, batches):
    batch = batches.batch(0)
    task.losses(batches.batch(1), 0.0)
    task.after_step(0.0)
    keys = nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    memory = task.contrast.global_memory
    everything = Places.joined([batch.boxes, memory.places])
    negative = torch.from_numpy(apart(batch.boxes, everything, 0.5))
    assert torch.equal(task.contrast.repelled(batch.boxes, batch.key_boxes, memory, 0.5), negative)
    found = contrast(keys.flip(0), keys, memory, batch.alike, negative, 0.2)
    positive = torch.cat([batch.alike, torch.zeros(4, 4, dtype=torch.bool)], dim=1)
    assert (positive & negative).any()  # the overlapping partner is far, and still no negative
    negative &= ~positive
    expected = info_nce(keys.flip(0), torch.cat([keys, memory.vectors]), positive, negative, 0.2)
    torch.testing.assert_close(found, expected)
    task.terms = task.contrast.terms = replace(TERMS, spatial_negatives=False)
    assert task.contrast.repelled(batch.boxes, batch.key_boxes, memory, 0.5).all()


def slow_contrast(queries, keys, places, of_keys, attracts, far_mm):
    """InfoNCE, one query after the other: a key more than far_mm away repels, unless it attracts."""
    middles, of_keys = (mm if mm.shape[1] == 3 else (mm[:, :3] + mm[:, 3:]) / 2 for mm in (places, of_keys))
    terms = []
    for q, query in enumerate(queries):
        near = [math.exp(query @ key / TERMS.temperature) for key in keys]
        attracting = np.flatnonzero(attracts[q])
        far = [k for k in range(len(keys)) if math.dist(middles[q], of_keys[k]) > far_mm and k not in attracting]
        against = sum(near[k] for k in far)
        if len(attracting) and far:
            terms.append(np.mean([-math.log(near[k] / (near[k] + against)) for k in attracting]))
    return np.mean(terms)


def test_each_scope_repels_from_its_own_distance_on(task, batches):
    """Both distances leave some keys out, and each loss is another one with the distance of the other scope."""
    task.terms = task.contrast.terms = replace(TERMS, far_mm=9.0, far_local_mm=4.0)
    batch, memories = batches.batch(0), (task.contrast.global_memory, task.contrast.local_memory)
    for step in range(1, 5):  # memories of many places
        task.losses(batches.batch(step), 0.0)
        task.after_step(0.0)
    losses = task.losses(batch, 0.0)
    with torch.no_grad():
        _, *ours = task.student(batch.student, batch.query_crop, batch.query_voxel)
        _, *its = task.teacher(batch.teacher, batch.key_crop, batch.key_voxel)
    places, keyed = (batch.boxes, batch.places), (batch.key_boxes, batch.places)
    attracts = (batch.alike.numpy(), np.eye(len(ours[1]), dtype=bool))
    for n, (name, far, other) in enumerate((("global", 9.0, 4.0), ("local", 4.0, 9.0))):
        keys = torch.cat([its[n], memories[n].vectors])
        of_keys = np.concatenate([keyed[n].mm, memories[n].places.mm])
        by_distance = [slow_contrast(ours[n], keys, places[n].mm, of_keys, attracts[n], mm) for mm in (far, other)]
        assert losses[name].item() == pytest.approx(by_distance[0], rel=1e-4)
        assert abs(by_distance[1] - by_distance[0]) > 0.05


def test_logits_keep_their_precision_under_autocast(task, batches):
    batch, keys = batches.batch(0), nn.functional.normalize(torch.randn(4, 8), dim=-1)
    task.losses(batches.batch(1), 0.0)
    task.after_step(0.0)
    asked = keys, keys, task.contrast.global_memory, batch.alike, torch.ones(4, 8, dtype=torch.bool), 0.05
    exact = contrast(*asked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrast(*asked), exact)


def test_a_batch_without_matched_places_has_no_local_loss(task, batches):
    batch = batches.batch(0)
    none = torch.zeros(0, dtype=torch.int64)
    bare = replace(
        batch,
        query_crop=none,
        key_crop=none,
        query_voxel=torch.zeros(0, 3),
        key_voxel=torch.zeros(0, 3),
        places=Places(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)),
    )
    losses = task.losses(bare, 0.0)
    sum(losses.values()).backward()
    task.after_step(0.0)
    assert losses["local"] == 0 and len(task.contrast.local_memory) == 0


def test_spade_trains_a_swin_unetr(in_memory):
    torch.manual_seed(0)
    network = SwinUNETR(1, 1, feature_size=12, heads=(1, 1, 1, 1), window=2, depths=(1, 1, 1, 1))
    task = Spade(network, TERMS).train()
    image = np.random.default_rng(0).integers(0, 100, (24, 24, 24))
    store = in_memory([image], normalisation=Normalisation(0.0, 0.01, 0.0, 1.0))
    sampling = Sampling(shape=(16, 16, 16), spacing=(1.0, 1.0, 1.0), grid=(4, 4, 4), places=5)
    batches = PairStream(store, [0], {0: np.eye(4)}, sampling)
    task.losses(batches.batch(0), 0.0)
    task.after_step(0.0)
    losses = task.losses(batches.batch(1), 0.5)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.student.parameters())
