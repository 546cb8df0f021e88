"""SimCLR, MoCo and BYOL: their losses against plain loops over views, who learns, who follows, what is remembered."""

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from spade3d.contrast.instance import METHODS, Instance, InstanceTerms, instances
from spade3d.contrast.objectives import info_nce, regression
from spade3d.contrast.teacher import Teacher
from spade3d.crops.pairs import PairStream, Sampling
from spade3d.faults import UsageFault
from spade3d.networks.features import Features
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training import schedules
from spade3d.training.health import effective_rank
from spade3d.volumes.preprocessing import Normalisation

CROPS, VIEWS = 6, 12  # of three scans, two crops each, each in two views


class TinyNetwork(nn.Module):
    """The least that has a last stage. The decoder is never asked for."""

    bottleneck_channels = 8

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(1, 8, 4, stride=4)

    def forward(self, images, finest):
        assert finest is None
        return Features((self.down(images).tanh(),))


@pytest.fixture(scope="module")
def batches(in_memory):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 100, (24, 22, 20)) for _ in range(5)]
    store = in_memory(images, normalisation=Normalisation(0.0, 1 / 50, 0.0, 2.0))
    sampling = Sampling(shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0), anchors=3, scans=1, grid=(4, 4, 4), places=5)
    return PairStream(store, range(5), dict.fromkeys(range(5), np.eye(4)), sampling)


def made(method, **terms):
    torch.manual_seed(0)
    terms = {"dim": 6, "temperature": 0.2, "memory": 30} | terms
    return Instance(TinyNetwork(), InstanceTerms(method, **terms)).train()


def learn(task, optimiser, batch, progress=0.0):
    losses = task.losses(batch, progress)
    optimiser.zero_grad()
    sum(losses.values()).backward()
    optimiser.step()
    task.after_step(progress)
    return sum(loss.item() for loss in losses.values())


def optimiser_of(task, lr=0.05):
    return torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=lr)


def stranger(task):
    """The student moved away from its teacher, so that a mistaken branch shows."""
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return task


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_nt_xent(query, positive, negatives, t):
    towards, against = math.exp(dot(query, positive) / t), sum(math.exp(dot(query, n) / t) for n in negatives)
    return -math.log(towards / (towards + against))


def slow_loss(method, queries, keys, queue, t):
    """The mean over views and crops, and over the positives of each; queries and keys are given as [view][crop]."""
    terms = []
    for v in range(2):
        for q in range(CROPS):
            positives, negatives = [], [*queue]
            for w in range(2):
                for k in range(CROPS):
                    if k // 2 != q // 2:
                        negatives.append(keys[w][k])
                    elif (w, k) != (v, q):
                        positives.append(keys[w][k])
            query = queries[v][q]
            for p in positives:
                terms.append(2 - 2 * dot(query, p) if method == "byol" else slow_nt_xent(query, p, negatives, t))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_the_paper(method, batches):
    task = made(method)
    task.losses(batches.batch(1), 0.0)
    task.after_step(0.0)  # MoCo has a queue now
    stranger(task)
    batch = batches.batch(0)
    with torch.no_grad():
        views = torch.cat([batch.student, batch.teacher])
        online = task.student(views)
        keys = online if method == "simclr" else task.teacher.copied(views)
        queries = task.predictor(online) if method == "byol" else online
    queue = task.memory.vectors.tolist() if method == "moco" else []
    assert len(queue) == (VIEWS if method == "moco" else 0)
    expected = slow_loss(
        method, queries.unflatten(0, (2, CROPS)).tolist(), keys.unflatten(0, (2, CROPS)).tolist(), queue, 0.2
    )
    losses = task.losses(batch, 0.0)
    assert list(losses) == [method] and losses[method].shape == ()
    assert losses[method].item() == pytest.approx(expected, rel=1e-5)


def test_two_pairs_are_two_instances():
    """Crops a, b, a, b under two transforms: rows 0, 1, 4, 5 are the first pair's views."""
    positive, negative = instances(4, torch.device("cpu"))
    assert positive[0].nonzero().flatten().tolist() == [1, 4, 5]
    assert positive[6].nonzero().flatten().tolist() == [2, 3, 7]
    assert negative[0].nonzero().flatten().tolist() == [2, 3, 6, 7]


