"""How open settings follow the data and the device: the size of a crop, the grid of its places, the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spade3d.faults import UsageFault
from spade3d.machine import usable_memory

# What a training step costs on two CPU cores: seconds per million voxels through the whole Swin-UNETR at feature size
# 24 (measured: 4.8 to 6); grows with the square of the width.
CPU_SECONDS = 6.0
# Bytes that learning from a voxel takes at the very least, for each channel of the first stage: a quarter of what an
# encoder took (48 channels, one crop of 96^3: 1.9 GiB).
LEAST_BYTES = 12
MATCHED_CELL = 4  # places are matched on a grid of cells as large as 4 x 4 x 4 voxels, but cubes in mm
HIDDEN_CELL = 8  # the same for the cells that are hidden from the student


def crop_within(shape: np.ndarray, spacing: Sequence[float], side: int, step: int = 8) -> tuple[int, int, int]:
    """A crop within `shape`, of about as many voxels as a cube of `side`: a cube in mm, as far as the shape allows.

    What the shape does not offer along one axis goes to the others, up to twice `side`: of a stack of ten slices 8 mm
    apart the crop takes all slices and a wide plane. Each side is a multiple of `step`. (docs/log.md, 2026-11-20)
    """
    shape, spacing = np.clip(shape, step, 2 * side), np.asarray(spacing)
    whole = np.zeros(3, bool)  # axes along which the cube is longer than the shape
    for _ in range(3):
        edge_mm = (side**3 / shape[whole].prod() * spacing[~whole].prod()) ** (1 / max(1, 3 - whole.sum()))
        whole |= shape * spacing <= edge_mm
    voxels = np.where(whole, shape, edge_mm / spacing)
    i, j, k = (step * max(1, round(float(n) / step)) for n in voxels)
    return i, j, k


def crop_and_width(
    settings, shape: np.ndarray, spacing: Sequence[float], device: str
) -> tuple[tuple[int, int, int], int]:
    """Of a pretraining on scans of typically `shape` voxels: a crop within two thirds of them, so that there are
    different places to tell apart, and the network's feature size; what the settings say stays."""
    on_cpu = device == "cpu"
    crop = settings.crop.shape or crop_within(shape * 2 / 3, spacing, side=48 if on_cpu else 96)
    return crop, settings.network.feature_size or (24 if on_cpu else 48)


def check_memory(crop: Sequence[int], crops: int, width: int, device: str) -> None:
    """UsageFault where a CPU's memory cannot hold what learning from so many crops at once takes at the very least: the
    system would kill the run without a word. (A GPU's says so itself.) Several processes share the crops."""
    from spade3d.training import ranks

    crops = math.ceil(crops / ranks.world())
    needed, there = LEAST_BYTES * width * crops * math.prod(crop), usable_memory()
    if device == "cpu" and needed > there:
        raise UsageFault(
            f"crops of {' x '.join(map(str, crop))} voxels, {crops} at once, by a network of feature size {width} take "
            f"more than {needed / 2**30:.0f} GiB, and there are {there / 2**30:.0f}; choose smaller or fewer crops"
        )


def matched_grid(shape: Sequence[int], spacing: Sequence[float], cell: int = MATCHED_CELL) -> tuple[int, int, int]:
    """Cells along i, j, k, as large as a cube of `cell` voxels, about as long in mm on every axis."""
    cell_mm = cell * math.prod(spacing) ** (1 / 3)
    i, j, k = (max(1, round(n * mm / cell_mm)) for n, mm in zip(shape, spacing, strict=True))
    return i, j, k


def steps_for(voxels: float | int, width: int, device: str, budget_s: float, *, on_gpu: int) -> int:
    """Steps of a run: a fixed number on a GPU, on a CPU as many as the budget allows (50 to 2,000)."""
    if device != "cpu":
        return on_gpu
    seconds = voxels / 1e6 * CPU_SECONDS * (width / 24) ** 2
    return int(np.clip(budget_s / seconds, 50, 2000)) // 10 * 10
