"""Recipes of pretraining: everything for one run in one place, what it is for and how it follows data and device.

A recipe is found by name through the entry-point group `spade3d.recipes`; anyone may register more. Settings are
read before torch is imported, so this file imports the networks only when a recipe is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from spade3d.configuration import (
    Common,
    Optim,
    Positive,
    PositiveRange,
    Range,
    Settings,
    Share,
    ShareRange,
    Voxels,
    with_values,
)
from spade3d.faults import UsageFault

if TYPE_CHECKING:
    from spade3d.training.loop import Batches, Task
    from spade3d.volumes.store import VolumeStore


@dataclass(frozen=True, eq=False)
class Built:
    """What a recipe hands to the loop."""

    task: Task
    batches: Batches
    network: Any  # the SwinUNETR whose encoder is the result
    pictures: Callable[[], dict[str, np.ndarray]]  # some views for the report


@dataclass(frozen=True)
class Recipe:
    """A name, its settings, how open settings follow the data, and how the run is built."""

    name: str
    summary: str
    settings: type[Common]
    choose: Callable[[Common, VolumeStore, Sequence[int], str], Common]
    build: Callable[[Common, VolumeStore, Sequence[int]], Built]
    said: Callable[[Common], dict[str, str]]  # what else a user should know of the choice before the run


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, or a UsageFault with the list of names."""
    known = {point.name: point for point in entry_points(group="spade3d.recipes")}
    if name not in known:
        raise UsageFault(f"recipe {name!r} is not known; one of: {', '.join(sorted(known))}")
    return known[name].load()


class CropSettings(Settings):
    """Two overlapping crops of an anchor scan and their counterparts; sizes in voxels of the prepared scans."""

    shape: Voxels | None = None
    anchors: Annotated[int, Field(ge=1, le=64)] = 2
    scans: Annotated[int, Field(ge=1, le=64)] = 2
    overlap: ShareRange = (0.2, 0.8)
    alike_iou: Share = 0.5
    places: Annotated[int, Field(ge=1)] = 64
    flip: tuple[bool, bool, bool] = (True, True, True)
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 15.0
    zoom: PositiveRange = (0.8, 1.25)
    gamma: PositiveRange = (0.7, 1.5)
    contrast: PositiveRange = (0.8, 1.2)
    brightness: Annotated[float, Field(ge=0)] = 0.1
    blur: Range = (0.0, 1.0)
    blur_chance: Share = 0.3
    noise: Annotated[float, Field(ge=0)] = 0.05


class ContrastSettings(Settings):
    """Distances in mm of the body frame; memories in vectors."""

    far_mm: Positive | None = None
    far_local_mm: Positive | None = None
    temperature: Positive = 0.1
    global_memory: Annotated[int, Field(ge=1)] = 4096
    local_memory: Annotated[int, Field(ge=1)] = 8192
    global_dim: Annotated[int, Field(ge=2)] = 128
    local_dim: Annotated[int, Field(ge=2)] = 64
    momentum: Share | None = None
    global_weight: Annotated[float, Field(ge=0)] | None = None
    local_weight: Annotated[float, Field(ge=0)] = 1.0
    restoration_weight: Annotated[float, Field(ge=0)] = 1.0


class SpadeSettings(Common):
    """Everything that a Spade run can be told."""

    recipe: str = "spade"
    crop: CropSettings = CropSettings()
    contrast: ContrastSettings = ContrastSettings()
    optim: Optim = Optim()


# What a training step costs on two CPU cores: seconds per million voxels through the whole Swin-UNETR at feature size
# 24 (measured: 4.8 to 6); grows with the square of the width.
CPU_SECONDS = 6.0
PRETRAINING_BUDGET_S = 480.0
LEAST_FAR = 0.25  # of all pairs of crops; below it the global contrast has next to nothing to tell apart
MATCHED_CELL = 4  # places are matched on a grid of cells as large as 4 x 4 x 4 voxels, but cubes in mm


