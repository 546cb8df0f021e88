"""Attention inside windows of a grid of tokens: which cells share a window, how they look at each other.

A window is a box of `window` cells. A grid that is not a multiple of the window is padded at its far ends; a shifted
grid is rolled, and the windows that the roll filled from both ends let only true neighbours look at each other
(Liu et al. 2021, Swin Transformer). Padding and roll are one index per cell, computed once per grid and kept.

Rows: all tokens of a batch lie in one matrix, sample after sample, followed by one row that stands for padding.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spade3d.networks import attention_on_cpu

Cells = tuple[int, int, int]

# Scores (window x head x n x n) of one tile of the matrix products: of doubles on a CPU, and on an accelerator, which
# wants few large launches.
TILE_SCORES_CPU = 2**19
TILE_SCORES_ACCELERATOR = 2**26

# All of torch's ways but cuDNN's: it takes masks forward and not back, and would give the two different kernels.
FUSED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """How a batch of equal grids falls into windows.

    rows     (window, n): the row of each window's cells, windows of equal mask side by side; `padding` where padded
    padding  the row that stands for padding: samples x cells of the grid
    padded   whether any window holds padding
    holes    where padding lies in `rows`, read row by row: known beforehand, because a GPU would be waited for
    before   how many holes come before each window, and in the end all
    groups   (first window, window after the last, mask): mask (n, n) is True where a cell may look, None everywhere
    """

    rows: Int[Tensor, "window n"]
    padding: int
    padded: bool
    holes: Int[Tensor, " hole"]
    before: tuple[int, ...]
    groups: tuple[tuple[int, int, Bool[Tensor, "n n"] | None], ...]

    def tiles(self, heads: int) -> Iterator[tuple[slice, slice, int]]:
        """(windows, heads, group) of pieces small enough that their scores stay in the cache."""
        scores = TILE_SCORES_CPU if self.rows.device.type == "cpu" else TILE_SCORES_ACCELERATOR
        room = max(1, scores // self.rows.shape[1] ** 2)
        step = max(1, room // heads)
        for group, (start, stop, _) in enumerate(self.groups):
            for first in range(start, stop, step):
                windows = slice(first, min(first + step, stop))
                for head in range(0, heads, room):
                    yield windows, slice(head, min(head + room, heads)), group

    @cached_property
    def places(self) -> attention_on_cpu.Places:
        """The same for the kernels of a CPU."""
        (windows, n), none = self.rows.shape, np.empty(0, np.int64)
        masks, group = [torch.ones(n, n, dtype=torch.bool)], np.zeros(windows, np.uint8)
        for start, stop, mask in self.groups:
            if mask is not None:
                group[start:stop] = len(masks)
                masks.append(mask)
        rows = self.rows.flatten().numpy()
        ends = np.arange(windows + 1) * n
        mask = torch.stack(masks).numpy()
        return attention_on_cpu.Places(rows, ends, rows != self.padding, self.padding, group, mask, none, none)

    def holes_in(self, windows: slice) -> Int[Tensor, " hole"]:
        """Where padding lies in the rows of some windows, flattened."""
        some = self.holes[self.before[windows.start] : self.before[windows.stop]]
        return some - windows.start * self.rows.shape[1]


def clip_window(grid: Cells, window: Cells, shift: Cells) -> tuple[Cells, Cells]:
    """The window and shift a grid can hold: along an axis not longer than the window, all of it and no shift."""
    clipped = tuple(min(size, side) for size, side in zip(grid, window))
    shifts = tuple(0 if size <= side else by for size, side, by in zip(grid, window, shift))
    return clipped, shifts


@lru_cache(maxsize=64)
def window_plan(grid: Cells, window: Cells, shift: Cells, samples: int, device: torch.device) -> WindowPlan:
    """The plan for `samples` grids; window and shift as `clip_window` gives them."""
    # A plan made first in a validation step must still serve the backward of a training step.
    with torch.inference_mode(False):
        padded = [-(-size // side) * side for size, side in zip(grid, window)]
        axes = [(torch.arange(whole) + by) % whole for whole, by in zip(padded, shift)]
        inside = [axis < size for axis, size in zip(axes, grid)]
        i, j, k = torch.meshgrid(*axes, indexing="ij")
        cell = (i * grid[1] + j) * grid[2] + k
        real = torch.stack(torch.meshgrid(*inside, indexing="ij")).all(dim=0)
        cell = _partition(torch.where(real, cell, -1), window)

        # Only the last window along a shifted axis was filled from both ends: eight kinds of mask at most.
        counts = [whole // side for whole, side in zip(padded, window)]
        last = [(torch.arange(count) == count - 1) & (by > 0) for count, by in zip(counts, shift)]
        kind = sum(bit << place for place, bit in enumerate(torch.meshgrid(*last, indexing="ij"))).flatten()
        order = kind.argsort(stable=True)
        kinds, sizes = kind[order].unique_consecutive(return_counts=True)

        cells = prod(grid)
        padding = samples * cells
        first = torch.arange(samples)[None, :, None] * cells
        sorted_cells = cell[order][:, None]
        rows = torch.where(sorted_cells >= 0, sorted_cells + first, padding).reshape(-1, prod(window))
        hole = rows == padding
        before = (0, *hole.sum(dim=1).cumsum(dim=0).tolist())
        holes = hole.flatten().nonzero()[:, 0]

        groups, start = [], 0
        for which, size in zip(kinds.tolist(), (sizes * samples).tolist()):
            groups.append((start, start + size, _mask(which, window, shift, device)))
            start += size
        return WindowPlan(rows.to(device), padding, before[-1] > 0, holes.to(device), before, tuple(groups))


def _partition(grid: Int[Tensor, "i j k"], window: Cells) -> Int[Tensor, "window n"]:
    """Cut a padded grid into windows, both in row-major order."""
    i, j, k = (size // side for size, side in zip(grid.shape, window))
    boxes = grid.reshape(i, window[0], j, window[1], k, window[2])
    return boxes.permute(0, 2, 4, 1, 3, 5).reshape(i * j * k, prod(window))


def _mask(kind: int, window: Cells, shift: Cells, device: torch.device) -> Bool[Tensor, "n n"] | None:
    """Who may look at whom in a window filled from both ends along the axes whose bit is set in `kind`."""
    if kind == 0:
        return None
    wrapped = [
        (torch.arange(side) >= side - by) if kind >> axis & 1 else torch.zeros(side, dtype=torch.bool)
        for axis, (side, by) in enumerate(zip(window, shift))
    ]
    side_of = torch.stack(torch.meshgrid(*wrapped, indexing="ij")).reshape(3, -1)
    return (side_of[:, :, None] == side_of[:, None, :]).all(dim=0).to(device)


def relative_position_index(window: Cells) -> Int[Tensor, "n n"]:
    """The row of the bias table that each pair of cells (looks, is seen) of a full window reads.

    Row-major over the offset `looks - is seen`, each axis counted from -(window - 1).
    """
    places = torch.stack(torch.meshgrid(*map(torch.arange, window), indexing="ij")).reshape(3, -1)
    offset = places[:, :, None] - places[:, None, :] + torch.tensor(window)[:, None, None] - 1
    return (offset[0] * (2 * window[1] - 1) + offset[1]) * (2 * window[2] - 1) + offset[2]


def relative_bias(
    table: Float[Tensor, "offset head"], window: Cells, clipped: Cells, monai_compatible: bool
) -> Float[Tensor, "head n n"]:
    """The bias of every pair of cells of a clipped window, read from the table of the full one.

    Equals `table[relative_position_index(window)]` for a full window, but the table unrolls by sliding views, whose
    gradient adds up in a fixed order on any number of threads (that of an index does not).
    MONAI reads a clipped window of n cells through the first n rows and columns of the full window's index, which are
    other pairs' offsets; `monai_compatible` does the same, for weights that were trained so.
    """
    if monai_compatible and clipped != window:
        cells = prod(clipped)
        return relative_bias(table, window, window, False)[:, :cells, :cells]
    offsets = table.T.reshape(-1, *(2 * side - 1 for side in window))
    for axis, (side, size) in enumerate(zip(window, clipped), start=1):
        offsets = offsets.narrow(axis, side - size, 2 * size - 1).unfold(axis, size, 1)
    # unfold gives [looks, m] -> offset looks + m, and m counts back from the cell that is seen.
    return offsets.flip(4, 5, 6).reshape(-1, prod(clipped), prod(clipped))


def attend(
    qkv: Float[Tensor, "row qkv"], bias: Float[Tensor, "head n n"], grid: Cells, window: Cells, shift: Cells
) -> Float[Tensor, "row-1 dim"]:
    """softmax(q k^T / sqrt(dim / heads) + bias) v within every window; rows in, rows out, the padding row dropped.

    window, shift  as `clip_window` gives them for the grid, of which the rows hold as many as fit

    Exact, gradients of the bias included, in memory of one tile of scores: the backward computes them again. To
    torch.compile it is one operation, spade3d::window_attention.
    """
    out, _ = torch.ops.spade3d.window_attention(qkv, bias, grid, window, shift)
    return out[:-1].to(qkv.dtype)


def _attention(
    qkv: Tensor, bias: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`attend` with its padding row, in float32 where the kernels of a CPU compute it; and what they normalised by."""
    plan = _plan_of(qkv, grid, window, shift)
    if attention_on_cpu.takes(qkv):
        return attention_on_cpu.attend(qkv, bias, plan.places)
    attended = _attended_fused if fused(qkv) else _attended
    return attended(qkv, bias, plan), qkv.new_empty(0)


