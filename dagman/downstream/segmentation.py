"""Segmentation: a Swin-UNETR learns the labelled structures, and predicts them on the grid of the scan it was given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dagman.downstream.inference import sliding_window
from dagman.downstream.labelled import LabelledBatch
from spade3d.training.loop import Task
from spade3d.volumes.geometry import canonical_flips, resample
from spade3d.volumes.volume import Grid


class Segmentation(Task):
    """Dice + cross-entropy (MONAI's DiceCELoss; background included, Dice over the crops of a batch together)."""

    def __init__(self, network: nn.Module):
        from monai.losses import DiceCELoss

        super().__init__()
        self.network = network
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)

    def losses(self, batch: LabelledBatch, progress: float) -> dict[str, Tensor]:
        return {"dice_ce": self.loss(self.logits(batch.images).float(), batch.classes)}

    def logits(self, images: Tensor) -> Tensor:
        return self.network.logits(self.network(images))


def predict_classes(
    logits: Callable[[Tensor], Tensor],
    intensities: np.ndarray,
    affine: np.ndarray,
    source: Grid,
    *,
    classes: int,
    window: tuple[int, int, int],
    overlap: float,
    device: torch.device,
) -> np.ndarray:
    """Classes (uint8) of a prepared scan on its source's grid, canonical axes.

    The logits are blended on the prepared grid, carried to the source's grid one class at a time by linear
    interpolation, and the highest wins: smoother borders than resampled labels, and two maps in memory, not `classes`.
    """
    blended = sliding_window(logits, intensities, window, overlap, classes=classes, device=device)
    to_canonical = canonical_flips(source.affine, source.shape)
    shape, there = to_canonical.canonical_shape, to_canonical.affine(source.affine)
    if shape == intensities.shape and np.allclose(there, affine, atol=1e-4):
        return blended.argmax(0).numpy().astype(np.uint8)
    best, winner = np.full(shape, -np.inf, dtype=np.float32), np.zeros(shape, dtype=np.uint8)
    for c in range(classes):
        beyond = -np.inf if c else 0.0  # outside the prepared scan there is background
        score = resample(blended[c].numpy(), affine, there, shape, 1, beyond)
        better = score > best
        best[better], winner[better] = score[better], c
    return winner
