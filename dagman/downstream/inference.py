"""Predict a whole volume window by window, blended so that no seam shows, in bounded memory.

Every window is weighted by a Gaussian (sigma = 1/8 of the window, floored at 1e-3: what MONAI's
`sliding_window_inference(mode="gaussian")` does, and the test holds them together to 1e-4). Windows are visited in
order of i, so the planes before the next window's start are final: they are divided by their weight and handed out.
Only a slab as thick as one window lies on the device, whatever the length of the scan.
"""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int, int]
Image = Float[Tensor, "i j k"] | Float[np.ndarray, "i j k"]
Predict = Callable[[Tensor], Tensor]

SIGMA = 1 / 8  # of the window's side
FLOOR = 1e-3


def sliding_window(
    predict: Predict,
    image: Image,
    window: Size,
    overlap: float = 0.5,
    batch: int = 2,
    *,
    classes: int,
    device: torch.device | str = "cpu",
    blend_device: torch.device | str | None = None,
    fill: float = 0.0,
) -> Float[Tensor, "classes i j k"]:
    """The blended logits of a volume: float32 on the CPU, classes * voxels * 4 bytes.

    predict: crops (b, 1, *window) on `device` -> logits (b, classes, *window), called in inference mode.
    image: normalised intensities; an axis shorter than the window is padded on both sides with `fill`.
    overlap: the part of a window, from 0 to below 1, that the next one sees again. batch: windows per call.
    blend_device: where the slab of window_i * J * K * (classes + 1) * 4 bytes lies; None: on `device`.
    """
    # numpy asks for huge pages: first touch of this much memory takes half the time of torch.empty's.
    logits = torch.from_numpy(np.empty((classes, *image.shape), np.float32))
    for start, slab in _slabs(predict, image, window, overlap, batch, classes, device, blend_device, fill):
        logits[:, start : start + slab.shape[1]] = slab
    return logits


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: every (1 - overlap) * window voxels, the last one flush with the end."""
    stride = max(1, int(window * (1 - overlap)))
    starts = range(0, max(size - window, 0) + stride, stride)
    return sorted({min(start, max(size - window, 0)) for start in starts})


def importance(window: Size) -> Float[Tensor, "i j k"]:
    """How much a prediction counts by its place in the window: 1 at the centre of an odd window, 1e-3 at least."""
    weight = torch.ones(())
    for size in window:
        place = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(-(place**2) / (2 * (SIGMA * size) ** 2))
    return weight.clamp_min(max(FLOOR, weight.min().item()))


def _slabs(
    predict: Predict,
    image: Image,
    window: Size,
    overlap: float,
    batch: int,
    classes: int,
    device: torch.device | str,
    blend_device: torch.device | str | None,
    fill: float,
) -> Iterator[tuple[int, Tensor]]:
    """Finished slabs (classes, n, J, K) in order of i, each with its first plane; valid until the next is asked for."""
    if not 0 <= overlap < 1 or batch < 1 or len(window) != 3 or min(window) < 1 or 0 in image.shape:
        raise ValueError(
            f"window {window}, overlap {overlap}, batch {batch}, image {tuple(image.shape)}; a window of three "
            "positive sides, an overlap from 0 to below 1, a batch of at least 1 and a volume with voxels are needed"
        )
    window, blend_device = tuple(window), device if blend_device is None else blend_device
    before = [max(whole - size, 0) // 2 for whole, size in zip(window, image.shape)]
    after = [max(whole - size, 0) - front for whole, size, front in zip(window, image.shape, before)]
    padding = [side for pair in zip(reversed(before), reversed(after)) for side in pair]  # last axis first
    padded = F.pad(torch.as_tensor(image, dtype=torch.float32), padding, value=fill)
    inside = tuple(slice(front, front + size) for front, size in zip(before, image.shape))

    starts_i, starts_j, starts_k = (window_starts(*axis, overlap) for axis in zip(padded.shape, window))
    tiles = list(product(starts_j, starts_k))
    weight = importance(window).to(blend_device)
    # The tiles of one layer overlap alike in every layer: their weights are summed once.
    layer_weight = torch.zeros((window[0], *padded.shape[1:]), device=blend_device)
    for j, k in tiles:
        layer_weight[:, j : j + window[1], k : k + window[2]] += weight

    # The last channel holds the weights, so that both move on together.
    total = torch.zeros((classes + 1, *layer_weight.shape), device=blend_device)
    for i, following in zip(starts_i, [*starts_i[1:], padded.shape[0]]):
        for some in (tiles[first : first + batch] for first in range(0, len(tiles), batch)):
            crops = [padded[i : i + window[0], j : j + window[1], k : k + window[2]] for j, k in some]
            with torch.inference_mode():
                logits = predict(torch.stack(crops)[:, None].to(device))
            if logits.shape != (len(some), classes, *window):
                raise ValueError(f"predict gave {tuple(logits.shape)}; {(len(some), classes, *window)} is needed")
            for (j, k), tile in zip(some, logits.to(blend_device, torch.float32)):
                total[:-1, :, j : j + window[1], k : k + window[2]].addcmul_(tile, weight)
        total[-1] += layer_weight
        done = following - i
        finished = total[:-1, :done].div_(total[-1, :done])[:, :, inside[1], inside[2]]
        # Where i was padded there is one layer, and all of `inside` lies in it.
        yield i, finished[:, inside[0]] if len(starts_i) == 1 else finished
        _advance(total, done)


def _advance(slab: Tensor, planes: int) -> None:
    """Drop the first planes (axis 1), move the others up and clear the room, in place: fresh memory costs more."""
    for start in range(planes, slab.shape[1], planes):  # no step reads what it writes
        part = slab[:, start : start + planes]
        slab[:, start - planes : start - planes + part.shape[1]] = part
    slab[:, slab.shape[1] - planes :] = 0
