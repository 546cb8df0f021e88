"""One fine-tuning run from settings to report: split, crops, training, predictions on the input's grid, scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dagman.downstream.labelled import Classes, classes_of
from dagman.downstream.model import SegmentationModel
from dagman.downstream.segmentation import Segmentation
from dagman.evaluation.case_pictures import CasePicture
from dagman.evaluation.leakage import find_leakage
from dagman.evaluation.metrics import case_metrics
from dagman.evaluation.report import finetuning_report
from dagman.evaluation.scores import telling_cases
from dagman.evaluation.statistics import write_cases
from dagman.evaluation.summary import summarise
from dagman.recipes.finetuning import FinetuneSettings, build_stream, choose
from spade3d import console
from spade3d.commands import CONFIG, PROVENANCE, STORE, find_device, report_rejected
from spade3d.configuration import to_yaml
from spade3d.faults import DataFault
from spade3d.networks.foreign import Coverage, describe_encoder, load_encoder
from spade3d.provenance import describe, write_json, write_text
from spade3d.recipes.recipe import build_network
from spade3d.scans import open_scans
from spade3d.training.loop import Optimiser, Task, train
from spade3d.training.precision import autocast_for
from spade3d.volumes.geometry import canonical_flips, spacing_of
from spade3d.volumes.split import Split, draw_labelled, split_cases
from spade3d.volumes.store import VolumeStore, is_store
from spade3d.volumes.volume import Grid, write_on_grid


def run_finetuning(settings: FinetuneSettings, out: Path, *, resume: bool, strict: bool) -> dict:
    """What `dagman-finetune` does; returns what it prints."""
    data = Path(settings.data.path)
    if resume:
        store = VolumeStore.open(out / STORE if is_store(out / STORE) else data)
        split = split_cases(store.cases, settings.folds, settings.fold)
        taught = draw_labelled(store.cases, split.train, settings.labels, settings.seed)
    else:
        place = find_device(settings.device)
        autocast_for(settings.precision, torch.device(place))  # refused here, while nothing is done yet
        with console.fresh_folder(out, CONFIG):
            if settings.init is not None:
                describe_encoder(Path(settings.init))  # refused before hours of preparing, if it cannot be read
            store = open_scans(
                data, out / STORE, settings.data, workers=settings.workers, strict=strict, labelled_only=True
            )
            report_rejected(store)
            split = split_cases(store.cases, settings.folds, settings.fold)
            check_split(store, split)
            taught = draw_labelled(store.cases, split.train, settings.labels, settings.seed)
            # From all who may teach, not from those drawn: runs of other --labels and --seed share crop and steps.
            settings = choose(settings, store, draw_labelled(store.cases, split.train, None, settings.seed), place)
            # A checkpoint that does not fit, or has seen the judges, is refused while there is nothing to take back.
            fresh_network(settings, classes_of(store))
            find_leakage(store, split, pretraining_of(settings), strict=strict)
            write_json(out / PROVENANCE, describe(store, taught, split))
            write_text(out / CONFIG, to_yaml(settings))
    classes, device = classes_of(store), torch.device(settings.device)
    network, coverage = fresh_network(settings, classes)
    leakage = find_leakage(store, split, pretraining_of(settings), strict=strict)
    announce(settings, store, split, taught, classes, coverage)

    model = SegmentationModel(
        network, settings.network, classes, store.preprocessing, settings.crop.shape, settings.scoring.overlap
    )
    looks = settings.scoring.looks
    train(
        Segmentation(network),
        build_stream(settings, store, taught, classes),
        steps=settings.steps,
        out=out,
        optimiser=Optimiser(**settings.optim.model_dump()),
        skip_bad_batches=settings.skip_bad_batches,
        device=device,
        precision=settings.precision,
        save_every=settings.save_every,
        seed=settings.seed,
        resume=resume,
        validate=(lambda task, step: look(task, model, store, split, settings, device)) if looks else None,
        validate_every=max(1, settings.steps // max(1, looks)),
        better="mean_dice" if looks else None,
        label="fine-tuning",
        config_hash=hashlib.sha256((out / CONFIG).read_bytes()).hexdigest(),
    )
    model.save(out / "model.safetensors")
    rows = judge(model, store, split, out / "predictions", settings, device)
    write_cases(out / "cases.csv", rows)
    summary = summarise(rows, settings, store, split, taught, loading_of(settings, coverage), leakage)
    write_json(out / "summary.json", summary)
    shown = [show(model, store, case, why, device) for case, why in telling_cases(rows)]
    report = finetuning_report(out, shown)
    low, high = summary["mean_dice_interval"]
    return {
        "mean_dice": summary["mean_dice"],
        "interval": None if low is None else [low, high],
        "cases": summary["cases"],
        "subjects": summary["subjects"],
        "report": str(report),
        "predictions": str(out / "predictions"),
    }


def check_split(store: VolumeStore, split: Split) -> None:
    """Fine-tuning needs somebody to judge."""
    if not split.validation:
        labelled = sorted({case.subject for case in store.cases if case.has_labels})
        raise DataFault(
            f"{store.dataset}: {len(labelled)} labelled subjects ({', '.join(labelled) or 'none'}) among {len(store)} "
            "scans; at least 2 are needed, one to train and one to judge: add labelled scans, or check that the labels "
            "lie where the layout expects them"
        )


def fresh_network(settings: FinetuneSettings, classes: Classes):
    """The network of a run, drawn from its seed; then its encoder from the checkpoint, if there is one.

    The decoder is drawn the same with and without a checkpoint: a twin from scratch differs in the encoder only.
    """
    torch.manual_seed(settings.seed)
    network = build_network(settings.network, out_channels=len(classes))
    coverage: Coverage | None = None if settings.init is None else load_encoder(network, Path(settings.init))
    return network, coverage


def loading_of(settings: FinetuneSettings, coverage: Coverage | None) -> dict | None:
    """How much of the checkpoint was loaded, and the run it comes from where it says so; None from scratch."""
    if coverage is None:
        return None
    run = describe_encoder(Path(settings.init)).get("run")
    return {"loaded": coverage.loaded, "total": coverage.total, "source": coverage.source, "run": run}


def pretraining_of(settings: FinetuneSettings) -> dict | None:
    """What the checkpoint says it learned from; None without a checkpoint, {} where it does not say."""
    if settings.init is None:
        return None
    return describe_encoder(Path(settings.init)).get("provenance", {})


def look(task: Task, model: SegmentationModel, store, split: Split, settings, device) -> dict[str, float]:
    """A quick look while training: mean Dice of a few validation cases. It chooses nothing that is reported."""
    few = split.validation[: settings.scoring.look_cases]
    dice = []
    for i in few:
        case = store.cases[i]
        found = model.segment_prepared(intensities(store, i), case.affine, case.source_grid, device)
        truth = store.truth(i)
        for value in model.classes.values:
            both = int(((found == value) & (truth == value)).sum())
            either = int((found == value).sum() + (truth == value).sum())
            if either:
                dice.append(2 * both / either)
    return {"mean_dice": float(np.mean(dice)) if dice else 0.0}


def intensities(store: VolumeStore, i: int) -> np.ndarray:
    return store.cases[i].normalisation.intensity(store.image(i))


def judge(model: SegmentationModel, store, split: Split, folder: Path, settings, device) -> list[dict]:
    """Predict every validation case, write it on the input's own grid, and measure it there."""
    folder.mkdir(exist_ok=True)
    rows = []
    with console.progress_of("judging") as progress:
        for done, i in enumerate(split.validation):
            case = store.cases[i]
            progress(done, len(split.validation), case.name)
            found = model.segment_prepared(intensities(store, i), case.affine, case.source_grid, device)
            write_on_grid(folder / f"{safe_name(case.name)}.nii.gz", found, case.source_grid)
            spacing = canonical_spacing(case)
            measured = case_metrics(
                store.truth(i), found, spacing, model.classes.values, tolerance_mm=settings.scoring.tolerance_mm
            )
            names = dict(zip(model.classes.values, model.classes.names, strict=True))
            who = {"case": case.name, "subject": case.subject}
            rows += [who | {"name": names[row["class"]]} | row for row in measured]
        progress(len(split.validation), len(split.validation), case.name)
    return rows


