"""Where a network looks, as maps of a crop that people can see: [CLS] attention, or what windowed attention gives.

* With a semantic attention: the row of its [CLS] over the cells of the stage that it reads.
* Without one (encoders of other recipes, fine-tuned networks): a windowed Swin has no [CLS]. Shown is the attention
  that each cell receives from the cells of its window, in the last block of a stage.

Attention sums to one in every crop, however much there is to see. Every map is therefore given over its mean in the
crop: 1 is the average of the crop, 3 is three times that, and maps of overlapping crops can be blended. They tell what
stands out within a crop, not which part of the body does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dagman.attention.semantic import SemanticAttention
from spade3d.faults import UsageFault
from spade3d.networks.swin import SwinTransformer

STAGE = 3  # that is shown where there is no [CLS] and nobody asked for another
SHOWN_HEADS = 8  # in a report


@dataclass(frozen=True, eq=False)
class Looker:
    """An encoder, and which of its attention is shown.

    stage     of `semantic`: that it reads; without one: whose last block is shown (1 to 4)
    semantic  None for encoders that have no [CLS]
    """

    encoder: SwinTransformer
    stage: int
    semantic: SemanticAttention | None = None

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3, 4):
            raise UsageFault(f"attention of stage {self.stage}: an encoder has stages 1 to 4; name one of them")

    @property
    def cell(self) -> tuple[int, int, int]:
        """Voxels of a cell along i, j, k: [CLS] reads what a stage gives, blocks see what enters it."""
        i, j, k = (side * 2 ** (self.stage - (self.semantic is None)) for side in self.encoder.patch_embed.patch)
        return i, j, k

    @property
    def heads(self) -> int:
        if self.semantic is not None:
            return self.semantic.blocks[-1].heads
        return self._last_block.attn.relative_position_bias_table.shape[1]

    @property
    def window(self) -> tuple[int, int, int]:
        """Voxels of an attention window of the stage's blocks."""
        window = self._last_block.attn.window
        i, j, k = (2 ** (self.stage - 1) * patch * side for patch, side in zip(self.encoder.patch_embed.patch, window))
        return i, j, k

    @property
    def said(self) -> str:
        """What is shown, in words."""
        cell = " x ".join(map(str, self.cell))
        if self.semantic is not None:
            return f"[CLS] attention over the tokens of stage {self.stage} (cells of {cell} voxels)"
        return f"attention that cells receive in the last block of stage {self.stage} (cells of {cell} voxels)"

    @property
    def networks(self) -> list[torch.nn.Module]:
        """All that looks."""
        return [self.encoder] if self.semantic is None else [self.encoder, self.semantic]

    def to(self, device: torch.device) -> Looker:
        """The same networks, moved there, in evaluation mode."""
        for network in self.networks:
            network.to(device).eval()
        return self

    @torch.no_grad()
    def by_head(self, images: Float[Tensor, "b 1 i j k"]) -> Float[Tensor, "b head p q r"]:
        """The attention of each head over the cells of some crops."""
        if self.semantic is not None:
            return self.semantic(self.encoder(images)[self.stage]).by_head
        return self.encoder.attention_maps(images, self.stage)[-1].received()

    @property
    def _last_block(self) -> torch.nn.Module:
        return self.encoder.get_submodule(f"layers{self.stage}.0.blocks")[-1]


def relative_maps(looker: Looker, images: Float[Tensor, "b 1 i j k"]) -> Float[Tensor, "b channel i j k"]:
    """The mean over heads, then each head, each over its mean in the crop; a map has the size of the crop.

    Linear between the centres of cells, and constant beyond the outermost.
    """
    by_head = looker.by_head(images).float()
    maps = torch.cat([by_head.mean(dim=1, keepdim=True), by_head], dim=1)
    mean = maps.mean(dim=(2, 3, 4), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return enlarged(maps / mean, looker.cell, tuple(images.shape[2:]))


def enlarged(
    maps: Float[Tensor, "b c p q r"], cell: tuple[int, int, int], shape: tuple[int, int, int]
) -> Float[Tensor, "b c i j k"]:
    """Maps of cells at every voxel of a crop; where cells reach beyond the crop's far end they are cut off there."""
    i, j, k = shape
    whole = [cells * side for cells, side in zip(maps.shape[2:], cell, strict=True)]
    return F.interpolate(maps, size=whole, mode="trilinear", align_corners=False)[:, :, :i, :j, :k]


def attention_pictures(
    looker: Looker, image: Float[Tensor, "1 1 i j k"], most_heads: int = SHOWN_HEADS
) -> dict[str, np.ndarray]:
    """A crop and where the network looks in it, (i, j, k) by name, as the report of a run shows them: the mean over
    heads, then the first `most_heads` heads. The networks stay on their device and in their mode."""
    with in_evaluation(looker):
        maps = relative_maps(looker, image.to(next(looker.encoder.parameters()).device))[0].cpu().numpy()
    what = "[CLS] attention" if looker.semantic is not None else f"attention of stage {looker.stage}"
    mean, *heads = maps
    shown = {f"{what}, head {number}": head for number, head in enumerate(heads[:most_heads], start=1)}
    return {"what was looked at": image[0, 0].cpu().numpy(), f"{what}, mean of {len(heads)} heads": mean, **shown}


@contextmanager
def in_evaluation(looker: Looker) -> Iterator[None]:
    """While it lasts the networks are in evaluation mode."""
    before = [network.training for network in looker.networks]
    for network in looker.networks:
        network.eval()
    try:
        yield
    finally:
        for network, training in zip(looker.networks, before, strict=True):
            network.train(training)
