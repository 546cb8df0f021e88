"""Recipes of studies: settings of classification and localisation, how open ones follow the data, and what is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dagman.recipes.clarity_settings import ClaritySettings, chosen_teacher
from dagman.recipes.finetuning import FINETUNING_BUDGET_S, Labels, network_of
from spade3d.configuration import (
    CheckpointPath,
    Common,
    Count,
    InputPath,
    Optim,
    Positive,
    Settings,
    Voxels,
    read_yaml,
    rule,
    with_values,
)
from spade3d.faults import UsageFault
from spade3d.recipes.changed_crops import MildlyChangedCrops
from spade3d.recipes.choosing import check_memory, crop_within, steps_for

if TYPE_CHECKING:
    from dagman.downstream.token_grids import Windows
    from spade3d.volumes.store import VolumeStore

ALIGNED = 16  # voxels: sides of what the encoder sees are multiples of it (`downstream/token_grids.py`)
EPOCHS = 60  # of a head on cached tokens, where --steps is open
FEWEST_STEPS, MOST_STEPS = 200, 5000


class StudyCrops(MildlyChangedCrops):
    """What the encoder sees at once: a window (cached), a crop of a bag, or the whole body at low resolution.

    Changes are of crops of a bag, and of whole bodies, from step to step; cached tokens are of the scan as it is.
    """

    shape: Voxels | None = None
    """voxels that the encoder sees at once, multiples of 16; left out, what suits the scans and the device."""
    crops: Annotated[int, Field(ge=1, le=64)] = 4
    """of a bag."""


class AttentionSettings(Settings):
    """Of the head `attention`: its width, and whether it knows where in the body a cell lies."""

    dim: Annotated[int, Field(ge=8, le=2048)] = 128
    """channels of the head attention."""
    places: bool = True
    """whether that head knows where in the body a cell lies."""


class StudyScoring(Settings):
    """How studies are judged."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """share of a window that its neighbours overlap."""
    looks: Annotated[int, Field(ge=0)] = 4
    """times that the run is judged while it learns; 0 judges at the end only."""
    tolerance_mm: Positive = 10.0
    """how near to a finding, in mm, the peak of a map points at it."""
    baselines: bool = True
    """judge maps that know nothing, too."""


class StudyOptim(Optim):
    """AdamW; a head begins from nothing."""

    lr: Positive = 1e-3


class StudySettings(Common):
    """Everything that a run of classification or localisation can be told."""

    task: Literal["classification", "localisation"] = "classification"
    """tell which findings a study shows, or also where."""
    findings: InputPath | None = None
    """a CSV: subject (or case), then a column for each finding."""
    boxes: InputPath | None = None
    """a CSV of boxes (subject, finding, x0 ... z1, RAS mm) that maps are judged by; left out, the store's labels."""
    init: CheckpointPath | None = None
    """a run of spade-pretrain, its encoder, or another Swin-UNETR's checkpoint; left out, from scratch."""
    labels: Labels = None
    """subjects to learn from: a count, or a share below 1; left out, all."""
    arrangement: Literal["cached", "bag", "whole"] = "cached"
    """cached: the frozen encoder runs once over each scan; bag: crops; whole: the body at low resolution."""
    head: Literal["linear", "attention", "clarity"] | None = None
    """left out, attention, and clarity for localisation."""
    tuning: Literal["frozen", "full"] = "frozen"
    """whether the encoder learns, too."""
    encoder_lr: Positive = 0.1
    """rate of an encoder that learns, as a factor on the head's."""
    studies: Count | None = None
    """of a batch; left out, 8 where tokens are cached, else 2."""
    tokens: str | None = None
    """folder of cached tokens, which runs with one encoder and one store share; left out, RUN/tokens."""
    low_mm: Positive | None = None
    """mm of a voxel of --arrangement whole; left out, the body fits into the crop."""
    crop: StudyCrops = StudyCrops()
    attention: AttentionSettings = AttentionSettings()
    clarity: ClaritySettings = ClaritySettings()
    optim: StudyOptim = StudyOptim()
    scoring: StudyScoring = StudyScoring()

    @rule
    def parts_go_together(self) -> StudySettings:
        """Refused here, before anything is prepared."""
        if self.tuning == "full" and self.arrangement == "cached":
            raise ValueError("cached tokens are of an encoder that stays; --arrangement bag or whole tunes it")
        if self.task == "localisation" and self.head == "linear":
            raise ValueError("a linear probe of the mean token has no map; --head attention or clarity localises")
        if self.low_mm is not None and self.arrangement != "whole":
            raise ValueError("low_mm is the voxel of --arrangement whole")
        if self.tuning == "frozen" and _given(self, {"encoder_lr"}):
            raise ValueError("encoder_lr is of an encoder that learns; --tuning full")
        head = self.head or ("clarity" if self.task == "localisation" else "attention")
        for part in ("attention", "clarity"):
            of = getattr(self, part)  # but not its teacher, which is filled in whatever the head is (`choose`)
            if part != head and _given(of, set(type(of).model_fields) - {"teacher"}):
                raise ValueError(f"{part} is of the head of that name, and the head is {head}; --head {part} has it")
        if self.arrangement != "bag" and _given(self.crop, {"crops"}):
            raise ValueError("crop.crops are of --arrangement bag")
        if self.arrangement == "cached" and _given(self.crop, set(StudyCrops.model_fields) - {"shape", "crops"}):
            raise ValueError("cached tokens are of scans as they are; --arrangement bag or whole changes them")
        if self.boxes is not None and self.task != "localisation":
            raise ValueError("boxes judge maps; --task localisation makes them")
        if any(side % ALIGNED for side in self.crop.shape or ()):
            raise ValueError(f"crop.shape {self.crop.shape}: each side is a multiple of {ALIGNED} voxels")
        if self.loaders and self.clarity.prior.source != "none":
            raise ValueError("places where findings may be are found in the training process; leave loaders out")
        if self.data.spacing == "native":
            raise ValueError("cells are as large in every study; give data.spacing in mm, or leave it to the data")
        return self


