"""Recipes of fine-tuning: settings, how open ones follow protocol and data, and everything built for one run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, WrapValidator, field_validator

from dagman.downstream.protocols import PROTOCOLS, Protocol
from dagman.recipes.predicting import Segmenting
from spade3d.configuration import (
    NATIVE,
    CheckpointPath,
    Common,
    Count,
    Network,
    Optim,
    Positive,
    Settings,
    Share,
    from_environment,
    merge,
    read_yaml,
    resolve,
    rule,
    with_values,
)
from spade3d.faults import DataFault, UsageFault
from spade3d.recipes.changed_crops import MildlyChangedCrops
from spade3d.recipes.choosing import check_memory, crop_within, steps_for
from spade3d.volumes.organs import canonical_organ

if TYPE_CHECKING:
    from dagman.downstream.labelled import Classes, LabelledStream
    from dagman.downstream.regimes import Regime
    from spade3d.volumes.store import VolumeStore

FINETUNING_BUDGET_S = 480.0
RATE, LINEAR_RATE = 5e-4, 1e-2  # of learning; a linear decoder at 2e-3 knew next to nothing after 120 steps
PRETRAINED, SCRATCH = "pretrained", "scratch"  # how the names of several runs begin


def subjects_or_share(written: Any, read: Callable[[Any], float | None]) -> int | float | None:
    """How many subjects teach: a count stays a whole number, in config.yaml too, and a share lies below 1. What says
    1.0 may mean one subject or all of them."""
    number = read(written)
    if number is None or number < 1:
        return number
    if number == 1 and not (isinstance(written, int) or str(written).strip().isdecimal()):
        raise ValueError("this may be one subject or all of them: write 1 for one, and leave labels out for all")
    if number != int(number):
        raise ValueError("a whole number of subjects, or a share between 0 and 1, is needed")
    return int(number)


Labels = Annotated[SerializeAsAny[Positive | None], WrapValidator(subjects_or_share)]


class LabelledCrops(MildlyChangedCrops):
    """Crops of fine-tuning."""

    crops: Annotated[int, Field(ge=1, le=64)] = 2
    """of a batch."""
    foreground: Share = 0.67
    """share of crops that lie around a labelled voxel; the others lie anywhere."""


class FinetuneOptim(Optim):
    """AdamW; the rate follows what learns."""

    lr: Positive | None = None
    """learning rate of AdamW, at its peak; left out, 5e-4, or 1e-2 where the decoder is linear."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class Tuning(Settings):
    """How much of the network learns, and how fast (downstream/regimes.py).

    Layer decay and warm-up, both off by default, keep what a checkpoint holds: a run from scratch has nothing to keep,
    and goes without them.
    """

    encoder: Literal["full", "frozen", "linear"] = "full"
    """what learns: all, all but the encoder, or a linear decoder alone."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """factor on the rate for each layer farther from the output; 1 has none."""
    encoder_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the run in which the encoder rests; 0: it learns from the start."""


class Scoring(Settings):
    """How predictions are made and judged."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """share of a window that its neighbours overlap."""
    flips: str | None = None
    """average over mirror images: all, or along some of the axes ras, such as as; left out, none."""
    largest_component: bool = False
    """keep only the largest connected piece of each class."""
    grid: Literal["input", "prepared"] = "input"
    """judge on the input's own grid, or on the prepared one."""
    background: bool = False
    """count the background as one more structure."""
    tolerance_mm: Positive = 2.0
    """of the surface Dice (NSD), in mm."""
    tolerances_mm: dict[str, Positive] = {}
    """of single structures, in mm, by name: --scoring.tolerances-mm.liver 3."""
    surface: Literal["voxels", "elements"] = "voxels"
    """of voxels, as MONAI has it, or of elements between them, as surface-distance has it."""
    looks: Annotated[int, Field(ge=0)] = 4
    """times that the run is judged while it learns; 0 judges at the end only."""
    look_cases: Annotated[int, Field(ge=1)] = 6
    """scans that such a look is at."""

    @field_validator("tolerances_mm")
    @classmethod
    def structures_have_one_name(cls, tolerances: dict[str, float]) -> dict[str, float]:
        """However a name is written (`left-atrium`), this is the structure that it is compared as."""
        named: dict[str, float] = {}
        for name, mm in tolerances.items():
            if named.setdefault(canonical_organ(name), mm) != mm:
                raise ValueError(f"{canonical_organ(name)} is given twice, with different tolerances; keep one of them")
        return named

    @rule
    def flips_are_axes(self) -> Scoring:
        """Refused before anything is prepared."""
        try:
            self.segmenting()
        except UsageFault as fault:
            raise ValueError(str(fault)) from None
        return self

    def segmenting(self) -> Segmenting:
        """How scans that judge are segmented."""
        return Segmenting(flips=self.flips, largest_component=self.largest_component)


class FinetuneSettings(Common):
    """Everything that a fine-tuning run can be told."""

    task: Literal["segmentation"] = "segmentation"
    """segmentation here; classification and localisation have options of their own."""
    protocol: Literal[tuple(PROTOCOLS)] = "holdout"
    """who learns and who judges, and by which rules (docs/protocols.md)."""
    init: CheckpointPath | None = None
    """a run of spade-pretrain, its encoder, or another Swin-UNETR's checkpoint; left out, from scratch."""
    labels: Labels = None
    """labelled subjects to learn from: a count, or a share below 1; left out, all."""
    draw: Annotated[int, Field(ge=0)] | None = None
    """which draw of these subjects; left out, the seed."""
    crop: LabelledCrops = LabelledCrops()
    tuning: Tuning = Tuning()
    optim: FinetuneOptim = FinetuneOptim()
    scoring: Scoring = Scoring()