def _attention_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    out: Tensor,
    log_sum: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and bias."""
    plan = _plan_of(qkv, grid, window, shift)
    if attention_on_cpu.takes(qkv):
        return attention_on_cpu.backward(grad, qkv, bias, plan.places, out, log_sum)
    return _backward_fused(grad, qkv, bias, plan) if fused(qkv) else _backward(grad, qkv, bias, plan, out)


def fused(qkv: Tensor) -> bool:
    """Whether torch's `scaled_dot_product_attention` computes this: on a GPU, which has no kernel of it for doubles.
    Else the products are made one by one."""
    return qkv.device.type == "cuda" and qkv.dtype != torch.float64


def _like_attention(qkv, bias, grid, window, shift):
    on_cpu = attention_on_cpu.takes(qkv)
    out = qkv.new_empty(len(qkv), qkv.shape[1] // 3, dtype=torch.float32 if on_cpu else qkv.dtype)
    return out, out.new_empty(len(qkv), len(bias)) if on_cpu else out.new_empty(0)


def _like_gradients(grad, qkv, bias, out, log_sum, grid, window, shift):
    return torch.empty_like(qkv), torch.empty_like(bias)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, *ctx.where = inputs
    ctx.save_for_backward(qkv, bias, *output)


def _differentiated(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.spade3d.window_attention_backward(grad, *ctx.saved_tensors, *ctx.where)
    return *found, None, None, None


# What torch knows of both. (torch.library.custom_op says the same, and loads the compiler with the first call.)
_LIBRARY = torch.library.Library("spade3d", "DEF")
_WHERE = "int[] grid, int[] window, int[] shift"
_SAVED = "Tensor qkv, Tensor bias, Tensor out, Tensor log_sum"
_LIBRARY.define(f"window_attention(Tensor qkv, Tensor bias, {_WHERE}) -> (Tensor, Tensor)")
_LIBRARY.define(f"window_attention_backward(Tensor grad, {_SAVED}, {_WHERE}) -> (Tensor, Tensor)")
_LIBRARY.impl("window_attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("window_attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("spade3d::window_attention", _like_attention, lib=_LIBRARY)
torch.library.register_fake("spade3d::window_attention_backward", _like_gradients, lib=_LIBRARY)
torch.library.register_autograd("spade3d::window_attention", _differentiated, setup_context=_keep, lib=_LIBRARY)


def _plan_of(qkv: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> WindowPlan:
    return window_plan(tuple(grid), tuple(window), tuple(shift), (len(qkv) - 1) // prod(grid), qkv.device)


def attention_weights(
    qkv: Float[Tensor, "row qkv"], bias: Float[Tensor, "head n n"], plan: WindowPlan
) -> Float[Tensor, "window head n n"]:
    """The softmax that `attend` does not keep, for every window of the plan; each row sums to one."""
    heads = bias.shape[0]
    table = qkv.view(qkv.shape[0], 3, heads, -1)
    weights = []
    for start, stop, mask in plan.groups:
        q, k, _ = _read(table, plan.rows[start:stop], slice(0, heads))
        weights.append(_weights(q, k, _masked(bias, mask)).unflatten(0, (-1, heads)))
    return torch.cat(weights)


def _attended(qkv: Tensor, bias: Tensor, plan: WindowPlan) -> Tensor:
    """`attend` with its padding row, tile by tile.

    Within a tile a vector is a column, (dim, n): with the 8 channels a head of feature_size 24, (dim, n) @ (n, n) runs
    three times as fast on a CPU as (n, n) @ (n, dim); with 16, as fast.
    """
    heads = bias.shape[0]
    bias = bias.to(qkv.dtype)
    table = qkv.view(qkv.shape[0], 3, heads, -1)
    out = torch.zeros_like(table[:, 0])
    masked = [_masked(bias, mask) for _, _, mask in plan.groups]
    with torch.autocast(qkv.device.type, enabled=False):  # else its softmax writes float32, to be cast back
        for windows, which, group in plan.tiles(heads):
            rows = plan.rows[windows]
            q, k, v = _read(table, rows, which)
            _write(out[:, None], rows, which, (v @ _weights(q, k, masked[group][which]).mT)[None])
    out[plan.padding] = 0
    return out.flatten(1)


def _backward(grad: Tensor, qkv: Tensor, bias: Tensor, plan: WindowPlan, out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and bias, tile by tile."""
    heads, given = len(bias), bias.dtype
    bias = bias.to(qkv.dtype)
    table = qkv.view(qkv.shape[0], 3, heads, -1)
    grad, out = (rows.reshape(len(rows), heads, -1) for rows in (grad, out))
    # sum over the seen of (weight x its gradient) = output . its gradient (Dao et al. 2022, FlashAttention, B.2)
    balance = (grad * out).sum(dim=-1)[:, None, :, None]
    grad, dim = grad[:, None], out.shape[2]
    grad_table = torch.zeros_like(table)
    grad_padding = torch.zeros_like(table[0])
    exact = torch.promote_types(bias.dtype, torch.float32)  # thousands of windows add up here
    grad_bias = torch.zeros_like(bias, dtype=exact)
    masked = [_masked(bias, mask) for _, _, mask in plan.groups]
    with torch.autocast(qkv.device.type, enabled=False):
        for windows, which, group in plan.tiles(heads):
            rows = plan.rows[windows]
            q, k, v = _read(table, rows, which)
            (g,), (b,) = _read(grad, rows, which), _read(balance, rows, which)
            weights = _weights(q, k, masked[group][which])
            grad_v = g @ weights
            grad_scores = (g.mT @ v).sub_(b.mT).mul_(weights)
            grad_bias[which] += grad_scores.unflatten(0, (len(rows), -1)).sum(dim=0, dtype=exact)
            grad_q = (k @ grad_scores.mT).mul_(dim**-0.5)
            grad_k = (q @ grad_scores).mul_(dim**-0.5)
            tile = _write(grad_table, rows, which, torch.stack((grad_q, grad_k, grad_v)))
            if plan.padded:  # the one row that many places read: its gradients add up
                grad_padding[:, which] += tile.index_select(0, plan.holes_in(windows)).sum(dim=0)
    grad_table[plan.padding] = grad_padding
    return grad_table.view_as(qkv), grad_bias.to(given)


