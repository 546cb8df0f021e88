"""Learning from studies: a lump somewhere is found from labels of whole studies, and from shuffled labels it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dagman.downstream.studies import StudyBatch
from dagman.downstream.study_heads import AttentionPooling, LinearProbe, mean_token
from dagman.downstream.study_task import StudyTask, labels_alone, moments, prepare_head
from dagman.downstream.token_grids import encode
from dagman.downstream.whitening import Whitening
from spade3d.networks.swin_unetr import SwinUNETR

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return SwinUNETR(1, 1, feature_size=12, heads=(1, 2, 4, 8), depths=(1, 1, 1, 1), window=4).swinViT.eval()


@pytest.fixture(scope="module")
def studies(encoder):
    """72 noisy scans, every second with a lump of 6 voxels somewhere: tokens (72, c, 4, 4, 4), labels, places."""
    rng = np.random.default_rng(0)
    images = rng.normal(0.3, 0.05, (72, 1, 32, 32, 32)).astype(np.float32)
    where = rng.integers(1, 25, (72, 3))
    for n, (i, j, k) in enumerate(where):
        if n % 2:
            images[n, 0, i : i + 6, j : j + 6, k : k + 6] += 0.6
    with torch.no_grad():
        tokens = torch.cat([encode(encoder, torch.from_numpy(some)) for some in np.split(images, 9)])
    return tokens, torch.tensor([[n % 2] for n in range(72)]).float(), where


def batch_of(tokens, labels) -> StudyBatch:
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0.1, 0.9, 4)] * 3, indexing="ij"))
    valid = torch.ones(len(tokens), 4, 4, 4, dtype=torch.bool)
    names = tuple(f"s{n}" for n in range(len(tokens)))
    return StudyBatch(tokens, None, grid.expand(len(tokens), -1, -1, -1, -1), valid, labels, None, None, names)


def learnt(tokens, labels, steps: int = 60) -> StudyTask:
    torch.manual_seed(0)
    task = StudyTask(AttentionPooling(tokens.shape[1], 1, dim=32), labels_alone)
    batch = batch_of(tokens, labels)
    prepare_head(task.head, moments(task, [batch], CPU), labels)
    optimiser = torch.optim.AdamW(task.parameter_groups(0.05), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(task.losses(batch, 0.5).values()).backward()
        optimiser.step()
    return task


@torch.no_grad()
def judged(task: StudyTask, tokens, labels) -> tuple[float, torch.Tensor]:
    batch = batch_of(tokens, labels)
    output = task.head(batch.tokens, batch.places, batch.valid)
    return roc_auc_score(labels[:, 0], output.logits[:, 0]), output.maps[:, 0]


def test_a_planted_lump_is_learned_and_shown_and_not_from_shuffled_labels(studies):
    tokens, labels, where = studies
    task = learnt(tokens[:40], labels[:40])
    score, maps = judged(task, tokens[40:], labels[40:])
    assert score > 0.95
    pointed = []
    for n in range(41, 72, 2):
        peak = np.unravel_index(int(maps[n - 40].argmax()), (4, 4, 4))
        pointed.append(np.abs((np.array(peak) + 0.5) * 8 - (where[n] + 3)).max() <= 8)  # in its cell or the next
    assert np.mean(pointed) > 0.8
    order = torch.from_numpy(np.random.default_rng(1).permutation(40))
    shuffled, _ = judged(learnt(tokens[:40], labels[:40][order]), tokens[40:], labels[40:])
    assert abs(shuffled - 0.5) < 0.3 and shuffled < score - 0.2


def bag(labels, crops: int = 3, seed: int = 0) -> StudyBatch:
    images = torch.rand(2, crops, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
    valid, places = torch.ones(2, 2 * crops, 2, 2, dtype=torch.bool), torch.rand(2, 3, 2 * crops, 2, 2)
    return StudyBatch(None, images, places, valid, labels, None, None, ("a", "b"))


def test_all_crops_of_a_study_answer_together(encoder):
    """One logit for a bag: it is that of all its cells at once, and the loss is not a mean of losses of crops."""
    torch.manual_seed(0)
    task = StudyTask(AttentionPooling(144, 1, places=False), labels_alone, encoder)
    batch = bag(torch.tensor([[1.0], [0.0]]))
    tokens = task.tokens(batch)
    assert tokens.shape == (2, 144, 6, 2, 2)
    for n in range(2):
        for crop in range(3):
            torch.testing.assert_close(tokens[n, :, 2 * crop : 2 * crop + 2], encode(encoder, batch.images[n])[crop])
    logits = task.head(tokens, batch.places, batch.valid).logits
    torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
    expected = (torch.nn.functional.softplus(-logits[0]) + torch.nn.functional.softplus(logits[1])) / 2
    torch.testing.assert_close(task.losses(batch, 0.0)["classification"], expected[0])


def test_a_frozen_encoder_stays_and_a_tuned_one_learns_at_its_own_rate(encoder):
    batch = bag(torch.tensor([[1.0], [0.0]]))
    frozen = StudyTask(AttentionPooling(144, 1), labels_alone, encoder)
    sum(frozen.losses(batch, 0.0).values()).backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not {id(p) for group in frozen.parameter_groups(0.1) for p in group["params"]} & set(
        map(id, encoder.parameters())
    )
    tuned = StudyTask(AttentionPooling(144, 1), labels_alone, encoder, tuned=True, encoder_lr=0.1)
    sum(tuned.losses(batch, 0.0).values()).backward()
    reached = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    beyond = {name for name, _ in encoder.named_parameters() if "layers4.0.downsample" in name}
    assert reached == {name for name, _ in encoder.named_parameters()} - beyond  # what no cell is made of
    groups = tuned.parameter_groups(0.1)
    of_encoder = set(map(id, encoder.parameters()))
    assert {g["lr_scale"] for g in groups if of_encoder & set(map(id, g["params"]))} == {0.1}
    assert sum(len(g["params"]) for g in groups) == len(list(tuned.parameters()))
    encoder.zero_grad()


def test_labels_that_are_not_said_teach_nothing():
    torch.manual_seed(0)
    tokens, nan = torch.randn(2, 5, 4, 4, 4), float("nan")
    task = StudyTask(AttentionPooling(5, 2), labels_alone)
    said = task.losses(batch_of(tokens, torch.tensor([[1.0, nan], [nan, nan]])), 0.0)["classification"]
    logit = task.head(tokens, batch_of(tokens, torch.zeros(2, 2)).places, torch.ones(2, 4, 4, 4).bool()).logits[0, 0]
    torch.testing.assert_close(said, torch.nn.functional.softplus(-logit))
    nothing = task.losses(batch_of(tokens, torch.full((2, 2), nan)), 0.0)["classification"]
    assert nothing == 0 and nothing.requires_grad


def test_moments_are_those_of_all_valid_cells_and_of_the_means():
    torch.manual_seed(0)
    batches = [batch_of(torch.randn(n, 5, 4, 4, 4) * 3 + 1, torch.zeros(n, 2)) for n in (3, 2)]
    batches[0].valid[0, 2:] = False
    allowed = torch.zeros(2, 2, 4, 4, 4)
    allowed[:, 0, 1:3] = allowed[:, 1, 2:] = 1
    batches[1] = replace(batches[1], allowed=allowed)  # the first may have its findings anywhere
    found = moments(StudyTask(AttentionPooling(5, 1), labels_alone), batches, CPU)
    counted = [batches[0].valid, batches[1].valid & (allowed.sum(1) > 0)]
    cells = torch.cat([batch.tokens.movedim(1, -1)[of] for batch, of in zip(batches, counted, strict=True)])
    means = torch.cat([mean_token(batch.tokens, batch.valid) for batch in batches])
    for moment, rows in zip(found, (cells, means), strict=True):
        torch.testing.assert_close(moment.mean, rows.mean(0))
        torch.testing.assert_close(moment.covariance, torch.cov(rows.T, correction=0))
    probe, pooling = LinearProbe(5, 2), AttentionPooling(5, 2)
    for head, moment in ((probe, found[1]), (pooling, found[0])):
        prepare_head(head, found, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        torch.testing.assert_close(head.whitening.mean, moment.mean)


@torch.no_grad()
def test_means_that_hardly_differ_are_brought_to_the_size_of_cells():
    """As far as is safe: a study that differs more than those that taught does not make the probe explode."""
    tokens = torch.randn(30, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 10
    batch = batch_of(tokens, torch.ones(30, 1))
    probe = LinearProbe(5, 1)
    prepare_head(probe, moments(StudyTask(probe, labels_alone), [batch], CPU), batch.labels)
    spread = probe.whitening(mean_token(tokens, batch.valid)).std()
    assert 0.8 < spread < 1.3  # means of 64 cells spread an eighth as far as cells


def test_one_study_does_not_make_a_probe_explode():
    tokens = torch.randn(1, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = moments(StudyTask(LinearProbe(5, 1), labels_alone), [batch_of(tokens, torch.ones(1, 1))], CPU)
    head = LinearProbe(5, 1)
    prepare_head(head, found, torch.ones(1, 1))
    cells = Whitening(5)
    cells.fit(found[0])
    torch.testing.assert_close(head.whitening.root, 10 * cells.root)
