"""A network over a whole scan, window by window, blended so that no seam shows, in bounded memory.

Every window is weighted by a Gaussian (sigma = 1/8 of the window, floored at 1e-3: what MONAI's
`sliding_window_inference(mode="gaussian")` does, and the tests hold them together to 1e-4). Layers of windows are
visited along the axis on which the scan is longest for its window, so the planes before the next layer are final:
they are divided by their weight and handed out. Beside the scan itself there is in memory, whatever its length:

    (channels + 3) * w * A * B * 4 bytes   the slab: w the window's side along that axis, A x B the plane across it;
                                           with the weights of all and of a layer, and a layer of the scan
    batch * channels * window * 4 bytes    what the network has answered last, and what it needs to answer

A scan of 512 x 512 x 1200 voxels with 14 channels and windows of 96^3 takes a slab of 1.5 GB; all maps take 17.6 GB.
Slabs are for memory, not for time: of a scan 4 times as long the label map takes as much beyond the scan as before
(169 MiB; MONAI 773 instead of 198), and blending 1.04 to 1.18 times as fast as MONAI's (docs/speed.md).
"""

import math
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

ON_CUDA = 4  # windows at once
ON_CPU = 2**16  # voxels at once: torch convolves a single small crop without oneDNN (24^3: 60 ms, of four 17 ms each)
SIGMA = 1 / 8  # of the window's side
FLOOR = 1e-3


def sliding_window(
    predict: Predict,
    image: Image,
    window: Size,
    overlap: float = 0.5,
    batch: int | None = None,
    *,
    classes: int,
    device: torch.device | str = "cpu",
    blend_device: torch.device | str | None = None,
    fill: float = 0.0,
) -> Float[Tensor, "classes i j k"]:
    """The blended answers over a scan: float32 on the CPU, classes * voxels * 4 bytes; `slabs` holds less at once.

    predict: crops (b, 1, *window) on `device` -> answers (b, classes, *window), called in inference mode.
    image: normalised intensities; an axis shorter than the window is padded on both sides with `fill`.
    overlap: the part of a window, from 0 to below 1, that the next one sees again. batch: windows per call, at most
    (None: `windows_at_once`); calls of one layer are of about the same size.
    blend_device: where the slab lies; None: on `device`.
    """
    answers = torch.empty((classes, *image.shape), dtype=torch.float32, device="cpu")
    axis = slab_axis(image.shape, window)
    for start, sums, weights in _sums(predict, image, window, overlap, batch, classes, device, blend_device, fill):
        here = answers.narrow(1 + axis, start, sums.shape[1 + axis])
        if sums.is_cpu:
            torch.div(sums, weights, out=here)  # one pass instead of two
        else:
            here.copy_(sums.div_(weights))
    return answers


def over_scan(
    predict: Predict, intensities: np.ndarray, block: Size, device: torch.device, *, fill: float, overlap: float = 0.5
) -> np.ndarray:
    """One map: what `predict` (crops (b, 1, *block) -> (b, 1, *block)) gives for a scan (i, j, k), float32."""
    return sliding_window(predict, intensities, block, overlap, classes=1, device=device, fill=fill)[0].numpy()


