"""One run of classification or localisation from settings to report: studies, tokens, training, probabilities, maps."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dagman.downstream.clarity_losses import clarity_losses
from dagman.downstream.coarse_scans import CoarseScans
from dagman.downstream.studies import Findings, StudyBatch, read_findings
from dagman.downstream.study_model import STUDY, StudyModel, build_head
from dagman.downstream.study_streams import Bag, BagSampling, Cached, StudyStream, Whole
from dagman.downstream.study_task import StudyTask, labels_alone, moments, prepare_head
from dagman.downstream.token_cache import TokenCache, filled
from dagman.downstream.token_grids import channels_of
from dagman.evaluation.classification import write_predictions
from dagman.evaluation.leakage import find_leakage, say_leakage
from dagman.evaluation.localisation import Annotation, Judging, scores
from dagman.evaluation.study_report import study_report
from dagman.evaluation.study_summary import CONTROL, summarise_studies
from dagman.recipes.clarity_settings import check_clarity, finding_prior, note_of_teacher, taught_by_cnn
from dagman.recipes.priors import OF_LABELS
from dagman.recipes.studies import StudySettings, choose, head_settings, windows_of
from dagman.study_baselines import judge_baselines
from dagman.study_judging import Judge, annotation_notes, annotations_of, look, map_names
from spade3d import console
from spade3d.began_with import check_beginning, keep_beginning
from spade3d.commands import CONFIG, STORE, find_device, learn, report_rejected
from spade3d.configuration import to_yaml
from spade3d.faults import DataFault, UsageFault
from spade3d.networks.foreign import Coverage, describe_encoder, load_encoder
from spade3d.networks.swin import SwinTransformer
from spade3d.provenance import PROVENANCE, describe, without_nan, write_json, write_text
from spade3d.recipes.recipe import build_network
from spade3d.scans import open_scans
from spade3d.training import ranks
from spade3d.training.interruption import preemptible
from spade3d.training.loop import Task
from spade3d.training.precision import autocast_for
from spade3d.training.prefetch import prefetched
from spade3d.volumes.split import Split, draw_labelled, split_cases
from spade3d.volumes.store import VolumeStore, is_store

TOKENS, TEACHER, MAPS = "tokens", "teacher", "maps"
PREDICTIONS, LOCALISED = "predictions.csv", "localisation.json"
LEADING = ("t_iou_0.3", "pointing", "voxel_ap")  # measures of maps that are printed
MOMENTS = 32  # batches, at most, that the head is whitened by where the encoder makes the tokens anew


def run_study(settings: StudySettings, out: Path, *, resume: bool, strict: bool) -> dict:
    """What `dagman-finetune --task classification` and `--task localisation` do; returns what they print."""
    ranks.alone(f"dagman-finetune --task {settings.task}")
    with preemptible(out, CONFIG, resume=resume):
        if resume:
            work = reopened(settings, out)
            check_beginning(out, work.store, work.taught, work.split, settings, labels=work.whose_labels())
        else:
            place = find_device(settings.device)
            autocast_for(settings.precision, torch.device(place))  # refused here, while nothing is done yet
            with console.fresh_folder(out, CONFIG):
                work = begun(settings, out, place, strict=strict)
                keep_beginning(out, work.store, work.taught, work.split, work.settings)
                write_json(out / PROVENANCE, describe(work.store, work.taught, work.split))
                write_text(out / CONFIG, to_yaml(work.settings))
        return work.run(out, resume=resume, strict=strict)


def begun(settings: StudySettings, out: Path, place: str, *, strict: bool) -> Work:
    """Scans, findings, split and settings of a new run; whatever cannot be used is refused before anything is begun."""
    if settings.findings is None:
        raise UsageFault("no findings given; --findings names a CSV with the columns subject,finding_1,...")
    table = console.existing(Path(settings.findings), "a CSV of findings")
    if settings.boxes is not None:
        console.existing(Path(settings.boxes), "a CSV of boxes")
    if settings.init is not None:
        describe_encoder(Path(settings.init))
    data = Path(settings.data.path)
    store = open_scans(data, out / STORE, settings.data, workers=settings.workers, strict=strict)
    report_rejected(store)
    findings = read_findings(table, store.cases)
    split = split_cases(findings.studies, settings.folds, settings.fold)
    check_split(store, findings, split)
    everybody = draw_labelled(findings.studies, split.train, None, settings.seed)
    settings = choose(settings, store, everybody, place)
    work = Work(
        settings, store, findings, split, draw_labelled(findings.studies, split.train, settings.labels, settings.seed)
    )
    if settings.task == "localisation":
        judges = [findings.studies[i].name for i in split.validation]
        map_names(judges, findings.names, "name one of the findings otherwise in the CSV, or one of the scans")
        for note in annotation_notes(work.annotations(), findings, split.validation):
            print(f"note: {note}", file=sys.stderr)
    if settings.head == "clarity":
        check_clarity(settings.clarity, store, findings, work.taught)
    fresh(settings, findings)  # a checkpoint that does not fit is refused while there is nothing to take back
    find_leakage(store, split, pretraining_of(settings), strict=strict)
    return work


def reopened(settings: StudySettings, out: Path) -> Work:
    """The same of a run that is to be continued."""
    store = VolumeStore.open(out / STORE if is_store(out / STORE) else Path(settings.data.path))
    findings = read_findings(console.existing(Path(settings.findings), "a CSV of findings"), store.cases)
    split = split_cases(findings.studies, settings.folds, settings.fold)
    return Work(
        settings, store, findings, split, draw_labelled(findings.studies, split.train, settings.labels, settings.seed)
    )


def check_split(store, findings: Findings, split: Split) -> None:
    """Somebody must judge."""
    if not split.validation:
        subjects = sorted({study.subject for study in findings.studies if study.has_labels})
        raise DataFault(
            f"{store.dataset}: findings of {len(subjects)} subjects ({', '.join(subjects) or 'none'}) among "
            f"{len(store)} scans; at least 2 are needed, one to train and one to judge: add rows or scans"
        )


@dataclass(frozen=True, eq=False)
class Work:
    """What a run is about: `taught` are the cases that it learns from, `split.validation` those that judge."""

    settings: StudySettings
    store: VolumeStore
    findings: Findings
    split: Split
    taught: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    @property
    def loaders(self) -> int | None:
        """Processes that make batches; a prior stays in the training process."""
        told = self.settings.head == "clarity" and self.settings.clarity.prior.source != "none"
        return 0 if told else self.settings.loaders

    def whose_labels(self) -> tuple[int, ...]:
        """The cases whose label maps teach or judge here, beside the findings: those of the training studies where a
        prior is made of them, those of the judges where no boxes say where findings are."""
        settings = self.settings
        told = settings.head == "clarity" and settings.clarity.prior.source in OF_LABELS
        judged = settings.task == "localisation" and settings.boxes is None
        return (self.taught if told else ()) + (self.split.validation if judged else ())

    def run(self, out: Path, *, resume: bool, strict: bool) -> dict:
        """Train, judge, write."""
        settings = self.settings
        encoder, head, coverage = fresh(settings, self.findings)
        leakage = find_leakage(self.store, self.split, pretraining_of(settings), strict=strict)
        announce(self, coverage, out)
        say_leakage(leakage)
        tokens = self.cached_tokens(encoder, out)
        model, task = self.model(encoder), self.task(encoder, head)
        stream = self.stream(tokens, out)
        of_teacher = self.note_of_teacher(stream)
        prepare_head(head, moments(task, self.seen_once(stream), self.device), self.findings.table(self.taught))
        looks = settings.scoring.looks
        learn(
            task,
            prefetched(stream, self.loaders, self.device),
            settings,
            out,
            resume=resume,
            label=settings.task,
            validate=(lambda task, step: look(self.judge(learned(model, task), tokens))) if looks else None,
            validate_every=max(1, settings.steps // max(1, looks)),
            better="macro_auroc" if looks else None,
        )
        judge = self.judge(learned(model, task), tokens)
        judge.model.save(out / STUDY.name)
        localises = settings.task == "localisation"
        rows = judge.predictions(out / MAPS if localises else None)
        write_predictions(out / PREDICTIONS, rows)
        annotations = self.annotations() if localises else []
        how = Judging(tolerance_mm=settings.scoring.tolerance_mm, seed=settings.seed)
        found = scores(judge.heat_maps(annotations), annotations, how) if annotations else None
        if found is not None and settings.scoring.baselines:
            found |= judge_baselines(self, judge, annotations, how, found["rows"])
        if found is not None:
            write_json(out / LOCALISED, without_nan(found))
        told = annotation_notes(annotations, self.findings, self.split.validation) if localises else []
        told += [of_teacher] if of_teacher else []
        summary = summarise_studies(rows, self, loading_of(settings, coverage), leakage, found, told)
        write_json(out / "summary.json", without_nan(summary))
        report = study_report(out, [] if found is None else judge.pictures(found["rows"], annotations))
        return {
            "macro_auroc": summary["macro_auroc"],
            "interval": summary["macro_auroc_interval"],
            "macro_ap": summary["macro_ap"],
            "studies": summary["cases"],
            "subjects": summary["subjects"],
            "report": str(report),
            "predictions": str(out / PREDICTIONS),
        } | ({} if found is None else {name: found["measures"][name]["mean"] for name in LEADING})

    def cached_tokens(self, encoder: SwinTransformer, out: Path) -> TokenCache | None:
        """The tokens of all studies that teach or judge, computed where they are not on disk; None where the run makes
        them itself."""
        if self.settings.arrangement != "cached":
            return None
        folder = out / TOKENS if self.settings.tokens is None else Path(self.settings.tokens)
        cases = [*self.taught, *self.split.validation]
        with console.progress_of("encoding") as progress:
            return filled(encoder, self.store, cases, windows_of(self.settings), folder, self.device, progress)

    def model(self, encoder: SwinTransformer) -> StudyModel:
        """The encoder with a head of its own that sees whole grids; `learned` gives it the weights of the task's."""
        settings, names = self.settings, self.findings.names
        how = head_settings(settings, names, judging=True)
        head = build_head(settings.head, channels_of(encoder), len(names), how)
        low = settings.arrangement == "whole"
        prepared, windows = self.store.preprocessing, windows_of(settings)
        return StudyModel(encoder, head, settings.network, settings.head, how, names, prepared, windows, low)

    def task(self, encoder: SwinTransformer, head: nn.Module) -> StudyTask:
        """What is trained."""
        settings = self.settings
        weights = settings.clarity.weights() if settings.head == "clarity" else None
        criterion = labels_alone if weights is None else lambda output, batch: clarity_losses(output, batch, weights)
        own = None if settings.arrangement == "cached" else encoder
        return StudyTask(head, criterion, own, tuned=settings.tuning == "full", encoder_lr=settings.encoder_lr)

    def stream(self, tokens: TokenCache | None, out: Path) -> StudyStream:
        """The batches of the run."""
        settings, store, names = self.settings, self.store, self.findings.names
        prior = teacher = None
        if settings.head == "clarity":
            clarity, seed = settings.clarity, settings.seed
            prior = finding_prior(clarity.prior, store, names, self.taught, self.taught, seed=seed)
            how = {"out": out / TEACHER, "device": self.device, "seed": seed, "precision": settings.precision}
            teacher = taught_by_cnn(clarity, store, self.findings, self.taught, **how)
        crop = settings.crop
        views = crop.views()
        if tokens is not None:
            show = Cached(tokens, prior)
        elif settings.arrangement == "bag":
            show = Bag(store, BagSampling(crop.crops, crop.shape, settings.data.spacing, views), prior)
        else:
            show = Whole(CoarseScans(store, settings.low_mm), crop.shape, settings.low_mm, views, prior)
        return StudyStream(show, self.findings, self.taught, settings.studies, seed=settings.seed, teacher=teacher)

    def note_of_teacher(self, stream: StudyStream) -> str:
        """What is to be said of the CNN that teaches; it is also printed."""
        note = note_of_teacher(self.settings.clarity, self.findings, self.taught, stream.teacher)
        if note:
            print(f"note: {note}", file=sys.stderr)
        return note

    def seen_once(self, stream: StudyStream) -> Iterator[StudyBatch]:
        """As many batches as show each study about once; a few where the encoder has to make their tokens."""
        once = math.ceil(len(self.taught) / stream.size)
        return stream.stream(0, once if self.settings.arrangement == "cached" else min(once, MOMENTS))

    def annotations(self) -> list[Annotation]:
        """Where the findings of validation studies are: the boxes of --boxes, else the store's labels of that name."""
        boxes = None if self.settings.boxes is None else Path(self.settings.boxes)
        return annotations_of(self.store, self.findings, self.split.validation, boxes)

    def judge(self, model: StudyModel, tokens: TokenCache | None) -> Judge:
        """Who asks the model about the validation studies."""
        return Judge(model, self.store, self.findings, self.split.validation, self.device, tokens)


