"""Losses of a distillation, against their formula in plain Python."""

import math

import pytest
import torch

from dagman.distillation.losses import Centre, distil, masked_reconstruction


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_softmax(logits):
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def slow_distil(student, teacher, centre, student_temperature, teacher_temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        target = slow_softmax([(x - c) / teacher_temperature for x, c in zip(t, centre.tolist())])
        said = slow_softmax([x / student_temperature for x in s])
        total -= sum(p * math.log(q) for p, q in zip(target, said))
    return total / len(student)


@pytest.mark.parametrize(("student_temperature", "teacher_temperature"), [(0.1, 0.04), (0.1, 0.07), (1.0, 2.0)])
@pytest.mark.parametrize("rows", [1, 6])
def test_distillation_equals_its_definition(rows, student_temperature, teacher_temperature):
    student, teacher, centre = normal(rows, 9, seed=1), normal(rows, 9, seed=2), normal(9, seed=3) / 3
    loss = distil(student, teacher, centre, student_temperature, teacher_temperature)
    expected = slow_distil(student, teacher, centre, student_temperature, teacher_temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_worked_out_by_hand():
    """The teacher says 1 : 1 and, once its centre is gone, 3 : 1; the student says 1 : 3."""
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    even = distil(student, teacher, torch.zeros(2), 1.0, 1.0).item()
    assert even == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    centred = distil(student, teacher, torch.tensor([-math.log(3), 0.0]), 1.0, 1.0).item()
    assert centred == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))


def test_the_student_learns_towards_the_teacher_which_takes_no_gradient():
    student, teacher = normal(5, 7, seed=1).requires_grad_(), normal(5, 7, seed=2).requires_grad_()
    centre = normal(7, seed=3).requires_grad_()
    distil(student, teacher, centre, 0.5, 0.2).backward()
    assert teacher.grad is None and centre.grad is None
    expected = (student / 0.5).softmax(dim=-1) - ((teacher - centre) / 0.2).softmax(dim=-1)
    torch.testing.assert_close(student.grad, expected.detach() / 0.5 / 5)


def test_extreme_logits_give_a_finite_loss_and_gradient():
    student = (1000 * normal(5, 7, seed=1)).requires_grad_()
    loss = distil(student, 1000 * normal(5, 7, seed=2), torch.zeros(7), 0.1, 0.04)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_distillation_is_in_float32_under_autocast_and_from_half_precision():
    student, teacher, centre = normal(5, 7, seed=1).bfloat16(), normal(5, 7, seed=2).bfloat16(), torch.zeros(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distil(student, teacher, centre, 0.1, 0.04)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_distil(student, teacher, centre, 0.1, 0.04), rel=1e-5)


def slow_masked_reconstruction(restored, target, hidden):
    away = [
        abs(restored[b, c, i, j, k].item() - target[b, c, i, j, k].item())
        for b, i, j, k in hidden.nonzero().tolist()
        for c in range(restored.shape[1])
    ]
    return sum(away) / len(away)


@pytest.mark.parametrize("channels", [1, 2])
def test_reconstruction_equals_its_definition(channels):
    """The samples hide unequal numbers of voxels, and every hidden voxel counts the same."""
    restored, target = normal(2, channels, 3, 4, 2, seed=1), normal(2, channels, 3, 4, 2, seed=2)
    hidden = normal(2, 3, 4, 2, seed=3) > torch.tensor([-1.0, 1.0])[:, None, None, None]
    expected = slow_masked_reconstruction(restored, target, hidden)
    assert masked_reconstruction(restored, target, hidden).item() == pytest.approx(expected, rel=1e-5)


def test_only_hidden_voxels_are_learned_from():
    restored = normal(2, 1, 3, 3, 3, seed=1).requires_grad_()
    hidden = normal(2, 3, 3, 3, seed=2) > 0
    masked_reconstruction(restored, torch.zeros(2, 1, 3, 3, 3), hidden).backward()
    expected = restored.detach().sign() * hidden[:, None] / hidden.sum()
    torch.testing.assert_close(restored.grad, expected)


def test_reconstruction_is_in_float32_from_half_precision():
    restored, target = normal(1, 1, 8, 8, 8).bfloat16(), normal(1, 1, 8, 8, 8, seed=1).bfloat16()
    hidden = torch.ones(1, 8, 8, 8, dtype=torch.bool)
    loss = masked_reconstruction(restored, target, hidden)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((restored.double() - target.double()).abs().mean().item(), rel=1e-5)


def test_a_centre_is_the_moving_average_of_batch_means():
    centre, value = Centre(5), [0.0] * 5
    for step in range(4):
        logits = normal(3 + step, 5, seed=step).requires_grad_()
        centre.update(logits)
        value = [0.9 * old + 0.1 * sum(column) / len(column) for old, column in zip(value, logits.T.tolist())]
    torch.testing.assert_close(centre.value, torch.tensor(value))
    assert not centre.value.requires_grad


def test_a_centre_takes_its_momentum_and_is_saved():
    centre, other = Centre(5), Centre(5)
    logits = normal(4, 5)
    centre.update(logits.bfloat16(), momentum=0.0)
    torch.testing.assert_close(centre.value, logits.bfloat16().float().mean(dim=0))
    assert centre.value.dtype == torch.float32 and not list(centre.parameters())
    other.load_state_dict(centre.state_dict())
    assert torch.equal(other.value, centre.value)


def test_updating_the_centre_before_the_backward_pass_changes_no_gradient():
    centre, gradients = Centre(5), []
    for early in (True, False):
        student, teacher = normal(4, 5, seed=1).requires_grad_(), normal(4, 5, seed=2)
        loss = distil(student, teacher, centre.value, 0.1, 0.04)
        if early:
            before = centre.value.clone()
            centre.update(teacher)
        loss.backward()
        gradients.append(student.grad)
        centre.value.copy_(before)
    assert torch.equal(*gradients)
