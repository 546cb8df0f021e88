"""Precision: bf16 where the device computes it fast and right, fp32 elsewhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F

from spade3d.faults import UsageFault


def autocast_for(
    precision: str, device: torch.device, *, gradients: bool = True
) -> Callable[[], AbstractContextManager]:
    """Makes the context in which losses are computed. "auto": bf16 on CUDA devices that have it, else fp32; "fp32";
    "bf16": UsageFault on a GPU that lacks it and, if `gradients` are wanted, on a CPU that computes them wrong."""
    on_cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    match precision:
        case "auto":
            enabled = on_cuda
        case "fp32":
            enabled = False
        case "bf16":
            enabled = True
            if not on_cuda and not (device.type == "cpu" and (not gradients or cpu_bf16_is_right())):
                what = "has none here, or its gradients are wrong" if gradients else "has none here"
                raise UsageFault(f"precision bf16: {device.type} {what}; give --precision fp32")
        case _:
            raise UsageFault(f"precision {precision!r} is not known; give auto, fp32 or bf16")
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=enabled)


def cpu_bf16_is_right() -> bool:
    """Whether bf16 can be trusted here: oneDNN's gradient of a 3-D convolution over a grid 2 cells deep, such as the
    bottleneck of a 64-voxel crop, is garbage on some CPUs (torch 2.13 on AVX512-BF16, docs/decisions)."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(1, 48, 2, 4, 4, generator=chance)
    weight = (torch.randn(48, 48, 3, 3, 3, generator=chance) / 36).requires_grad_()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = F.conv3d(x, weight, padding=1).float().square().mean()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    exact, rough = gradients
    return bool((rough - exact).norm() < 0.05 * exact.norm())
