"""The cells of a study: where they lie in the body, and what an encoder says of each of them.

A cell is as large as 8 x 8 x 8 voxels of what the encoder sees. Its token is what the last block of stage 3 gives
there, and behind it what the last block of stage 4 gives for the 16 x 16 x 16 voxels around, upsampled; each is
layer-normed, as all outputs of the encoder are. (Stage 3 works on cells of 8 voxels; its merging hands on cells of 16.)

A grid of cells is a `Crop` of few large voxels: its `to_mm` takes a cell to millimetres of the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from dagman.downstream.linear_decoder import doubled
from spade3d.crops.crop import Crop, Triple, body_bounds, cut, scan_to_world
from spade3d.crops.pairs import as_images
from spade3d.networks.sliding import importance, window_starts
from spade3d.networks.swin import SwinTransformer
from spade3d.volumes.geometry import apply_affine, compose, inverse

CELL = 8  # voxels along a cell
STAGES = (3, 4)  # whose last blocks are read
ALIGNED = 2 * CELL  # voxels: sides of windows are multiples of it, so that the cells of stage 4 fit, too

Size = tuple[int, int, int]
Encode = Callable[[Tensor], Tensor]  # images (b, 1, i, j, k), sides multiples of ALIGNED -> tokens (b, c, p, q, r)


def channels_of(encoder: SwinTransformer) -> int:
    """How many numbers a cell has."""
    return sum(encoder.patch_embed.proj.out_channels * 2 ** (stage - 1) for stage in STAGES)


def encode(encoder: SwinTransformer, images: Float[Tensor, "b 1 i j k"]) -> Float[Tensor, "b c p q r"]:
    """The cells of some images."""
    fine, coarse = block_outputs(encoder, images, STAGES)
    return torch.cat([fine, doubled(coarse, fine.shape[2:])], dim=1)


def block_outputs(
    encoder: SwinTransformer, images: Float[Tensor, "b 1 i j k"], stages: Sequence[int]
) -> list[Float[Tensor, "b _ _ _ _"]]:
    """What the last block of each stage gives, before the merging halves its grid; layer-normed over channels."""
    seen: dict[int, Tensor] = {}

    def note(stage: int):
        return lambda _, given: seen.update({stage: given[0]})

    handles = [encoder.get_submodule(f"layers{s}.0.downsample").register_forward_pre_hook(note(s)) for s in stages]
    try:
        encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    normed = (F.layer_norm(seen[stage], seen[stage].shape[-1:]) for stage in stages)
    return [rearrange(tokens, "b p q r c -> b c p q r") for tokens in normed]


def cells_of(crop: Crop) -> Crop:
    """The grid of cells of a crop of voxels; where a side is no multiple of a cell, the last cell reaches beyond it."""
    to_mm = crop.to_mm.copy()
    to_mm[:3, :3] *= CELL
    to_mm[:3, 3] += crop.to_mm[:3, :3] @ np.full(3, (CELL - 1) / 2)
    p, q, r = (-(-side // CELL) for side in crop.shape)
    return Crop(crop.case, (p, q, r), to_mm)


def body_crop(case: int, stored, spacing: Triple, multiple: int = CELL) -> Crop:
    """The body's box of a scan (`stored`: its record in the store) in voxels of `spacing` mm, as many as a whole number
    of cells takes; where that is the scan's own spacing, on its very voxels."""
    low, high = body_bounds(stored) / np.asarray(spacing)
    first = np.floor(low + 0.5 + 1e-6)
    shape = np.maximum(1, np.ceil((high + 0.5 - first) / multiple - 1e-6)).astype(int) * multiple
    to_mm = np.diag([*spacing, 1.0])
    to_mm[:3, 3] = first * spacing
    i, j, k = shape.tolist()
    return Crop(case, (i, j, k), to_mm)


def places_of(stored, cells: Crop) -> tuple[Float32[np.ndarray, "3 p q r"], Bool[np.ndarray, "p q r"]]:
    """Where the cells' centres lie in the box of the body (R, A, S, 0 to 1), and which cells touch that box."""
    low, high = (np.asarray(end) for end in stored.body_box_mm)
    to_box = compose(inverse(_box(low, high)), scan_to_world(stored), cells.to_mm)
    places = apply_affine(to_box, np.stack(np.indices(cells.shape), axis=-1))
    half = np.abs(to_box[:3, :3]).sum(axis=1) / 2
    touching = ((places > -half) & (places < 1 + half)).all(axis=-1)
    return np.moveaxis(places, -1, 0).astype(np.float32), touching


def to_world(stored, cells: Crop) -> np.ndarray:
    """The affine (4, 4) from a cell to RAS+ mm of the patient: that of a map of the cells."""
    return compose(scan_to_world(stored), cells.to_mm)


@dataclass(frozen=True)
class Windows:
    """How a scan is shown to an encoder: voxels of a window (multiples of ALIGNED), their spacing in mm, the share of a
    window that the next one sees again."""

    shape: Size
    spacing: Triple
    overlap: float = 0.5


@torch.inference_mode()
def token_grid(
    encode: Encode, store, case: int, windows: Windows, device: torch.device, *, batch: int = 2
) -> tuple[Float32[np.ndarray, "c p q r"], Crop]:
    """The tokens of the cells of a scan's body, window by window, blended by a Gaussian; and where the cells lie.

    Windows that reach beyond the body's box see what the scan has there, and its lowest value beyond the scan. In
    memory: the tokens, twice.
    """
    body = body_crop(case, store.cases[case], windows.spacing)
    cells = cells_of(body)
    side = tuple(voxels // CELL for voxels in windows.shape)
    starts = [_starts(*axis, windows.overlap) for axis in zip(cells.shape, side, strict=True)]
    weight = importance(side)
    total = summed = None
    corners = list(product(*starts))
    for some in (corners[n : n + batch] for n in range(0, len(corners), batch)):
        images = as_images([cut(store, _window(body, corner, windows.shape)) for corner in some])
        tokens = encode(images.to(device)).float().cpu()
        if total is None:
            total, summed = torch.zeros(tokens.shape[1], *cells.shape), torch.zeros(cells.shape)
        for corner, found in zip(some, tokens, strict=True):
            inside = tuple(slice(max(a, 0), min(a + n, m)) for a, n, m in zip(corner, side, cells.shape, strict=True))
            taken = tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, corner, strict=True))
            total[:, *inside] += found[:, *taken] * weight[taken]
            summed[inside] += weight[taken]
    return (total / summed).numpy(), cells


def frozen(encoder: nn.Module, device: torch.device) -> Encode:
    """The encoder as it is, in evaluation mode on that device, asked without gradients."""
    encoder.to(device).eval()

    def ask(images: Tensor) -> Tensor:
        with torch.no_grad():
            return encode(encoder, images)

    return ask


def _starts(cells: int, side: int, overlap: float) -> list[int]:
    """First cells of windows along one axis; a window wider than the grid has it in its middle."""
    return window_starts(cells, side, overlap) if cells > side else [-((side - cells) // 2)]


def _window(body: Crop, corner: Sequence[int], shape: Size) -> Crop:
    to_mm = body.to_mm.copy()
    to_mm[:3, 3] += body.to_mm[:3, :3] @ (CELL * np.asarray(corner))
    return Crop(body.case, shape, to_mm)


def _box(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """0..1 -> mm along R, A, S."""
    to_mm = np.diag([*(high - low), 1.0])
    to_mm[:3, 3] = low
    return to_mm
