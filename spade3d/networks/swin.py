"""The encoder: a 3-D Swin transformer of four stages (Liu et al. 2021), its parameters named as in MONAI's SwinUNETR.

Between layers the tokens are a grid with channels last, (b, i, j, k, c). A grid is never refused: patches and mergings
pad odd sizes by zeros at the far end, so that stage s has ceil(size / 2**(s + 1)) cells of 2**(s + 1) voxels.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spade3d.faults import UsageFault
from spade3d.networks import packed, visible, windows
from spade3d.networks.convolutions import residual_layer
from spade3d.networks.visible import Level
from spade3d.networks.windows import Cells
from spade3d.training import ranks

Merging = Literal["v1", "v2"]

# In which order a merging joins the corners (i, j, k) of a 2^3 block: MONAI's "merging" and its "mergingv2". Weights
# trained with one are wrong in the other, and no shape tells.
CORNERS: dict[str, tuple[Cells, ...]] = {
    "v1": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "v2": ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)),
}


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Where one block looked.

    weights  each row (a cell that looks) sums to one over the cells of its window, padding included
    cells    the cell of the flattened grid at each place of each window, -1 for padding
    grid     cells along i, j, k
    """

    weights: Float[Tensor, "b window head n n"]
    cells: Int[Tensor, "window n"]
    grid: Cells

    def received(self) -> Float[Tensor, "b head i j k"]:
        """The attention that each cell gets, averaged over the real cells of its window."""
        real = self.cells >= 0
        looks = self.weights * real[None, :, None, :, None]
        given = looks.sum(dim=3) / real.sum(dim=1)[None, :, None, None]
        b, _, heads, _ = given.shape
        many = self.grid[0] * self.grid[1] * self.grid[2]
        # What pads a window goes to a place beyond the grid: choosing the real cells would wait for the device.
        place = torch.where(real, self.cells, many).flatten()
        onto = given.new_zeros(b, heads, many + 1).index_copy(2, place, given.transpose(1, 2).flatten(2))
        return onto[:, :, :many].unflatten(2, self.grid)