def learned(model: StudyModel, task: Task) -> StudyModel:
    """The model with what the task's head has learned (its encoder is the task's own, where it has one)."""
    model.head.load_state_dict(task.head.state_dict())
    return model


def fresh(settings: StudySettings, findings: Findings) -> tuple[SwinTransformer, nn.Module, Coverage | None]:
    """Encoder and head, drawn from the run's seed; then the encoder from the checkpoint, if there is one.

    The head is drawn the same with and without a checkpoint: a run from scratch differs in the encoder only.
    """
    torch.manual_seed(settings.seed)
    network = build_network(settings.network, out_channels=1)
    names = findings.names
    channels = channels_of(network.swinViT)
    head = build_head(settings.head, channels, len(names), head_settings(settings, names, judging=False))
    coverage = None if settings.init is None else load_encoder(network, Path(settings.init))
    return network.swinViT.eval(), head, coverage


def loading_of(settings: StudySettings, coverage: Coverage | None) -> dict | None:
    """How much of the checkpoint was loaded, and the run it comes from where it says so; None from scratch."""
    if coverage is None:
        return None
    said = describe_encoder(Path(settings.init))
    told = {"run": said.get("run"), "preprocessing": said.get("preprocessing")}
    return {"loaded": coverage.loaded, "total": coverage.total, "source": coverage.source} | told


