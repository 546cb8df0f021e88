"""A masked student's step through the encoder: hidden tokens dropped, against computing all of them.

    python benchmarks/speed/masked_student.py

Forward and backward of the Swin encoder, width 48, one crop of 96^3, float32; 60 % of the cells of 16 voxels are
hidden, others in every round. The dense encoders, ours and MONAI's, have the same weights and compute every token (ours
zeroes the hidden ones, MONAI's knows no mask: that is no difference in time). Everybody is given the gradients of the
five outputs, so that no loss is timed. Two networks: MONAI's default, and DAGMaN's (window 4, depths 2-2-8-2). Cost
against size: MONAI's default on crops of three sides.

At window 7 MONAI's makes half a gigabyte of scores at once, and how often the system clears their pages decides: the
curve is timed with the allocator as users have it (see rounds.py), as its goal was set, and crops of 64^3, where both
networks take their turn, a second time with one that keeps what is freed.

`of the products` says how far what is left could go: the time that the matrix products of the visible tokens alone take
at the speed of a large one, over the time taken.
"""

import argparse
import json
import warnings
from dataclasses import dataclass

import torch
from monai.networks.nets.swin_unetr import SwinTransformer as MonaiSwin
from rounds import ROUNDS, as_users_have_it, machine, tabled, timed, written
from torch import Tensor

from spade3d.networks.swin import CORNERS, SwinTransformer
from spade3d.networks.visible import Level, levels

WIDTH, SIDES, CELL = 48, (48, 64, 96), 8  # a cell of 16 voxels is 8 tokens long
KEPT_SIDE = 64
HIDDEN = (0.6, 0.75)


@dataclass(frozen=True)
class Network:
    name: str
    window: int
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)


NETWORKS = (
    Network("MONAI's default: window 7", 7),
    Network("DAGMaN's: window 4, depths 2-2-8-2", 4, (2, 2, 8, 2), (4, 4, 8, 16)),
)


def twins(network: Network) -> tuple[SwinTransformer, MonaiSwin]:
    """Ours and MONAI's, with the same weights."""
    torch.manual_seed(0)
    window, settings = (network.window,) * 3, {"depths": network.depths, "heads": network.heads}
    ours = SwinTransformer(1, WIDTH, window=window, monai_compatible=True, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MonaiSwin(1, WIDTH, window, (2,) * 3, network.depths, network.heads, spatial_dims=3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def hide(share: float, seed: int, side: int) -> Tensor:
    """A token mask (1, i, j, k), of a crop of `side` voxels, that hides so many cells, drawn at random."""
    side = side // 2 // CELL
    order = torch.randperm(side**3, generator=torch.Generator().manual_seed(seed))
    cells = (order < int(share * side**3)).view(1, side, side, side)
    return cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)


def step(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    torch.autograd.backward(outputs, gradients)


def agree(ours: SwinTransformer, theirs: MonaiSwin, x: Tensor) -> None:
    """With nothing hidden, all three are one network."""
    nothing = torch.zeros(1, *(size // 2 for size in x.shape[2:]), dtype=torch.bool)
    with torch.no_grad():
        for dense, packed, monai in zip(ours(x), ours.forward_visible(x, nothing), theirs(x), strict=True):
            assert (dense - monai).abs().max() < 1e-3, "ours and MONAI's differ"
            assert (dense - packed).abs().max() < 1e-3, "packed and dense differ"


def products(network: Network, left: list[Level]) -> dict[str, float]:
    """GFLOP of the matrix products of the visible tokens, forward and backward, nothing computed twice."""
    linear = attention = 0.0
    for stage, (level, depth) in enumerate(zip(left[: len(network.depths)], network.depths, strict=True)):
        rows, dim = len(level.cells), WIDTH * 2**stage
        linear += 3 * 2 * (12 * dim**2 * rows * depth + 16 * dim**2 * level.parent_rows)
        for block in range(depth):
            window, shift = (network.window,) * 3, (network.window // 2 if block % 2 else 0,) * 3
            packing = level.packing(window, shift)
            pairs = sum(tile.neighbourhoods * tile.n**2 for tile in packing.tiles)
            attention += 6 * 2 * dim * pairs
    return {"linear": round(linear / 1e9, 1), "attention": round(attention / 1e9, 1)}


def left_by(network: Network, share: float, side: int) -> list[Level]:
    window, shifts = (network.window,) * 3, ((0,) * 3, (network.window // 2,) * 3)
    return levels(~hide(share, 0, side), [[(window, shift) for shift in shifts]] * 4, CORNERS["v1"])


def measured(network: Network, of: dict, side: int) -> dict:
    """One table, of crops of `side` voxels."""
    x = torch.randn(1, 1, side, side, side, generator=torch.Generator().manual_seed(0))
    ours, theirs = twins(network)
    agree(ours, theirs, x)
    with torch.no_grad():
        gradients = [torch.randn_like(output) for output in ours(x)]
    visible = {
        f"ours, {share:.0%} hidden and dropped": lambda number, share=share: step(
            ours.forward_visible(x, hide(share, number, side)), gradients
        )
        for share in HIDDEN
    }
    dense = {
        "ours, all tokens": lambda number: step(ours(x, hide(HIDDEN[0], number, side)), gradients),
        "MONAI, all tokens": lambda _: step(theirs(x), gradients),
    }
    timings = timed(visible | dense, rounds=ROUNDS)
    weights = sum(parameter.numel() for parameter in ours.parameters())
    moved = 4 * (x.numel() + 3 * weights + 2 * sum(gradient.numel() for gradient in gradients))
    table = tabled(f"{network.name}; {side}^3, forward and backward", timings, moved, of)
    work = products(network, left_by(network, HIDDEN[0], side))
    share = sum(work.values()) / of["gemm_fp32_gflop_per_s"] / (table[0]["ms"] / 1e3)
    print(f"{network.name}: {work} GFLOP left, {share:.0%} of the products\n")
    return {
        "network": network.name,
        "side": side,
        "gflop_left": work,
        "share_of_products": round(share, 3),
        "rows": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve", action="store_true", help=argparse.SUPPRESS)
    asked, of = parser.parse_args(), machine(("spade3d", "monai", "torch"))
    if asked.curve:
        return print(json.dumps([measured(NETWORKS[0], of, side) for side in SIDES]))
    goal = "6 x MONAI's dense encoder at 60 % hidden, same weights, float32"
    result = {"allocator_keeps": [measured(network, of, KEPT_SIDE) for network in NETWORKS]}
    result["curve"] = as_users_have_it(__file__, "--curve")
    written("speed_masked_student", {"goal": goal, "machine": of, **result})


if __name__ == "__main__":
    main()
