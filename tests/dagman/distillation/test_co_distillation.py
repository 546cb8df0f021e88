"""The DAGMaN task: what the student is shown, what it learns from, and that its teacher only follows."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dagman.distillation.co_distillation import Dagman, DistillationTerms, picked, teacher_temperature
from dagman.distillation.head_looks import LooksAtHeads
from dagman.distillation.masking import expand, hidden_count
from spade3d.crops.crop import Views
from spade3d.crops.pairs import PairStream, Sampling
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training.schedules import momentum
from spade3d.volumes.preprocessing import Normalisation

PLAIN = Views((False,) * 3, 0.0, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.0)
SMALL = {"semantic_heads": 2, "head_width": 16, "bottleneck": 8, "prototypes": 12, "stage": 2, "standardise": False}
TERMS = DistillationTerms(**SMALL)
RULES = ("attention", "attmask", "low", "block", "random")


@pytest.fixture(scope="module")
def batches(in_memory):
    rng = np.random.default_rng(0)
    place = np.indices((40, 36, 38)).sum(axis=0) * 10
    images = [place + rng.integers(0, 300, place.shape) for _ in range(3)]
    store = in_memory(images, normalisation=Normalisation(0.0, 1 / 1400, 0.0, 1.0))
    sampling = Sampling((24, 20, 24), (1.0, 1.0, 1.0), anchors=2, scans=1, places=1, views=PLAIN, one_geometry=True)
    return PairStream(store, range(3), dict.fromkeys(range(3), np.eye(4)), sampling)


def made(terms=TERMS, seed=0, **how):
    torch.manual_seed(seed)
    network = SwinUNETR(feature_size=12, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), window=2)
    return Dagman(network.swinViT, 12, terms, **how).train()


def learn(task, optimiser, batch, progress=0.5, follow=True):
    losses = task.losses(batch, progress)
    optimiser.zero_grad()
    sum(losses.values()).backward()
    optimiser.step()
    if follow:
        task.after_step(progress)
    return {name: loss.item() for name, loss in losses.items()}


def test_four_losses_by_name_and_by_weight(batches):
    task, batch = made(), batches.batch(0)
    torch.manual_seed(1)
    losses = task.losses(batch, 0.5)
    assert list(losses) == ["AMIP", "AMPD", "AITD", "GITD"]
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values())
    weights = {"voxel_weight": 2.0, "token_weight": 0.0, "image_weight": 0.2, "global_weight": 0.3}
    task.distillation.terms = replace(TERMS, **weights)
    torch.manual_seed(1)
    again = task.losses(batch, 0.5)
    assert list(again) == ["AMIP", "AITD", "GITD"]
    for name, times in (("AMIP", 2.0), ("AITD", 2.0), ("GITD", 3.0)):
        torch.testing.assert_close(again[name], times * losses[name])


def test_losses_equal_their_definition_crop_by_crop(batches):
    """Section 3.3, in loops: u masked by the student, noisy u for the tokens, noisy v for image and pool."""
    task, batch = made(), batches.batch(1)
    for centre in task.distillation.centres.values():
        centre.value.copy_(torch.linspace(-0.1, 0.1, 12))
    torch.manual_seed(5)
    noise = task.distillation.noise(batch.teacher)
    torch.manual_seed(5)
    found = task.losses(batch, 0.01)
    tau = teacher_temperature(0.01, TERMS)

    def cross_entropy(student, teacher, centre):
        target = ((teacher - centre) / tau).softmax(-1)
        return -(target * (student / 0.1).log_softmax(-1)).sum(-1)

    student, teacher = task.student, task.teacher.copied
    sums = {"AMIP": [], "AMPD": [], "AITD": [], "GITD": []}
    with torch.no_grad():
        for u in range(4):
            v = u ^ 1
            one = slice(u, u + 1)
            clean = teacher.encoder(batch.teacher[one])
            looked = teacher.looks.semantic(clean[2]).mean.flatten()
            order = sorted(range(len(looked)), key=lambda cell: (-looked[cell].item(), cell))
            cells = order[int(0.1 * len(looked)) : int(0.7 * len(looked))]
            hidden = torch.zeros(len(looked), dtype=torch.bool)
            hidden[cells] = True
            hidden = hidden.view(1, *clean[2].shape[2:])
            ours = student.encoder(batch.student[one], expand(hidden, tuple(clean[0].shape[2:])))
            its_u, its_v = (teacher.encoder(batch.teacher[n : n + 1], noise[n : n + 1]) for n in (u, v))
            restored = task.distillation.voxel_head(ours[4], (24, 20, 24))
            away = (restored - batch.clean[one]).abs()[0, 0]
            sums["AMIP"] += away[expand(hidden, (24, 20, 24))[0]].tolist()
            centres = task.distillation.centres
            for cell in cells:
                s, t = (
                    looks.token_head(stages[2].flatten(2)[0, :, cell][None])
                    for looks, stages in ((student.looks, ours), (teacher.looks, its_u))
                )
                sums["AMPD"].append(0.1 * cross_entropy(s, t, centres["tokens"].value).item())
            s, t = (
                looks.image_head(looks.semantic(stages[2]).summary)
                for looks, stages in ((student.looks, ours), (teacher.looks, its_v))
            )
            sums["AITD"].append(0.1 * cross_entropy(s, t, centres["image"].value).item())
            s, t = (
                looks.global_head(stages[4].mean((2, 3, 4)))
                for looks, stages in ((student.looks, ours), (teacher.looks, its_v))
            )
            sums["GITD"].append(0.1 * cross_entropy(s, t, centres["whole"].value).item())
    for name, values in sums.items():
        assert found[name].item() == pytest.approx(np.mean(values), rel=2e-4), name


@pytest.mark.parametrize("rule", RULES)
def test_the_student_is_not_shown_what_is_hidden(batches, rule):
    """Whatever stands in the hidden voxels of its images, every loss stays the same: they are in the target alone."""
    task, batch = made(replace(TERMS, masking=rule, hint=0.05)), batches.batch(0)
    torch.manual_seed(3)
    task.distillation.noise(batch.teacher)
    with torch.no_grad():
        attended = task.look(batch, task.teacher(batch.teacher), True) if task.terms.attends else None
        masked = task.distillation.masked(attended, (3, 3, 3), 4, batch.student.device)
    assert (masked.hidden.flatten(1).sum(1) == hidden_count(27, 0.7, 0.05)).all()
    torch.testing.assert_close(masked.hidden.flatten(1).gather(1, masked.cells), torch.ones_like(masked.cells) > 0)
    torch.manual_seed(3)
    losses = task.losses(batch, 0.5)
    scribbled = batch.student.masked_fill(expand(masked.hidden, (24, 20, 24))[:, None], 7.0)
    torch.manual_seed(3)
    again = task.losses(replace(batch, student=scribbled), 0.5)
    for name, loss in losses.items():
        torch.testing.assert_close(again[name], loss, msg=name)
    shown = torch.where(expand(masked.hidden, (24, 20, 24))[:, None], batch.student, 7.0)
    torch.manual_seed(3)
    other = task.losses(replace(batch, student=shown), 0.5)
    same = [name for name, loss in other.items() if torch.equal(loss, losses[name])]
    assert same == ["AMPD"]  # no window of this small network reaches from a hidden cell to a shown one


def test_the_mask_follows_the_teachers_look_at_the_whole_crop(batches):
    task, batch = made(), batches.batch(0)
    its = task.teacher(batch.teacher, task.distillation.noise(batch.teacher))
    clean = task.look(batch, its, False).mean
    torch.testing.assert_close(clean, task.teacher.copied.looks.attend(task.teacher(batch.teacher)).mean)
    task.terms = replace(TERMS, attention_from="noisy")
    torch.testing.assert_close(task.look(batch, its, False).mean, task.teacher.copied.looks.attend(its).mean)
    assert not torch.equal(clean, task.look(batch, its, False).mean)


def test_patch_dropout_is_drawn_anew_for_each_view_and_each_step(batches):
    task, images = made(), batches.batch(0).teacher
    one, other = task.distillation.noise(images), task.distillation.noise(images)
    assert (one.flatten(1).sum(1) == 1008).all() and one.shape == (4, 12, 10, 12)
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])
    cells = made(replace(TERMS, dropped="cell")).distillation.noise(images)
    assert (cells[:, 0:4, 0:4, 0:4].flatten(1).float().mean(1).unique().tolist()) in ([0.0], [1.0], [0.0, 1.0])
    assert made(replace(TERMS, patch_dropout=0.0)).distillation.noise(images) is None


def test_the_teacher_only_follows(batches):
    task = made()
    optimiser = torch.optim.SGD(task.student.parameters(), lr=0.1)
    before = copy.deepcopy(task.teacher.state_dict())
    losses = task.losses(batches.batch(0), 0.25)
    sum(losses.values()).backward()
    assert not task.teacher.training and all(not module.training for module in task.teacher.modules())
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    optimiser.step()
    task.after_step(0.25)
    kept = momentum(0.25, start=TERMS.momentum)
    assert TERMS.momentum < kept < 1 and momentum(1.0, start=TERMS.momentum) == 1
    for (name, its), ours in zip(task.teacher.copied.named_parameters(), task.student.parameters(), strict=True):
        torch.testing.assert_close(its, kept * before[f"copied.{name}"] + (1 - kept) * ours.detach(), msg=name)


def test_the_teacher_begins_as_the_student():
    task = made()
    for ours, its in zip(task.student.parameters(), task.teacher.copied.parameters(), strict=True):
        assert torch.equal(ours, its)


def test_centres_follow_the_teacher_once_a_step_is_made(batches):
    task, batch = made(), batches.batch(0)
    torch.manual_seed(1)
    task.losses(batch, 0.5)
    assert all(not centre.value.any() for centre in task.distillation.centres.values())
    ((total, rows),) = task.distillation.uncentred["image"]
    said = total / rows
    task.after_skip()
    assert not task.distillation.uncentred
    task.after_step(0.5)
    assert all(not centre.value.any() for centre in task.distillation.centres.values())  # what was skipped is gone
    torch.manual_seed(1)
    task.losses(batch, 0.5)
    task.after_step(0.5)
    torch.testing.assert_close(task.distillation.centres["image"].value, 0.1 * said)


def test_centres_follow_all_batches_of_a_step(batches):
    """Accumulation: the mean over both batches, not the last one."""
    task = made()
    torch.manual_seed(1)
    task.losses(batches.batch(0), 0.5)
    task.losses(batches.batch(1), 0.5)
    (one, n), (other, m) = task.distillation.uncentred["whole"]
    assert not torch.equal(one, other)
    task.after_step(0.5)
    torch.testing.assert_close(task.distillation.centres["whole"].value, 0.1 * (one + other) / (n + m))


def test_a_clean_teacher_looks_once(batches):
    task = made(replace(TERMS, patch_dropout=0.0))
    looks = []
    task.teacher.copied.encoder.register_forward_pre_hook(lambda _, given: looks.append(given[1]))
    task.losses(batches.batch(0), 0.5)
    assert looks == [None]


def test_the_last_layers_of_the_heads_learn_after_the_first_epoch(batches):
    task = made()
    sum(task.losses(batches.batch(0), 0.0).values()).backward()
    heads = (task.student.looks.token_head, task.student.looks.image_head, task.student.looks.global_head)
    assert all(head.prototypes.grad is None and head.mlp[0].weight.grad.any() for head in heads)
    sum(task.losses(batches.batch(0), 0.01).values()).backward()
    assert all(head.prototypes.grad.any() for head in heads)


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        (replace(TERMS, masking="random", semantic=False, patch_dropout=0.0), ["AMIP", "AMPD", "AITD", "GITD"]),
        (replace(TERMS, masking="attention", semantic=False), ["AMIP", "AMPD", "AITD", "GITD"]),
        (replace(TERMS, masking="none", voxel_weight=0.0, token_weight=0.0), ["AITD", "GITD"]),
        (replace(TERMS, mask_token=True), ["AMIP", "AMPD", "AITD", "GITD"]),
        (replace(TERMS, symmetric=False), ["AMIP", "AMPD", "AITD", "GITD"]),
        (replace(TERMS, stage=1), ["AMIP", "AMPD", "AITD", "GITD"]),
        (replace(TERMS, drop_hidden=True, token_weight=0.0), ["AMIP", "AITD", "GITD"]),
    ],
)
def test_every_arm_learns_a_fixed_batch(batches, terms, names):
    task = made(terms)
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(8):
        torch.manual_seed(0)
        history.append(learn(task, optimiser, batches.batch(0), follow=False))
    assert list(history[0]) == names
    assert sum(history[-1].values()) < 0.97 * sum(history[0].values())


def test_without_symmetry_every_second_crop_is_only_looked_at_by_the_teacher(batches):
    task = made(replace(TERMS, symmetric=False))
    u, v = task.distillation.pairs(4, torch.device("cpu"))
    assert u.tolist() == [0, 2] and v.tolist() == [1, 3]
    u, v = made().distillation.pairs(4, torch.device("cpu"))
    assert u.tolist() == [0, 1, 2, 3] and v.tolist() == [1, 0, 3, 2]


def test_a_learnt_token_takes_the_place_of_zeros(batches):
    task, batch = made(replace(TERMS, mask_token=True)), batches.batch(0)
    torch.manual_seed(2)
    zeros = task.losses(batch, 0.5)
    plain = made()
    plain.load_state_dict({k: v for k, v in task.state_dict().items() if k != "distillation.mask_token"})
    torch.manual_seed(2)
    for name, loss in plain.losses(batch, 0.5).items():
        torch.testing.assert_close(loss, zeros[name])  # it begins at zero
    sum(zeros.values()).backward()
    assert task.distillation.mask_token.grad.any()


def test_a_task_goes_on_from_its_state(batches):
    """Teacher, centres and when heads are looked at: after loading the losses are the same to the last digit."""
    task = made(diversity=LooksAtHeads(4, (1.0, 1.0, 1.0)))
    optimiser = torch.optim.SGD(task.student.parameters(), lr=0.01)
    for step in range(3):
        learn(task, optimiser, batches.batch(step), progress=(step + 1) / 6)
    other = made(seed=9, diversity=LooksAtHeads(4, (1.0, 1.0, 1.0)))
    other.load_state_dict(copy.deepcopy(task.state_dict()))
    others = torch.optim.SGD(other.student.parameters(), lr=0.01)
    chance = torch.get_rng_state()
    said = []
    for one, its in ((task, optimiser), (other, others)):
        torch.set_rng_state(chance)
        said.append([(learn(one, its, batches.batch(s), (s + 1) / 6), dict(one.notes)) for s in range(3, 6)])
    assert said[0] == said[1]


def test_heads_are_looked_at_as_often_as_asked_and_at_the_end(batches):
    task = made(diversity=LooksAtHeads(4, (1.0, 1.0, 2.0)))
    looked = []
    for step in range(1, 11):
        task.losses(batches.batch(step), step / 10)
        if "stage3.entropy" in task.notes:
            looked.append(step)
    assert looked == [3, 5, 8, 10]


def test_picked_tokens_are_those_of_the_cells():
    tokens = torch.arange(2 * 3 * 8.0).view(2, 3, 2, 2, 2)
    rows = picked(tokens, torch.tensor([[7, 0], [3, 3]]))
    torch.testing.assert_close(
        rows, torch.stack([tokens[0, :, 1, 1, 1], tokens[0, :, 0, 0, 0], *[tokens[1, :, 0, 1, 1]] * 2])
    )


def test_the_teachers_temperature_warms_up():
    assert teacher_temperature(0.0, TERMS) == pytest.approx(0.04)
    assert teacher_temperature(15 / 800, TERMS) == pytest.approx(0.055)
    assert teacher_temperature(0.5, TERMS) == pytest.approx(0.07)


def test_without_semantic_attention_resemblance_to_the_mean_stands_in(batches):
    task = made(replace(TERMS, semantic=False))
    stages = task.teacher(batches.batch(0).teacher)
    attended = task.student.looks.attend(stages)
    tokens = stages[2]
    alike = F.cosine_similarity(tokens, tokens.mean(dim=(2, 3, 4), keepdim=True), dim=1).flatten(1)
    assert torch.equal(attended.mean.flatten(1).argsort(dim=1), alike.argsort(dim=1))
