"""Label-free signs of life: whether an embedding still tells crops apart, read while it is being learnt.

* rank: effective rank, exp of the entropy of the normalised singular values (Roy & Vetterli 2007; RankMe, Garrido et
  al. 2023, eq. 1). 1 when all rows are one line, min(n, d) when every direction is used alike.
* spread: standard deviation over the rows of the unit vectors, averaged over the dimensions, times sqrt(d). About 1 on
  a full sphere, 0 when all rows are one point (Chen & He, SimSiam, 2021, section 4.1).
* uniformity: log mean over pairs of exp(-2 |z_i - z_j|^2); lower is better, 0 when all rows are one point.
* alignment: mean of |z_i - z_i+|^2 to each row's positive; lower is better (both Wang & Isola 2020, section 4.1).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# The alarm. A random network reads well above both (rank in the tens of percent, spread 0.1 and more once the first
# steps are over); a collapsed one falls through both within a few hundred steps and does not come back.
LOW_RANK = 0.02  # of the way from 1, the least, to min(n, d), the most
LOW_SPREAD = 0.05
FEWEST_ROWS = 8  # with fewer, rank and spread say nothing
_MOST_ROWS = 2048  # the cost grows with the square of the rows


@torch.no_grad()
def signs_of_life(
    embedding: Float[Tensor, "row dim"], paired: Float[Tensor, "row dim"] | None = None
) -> dict[str, int | float]:
    """Signs of an embedding, and with the positive of each row (`paired`) its alignment; keys as above, with `rows` and
    `dims`. A set with a value that is not finite reads NaN throughout. At least two rows are needed."""
    if len(embedding) < 2:
        raise ValueError(f"signs of life need at least 2 rows, not {len(embedding)}")
    stride = math.ceil(len(embedding) / _MOST_ROWS)
    z = F.normalize(embedding[::stride].float(), dim=-1)
    rows, dims = z.shape
    signs = {"rows": rows, "dims": dims}
    if not z.isfinite().all():
        return signs | {"rank": math.nan, "spread": math.nan, "uniformity": math.nan}
    signs |= {
        "rank": effective_rank(embedding[::stride].float()),
        "spread": z.std(dim=0).mean().item() * math.sqrt(dims),
        "uniformity": F.pdist(z).square().mul(-2).exp().mean().log().item(),
    }
    if paired is not None:
        signs["alignment"] = (z - F.normalize(paired[::stride].float(), dim=-1)).square().sum(dim=-1).mean().item()
    return signs


def effective_rank(embedding: Float[Tensor, "row dim"]) -> float:
    """exp( - sum_k p_k log p_k ),  p_k = sigma_k / sum sigma, of the singular values; 1 for all zeros."""
    sigma = torch.linalg.svdvals(embedding)
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(p).sum().exp().item()


def collapse(signs: Mapping[str, int | float]) -> str | None:
    """What to tell the user when the signs say that the embedding has collapsed; None while it lives."""
    if math.isnan(signs["rank"]):
        return "the embedding holds values that are not finite; lower --optim.lr"
    if signs["rows"] < FEWEST_ROWS:
        return None
    most = min(signs["rows"], signs["dims"])
    if signs["rank"] >= 1 + LOW_RANK * (most - 1) and signs["spread"] >= LOW_SPREAD:
        return None
    return (
        f"the embedding has collapsed: effective rank {signs['rank']:.1f} of {most}, spread {signs['spread']:.3f} "
        "(a full sphere has 1); the encoder no longer tells crops apart; lower --optim.lr, or take more negatives"
    )
