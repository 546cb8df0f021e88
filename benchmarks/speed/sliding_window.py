"""Sliding-window inference against MONAI's: blending alone, up to the label map, and with a Swin-UNETR.

    python benchmarks/speed/sliding_window.py

256 x 256 x 160 voxels, windows of 96^3 that overlap by half, Gaussian, 14 classes, 75 windows. The network is replaced
by one that answers at once: with zeros that lie ready, because MONAI multiplies the answer that it is given in place.
Before that both are given a network of one convolution, and agree.

`blended logits` is what MONAI's inferer returns. `label map` is what a user wants: MONAI's logits then go through
argmax, as its AsDiscrete does; ours are decided slab by slab, and never all there. The last table is a whole prediction
on a smaller scan: Swin-UNETR of width 24, windows of 64^3, the same weights for everybody, in float32 and in bf16, with
the allocator as users have it (see rounds.py), as its goals were set.

Blending is bound by memory. The answers are 3.7 GB; adding them to the slab moves 12 bytes for each number, at
the speed of a copy (0.47 of 0.62 s), and so does MONAI, which also multiplies in place. Reading the answers once, and
nothing else, would be 4 times as fast as MONAI is. Tried in numba and left: sums row by row (1.6 times as long as
torch's addcmul_, 2.4 times with prefetches), weights made of their three factors in registers, and planes that stay in
the cache while the answers of a whole layer (0.7 GB that must be held) are added, 0.8 of the time together. With the
allocator as it is (see rounds.py) both take 1.5 times as long. Cost against size: three scans.

Peak memory up to the label map is that of a process of its own, with the allocator as users have it, for scans of which
each is twice as long as the one before: what is held beyond the scan must grow by its labels alone.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from rounds import ROUNDS, as_users_have_it, machine, most_held_mib, tabled, timed, written
from torch import Tensor

from dagman.downstream.inference import predict_classes
from spade3d.networks.sliding import sliding_window
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.volumes.volume import Grid

SHAPE, WINDOW, OVERLAP, CLASSES = (256, 256, 160), (96, 96, 96), 0.5, 14
SHAPES = ((128, 128, 112), (192, 192, 128), SHAPE)
LONG = tuple((128, 128, length) for length in (192, 768))  # scans whose memory is compared
SMALL, SMALL_WINDOW, WIDTH = (96, 64, 64), (64, 64, 64), 24
CPU = torch.device("cpu")


def ours(network, scan: Tensor, window, batch: int = 1) -> np.ndarray:
    """The label map on the scan's own grid."""
    grid = Grid(tuple(scan.shape), np.eye(4))
    return predict_classes(
        network,
        scan.numpy(),
        np.eye(4),
        grid,
        classes=CLASSES,
        window=window,
        overlap=OVERLAP,
        device=CPU,
        fill=0.0,
        batch=batch,
    )


def monai_logits(network, scan: Tensor, window, batch: int = 1) -> Tensor:
    inferer = SlidingWindowInferer(window, batch, OVERLAP, mode="gaussian")
    with torch.inference_mode():
        return inferer(scan[None, None], network)[0]


def monai(network, scan: Tensor, window, batch: int = 1) -> Tensor:
    return monai_logits(network, scan, window, batch).argmax(dim=0)


def check(network, scan: Tensor, window) -> dict[str, float]:
    """Both give the same logits to 1e-4, and the same label map where two classes are not nearly equal."""
    theirs = monai_logits(network, scan, window)
    first, second = theirs.topk(2, dim=0).values
    classes, clear = theirs.argmax(dim=0).numpy(), (first - second > 1e-4).numpy()
    apart = 0.0
    for c, one in enumerate(sliding_window(network, scan, window, OVERLAP, 1, classes=CLASSES)):
        apart = max(apart, float((one - theirs[c]).abs().max()))
    found = ours(network, scan, window)
    assert apart < 1e-4 and clear.mean() > 0.99 and (found == classes)[clear].all(), f"logits are {apart:g} apart"
    return {"largest_difference_of_logits": apart, "voxels_of_another_class": int((found != classes).sum())}


