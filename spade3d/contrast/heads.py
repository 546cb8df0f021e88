"""The head of a contrast: a projection that is standardised over the batch, onto the unit sphere.

An untrained network gives nearly the same features for every crop. All cosines are then close to 1, negatives repel
what positives attract, and a small batch of 3D crops only drives the common part about (docs/log.md, 2026-11-20). So
the head standardises over the crops of a batch, in both branches, with gradient: the batch normalisation that the
heads of MoCo v3 and BYOL have. No running statistics are kept: what a head gives depends on its batch alone.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """features (n, inputs) -> unit vectors (n, outputs), float32 whatever the precision of the network."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.scale, self.shift = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        self.last = nn.Linear(hidden, outputs)

    def forward(self, features: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        hidden = F.gelu(standardised(self.first(features).float()) * self.scale + self.shift)
        return F.normalize(standardised(self.last(hidden).float()), dim=-1)


def standardised(x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Each column to mean 0 and variance 1 over the rows; one row alone has nothing to differ from and stays."""
    return x if len(x) < 2 else F.batch_norm(x, None, None, training=True)
