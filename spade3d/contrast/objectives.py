"""Objectives of contrast: from tensors to one number. They know no encoder, no batch and no configuration.

Means are over the queries of all ranks that share a batch (`ranks.mean_of_whole`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade3d.training import ranks


def info_nce(
    queries: Float[Tensor, "query dim"],
    keys: Float[Tensor, "key dim"],
    positive: Bool[Tensor, "query attracting"],
    negative: Bool[Tensor, "query key"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Bring each query to its positives and away from its negatives; keys that are neither play no part.

    `positive` is of the first keys: those after them, such as a memory's, attract nobody and cost nothing by it.

        - mean over p in P(q) of  log  exp(q.p / t) / (exp(q.p / t) + sum over n in N(q) of exp(q.n / t))

    averaged over the queries that have a positive and a negative; without one of them there is nothing to tell apart
    (the term would be 0), and where no query has both the loss is 0 and asks for nothing. Vectors are expected on the
    unit sphere. Each positive stands alone against the negatives (van den Oord et al. 2018, eq. 4; several positives as
    L_out of Khosla et al. 2020, eq. 2, without the other positives in the denominator).
    """
    logits = (queries / temperature) @ keys.T
    against = logits.masked_fill(~negative, -torch.inf).logsumexp(dim=1, keepdim=True)
    told = positive & negative.any(dim=1, keepdim=True)
    # A query without negatives has against = -inf; its cells are filled before the subtraction, so that no
    # gradient of inf - inf arises.
    attracting = logits[:, : positive.shape[1]]
    gap = (against.masked_fill(against == -torch.inf, 0.0) - attracting).masked_fill(~told, 0.0)
    terms = torch.nn.functional.softplus(gap).masked_fill(~told, 0.0)
    per_query = terms.sum(dim=1) / told.sum(dim=1).clamp(min=1)
    return ranks.mean_of_whole(per_query.sum(), told.any(dim=1).sum())


def regression(
    predictions: Float[Tensor, "query dim"],
    targets: Float[Tensor, "key dim"],
    positive: Bool[Tensor, "query key"],
) -> Float[Tensor, ""]:
    """Bring each prediction to its positives, with nothing that repels.

        mean over p in P(q) of  2 - 2 q.p

    averaged over the queries that have a positive; where none has, the loss is 0 and asks for nothing. Vectors are
    expected on the unit sphere, where this is |q - p|^2 (Grill et al., BYOL, 2020, eq. 2; the mean over a symmetrised
    loss's two orders instead of their sum). That a constant vector does not win is for the predictor and its target
    to see to.
    """
    errors = (2 - 2 * predictions @ targets.T).masked_fill(~positive, 0.0)
    per_query = errors.sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return ranks.mean_of_whole(per_query.sum(), positive.any(dim=1).sum())
