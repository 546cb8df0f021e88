"""Training a saliency predictor on the scans of a store that have saliency: settings, who teaches, who judges.

Read before torch is imported, as recipes are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from spade3d import console
from spade3d.configuration import Positive, Settings, Share, Voxels, to_yaml, with_values
from spade3d.faults import DataFault, UsageFault
from spade3d.recipes.choosing import check_memory, crop_within, steps_for

if TYPE_CHECKING:
    import torch

    from spade3d.networks.saliency_net import SaliencyModel
    from spade3d.volumes.split import Split
    from spade3d.volumes.store import VolumeStore

CONFIG, SCORES, MODEL = "config.yaml", "scores.json", "saliency.safetensors"
EPOCHS = 30  # FocusContrast's predictor
TRAINING_BUDGET_S = 480.0


class PredictorSettings(Settings):
    """How a saliency predictor is trained; what is left open follows the store and the device."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """updates of the weights; left out, what suits the data and the device."""
    crop: Voxels | None = None
    """voxels of a crop along i, j, k; left out, what suits the scans and the device."""
    crops: Annotated[int, Field(ge=1, le=64)] = 2
    """of a batch."""
    salient: Share = 0.67
    """share of crops that lie around a salient place; the others lie anywhere."""
    width: Annotated[int, Field(ge=4, le=64)] = 16
    """channels of the first stage."""
    lr: Positive = 1e-3
    """learning rate, at its peak."""
    seed: Annotated[int, Field(ge=0)] = 0
    """of all that chance decides."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto is a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU that has it, else fp32."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """steps between checkpoints; left out, a share of the run."""


def train_predictor(path: Path, out: Path, settings: PredictorSettings, device: str, *, resume: bool) -> dict:
    """Train on the cases that have saliency; returns what the command prints."""
    import torch

    from spade3d.began_with import check_beginning, keep_beginning
    from spade3d.crops.saliency_crops import SaliencyStream, SalientSampling
    from spade3d.networks.saliency_net import SaliencyModel, SaliencyNet, SaliencyPrediction
    from spade3d.provenance import PROVENANCE, describe, write_json, write_text
    from spade3d.scans import typical_grid
    from spade3d.training.loop import Optimiser, train
    from spade3d.training.prefetch import prefetched
    from spade3d.volumes.store import VolumeStore

    store = VolumeStore.open(path)
    split = gazed_split(store)
    if resume:
        check_beginning(out, store, split.train, split, settings, saliency=(*split.train, *split.validation))
    if not split.train:
        raise DataFault(f"{path}: no case that may train has saliency; run spade-saliency gaze, or labels, first")
    if not resume:
        settings = choose(settings, store, split.train, device)
        with console.fresh_folder(out, CONFIG):
            seen = {i: store.cases[i].saliency_source for i in split.train}
            keep_beginning(out, store, split.train, split, settings)
            write_json(out / PROVENANCE, describe(store, split.train, split, seen))
            write_text(out / CONFIG, to_yaml(settings))
    taught_by = sorted({store.cases[i].saliency_source for i in split.train})
    _announce(settings, store, split, taught_by)

    torch.manual_seed(settings.seed)
    network = SaliencyNet(settings.width)
    model = SaliencyModel(network, store.preprocessing, settings.crop, tuple(taught_by))
    _, spacing = typical_grid(store, split.train)
    sampling = SalientSampling(settings.crop, spacing, settings.crops, settings.salient)
    stream, place = SaliencyStream(store, split.train, sampling, seed=settings.seed), torch.device(settings.device)
    outcome = train(
        SaliencyPrediction(network),
        prefetched(stream, None, place),
        steps=settings.steps,
        out=out,
        optimiser=Optimiser(lr=settings.lr, weight_decay=0.0),  # without decay AdamW is the paper's Adam
        device=place,
        precision=settings.precision,
        save_every=settings.save_every,
        seed=settings.seed,
        resume=resume,
        label="saliency predictor",
        config_hash=hashlib.sha256((out / CONFIG).read_bytes()).hexdigest(),
    )
    judged = _judge(model, store, split, place)
    mean = {name: _mean([case[name] for case in judged.values()]) for name in ("cc", "kl", "nss")}
    write_json(out / SCORES, {"mean": mean, "split": split.rule, "cases": judged})
    model.save(out / MODEL, {"scores": mean, "steps": outcome.step})
    return {
        "model": str(out / MODEL),
        "taught_by": ", ".join(taught_by),
        "steps": outcome.step,
        "bce": round(outcome.losses["bce"], 5),
        "judged_on": len(judged),
        **mean,
    }


