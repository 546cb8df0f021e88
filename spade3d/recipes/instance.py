"""The recipes of instance discrimination, what Spade is held against: SimCLR, MoCo and BYOL on its encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from spade3d.configuration import Optim, Positive, Pretraining, Settings, Share, rule, with_values
from spade3d.recipes.choosing import check_memory, crop_and_width, steps_for
from spade3d.recipes.pair_crops import CropSettings, FocusSettings, check_saliency, check_shared, pair_stream, steered
from spade3d.recipes.recipe import Built, Recipe, build_network
from spade3d.recipes.spade import PRETRAINING_BUDGET_S, momentum_for

if TYPE_CHECKING:
    from spade3d.volumes.store import VolumeStore

TEMPERATURE = {"simclr": 0.1, "moco": 0.2, "byol": 0.1}  # of the papers; BYOL has none and reads none


class InstanceContrast(Settings):
    """Numbers of the three methods; what a method does not have is not read by it. `memory` in vectors."""

    temperature: Positive | None = None
    """lower is sharper; left out, 0.2 for moco and 0.1 for simclr; byol has none."""
    memory: Annotated[int, Field(ge=1)] = 4096
    """crops that moco remembers as negatives, in vectors."""
    dim: Annotated[int, Field(ge=2)] = 128
    """length of the vector of a crop."""
    momentum: Share | None = None
    """of the teacher at the start, 1 at the end (moco, byol); left out, 0.996, less in short runs."""


class InstanceCrops(CropSettings):
    """Four anchors a batch, each a scan of its own, where Spade has two with a second scan each; places select nothing.

    (As long as there are four scans. A counterpart in another scan would be a negative that shows the same place.)
    """

    frame: Literal["box", "affine", "learned"] = "box"
    anchors: Annotated[int, Field(ge=1, le=4096)] = 4
    scans: Annotated[int, Field(ge=1, le=64)] = 1
    places: Annotated[int, Field(ge=1)] = 1


class InstanceSettings(Pretraining):
    """Everything that a run of instance discrimination can be told."""

    recipe: str = "simclr"
    """spade, simclr, moco, byol, dagman (-tiny, -small, -paper) or spade-dagman; each has options of its own."""
    crop: InstanceCrops = InstanceCrops()
    focus: FocusSettings = FocusSettings()
    contrast: InstanceContrast = InstanceContrast()
    optim: Optim = Optim()

    @rule
    def others_to_be_told_from(self) -> InstanceSettings:
        """One pair of crops is one instance."""
        if self.crop.anchors * self.crop.scans < 2:
            raise ValueError("a batch of one instance tells nothing apart; crop.anchors of 2 or more are needed")
        return self

    @rule
    def nothing_that_is_not_read(self) -> InstanceSettings:
        """What only Spade reads."""
        if self.crop.hidden:
            raise ValueError(f"crop.hidden hides nothing in {self.recipe}, which restores nothing; leave it at 0")
        if self.crop.frame != "box":
            raise ValueError(f"places select nothing in {self.recipe}; leave crop.frame at box, which costs nothing")
        return self


def choose_instance(
    settings: InstanceSettings, store: VolumeStore, cases: Sequence[int], device: str, *, method: str
) -> InstanceSettings:
    """Fill what was left open, crop, width and momentum as Spade does.

    Steps: on a CPU what fits into about five minutes; without a decoder these are more than Spade's, so give --steps
    where runs are compared.
    """
    from spade3d.scans import typical_grid

    check_saliency(settings.focus, store, cases)  # refused here, while there is no run to take back
    shape, spacing = typical_grid(store, cases)
    crop, width = crop_and_width(settings, shape, spacing, device)
    check_memory(crop, 2 * settings.crop.anchors, width, device)
    voxels = 2 * settings.crop.anchors * settings.crop.scans * math.prod(crop)  # as costly as one whole pass of Spade
    steps = settings.steps or steps_for(voxels, width, device, PRETRAINING_BUDGET_S, on_gpu=50_000)
    momentum = settings.contrast.momentum  # 0 is an answer, too
    return with_values(
        settings,
        {
            "recipe": method,
            "crop.shape": crop,
            "network.feature_size": width,
            "contrast.temperature": settings.contrast.temperature or TEMPERATURE[method],
            "contrast.momentum": momentum_for(steps) if momentum is None else momentum,
            "steps": steps,
            "save_every": settings.save_every or max(1, steps // 10),
            "data.spacing": spacing,
            "device": device,
        },
    )


def build_instance(
    settings: InstanceSettings, store: VolumeStore, cases: Sequence[int], out: Path | None = None, *, method: str
) -> Built:
    """One of the three methods on any CT or MR, of Spade's sizes and costs without its decoder."""
    import torch

    from spade3d.contrast.instance import Instance, InstanceTerms
    from spade3d.crops.selection import Selection

    torch.manual_seed(settings.seed)
    network = build_network(settings.network, out_channels=1)
    task = Instance(network, InstanceTerms(method, **settings.contrast.model_dump()))
    batches = pair_stream(settings, store, cases, Selection(), out, focus=settings.focus, one_parent=True)
    return Built(task, batches, network, lambda: batches.pictures(0))


def instance_recipe(method: str, summary: str) -> Recipe:
    """The recipe of one method."""
    choose, build = partial(choose_instance, method=method), partial(build_instance, method=method)
    return Recipe(method, summary, InstanceSettings, choose, build, lambda settings: {}, check_shared, steered)


simclr = instance_recipe("simclr", "instance discrimination within the batch, one network (Chen et al. 2020)")
moco = instance_recipe("moco", "instance discrimination against a queue of a slow teacher's vectors (He et al. 2020)")
byol = instance_recipe(
    "byol", "instances predicted by one network for its slow teacher, no negatives (Grill et al. 2020)"
)
