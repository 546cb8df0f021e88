"""Guidance: how far the attention of some heads is from the priors of their regions.

SPAN (Miao et al. 2022, arXiv 2209.03745) adds a regulariser that makes separate heads follow priors over regions. Its
form, its weight and the number of guided heads are in no text that we could obtain: the three forms here, at most half
of the heads, and 0.1 as weight (that of SAG's public code, for another task) are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade3d.faults import DataFault, UsageFault
from spade3d.networks.swin import AttentionMap
from spade3d.training import ranks

KINDS = ("ce", "inside", "dice")
LEAST = 0.002  # share of a crop that a region must take: 14 ml of a crop of 192 mm
TINY = 1e-12  # attention below this is none: its logarithm would be without bound
FLAT = 0.01  # of a map's highest value: a map that varies less is not stretched to 0..1
EMPTY = 1e-3  # share of a window that a region must take


@dataclass(frozen=True)
class GuidedHeads:
    """Which head follows which region: head n follows `regions[n]`, the heads after these are free.

    At most half of the heads are guided, so that the rest may learn what no prior knows. Kept with the checkpoint,
    whose attention cannot be read without it.
    """

    heads: int
    regions: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.regions:
            raise UsageFault("no region to guide a head by; name at least one, or leave guidance out")
        if 2 * len(self.regions) > self.heads:
            raise UsageFault(
                f"{len(self.regions)} of {self.heads} heads would be guided ({', '.join(self.regions)}); at most half "
                "of the heads may be: name fewer regions, or use more heads"
            )

    def of(self, by_head: Float[Tensor, "b head *cells"]) -> Float[Tensor, "b guided *cells"]:
        """The guided heads of all heads' attention."""
        if by_head.shape[1] != self.heads:
            raise UsageFault(f"attention of {by_head.shape[1]} heads, and a table of heads for {self.heads}")
        return by_head[:, : len(self.regions)]

    def rows(self, regions: Sequence[str]) -> list[int]:
        """For each guided head the row of its region among the `regions` of some priors; UsageFault if it has none."""
        unknown = [region for region in self.regions if region not in regions]
        if unknown:
            raise UsageFault(
                f"no prior for {', '.join(unknown)}, which guided heads are to follow; there are priors for "
                f"{', '.join(regions)}"
            )
        return [list(regions).index(region) for region in self.regions]

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON keeps."""
        return {"heads": self.heads, "regions": list(self.regions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GuidedHeads:
        """The inverse of `to_dict`; DataFault for anything else."""
        try:
            return cls(int(values["heads"]), tuple(map(str, values["regions"])))
        except (KeyError, TypeError, ValueError) as problem:
            raise DataFault(f"not a table of guided heads: {values!r}; heads and regions are needed") from problem


def guidance(
    by_head: Float[Tensor, "b head p q r"],
    prior: Float[Tensor, "_ _ _ _ _"],
    kind: str = "ce",
    least: float = LEAST,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The mean disagreement of heads with their priors, and the share of (sample, head) terms that it is the mean of.

    by_head  attention of the guided heads: not below 0, up to a factor that does not matter
    prior    (b, head, p, q, r): share of each cell, 0..1, that the head's region takes
    kind     "ce"      - sum_k p_k log m_k, map m and prior p each scaled to sum 1: the map takes the prior's shape
             "inside"  - log sum_k s_k m_k, m scaled to sum 1, s the share itself: where inside is left to the head
             "dice"    1 - 2 sum_k m_k p_k / (sum_k m_k^2 + sum_k p_k^2), m and p each stretched to 0..1 (lowest to 0,
                       highest to 1): only the contrast counts, and much attention may stay outside
    least    mean of the prior below which the region counts as absent and its term is switched off

    With no term left the loss is 0 and asks for nothing. "dice" also leaves out a prior without contrast, "inside" and
    "ce" do not. In float32 whatever the precision of the networks. UsageFault for a prior on another grid.
    """
    if prior.shape != by_head.shape:
        raise UsageFault(
            f"a prior {tuple(prior.shape)} for attention {tuple(by_head.shape)} (sample, head, cells): both must lie "
            "on one grid; pool the prior to the cells of the stage that attention is taken from"
        )
    with torch.autocast(by_head.device.type, enabled=False):
        maps, shares = by_head.flatten(2).float(), prior.flatten(2).float()
        active = shares.mean(dim=-1) >= least
        if kind == "dice":
            active = active & _has_contrast(shares)
        terms = disagreement(maps, shares, kind)
        return _mean(terms, active), active.float().mean()


