"""A linear decoder: every stage of a frozen encoder says its classes, and all are summed. What it finds, was known."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dagman.downstream.whitening import Whitening, moments_of
from spade3d.networks.features import Features
from spade3d.networks.swin import SwinTransformer
from spade3d.networks.swin_unetr import SwinUNETR

STAGES = 5  # the patch embedding and the four stages


class LinearDecoder(nn.Module):
    """A linear layer on each cell of each stage (layer-normed, as the U-shaped decoder gets it, and whitened),
    upsampled and summed: the logits of a voxel are a linear function of the features over it.

    It answers as a SwinUNETR does (`network(images)`, then `network.logits`), with the encoder under `swinViT`.
    """

    def __init__(self, encoder: SwinTransformer, feature_size: int, classes: int):
        super().__init__()
        self.swinViT = encoder
        # One bias is enough for a sum.
        self.readouts = nn.ModuleList(
            nn.Linear(feature_size * 2**stage, classes, bias=stage == 0) for stage in range(STAGES)
        )
        self.whitening = nn.ModuleList(Whitening(feature_size * 2**stage) for stage in range(STAGES))

    @torch.no_grad()
    def whiten(self, crops: Iterable[Float[Tensor, "b c i j k"]]) -> None:
        """By what the encoder says of some crops, each stage by itself; once, before training."""
        seen = (tuple(rearrange(x, "b c i j k -> (b i j k) c") for x in self.swinViT(images)) for images in crops)
        for whitening, found in zip(self.whitening, moments_of(seen), strict=True):
            whitening.fit(found)

    def forward(self, images: Float[Tensor, "b c i j k"]) -> Features:
        """The stages, and the logits of every voxel as the only decoded map."""
        stages = self.swinViT(images)
        said = None
        for stage, whitening, readout in reversed([*zip(stages, self.whitening, self.readouts, strict=True)]):
            here = rearrange(whitening(rearrange(stage, "b c i j k -> b i j k c"), readout), "b i j k c -> b c i j k")
            said = here if said is None else here + doubled(said, stage.shape[2:])
        return Features(tuple(stages), (doubled(said, images.shape[2:]),))

    def logits(self, features: Features) -> Float[Tensor, "b classes i j k"]:
        """One number for each class and voxel."""
        return features.decoded[-1]


def with_linear_decoder(network: SwinUNETR, classes: int) -> LinearDecoder:
    """The encoder of a Swin-UNETR under a fresh linear decoder, drawn from torch's generator."""
    return LinearDecoder(network.swinViT, network.encoder_settings["feature_size"], classes)


def doubled(x: Float[Tensor, "b c _ _ _"], shape: tuple[int, ...]) -> Float[Tensor, "b c _ _ _"]:
    """Twice as many cells along each axis, linear between their centres, cut at the far end to `shape`: a stage of odd
    size was padded there.

    It is F.interpolate(scale_factor=2, mode="trilinear"), whose gradient CUDA adds up in no fixed order.
    """
    for axis in (2, 3, 4):
        cells = x.shape[axis]
        before = torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, cells - 1)), axis)
        after = torch.cat((x.narrow(axis, 1, cells - 1), x.narrow(axis, cells - 1, 1)), axis)
        fine = torch.stack((x.lerp(before, 0.25), x.lerp(after, 0.25)), axis + 1).flatten(axis, axis + 1)
        x = fine.narrow(axis, 0, shape[axis - 2])
    return x
