"""Training on a GPU: crops a second, GiB, and the share of what its matrix products reach.

    python benchmarks/speed/gpu.py                                  # on the GPU that is there
    python benchmarks/speed/gpu.py --device cpu --precision fp32 --side 64   # to try the script; nothing is written

First a Swin-UNETR, encoder and decoder, ours beside MONAI's with the same weights: forward, backward and AdamW of the
same crops under the same autocast, in interleaved rounds (goal: twice the crops a second); ours also with its encoder
compiled (--compile), with weights and features channels last, and with attention as products of tiles instead of
torch's fused operation, to see whether that wins. Then whole steps of the recipes as `spade-pretrain
--device cuda` sizes and runs them, deterministic operations, clipping and the test that an update is finite included,
of batches that lie on the device: what a loader has to feed. And short runs of the loop itself: the share of a step
that it `waited` for its loaders.

Wall time with the device waited for before and after; peak memory is what torch allocated in one step. Work is counted
in products (two operations each) by torch's own counter, our attention by the formula below, and held against a product
of 8,192 x 8,192 in the same precision on the same device.
"""

import argparse
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from pretraining_step import loop, stored
from rounds import machine, written
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from spade3d.configuration import with_values
from spade3d.networks import windows
from spade3d.networks.swin import compile_encoders
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.recipes.recipe import Built, find_recipe
from spade3d.training.loop import Optimiser
from spade3d.training.precision import autocast_for
from spade3d.training.reproducibility import deterministic

RECIPES = ("dagman-small", "dagman-paper", "spade-dagman")
WIDTH, WINDOW, DEPTHS, HEADS, CLASSES = 48, 7, (2, 2, 2, 2), (3, 6, 12, 24), 14
ROUNDS, WARMING, GOAL = 9, 3, 2.0
PRODUCTS = "ours, attention by products"
Autocast = Callable[[], AbstractContextManager]