def test_one_pair_alone_is_refused(batches, in_memory):
    alone = PairStream(
        batches.store, batches.cases, dict.fromkeys(range(5), np.eye(4)), replace(batches.sampling, anchors=1)
    )
    with pytest.raises(UsageFault, match=r"2 crops shows one place.*--crop\.anchors"):
        made("simclr").losses(alone.batch(0), 0.0)


def test_a_method_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'dino' is not known; one of: simclr, moco, byol"):
        InstanceTerms("dino")


@pytest.mark.parametrize("method", METHODS)
def test_a_task_holds_what_its_method_has(method):
    task = made(method)
    parts = {name.split(".")[0] for name in task.state_dict()}
    also = {"simclr": set(), "moco": {"teacher", "memory"}, "byol": {"teacher", "predictor"}}
    assert parts == {"student"} | also[method]


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_reaches_the_student_and_the_predictor_only(method, batches):
    task = made(method)
    sum(task.losses(batches.batch(0), 0.0).values()).backward()
    learning = {name: p for name, p in task.named_parameters() if not name.startswith("teacher")}
    assert all(p.grad.isfinite().all() for p in learning.values())
    # What is standardised next hears nothing of its own bias; every weight is moved.
    assert all(p.grad.abs().sum() > 1e-6 for name, p in learning.items() if not name.endswith("bias"))
    assert ("predictor.first.weight" in learning) == (method == "byol")
    trained = {id(p) for group in task.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for p in learning.values()}
    if task.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
        assert task.student.training and not any(module.training for module in task.teacher.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_student_descends_the_loss_itself(method, batches):
    """A small step along the gradient changes the loss by as much as the gradient says, while the teacher stands still:
    in SimCLR a view is learned from as a key, too."""
    task, batch, step = stranger(made(method)), batches.batch(0), 3e-3
    task.losses(batch, 0.0)[method].backward()
    trained = [p for p in task.parameters() if p.requires_grad]
    norm = torch.stack([p.grad.norm() for p in trained]).norm().item()
    after = []
    for way in (1, -2):  # from the middle up, from there down by twice as much
        for p in trained:
            p.data += way * step / norm * p.grad
        after.append(task.losses(batch, 0.0)[method].item())
    assert (after[0] - after[1]) / (2 * step) == pytest.approx(norm, rel=0.03)


@pytest.mark.parametrize("method", ["moco", "byol"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_teacher_begins_as_the_student_and_follows_along_a_cosine(method, progress):
    task = made(method)
    before = copy.deepcopy(task.student.state_dict())
    stranger(task).after_step(progress)
    m = 1 - (1 - 0.996) * (1 + math.cos(math.pi * progress)) / 2
    for name, ours in task.student.state_dict().items():
        assert not torch.equal(ours, before[name])
        torch.testing.assert_close(task.teacher.copied.state_dict()[name], m * before[name] + (1 - m) * ours)


def test_a_teacher_takes_over_running_statistics():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = Teacher(student).train()
    looked = teacher(torch.randn(5, 3))
    assert not looked.requires_grad and teacher.copied[1].num_batches_tracked == 0  # it looks in evaluation mode
    student(torch.randn(5, 3))
    teacher.follow(student, 0.0, start=0.9)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(teacher.copied[1], name), getattr(student[1], name))


def test_a_teacher_follows_every_tensor_as_it_would_one_by_one():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double(), nn.Linear(2, 2, bias=False))
    student.register_buffer("index", torch.arange(3))
    teacher = Teacher(student)
    with torch.no_grad():
        for tensor in student.parameters():
            tensor.add_(torch.randn_like(tensor))
        student[1].running_mean.add_(1.0)
        student.index.add_(1)
    slow = copy.deepcopy(teacher.copied)
    m = schedules.momentum(0.4, start=0.9)
    for its, ours in zip(slow.parameters(), student.parameters(), strict=True):
        its.copy_(torch.lerp(its, ours, 1 - m))
    for its, ours in zip(slow.buffers(), student.buffers(), strict=True):
        its.copy_(ours)
    teacher.follow(student, 0.4, start=0.9)
    for name, wanted in slow.state_dict().items():
        torch.testing.assert_close(teacher.copied.state_dict()[name], wanted)
    assert not any(tensor.requires_grad for tensor in teacher.parameters())


def test_a_teacher_follows_in_as_many_calls_however_many_tensors_there_are(torch_calls):
    def calls(layers):
        student = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(layers)))
        teacher = Teacher(student)
        with torch_calls() as watch:
            teacher.follow(student, 0.5, start=0.9)
        return len(watch.calls)

    assert 0 < calls(2) == calls(20)


