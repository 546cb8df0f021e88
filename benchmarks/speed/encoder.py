"""The Swin encoder, 48 wide, window 7: training, inference and peak memory, against MONAI's with the same weights.

    python benchmarks/speed/encoder.py

One crop, float32, one thread. Outputs and the gradients of all parameters are equal to 1e-3 before anything is timed;
everybody is given the gradients of the five outputs, so that no loss is timed. Cost against size: crops of three sizes.

Timed in a process with the allocator as users have it: there the system clears the pages of MONAI's half a gigabyte of
scores anew in every block, and that is part of what its training costs. The goals were measured so. Crops of 64^3 are
timed a second time with the allocator of the other scripts, which keeps what is freed (see rounds.py). Peak memory is
that of a process that makes one step of one network, with the allocator as users have it; both processes import both
packages, and what they hold before the step is given beside it.

bf16 is timed where the gradients that this CPU computes in it are right: less than 5 % (by norm) from float32. Of the
largest crop it is held against MONAI's in float32, which takes no longer than its bf16 there (training 10.6 s and 10.9,
inference 5.1 and 5.7).
"""

import argparse
import json
import warnings

import torch
from monai.networks.nets.swin_unetr import SwinTransformer as MonaiSwin
from rounds import ROUNDS, as_users_have_it, machine, most_held_mib, tabled, timed, written
from torch import Tensor

from spade3d.networks.swin import SwinTransformer

WIDTH, WINDOW, SIDES, KEPT_SIDE = 48, 7, (48, 64, 96), 64
DEPTHS, HEADS = (2, 2, 2, 2), (3, 6, 12, 24)
BF16_ERROR = 0.05  # of the gradients, by norm, at most
OURS, MONAI = "ours", "MONAI"
TRAINING, INFERENCE = "training", "inference"