class FinetuneCommand(FinetuneSettings):
    """What `dagman-finetune` can be told: a run, or several that differ in seed, labelled subjects and beginning."""

    draws: Count = 1
    """of labelled subjects: --draw (else 0) and those after it; one alone is each seed's own."""
    seeds: Count = 1
    """--seed and those after it, each with every draw."""
    from_scratch_twin: bool = False
    """give each run a twin with the same subjects and seed, from scratch."""

    def runs(self) -> dict[str, FinetuneSettings]:
        """Every run by the name of its folder: seeds, in each the draws, in each the run and its twin."""
        shared = {name: value for name, value in self if name in FinetuneSettings.model_fields}
        found = {}
        for seed in range(self.seed, self.seed + self.seeds):
            first = (seed if self.draws == 1 else 0) if self.draw is None else self.draw
            for draw in range(first, first + self.draws):
                for init in [self.init, None] if self.from_scratch_twin else [self.init]:
                    name = f"{SCRATCH if init is None else PRETRAINED}-seed{seed}-draw{draw}"
                    found[name] = FinetuneSettings(**shared | {"seed": seed, "draw": draw, "init": init})
        return found


def resolve_finetuning(files: Sequence[Path], flags: Mapping[str, Any], environment=os.environ) -> FinetuneCommand:
    """Defaults < the protocol < files, left to right < environment < flags. Raises UsageFault by key."""
    asked: dict[str, Any] = {}
    for layer in (*map(read_yaml, files), from_environment(environment), flags):
        merge(asked, layer, "", {})
    name = asked.get("protocol", FinetuneSettings().protocol)
    fixed: dict[str, Any] = {}
    if isinstance(name, str) and name in PROTOCOLS:  # else `resolve` says what is wrong with it
        for dotted, value in PROTOCOLS[name].settings.items():
            *parents, key = dotted.split(".")
            place = fixed
            for parent in parents:
                place = place.setdefault(parent, {})
            place[key] = value
    command = resolve(FinetuneCommand, files, flags, environment, (f"protocol {name}", fixed))
    if command.draws > 1 and command.labels is None:
        raise UsageFault(f"--draws {command.draws} of all labelled subjects are the same; say how many: --labels N")
    if command.protocol == "few-shot" and command.labels is None:
        raise UsageFault("--protocol few-shot: of how many subjects? say --labels N, or a share below 1")
    if command.from_scratch_twin and command.init is None:
        raise UsageFault("--from-scratch-twin: the twin of a run that is from scratch, too; give that run an --init")
    return command


def protocol_of(settings: FinetuneSettings) -> Protocol:
    return PROTOCOLS[settings.protocol]


def regime_of(settings: FinetuneSettings) -> Regime:
    """What of `tuning` acts: layer decay and warm-up where an encoder was loaded, and learns."""
    from dagman.downstream.regimes import Regime

    how = settings.tuning
    if how.encoder != "full" or settings.init is None:
        return Regime(how.encoder)
    return Regime(how.encoder, how.layer_decay, how.encoder_warmup)


def choose(settings: FinetuneSettings, store: VolumeStore, cases: Sequence[int], device: str) -> FinetuneSettings:
    """Fill what was left open; the same with and without a checkpoint, so that the two can be compared.

    Crop: within the median scan, as many voxels as a cube of 96 (64 on a CPU). Network: the checkpoint's, else as
    pretraining would choose. Steps: 20,000 on a GPU; on a CPU what fits into about eight minutes. Learning rate: higher
    where the decoder is linear.
    """
    from spade3d.scans import typical_grid

    shape, spacing = typical_grid(store, cases)
    own = store.preprocessing.spacing is None  # each scan has its own, and so have its crops
    if own and settings.data.spacing not in (None, NATIVE):
        raise UsageFault(
            f"data.spacing {settings.data.spacing} asked for, but the store keeps each scan's own, and predictions are "
            "made on it; leave it out, or prepare another store"
        )
    crop = settings.crop.shape or crop_within(shape, spacing, side=64 if device == "cpu" else 96)
    network = settings.network
    if settings.init is not None:
        network = network_of(Path(settings.init), network)
    width = network.feature_size or (24 if device == "cpu" else 48)
    check_memory(crop, settings.crop.crops, width, device)
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
            "optim.lr": settings.optim.lr or (LINEAR_RATE if settings.tuning.encoder == "linear" else RATE),
            "data.spacing": NATIVE if own else spacing,
            "data.window_hu": store.preprocessing.window_hu,
            "data.mr": store.preprocessing.mr,
            "draw": settings.seed if settings.draw is None else settings.draw,
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
    settings: FinetuneSettings,
    store: VolumeStore,
    cases: Sequence[int],
    classes: Classes,
    share: tuple[int, int] = (0, 1),
) -> LabelledStream:
    """The labelled crops of a run, or the part of them that one of the processes that share it learns from."""
    from dagman.downstream.labelled import LabelledSampling, LabelledStream

    crop = settings.crop
    sampling = LabelledSampling(
        shape=crop.shape,
        spacing=None if settings.data.spacing == NATIVE else settings.data.spacing,
        crops=crop.crops,
        foreground=crop.foreground,
        views=crop.views(),
    )
    return LabelledStream(store, cases, classes, sampling, seed=settings.seed, share=share)
