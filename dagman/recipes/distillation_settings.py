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
    """dagman is the paper; the others are its controls."""
    stage: Annotated[int, Field(ge=1, le=4)] | None = None
    """whose attention decides what is hidden, 1 to 4; left out, 3, an earlier one in small crops."""
    masking: Literal["attention", "attmask", "low", "block", "random", "none"] | None = None
    """which cells are hidden; left out, as the variant has it."""
    ratio: Share = 0.7
    """share of cells that is selected to be hidden."""
    hint: Share | None = None
    """share of all cells, the most attended, that is shown nevertheless; 0 shows none; left out, 0.1."""
    semantic: bool | None = None
    """whether a [CLS] attends to the stage's tokens; left out, as the variant has it."""
    semantic_blocks: Count = 2
    """of the [CLS] beside the stage."""
    semantic_heads: Count = 8
    """attention heads of these blocks."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """share of the patches that the noisy teacher is not shown; 0: it sees all; left out, by the variant."""
    dropped: Literal["token", "cell"] = "token"
    """what is dropped: tokens of 2 voxels, or whole cells of the stage."""
    attention_from: Literal["clean", "noisy"] = "clean"
    """which look of the teacher decides what is hidden: one at the whole crop, or the noisy one."""
    mask_token: bool = False
    """learn what stands in hidden places; else zeros do."""
    drop_hidden: bool = False
    """leave hidden tokens out of the computation: faster, another model."""
    symmetric: bool = True
    """each crop is student and teacher once; else the first is the student's."""
    head_width: Count | None = None
    """channels of the projection heads; left out, 2048 on a GPU and 256 on a CPU."""
    bottleneck: Count | None = None
    """channels before the prototypes; left out, 256 on a GPU and 64 on a CPU."""
    prototypes: Annotated[int, Field(ge=2)] | None = None
    """of each head; left out, 8192 on a GPU and 512 on a CPU."""
    standardise: bool = True
    """standardise over the batch what the heads read."""
    student_temperature: Positive = 0.1
    """lower is sharper."""
    teacher_temperature: PositiveRange = (0.04, 0.07)
    """at the start, and after --distill.temperature-warmup; lower is sharper."""
    temperature_warmup: Share = 30 / 800
    """share of the run in which the teacher's temperature changes."""
    centre_momentum: Share = 0.9
    """of the running mean that the teacher's answers are centred by."""
    still: Share = 1 / 800
    """share of the run in which the prototypes stand still."""
    momentum: Share | None = None
    """of the teacher at the start, 1 at the end; left out, 0.996, less in short runs."""
    voxel_weight: Annotated[float, Field(ge=0)] | None = None
    """of hidden voxels restored (AMIP); 0 leaves it out; left out, 1."""
    token_weight: Annotated[float, Field(ge=0)] | None = None
    """of hidden tokens (AMPD); 0 leaves it out; left out, 0.1."""
    image_weight: Annotated[float, Field(ge=0)] = 0.1
    """of the image token (AITD); 0 leaves it out."""
    global_weight: Annotated[float, Field(ge=0)] = 0.1
    """of the pooled last stage (GITD); 0 leaves it out."""

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
    """spade, simclr, moco, byol, dagman (-tiny, -small, -paper) or spade-dagman; each has options of its own."""
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
