"""What a recipe is, and how one is found by its name.

A recipe is found through the entry-point group `spade3d.recipes`; anyone may register more. Settings are read before
torch is imported, so recipes import the networks only when they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spade3d.configuration import Common
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
    finish: Callable[[Path], None] = lambda out: None  # writes what else than the encoder a run hands on
    # Case -> how its labels steer the run other than as a saliency; provenance.json and encoder.safetensors say it.
    labels: Mapping[int, str] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)  # what else encoder.safetensors says of itself


@dataclass(frozen=True)
class Recipe:
    """A name, its settings, how open settings follow the data, and how the run is built."""

    name: str
    summary: str
    settings: type[Common]
    choose: Callable[[Common, VolumeStore, Sequence[int], str], Common]
    build: Callable[[Common, VolumeStore, Sequence[int], Path], Built]  # the last is the folder of the run
    said: Callable[[Common], dict[str, str]]  # what else a user should know of the choice before the run
    check: Callable[[Common], None] = lambda settings: None  # refuses what needs no scan to be refused
    # Case -> source of the saliency that steers its views; provenance.json and encoder.safetensors say it.
    saliency: Callable[[Common, VolumeStore, Sequence[int]], Mapping[int, str]] = lambda settings, store, cases: {}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, or a UsageFault with the list of names."""
    known = {point.name: point for point in entry_points(group="spade3d.recipes")}
    if name not in known:
        raise UsageFault(f"recipe {name!r} is not known; one of: {', '.join(sorted(known))}")
    return known[name].load()


def build_network(network, out_channels: int):
    """The Swin-UNETR of some settings, freshly drawn from torch's generator."""
    from spade3d.networks.swin_unetr import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=out_channels, **network.model_dump())
