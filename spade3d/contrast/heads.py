"""The head of a contrast: features are standardised by running statistics, projected, and put on the unit sphere.

An untrained network gives nearly the same features for every crop, so that all cosines are close to 1 and negatives
repel what positives attract: in short runs on small batches the contrast then never begins (docs/log.md, 2026-11-20).
Others standardise by the statistics of a large batch (batch normalisation in the heads of MoCo v2, BYOL, SimSiam); a
batch of a few 3D crops has none, so these are gathered over the last steps, and no gradient runs through them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.networks.features import ProjectionHead

FLOOR = 1e-6  # of a variance: a feature that never changes stays at zero


class Head(nn.Module):
    """features (n, inputs) -> unit vectors (n, outputs). It changes in `follow` only, not by being used."""

    def __init__(self, inputs: int, hidden: int, outputs: int, momentum: float = 0.95):
        super().__init__()
        self.momentum = momentum
        self.project = ProjectionHead(inputs, hidden, outputs)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("square", torch.ones(inputs))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(self, features: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        """float32 on the unit sphere, whatever the precision of the network."""
        variance = (self.square - self.mean.square()).clamp(min=FLOOR)
        return F.normalize(self.project((features.float() - self.mean) * variance.rsqrt()).float(), dim=-1)

    @torch.no_grad()
    def follow(self, features: Float[Tensor, "n inputs"]) -> None:
        """Take these features into the running mean and mean square: a plain average at first, then exponential."""
        if not len(features):
            return
        self.updates += 1
        share = torch.clamp(1 / self.updates, min=1 - self.momentum)
        self.mean.lerp_(features.float().mean(dim=0), share)
        self.square.lerp_(features.float().square().mean(dim=0), share)
