"""Attention within windows on a CPU as torch knows it: shares of the work, threads, and what autograd is given.

The arithmetic is that of `window_kernels`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spade3d.networks import window_kernels

PARTS = 16  # of the work, at least: whoever computes them, the gradients of the bias add up in the same order


@dataclass(frozen=True, eq=False)
class Places:
    """What the kernels are told of the windows of a grid; see there.

    looks, seen  empty where the bias is of pairs of places
    padding      -1 where no row is
    """

    rows: np.ndarray
    ends: np.ndarray
    asks: np.ndarray
    padding: int
    group: np.ndarray
    mask: np.ndarray
    looks: np.ndarray
    seen: np.ndarray

    def told(self, bias: np.ndarray, shares: int) -> tuple:
        return self.rows, self.ends, self.asks, self.padding, self.group, self.mask, bias, self.looks, self.seen, shares


def attend(qkv: Tensor, bias: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(dim) + bias) v of qkv (row, 3 x head x dim), float32 whatever comes in: (row, head x dim),
    and nothing that means anything in rows that do not look; for the backward, what normalised it (row, head)."""
    heads = len(bias)
    table, shares = _floats(qkv).reshape(len(qkv), 3, heads, -1), _shares(places, heads)
    out = np.zeros((len(table), heads, table.shape[3]), np.float32)
    log_sum = np.empty(out.shape[:2], np.float32)
    _by_parts(window_kernels.attend_parts, heads * shares, table, *places.told(_floats(bias), shares), out, log_sum)
    return torch.from_numpy(out).flatten(1), torch.from_numpy(log_sum)


def backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, places: Places, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and bias, in their own precision; `grad` and `out` have a row for each of qkv."""
    heads = len(bias)
    table, shares = _floats(qkv).reshape(len(qkv), 3, heads, -1), _shares(places, heads)
    rows = (len(table), heads, table.shape[3])
    grad_table = np.zeros_like(table)
    grad_bias = np.zeros((heads * shares, *bias.shape[1:]), np.float32)
    grad_padding = np.zeros((heads * shares, 3, rows[2]), np.float32)
    found = (out.numpy().reshape(rows), log_sum.numpy(), _floats(grad).reshape(rows))
    told = (table, *places.told(_floats(bias), shares), *found)
    _by_parts(window_kernels.backward_parts, heads * shares, *told, grad_table, grad_bias, grad_padding)
    if places.padding >= 0:
        grad_table[places.padding] = grad_padding.reshape(heads, shares, 3, -1).sum(axis=1).swapaxes(0, 1)
    grad_bias = torch.from_numpy(grad_bias).unflatten(0, (heads, shares)).sum(dim=1)
    return torch.from_numpy(grad_table).view_as(qkv).to(qkv.dtype), grad_bias.to(bias.dtype)


class AttendOnCpu(torch.autograd.Function):
    """`attend` as autograd knows it, in the precision of qkv."""

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, places: Places) -> Tensor:
        out, log_sum = attend(qkv, bias, places)
        ctx.save_for_backward(qkv, bias)
        ctx.places, ctx.found = places, (out, log_sum)
        return out.to(qkv.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv, bias = ctx.saved_tensors
        return *backward(grad, qkv, bias, ctx.places, *ctx.found), None


def takes(qkv: Tensor) -> bool:
    """Whether the kernels are for this: not for doubles, which are for those who want to be exact."""
    return qkv.device.type == "cpu" and qkv.dtype != torch.float64


def _floats(tensor: Tensor) -> np.ndarray:
    """As the kernels want it; a view where it is so already."""
    return tensor.detach().float().contiguous().numpy()


def _shares(places: Places, heads: int) -> int:
    """Into how many parts the windows of each head are cut."""
    return min(len(places.ends) - 1, -(-PARTS // heads))


def _by_parts(kernel: Callable[..., None], parts: int, *arguments: object) -> None:
    """Call a kernel with the first and last part of each thread's share, on as many threads as torch may use."""
    threads = min(torch.get_num_threads(), parts)
    if threads == 1:
        kernel(*arguments, 0, parts)
    else:
        cuts = [parts * n // threads for n in range(threads + 1)]
        for done in [_threads(threads, os.getpid()).submit(kernel, *arguments, *cut) for cut in pairwise(cuts)]:
            done.result()


@lru_cache(maxsize=4)
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Of this process: one that was forked has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="windows")