def twins() -> dict[str, nn.Module]:
    """Ours and MONAI's, with the same weights."""
    torch.manual_seed(0)
    ours = SwinUNETR(1, CLASSES, feature_size=WIDTH, depths=DEPTHS, heads=HEADS, window=WINDOW, monai_compatible=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MonaiSwinUNETR(1, CLASSES, depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, feature_size=WIDTH)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return {"ours": ours, "MONAI": theirs}


def ways_of_ours(plain: SwinUNETR, *, on_gpu: bool) -> dict[str, nn.Module]:
    """The same network as it may be run. A CPU has no fused attention, and compiles for minutes."""
    ways = {"ours, channels last": deepcopy(plain).to(memory_format=torch.channels_last_3d)}
    if on_gpu:
        ways["ours, compiled"] = deepcopy(plain)
        compile_encoders(ways["ours, compiled"])
        ways[PRODUCTS] = deepcopy(plain)
    return ways


def by_products(step: Callable[[], None]) -> Callable[[], None]:
    """A step without fused attention."""

    def unfused() -> None:
        with patch.object(windows, "fused", lambda qkv: False):
            step()

    return unfused


def logits(network: nn.Module, images: Tensor) -> Tensor:
    return network.logits(network(images)) if isinstance(network, SwinUNETR) else network(images)


def training(network: nn.Module, images: Tensor, autocast: Autocast) -> Callable[[], None]:
    """A step: forward, the mean square of the logits, backward, AdamW."""
    device = images.device
    network.to(device).train()
    adamw = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        with autocast():
            loss = logits(network, images).float().square().mean()
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


def built(name: str, store, device: torch.device, sized: dict) -> tuple[Built, Optimiser]:
    """What spade-pretrain would train on this device."""
    recipe, cases = find_recipe(name), range(len(store))
    settings = recipe.choose(with_values(recipe.settings(), {"steps": 1000, **sized}), store, cases, device.type)
    return recipe.build(settings, store, cases, None), Optimiser(**settings.optim.model_dump())


def pretraining(
    built: Built, optimiser: Optimiser, device: torch.device, autocast: Autocast
) -> tuple[Callable[[], None], int]:
    """A step of a recipe as the loop makes it on this device, and its crops."""
    task = built.task.to(device).train()
    adamw = torch.optim.AdamW(task.parameter_groups(optimiser.weight_decay), lr=optimiser.lr, fused=True)
    batch = next(iter(built.batches.stream(0, 1))).to(device)

    def step() -> None:
        with autocast():
            loss = sum(task(batch, 0.5).values())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(task.parameters(), optimiser.clip_norm or math.inf)
        if not math.isfinite(float(norm)):
            raise SystemExit("a gradient is not finite: there is nothing to time")
        adamw.step()
        task.after_step(0.5)
        adamw.zero_grad(set_to_none=True)

    return step, len(batch)


def seconds(step: Callable[[], None], device: torch.device) -> float:
    waited_for(device)
    begun = time.perf_counter()
    step()
    waited_for(device)
    return time.perf_counter() - begun


def waited_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(steps: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """The median seconds of each, in interleaved rounds after some that warm up."""
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMING + ROUNDS):
        for name, step in steps.items():
            took = seconds(step, device)
            if number >= WARMING:
                rounds[name].append(took)
    return {name: statistics.median(took) for name, took in rounds.items()}


def peak_gib(step: Callable[[], None], device: torch.device, others: int) -> float | None:
    """GiB that a step takes at most, without the bytes of `others` that lie on the device meanwhile."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    seconds(step, device)
    return round((torch.cuda.max_memory_allocated(device) - others) / 2**30, 2)


def held(network: nn.Module) -> int:
    """Bytes of the weights and of what AdamW knows of them."""
    return 3 * sum(weights.numel() * weights.element_size() for weights in network.parameters())


def operations(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@register_flop_formula(torch.ops.spade3d.window_attention)
def attention_operations(qkv, bias, grid, window, shift, *_, out_shape=None, products=2, **__) -> int:
    """Of scores and what they weigh, (n, n) a window and head; the backward makes the scores again, and four more.
    (That of a GPU makes all of the forward again: work that is not counted.)"""
    tokens, channels = qkv[0] - 1, qkv[1] // 3
    windows = tokens // math.prod(grid) * math.prod(-(-size // side) for size, side in zip(grid, window))
    return 2 * products * windows * math.prod(window) ** 2 * channels


@register_flop_formula(torch.ops.spade3d.window_attention_backward)
def backward_operations(grad, qkv, bias, out, log_sum, grid, window, shift, *_, out_shape=None, **__) -> int:
    return attention_operations(qkv, bias, grid, window, shift, products=5)


def products_a_second(device: torch.device, autocast: Autocast) -> float:
    """Operations a second of one large product, as autocast computes it."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.ones(side, side, device=device)

    def product() -> None:
        with autocast():
            a @ a

    return 2 * side**3 / timed({"product": product}, device)["product"]


def row(who: str, crops: int, took: float, counted: int, peak: float | None, fastest: float) -> dict:
    """One line of the table; `counted`: the operations of a step."""
    found = {
        "who": who,
        "crops": crops,
        "ms": round(took * 1e3, 2),
        "crops_per_s": round(crops / took, 3),
        "peak_gib": peak,
        "share_of_products": round(counted / took / fastest, 4),
    }
    print(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", help="of everybody: bf16 or fp32")
    parser.add_argument("--side", type=int, help="voxels of a crop; left out: 96, and what each recipe chooses")
    parser.add_argument("--crops", type=int, default=2, help="in a batch of the Swin-UNETRs")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(
            2,
            "no GPU that torch can use: run this where one is, or try --device cpu --precision fp32 --side 64\n",
        )
    autocast = autocast_for(asked.precision, device)
    side, fastest = asked.side or 96, products_a_second(device, autocast)
    images = torch.randn(asked.crops, 1, side, side, side, device=device)
    networks = twins()
    networks |= ways_of_ours(networks["ours"], on_gpu=device.type == "cuda")
    steps = {who: training(network, images, autocast) for who, network in networks.items()}
    steps |= {who: by_products(step) for who, step in steps.items() if who == PRODUCTS}
    # The compiled one is not counted, but its twin: the counter sees what torch calls, and it calls one graph.
    counted = {who: operations(steps["MONAI" if who == "MONAI" else "ours"]) for who in steps}
    beside = []
    for who, took in timed(steps, device).items():
        others = sum(held(network) for name, network in networks.items() if name != who)
        peak = peak_gib(steps[who], device, others)
        beside.append(row(who, asked.crops, took, counted[who], peak, fastest))
    print(f"ours is faster by {beside[1]['ms'] / beside[0]['ms']:.2f} (goal {GOAL})")
    del steps, networks, images

    sized = {} if asked.side is None else {"crop.shape": (side,) * 3}
    recipes = []
    with tempfile.TemporaryDirectory() as folder:
        store = stored(Path(folder))
        for name in RECIPES:
            with deterministic(device):
                step, crops = pretraining(*built(name, store, device, sized), device, autocast)
                (took,) = timed({name: step}, device).values()
                recipes.append(row(name, crops, took, operations(step), peak_gib(step, device, 0), fastest))
            del step
            recipes[-1]["loop"] = loop(*built(name, store, device, sized), None, device)
            print(recipes[-1]["loop"])
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    result = {
        "goal": f"{GOAL:g} x the crops a second of MONAI's SwinUNETR in training under the same autocast",
        "device": name,
        "precision": asked.precision,
        "products_tflop_per_s": round(fastest / 1e12, 1),
        "machine": machine(("spade3d", "monai", "torch")),
        "size": {"side": side, "width": WIDTH, "window": WINDOW},
        "swin_unetr": beside,
        "recipes": recipes,
    }
    written(f"gpu_{name.lower().replace(' ', '_')}", result)


if __name__ == "__main__":
    main()
