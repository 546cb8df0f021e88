"""One fine-tuning run from settings to report: split, crops, training, predictions on the input's grid, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from dagman.downstream.flips import exchange_of
from dagman.downstream.labelled import Classes, classes_of
from dagman.downstream.model import SEGMENTATION, Decoder, SegmentationModel, with_decoder
from dagman.downstream.protocols import deviations
from dagman.downstream.segmentation import Segmentation
from dagman.evaluation.cases_table import write_cases
from dagman.evaluation.leakage import find_leakage, say_leakage
from dagman.evaluation.report import finetuning_report
from dagman.evaluation.scores import telling_cases
from dagman.evaluation.summary import summarise
from dagman.judging import judge, look, scored_classes, show
from dagman.recipes.finetuning import FinetuneSettings, build_stream, choose, protocol_of, regime_of
from spade3d import console
from spade3d.began_with import check_beginning, keep_beginning
from spade3d.commands import CONFIG, STORE, find_device, learn, report_rejected
from spade3d.configuration import to_yaml
from spade3d.faults import DataFault, UsageFault
from spade3d.networks.foreign import Coverage, describe_encoder, load_encoder
from spade3d.provenance import PROVENANCE, describe, write_json, write_text
from spade3d.recipes.recipe import build_network
from spade3d.scans import open_scans
from spade3d.training import ranks
from spade3d.training.precision import autocast_for
from spade3d.training.prefetch import prefetched
from spade3d.volumes.layouts import Dataset, read_layout
from spade3d.volumes.split import Split, draw_labelled
from spade3d.volumes.store import VolumeStore, is_store

Chosen = TypeVar("Chosen", bound=FinetuneSettings)
MOMENTS = 32  # batches by which a linear decoder whitens what it reads


def run_finetuning(settings: FinetuneSettings, out: Path, *, resume: bool, strict: bool) -> dict:
    """One run, from settings to report, as every one of its processes runs it; returns what `dagman-finetune` prints of
    it."""
    if not resume:
        settings = ranks.once(lambda: begin(settings, out, strict=strict))
    store, split = reopened(settings, out)
    if resume:
        ranks.once(lambda: check_run(settings, out, store, taught_by(settings, store, split), split))
    return trained_and_judged(settings, out, store, split, resume=resume, strict=strict)


def begin(settings: FinetuneSettings, out: Path, *, strict: bool) -> FinetuneSettings:
    """Prepare the scans, choose what was left open, and write down what the run is."""
    with console.fresh_folder(out, CONFIG):
        settings, store, split = opened(settings, out, strict=strict)
        taught = taught_by(settings, store, split)
        keep_beginning(out, store, taught, split, settings)
        write_json(out / PROVENANCE, describe(store, taught, split))
        write_text(out / CONFIG, to_yaml(settings))
    return settings


def opened(settings: Chosen, out: Path, *, strict: bool) -> tuple[Chosen, VolumeStore, Split]:
    """Scans, their split, and settings that leave nothing open. Whatever cannot be run is refused here, while there is
    nothing to take back."""
    place = find_device(settings.device)
    autocast_for(settings.precision, torch.device(place))
    if settings.init is not None:
        describe_encoder(Path(settings.init))  # before hours of preparing, if it cannot be read
    store = open_labelled(settings, out, strict=strict)
    report_rejected(store)
    split = split_of(settings, store)
    check_split(store, split)
    scored_classes(settings, classes_of(store))
    exchange_of(classes_of(store), settings.crop.flip, settings.scoring.segmenting().axes)
    # From all who may teach, not from those drawn: runs of other --labels and --draw share crop and steps.
    settings = choose(settings, store, draw_labelled(store.cases, split.train, None, 0), place)
    fresh_network(settings, classes_of(store))
    find_leakage(store, split, pretraining_of(settings), strict=strict)
    return settings, store, split


def reopened(settings: FinetuneSettings, out: Path) -> tuple[VolumeStore, Split]:
    """Scans and split of a run that was begun in `out`."""
    store = VolumeStore.open(out / STORE if is_store(out / STORE) else Path(settings.data.path))
    return store, split_of(settings, store)


def check_run(settings: FinetuneSettings, out: Path, store: VolumeStore, taught: Sequence[int], split: Split) -> None:
    """DataFault where the scans of a run that is to be continued, their labels, or the encoder, are not those it began
    with."""
    check_beginning(out, store, taught, split, settings, labels=(*taught, *split.validation))


def open_labelled(settings: FinetuneSettings, out: Path, *, strict: bool) -> VolumeStore:
    """The store that DATA is, or one made in `out` of the labelled scans that the protocol asks for. What the protocol
    refuses by names alone is refused before any scan is prepared."""
    data, workers = Path(settings.data.path), settings.workers
    dataset = None if is_store(data) else read_layout(data)
    only = None if dataset is None else names_of(settings, dataset)
    if dataset is not None and dataset.label_names:  # else the structures are known when the scans are read
        scored_classes(settings, Classes(tuple(dataset.label_names.values()), tuple(dataset.label_names)))
    how = {"workers": workers, "strict": strict, "labelled_only": True, "dataset": dataset, "only": only}
    try:
        return open_scans(data, out / STORE, settings.data, **how)
    except UsageFault as fault:
        if any(key.startswith("data.") for key in protocol_of(settings).settings):
            raise UsageFault(
                f"{fault} (what is not said otherwise is as --protocol {settings.protocol} has it)"
            ) from None
        raise


def names_of(settings: FinetuneSettings, dataset: Dataset) -> set[str] | None:
    """The cases of a dataset that teach or judge under the protocol of a run; None for all of them, where nobody
    judges: why is said when scans are read, for labels may be there and not be readable."""
    split = split_of(settings, dataset)
    return {dataset.cases[i].name for i in (*split.train, *split.validation)} if split.validation else None


def split_of(settings: FinetuneSettings, scans: Dataset | VolumeStore) -> Split:
    """Who teaches and who judges; DataFault where the protocol is another dataset's."""
    protocol = protocol_of(settings)
    protocol.check_layout(scans.layout)
    return protocol.split(scans.cases, settings.folds, settings.fold)