def _attended_fused(qkv: Tensor, bias: Tensor, plan: WindowPlan) -> Tensor:
    """`_attended` by torch's own kernel, which keeps no scores; its mask: the bias, -inf where nobody looks."""
    heads = len(bias)
    table = qkv.view(len(qkv), 3, heads, -1)
    out = torch.zeros_like(table[:, 0])
    masked = [_masked(bias.to(qkv.dtype), mask) for _, _, mask in plan.groups]
    with torch.autocast(qkv.device.type, enabled=False):
        for windows, which, group in plan.tiles(heads):
            rows = plan.rows[windows]
            q, k, v = _gathered(table, rows, which)
            with sdpa_kernel(FUSED):
                found = F.scaled_dot_product_attention(q, k, v, attn_mask=masked[group][None, which])
            out[:, which].index_copy_(0, rows.flatten(), found.transpose(1, 2).flatten(0, 1))
    out[plan.padding] = 0
    return out.flatten(1)


def _backward_fused(grad: Tensor, qkv: Tensor, bias: Tensor, plan: WindowPlan) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and bias, tile by tile: each is attended to once more, and torch's kernel goes back."""
    heads, given = len(bias), bias.dtype
    table = qkv.view(len(qkv), 3, heads, -1)
    grad = grad.reshape(len(grad), 1, heads, -1)
    grad_table, grad_padding = torch.zeros_like(table), torch.zeros_like(table[0])
    grad_bias = torch.zeros_like(bias, dtype=torch.promote_types(given, torch.float32))  # thousands of windows add up
    masked = [_masked(bias.to(qkv.dtype), mask) for _, _, mask in plan.groups]
    with torch.autocast(qkv.device.type, enabled=False):
        for windows, which, group in plan.tiles(heads):
            rows = plan.rows[windows]
            (wanted,) = _gathered(grad, rows, which)
            tile = _gathered(table, rows, which).detach().requires_grad_()
            mask = masked[group][None, which].detach().requires_grad_()
            with torch.enable_grad(), _autograd(), sdpa_kernel(FUSED):
                found = F.scaled_dot_product_attention(*tile, attn_mask=mask)
                grad_tile, (grad_mask,) = torch.autograd.grad(found, (tile, mask), wanted)
            grad_bias[which] += grad_mask
            flat = grad_tile.permute(1, 3, 0, 2, 4).flatten(0, 1)
            grad_table[:, :, which].index_copy_(0, rows.flatten(), flat)
            if plan.padded:  # as in `_backward`
                grad_padding[:, which] += flat.index_select(0, plan.holes_in(windows)).sum(dim=0)
    grad_table[plan.padding] = grad_padding
    return grad_table.view_as(qkv), grad_bias.to(given)


