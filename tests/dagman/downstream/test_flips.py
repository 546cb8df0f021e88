"""Test-time flips: nothing changes for a network that is right on mirror images too, and left stays left."""

from itertools import product

import pytest
import torch

from dagman.downstream.flips import exchange_of, mean_over_flips
from dagman.downstream.labelled import Classes
from spade3d.faults import UsageFault

KIDNEYS = Classes(("liver", "kidney_left", "kidney_right"), (6, 3, 2))
LIVER, KIDNEY = 2.0, 1.0
UNTAUGHT, TAUGHT = (False, False, False), (True, False, False)


def patient() -> torch.Tensor:
    """A picture (1, 1, i, j, k), i to the right: two kidneys as like as eggs, and a liver above the right one."""
    crop = torch.zeros(1, 1, 8, 5, 6)
    crop[0, 0, 1, 2, 1:3] = crop[0, 0, 6, 2, 1:3] = KIDNEY
    crop[0, 0, 5:7, 1:4, 4:6] = LIVER
    return crop


def answers(crops, on_the_left):
    """Logits of background, liver, left and right kidney: one `on_the_left` (b, 1, i, 1, 1) is a left one."""
    kidney, liver = crops == KIDNEY, crops == LIVER
    return torch.cat([crops == 0, liver, kidney & on_the_left, kidney & ~on_the_left], dim=1).float()


def by_side(crops):
    """Goes by the side of the picture: it never saw another."""
    return answers(crops, (torch.arange(8) < 4)[None, None, :, None, None])


def by_liver(crops):
    """Goes by the liver, wherever that is: it learned from mirrored crops whose labels kept their names."""
    lower, upper = ((crops == LIVER)[:, :, half].sum(dim=(1, 2, 3, 4)) for half in (slice(4), slice(4, 8)))
    left_is_lower = (lower < upper)[:, None, None, None, None]
    return answers(crops, left_is_lower == (torch.arange(8) < 4)[None, None, :, None, None])


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize(("network", "taught"), [(by_side, UNTAUGHT), (by_liver, TAUGHT)])
def test_a_network_that_knows_left_from_right_keeps_them_apart(network, taught, axes):
    mean = mean_over_flips(network, axes, exchange_of(KIDNEYS, taught, axes))
    torch.testing.assert_close(mean(patient()), network(patient()), rtol=0, atol=0)


@pytest.mark.parametrize(("network", "taught"), [(by_side, TAUGHT), (by_liver, UNTAUGHT)])
def test_the_other_rule_would_mix_left_and_right(network, taught):
    """So the rule has to follow how the network was taught."""
    mean = mean_over_flips(network, (0,), exchange_of(KIDNEYS, taught, (0,)))(patient())
    left, right = mean[0, 2, 1, 2, 1], mean[0, 3, 1, 2, 1]  # of the left kidney
    assert left == right == 0.5


def test_the_mean_is_over_every_set_of_flips_of_the_chosen_axes():
    """A network that answers 1 at the first voxel of the crop: flipped back, each set has its own corner."""
    crops = torch.zeros(1, 1, 2, 2, 2)

    def first(crops):
        answer = torch.zeros_like(crops)
        answer[:, :, 0, 0, 0] = 1
        return answer

    for axes in [(0, 1, 2), (1, 2), (2,)]:
        expected = torch.zeros(2, 2, 2)
        for corner in product(*[(0, 1) if axis in axes else (0,) for axis in range(3)]):
            expected[corner] = 1 / 2 ** len(axes)
        torch.testing.assert_close(mean_over_flips(first, axes, None)(crops)[0, 0], expected)


def test_answers_that_a_network_keeps_are_not_written_over():
    held = torch.randn(1, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    before = held.clone()
    mean = mean_over_flips(lambda crops: held, (0, 1, 2), None)
    torch.testing.assert_close(mean(torch.zeros(1, 1, 3, 3, 3)), mean(torch.zeros(1, 1, 3, 3, 3)))
    assert torch.equal(held, before)


def test_chambers_of_the_heart_and_single_organs_stay():
    heart = Classes(("left ventricle", "right ventricle", "aorta"), (500, 600, 820))
    assert exchange_of(heart, UNTAUGHT, (0, 1, 2)) is None
    assert exchange_of(KIDNEYS, UNTAUGHT, (0,)) == (0, 1, 3, 2)
    assert exchange_of(KIDNEYS, UNTAUGHT, (1, 2)) is None


def test_a_side_without_its_other_side_is_refused():
    one = Classes(("liver", "left kidney"), (6, 3))
    with pytest.raises(UsageFault, match=r"no class is the other side of left kidney.*--flips as"):
        exchange_of(one, UNTAUGHT, (0, 1))
    assert exchange_of(one, UNTAUGHT, (1, 2)) is None