def twins():
    """Our Swin-UNETR and MONAI's with the same weights; functions from crops to logits."""
    torch.manual_seed(0)
    ours_net = SwinUNETR(1, CLASSES, feature_size=WIDTH, monai_compatible=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MonaiSwinUNETR(1, CLASSES, feature_size=WIDTH).eval()
    theirs.load_state_dict(ours_net.state_dict(), strict=True)
    return (lambda crops: ours_net.logits(ours_net(crops))), theirs


def whole_predictions(of: dict) -> dict:
    """Swin-UNETR on the small scan, from intensities to the label map; bf16 where everybody's network runs in it."""
    small = torch.randn(SMALL, generator=torch.Generator().manual_seed(0))
    network, theirs = twins()
    agreed = check(network, small, SMALL_WINDOW)
    with torch.inference_mode():
        crop = small[tuple(map(slice, SMALL_WINDOW))][None, None]
        assert (network(crop) - theirs(crop)).abs().max() < 1e-3
    exact, rough = (ours(in_bf16(network) if bf16 else network, small, SMALL_WINDOW) for bf16 in (False, True))
    whole = {
        "ours": lambda _: ours(network, small, SMALL_WINDOW),
        "MONAI's network and inferer": lambda _: monai(theirs, small, SMALL_WINDOW),
    }
    half = {
        "ours, bf16": lambda _: ours(in_bf16(network), small, SMALL_WINDOW),
        "MONAI's network and inferer, bf16": lambda _: monai(in_bf16(theirs), small, SMALL_WINDOW),
    }
    rows = tabled(f"Swin-UNETR, {' x '.join(map(str, SMALL))}", timed(whole | half, ROUNDS), math.prod(SMALL) * 5, of)
    return {
        "shape": SMALL,
        "window": SMALL_WINDOW,
        "width": WIDTH,
        "agreement": agreed,
        "voxels_of_another_class_in_bf16": int((exact != rough).sum()),
        "rows": rows,
    }


def in_bf16(network):
    """The network as a user runs it in bf16."""

    def answer(crops: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(crops).float()

    return answer


def alone(at_once, scan: Tensor, of: dict) -> dict:
    """Blending, and up to the label map, of a network that takes no time."""
    windows = math.prod(
        math.ceil((size - side) / (side * (1 - OVERLAP))) + 1 for size, side in zip(scan.shape, WINDOW, strict=True)
    )
    answers, logits = windows * math.prod(WINDOW) * CLASSES * 4, scan.numel() * CLASSES * 4
    blending = {
        "ours": lambda _: sliding_window(at_once, scan, WINDOW, OVERLAP, 1, classes=CLASSES),
        "ours, batch 4": lambda _: sliding_window(at_once, scan, WINDOW, OVERLAP, 4, classes=CLASSES),
        "MONAI": lambda _: monai_logits(at_once, scan, WINDOW),
        "MONAI, batch 4": lambda _: monai_logits(at_once, scan, WINDOW, 4),
    }
    labels = {
        "ours": lambda _: ours(at_once, scan, WINDOW),
        "ours, batch 4": lambda _: ours(at_once, scan, WINDOW, 4),
        "MONAI": lambda _: monai(at_once, scan, WINDOW),
        "MONAI, batch 4": lambda _: monai(at_once, scan, WINDOW, 4),
    }
    size = " x ".join(map(str, scan.shape))
    # What has to be moved at least: the answers read, and what is asked for written.
    return {
        "shape": list(scan.shape),
        "windows": windows,
        "blended_logits": tabled(f"blended logits, {size}", timed(blending, ROUNDS), answers + logits, of),
        "label_map": tabled(f"label map, {size}", timed(labels, ROUNDS), answers + scan.numel(), of),
    }


def peak(who: str, length: int) -> dict[str, float]:
    """MiB held before a prediction and at most."""
    scan = torch.rand(next(shape for shape in LONG if shape[2] == length))
    ready, predict = torch.ones(1, CLASSES, *WINDOW), {"ours": ours, "MONAI": monai}[who]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget what importing took
    begun = most_held_mib()
    predict(lambda crops: ready[: len(crops)], scan, WINDOW)
    return {"before_mib": begun, "peak_mib": most_held_mib()}


def memory() -> list[dict]:
    found = []
    for shape in LONG:
        both = {who: as_users_have_it(__file__, "--peak", who, str(shape[2])) for who in ("ours", "MONAI")}
        print(f"memory, {shape}: {both}")
        found.append({"shape": shape, "rows": both})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    asked, of = parser.parse_args(), machine(("spade3d", "monai", "torch", "numpy", "numba"))
    if asked.whole:
        return print(json.dumps(whole_predictions(of)))
    if asked.peak:
        return print(json.dumps(peak(asked.peak[0], int(asked.peak[1]))))
    scan = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    agreed = check(torch.nn.Conv3d(1, CLASSES, 3, padding=1), scan[:144, :120, :96].contiguous(), WINDOW)
    ready = torch.full((4, CLASSES, *WINDOW), 1.0).zero_()  # of ones first: memory that was written to

    def at_once(crops: Tensor) -> Tensor:
        return ready[: len(crops)]

    result = {"goal": "4.5 x MONAI", "machine": of, "agreement": agreed}
    result["curve"] = [alone(at_once, scan[tuple(map(slice, shape))].contiguous(), of) for shape in SHAPES]
    result["memory"] = memory()
    result["swin_unetr"] = as_users_have_it(__file__, "--whole")
    written("speed_sliding_window", result)


if __name__ == "__main__":
    main()
