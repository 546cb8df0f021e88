"""Recipes of fine-tuning: settings, how open ones follow the data, and everything built for one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from spade3d.configuration import (
    Common,
    Network,
    Optim,
    Positive,
    PositiveRange,
    Range,
    Settings,
    Share,
    Voxels,
    with_values,
)
from spade3d.faults import DataFault
from spade3d.recipes.choosing import crop_within, steps_for

if TYPE_CHECKING:
    from dagman.downstream.labelled import Classes, LabelledStream
    from spade3d.volumes.store import VolumeStore

FINETUNING_BUDGET_S = 480.0


class LabelledCrops(Settings):
    """Crops of fine-tuning; no flips by default, because a left kidney is not a right one."""

    shape: Voxels | None = None
    crops: Annotated[int, Field(ge=1, le=64)] = 2
    foreground: Share = 0.67
    flip: tuple[bool, bool, bool] = (False, False, False)
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 10.0
    zoom: PositiveRange = (0.85, 1.18)
    gamma: PositiveRange = (0.8, 1.25)
    contrast: PositiveRange = (0.9, 1.1)
    brightness: Annotated[float, Field(ge=0)] = 0.05
    blur: Range = (0.0, 0.7)
    blur_chance: Share = 0.1
    noise: Annotated[float, Field(ge=0)] = 0.03


class Scoring(Settings):
    """How predictions are made and judged: on the input's own grid, background left out."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    tolerance_mm: Positive = 2.0
    looks: Annotated[int, Field(ge=0)] = 4
    look_cases: Annotated[int, Field(ge=1)] = 6


class FinetuneSettings(Common):
    """Everything that a fine-tuning run can be told."""

    task: Literal["segmentation"] = "segmentation"
    protocol: Literal["holdout"] = "holdout"
    init: str | None = None
    labels: Annotated[float, Field(gt=0)] | None = None
    crop: LabelledCrops = LabelledCrops()
    optim: Optim = Optim(lr=5e-4, weight_decay=0.01)
    scoring: Scoring = Scoring()


def choose(settings: FinetuneSettings, store: VolumeStore, cases: Sequence[int], device: str) -> FinetuneSettings:
    """Fill what was left open; the same with and without a checkpoint, so that the two can be compared.

    Crop: within the median scan, as many voxels as a cube of 96 (64 on a CPU). Network: the checkpoint's, else as
    pretraining would choose. Steps: 20,000 on a GPU; on a CPU what fits into about eight minutes.
    """
    from spade3d.scans import typical_grid

    shape, spacing = typical_grid(store, cases)
    crop = settings.crop.shape or crop_within(shape, spacing, side=64 if device == "cpu" else 96)
    network = settings.network
    if settings.init is not None:
        network = network_of(Path(settings.init), network)
    width = network.feature_size or (24 if device == "cpu" else 48)
    steps = settings.steps or steps_for(
        settings.crop.crops * math.prod(crop), width, device, FINETUNING_BUDGET_S, on_gpu=20_000
    )
    return with_values(
        settings,
        {
            "crop.shape": crop,
            "network": network.model_dump() | {"feature_size": width},
            "steps": steps,
            "save_every": settings.save_every or max(1, steps // 5),
            "data.spacing": spacing,
            "device": device,
        },
    )


def network_of(checkpoint: Path, asked: Network) -> Network:
    """The network that a checkpoint says it belongs to; what was asked for explicitly stays, and must then fit it."""
    from spade3d.networks.foreign import describe_encoder

    said = describe_encoder(checkpoint)
    known = {name: said[name] for name in Network.model_fields if name in said}
    known["window"] = said["window"][0]
    explicit = asked.model_dump(exclude_unset=True)
    try:
        return Network(**(known | {name: value for name, value in explicit.items() if value is not None}))
    except ValidationError as error:
        reasons = "; ".join(problem["msg"] for problem in error.errors())
        raise DataFault(f"{checkpoint}: no network can be built for it ({reasons}); give another checkpoint") from None


def build_stream(
    settings: FinetuneSettings, store: VolumeStore, cases: Sequence[int], classes: Classes
) -> LabelledStream:
    """The labelled crops of a run."""
    from dagman.downstream.labelled import LabelledSampling, LabelledStream
    from spade3d.crops.crop import Views

    crop = settings.crop
    sampling = LabelledSampling(
        shape=crop.shape,
        spacing=settings.data.spacing,
        crops=crop.crops,
        foreground=crop.foreground,
        views=Views(**crop.model_dump(include=set(Views.__dataclass_fields__))),
    )
    return LabelledStream(store, cases, classes, sampling, seed=settings.seed)
