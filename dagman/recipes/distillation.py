"""The recipes of DAGMaN: how open settings follow data and device, and everything built for one run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dagman.recipes.distillation_settings import (
    DagmanSettings,
    DistillSettings,
    PaperSettings,
)
from dagman.recipes.idle_values import note_idle
from dagman.recipes.priors import (
    PriorSettings,
    build_guidance,
    build_priors,
    check_attachment,
    check_regions,
    labels_taken,
    note_inactive,
    prior_files_in,
)
from spade3d.configuration import with_values
from spade3d.faults import UsageFault
from spade3d.provenance import write_json
from spade3d.recipes.choosing import check_memory, crop_and_width, steps_for
from spade3d.recipes.pair_crops import check_shared, frames_of, pair_stream
from spade3d.recipes.recipe import Built, Recipe, build_network
from spade3d.recipes.spade import PRETRAINING_BUDGET_S, momentum_for
from spade3d.volumes.channels import LABELS_AS_PRIOR

if TYPE_CHECKING:
    from dagman.distillation.co_distillation import Dagman, DistillationTerms
    from dagman.distillation.guided import Guidance
    from dagman.distillation.spade_dagman import SpadeDagman
    from spade3d.crops.crop import Crop
    from spade3d.volumes.store import VolumeStore

# What sets the arms of the ladder apart; what is said beside the name of an arm stays as it is said.
VARIANTS: dict[str, dict[str, Any]] = {
    "dagman": {"masking": "attention", "semantic": True, "patch_dropout": 0.7},
    "semantic": {"masking": "attention", "semantic": True, "patch_dropout": 0.0},
    "noisy": {"masking": "random", "semantic": False, "patch_dropout": 0.7},
    "smit": {"masking": "random", "semantic": False, "patch_dropout": 0.0},
    "ibot": {"masking": "block", "semantic": False, "patch_dropout": 0.0},
    "attmask": {"masking": "attmask", "semantic": True, "patch_dropout": 0.0},
    "mst": {"masking": "low", "semantic": True, "patch_dropout": 0.0},
    "dino": {"masking": "none", "semantic": True, "patch_dropout": 0.0},
}
GUIDED = "guided_heads.json"  # in the folder of a run, beside its encoder: which heads follow which region
IN_ENCODER = "guided_heads"  # the same table among what encoder.safetensors says of itself
PAPER_HEADS = {"head_width": 2048, "bottleneck": 256, "prototypes": 8192}
SMALL_HEADS = {"head_width": 256, "bottleneck": 64, "prototypes": 512}
PAPER_EPOCHS = 800
FEWEST = 27  # cells that are worth being hidden or shown one by one; the paper has 512
LOOKS = 20  # times in a run that the diversity of heads is measured


def choose_dagman(
    settings: DagmanSettings,
    store: VolumeStore,
    cases: Sequence[int],
    device: str,
    *,
    name: str = "dagman",
    size: Literal["tiny", "small"] | None = None,
) -> DagmanSettings:
    """Fill what was left open.

    Crop and width as Spade has them. Body frame: affine where a prior needs one, else box, which costs nothing. Stage:
    the paper's third, an earlier one in crops that have few of its cells. Heads: the paper's on a GPU, smaller ones on
    a CPU. Steps: on a GPU 50,000, on a CPU what fits into about five minutes; the paper's 800 epochs with
    `dagman-paper`. Masking, semantic attention and patch dropout follow the variant. Losses that need something hidden
    weigh nothing where nothing is.
    """
    from spade3d.scans import typical_grid

    shape, spacing = typical_grid(store, cases)
    sized = {"tiny": "cpu", "small": "cuda", None: device}[size]
    crop, width = crop_and_width(settings, shape, spacing, sized)
    distill = chosen_distillation(settings.distill, crop, sized)
    pairs = settings.crop.anchors * min(settings.crop.scans, len(cases))
    check_memory(crop, 2 * pairs, width, device)
    check_terms(distill, crop, width, pairs)
    check_guidance(settings, distill, crop, store, cases)
    note_choice(settings, distill, crop, sized)
    if name == "dagman-paper":
        steps = settings.steps or PAPER_EPOCHS * math.ceil(len(cases) / pairs)
    else:
        voxels = cost_of(2 * pairs * math.prod(crop), distill)
        steps = settings.steps or steps_for(voxels, width, device, PRETRAINING_BUDGET_S, on_gpu=50_000)
    momentum = settings.distill.momentum  # 0 is an answer, too
    filled = distill.model_dump() | {"momentum": momentum_for(steps) if momentum is None else momentum}
    return with_values(
        settings,
        {
            "recipe": name,
            "crop.shape": crop,
            "crop.frame": settings.crop.frame or ("affine" if settings.prior.needs_frames else "box"),
            "network.feature_size": width,
            "distill": filled,
            "steps": steps,
            "save_every": settings.save_every or max(1, steps // 10),
            "data.spacing": spacing,
            "device": device,
        },
    )


def chosen_distillation(distill: DistillSettings, crop: tuple[int, int, int], device: str) -> DistillSettings:
    """What the variant, the crop and the device say of what was left open."""
    heads = SMALL_HEADS if device == "cpu" else PAPER_HEADS
    weights = {"voxel_weight": 1.0, "token_weight": 0.1}
    follows = {"stage": stage_for(crop), "hint": 0.1} | VARIANTS[distill.variant] | weights | heads
    said = {key: value for key, value in distill.model_dump().items() if value is not None}
    rule = said.get("masking") or follows["masking"]
    if rule == "none":
        follows |= {"voxel_weight": 0.0, "token_weight": 0.0}
    if rule == "attmask":
        follows["hint"] = distill.ratio / 10  # a tenth of all cells would leave nothing to choose hints among
    if distill.drop_hidden:
        follows |= {"token_weight": 0.0}  # there is no token to compare where nothing was computed
    return type(distill)(**(follows | said))


def stage_for(crop: tuple[int, int, int]) -> int:
    """Stage 3, as in the paper, where a crop has FEWEST of its cells; else the last one before it that has."""
    return next((stage for stage in (3, 2) if math.prod(cells_at(stage, crop)) >= FEWEST), 1)


def cells_at(stage: int, crop: tuple[int, int, int]) -> tuple[int, int, int]:
    """Cells of a stage along each axis of a crop."""
    i, j, k = (-(-size // 2 ** (stage + 1)) for size in crop)
    return i, j, k


def check_terms(
    distill: DistillSettings, crop: tuple[int, int, int], width: int, pairs: int, *, alone: bool = True
) -> None:
    """Whether there is something to mask, to look at and to drop, something to learn where it is learned `alone`,
    whether heads share their channels, and whether there are pairs enough to standardise over; UsageFault before a run
    begins. `pairs` of crops u and v are those of a whole batch, of all ranks."""
    from dagman.distillation.masking import check_masking

    cell, grid = 2 ** (distill.stage + 1), cells_at(distill.stage, crop)
    if math.prod(grid) == 1 and (distill.semantic or distill.masking != "none"):
        lacks = "nothing can be masked" if distill.masking != "none" else "[CLS] cannot choose any to look at"
        raise UsageFault(
            f"a crop of {' x '.join(map(str, crop))} voxels has one token at stage {distill.stage}, of which {lacks}; "
            f"give a --crop.shape above {cell} voxels or an earlier --distill.stage"
        )
    check_dropout(distill, crop)
    if distill.masking != "none":
        check_masking(grid, distill.ratio, distill.hint)
    elif distill.voxel_weight or distill.token_weight:
        raise UsageFault("masking none hides nothing, so voxel_weight and token_weight must be 0; leave them out")
    weights = distill.voxel_weight, distill.token_weight, distill.image_weight, distill.global_weight
    channels = width * 2**distill.stage
    if distill.semantic and channels % distill.semantic_heads:
        raise UsageFault(
            f"{distill.semantic_heads} heads cannot share the {channels} channels of stage {distill.stage}; give "
            "--distill.semantic_heads that divide them"
        )
    if alone and not any(weights):
        raise UsageFault("distill: every weight is 0, so there is nothing to learn from; give a loss weight")
    if pairs < 2 and distill.standardise and (distill.image_weight or distill.global_weight):
        raise UsageFault(
            "a batch of one pair of crops: standardised over the batch, the two are each other's opposite whatever "
            "they show, and AITD and GITD ask them to agree; give --crop.anchors of 2 or more, "
            "--distill.no-standardise, or --distill.image-weight 0 and --distill.global-weight 0"
        )


def check_dropout(distill: DistillSettings, crop: tuple[int, int, int]) -> None:
    """UsageFault where the teacher that is to be noisy would be clean: its share of so few is none."""
    from dagman.distillation.masking import floor_share

    what = "tokens" if distill.dropped == "token" else f"cells of stage {distill.stage}"
    many = math.prod(cells_at(0 if distill.dropped == "token" else distill.stage, crop))
    if distill.patch_dropout and not floor_share(distill.patch_dropout, many):
        raise UsageFault(
            f"--distill.patch_dropout {distill.patch_dropout:g} of the {what} in a crop, {many}, drops none, and the "
            "noisy teacher would be clean; give a larger share or --crop.shape, --distill.dropped token, or 0"
        )


def note_choice(settings, distill: DistillSettings, crop: tuple[int, int, int], device: str) -> None:
    """Say on standard error at which stages a crop is one token, and which given values change nothing."""
    single = [stage for stage in (1, 2, 3, 4) if math.prod(cells_at(stage, crop)) == 1]
    if single:
        stages = f"stage{'s' * (len(single) > 1)} {' and '.join(map(str, single))}"
        print(
            f"note: a crop of {' x '.join(map(str, crop))} voxels is one token at {stages}, where no place is told "
            f"from another; a --crop.shape above {2 ** (single[-1] + 1)} voxels has more",
            file=sys.stderr,
        )
    bare = type(distill)(variant=distill.variant, masking=distill.masking)
    note_idle(settings.prior, distill, chosen_distillation(bare, crop, device))


def cost_of(voxels: int, distill: DistillSettings) -> float:
    """Voxels of a step in those of a whole training pass of the Swin-UNETR: the encoder is ENCODER_SHARE of it; the
    teacher looks once or twice without gradient, which is a third of that."""
    looks = 1 + (distill.masking not in ("none", "random", "block") and distill.attention_from == "clean")
    student = 1.0 if distill.symmetric else 0.5
    spared = VISIBLE_ONLY if distill.drop_hidden and distill.masking != "none" else 1.0
    return voxels * (student + looks / 3) * ENCODER_SHARE * spared


ENCODER_SHARE = 0.18  # windows of 4; measured: 1.5 s a step of 8 crops of 48^3 on two cores
# A step whose student leaves hidden tokens out, in dense ones: `dagman-tiny`, 8 crops of 48^3, ratio 0.7 and hint 0.1,
# one core: 1.65 against 2.26 CPU s.
VISIBLE_ONLY = 0.73


def terms_of(settings: DistillSettings) -> DistillationTerms:
    """The terms of chosen settings."""
    from dagman.distillation.co_distillation import DistillationTerms

    return DistillationTerms(**settings.model_dump(exclude={"variant"}))


def build_dagman(settings: DagmanSettings, store: VolumeStore, cases: Sequence[int], out: Path | None = None) -> Built:
    """DAGMaN on any CT or MR."""
    import torch

    from dagman.distillation.co_distillation import Dagman
    from dagman.distillation.head_looks import LooksAtHeads
    from spade3d.crops.selection import Selection

    torch.manual_seed(settings.seed)
    network = build_network(settings.network, out_channels=1)
    frames, guidance, prior, labels, table = guided(settings, store, cases, out)
    looks = LooksAtHeads(LOOKS, settings.data.spacing)
    task = Dagman(network.swinViT, settings.network.feature_size, terms_of(settings.distill), guidance, looks)
    batches = pair_stream(settings, store, cases, Selection(), out, one_geometry=True, frames=frames, prior=prior)
    note_inactive(guidance, batches)
    pictures, finish = partial(pictures_of, task, network, batches), partial(save_attention, task)
    return Built(task, batches, network, pictures, finish, labels, {IN_ENCODER: table} if table else {})


def check_guidance(
    settings, distill: DistillSettings, crop: tuple[int, int, int], store: VolumeStore, cases: Sequence[int]
) -> None:
    """UsageFault where the attention that is to be guided is not there or has one cell to look at, or where too many of
    its heads would be; DataFault for files of priors that lie elsewhere than their scans, or hold other values than 0
    to 1."""
    check_attachment(settings.prior, distill.semantic, distill.drop_hidden, settings.compile)
    if distill.drop_hidden and settings.network.use_v2:
        raise UsageFault("--distill.drop_hidden knows no convolutions; do without --network.use_v2")
    heads, stage = guided_heads(settings.prior, distill, settings.network.heads)
    check_regions(settings.prior, heads, store, cases)
    if settings.prior.source == "files":
        from dagman.attention.prior_files import check_files, check_values

        files = prior_files_in(settings.prior.folder, store, cases, settings.prior.regions)
        check_files(store, files, None)
        check_values(files)
    if settings.prior.source != "none":
        from dagman.attention.spatial_prior import cells_of
        from dagman.distillation.guided import cell_of

        grid = cells_of(crop, (cell_of(settings.prior.attachment, stage),) * 3)
        if settings.prior.attachment == "native" and max(grid) > settings.network.window:
            later = "" if stage == 4 else ", a later --prior.stage"
            raise UsageFault(
                f"--prior.attachment native: stage {stage} has {' x '.join(map(str, grid))} cells of a crop, and none "
                f"looks beyond its window of {settings.network.window}; give --prior.attachment windowed{later}, or a "
                f"--network.window of {max(grid)}"
            )


def guided_heads(prior: PriorSettings, distill: DistillSettings, native: Sequence[int]) -> tuple[int, int]:
    """How many heads the attention has that a prior guides, and of which stage it is; `native`: heads of the stages."""
    if prior.attachment == "semantic":
        return distill.semantic_heads, distill.stage
    return native[prior.stage - 1], prior.stage


class Guided(NamedTuple):
    """Frames of the cases, how heads are guided, and the prior of a crop; the last two None where none is asked for.
    `labels`: case -> that its labels made the prior; `table`: which heads follow which region, as files say it."""

    frames: Mapping[int, np.ndarray | None]
    guidance: Guidance | None
    prior: Callable[[Crop], np.ndarray] | None
    labels: Mapping[int, str]
    table: Mapping[str, Any]


def guided(settings, store: VolumeStore, cases: Sequence[int], out: Path | None) -> Guided:
    """What guides heads in a run; what is guided where is written into its folder."""
    from spade3d.training import ranks

    frames = frames_of(settings, store, cases, out)
    priors = build_priors(settings.prior, store, cases, frames)
    if priors is None:
        return Guided(frames, None, None, {}, {})
    taken = labels_taken(settings.prior, store, cases, frames)
    heads, stage = guided_heads(settings.prior, settings.distill, settings.network.heads)
    guidance, prior = build_guidance(settings.prior, priors, heads, stage)
    said = {"attachment": guidance.attachment, "stage": guidance.stage, "source": priors.source}
    table = said | guidance.heads.to_dict()
    if out is not None and ranks.first():  # at once, so that attention of any checkpoint can be read
        write_json(out / GUIDED, table)
    return Guided(frames, guidance, prior, dict.fromkeys(taken, LABELS_AS_PRIOR), table)


def pictures_of(task: Dagman | SpadeDagman, network, batches) -> dict[str, np.ndarray]:
    """The two crops of a pair, and where the student looks in the first."""
    from dagman.attention.maps import STAGE, Looker, attention_pictures

    semantic = task.student.looks.semantic
    looker = Looker(network.swinViT, STAGE if semantic is None else task.distillation.terms.stage, semantic)
    return batches.pictures(0) | attention_pictures(looker, batches.batch(0).clean[:1])


def save_attention(task: Dagman | SpadeDagman, out: Path) -> None:
    """The semantic attention that belongs to the encoder of a run, where it has one."""
    from dagman.attention.semantic_file import SEMANTIC, save_semantic

    semantic = task.student.looks.semantic
    if semantic is not None:
        save_semantic(out / SEMANTIC.name, semantic, task.distillation.terms.stage)


def said_of_distillation(distill: DistillSettings, prior: PriorSettings) -> dict[str, str]:
    """What is masked, what the teacher sees, and which heads are guided."""
    cell, hides = 2 ** (distill.stage + 1), distill.ratio - distill.hint
    masked = "nothing" if distill.masking == "none" else f"{distill.masking}, {hides:g} of the cells of {cell} voxels"
    if distill.masking in ("attention", "attmask"):
        masked += f"; {distill.hint:g} are shown as hints"
    noise = f"{distill.patch_dropout:g} of its patches dropped" if distill.patch_dropout else "clean"
    said = {"masks": masked, "teacher": noise}
    if prior.source != "none":
        said["guided heads"] = f"{prior.attachment} attention, by {prior.source}"
    return said if distill.variant == "dagman" else said | {"variant": f"{distill.variant} (a control)"}


def dagman_recipe(name: str, summary: str, tree: type[DagmanSettings] = DagmanSettings, **how: Any) -> Recipe:
    """One size of the recipe."""
    choose = partial(choose_dagman, name=name, **how)
    return Recipe(
        name,
        summary,
        tree,
        choose,
        build_dagman,
        lambda settings: said_of_distillation(settings.distill, settings.prior),
        check_shared,
    )


dagman = dagman_recipe("dagman", "masked image modelling guided by attention, with a noisy teacher")
tiny = dagman_recipe(
    "dagman-tiny", "DAGMaN sized for two CPU cores: 1.5 s a step of 8 crops of 48^3, 1.6 GiB", size="tiny"
)
small = dagman_recipe(
    "dagman-small",
    "DAGMaN sized for one GPU, where it is not measured: 90 s of a CPU core a step of four pairs of 96^3, 9.8 GiB",
    size="small",
)
paper = dagman_recipe("dagman-paper", "the setting of the paper: 128^3 crops at 2 mm, 800 epochs", PaperSettings)
