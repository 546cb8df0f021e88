"""Everything that a DAGMaN run can be told, and the paper's own setting."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dagman.recipes.priors import PriorSettings
from spade3d.configuration import (
    Count,
    Data,
    Millimetres,
    Network,
    Optim,
    Positive,
    PositiveRange,
    Pretraining,
    Range,
    Settings,
    Share,
    Voxels,
    rule,
)
from spade3d.recipes.pair_crops import CropSettings


class DistillSettings(Settings):
    """What is masked, what the teacher sees, and how much each loss weighs.

    variant  `dagman` is the paper. Its controls: `semantic` attention without the noisy teacher, the `noisy` teacher
             with random masks, and `smit`, neither. Others: `ibot` masks blocks, `attmask` draws the hints at random,
             `mst` masks what is least attended, `dino` masks nothing and learns from image tokens alone
    """

    variant: Literal["dagman", "semantic", "noisy", "smit", "ibot", "attmask", "mst", "dino"] = "dagman"
    stage: Annotated[int, Field(ge=1, le=4)] | None = None
    masking: Literal["attention", "attmask", "low", "block", "random", "none"] | None = None
    ratio: Share = 0.7
    hint: Share | None = None
    semantic: bool | None = None
    semantic_blocks: Count = 2
    semantic_heads: Count = 8
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    dropped: Literal["token", "cell"] = "token"
    attention_from: Literal["clean", "noisy"] = "clean"
    mask_token: bool = False
    drop_hidden: bool = False
    symmetric: bool = True
    head_width: Count | None = None
    bottleneck: Count | None = None
    prototypes: Annotated[int, Field(ge=2)] | None = None
    standardise: bool = True
    student_temperature: Positive = 0.1
    teacher_temperature: PositiveRange = (0.04, 0.07)
    temperature_warmup: Share = 30 / 800
    centre_momentum: Share = 0.9
    still: Share = 1 / 800
    momentum: Share | None = None
    voxel_weight: Annotated[float, Field(ge=0)] | None = None
    token_weight: Annotated[float, Field(ge=0)] | None = None
    image_weight: Annotated[float, Field(ge=0)] = 0.1
    global_weight: Annotated[float, Field(ge=0)] = 0.1

    @rule
    def hidden_tokens_are_shown_or_left_out(self) -> DistillSettings:
        """Two answers to one question."""
        if self.mask_token and self.drop_hidden:
            raise ValueError("mask_token shows a token where drop_hidden leaves it out of the computation; choose one")
        if self.token_weight and self.drop_hidden:
            raise ValueError("token_weight compares hidden tokens, which drop_hidden does not compute; leave it at 0")
        return self


class DistillCrops(CropSettings):
    """Four pairs of overlapping crops u and v, each of a scan of its own, neither turned nor coloured.

    (The paper states random crops only; crops alone are also the views of the same lab's SMIT.)

    frame  left open: affine for a prior that lies in the body frame, else box, for no place is compared
    """

    frame: Literal["box", "affine", "learned"] | None = None
    anchors: Annotated[int, Field(ge=1, le=4096)] = 4
    scans: Annotated[int, Field(ge=1, le=64)] = 1
    places: Annotated[int, Field(ge=1)] = 1
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    zoom: PositiveRange = (1.0, 1.0)
    gamma: PositiveRange = (1.0, 1.0)
    contrast: PositiveRange = (1.0, 1.0)
    brightness: Annotated[float, Field(ge=0)] = 0.0
    blur: Range = (0.0, 0.0)
    blur_chance: Share = 0.0
    noise: Annotated[float, Field(ge=0)] = 0.0


class DagmanNetwork(Network):
    """Windows and heads of the paper, which divide the grids of usual crops. The paper's third stage is four times as
    deep."""

    heads: tuple[Count, Count, Count, Count] = (4, 4, 8, 16)
    window: Annotated[int, Field(ge=2, le=16)] = 4


class DagmanSettings(Pretraining):
    """Everything that a DAGMaN run can be told."""

    recipe: str = "dagman"
    crop: DistillCrops = DistillCrops()
    network: DagmanNetwork = DagmanNetwork()
    distill: DistillSettings = DistillSettings()
    prior: PriorSettings = PriorSettings()
    optim: Optim = Optim()

    @rule
    def one_rule_hides(self) -> DagmanSettings:
        """What is hidden is decided by the masking rule."""
        if self.crop.hidden:
            raise ValueError("crop.hidden hides by chance what distill.masking decides; leave it at 0")
        return self


class PaperCrops(DistillCrops):
    """Crops of 128^3; 32 pairs a step (WILD, the same Swin and learning rate)."""

    shape: Voxels | None = (128, 128, 128)
    anchors: Annotated[int, Field(ge=1, le=4096)] = 32


class PaperNetwork(DagmanNetwork):
    """Appendix A; the width of the patch embedding and the qkv bias follow from the published parameter count."""

    feature_size: Annotated[int, Field(ge=12, le=192, multiple_of=12)] | None = 48
    depths: tuple[Count, Count, Count, Count] = (2, 2, 8, 2)
    drop_path: Share = 0.1


class PaperData(Data):
    """2 mm; the window of WILD, since DAGMaN states none."""

    spacing: Millimetres | None = (2.0, 2.0, 2.0)
    window_hu: Range = (-500.0, 500.0)


class PaperOptim(Optim):
    """Appendix A: AdamW, cosine, 8e-4, 80 of 800 epochs of warm-up; the rest as in the same lab's code."""

    lr: Positive = 8e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Share = 80 / 800
    floor: Share = 0.0
    clip_norm: Positive | None = None


class PaperDistill(DistillSettings):
    """Bare heads of SMIT's sizes, its momentum, whatever the device and the length of the run."""

    head_width: Count | None = 2048
    bottleneck: Count | None = 256
    prototypes: Annotated[int, Field(ge=2)] | None = 8192
    standardise: bool = False
    momentum: Share | None = 0.996


class PaperSettings(DagmanSettings):
    """The setting of the paper."""

    recipe: str = "dagman-paper"
    crop: PaperCrops = PaperCrops()
    network: PaperNetwork = PaperNetwork()
    data: PaperData = PaperData()
    distill: PaperDistill = PaperDistill()
    optim: PaperOptim = PaperOptim()
