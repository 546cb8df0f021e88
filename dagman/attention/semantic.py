"""Semantic attention: a learnt [CLS] looks at the tokens of one Swin stage, and says what it saw and where it looked.

Windowed attention has no global summary and so no map of what matters in a crop. DAGMaN (section 3.1, figure 1D) adds
two ViT blocks and a [CLS] beside stage 3. It is a side branch: the tokens themselves are read and never changed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.faults import UsageFault


@dataclass(frozen=True, eq=False)
class Attended:
    """What the [CLS] made of the tokens.

    summary   the [CLS] after the last block, layer-normed
    by_head   where the last block's [CLS] looked, per head, float32: softmax over itself and all cells, its own entry
              left out, so that a map sums to a little less than one
    """

    summary: Float[Tensor, "b c"]
    by_head: Float[Tensor, "b head p q r"]

    @property
    def mean(self) -> Float[Tensor, "b p q r"]:
        """The average over the heads: what masks and pictures are made of."""
        return self.by_head.mean(dim=1)


class SemanticAttention(nn.Module):
    """[CLS] and ViT blocks (attention, then MLP, each on layer-normed tokens and added to them) over any grid.

    dim        channels of the tokens; `heads` divide them
    heads, blocks, mlp_ratio   the paper gives two blocks; 8 heads (as stage 3 has) and the ratio 4 are our choice
    There is no position embedding: the tokens of a Swin stage carry their place, and any crop size can be read.
    Raises UsageFault for heads that cannot share the channels and for no blocks.
    """

    def __init__(self, dim: int, *, heads: int = 8, blocks: int = 2, mlp_ratio: float = 4.0):
        super().__init__()
        if heads < 1 or dim % heads:
            raise UsageFault(
                f"{heads} heads of the semantic attention cannot share {dim} channels; choose heads that divide them"
            )
        if blocks < 1:
            raise UsageFault(f"a semantic attention of {blocks} blocks looks at nothing; give one at least")
        self.class_token = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(_Block(dim, heads, mlp_ratio) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        self.apply(_initialise)

    def forward(self, tokens: Float[Tensor, "b c p q r"]) -> Attended:
        """What is seen in each sample and where; the tokens stay as they are."""
        grid = tokens.shape[2:]
        cells = rearrange(tokens, "b c p q r -> b (p q r) c")
        x = torch.cat([self.class_token.to(cells.dtype).expand(len(cells), 1, -1), cells], dim=1)
        *before, last = self.blocks
        for block in before:
            x = block(x)
        summary, weights = last.of_class_token(x)
        return Attended(self.norm(summary), weights[:, :, 1:].unflatten(2, grid))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b token c"]) -> Float[Tensor, "b token c"]:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        looked = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(rearrange(looked, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))

    def of_class_token(
        self, x: Float[Tensor, "b token c"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b head token"]]:
        """Of this block's output the [CLS] alone, which is all that is read of a last block, and its row of attention.

        The softmax is in float32: in bf16 a map of 512 cells would have hardly three digits to sort them by.
        """
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        with torch.autocast(x.device.type, enabled=False):
            logits = (k.float() @ q[:, :, 0].float().unsqueeze(-1)).squeeze(-1)
            weights = (logits / k.shape[-1] ** 0.5).softmax(dim=-1)
        looked = (weights.to(v.dtype).unsqueeze(-2) @ v).squeeze(-2)
        x = x[:, 0] + self.proj(looked.flatten(1))
        return x + self.mlp(self.norm2(x)), weights


def _initialise(module: nn.Module) -> None:
    """As in ViT and DINO: small weights, so that the [CLS] looks everywhere at first."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
