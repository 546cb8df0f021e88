"""Segmentation: the loss is its formula."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from dagman.downstream.labelled import LabelledBatch
from dagman.downstream.segmentation import Segmentation


class Given(nn.Module):
    """A network that answers with the logits it was given."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, images: Tensor) -> Tensor:
        return self.answer

    def logits(self, features: Tensor) -> Tensor:
        return features


def test_the_loss_is_dice_and_cross_entropy():
    chance = torch.Generator().manual_seed(0)
    network = Given(torch.randn(2, 3, 2, 3, 2, generator=chance))
    classes = torch.randint(0, 2, (2, 1, 2, 3, 2), generator=chance)  # nobody has class 2
    batch = LabelledBatch(torch.zeros(2, 1, 2, 3, 2), classes, ("a", "b"))
    loss = Segmentation(network).losses(batch, 0.5)
    assert list(loss) == ["dice_ce"]

    shared, either, surprise = [0.0] * 3, [0.0] * 3, []
    for crop, i, j, k in itertools.product(*map(range, (2, 2, 3, 2))):
        powers = [math.exp(network.answer[crop, c, i, j, k].item()) for c in range(3)]
        here = int(classes[crop, 0, i, j, k])
        surprise.append(-math.log(powers[here] / sum(powers)))
        for c in range(3):
            shared[c] += powers[c] / sum(powers) * (c == here)
            either[c] += powers[c] / sum(powers) + (c == here)
    dice = [1 - (2 * a + 1e-5) / (b + 1e-5) for a, b in zip(shared, either)]
    assert loss["dice_ce"].item() == pytest.approx(sum(dice) / 3 + sum(surprise) / len(surprise), abs=1e-5)
    loss["dice_ce"].backward()
    assert network.answer.grad.isfinite().all() and network.answer.grad.abs().sum() > 0


def test_the_right_answer_costs_next_to_nothing():
    classes = torch.randint(0, 3, (2, 1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    sure = 50.0 * nn.functional.one_hot(classes[:, 0], 3).movedim(-1, 1).float()
    loss = Segmentation(Given(sure)).losses(LabelledBatch(torch.zeros(2, 1, 4, 4, 4), classes, ("a", "b")), 0.0)
    assert loss["dice_ce"].item() < 1e-5