def windows_at_once(window: Size, device: torch.device | str) -> int:
    """As many as a device gains by; each takes memory, and a CPU gains by more than one where they are small."""
    return ON_CUDA if torch.device(device).type == "cuda" else max(1, ON_CPU // math.prod(window))


def slab_axis(shape: tuple[int, ...], window: Size) -> int:
    """The axis (0, 1 or 2) that slabs follow each other along: where a window is the least part of the scan."""
    return int(np.argmin([min(1.0, side / size) for size, side in zip(shape, window, strict=True)]))


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: every (1 - overlap) * window voxels, the last one flush with the end."""
    stride = max(1, int(window * (1 - overlap)))
    starts = range(0, max(size - window, 0) + stride, stride)
    return sorted({min(start, max(size - window, 0)) for start in starts})


def importance(window: Size) -> Float[Tensor, "i j k"]:
    """How much an answer counts by its place in the window: 1 at the centre of an odd window, 1e-3 at least."""
    weight = torch.ones(())
    for size in window:
        place = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(-(place**2) / (2 * (SIGMA * size) ** 2))
    return weight.clamp_min(max(FLOOR, weight.min().item()))


def slabs(
    predict: Predict,
    image: Image,
    window: Size,
    overlap: float = 0.5,
    batch: int | None = None,
    classes: int = 1,
    device: torch.device | str = "cpu",
    blend_device: torch.device | str | None = None,
    fill: float = 0.0,
) -> Iterator[tuple[int, Tensor]]:
    """What `sliding_window` gives, piece by piece: (first plane, answers (classes, i, j, k) of the planes from it on).

    The planes are those of `slab_axis`, in order, each once. A piece lies on `blend_device` and is valid until the
    next is asked for.
    """
    for start, sums, weights in _sums(predict, image, window, overlap, batch, classes, device, blend_device, fill):
        yield start, sums.div_(weights)


def _sums(
    predict: Predict,
    image: Image,
    window: Size,
    overlap: float,
    batch: int | None,
    classes: int,
    device: torch.device | str,
    blend_device: torch.device | str | None,
    fill: float,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`slabs` before the division: first plane, weighted sums (classes, i, j, k), their weights (i, j, k).

    The slab is a ring: plane p of the scan lies in its plane p mod w, so that nothing is moved when planes are done
    (moving them: 7 % of all, docs/log.md, 2026-11-22).
    """
    batch = windows_at_once(window, device) if batch is None else batch
    if not 0 <= overlap < 1 or batch < 1 or len(window) != 3 or min(window) < 1 or 0 in image.shape:
        raise ValueError(
            f"window {window}, overlap {overlap}, batch {batch}, image {tuple(image.shape)}; a window of three "
            "positive sides, an overlap from 0 to below 1, a batch of at least 1 and a volume with voxels are needed"
        )
    window, blend_device = tuple(window), device if blend_device is None else blend_device
    axis = slab_axis(image.shape, window)
    thickness = window[axis]
    if isinstance(image, np.ndarray):  # torch knows neither negative strides nor other machines' floats
        image = np.ascontiguousarray(image, dtype=np.float32)
    padded, inside = _padded(torch.as_tensor(image, dtype=torch.float32), window, fill)
    starts = [window_starts(*sides, overlap) for sides in zip(padded.shape, window)]
    layers, starts[axis] = starts[axis], [0]
    tiles = list(product(*starts))  # of one layer
    calls = math.ceil(len(tiles) / batch)
    weight = importance(window).to(blend_device)
    # The tiles of one layer overlap alike in every layer: their weights are summed once.
    sides = [thickness if a == axis else padded.shape[a] for a in range(3)]
    layer_weight = torch.zeros(sides, device=blend_device)
    for tile in tiles:
        layer_weight[_box(tile, window)] += weight

    total = torch.zeros((classes + 1, *sides), device=blend_device)  # the last channel holds the weights
    for layer, following in zip(layers, [*layers[1:], padded.shape[axis]]):
        planes = padded.narrow(axis, layer, thickness).to(device)  # all windows of a layer in one copy
        runs = list(_runs(layer, thickness, thickness))
        for some in (tiles[first::calls] for first in range(calls)):
            with torch.inference_mode():
                answer = predict(torch.stack([planes[_box(tile, window)] for tile in some])[:, None])
            if answer.shape != (len(some), classes, *window):
                raise ValueError(f"predict gave {tuple(answer.shape)}; {(len(some), classes, *window)} is needed")
            for tile, one in zip(some, answer.to(blend_device, torch.float32)):
                across = total[(slice(classes), *_box(tile, window))]  # all planes of the ring
                for plane, slot, count in runs:
                    weighted = (one.narrow(1 + axis, plane - layer, count), weight.narrow(axis, plane - layer, count))
                    across.narrow(1 + axis, slot, count).addcmul_(*weighted)
        for plane, slot, count in runs:
            total[-1].narrow(axis, slot, count).add_(layer_weight.narrow(axis, plane - layer, count))
        # Along `axis` the scan is padded only where there is one layer, and then all of `inside` lies in it.
        cut = [slice(None) if a == axis and len(layers) > 1 else inside[a] for a in range(3)]
        for plane, slot, count in _runs(layer, following - layer, thickness):
            finished = total.narrow(1 + axis, slot, count)
            there = finished[(slice(None), *cut)]
            yield plane, there[:-1], there[-1]
            if following < padded.shape[axis]:
                finished.zero_()


def _runs(first: int, planes: int, thickness: int) -> Iterator[tuple[int, int, int]]:
    """The planes of a scan from `first` on, in runs that lie together in a ring: (plane, its place in it, how many)."""
    while planes:
        slot = first % thickness
        count = min(planes, thickness - slot)
        yield first, slot, count
        first, planes = first + count, planes - count


def _padded(image: Float[Tensor, "i j k"], window: Size, fill: float) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """The image, at least as large as the window, and where it lies in it; not copied where it is large enough."""
    lacking = [max(whole - size, 0) for whole, size in zip(window, image.shape)]
    before = [lack // 2 for lack in lacking]
    i, j, k = (slice(front, front + size) for front, size in zip(before, image.shape))
    if not any(lacking):
        return image, (i, j, k)
    sides = [side for front, lack in zip(before[::-1], lacking[::-1]) for side in (front, lack - front)]  # last first
    return F.pad(image, sides, value=fill), (i, j, k)


def _box(start: tuple[int, ...], size: Size) -> tuple[slice, ...]:
    return tuple(slice(first, first + side) for first, side in zip(start, size))
