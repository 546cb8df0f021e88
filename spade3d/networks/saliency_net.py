"""Where would a reader look? A 3-D U-Net, image -> saliency, for scans without gaze.

FocusContrast's predictor f (papers/span_focuscontrast_clarity.md, 2.3): a U-Net of four blocks down and four up, Adam,
30 epochs, the last weights. The paper is silent on the loss, the learning rate and the resolution. Ours: binary cross
entropy on the soft map, and crops blended over the scan.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.crops.saliency_crops import SaliencyBatch
from spade3d.model_file import ModelFile
from spade3d.networks.sliding import over_scan
from spade3d.training.loop import Task
from spade3d.volumes.preprocessing import Preprocessing

SALIENCY = ModelFile("spade3d-saliency-1", "saliency.safetensors", "saliency model", "spade-saliency train")
STRIDE = 16  # voxels of a cell at the bottom: four halvings
RARE = -4.0  # the first logit: about what 2 % of salient voxels ask for, else hundreds of steps go into learning that


class SaliencyNet(nn.Module):
    """MONAI's BasicUNet with one channel in and one out: a logit for each voxel. `width`: channels at the top."""

    def __init__(self, width: int = 16):
        from monai.networks.nets import BasicUNet

        super().__init__()
        self.width = width
        features = (width, width, 2 * width, 4 * width, 8 * width, width)
        with contextlib.redirect_stdout(sys.stderr):  # some releases of MONAI greet on standard output
            self.unet = BasicUNet(3, 1, 1, features)
        nn.init.constant_(self.unet.final_conv.bias, RARE)

    def forward(self, images: Float[Tensor, "b 1 i j k"]) -> Float[Tensor, "b 1 i j k"]:
        return self.unet(images)


class SaliencyPrediction(Task):
    """bce = mean over voxels of  - s log p - (1 - s) log(1 - p),  p = sigmoid(logit), s the saliency 0..1."""

    def __init__(self, network: SaliencyNet):
        super().__init__()
        self.network = network

    def losses(self, batch: SaliencyBatch, progress: float) -> dict[str, Tensor]:
        logits = self.network(batch.images).float()
        return {"bce": F.binary_cross_entropy_with_logits(logits, batch.saliency)}


@dataclass(frozen=True, eq=False)
class SaliencyModel:
    """A trained predictor with what it was trained for."""

    network: SaliencyNet
    preprocessing: Preprocessing
    block: tuple[int, int, int]  # voxels of the prepared scan
    taught_by: tuple[str, ...]  # the sources of the saliency that it learned

    def saliency(self, intensities: np.ndarray, fill: float, device: torch.device) -> np.ndarray:
        """Saliency float32 0..1 of a prepared scan (i, j, k), its largest value 1 and its smallest 0, as gaze maps are;
        zeros where the prediction is constant. `fill`: the intensity of what lies outside the scan."""
        self.network.to(device).eval()
        found = over_scan(lambda crops: self.network(crops).sigmoid(), intensities, self.block, device, fill=fill)
        low, high = float(found.min()), float(found.max())
        return (found - low) / (high - low) if high > low else np.zeros_like(found)

    def save(self, path: Path, more: Mapping[str, Any]) -> None:
        """safetensors with everything else as metadata, `more` too; whole or not at all."""
        said = {
            "width": self.network.width,
            "preprocessing": self.preprocessing.to_dict(),
            "block": self.block,
            "taught_by": self.taught_by,
            **more,
        }
        SALIENCY.write(path, self.network, said)


def load_saliency_model(path: Path) -> SaliencyModel:
    """Read what `save` wrote: saliency.safetensors itself, or the folder of a run that holds it."""
    weights, said = SALIENCY.read(path)
    network = SaliencyNet(said["width"])
    SALIENCY.fill(network, weights, path)
    i, j, k = said["block"]
    return SaliencyModel(network, Preprocessing.from_dict(said["preprocessing"]), (i, j, k), tuple(said["taught_by"]))