def choose(settings: PredictorSettings, store: VolumeStore, cases: Sequence[int], device: str) -> PredictorSettings:
    """Fill what was left open. Crop: a cube of 96 voxels (48 on a CPU) within the median scan, its sides multiples of
    16, one of them 32 or more. Steps: as many crops as cover every scan 30 times, on a CPU within about eight
    minutes."""
    from spade3d.networks.saliency_net import STRIDE
    from spade3d.scans import typical_grid

    shape, spacing = typical_grid(store, cases)
    side = 48 if device == "cpu" else 96
    crop = settings.crop or crop_within(np.maximum(shape, 2 * STRIDE), spacing, side=side, step=STRIDE)
    check_crop(crop, STRIDE)
    covering = max(1.0, float(np.prod(shape / np.array(crop))))
    wanted = max(100, round(EPOCHS * len(cases) * covering / settings.crops))
    # At width 16 this net costs as much as the Swin-UNETR of width 24 for which `steps_for` counts.
    voxels, width = settings.crops * int(np.prod(crop)), round(1.5 * settings.width)
    check_memory(crop, settings.crops, width, device)
    steps = settings.steps or min(wanted, steps_for(voxels, width, device, TRAINING_BUDGET_S, on_gpu=20_000))
    return with_values(
        settings,
        {"crop": crop, "steps": steps, "save_every": settings.save_every or max(1, steps // 5), "device": device},
    )


def check_crop(crop: tuple[int, int, int], stride: int) -> None:
    """UsageFault for a crop that leaves nothing at the bottom of the U-Net, or one cell, which has no variance."""
    cells = [n // stride for n in crop]
    if np.prod(cells) < 2:
        raise UsageFault(
            f"--crop {' '.join(map(str, crop))}: the network halves it four times, which leaves "
            f"{' x '.join(map(str, cells))} cells; sides of {stride} voxels or more are needed, and one of "
            f"{2 * stride} or more"
        )


def gazed_split(store: VolumeStore) -> Split:
    """Who teaches the predictor and who judges it, of the cases with saliency that no predictor made.

    The judges of `split_cases` never teach: saliency may be made of labels, and the predictor's maps shape the views of
    a pretraining that must not have seen the judges' labels. Where nobody is labelled, a fifth of the subjects judges.
    """
    from spade3d.volumes.channels import OF_PREDICTORS
    from spade3d.volumes.split import Split, split_cases

    gazed = [case.saliency_source not in ("", *OF_PREDICTORS) for case in store.cases]
    split = split_cases(store.cases, 5, 0)
    if not split.validation:
        split = split_cases([replace(case, has_labels=has) for case, has in zip(store.cases, gazed, strict=True)], 5, 0)
    train, validation = (tuple(i for i in some if gazed[i]) for some in (split.train, split.validation))
    return Split(train, validation, split.rule)


def _judge(model: SaliencyModel, store: VolumeStore, split: Split, device: torch.device) -> dict[str, dict]:
    from spade3d.networks.saliency_scores import scores

    judged = {}
    with console.progress_of("judging") as progress:
        for done, i in enumerate(split.validation, start=1):
            found = scores(model.saliency(*shown(store, i), device), store.saliency(i))
            judged[store.cases[i].name] = {name: _finite(value) for name, value in found.items()}
            progress(done, len(split.validation), store.cases[i].name)
    return judged


def shown(store: VolumeStore, i: int) -> tuple[np.ndarray, float]:
    """The intensities of a case, and the lowest there is."""
    norm = store.cases[i].normalisation
    return norm.intensity(store.image(i)), norm.low


def _announce(settings: PredictorSettings, store: VolumeStore, split: Split, taught_by: Sequence[str]) -> None:
    console.print_choice(
        "spade-saliency train: a 3-D U-Net, image -> saliency",
        {
            "learns from": f"{len(split.train)} scans with saliency from {', '.join(taught_by)} ({store.layout})",
            "judged on": f"{len(split.validation)} scans; {split.rule}",
            "crop": " x ".join(map(str, settings.crop)) + " voxels",
            "width": settings.width,
            "steps": settings.steps,
            "device": settings.device,
        },
    )


def _finite(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 5) if known else None