def pretraining_of(settings: StudySettings) -> dict | None:
    """What the checkpoint says it learned from; None without a checkpoint, {} where it does not say."""
    return None if settings.init is None else describe_encoder(Path(settings.init)).get("provenance", {})


def told_of_places(settings: StudySettings) -> str:
    """What class tokens are told of where findings may be."""
    prior = settings.clarity.prior
    if prior.source == "none":
        return "none: no foreground is learned, and class maps are held back nowhere (--clarity.prior.source, .table)"
    return f"{prior.source}, of {', '.join(prior.table)}"


def announce(work: Work, coverage: Coverage | None, out: Path) -> None:
    """What was chosen, before the first step."""
    settings, findings = work.settings, work.findings
    for note in findings.notes:
        print(f"note: {note}", file=sys.stderr)
    counts = findings.counts(work.taught)
    sees = " x ".join(map(str, settings.crop.shape)) + " voxels"
    shown = {
        "cached": f"tokens of the whole body, windows of {sees}; kept in {settings.tokens or out / TOKENS}",
        "bag": f"{settings.crop.crops} crops of {sees} a study",
        "whole": f"the whole body, {sees} of {settings.low_mm:g} mm" if settings.low_mm else "",
    }
    begin = f"{coverage.loaded} of {coverage.total} tensors from {coverage.source}" if coverage else "random"
    console.print_choice(
        f"dagman-finetune, {settings.task}",
        {
            "learns from": f"{len(work.taught)} studies ({work.store.layout})",
            "judged on": f"{len(work.split.validation)} studies; {work.split.rule}",
            "findings": ", ".join(
                f"{name} ({of['present']} of {of['present'] + of['absent']})" for name, of in counts.items()
            ),
            "encoder": f"{begin}, {'tuned' if settings.tuning == 'full' else 'frozen'}",
            "shows": shown[settings.arrangement],
            "head": settings.head,
            **({"prior": told_of_places(settings)} if settings.head == "clarity" else {}),
            "spacing": " x ".join(f"{mm:g}" for mm in settings.data.spacing) + " mm",
            "steps": f"{settings.steps} of {min(settings.studies, len(work.taught))} studies",
            "device": settings.device,
        },
    )
    if coverage is None and settings.tuning == "frozen":
        print(f"note: {CONTROL}", file=sys.stderr)
