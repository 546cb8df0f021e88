"""Attention among visible cells only, in the packing of spade3d.networks.visible: work follows their share.

Padding at a grid's far end is seen as in the dense encoder, or a mask that hides nothing would change the outputs. Its
cells share one key and one value (a token of zeros makes them), so a neighbourhood sees them as one more key, whose
bias is the log of the sum of the exp of theirs.

A step of an encoder 48 wide with 60 % of 96^3 hidden takes 1.25 s on one core, of our own dense one 3.25 s (2.6 times);
with 75 % hidden 0.75 s; the same ratios at 48^3 and 64^3 (benchmarks/speed/masked_student.py).
"""

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from spade3d.networks import attention_on_cpu
from spade3d.networks.visible import Packing, Tile, cutting
from spade3d.networks.windows import Cells


def attend(
    qkv: Float[Tensor, "slot qkv"],
    table: Float[Tensor, "offset head"],
    packing: Packing,
    window: Cells,
    monai_compatible: bool = False,
) -> Float[Tensor, "slot dim"]:
    """softmax(q k^T / sqrt(dim / heads) + bias) v among the visible cells of each neighbourhood.

    table, window, monai_compatible  the biases of the full window and how a clipped one reads them: see
                                     spade3d.networks.windows.relative_bias

    Exact, gradients of the biases included, in memory of one tile of scores: the backward computes them again.
    What comes out of a slot without a row means nothing.
    """
    places = window if monai_compatible else packing.window
    code = _codes(window, places, prod(packing.window), qkv.device)
    # A pair reads entry `looks - seen` of the biases: the table, then what an empty slot gives (minus infinity), then
    # what each kind of padding gives; of the latter two, one entry for each code of the cell that looks.
    offsets, codes = len(table), len(table) // 2 + 1
    blocks = [table.T, table.new_full((table.shape[1], codes), -torch.inf)]
    if len(packing.padding):
        blocks.append(_padding_bias(table.T, packing, code, codes))
    ends = -offsets - codes * torch.arange(1 + len(packing.padding), device=qkv.device)
    seen = torch.cat((code - (codes - 1), ends))[packing.seen]
    looks, bias = code[packing.looks], torch.cat(blocks, dim=1)
    if attention_on_cpu.takes(qkv):
        return attention_on_cpu.AttendOnCpu.apply(qkv, bias[:, None], _places(packing, looks, seen))
    return _Attend.apply(qkv, bias, looks, seen, packing.tiles)


def _places(packing: Packing, looks: Tensor, seen: Tensor) -> attention_on_cpu.Places:
    """What the kernels of a CPU are told."""
    sizes = [tile.n for tile in packing.tiles for _ in range(tile.neighbourhoods)]
    asks = np.zeros(len(looks), bool)
    asks[packing.slots.numpy()] = True
    return attention_on_cpu.Places(
        rows=np.arange(len(looks)),
        ends=np.cumsum([0, *sizes]),
        asks=asks,
        padding=-1,
        group=np.zeros(len(sizes), np.uint8),
        mask=np.ones((1, 1, 1), bool),
        looks=looks.numpy(),
        seen=seen.numpy(),
    )


@lru_cache(maxsize=64)
def _codes(window: Cells, places: Cells, count: int, device: torch.device) -> Int[Tensor, " place"]:
    """A number for each of the first places of a box: the difference of two, plus that of the full window's last place,
    is the row of the table that the pair reads (see spade3d.networks.windows.relative_position_index).
    """
    with torch.inference_mode(False):
        i, j, k = torch.meshgrid(*map(torch.arange, places), indexing="ij")
        return ((i * (2 * window[1] - 1) + j) * (2 * window[2] - 1) + k).flatten()[:count].to(device)


def _padding_bias(table: Tensor, packing: Packing, code: Tensor, codes: int) -> Float[Tensor, "head entry"]:
    """log sum exp of the biases of each kind's padding, for each cell that looks."""
    # The product sums hundreds of small numbers: not in half precision.
    with torch.autocast(table.device.type, enabled=False):
        peak = table.detach().amax(dim=1, keepdim=True)
        pairs = code[:, None] - code[packing.padded] + codes - 1
        each = (table - peak).exp().index_select(1, pairs.flatten()).view(-1, *pairs.shape)
        total = each @ packing.padding[:, packing.padded].T.to(each.dtype)
        bias = total.clamp(min=torch.finfo(total.dtype).tiny).log() + peak[..., None]
        empty = bias.new_zeros(len(table), codes, len(packing.padding))
        return empty.index_copy(1, code, bias).mT.flatten(1)


