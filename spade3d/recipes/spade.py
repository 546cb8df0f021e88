"""The recipe of Spade: its settings, how open ones follow data and device, and everything built for one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from spade3d.configuration import CellSide, Optim, Positive, Pretraining, Settings, Share, rule, with_values
from spade3d.faults import UsageFault
from spade3d.recipes.choosing import check_memory, crop_and_width, steps_for
from spade3d.recipes.pair_crops import (
    CropSettings,
    FocusSettings,
    check_saliency,
    check_shared,
    far_share,
    pair_stream,
    steered,
)
from spade3d.recipes.recipe import Built, Recipe, build_network

if TYPE_CHECKING:
    import torch

    from spade3d.training.loop import Batches
    from spade3d.volumes.store import VolumeStore

PRETRAINING_BUDGET_S = 300.0
BESIDES = 40_000  # voxels that cost as much as what a step does besides: cutting, matching, contrast with the memories
COARSE = 0.53  # of a whole training pass: one whose decoder stops at cells of 4 voxels
CALIBRATING = 8  # batches, that the heads are fitted to before the first step
BEYOND = 2**40  # the first of them: of no step of any run
LEAST_FAR = 0.25  # of all pairs of crops; below it the global contrast has next to nothing to tell apart


class ContrastSettings(Settings):
    """Whom Spade's two contrasts attract and repel, and how much each term weighs.

    selection  `both` is Spade; the others are the controls of its claim: `restoration` alone, `instance` discrimination
               without places, spatial `positives` only, spatial `negatives` only, and both with places `shuffled`
    """

    selection: Literal["restoration", "instance", "positives", "negatives", "both", "shuffled"] = "both"
    """who attracts and who repels; both is Spade, the others are its controls."""
    far_mm: Positive | None = None
    """mm in the body from which on crops repel; left out, half of the crop's edge."""
    far_local_mm: Positive | None = None
    """mm in the body from which on places repel; left out, a quarter of the crop's edge."""
    temperature: Positive = 0.1
    """of both contrasts; lower is sharper."""
    global_memory: Annotated[int, Field(ge=1)] = 4096
    """crops that are remembered as negatives, in vectors."""
    local_memory: Annotated[int, Field(ge=1)] = 8192
    """places that are remembered as negatives, in vectors."""
    global_dim: Annotated[int, Field(ge=2)] = 128
    """length of the vector of a crop."""
    global_head: Literal["calibrated", "batch"] = "calibrated"
    """what the head of crops is standardised by: once, before training, or each batch."""
    local_dim: Annotated[int, Field(ge=2)] = 64
    """length of the vector of a place."""
    local_cell: CellSide = 4
    """side, in voxels of the crop, of the decoded cells that places are read from."""
    momentum: Share | None = None
    """of the teacher at the start, 1 at the end; left out, 0.996, less in short runs."""
    global_weight: Annotated[float, Field(ge=0)] | None = None
    """of the contrast of crops; 0 leaves it out; left out, 1, or 0 where scans show one place only."""
    local_weight: Annotated[float, Field(ge=0)] | None = None
    """of the contrast of places; 0 leaves it out; left out, 1."""
    restoration_weight: Annotated[float, Field(ge=0)] = 1.0
    """of the restoration of intensities; 0 leaves it out."""
    restoration_cell: CellSide | None = None
    """side, in voxels, of the decoded cells that restore; left out, 1 on a GPU, local_cell on a CPU."""

    @rule
    def restoration_alone_is_alone(self) -> ContrastSettings:
        """The control without contrast has no weight for one."""
        if self.selection == "restoration" and (self.global_weight or self.local_weight):
            raise ValueError("selection restoration has no contrast; leave global_weight and local_weight out, or 0")
        return self


class SpadeSettings(Pretraining):
    """Everything that a Spade run can be told."""

    recipe: str = "spade"
    """spade, simclr, moco, byol, dagman (-tiny, -small, -paper) or spade-dagman; each has options of its own."""
    crop: CropSettings = CropSettings()
    focus: FocusSettings = FocusSettings()
    contrast: ContrastSettings = ContrastSettings()
    optim: Optim = Optim()

    @rule
    def shuffling_needs_others(self) -> SpadeSettings:
        """Places are exchanged between anchors."""
        if self.contrast.selection == "shuffled" and self.crop.anchors < 2:
            raise ValueError("selection shuffled exchanges the places of anchors; crop.anchors of 2 or more are needed")
        return self


