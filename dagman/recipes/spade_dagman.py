"""The recipe of Spade and DAGMaN together: one encoder, one step, one look of the student at every crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dagman.recipes.distillation import (
    ENCODER_SHARE,
    IN_ENCODER,
    LOOKS,
    check_guidance,
    check_terms,
    chosen_distillation,
    cost_of,
    guided,
    note_choice,
    pictures_of,
    said_of_distillation,
    save_attention,
    terms_of,
)
from dagman.recipes.distillation_settings import DagmanNetwork, DistillSettings
from dagman.recipes.priors import PriorSettings, note_inactive
from spade3d.configuration import Optim, Pretraining, rule, with_values
from spade3d.recipes.choosing import check_memory, crop_and_width, steps_for
from spade3d.recipes.pair_crops import CropSettings, pair_stream
from spade3d.recipes.recipe import Built, Recipe, build_network
from spade3d.recipes.spade import (
    BESIDES,
    PRETRAINING_BUDGET_S,
    ContrastSettings,
    calibrate,
    check_contrast_shared,
    chosen_contrast,
    restoration_cell,
    said_of_contrast,
)

if TYPE_CHECKING:
    from spade3d.volumes.store import VolumeStore

DECODING = 0.25  # of a whole pass: the decoder as far as the cells that places are read from


class JointContrast(ContrastSettings):
    """Spade's contrast. What restores is DAGMaN's masked image modelling, so the decoder's own weighs nothing."""

    restoration_weight: Annotated[float, Field(ge=0)] = 0.0


class SpadeDagmanSettings(Pretraining):
    """Everything that a run of both can be told."""

    recipe: str = "spade-dagman"
    """spade, simclr, moco, byol, dagman (-tiny, -small, -paper) or spade-dagman; each has options of its own."""
    crop: CropSettings = CropSettings()
    network: DagmanNetwork = DagmanNetwork()
    contrast: JointContrast = JointContrast()
    distill: DistillSettings = DistillSettings()
    prior: PriorSettings = PriorSettings()
    optim: Optim = Optim()

    @rule
    def one_look_for_both(self) -> SpadeDagmanSettings:
        """Every crop is looked at once, whole grids are decoded."""
        if not self.distill.symmetric:
            raise ValueError("distill.symmetric false masks every second crop, and Spade needs a look at each")
        if self.distill.drop_hidden:
            raise ValueError("distill.drop_hidden leaves cells out that Spade's decoder needs")
        if self.crop.hidden:
            raise ValueError("crop.hidden hides by chance what distill.masking decides; leave it at 0")
        if self.contrast.selection == "shuffled" and self.crop.anchors < 2:
            raise ValueError("selection shuffled exchanges the places of anchors; crop.anchors of 2 or more are needed")
        if self.contrast.selection == "restoration" and not self.contrast.restoration_weight:
            raise ValueError("selection restoration restores by the decoder; give contrast.restoration_weight, too")
        ours, its = self.contrast.momentum, self.distill.momentum
        if its is not None and its != ours:
            raise ValueError("distill.momentum: the one teacher of both follows contrast.momentum; give that instead")
        return self


def choose_spade_dagman(
    settings: SpadeDagmanSettings, store: VolumeStore, cases: Sequence[int], device: str
) -> SpadeDagmanSettings:
    """Fill what was left open, each as the recipe that it belongs to."""
    from spade3d.scans import typical_grid

    shape, spacing = typical_grid(store, cases)
    crop, width = crop_and_width(settings, shape, spacing, device)
    distill = chosen_distillation(settings.distill, crop, device)
    pairs = settings.crop.anchors * min(settings.crop.scans, len(cases))
    check_memory(crop, 2 * pairs, width, device)
    check_terms(distill, crop, width, pairs, alone=False)
    check_guidance(settings, distill, crop, store, cases)
    note_choice(settings, distill, crop, device)
    finely = settings.contrast.restoration_weight and restoration_cell(settings.contrast, device) == 1
    finest = 1 - ENCODER_SHARE if finely else DECODING
    voxels = 2 * pairs * math.prod(crop)
    voxels = cost_of(voxels, distill) + voxels * finest + BESIDES
    steps = settings.steps or steps_for(voxels, width, device, PRETRAINING_BUDGET_S, on_gpu=50_000)
    contrast = chosen_contrast(settings.contrast, store, cases, crop, spacing, steps, device)
    return with_values(
        settings,
        {
            "crop.shape": crop,
            "network.feature_size": width,
            "contrast": contrast,
            "distill": distill.model_dump() | {"momentum": contrast["momentum"]},  # one teacher
            "steps": steps,
            "save_every": settings.save_every or max(1, steps // 10),
            "data.spacing": spacing,
            "device": device,
        },
    )


def build_spade_dagman(
    settings: SpadeDagmanSettings, store: VolumeStore, cases: Sequence[int], out: Path | None = None
) -> Built:
    """Both on any CT or MR. The teacher's momentum is Spade's."""
    import torch

    from dagman.distillation.head_looks import LooksAtHeads
    from dagman.distillation.spade_dagman import SpadeDagman
    from spade3d.contrast.spade import SpadeTerms
    from spade3d.crops.selection import Selection

    torch.manual_seed(settings.seed)
    network = build_network(settings.network, out_channels=1)
    said = settings.contrast.model_dump()
    selection = Selection.named(said.pop("selection"))
    frames, guidance, prior, labels, table = guided(settings, store, cases, out)
    spade = SpadeTerms(**said, spatial_negatives=selection.negatives)
    looks = LooksAtHeads(LOOKS, settings.data.spacing)
    task = SpadeDagman(network, spade, terms_of(settings.distill), guidance, looks)
    batches = pair_stream(settings, store, cases, selection, out, one_geometry=True, frames=frames, prior=prior)
    note_inactive(guidance, batches)
    calibrate(task, batches, torch.device(settings.device))
    pictures, finish = partial(pictures_of, task, network, batches), partial(save_attention, task)
    return Built(task, batches, network, pictures, finish, labels, {IN_ENCODER: table} if table else {})


spade_dagman = Recipe(
    "spade-dagman",
    "Spade's contrast and DAGMaN's masked distillation on one encoder",
    SpadeDagmanSettings,
    choose_spade_dagman,
    build_spade_dagman,
    lambda settings: said_of_contrast(settings.contrast) | said_of_distillation(settings.distill, settings.prior),
    check_contrast_shared,
)
