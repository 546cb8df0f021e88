"""Class tokens: one learnt token a finding looks at all cells of a study, and says whether and where it found it.

CLARiTy (Statheros, Wang, Klein 2025, arXiv 2512.16700) in 3D, reconstructed from the abstract: it names several
class-specific tokens, attention pooling and a SegmentCAM module; sizes, layers and formulas here are ours
(docs/concepts.md, "CLARiTy"). The losses are in `clarity_losses.py`, the convolutional maps in `segment_cam.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dagman.downstream.segment_cam import SegmentCAM, ranked_pooling, refined, says_where
from dagman.downstream.study_heads import (
    FREQUENCIES,
    Allowed,
    Places,
    StudyOutput,
    Tokens,
    Valid,
    begin_at_prevalence,
    place_codes,
)
from dagman.downstream.whitening import Moments, Whitening
from spade3d.faults import UsageFault

FAINT = 1e-3  # weight, in what tokens gather, of a cell that is no foreground at all
LOGITS = ("token_logits", "pooled_logits", "patch_logits")  # of the branches that answer


class ClassTokens(nn.Module):
    """A head over the cells of a study: tokens, places, valid -> StudyOutput.

        x_k  = W y_k + code of the patient coordinates of cell k; y_k: its token, whitened
        t_c  = token of finding c after `blocks` blocks, A_c its attention to the cells, mean over heads and blocks;
               where SegmentCAM has a foreground F, the weight of a cell is f_c = sigmoid(F_c) times what it else
               would be
        z_c  = w_c . t_c + b_c                  logits of the tokens
        z'_c = u_c . sum_k A_c(k) x_k + b'_c    attention pooling, where it is on
        z''_c                                   class maps pooled by rank within the foreground, where SegmentCAM is on

    The logit of a finding is the mean of those that are on; its map is A_c, refined by SegmentCAM where that is on.

    While it learns, f_c is what the prior says of the study, not what F makes of it yet (`prior_forcing`; teacher
    forcing, Williams and Zipser 1989): before F knows the organ, the loudest cell of a study is never the finding, and
    what is learned from it stays (docs/log.md).

    channels, findings  of the cells that are given; of the logits
    dim, heads, blocks  width of tokens and cells, and of their attention; heads divide dim
    registers           further tokens that stand for no finding, where looks can go that no finding needs
    joint               cells attend to all cells and tokens, too, as in a ViT; by default only tokens look (class
                        attention, as CaiT has it), which is linear in the cells
    width, convolved, rank_decay   of SegmentCAM and of the pooling of its class maps
    prior_forcing       whether `allowed` stands for the foreground, where it is given and says a place
    groups              for SegmentCAM: for each finding which foreground it shares with others, None for a finding
                        that may be anywhere; () for no foreground at all
    crops               how many crops one behind the other along p the cells are, where they are a bag

    `parts` of the output: token_logits, pooled_logits, patch_logits (b, f), class_tokens (b, f, d), attention,
    class_maps and foreground logits (b, f, p, q, r); those of a piece that is off are not there. What invalid cells
    hold changes nothing, NaN neither. Raises UsageFault for sizes that no head can have.
    """

    def __init__(
        self,
        channels: int,
        findings: int,
        *,
        dim: int = 192,
        blocks: int = 2,
        heads: int = 6,
        registers: int = 1,
        joint: bool = False,
        attention_pooling: bool = True,
        segment_cam: bool = True,
        width: int = 64,
        convolved: bool = False,
        rank_decay: float = 0.5,
        prior_forcing: bool = True,
        groups: Sequence[int | None] = (),
        crops: int = 1,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise UsageFault(f"{heads} heads of the class tokens cannot share {dim} channels; choose heads that do")
        if min(findings, blocks) < 1:
            raise UsageFault(f"{findings} findings and {blocks} blocks of class tokens; at least one of each is needed")
        self.findings = findings
        self.whitening = Whitening(channels)
        self.embed = nn.Linear(channels, dim)
        self.place = nn.Linear(6 * FREQUENCIES, dim, bias=False)
        self.class_token = nn.Parameter(torch.empty(findings + registers, dim))
        self.blocks = nn.ModuleList(_Block(dim, heads, joint and n < blocks - 1) for n in range(blocks))
        self.norm, self.norm_cells = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.of_token = _ByFinding(findings, dim)
        self.of_pooled = _ByFinding(findings, dim) if attention_pooling else None
        how = {"width": width, "convolved": convolved, "groups": groups, "crops": crops}
        self.cam = SegmentCAM(dim, findings, **how) if segment_cam else None
        self.rank_decay, self.prior_forcing = rank_decay, prior_forcing
        self.apply(_initialise)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def whiten(self, cells: Moments, means: Moments) -> None:
        """By the cells of studies, those where findings may be."""
        self.whitening.fit(cells)

    def begin_at_prevalence(self, labels: Float[Tensor, "n f"]) -> None:
        """Begin each branch at the log odds of each finding among these labels."""
        for branch in (self.of_token, self.of_pooled, None if self.cam is None else self.cam.class_maps):
            if branch is not None:
                begin_at_prevalence(branch.bias, labels)

    def forward(self, tokens: Tokens, places: Places, valid: Valid, allowed: Allowed | None = None) -> StudyOutput:
        """What is found in each study, and where; `allowed` where each finding may be, as far as that is known."""
        grid, shown = valid.shape[1:], valid.flatten(1)
        cells = self._embedded(tokens, places, shown)
        x = self.class_token.to(cells.dtype).expand(len(cells), -1, -1)
        parts, favour = {}, None
        if self.cam is not None:
            parts = self.cam(rearrange(self.norm_cells(cells), "b n d -> b d n").unflatten(2, grid), valid)
            inside = _inside(parts, valid, allowed if self.prior_forcing else None)
            parts["patch_logits"] = ranked_pooling(parts["class_maps"], inside * valid[:, None], self.rank_decay)
            favour = self._favour(inside)
        looks = []
        for block in self.blocks:
            x, cells, weights = block(x, cells, shown, favour)
            looks.append(weights[:, : self.findings])
        found, attention = self.norm(x[:, : self.findings]), torch.stack(looks).mean(dim=0)
        parts |= {
            "token_logits": self.of_token(found),
            "class_tokens": found,
            "attention": attention.unflatten(2, grid),
        }
        if self.of_pooled is not None:
            parts["pooled_logits"] = self.of_pooled(attention.to(cells.dtype) @ self.norm_cells(cells))
        logits = torch.stack([parts[name].float() for name in LOGITS if name in parts]).mean(dim=0)
        return StudyOutput(logits, refined(parts), parts)

    def _favour(self, inside: Float[Tensor, "b f p q r"]) -> Float[Tensor, "b t m"]:
        """log f, added to how much each finding's token likes each cell; 0 for registers, and for tokens among what is
        looked at."""
        count = len(self.class_token)
        return F.pad(inside.clamp_min(FAINT).log().flatten(2), (count, 0, 0, count - self.findings))

    def _embedded(self, tokens: Tokens, places: Places, shown: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The cells as they are looked at; 0 where invalid."""
        # First of all, because 0 * NaN is NaN: whatever padding holds must not reach a sum.
        tokens = rearrange(tokens, "b c p q r -> b (p q r) c").masked_fill(~shown[..., None], 0)
        places = rearrange(places, "b x p q r -> b (p q r) x").masked_fill(~shown[..., None], 0)
        x = self.whitening(tokens, self.embed)
        return (x + self.place(place_codes(places).to(x.dtype))).masked_fill(~shown[..., None], 0)