def test_moco_remembers_its_keys_after_the_step(batches):
    task, batch = made("moco"), batches.batch(0)
    task.losses(batch, 0.0)
    assert len(task.memory) == 0
    keys = task.teacher(torch.cat([batch.student, batch.teacher]))
    task.after_step(0.0)
    torch.testing.assert_close(task.memory.vectors, keys)
    np.testing.assert_array_equal(task.memory.places.mm, np.tile(batch.boxes.mm, (2, 1)))
    for step in (1, 2):  # two batches, accumulated in one step
        task.losses(batches.batch(step), 0.0)
    assert len(task.memory) == VIEWS
    task.after_step(0.0)
    assert len(task.memory) == 30 and not task.unremembered


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_was_skipped_leaves_nothing(method, batches):
    task = made(method)
    before = copy.deepcopy(task.state_dict())
    task.losses(batches.batch(0), 0.0)
    task.after_skip()
    task.losses(batches.batch(1), 0.0)
    assert len(task.unremembered) == (method == "moco")  # of the last batch only
    task.after_skip()
    after = task.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if torch.is_tensor(value))


@pytest.mark.parametrize("method", METHODS)
def test_signs_of_life_get_each_view_beside_the_same_crop_s_other(method, batches):
    task, batch = made(method), batches.batch(0)
    task.losses(batch, 0.0)
    with torch.no_grad():
        shown = task.student(torch.cat([batch.student, batch.teacher]))
    torch.testing.assert_close(task.embedding, shown)
    torch.testing.assert_close(task.paired[:CROPS], shown[CROPS:])  # both branches begin as one
    torch.testing.assert_close(task.paired[CROPS:], shown[:CROPS])
    assert not task.embedding.requires_grad and not task.paired.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_a_few_batches_are_learned_without_collapse(method, batches):
    task = made(method, momentum=0.9)
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.005)
    few = [batches.batch(step) for step in range(3)]
    for _ in range(2):  # MoCo's queue is full after three
        first = [learn(task, optimiser, batch) for batch in few]
    for _ in range(25):
        last = [learn(task, optimiser, batch) for batch in few]
    assert sum(last) < 0.75 * sum(first)
    features = task.student.network(few[0].student, finest=None).stages[-1].mean(dim=(2, 3, 4)).detach()
    assert effective_rank(features - features.mean(dim=0)) > 2
    assert effective_rank(task.embedding) > 3


@pytest.mark.parametrize("method", METHODS)
def test_a_task_goes_on_from_its_state(method, batches):
    """Through a file: the losses after loading are the same to the last digit."""
    task = made(method)
    optimiser = optimiser_of(task)
    for step in range(3):
        learn(task, optimiser, batches.batch(step), progress=0.1)
    file = io.BytesIO()
    torch.save(task.state_dict(), file)
    file.seek(0)
    other = stranger(made(method))
    other.load_state_dict(torch.load(file, weights_only=True))
    others = optimiser_of(other)
    for step in range(3, 7):
        batch = batches.batch(step)
        assert learn(task, optimiser, batch, progress=0.2) == learn(other, others, batch, progress=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_the_objective_keeps_its_precision_under_autocast(method, batches):
    task = made(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = task.losses(batches.batch(0), 0.0)[method]
        predicted = task.predictor(task.embedding) if method == "byol" else task.embedding
    keys, (positive, negative) = task.paired.roll(CROPS, dims=0), instances(CROPS, torch.device("cpu"))
    if method == "byol":
        exact = regression(predicted, keys, positive)
    else:
        exact = info_nce(predicted, keys, positive, negative, 0.2)
    assert torch.equal(found, exact)


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_of_a_swin_unetr_learns(method, batches):
    torch.manual_seed(0)
    network = SwinUNETR(1, 1, feature_size=12, heads=(1, 1, 1, 1), window=2, depths=(1, 1, 1, 1))
    task = Instance(network, InstanceTerms(method, dim=8, memory=30)).train()
    sum(task.losses(batches.batch(0), 0.5).values()).backward()
    task.after_step(0.5)
    encoder = task.student.network.swinViT
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