class SwinTransformer(nn.Module):
    """Patch embedding and four stages of windowed attention, each ending in a merging that halves the grid.

    in_channels, embed_dim   channels of the image; of the tokens at stage 0 (stage s has embed_dim * 2**s)
    depths, heads            blocks and attention heads of each of the four stages; every second block is shifted
    window, patch            cells of a window; voxels of a patch, along i, j, k
    drop_path                chance that a sample skips the last block (stochastic depth), linear from 0 at the first
    use_v2                   a residual convolution block before every stage (SwinUNETR-V2)
    merging                  "v1" (MONAI's "merging") or "v2" ("mergingv2"): the order of corners
    monai_compatible         read the bias of a window that the grid clips as MONAI does (see windows.relative_bias)
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        *,
        depths: tuple[int, int, int, int] = (2, 2, 2, 2),
        heads: tuple[int, int, int, int] = (3, 6, 12, 24),
        window: Cells = (7, 7, 7),
        patch: Cells = (2, 2, 2),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        use_v2: bool = False,
        merging: Merging = "v1",
        monai_compatible: bool = False,
    ):
        super().__init__()
        for stage, count in enumerate(heads):
            if embed_dim * 2**stage % count:
                raise UsageFault(
                    f"{count} heads cannot share the {embed_dim * 2**stage} channels of stage {stage + 1}; "
                    "choose a width that the heads of every stage divide"
                )
        self.patch_embed = _PatchEmbedding(in_channels, embed_dim, patch)
        drops = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            dim = embed_dim * 2**stage
            blocks = [
                _Block(dim, count, window, index % 2 == 1, mlp_ratio, qkv_bias, next(drops), monai_compatible)
                for index in range(depth)
            ]
            self.add_module(f"layers{stage + 1}", nn.ModuleList([_Stage(dim, blocks, merging)]))
            if use_v2:
                self.add_module(f"layers{stage + 1}c", nn.ModuleList([residual_layer(dim, dim)]))

    def forward(
        self,
        x: Float[Tensor, "b c i j k"],
        token_mask: Bool[Tensor, "b p q r"] | None = None,
        normalize: bool = True,
        mask_token: Float[Tensor, " embed"] | None = None,
    ) -> list[Float[Tensor, "b _ _ _ _"]]:
        """The tokens after the patch embedding and after each stage, channels first, five in all.

        token_mask  True where a token is hidden: its embedding becomes `mask_token`, or zero
        normalize   layer-norm every output over its channels (without weights); what flows on is not normed
        """
        tokens = self._embed(x, token_mask, mask_token)
        outputs = [tokens]
        for stage in range(1, 5):
            tokens = self._stage(stage)(self._before(stage, tokens))
            outputs.append(tokens)
        if normalize:
            outputs = [F.layer_norm(output, output.shape[-1:]) for output in outputs]
        return [rearrange(output, "b i j k c -> b c i j k") for output in outputs]

    def forward_visible(
        self,
        x: Float[Tensor, "b c i j k"],
        token_mask: Bool[Tensor, "b p q r"],
        normalize: bool = True,
    ) -> list[Float[Tensor, "b _ _ _ _"]]:
        """`forward`, but hidden tokens are dropped: nobody looks at them, and nothing is computed for them.

        A merging takes a hidden corner for zeros; a cell without any visible token is hidden, and zero in the outputs.
        With nothing hidden it equals `forward`. Any mask will do, but time follows the visible share only where the
        hidden tokens lie together, in boxes that are not much smaller than a window.
        """
        self._check_visible(x, token_mask)
        stages = [self._stage(stage) for stage in range(1, 5)]
        settings = [stage.attention_settings() for stage in stages]
        levels = visible.levels(~token_mask, settings, stages[0].downsample.corners)
        rows = self.patch_embed.visible(x, levels[0])
        outputs = [rows]
        for stage, level in zip(stages, levels):
            rows = stage.visible(rows, level)
            outputs.append(rows)
        if normalize:
            outputs = [F.layer_norm(output, output.shape[-1:]) for output in outputs]
        return [
            rearrange(level.spread(output), "b i j k c -> b c i j k")
            for level, output in zip(levels, outputs, strict=True)
        ]

    def _check_visible(self, x: Tensor, token_mask: Tensor) -> None:
        if hasattr(self, "layers1c"):
            raise UsageFault(
                "a convolution before every stage (use_v2) needs the hidden tokens too; "
                "mask them with forward(token_mask), or build the encoder without use_v2"
            )
        grid = tuple(-(-size // side) for size, side in zip(x.shape[2:], self.patch_embed.patch))
        if tuple(token_mask.shape) != (len(x), *grid):
            raise UsageFault(
                f"a token mask of {tuple(token_mask.shape)} for {len(x)} images of {tuple(x.shape[2:])} voxels; "
                f"it needs one entry for each token, {(len(x), *grid)}"
            )

    @torch.no_grad()
    def attention_maps(
        self,
        x: Float[Tensor, "b c i j k"],
        stage: int,
        token_mask: Bool[Tensor, "b p q r"] | None = None,
        mask_token: Float[Tensor, " embed"] | None = None,
    ) -> list[AttentionMap]:
        """Where each block of a stage (1 to 4) looks, per head. All windows at once: n^2 numbers a window and head."""
        tokens = self._embed(x, token_mask, mask_token)
        for before in range(1, stage):
            tokens = self._stage(before)(self._before(before, tokens))
        tokens = self._before(stage, tokens)
        maps = []
        for block in self._stage(stage).blocks:
            maps.append(block.attention_map(tokens))
            tokens = block(tokens)
        return maps

    def _embed(self, x: Tensor, token_mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
        tokens = self.patch_embed(x)
        if token_mask is None:
            return tokens
        shown = tokens.new_zeros(()) if mask_token is None else mask_token.to(tokens.dtype)
        return torch.where(token_mask[..., None], shown, tokens)

    def _stage(self, stage: int) -> "_Stage":
        return self.get_submodule(f"layers{stage}.0")

    def _before(self, stage: int, tokens: Tensor) -> Tensor:
        """The residual convolution before a stage, where there is one."""
        if not hasattr(self, f"layers{stage}c"):
            return tokens
        convolution = self.get_submodule(f"layers{stage}c.0")
        return rearrange(
            convolution(rearrange(tokens, "b i j k c -> b c i j k").contiguous()), "b c i j k -> b i j k c"
        ).contiguous()


def compile_encoders(module: nn.Module) -> None:
    """Let torch.compile make one graph of every encoder within a module, in place: names and weights stay.

    Without breaks, attention being one operation (windows.attend), and anew for each shape of a batch, with and without
    gradients and hidden tokens; 64 such variants at most. What drops hidden tokens (`forward_visible`) is not compiled:
    its shapes follow the mask. Meant for GPUs: on a CPU it takes minutes and gains nothing (docs/log.md).
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    print("note: encoders are compiled as they are first used; the first steps take minutes", file=sys.stderr)
    for one in module.modules():
        if isinstance(one, SwinTransformer):
            one.compile(fullgraph=True, dynamic=False)


