"""Segmentation: the loss is its formula, and what is predicted lies where it was seen, on whatever grid."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dagman.downstream.labelled import LabelledBatch
from dagman.downstream.segmentation import Segmentation, predict_classes
from spade3d.volumes.geometry import canonical_flips
from spade3d.volumes.phantoms import ramp
from spade3d.volumes.volume import Grid

CPU = torch.device("cpu")


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
    for crop, i, j, k in np.ndindex(2, 2, 3, 2):
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


PREPARED = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, 5], [0, 0, 2.5, 40], [0, 0, 0, 1]])
SHAPE = (20, 12, 16)
PLACES = {"R": (0, 11.3), "A": (1, 20.5), "S": (2, 57.0)}  # axis, and the mm beyond which there is class 1

SOURCES = {
    "the prepared grid": Grid(SHAPE, PREPARED),
    "finer": Grid((60, 50, 52), np.array([[0.6, 0, 0, -9.7], [0, 0.65, 0, 5.2], [0, 0, 0.7, 40.1], [0, 0, 0, 1]])),
    "coarser and turned": Grid(  # axes P, S, L
        (7, 8, 9), np.array([[0, 0, -4.0, 27], [-4.5, 0, 0, 37], [0, 4.7, 0, 41], [0, 0, 0, 1]])
    ),
}


@pytest.mark.parametrize("grid", SOURCES)
@pytest.mark.parametrize("axis", PLACES)
def test_a_plane_is_found_where_it_is_on_every_grid(axis, grid):
    """Logits that are linear in mm are carried over exactly, so every voxel is right, not nearly all."""
    which, border_mm = PLACES[axis]
    source = SOURCES[grid]
    found = predict_classes(
        lambda x: torch.cat([border_mm - x, x - border_mm], dim=1),
        ramp(SHAPE, PREPARED, np.float32)[..., which],
        PREPARED,
        source,
        classes=2,
        window=(12, 8, 16),
        overlap=0.5,
        device=CPU,
    )
    turned = canonical_flips(source.affine, source.shape)
    place_mm = ramp(turned.canonical_shape, turned.affine(source.affine))[..., which]
    assert found.dtype == np.uint8 and found.shape == turned.canonical_shape
    np.testing.assert_array_equal(found, place_mm > border_mm)
    assert 0 < found.mean() < 1


def test_what_was_not_prepared_is_background():
    wider = Grid((30, 12, 16), PREPARED + [[0, 0, 0, -10], [0] * 4, [0] * 4, [0] * 4])  # 5 voxels more on each side
    found = predict_classes(
        lambda x: torch.cat([x * 0 - 1, x * 0 + 1], dim=1),
        np.zeros(SHAPE, np.float32),
        PREPARED,
        wider,
        classes=2,
        window=SHAPE,
        overlap=0.0,
        device=CPU,
    )
    assert not found[:5].any() and not found[-5:].any() and found[5:-5].all()