def _given(part: Settings, names: set[str]) -> bool:
    """Whether one of these is not as it is by default: the file that a run leaves says all, so to be said is not to be
    asked for."""
    return any(getattr(part, name) != type(part).model_fields[name].default for name in names)


def choose(settings: StudySettings, store: VolumeStore, taught: Sequence[int], device: str) -> StudySettings:
    """Fill what was left open; the same with and without a checkpoint where crop and spacing are given.

    Window: the crop that the encoder was trained with, else within the median scan as many voxels as a cube of 96 (64
    on a CPU); of `whole`: the largest body of those that teach, in as many voxels, or in the crop that is given.
    Network: the checkpoint's. Steps: on cached tokens 60 times through the studies (200 to 5,000); else 10,000 on a
    GPU, on a CPU what fits into about eight minutes.
    """
    from spade3d.crops.crop import body_bounds
    from spade3d.scans import typical_grid

    if store.preprocessing.spacing is None:
        raise UsageFault(
            "the store keeps each scan's own spacing, and cells are as large in every study; prepare another"
        )
    shape, spacing = typical_grid(store, taught)
    on_cpu, cached = device == "cpu", settings.arrangement == "cached"
    side = 64 if on_cpu else 96
    mm = settings.low_mm
    if settings.arrangement == "whole":
        body = np.max([np.diff(body_bounds(store.cases[i]), axis=0)[0] for i in taught], axis=0)
        if settings.crop.shape is not None:
            needed = max(*(body / settings.crop.shape), *spacing)
            mm = mm or math.ceil(needed * 1000 - 1e-6) / 1000
            if (body > mm * np.array(settings.crop.shape) * (1 + 1e-5)).any():
                raise UsageFault(
                    f"--crop.shape {settings.crop.shape} of {mm:g} mm does not hold the largest body, "
                    f"{' x '.join(f'{side:.0f}' for side in body)} mm; leave low_mm or crop.shape open"
                )
        mm = mm or round(max(float(body.prod() ** (1 / 3)) / side, *spacing), 3)
        crop = settings.crop.shape or tuple(int(n) * ALIGNED for n in np.ceil(body / mm / ALIGNED - 1e-6))
    else:
        crop = settings.crop.shape or trained_crop(settings.init) or crop_within(shape, spacing, side, ALIGNED)
    network = settings.network if settings.init is None else network_of(Path(settings.init), settings.network)
    width = network.feature_size or (24 if on_cpu else 48)
    studies = settings.studies or (8 if cached else 2)
    crops = settings.crop.crops if settings.arrangement == "bag" else 1
    check_memory(crop, 1 if cached else studies * crops, width, device)
    if cached:
        steps = int(np.clip(math.ceil(EPOCHS * len(taught) / studies), FEWEST_STEPS, MOST_STEPS))
    else:
        steps = steps_for(studies * crops * math.prod(crop), width, device, FINETUNING_BUDGET_S, on_gpu=10_000)
    steps = settings.steps or steps
    head = settings.head or ("clarity" if settings.task == "localisation" else "attention")
    return with_values(
        settings,
        {
            "crop.shape": crop,
            "low_mm": mm,
            "network": network.model_dump() | {"feature_size": width},
            "head": head,
            "studies": studies,
            "steps": steps,
            "save_every": settings.save_every or max(1, steps // 5),
            "clarity.teacher": chosen_teacher(settings.clarity.teacher, store, taught, device).model_dump(),
            "data.spacing": spacing,
            "device": device,
        },
    )


def trained_crop(init: str | None) -> tuple[int, int, int] | None:
    """The crop of the run that an encoder lies in, to the nearest multiples of 16; None where that is not said."""
    beside = None if init is None else Path(init).with_name("config.yaml")
    shape = (read_yaml(beside).get("crop") or {}).get("shape") if beside and beside.is_file() else None
    if shape is None:
        return None
    i, j, k = (max(1, round(side / ALIGNED)) * ALIGNED for side in shape)
    return i, j, k


def windows_of(settings: StudySettings) -> Windows:
    """How scans are shown to the encoder where all of the body is."""
    from dagman.downstream.token_grids import Windows

    low = settings.arrangement == "whole"
    spacing = (settings.low_mm,) * 3 if low else settings.data.spacing
    return Windows(settings.crop.shape, spacing, settings.scoring.overlap)


def head_settings(settings: StudySettings, names: Sequence[str], *, judging: bool) -> dict[str, Any]:
    """What the head is built with, besides channels and findings. Cells that are judged are one grid; a bag's are
    several crops, one behind the other."""
    if settings.head == "linear":
        return {}
    if settings.head == "attention":
        return settings.attention.model_dump()
    crops = settings.crop.crops if settings.arrangement == "bag" and not judging else 1
    return settings.clarity.head(names) | {"crops": crops}