def choose_spade(settings: SpadeSettings, store: VolumeStore, cases: Sequence[int], device: str) -> SpadeSettings:
    """Fill what was left open.

    Crop: within two thirds of the median scan, so that there are different places to tell apart, and as many voxels
    as a cube of 96 (48 on a CPU). Far: half the crop's edge for whole crops, a quarter for single places.
    Steps: 50,000 on a GPU; on a CPU what fits into about
    five minutes, restoring from the cells of the local contrast. Momentum: 0.996 as is usual; less in runs of
    under a thousand steps, where such a teacher would never leave its beginning. Global weight: 1, but 0 where fewer
    than one in four pairs of crops lie far apart: scans hardly larger than the crop show one place only, and a contrast
    of what is alike only adds noise (docs/log.md, 2026-11-20). The controls choose as Spade itself does.
    """
    from spade3d.scans import typical_grid

    check_saliency(settings.focus, store, cases)  # refused here, while there is no run to take back
    shape, spacing = typical_grid(store, cases)
    crop, width = crop_and_width(settings, shape, spacing, device)
    crops = 2 * settings.crop.anchors * min(settings.crop.scans, len(cases))
    check_memory(crop, crops, width, device)
    cell = restoration_cell(settings.contrast, device)
    finely = cell == 1 and settings.contrast.restoration_weight > 0
    passes = (1.0 if finely else COARSE) + 1 / 6  # the teacher only looks, and not to the finest cells
    voxels = crops * math.prod(crop) * passes + BESIDES
    steps = settings.steps or steps_for(voxels, width, device, PRETRAINING_BUDGET_S, on_gpu=50_000)
    chosen = chosen_contrast(settings.contrast, store, cases, crop, spacing, steps, device)
    if not (chosen["global_weight"] or chosen["local_weight"] or chosen["restoration_weight"]):
        raise UsageFault(
            "contrast: every weight is 0, so there is nothing to learn from; give one of the three terms weight"
        )
    return with_values(
        settings,
        {
            "crop.shape": crop,
            "network.feature_size": width,
            "contrast": chosen,
            "steps": steps,
            "save_every": settings.save_every or max(1, steps // 10),
            "data.spacing": spacing,
            "device": device,
        },
    )


def chosen_contrast(
    contrast: ContrastSettings, store: VolumeStore, cases: Sequence[int], crop, spacing, steps: int, device: str
) -> dict[str, Any]:
    """The contrast's settings, with distances, weights and momentum that follow crop, data and steps."""
    edge_mm = float(np.prod(np.asarray(crop) * spacing) ** (1 / 3))
    far_mm = contrast.far_mm or round(edge_mm / 2, 1)
    contrasted = contrast.selection != "restoration"
    global_weight, local_weight = contrast.global_weight, contrast.local_weight
    if global_weight is None:
        global_weight = float(contrasted and far_share(store, cases, crop, spacing, far_mm) >= LEAST_FAR)
    if local_weight is None:
        local_weight = float(contrasted)
    return contrast.model_dump() | {
        "far_mm": far_mm,
        "far_local_mm": contrast.far_local_mm or round(edge_mm / 4, 1),
        "global_weight": global_weight,
        "local_weight": local_weight,
        "restoration_cell": restoration_cell(contrast, device),
        "momentum": momentum_for(steps) if contrast.momentum is None else contrast.momentum,  # 0 is an answer, too
    }


def restoration_cell(contrast: ContrastSettings, device: str) -> int:
    """Where the decoder restores from: its output, as in the figure; on a CPU the cells of the local contrast, since
    from there to single voxels is half of a step (docs/log.md, 2026-11-21)."""
    return contrast.restoration_cell or (contrast.local_cell if device == "cpu" else 1)


def momentum_for(steps: int) -> float:
    """Of a teacher at the start of a run: 0.996, less in a run of under a thousand steps."""
    return round(1 - min(0.02, max(0.004, 4 / steps)), 4)


def said_of_contrast(contrast: ContrastSettings) -> dict[str, str]:
    """Distances and weights of the contrast."""
    if contrast.selection == "restoration":
        return {"contrast": "none: the control that only restores"}
    crops, places = ("" if weight else " (off)" for weight in (contrast.global_weight, contrast.local_weight))
    said = {"far apart": f"{contrast.far_mm:g} mm for crops{crops}, {contrast.far_local_mm:g} mm for places{places}"}
    return said if contrast.selection == "both" else said | {"selection": f"{contrast.selection} (a control)"}


def build_spade(settings: SpadeSettings, store: VolumeStore, cases: Sequence[int], out: Path | None = None) -> Built:
    """Spade on any CT or MR: one GPU and a day at full size, minutes on a CPU at the size chosen for it."""
    import torch

    from spade3d.contrast.spade import Spade, SpadeTerms
    from spade3d.crops.selection import Selection

    torch.manual_seed(settings.seed)
    network = build_network(settings.network, out_channels=1)
    said = settings.contrast.model_dump()
    selection = Selection.named(said.pop("selection"))
    task = Spade(network, SpadeTerms(**said, spatial_negatives=selection.negatives))
    batches = pair_stream(settings, store, cases, selection, out, focus=settings.focus)
    if settings.contrast.selection != "restoration":
        calibrate(task, batches, torch.device(settings.device))
    return Built(task, batches, network, lambda: batches.pictures(0))


def check_contrast_shared(settings) -> None:
    """Whether the processes of a run can share its batches and the places in them."""
    from spade3d.training import ranks

    check_shared(settings)
    if ranks.world() > 1 and settings.contrast.selection == "shuffled":
        raise UsageFault(
            "--contrast.selection shuffled exchanges places between anchors, which one process must have all; run this "
            "control alone"
        )


def calibrate(task, batches: Batches, device: torch.device) -> None:
    """Fit the heads of a task to batches that no step of any run sees; on a GPU to the same bits each time."""
    from spade3d.training.reproducibility import deterministic

    with deterministic(device):
        task.to(device).calibrate(batch.to(device) for batch in batches.stream(BEYOND, BEYOND + CALIBRATING))


spade = Recipe(
    "spade",
    "spatially debiased contrast: positives and negatives by place, globally invariant, locally equivariant",
    SpadeSettings,
    choose_spade,
    build_spade,
    lambda settings: said_of_contrast(settings.contrast),
    check_contrast_shared,
    steered,
)