class _PatchEmbedding(nn.Module):
    """Each patch of voxels becomes one token. A strided convolution, computed as the matrix product that it is."""

    def __init__(self, in_channels: int, embed_dim: int, patch: Cells):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel_size=patch, stride=patch)

    def forward(self, x: Float[Tensor, "b c i j k"]) -> Float[Tensor, "b p q r embed"]:
        return F.linear(self._patches(x), self.proj.weight.flatten(1), self.proj.bias)

    def visible(self, x: Float[Tensor, "b c i j k"], level: Level) -> Float[Tensor, "row embed"]:
        return F.linear(level.pick(self._patches(x)), self.proj.weight.flatten(1), self.proj.bias)

    def _patches(self, x: Float[Tensor, "b c i j k"]) -> Float[Tensor, "b p q r voxel"]:
        p, q, r = self.patch
        i, j, k = (-size % side for size, side in zip(x.shape[2:], self.patch))
        x = F.pad(x, (0, k, 0, j, 0, i))
        return rearrange(x, "b c (i p) (j q) (k r) -> b i j k (c p q r)", p=p, q=q, r=r)


class _Stage(nn.Module):
    """Blocks, then the merging."""

    def __init__(self, dim: int, blocks: list["_Block"], merging: Merging):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = _Merging(dim, merging)

    def forward(self, x: Float[Tensor, "b i j k c"]) -> Float[Tensor, "b p q r 2*c"]:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)

    def visible(self, x: Float[Tensor, "row c"], level: Level) -> Float[Tensor, "parent 2*c"]:
        for block in self.blocks:
            x = block.visible(x, level)
        return self.downsample.visible(x, level)

    def attention_settings(self) -> list[tuple[Cells, Cells]]:
        """The window and shift of each block."""
        return [(block.attn.window, block.shift) for block in self.blocks]


class _Merging(nn.Module):
    """2^3 neighbours become one token of twice the channels."""

    def __init__(self, dim: int, merging: Merging):
        super().__init__()
        self.corners = CORNERS[merging]
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, x: Float[Tensor, "b i j k c"]) -> Float[Tensor, "b p q r 2*c"]:
        i, j, k = (size % 2 for size in x.shape[1:4])
        x = F.pad(x, (0, 0, 0, k, 0, j, 0, i))
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.corners], dim=-1)))

    def visible(self, x: Float[Tensor, "row c"], level: Level) -> Float[Tensor, "parent 2*c"]:
        return self.reduction(self.norm(level.merge(x)))


