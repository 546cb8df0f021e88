"""Whitening: features of an encoder with no direction louder than another, for what reads them from few labels.

One direction has four fifths of the variance of an encoder's cells (how bright the tissue is), and what a finding looks
like is among the last hundredths. With each channel brought to spread 1, what few labels find there depends on the
learner: a linear map found bright lumps and one with two layers did not; whitened, both did (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

RIDGE = 0.01  # of the mean variance of the channels, added to each direction that is whitened
ROUNDING = 1e-10  # of the mean square of the means: a variance below it is what rounding makes of rows all the same


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the channels of some rows, float32 on the CPU, and how many rows there were."""

    mean: Float[Tensor, " c"]
    covariance: Float[Tensor, "c c"]
    rows: int = 0


def moments_of(rows: Iterable[tuple[Float[Tensor, "_ _"], ...]]) -> tuple[Moments, ...]:
    """The moments of each kind of rows (n, c) that come together, batch by batch, added up in float64. ValueError where
    nothing comes."""
    sums: tuple[Tensor, ...] | None = None
    for some in rows:
        found = tuple(_products(one.double()) for one in some)
        sums = found if sums is None else tuple(a + b for a, b in zip(sums, found, strict=True))
    if sums is None:
        raise ValueError("no rows to take moments of")
    return tuple(_moments(total) for total in sums)


class Whitening(nn.Module):
    """y = R (x - mean): no direction is louder than another, nor says what another says; as it is until it is fitted.

        R = (C + RIDGE tr(C) / c)^(-1/2)      C: covariance of what is read

    The ridge keeps directions that hardly vary from being all noise. R is symmetric: no channel loses its name.
    """

    mean: Float[Tensor, " c"]
    root: Float[Tensor, "c c"]

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("root", torch.eye(channels))

    def fit(self, found: Moments) -> None:
        """From now on; rows that are all the same are left as large as they are."""
        variances, axes = torch.linalg.eigh(found.covariance.double())
        level = variances.clamp_min(0).mean()
        if level > ROUNDING * found.mean.double().square().mean():
            self.root.copy_(axes / (variances.clamp_min(0) + RIDGE * level).sqrt() @ axes.T)
        self.mean.copy_(found.mean)

    def forward(self, x: Float[Tensor, "*cells c"], then: nn.Linear | None = None) -> Float[Tensor, "*cells d"]:
        """Whitened, and given to a linear layer where one is to follow: the two are one product of all cells. float32,
        whatever the precision of the rest: what counts is small beside what bf16 keeps."""
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - self.mean
            return centred @ self.root if then is None else F.linear(centred, then.weight @ self.root.T, then.bias)


def _products(rows: Float[Tensor, "n c"]) -> Float[Tensor, "c1 c1"]:
    with_one = torch.cat([torch.ones_like(rows[:, :1]), rows], dim=1)
    return with_one.T @ with_one


def _moments(total: Float[Tensor, "c1 c1"]) -> Moments:
    mean = total[0, 1:] / total[0, 0].clamp_min(1)
    covariance = total[1:, 1:] / total[0, 0].clamp_min(1) - torch.outer(mean, mean)
    return Moments(mean.float().cpu(), covariance.float().cpu(), int(total[0, 0]))