def taught_by(settings: FinetuneSettings, store: VolumeStore, split: Split) -> tuple[int, ...]:
    """The labelled cases that a run learns from."""
    return draw_labelled(store.cases, split.train, settings.labels, settings.draw)


def trained_and_judged(
    settings: FinetuneSettings, out: Path, store, split: Split, *, resume: bool, strict: bool
) -> dict:
    """Train, predict, measure, report."""
    taught = taught_by(settings, store, split)
    classes, device = classes_of(store), torch.device(settings.device)
    network, coverage = fresh_network(settings, classes)
    leakage = find_leakage(store, split, pretraining_of(settings), strict=strict, taught=taught)
    if ranks.first():
        announce(settings, store, split, taught, classes, coverage)
    say_leakage(leakage)

    model = SegmentationModel(
        network,
        settings.network,
        classes,
        store.preprocessing,
        settings.crop.shape,
        settings.scoring.overlap,
        decoder=decoder_of(settings),
        modalities=tuple(sorted({store.cases[i].modality for i in taught})),
        taught=settings.crop.flip,
    )
    if decoder_of(settings) == "linear":  # a resumed run takes what its checkpoint has
        whole = build_stream(settings, store, taught, classes)
        network.to(device).eval().whiten(batch.images.to(device) for batch in whole.stream(0, MOMENTS))
    stream = build_stream(settings, store, taught, classes, (ranks.rank(), ranks.world()))
    looks, task = settings.scoring.looks, Segmentation(network, regime_of(settings))
    learn(
        task,
        prefetched(stream, settings.loaders, device),
        settings,
        out,
        resume=resume,
        label="fine-tuning",
        validate=(lambda task, step: look(task, model, store, split, settings, device)) if looks else None,
        validate_every=max(1, settings.steps // max(1, looks)),
        better="mean_dice" if looks else None,
    )
    if ranks.first():
        model.save(out / SEGMENTATION.name)
    rows = judge(model, store, split, out / "predictions", settings, device)

    def told() -> dict:
        write_cases(out / "cases.csv", rows)
        summary = summarise(rows, settings, store, split, taught, loading_of(settings, coverage), leakage)
        summary["protocol"] |= protocol_said(settings)
        write_json(out / "summary.json", summary | what_differs(settings))
        shown = [show(model, store, case, why, settings, device) for case, why in telling_cases(rows)]
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

    return ranks.once(told)


def protocol_said(settings: FinetuneSettings) -> dict[str, Any]:
    """What runs must share to be compared, besides what `summarise` says: the protocol as it is stated, where the run
    leaves it, and how the network was tuned."""
    protocol = protocol_of(settings)
    return {
        "stated": protocol.describe(),
        "deviations": deviations(settings, protocol),
        "flips": settings.scoring.segmenting().letters or "none",
        "largest_component": settings.scoring.largest_component,
        "tuning": settings.tuning.model_dump(),
    }


def what_differs(settings: FinetuneSettings) -> dict[str, Any]:
    """What tells apart the runs of a comparison: which pair of twins a run belongs to, and what of `tuning` acted."""
    regime = asdict(regime_of(settings))
    acted = regime == settings.tuning.model_dump()
    told = "as asked" if acted else "layer decay and encoder warm-up act on an encoder that was loaded, and learns"
    return {
        "draw": settings.draw,
        "pair": f"seed {settings.seed}, draw {settings.draw}",
        "tuning": regime | {"told": told},
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
    return with_decoder(network, decoder_of(settings), len(classes)), coverage


def decoder_of(settings: FinetuneSettings) -> Decoder:
    return "linear" if settings.tuning.encoder == "linear" else "swin-unetr"


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


def announce(settings, store, split: Split, taught: Sequence[int], classes: Classes, coverage) -> None:
    """The protocol, and what was chosen, before the first step."""
    protocol, spacing = protocol_of(settings), settings.data.spacing
    said = {key.replace("_", " "): in_words(value) for key, value in protocol.describe().items() if value}
    left = in_words(deviations(settings, protocol))
    console.print_choice(f"protocol {protocol.name}", said | {"left in": left or "nothing"})
    subjects = {store.cases[i].subject for i in taught}
    drawn = "" if settings.labels is None else f", draw {settings.draw}"
    begin = (
        "from scratch" if coverage is None else f"{coverage.loaded} of {coverage.total} tensors from {coverage.source}"
    )
    regime = regime_of(settings)
    console.print_choice(
        "dagman-finetune, segmentation",
        {
            "learns from": f"{len(taught)} labelled scans of {len(subjects)} subjects ({store.layout}){drawn}",
            "judged on": f"{len(split.validation)} scans; {split.rule}",
            "structures": ", ".join(classes.names),
            "encoder": begin,
            "tuning": f"encoder {regime.encoder}, layer decay {regime.layer_decay:g}, "
            f"encoder still for {regime.encoder_warmup:.0%} of the steps",
            "spacing": spacing if isinstance(spacing, str) else " x ".join(f"{mm:g}" for mm in spacing) + " mm",
            "crop": " x ".join(map(str, settings.crop.shape)) + " voxels",
            "width": settings.network.feature_size,
            "steps": settings.steps,
            "device": settings.device,
        },
    )


def in_words(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
