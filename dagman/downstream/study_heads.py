"""Heads that read a study's cells and answer once for each finding: a linear probe, and attention pooling.

A head is a module: tokens (b, c, p, q, r), their places and which of them are valid -> StudyOutput; while it learns it
is also told where findings may be, as far as that is known. It sees every study as a set of cells, however they were
made. Before training it is told what the tokens of the training studies look
like (`whiten`) and how often each finding is present (`begin_at_prevalence`); both are part of its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dagman.downstream.whitening import Moments, Whitening

Tokens = Float[Tensor, "b c p q r"]
Places = Float[Tensor, "b 3 p q r"]
Valid = Bool[Tensor, "b p q r"]
Allowed = Float[Tensor, "b f p q r"]  # 1 where a finding may be

FREQUENCIES = 6  # of the codes of a place along each axis: 1, 2, 4, ... half waves over the body's box


@dataclass(frozen=True, eq=False)
class StudyOutput:
    """What a head says of some studies.

    logits  one for each study and finding
    maps    evidence of each finding at each cell, at least 0; None where a head has none
    parts   what losses need besides, by name
    """

    logits: Float[Tensor, "b f"]
    maps: Float[Tensor, "b f p q r"] | None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class LinearProbe(nn.Module):
    """A linear layer on the mean token of a study, whitened as cells are."""

    def __init__(self, channels: int, findings: int):
        super().__init__()
        self.whitening = Whitening(channels)
        self.linear = nn.Linear(channels, findings)
        nn.init.zeros_(self.linear.weight)

    def whiten(self, cells: Moments, means: Moments) -> None:
        """By how cells vary, which is known better than how few means do, and about the mean of the means. The means
        of many cells hardly differ: they are brought to the size of cells together."""
        self.whitening.fit(Moments(means.mean, cells.covariance))
        root = self.whitening.root.cpu()  # where moments are
        spread = (root @ means.covariance @ root).diagonal().mean().clamp_min(0).sqrt()
        spread = spread.clamp_min(0.1)  # those of few studies differ less than they will
        self.whitening.root.div_(spread.to(self.whitening.root.device))

    def begin_at_prevalence(self, labels: Float[Tensor, "n f"]) -> None:
        """Begin at the log odds of each finding among these labels."""
        begin_at_prevalence(self.linear.bias, labels)

    def forward(self, tokens: Tokens, places: Places, valid: Valid, allowed: Allowed | None = None) -> StudyOutput:
        """No maps: what a mean says, it says of no place; nor is it to know one."""
        return StudyOutput(self.linear(self.whitening(mean_token(tokens, valid))), None)


class AttentionPooling(nn.Module):
    """Gated attention over cells for each finding (Ilse et al. 2018), of evidence that adds up (Javed et al. 2022):

        h_k = gelu(W x_k + code of its place)                           x_k whitened over cells
        a_fk = softmax over valid k of  w_f . (tanh(V h_k) * sigmoid(U h_k))
        logit_f = sum_k a_fk e_fk + b_f,   e_fk = u_f . h_k

    Since the logit is that sum and nothing else, a_fk relu(e_fk) is how much cell k speaks for finding f: the map. The
    softmax sums to 1 in a study without the finding, too; the evidence does not.
    """

    def __init__(self, channels: int, findings: int, *, dim: int = 128, places: bool = True):
        super().__init__()
        self.whitening = Whitening(channels)
        self.embed = nn.Linear(channels, dim)
        self.place = nn.Linear(6 * FREQUENCIES, dim, bias=False) if places else None
        self.gate, self.show = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.look = nn.Linear(dim, findings, bias=False)
        self.speak = nn.Linear(dim, findings, bias=False)
        self.bias = nn.Parameter(torch.zeros(findings))

    def whiten(self, cells: Moments, means: Moments) -> None:
        """By the cells of studies."""
        self.whitening.fit(cells)

    def begin_at_prevalence(self, labels: Float[Tensor, "n f"]) -> None:
        """Begin at the log odds of each finding among these labels."""
        begin_at_prevalence(self.bias, labels)

    def forward(self, tokens: Tokens, places: Places, valid: Valid, allowed: Allowed | None = None) -> StudyOutput:
        """Looks everywhere, whatever is allowed."""
        grid = valid.shape[1:]
        h = self.whitening(rearrange(tokens, "b c p q r -> b (p q r) c"), self.embed)
        if self.place is not None:
            h = h + self.place(place_codes(rearrange(places, "b x p q r -> b (p q r) x")).to(h.dtype))
        h = nn.functional.gelu(h)
        scores = self.look(torch.tanh(self.gate(h)) * torch.sigmoid(self.show(h))).float()
        attention = scores.masked_fill(~valid.flatten(1)[..., None], -torch.inf).softmax(dim=1)
        evidence = self.speak(h).float()
        logits = einsum(attention, evidence, "b k f, b k f -> b f") + self.bias
        attention, evidence = (rearrange(x, "b k f -> b f k").unflatten(2, grid) for x in (attention, evidence))
        return StudyOutput(logits, attention * evidence.relu(), {"attention": attention, "token_logits": evidence})


def mean_token(tokens: Tokens, valid: Valid) -> Float[Tensor, "b c"]:
    """The mean over the valid cells of each study."""
    shown = valid[:, None].to(tokens.dtype)
    return (tokens * shown).sum(dim=(2, 3, 4)) / shown.sum(dim=(2, 3, 4)).clamp_min(1)


def place_codes(places: Float[Tensor, "*cells 3"]) -> Float[Tensor, "*cells codes"]:
    """Sines and cosines of 1, 2, 4, ... half waves over the body's box, for each axis: 6 FREQUENCIES numbers."""
    waves = torch.pi * 2.0 ** torch.arange(FREQUENCIES, device=places.device)
    angles = (places.float()[..., None] * waves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def begin_at_prevalence(bias: Tensor, labels: Float[Tensor, "n f"]) -> None:
    """Set the bias of each finding to the log odds of its presence among the labels that are said (with one more of
    each kind, so that a finding that is never or always present stays finite): the first steps need not learn it."""
    present, absent = (labels == 1).sum(dim=0) + 1.0, (labels == 0).sum(dim=0) + 1.0
    with torch.no_grad():
        bias.copy_((present / absent).log())