class _Block(nn.Module):
    """Attention within windows, then an MLP, each on the layer-normed tokens and added to them."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Cells,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        monai_compatible: bool,
    ):
        super().__init__()
        self.shift = tuple(side // 2 if shifted else 0 for side in window)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _WindowAttention(dim, heads, window, qkv_bias, monai_compatible)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b i j k c"]) -> Float[Tensor, "b i j k c"]:
        x = x + self._drop(self.attn(self.norm1(x), self.shift))
        return x + self._drop(self.mlp(self.norm2(x)))

    def visible(self, x: Float[Tensor, "row c"], level: Level) -> Float[Tensor, "row c"]:
        x = x + self._drop_rows(self.attn.visible(self.norm1(x), self.shift, level), level)
        return x + self._drop_rows(self.mlp(self.norm2(x)), level)

    def attention_map(self, x: Float[Tensor, "b i j k c"]) -> AttentionMap:
        return self.attn.map(self.norm1(x), self.shift)

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: a sample's branch is left out, and the others are scaled so that the mean stays."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * _kept(x, len(x), keep)[:, None, None, None, None] / keep

    def _drop_rows(self, x: Tensor, level: Level) -> Tensor:
        """`_drop`, by the same draws."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * _kept(x, level.samples, keep)[level.samples_of_rows(), None] / keep


def _kept(like: Tensor, samples: int, keep: float) -> Float[Tensor, " sample"]:
    """1 for each sample that keeps its block, by the chance `keep`, else 0. All ranks of a run draw for the whole batch
    and keep their own part: the same draws for every part would make as many samples share a fate as there are ranks.
    """
    return ranks.own(like.new_empty(samples * ranks.world()).bernoulli_(keep))


class _WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for each offset between two cells.

    `relative_position_index` follows from the window; it is stored because MONAI's state dict holds it.
    """

    def __init__(self, dim: int, heads: int, window: Cells, qkv_bias: bool, monai_compatible: bool):
        super().__init__()
        self.window = window
        self.monai_compatible = monai_compatible
        i, j, k = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * i - 1) * (2 * j - 1) * (2 * k - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", windows.relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b i j k c"], shift: Cells) -> Float[Tensor, "b i j k c"]:
        return self.proj(windows.attend(*self._prepare(x, shift))).view(x.shape)

    def visible(self, x: Float[Tensor, "row c"], shift: Cells, level: Level) -> Float[Tensor, "row c"]:
        packing = level.packing(self.window, shift)
        table = self.relative_position_bias_table
        out = packed.attend(self.qkv(packing.lay(x)), table, packing, self.window, self.monai_compatible)
        return self.proj(packing.lift(out))

    def map(self, x: Float[Tensor, "b i j k c"], shift: Cells) -> AttentionMap:
        qkv, bias, grid, window, shift = self._prepare(x, shift)
        samples = x.shape[0]
        plan = windows.window_plan(grid, window, shift, samples, x.device)
        weights = rearrange(windows.attention_weights(qkv, bias, plan), "(w b) h n m -> b w h n m", b=samples)
        cells = plan.rows[::samples]  # of the first sample
        return AttentionMap(weights, cells.masked_fill(cells == plan.padding, -1), grid)

    def _prepare(self, x: Tensor, shift: Cells) -> tuple[Tensor, Tensor, Cells, Cells, Cells]:
        """What `windows.attend` is given."""
        grid = tuple(x.shape[1:4])
        clipped, shift = windows.clip_window(grid, self.window, shift)
        bias = windows.relative_bias(self.relative_position_bias_table, self.window, clipped, self.monai_compatible)
        # Padding is a token of zeros, so its query, key and value are the bias of qkv: one more row.
        return self.qkv(F.pad(x.flatten(0, 3), (0, 0, 0, 1))), bias, grid, clipped, shift


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*grid c"]) -> Float[Tensor, "*grid c"]:
        return self.linear2(F.gelu(self.linear1(x)))
