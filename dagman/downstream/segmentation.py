"""Segmentation: a network learns the labelled structures."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dagman.downstream.labelled import LabelledBatch
from dagman.downstream.regimes import Regime, keep_still, with_layer_decay
from spade3d.training.loop import Task

FULL = Regime()


class Segmentation(Task):
    """Dice + cross-entropy (MONAI's DiceCELoss; background included, Dice over the crops of a batch together).

    `regime` says how much of `network` learns; one that is not the default needs the encoder under `network.swinViT`.
    """

    def __init__(self, network: nn.Module, regime: Regime = FULL):
        from monai.losses import DiceCELoss

        super().__init__()
        self.network, self.regime = network, regime
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        if regime.frozen:
            keep_still(network.swinViT, still=True, training=False)

    def losses(self, batch: LabelledBatch, progress: float) -> dict[str, Tensor]:
        if self.regime.frozen or self.regime.encoder_warmup:
            keep_still(self.network.swinViT, self.regime.stands_still(progress), self.training)
        return {"dice_ce": self.loss(self.logits(batch.images).float(), batch.classes)}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        groups = super().parameter_groups(weight_decay)
        decay = self.regime.layer_decay
        return groups if decay == 1 else with_layer_decay(groups, self.network.swinViT, decay)

    def logits(self, images: Tensor) -> Tensor:
        return self.network.logits(self.network(images))
