"""Heads of a distillation: from features to the logits of prototypes, and from cells back to voxels."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.faults import UsageFault


class PrototypeHead(nn.Module):
    """features (n, inputs) -> logits (n, prototypes): cosines to unit prototypes, always float32.

    A three-layer MLP (GELU, `hidden` wide) into a bottleneck on the unit sphere, and a last layer without bias whose
    rows are normalised at every use: DINO's weight normalisation with its gain fixed to one. DAGMaN gives no sizes;
    these are those of SMIT's code.
    """

    def __init__(self, inputs: int, *, prototypes: int = 8192, hidden: int = 2048, bottleneck: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Float[Tensor, "n inputs"], still: bool = False) -> Float[Tensor, "n prototypes"]:
        """`still`: the prototypes take no gradient from this call (DINO's first epoch); what is before them does."""
        vectors = self.mlp(features)
        prototypes = self.prototypes.detach() if still else self.prototypes
        with torch.autocast(features.device.type, enabled=False):  # in bf16 a cosine over 0.04 would be off by 0.1
            return F.linear(F.normalize(vectors.float(), dim=-1), F.normalize(prototypes.float(), dim=-1))


class VoxelHead(nn.Module):
    """Cells of a Swin stage -> the voxels of each: one linear layer for every cell, shuffled into place.

    inputs   channels of the stage
    stage    0 (patch embedding) to 4; its cells are 2**(stage + 1) voxels along each axis
    channels of the image
    """

    def __init__(self, inputs: int, *, stage: int = 4, channels: int = 1):
        super().__init__()
        self.cell, self.channels = 2 ** (stage + 1), channels
        self.linear = nn.Linear(inputs, channels * self.cell**3)

    def forward(
        self, cells: Float[Tensor, "b inputs p q r"], size: tuple[int, int, int]
    ) -> Float[Tensor, "b channels i j k"]:
        """The crop of `size` voxels; cells over its far end are cut off. UsageFault for the cells of another stage."""
        grid = tuple(cells.shape[2:])
        if grid != (needed := tuple(-(-side // self.cell) for side in size)):
            raise UsageFault(
                f"cells {grid} of {self.cell} voxels do not make a crop of {size}, which needs {needed}; "
                "give the stage that the head was made for, and the size of its crop"
            )
        voxels = self.linear(rearrange(cells, "b c p q r -> b p q r c"))
        s = self.cell
        voxels = rearrange(voxels, "b p q r (c x y z) -> b c (p x) (q y) (r z)", x=s, y=s, z=s)
        i, j, k = size
        return voxels[:, :, :i, :j, :k]