class _Block(nn.Module):
    """Attention, then MLP, each on layer-normed input and added to it (ViT); all look at tokens and valid cells."""

    def __init__(self, dim: int, heads: int, joint: bool, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.heads, self.joint = heads, joint
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self,
        tokens: Float[Tensor, "b t d"],
        cells: Float[Tensor, "b n d"],
        shown: Bool[Tensor, "b n"],
        favour: Float[Tensor, "b t m"] | None,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b n d"], Float[Tensor, "b t n"]]:
        """Tokens and cells after the block, and where each token looked among the cells, mean over the heads."""
        count = tokens.shape[1]
        seen = self.norm1(torch.cat([tokens, cells], dim=1))
        shown = F.pad(shown, (count, 0), value=True)
        looked, weights = self._tokens_look(seen[:, :count], seen, shown, favour)
        tokens = tokens + self.proj(looked)
        tokens = tokens + self.mlp(self.norm2(tokens))
        if self.joint:
            cells = cells + self.proj(self._cells_look(seen[:, count:], seen, shown))
            cells = cells + self.mlp(self.norm2(cells))
        return tokens, cells, weights[..., count:].mean(dim=1)

    def _tokens_look(self, asking, seen, shown: Bool[Tensor, "b m"], favour):
        """What the tokens saw (b, t, d), and their weights (b, head, t, m), float32: bf16 would leave a map of 40,000
        cells hardly three digits to sort them by.

        q . (K x) = (K^T q) . x and sum a (V x) = V (sum a x): a few tokens meet the cells themselves, so that keys and
        values of all cells, more than everything else together, are never made.
        """
        q, k, v = (
            rearrange(x, "... (h d) -> ... h d", h=self.heads)
            for x in (self.q(asking), self.k.weight.T, self.v.weight.T)
        )
        with torch.autocast(seen.device.type, enabled=False):
            asked = einsum(q.float(), k.float(), "b t h d, c h d -> b h t c") / q.shape[-1] ** 0.5
            logits = einsum(asked, seen.float(), "b h t c, b m c -> b h t m")
            if favour is not None:
                logits = logits + favour[:, None]
            weights = logits.masked_fill(~shown[:, None, None], -torch.inf).softmax(dim=-1)
            read = einsum(weights, seen.float(), "b h t m, b m c -> b h t c")
            values = einsum(read, v.float(), "b h t c, c h d -> b t h d")
        return rearrange(values, "b t h d -> b t (h d)").to(seen.dtype) + self.v.bias, weights

    def _cells_look(self, asking, seen, shown: Bool[Tensor, "b m"]) -> Float[Tensor, "b n d"]:
        q, k, v = (
            rearrange(x, "b m (h d) -> b h m d", h=self.heads) for x in (self.q(asking), self.k(seen), self.v(seen))
        )
        looked = F.scaled_dot_product_attention(q, k, v, attn_mask=shown[:, None, None])
        return rearrange(looked, "b h n d -> b n (h d)")


class _ByFinding(nn.Module):
    """A logit for each finding from the vector of each: w_c . x_c + b_c."""

    def __init__(self, findings: int, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(findings, dim)), nn.Parameter(torch.zeros(findings))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "b f d"]) -> Float[Tensor, "b f"]:
        return einsum(x, self.weight, "b f d, f d -> b f") + self.bias


@torch.no_grad()
def _inside(parts: Mapping[str, Tensor], valid: Valid, allowed: Allowed | None) -> Float[Tensor, "b f p q r"]:
    """How far each cell is foreground for a finding: what is allowed, where that says a place, else what the branch
    says; 1 where there is no branch. No gradient: labels would bend the foreground to what is convenient."""
    if "foreground" not in parts:
        return torch.ones_like(parts["class_maps"])
    guessed = parts["foreground"].sigmoid()
    if allowed is None:
        return guessed
    shown = ((allowed > 0) & valid[:, None]).any(dim=(2, 3, 4), keepdim=True)  # a bag may hold nothing of the organ
    return torch.where(says_where(allowed, valid) & shown, allowed, guessed)


def _initialise(module: nn.Module) -> None:
    """As in ViT: small weights, so that every token looks everywhere at first."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