def canonical_spacing(case) -> tuple[float, float, float]:
    """The spacing of a case's source along R, A, S, in mm."""
    grid = case.source_grid
    return spacing_of(canonical_flips(grid.affine, grid.shape).affine(grid.affine))


def safe_name(name: str) -> str:
    """A case's name as one file name."""
    return name.replace("/", "_")


def show(model: SegmentationModel, store, name: str, why: str, device: torch.device) -> CasePicture:
    """A case for the report, on the prepared grid of the store."""
    i = store.index_of(name)
    case, image = store.cases[i], intensities(store, store.index_of(name))
    found = model.segment_prepared(image, case.affine, Grid(case.shape, case.affine), device)
    norm = case.normalisation
    grey = (image - norm.low) / (norm.high - norm.low)
    return CasePicture(name, grey, store.labels(i).astype(np.int64), found.astype(np.int64), case.spacing, why)


def announce(settings, store, split: Split, taught: Sequence[int], classes: Classes, coverage) -> None:
    """What was chosen, before the first step."""
    subjects = {store.cases[i].subject for i in taught}
    begin = (
        "from scratch" if coverage is None else f"{coverage.loaded} of {coverage.total} tensors from {coverage.source}"
    )
    console.print_choice(
        "dagman-finetune, segmentation",
        {
            "learns from": f"{len(taught)} labelled scans of {len(subjects)} subjects ({store.layout})",
            "judged on": f"{len(split.validation)} scans; {split.rule}",
            "structures": ", ".join(classes.names),
            "encoder": begin,
            "spacing": " x ".join(f"{mm:g}" for mm in settings.data.spacing) + " mm",
            "crop": " x ".join(map(str, settings.crop.shape)) + " voxels",
            "width": settings.network.feature_size,
            "steps": settings.steps,
            "device": settings.device,
        },
    )