def twins() -> dict[str, SwinTransformer | MonaiSwin]:
    """Ours and MONAI's, with the same weights."""
    torch.manual_seed(0)
    ours = SwinTransformer(1, WIDTH, depths=DEPTHS, heads=HEADS, window=(WINDOW,) * 3, monai_compatible=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MonaiSwin(1, WIDTH, (WINDOW,) * 3, (2,) * 3, DEPTHS, HEADS, spatial_dims=3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return {OURS: ours, MONAI: theirs}


def crop(side: int) -> Tensor:
    return torch.randn(1, 1, side, side, side, generator=torch.Generator().manual_seed(0))


def gradients_for(side: int) -> list[Tensor]:
    """Of the five outputs."""
    chance = torch.Generator().manual_seed(1)
    sides = [-(-side // 2**level) for level in range(1, 6)]
    return [torch.randn(1, WIDTH * 2**s, *(n,) * 3, generator=chance) for s, n in enumerate(sides)]


def train(network, x: Tensor, gradients: list[Tensor], bf16: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = network(x)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)])
    return outputs


def infer(network, x: Tensor, bf16: bool = False) -> list[Tensor]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return network(x)


def learned(network, x: Tensor, gradients: list[Tensor], bf16: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradient of each parameter."""
    network.zero_grad()
    outputs = [output.detach().float() for output in train(network, x, gradients, bf16)]
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    return outputs, found


def agree(networks, x: Tensor, gradients: list[Tensor]) -> dict[str, float]:
    """The largest difference of outputs, and of gradients as a share of the largest gradient of that parameter."""
    (ours, our_gradients), (theirs, their_gradients) = (learned(networks[who], x, gradients) for who in (OURS, MONAI))
    outputs = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    pairs = zip(our_gradients, their_gradients, strict=True)
    shares = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    assert outputs < 1e-3 and shares < 1e-3, f"outputs {outputs:g} apart, gradients {shares:g}"
    return {"outputs": float(f"{outputs:.2g}"), "gradients": float(f"{shares:.2g}")}


def bf16_error(network, x: Tensor, gradients: list[Tensor]) -> float:
    """How far the gradients in bf16 are from those in float32, by norm."""
    exact, rough = (torch.cat([g.flatten() for g in learned(network, x, gradients, bf)[1]]) for bf in (False, True))
    return float((rough - exact).norm() / exact.norm())


def contenders(networks, side: int, in_bf16: tuple[str, ...]) -> dict[str, dict]:
    x, gradients, found = crop(side), gradients_for(side), {TRAINING: {}, INFERENCE: {}}
    for who, rough in [*((who, False) for who in networks), *((who, True) for who in in_bf16)]:
        name, network = f"{who}, bf16" if rough else who, networks[who]
        found[TRAINING][name] = lambda _, n=network, rough=rough: train(n, x, gradients, rough)
        found[INFERENCE][name] = lambda _, n=network, rough=rough: infer(n, x, rough)
    return found


def gflop(side: int) -> float:
    """Of the matrix products of one forward of ours, padding included; training takes three times as many."""
    work, cells = 0.0, -(-side // 2)
    for stage, depth in enumerate(DEPTHS):
        dim, window = WIDTH * 2**stage, min(WINDOW, cells)
        padded = -(-cells // window) * window
        work += depth * (24 * dim**2 * cells**3 + 4 * dim * padded**3 * window**3)
        cells = -(-cells // 2)
        work += 2 * 8 * dim * 2 * dim * cells**3
    return work / 1e9


def measured(networks, side: int, of: dict, in_bf16: tuple[str, ...] = ()) -> dict:
    """Both tables of one size."""
    weights = sum(parameter.numel() for parameter in networks[OURS].parameters())
    outputs = sum(gradient.numel() for gradient in gradients_for(side))
    moved = {TRAINING: 4 * (side**3 + 3 * weights + 2 * outputs), INFERENCE: 4 * (side**3 + weights + outputs)}
    found = {"side": side, "gflop": round(gflop(side), 1)}
    for what, who in contenders(networks, side, in_bf16).items():
        rows = tabled(f"{what}, {side}^3", timed(who, ROUNDS), moved[what], of)
        work = gflop(side) * (3 if what == TRAINING else 1)
        for row in rows:
            row["share_of_products"] = round(work / of["gemm_fp32_gflop_per_s"] / (row["ms"] / 1e3), 3)
        print(f"{work:.0f} GFLOP: " + ", ".join(f"{row['who']} {row['share_of_products']:.0%}" for row in rows))
        found[what] = rows
    return found


def peak(who: str, what: str) -> dict[str, float]:
    """MiB held before a step, and at most."""
    network = twins()[who]
    x, gradients, begun = crop(SIDES[-1]), gradients_for(SIDES[-1]), most_held_mib()
    train(network, x, gradients) if what == TRAINING else infer(network, x)
    return {"before_mib": begun, "peak_mib": most_held_mib()}


def memory() -> list[dict]:
    found = []
    for what in (TRAINING, INFERENCE):
        both = {who: as_users_have_it(__file__, "--peak", who, what) for who in (OURS, MONAI)}
        share = both[OURS]["peak_mib"] / both[MONAI]["peak_mib"]
        found.append({"work": what, "rows": both, "share": round(share, 3)})
        print(f"peak memory, {what}: {both[OURS]['peak_mib']} of {both[MONAI]['peak_mib']} MiB, {share:.0%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--curve", type=float, metavar="BF16_ERROR", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        return print(json.dumps(peak(*asked.peak)))
    of, networks = machine(("spade3d", "monai", "torch")), twins()
    if asked.curve is not None:
        ours = (OURS,) if asked.curve < BF16_ERROR else ()
        curve = [measured(networks, side, of, ours if side == SIDES[-1] else ()) for side in SIDES]
        return print(json.dumps(curve))

    agreed = [{"side": side, **agree(networks, crop(side), gradients_for(side))} for side in SIDES]
    error = bf16_error(networks[OURS], crop(KEPT_SIDE), gradients_for(KEPT_SIDE))
    if error >= BF16_ERROR:
        print(f"bf16 is not safe on this CPU: its gradients are {error:.0%} from those of float32")
    result = {"apart": agreed, "bf16_gradients_apart": round(error, 4)}
    result["allocator_keeps"] = measured(networks, KEPT_SIDE, of, (OURS, MONAI) if error < BF16_ERROR else ())
    result["curve"] = as_users_have_it(__file__, "--curve", str(error))
    result["memory"] = memory()
    goal = "training 2.2 x and inference 3.3 x MONAI in float32, two thirds of its peak memory"
    written("speed_encoder", {"goal": goal, "machine": of, **result})


if __name__ == "__main__":
    main()
