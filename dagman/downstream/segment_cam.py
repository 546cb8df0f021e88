"""SegmentCAM in 3D: class maps and a foreground by convolutions over a study's cells, and the map that they refine.

Reconstructed from the abstract of CLARiTy (arXiv 2512.16700): SegmentCAM is convolutional, segments the foreground,
suppresses the background, and uses explicit anatomical priors. Layers and formulas are ours; the product of attention
and class map, and the pooling by rank, are MCTformer+'s (Xu et al. 2023, its code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

STEPS = 2**20  # of a share, when shares are added up
ANYWHERE = 20.0  # logit of a foreground that suppresses nothing


class SegmentCAM(nn.Module):
    """Class maps and a foreground from the cells of a study:

        class_maps  M (b, f, p, q, r)   logits: how much a cell speaks for a finding
        foreground  F (b, f, p, q, r)   logits: whether a cell lies where the finding may be; where groups are given

    The foreground is read from two convolutions of 3 cells, each normed over the valid cells of a study and through
    GELU; the class maps from each cell alone, linearly, or with `convolved` from the same convolutions. Study labels
    are few and say of no place: convolutions that only they teach learn studies by heart, while the prior teaches the
    foreground in every cell.

    groups  for each finding the foreground that it shares (0, 1, ...), None: may be anywhere; () no foreground
    crops   the cells are so many crops one behind the other along p (a bag): no convolution reaches from one into the
            next, because neighbours there are no neighbours in the body

    Invalid cells are 0 before each convolution, as if the grid ended there.
    """

    def __init__(
        self,
        dim: int,
        findings: int,
        *,
        width: int = 64,
        convolved: bool = False,
        groups: Sequence[int | None] = (),
        crops: int = 1,
    ):
        super().__init__()
        named = [group for group in groups if group is not None]
        count = max(named, default=-1) + 1
        self.crops, self.convolved = crops, convolved
        self.first = _Convolution(dim, width) if named or convolved else None
        self.second = _Convolution(width, width) if named or convolved else None
        self.class_maps = nn.Conv3d(width if convolved else dim, findings, 1)
        self.foreground = nn.Conv3d(width, count, 1) if named else None
        self.register_buffer("group_of", torch.tensor([count if group is None else group for group in groups]))

    def forward(self, cells: Float[Tensor, "b d p q r"], valid: Bool[Tensor, "b p q r"]) -> dict[str, Tensor]:
        """The maps by name."""
        seen = cells
        if self.first is not None:
            seen = self.second(self.first(cells, valid, self.crops), valid, self.crops)
        maps = {"class_maps": self.class_maps(seen if self.convolved else cells).float()}
        if self.foreground is not None:
            with_anywhere = F.pad(self.foreground(seen).float(), (0,) * 7 + (1,), value=ANYWHERE)
            maps["foreground"] = with_anywhere[:, self.group_of]
        return maps


class _Convolution(nn.Module):
    def __init__(self, channels: int, width: int, groups: int = 8):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(channels, width, 3, padding=1, bias=False), MaskedGroupNorm(groups, width)

    def forward(self, x, valid: Bool[Tensor, "b p q r"], crops: int) -> Float[Tensor, "b w p q r"]:
        apart = rearrange(x * valid[:, None], "b c (k p) q r -> (b k) c p q r", k=crops)
        x = rearrange(self.conv(apart), "(b k) c p q r -> b c (k p) q r", k=crops)
        return F.gelu(self.norm(x, valid))


class MaskedGroupNorm(nn.Module):
    """GroupNorm with the mean and variance of the valid cells: how much padding a batch needs changes nothing."""

    def __init__(self, groups: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "b c p q r"], valid: Bool[Tensor, "b p q r"]) -> Float[Tensor, "b c p q r"]:
        grouped = rearrange(x.float(), "b (g c) p q r -> b g c p q r", g=self.groups)
        shown = valid[:, None, None].float()
        held = (shown.sum(dim=(2, 3, 4, 5), keepdim=True) * grouped.shape[2]).clamp_min(1)
        over = (2, 3, 4, 5)
        mean = (grouped * shown).sum(dim=over, keepdim=True) / held
        variance = ((grouped - mean).square() * shown).sum(dim=over, keepdim=True) / held
        normed = ((grouped - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (normed * _by_channel(self.weight) + _by_channel(self.bias)).to(x.dtype)


def ranked_pooling(
    maps: Float[Tensor, "b f p q r"], share: Float[Tensor, "b f p q r"], decay: float
) -> Float[Tensor, "b f"]:
    """Mean of a map's cells, each as far as it counts (`share`, 0 to 1), with weight decay^(what counts above it):

        sum_r s_r decay^(s_0 + ... + s_{r-1}) m_r / the same without m_r          m_r the r-th highest cell

    Where all cells count that is global weighted rank pooling, between the maximum (decay 0) and the mean (1);
    Kolesnikov and Lampert 2016, 0.996 as in MCTformer+'s code. Shares of 0 and 1 pool the cells of 1. 0 for a study in
    which no cell counts."""
    flat, share = maps.float().flatten(2), share.flatten(2)
    ranked, order = flat.masked_fill(share == 0, -torch.inf).sort(-1, descending=True)
    share = share.gather(-1, order)
    # In whole steps: CUDA adds up floats in no fixed order.
    above = (share * STEPS).round().long().cumsum(-1).to(share.dtype) / STEPS - share
    weights = share * decay**above
    return (ranked.masked_fill(share == 0, 0) * weights).sum(-1) / weights.sum(-1).clamp_min(1e-12)


def says_where(allowed: Float[Tensor, "b f p q r"], valid: Bool[Tensor, "b p q r"]) -> Bool[Tensor, "b f 1 1 1"]:
    """Whether the cells where a finding may be leave some valid cell of the study out: all of them say no place."""
    return ((allowed < 1) & valid[:, None]).any(dim=(2, 3, 4), keepdim=True)


@torch.no_grad()
def refined(parts: Mapping[str, Tensor]) -> Float[Tensor, "b f p q r"]:
    """H_c = sqrt(A_c sigmoid(M_c)) sigmoid(F_c), without the factors that are not among the parts; A_c without any.

    MCTformer+ has relu(M_c): where class maps are wrong about a finding they silence what its token found. No loss
    reads it: no gradient. 0 in invalid cells, where nobody looks.
    """
    found = parts["attention"]
    if "class_maps" in parts:
        found = (found * parts["class_maps"].sigmoid()).sqrt()
    if "foreground" in parts:
        found = found * parts["foreground"].sigmoid()
    return found


def _by_channel(values: Float[Tensor, " c"]) -> Float[Tensor, "c 1 1 1"]:
    return values[:, None, None, None]
