"""Segmentation: a network learns the labelled structures."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dagman.downstream.labelled import LabelledBatch
from dagman.downstream.regimes import Regime, keep_still, with_layer_decay
from spade3d.training import ranks
from spade3d.training.loop import Task

FULL = Regime()
SMOOTH = 1e-5  # for a class that neither has


class Segmentation(Task):
    """Dice + cross-entropy of the crops of a batch, on however many processes.

    `regime` says how much of `network` learns; one that is not the default needs the encoder under `network.swinViT`.
    """

    def __init__(self, network: nn.Module, regime: Regime = FULL):
        super().__init__()
        self.network, self.regime = network, regime
        if regime.frozen:
            keep_still(network.swinViT, still=True, training=False)

    def losses(self, batch: LabelledBatch, progress: float) -> dict[str, Tensor]:
        if self.regime.frozen or self.regime.encoder_warmup:
            keep_still(self.network.swinViT, self.regime.stands_still(progress), self.training)
        return {"dice_ce": dice_ce(self.logits(batch.images).float(), batch.classes)}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        groups = super().parameter_groups(weight_decay)
        decay = self.regime.layer_decay
        return groups if decay == 1 else with_layer_decay(groups, self.network.swinViT, decay)

    def logits(self, images: Tensor) -> Tensor:
        return self.network.logits(self.network(images))


def dice_ce(logits: Float[Tensor, "n c i j k"], classes: Int[Tensor, "n 1 i j k"]) -> Float[Tensor, ""]:
    """Cross-entropy, mean over voxels, plus 1 - Dice, mean over classes, the background among them; each Dice is that
    of all crops of a batch together:

        Dice_c = (2 sum p_c t_c + e) / (sum p_c + sum t_c + e)        p: softmax of the logits, t: 1 in the class

    MONAI's DiceCELoss(to_onehot_y, softmax, batch), with sums over the crops of all processes that share a batch, which
    that one cannot have."""
    shares, truth = logits.softmax(dim=1), one_hot(classes[:, 0], logits.shape[1]).movedim(-1, 1)
    over = (0, 2, 3, 4)
    both, either = ranks.summed(torch.stack([(shares * truth).sum(over), (shares + truth).sum(over)]))
    dice = (2 * both + SMOOTH) / (either + SMOOTH)
    return cross_entropy(logits, classes[:, 0]) + 1 - dice.mean()