class _Attend(torch.autograd.Function):
    """`attend`, piece by piece, with its own backward."""

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, looks: Tensor, seen: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
        heads, work = len(bias), _Work(tiles, len(bias), qkv)
        values = bias.to(qkv.dtype)
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        for tile in tiles:
            table, (into,) = _cut(qkv, tile, 3, heads), _cut(out, tile, 1, heads)
            pairs = work.pairs(tile, looks, seen)
            for piece in work.pieces(tile):
                q, k, v = _read(table, piece)
                weights = work.weights(q, k, values[piece[0]], pairs[piece[1]].flatten())
                _write(into, piece, weights @ v)
        ctx.save_for_backward(qkv, bias, looks, seen, out)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, looks, seen, out = ctx.saved_tensors
        heads, work = len(bias), _Work(ctx.tiles, len(bias), qkv)
        values = bias.to(qkv.dtype)
        grad_qkv = torch.empty_like(qkv)
        exact = torch.promote_types(bias.dtype, torch.float32)  # thousands of neighbourhoods add up here
        grad_bias = torch.zeros_like(bias, dtype=exact)
        # sum over the seen of (weight x its gradient) = output . its gradient (Dao et al. 2022, FlashAttention, B.2)
        balance = (grad * out).unflatten(1, (heads, -1)).sum(dim=-1)
        for tile in ctx.tiles:
            table, grad_table = _cut(qkv, tile, 3, heads), _cut(grad_qkv, tile, 3, heads)
            grad_out, balances = _cut(grad, tile, 1, heads), _cut(balance, tile, 1, heads)
            pairs = work.pairs(tile, looks, seen)
            for piece in work.pieces(tile):
                q, k, v = _read(table, piece)
                (g,), (b,) = _read(grad_out, piece), _read(balances, piece)
                which, places = piece[0], pairs[piece[1]].flatten()
                weights = work.weights(q, k, values[which], places)
                _write(grad_table[2], piece, weights.mT @ g)
                scores = torch.bmm(g, v.mT, out=work.scores(weights.shape)).sub_(b).mul_(weights)
                grad_bias[which].index_add_(1, places, scores.view(-1, len(places)).to(exact))
                _write(grad_table[0], piece, scores @ k, q.shape[-1] ** -0.5)
                _write(grad_table[1], piece, scores.mT @ q, q.shape[-1] ** -0.5)
        return grad_qkv, grad_bias.to(bias.dtype), None, None, None


# Heads and neighbourhoods of a tile that are one batch of matrices.
Piece = tuple[slice, slice]


def _cut(table: Tensor, tile: Tile, parts: int, heads: int) -> Tensor:
    """The slots of a tile, a view: (part, head, neighbourhood, n, dim)."""
    return table[tile.slots].view(tile.neighbourhoods, tile.n, parts, heads, -1).permute(2, 3, 0, 1, 4)


def _read(cut: Tensor, piece: Piece) -> Tensor:
    """(part, head x neighbourhood, n, dim): still a view where only one head or one neighbourhood is read."""
    return cut[:, *piece].flatten(1, 2)


def _write(cut: Tensor, piece: Piece, what: Tensor, factor: float = 1.0) -> None:
    """Into one part of a tile."""
    into = cut[piece]
    torch.mul(what.view(into.shape), factor, out=into)


class _Work:
    """The pieces of tiles, and memory for the scores of one: what an allocator gives anew, the system clears first."""

    def __init__(self, tiles: tuple[Tile, ...], heads: int, like: Tensor):
        self._heads, self._cutting = heads, cutting(like.device)
        pieces = [(tile, piece) for tile in tiles for piece in self.pieces(tile)]
        most = max(
            _count(piece[0], heads) * _count(piece[1], tile.neighbourhoods) * tile.n**2 for tile, piece in pieces
        )
        self._scores, self._weights = like.new_empty(most), like.new_empty(most)
        self._pairs = like.new_empty(max(tile.neighbourhoods * tile.n**2 for tile in tiles), dtype=torch.long)

    def pieces(self, tile: Tile) -> Iterator[Piece]:
        """As many heads as fit, of all neighbourhoods."""
        step = max(1, 4 * self._cutting.scores // (tile.neighbourhoods * tile.n**2))
        return ((slice(head, head + step), slice(None)) for head in range(0, self._heads, step))

    def pairs(self, tile: Tile, looks: Tensor, seen: Tensor) -> Int[Tensor, "neighbourhood n n"]:
        """The entry of the biases that each pair of slots reads."""
        shape = (tile.neighbourhoods, tile.n, tile.n)
        looks, seen = (codes[tile.slots].view(shape[:2]) for codes in (looks, seen))
        return torch.sub(looks[:, :, None], seen[:, None, :], out=self._pairs[: prod(shape)].view(shape))

    def scores(self, shape: torch.Size) -> Tensor:
        return self._scores[: shape.numel()].view(shape)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor, pairs: Tensor) -> Float[Tensor, "matrix n n"]:
        """softmax(q k^T / sqrt(dim) + bias)."""
        n, dim = q.shape[1:]
        scores = self.scores(torch.Size((len(q), n, n)))
        torch.index_select(bias, 1, pairs, out=scores.view(len(bias), -1))
        scores.baddbmm_(q, k.mT, alpha=dim**-0.5)
        return torch.softmax(scores, dim=-1, out=self._weights[: scores.numel()].view_as(scores))


def _count(part: slice, whole: int) -> int:
    return len(range(*part.indices(whole)))
