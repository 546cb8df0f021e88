"""Swin-UNETR (Hatamizadeh et al. 2022): the encoder and a convolutional decoder, weights exchangeable with MONAI's.

The state dict has MONAI's keys and shapes, and the same numbers come out where MONAI accepts the input; here any size
is accepted. One deliberate difference: a window clipped by a small grid reads its own biases, unless
`monai_compatible` asks for MONAI's (see windows.relative_bias).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spade3d.networks.convolutions import Up, output_layer, residual_layer
from spade3d.networks.features import CELLS, Features
from spade3d.networks.swin import Merging, SwinTransformer
from spade3d.networks.windows import Cells


class SwinUNETR(nn.Module):
    """An encoder that tokens walk down, a decoder that they walk up, and a linear readout of every voxel.

    feature_size  channels at full resolution and of stage 0; stage s has feature_size * 2**s
    window        cells of a window, one number or one for each axis
    The other arguments are SwinTransformer's.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        feature_size: int = 24,
        depths: tuple[int, int, int, int] = (2, 2, 2, 2),
        heads: tuple[int, int, int, int] = (3, 6, 12, 24),
        window: int | Cells = 7,
        drop_path: float = 0.0,
        use_v2: bool = False,
        merging: Merging = "v1",
        monai_compatible: bool = False,
    ):
        super().__init__()
        window = (window,) * 3 if isinstance(window, int) else tuple(window)
        self.encoder_settings = {
            "in_channels": in_channels,
            "feature_size": feature_size,
            "depths": tuple(depths),
            "heads": tuple(heads),
            "window": window,
            "use_v2": use_v2,
            "merging": merging,
            "monai_compatible": monai_compatible,
        }
        self.swinViT = SwinTransformer(
            in_channels,
            feature_size,
            depths=tuple(depths),
            heads=tuple(heads),
            window=window,
            drop_path=drop_path,
            use_v2=use_v2,
            merging=merging,
            monai_compatible=monai_compatible,
        )
        f = feature_size
        self.encoder1 = residual_layer(in_channels, f)
        self.encoder2 = residual_layer(f, f)
        self.encoder3 = residual_layer(2 * f, 2 * f)
        self.encoder4 = residual_layer(4 * f, 4 * f)
        self.encoder10 = residual_layer(16 * f, 16 * f)
        self.decoder5 = Up(16 * f, 8 * f)
        self.decoder4 = Up(8 * f, 4 * f)
        self.decoder3 = Up(4 * f, 2 * f)
        self.decoder2 = Up(2 * f, f)
        self.decoder1 = Up(f, f)
        self.out = output_layer(f, out_channels)

    def forward(
        self,
        images: Float[Tensor, "b c i j k"],
        token_mask: Bool[Tensor, "b p q r"] | None = None,
        finest: int | None = 1,
        mask_token: Float[Tensor, " embed"] | None = None,
    ) -> Features:
        """Feature maps of a batch of crops of any size.

        token_mask  True where a token (a cell of 2^3 voxels) is hidden, from the encoder and from the decoder's skip
                    connection at full resolution (there its voxels are zero)
        finest      voxels of the finest decoded cell: 16, 8, 4, 2 or 1; None leaves out the decoder. From 2 to 1 is
                    most of the work
        mask_token  what a hidden token shows instead of zeros
        """
        if finest not in (*CELLS, None):
            raise ValueError(f"finest {finest}: decoded cells are {', '.join(map(str, CELLS))} voxels long, or None")
        stages = self.swinViT(images, token_mask, mask_token=mask_token)
        decoded = [] if finest is None else self._decode(images, token_mask, stages, finest)
        return Features(tuple(stages), tuple(decoded))

    def logits(self, features: Features) -> Float[Tensor, "b out i j k"]:
        """One number for each class and voxel."""
        return self.out(features.decoded[-1])

    @property
    def bottleneck_channels(self) -> int:
        """Channels of the last stage."""
        return 16 * self.encoder_settings["feature_size"]

    def decoded_channels(self, cell: int) -> int:
        """Channels of the decoded map whose cells are `cell` voxels long."""
        return self.encoder_settings["feature_size"] * max(1, cell // 2)

    def _decode(self, images: Tensor, token_mask: Tensor | None, stages: Sequence[Tensor], finest: int) -> list[Tensor]:
        s0, s1, s2, s3, s4 = stages
        decoded = [self.decoder5(self.encoder10(s4), s3)]
        for cell, up, skip, beside in (
            (8, self.decoder4, self.encoder4, s2),
            (4, self.decoder3, self.encoder3, s1),
            (2, self.decoder2, self.encoder2, s0),
        ):
            if cell >= finest:
                decoded.append(up(decoded[-1], skip(beside)))
        if finest == 1:
            decoded.append(self.decoder1(decoded[-1], self.encoder1(_shown(images, token_mask))))
        return decoded


def _shown(images: Float[Tensor, "b c i j k"], token_mask: Bool[Tensor, "b p q r"] | None) -> Tensor:
    """The images with zeros where tokens are hidden."""
    if token_mask is None:
        return images
    i, j, k = images.shape[2:]
    hidden = F.interpolate(token_mask[:, None].to(images.dtype), scale_factor=2) > 0
    return images.masked_fill(hidden[:, :, :i, :j, :k], 0)
