"""Heads: unit vectors without the common part, measured once or in every batch."""

import pytest
import torch
import torch.nn.functional as F

from spade3d.contrast.heads import BatchHead, CalibratedHead, directions, standardised
from spade3d.training import ranks

COMMON = 50 * torch.ones(6)  # what all features share


def features(n: int, seed: int = 0):
    return COMMON + torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[CalibratedHead, BatchHead])
def head(request):
    torch.manual_seed(0)
    made = request.param(6, 16, 4)
    if request.param is CalibratedHead:
        made.calibrate(features(400))
    return made


def test_the_common_part_is_gone(head):
    vectors = head(features(200, seed=1))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(200))
    assert vectors.mean(dim=0).norm() < 0.2 and (vectors @ vectors.T).mean() < 0.05


def test_without_calibration_every_vector_is_the_same():
    torch.manual_seed(0)
    vectors = CalibratedHead(6, 16, 4)(features(200))
    assert (vectors @ vectors.T).min() > 0.9


def test_a_calibrated_vector_depends_on_its_crop_alone():
    torch.manual_seed(0)
    calibrated, of_batch = CalibratedHead(6, 16, 4), BatchHead(6, 16, 4)
    calibrated.calibrate(features(100))
    one, company = features(2, seed=3), features(6, seed=4) - 20
    for made, alone in ((calibrated, True), (of_batch, False)):
        assert torch.allclose(made(one), made(torch.cat([one, company]))[:2], atol=1e-5) == alone


def test_calibration_is_kept_with_the_weights_and_takes_no_gradient():
    torch.manual_seed(0)
    head, other = CalibratedHead(6, 16, 4), CalibratedHead(6, 16, 4)
    head.calibrate(features(100))
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(features(5)), other(features(5)))
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"first", "last"}


def test_a_channel_that_never_changes_is_not_blown_up():
    torch.manual_seed(0)
    head, flat = CalibratedHead(6, 16, 4), features(50)
    flat[:, 0] = 7.0
    head.calibrate(flat)
    assert head(flat).isfinite().all()
    moved = flat.clone()
    moved[:, 0] += 0.01  # a hundredth of the others' spread is one of its own
    assert (head.projected(moved) - head.projected(flat)).abs().max() < 3


def test_a_head_that_saw_one_row_many_times_still_reads_others():
    torch.manual_seed(0)
    head, same = CalibratedHead(6, 16, 4), features(1).expand(16, 6)
    head.calibrate(same)
    for rows in (features(8, seed=1), same):
        read = rows.clone().requires_grad_()
        vectors = head(read)
        (gradient,) = torch.autograd.grad((vectors * torch.randn(4)).sum(), [read])
        assert vectors.isfinite().all() and gradient.isfinite().all()


def test_rows_that_are_all_the_same_have_no_direction_to_learn_from():
    """What rounding leaves of them gives the layer before them no gradient that would drown all others: rows of 1e-8,
    as the small weights of a fresh head make them of tokens of which nothing can be seen."""
    torch.manual_seed(0)
    bias, wanted = (1e-8 * torch.randn(8)).requires_grad_(), torch.randn(64, 8)
    (ours,) = torch.autograd.grad((directions(bias.expand(64, 8)) * wanted).mean(), [bias])
    bare = F.normalize(standardised(bias.expand(64, 8)), dim=-1)
    (blown_up,) = torch.autograd.grad((bare * wanted).mean(), [bias])
    assert ours.norm() < 1 < 1000 < blown_up.norm()
    others = directions(torch.randn(64, 8))
    torch.testing.assert_close(others.norm(dim=1), torch.ones(64))


def test_the_rows_of_several_ranks_are_standardised_as_those_of_one(monkeypatch, torch_calls):
    """And how many there are is said without a number that is sent to the device."""
    rows = torch.randn(6, 4)
    alone = standardised(rows)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "summed", lambda values: 2 * values)  # the other rank has the same rows
    with torch_calls() as watch:
        together = standardised(rows)
    torch.testing.assert_close(together, alone)
    assert watch.calls and not any(
        asked is torch.ops.aten.lift_fresh.default for asked, _ in watch.calls
    )  # from numbers of Python