def _autograd() -> AbstractContextManager:
    """Autograd within an operation, which torch calls without it where it is watched, as by a counter of operations."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def _gathered(table: Tensor, rows: Tensor, heads: slice) -> Tensor:
    """Some rows and heads of (row, part, head, dim): (part, window, head, n, dim)."""
    return table[:, :, heads][rows.flatten()].unflatten(0, rows.shape).permute(2, 0, 3, 1, 4)


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(dim) + bias), (window x head, n, n), of columns q and k (window x head, dim, n)."""
    scores = q.mT @ (k * k.shape[1] ** -0.5)
    scores.view(-1, *bias.shape).add_(bias)
    return scores.softmax(dim=-1)


def _masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _read(table: Tensor, rows: Tensor, heads: slice) -> Tensor:
    """Some rows and heads of (row, part, head, dim) as columns: (part, window x head, dim, n)."""
    tile = table[:, :, heads][rows.flatten()].unflatten(0, rows.shape)
    return tile.permute(2, 0, 3, 4, 1).flatten(1, 2)


def _write(table: Tensor, rows: Tensor, heads: slice, tile: Tensor) -> Tensor:
    """The opposite of `_read`; also gives what was written, (window x n, part, head, dim)."""
    flat = tile.unflatten(1, (len(rows), -1)).permute(1, 4, 0, 2, 3).flatten(0, 1)
    table[:, :, heads].index_copy_(0, rows.flatten(), flat)
    return flat