def choose_spade(settings: SpadeSettings, store: VolumeStore, cases: Sequence[int], device: str) -> SpadeSettings:
    """Fill what was left open.

    Crop: within two thirds of the median scan, so that there are different places to tell apart, and as many voxels
    as a cube of 96 (48 on a CPU). Far: half the crop's edge for whole crops, a quarter for single places.
    Steps: 50,000 on a GPU; on a CPU what fits into about eight minutes. Momentum: 0.996 as is usual; less in runs of
    under a thousand steps, where such a teacher would never leave its beginning. Global weight: 1, but 0 where fewer
    than one in four pairs of crops lie far apart: scans hardly larger than the crop show one place only, and a contrast
    of what is alike only adds noise (docs/log.md, 2026-11-20).
    """
    from spade3d.scans import typical_grid

    shape, spacing = typical_grid(store, cases)
    crop = settings.crop.shape or crop_within(shape * 2 / 3, spacing, side=48 if device == "cpu" else 96)
    edge_mm = float(np.prod(np.asarray(crop) * spacing) ** (1 / 3))
    width = settings.network.feature_size or (24 if device == "cpu" else 48)
    crops = 2 * settings.crop.anchors * min(settings.crop.scans, len(cases))
    voxels = crops * math.prod(crop) * 4 / 3  # the teacher only looks
    steps = settings.steps or steps_for(voxels, width, device, PRETRAINING_BUDGET_S, on_gpu=50_000)
    far_mm = settings.contrast.far_mm or round(edge_mm / 2, 1)
    weight = settings.contrast.global_weight
    if weight is None:
        weight = float(far_share(store, cases, crop, spacing, far_mm) >= LEAST_FAR)
    return with_values(
        settings,
        {
            "crop.shape": crop,
            "network.feature_size": width,
            "contrast.far_mm": far_mm,
            "contrast.global_weight": weight,
            "contrast.far_local_mm": settings.contrast.far_local_mm or round(edge_mm / 4, 1),
            "contrast.momentum": settings.contrast.momentum or round(1 - min(0.02, max(0.004, 4 / steps)), 4),
            "steps": steps,
            "save_every": settings.save_every or max(1, steps // 10),
            "data.spacing": spacing,
            "device": device,
        },
    )


def said_of_spade(settings: SpadeSettings) -> dict[str, str]:
    """Distances and weights of the contrast."""
    contrast = settings.contrast
    off = "" if contrast.global_weight else " (off: crops of these scans lie too near to each other)"
    return {
        "far apart": f"{contrast.far_mm:g} mm for crops{off}, {contrast.far_local_mm:g} mm for places",
    }


def far_share(store: VolumeStore, cases: Sequence[int], crop, spacing, far_mm: float) -> float:
    """The share of pairs of random crops, any two scans, that lie more than `far_mm` apart in the body frame."""
    from spade3d.crops.pairs import PairStream, Sampling
    from spade3d.crops.selection import apart

    places = PairStream(store, cases, body_frames(store), Sampling(crop, spacing)).places_of_crops(512)
    return float(apart(places, places, far_mm).mean())


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


def steps_for(voxels: float | int, width: int, device: str, budget_s: float, *, on_gpu: int) -> int:
    """Steps of a run: a fixed number on a GPU, on a CPU as many as the budget allows (50 to 2,000)."""
    if device != "cpu":
        return on_gpu
    seconds = voxels / 1e6 * CPU_SECONDS * (width / 24) ** 2
    return int(np.clip(budget_s / seconds, 50, 2000)) // 10 * 10


def build_spade(settings: SpadeSettings, store: VolumeStore, cases: Sequence[int]) -> Built:
    """Spade on any CT or MR: one GPU and a day at full size, minutes on a CPU at the size chosen for it."""
    import torch

    from spade3d.contrast.spade import Spade, SpadeTerms
    from spade3d.crops.crop import Views
    from spade3d.crops.pairs import PairStream, Sampling

    torch.manual_seed(settings.seed)
    network = build_network(settings.network, out_channels=1)
    terms = SpadeTerms(**settings.contrast.model_dump())
    size = settings.network.feature_size
    task = Spade(network, bottleneck=16 * size, decoded=size, terms=terms)
    crop = settings.crop
    sampling = Sampling(
        shape=crop.shape,
        spacing=settings.data.spacing,
        anchors=crop.anchors,
        scans=crop.scans,
        overlap=crop.overlap,
        alike_iou=crop.alike_iou,
        grid=matched_grid(crop.shape, settings.data.spacing),
        places=crop.places,
        views=Views(**crop.model_dump(include=set(Views.__dataclass_fields__))),
    )
    batches = PairStream(store, cases, body_frames(store), sampling, seed=settings.seed)
    return Built(task, batches, network, lambda: batches.pictures(0))


def matched_grid(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int, int]:
    """Cells along i, j, k on which places are matched: about as long in mm along each axis, whatever the slices."""
    cell_mm = MATCHED_CELL * math.prod(spacing) ** (1 / 3)
    i, j, k = (max(1, round(n * mm / cell_mm)) for n, mm in zip(shape, spacing, strict=True))
    return i, j, k


def body_frames(store: VolumeStore) -> list[np.ndarray]:
    """For each case of a store, the affine (4, 4) from its RAS+ mm to body-frame mm."""
    from spade3d.volumes.body_frame import box_frames

    return [frame.to_frame for frame in box_frames([case.body_box_mm for case in store.cases])]


def build_network(network, out_channels: int):
    """The Swin-UNETR of some settings, freshly drawn from torch's generator."""
    from spade3d.networks.swin_unetr import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=out_channels, **network.model_dump())


spade = Recipe(
    "spade",
    "spatially debiased contrast: positives and negatives by place, globally invariant, locally equivariant",
    SpadeSettings,
    choose_spade,
    build_spade,
    said_of_spade,
)
