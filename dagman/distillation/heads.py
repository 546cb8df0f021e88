"""The head of a distillation: from features to the logits of prototypes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.contrast.heads import directions, standardised


class PrototypeHead(nn.Module):
    """features (n, inputs) -> logits (n, prototypes): cosines to unit prototypes, always float32.

    A three-layer MLP (GELU, `hidden` wide) into a bottleneck on the unit sphere, and a last layer without bias whose
    rows are normalised at every use: DINO's weight normalisation with its gain fixed to one. DAGMaN gives no sizes;
    these are those of SMIT's code.

    standardise  over the rows of each call, before the MLP and before the unit sphere: takes out what all features have
                 in common. No paper's: an untrained Swin gives nearly the same features for every crop, centring takes
                 the rest, and the targets of a short run stay uniform (docs/log.md, 2026-11-21). Rows are never
                 compared with those of another batch, so the batch may say what is common. (DINO's heads may have batch
                 normalisation, too.)
    """

    def __init__(
        self,
        inputs: int,
        *,
        prototypes: int = 8192,
        hidden: int = 2048,
        bottleneck: int = 256,
        standardise: bool = False,
    ):
        super().__init__()
        self.standardise = standardise
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
        vectors = self.vectors(features)
        prototypes = self.prototypes.detach() if still else self.prototypes
        with torch.autocast(features.device.type, enabled=False):  # in bf16 a cosine over 0.04 would be off by 0.1
            return F.linear(vectors, F.normalize(prototypes.float(), dim=-1))

    def vectors(self, features: Float[Tensor, "n inputs"]) -> Float[Tensor, "n bottleneck"]:
        """What is compared with the prototypes: unit vectors, float32."""
        if self.standardise:
            return directions(self.mlp(standardised(features.float())).float())
        reduced = self.mlp(features).float()
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(reduced, dim=-1)
