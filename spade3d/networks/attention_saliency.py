"""Where a trained encoder looks, as saliency. It is not gaze: nobody said that what a network attends to matters.

Stage 3 of the encoder (cells of 8 voxels) is asked block by block, a block being exactly one attention window of it, so
that every cell may look at every other. The map is the attention that a cell receives from all cells, mean over heads
and blocks of the stage, as far as it lies above the average of its block: attention sums to one in every block, so maps
tell what stands out within some centimetres, not which part of the body does.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spade3d.networks.sliding import over_scan
from spade3d.networks.swin import SwinTransformer

STAGE = 3
CELL = 8  # voxels along a cell that looks at others in stage 3
PEAK = 99.5  # percentile of what is above the average that becomes 1: single cells may get many times as much


def block_of(encoder: SwinTransformer) -> tuple[int, int, int]:
    """Voxels of a block: one attention window of stage 3."""
    i, j, k = (CELL * side for side in encoder.get_submodule(f"layers{STAGE}.0.blocks.0.attn").window)
    return i, j, k


def attention_map(encoder: SwinTransformer, intensities: np.ndarray, fill: float, device: torch.device) -> np.ndarray:
    """Saliency float32 0..1 of a prepared scan (i, j, k); `fill`: the intensity of what lies outside it."""
    encoder.to(device).eval()
    return peaked(
        over_scan(lambda crops: above_average(encoder, crops), intensities, block_of(encoder), device, fill=fill)
    )


def peaked(above: Float[np.ndarray, "i j k"]) -> Float[np.ndarray, "i j k"]:
    """Attention above the average as saliency 0 to 1."""
    positive = above[above > 0]
    return np.clip(above / np.percentile(positive, PEAK), 0, 1) if positive.size else np.zeros_like(above)


def above_average(encoder: SwinTransformer, crops: Float[Tensor, "b 1 i j k"]) -> Float[Tensor, "b 1 i j k"]:
    """Attention received by each place over the mean of its crop, less one, and not below zero."""
    received = [one.received().mean(dim=1, keepdim=True) for one in encoder.attention_maps(crops, STAGE)]
    mean = torch.stack(received).mean(dim=0)
    relative = (mean / mean.mean(dim=(2, 3, 4), keepdim=True) - 1).clamp_min(0)
    return F.interpolate(relative, size=crops.shape[2:], mode="trilinear", align_corners=False)
