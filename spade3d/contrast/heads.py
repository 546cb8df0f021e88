"""Heads of a contrast: projections onto the unit sphere that take out what all features have in common.

An untrained network gives nearly the same features for every crop. All cosines are then close to 1, negatives repel
what positives attract, and a small batch of 3D crops only drives the common part about (docs/log.md, 2026-11-20). The
common part must go; the two heads differ in when it is measured.

* `CalibratedHead` measures it once, before training, on crops of the data itself: a vector depends on its crop alone,
  so that vectors of different batches (a memory!) compare.
* `BatchHead` measures it in every batch, with gradient: the batch normalisation of the heads of SimCLR, BYOL and MoCo
  v3. In a batch of few places a vector then says where its crop lies among these.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.training import ranks

EPSILON = 1e-5  # of a variance, as `batch_norm` has it
SAME = 1e-3  # length of a standardised row below which it is the mean; others have about sqrt(dim)
FLAT = 0.01  # of the typical spread; a channel that hardly changed while it was measured is not blown up by more
LEAST_SPREAD = 1e-5  # where none changed: a divisor near 0 would leave other rows, and their gradients, not finite


class CalibratedHead(nn.Module):
    """features (n, inputs) -> unit vectors (n, outputs), float32 whatever the precision of the network.

    Linear, GELU, linear, between two standardisations whose means and spreads are measured by `calibrate` and then stay
    (data-dependent initialisation, as ActNorm's in Kingma and Dhariwal, Glow, 2018).
    """

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        for name, width in (("inputs", inputs), ("outputs", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_spread", torch.ones(width))

    def forward(self, features: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        return F.normalize((self.projected(features) - self.outputs_mean) / self.outputs_spread, dim=-1, eps=SAME)

    def projected(self, features: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        """Before the second standardisation."""
        return self.last(F.gelu(self.first((features.float() - self.inputs_mean) / self.inputs_spread))).float()

    @torch.no_grad()
    def calibrate(self, features: Float[Tensor, "n inputs"]) -> None:
        """Measure on features that are typical of the data, of all ranks; two at least."""
        features = ranks.gathered(features.float())
        self.inputs_mean.copy_(features.mean(dim=0))
        self.inputs_spread.copy_(spread(features))
        projected = self.projected(features)
        self.outputs_mean.copy_(projected.mean(dim=0))
        self.outputs_spread.copy_(spread(projected))


def spread(x: Float[Tensor, "n dim"]) -> Float[Tensor, " dim"]:
    """The standard deviation of each column, at least a hundredth of the median one, and LEAST_SPREAD."""
    of_column = x.std(dim=0)
    return of_column.clamp(min=max(FLAT * float(of_column.median()), LEAST_SPREAD))


class BatchHead(nn.Module):
    """features (n, inputs) -> unit vectors (n, outputs), float32 whatever the precision of the network.

    No running statistics are kept: what it gives depends on its batch alone.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.scale, self.shift = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        self.last = nn.Linear(hidden, outputs)

    def forward(self, features: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        hidden = F.gelu(standardised(self.first(features).float()) * self.scale + self.shift)
        return directions(self.last(hidden).float())


def directions(x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Unit vectors of the standardised rows: where each lies as seen from their mean.

    Rows that are all the same have no direction, and what rounding leaves of one must not be blown up to a unit vector:
    its gradient would be 10^12 times too large (tokens of crops of which everything is hidden are such rows).
    """
    return F.normalize(standardised(x), dim=-1, eps=SAME)


def standardised(x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Each column to mean 0 and variance 1 over the rows, those of all ranks; one row alone has nothing to differ from
    and stays."""
    if ranks.world() == 1:
        return x if len(x) < 2 else F.batch_norm(x, None, None, training=True)
    rows = ranks.summed(x.new_full((), float(len(x))))
    away = x - ranks.summed(x.sum(dim=0)) / rows
    return away * (ranks.summed(away.square().sum(dim=0)) / rows + EPSILON).rsqrt()
