"""Settings of the probes of frozen encoders, and how open ones follow the encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from spade3d.configuration import Count, Data, Settings, Voxels
from spade3d.faults import UsageFault
from spade3d.recipes.choosing import crop_within

if TYPE_CHECKING:
    from spade3d.volumes.store import VolumeStore


class ProbeCrop(Settings):
    """What an encoder is shown: crops as they are, neither turned nor coloured."""

    shape: Voxels | None = None
    """voxels of a crop along i, j, k; left out, what suits the scans and the device."""


class ProbeSettings(Settings):
    """Everything that the probes can be told."""

    scans: Count = 24
    """at most so many are asked about."""
    folds: Annotated[int, Field(ge=2, le=100)] = 5
    """parts that the subjects are split into, one of which judges."""
    fold: Annotated[int, Field(ge=0)] = 0
    """the part that judges, counted from 0."""
    crop: ProbeCrop = ProbeCrop()
    seed: Annotated[int, Field(ge=0)] = 0
    """of all that chance decides."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the encoders run; auto is a GPU where there is one."""
    workers: Annotated[int, Field(ge=0)] = 0
    """processes that prepare scans; 0 follows the machine."""


def prepared_like(said: Sequence[Mapping[str, Any]]) -> Data:
    """How scans are prepared for encoders: as the first that tells was trained; as every command does where none tells.

    `said`: what `describe_encoder` says of each.
    """
    known = next((one["preprocessing"] for one in said if "preprocessing" in one), {})
    return Data(**{key: known[key] for key in ("spacing", "window_hu", "mr") if known.get(key) is not None})


def choose_crop(
    settings: ProbeSettings,
    said: Mapping[str, Mapping[str, Any]],
    store: VolumeStore,
    cases: Sequence[int],
    device: str,
) -> tuple[tuple[int, int, int], str]:
    """Voxels of the crops, and who says so: the settings, the encoders (name -> what `describe_encoder` says), else
    what a pretraining would choose for the scans. UsageFault where encoders were trained on different crops."""
    if settings.crop.shape is not None:
        return settings.crop.shape, "as asked for"
    trained = {name: tuple(one["run"]["crop"]) for name, one in said.items() if "crop" in one.get("run", {})}
    if len(set(trained.values())) > 1:
        sizes = ", ".join(f"{name}: {'x'.join(map(str, shape))}" for name, shape in trained.items())
        raise UsageFault(f"the encoders were trained on different crops ({sizes}); say with --crop.shape which to take")
    if trained:
        name, (i, j, k) = next(iter(trained.items()))
        return (i, j, k), f"as {name} was trained"

    from spade3d.scans import typical_grid

    shape, spacing = typical_grid(store, cases)
    chosen = crop_within(shape * 2 / 3, spacing, side=48 if device == "cpu" else 96)
    return chosen, "as a pretraining would choose; no encoder says on which it was trained"