def windowed_guidance(
    attention: AttentionMap,
    prior: Float[Tensor, "b head p q r"],
    kind: str = "ce",
    least: float = LEAST,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`guidance` of attention that never leaves its window (stages of a Swin transformer): the mean over terms of

        sum over windows w of  P_w D_w,   P_w = mass of the prior in w / its mass in all windows that are counted

    with D_w the disagreement of the attention that w's cells receive (mean over those that look) with the prior in w,
    each scaled within the window. Windows of which the region takes less than EMPTY are left out, with "dice" also
    those that it takes evenly.

    attention  of the guided heads alone; its `cells` are followed, so that shifted windows find their own prior
    prior      as in `guidance`

    In a window that the shift filled from two ends, cells of different ends never look at each other: that part of
    the disagreement cannot be learnt away.
    """
    if prior.shape[1:] != (attention.weights.shape[2], *attention.grid):
        raise UsageFault(
            f"priors {tuple(prior.shape[1:])} (head, cells) for windows of {attention.weights.shape[2]} heads on "
            f"{tuple(attention.grid)} cells; choose the guided heads, and pool the prior to the stage's cells"
        )
    weights, cells = attention.weights, attention.cells
    with torch.autocast(weights.device.type, enabled=False):
        real = (cells >= 0)[:, None]  # (window, 1, n)
        looks = weights.float() * real[..., None]
        maps = looks.sum(dim=3) / real.sum(dim=-1, keepdim=True) * real  # (b, window, head, n)
        shares = prior.flatten(2).float()[:, :, cells.clamp(min=0)].transpose(1, 2) * real
        counted = shares.sum(dim=-1) >= EMPTY * real.sum(dim=-1)
        if kind == "dice":
            counted = counted & _has_contrast(shares, real)
        mass = shares.sum(dim=-1) * counted
        weight = mass / mass.sum(dim=1, keepdim=True).clamp(min=TINY)
        terms = (weight * disagreement(maps, shares, kind, real)).sum(dim=1)
        active = (prior.float().mean(dim=(2, 3, 4)) >= least) & counted.any(dim=1)
        return _mean(terms, active), active.float().mean()


def disagreement(
    maps: Float[Tensor, "*map n"],
    shares: Float[Tensor, "*map n"],
    kind: str,
    real: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "*map"]:
    """How far each map is from its prior over n cells, finite whatever they hold; formulas in `guidance`.

    real  which of the cells there are (all, by default); both arguments are 0 in the others
    """
    if kind == "ce":
        return -(_distribution(shares) * _distribution(maps).clamp(min=TINY).log()).sum(dim=-1)
    if kind == "inside":
        return -(shares * _distribution(maps)).sum(dim=-1).clamp(min=TINY).log()
    if kind == "dice":
        m, p = _stretched(maps, real), _stretched(shares, real)
        return 1 - 2 * (m * p).sum(dim=-1) / (m.square() + p.square()).sum(dim=-1).clamp(min=TINY)
    raise UsageFault(f"guidance {kind!r}: there is no such loss; choose one of {', '.join(KINDS)}")


def _distribution(x: Tensor) -> Tensor:
    """Scaled to sum 1 over the cells; zeros stay."""
    return x / x.sum(dim=-1, keepdim=True).clamp(min=TINY)


def _stretched(x: Tensor, real: Tensor | None) -> Tensor:
    """Lowest to 0, highest to 1; a nearly flat one is stretched less (FLAT), or rounding would fill 0..1."""
    low, high = _range(x, real)
    stretched = (x - low) / (high - low).clamp(min=TINY).maximum(FLAT * high)
    return stretched if real is None else stretched * real


def _range(x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    low = x if real is None else x.masked_fill(~real, torch.inf)
    return low.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)


def _has_contrast(shares: Tensor, real: Tensor | None = None) -> Tensor:
    """Whether a prior tells one cell from another."""
    low, high = _range(shares, real)
    return (high - low > FLAT * high)[..., 0]


def _mean(terms: Tensor, active: Tensor) -> Tensor:
    """Over the active terms of all ranks."""
    return ranks.mean_of_whole(terms.masked_fill(~active, 0.0).sum(), active.sum())
