"""Prediction of studies: any scans in; the probability of each finding, and maps of where they are, out."""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dagman.downstream.study_model import STUDY, StudyFound, StudyModel, load_study_model
from dagman.prediction import check_table, each_scan
from dagman.recipes.predicting import Segmenting
from dagman.study_judging import map_name, map_names
from spade3d import console
from spade3d.commands import find_device
from spade3d.faults import DataFault, Fault, UsageFault
from spade3d.model_file import format_of
from spade3d.volumes.layouts import Case, read_layout
from spade3d.volumes.volume import Grid, read_volume, write_volume

STUDIES = "dagman-study-"  # how the format of a model of studies begins
PREDICTIONS = "predictions.csv"
COLUMNS = ("case", "subject", "finding", "probability")


@dataclass(frozen=True, eq=False)
class Asked:
    """What a model found in one scan, the scan's grid, and when it was begun."""

    found: StudyFound
    grid: Grid
    begun: float


@dataclass(frozen=True)
class Told:
    """What was said of one scan: the probability of each finding."""

    case: str
    seconds: float
    probabilities: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {share:.3f}" for name, share in self.probabilities.items())
        return f"{self.case}: {self.seconds:.1f} s; {parts}"


def is_study_model(path: Path) -> bool:
    """Whether a run, or its model.safetensors, is one of classification or localisation."""
    file = path / STUDY.name if path.is_dir() else path
    return file.is_file() and format_of(file).startswith(STUDIES)


def predict_studies(
    model_path: Path,
    scans: Sequence[Path],
    out: Path,
    device: str,
    strict: bool,
    how: Segmenting | None = None,
    *,
    attention: bool = False,
    tell: Callable[[Told], None] | None = None,
) -> dict:
    """Write OUT/predictions.csv, a row for each scan and finding, and, where the model's head has maps, the map of each
    finding on the scan's own grid, OUT/<scan>_<finding>.nii.gz: evidence, 0 and more, not a probability.

    A bad scan is named and left out unless `strict`; `tell` hears of each scan as it is done. Returns what the command
    prints. UsageFault for what segments (`how`), and for `attention`.
    """
    check_asked(how or Segmenting(), attention)
    model = load_study_model(model_path)
    place = torch.device(find_device(device))
    cases = [case for path in scans for case in read_layout(path).cases]
    check_names(cases, model, out)
    check_table(out / PREDICTIONS, COLUMNS)
    check_rows(cases, out / PREDICTIONS)

    def predict(case: Case) -> Asked:
        return ask(model, case, place)

    def write(case: Case, asked: Asked) -> Told:
        told = write_study(model, case, asked, out)
        if tell is not None:
            tell(told)
        return told

    done = each_scan(cases, ("looking for findings", "read"), strict, predict, write)
    return {
        "predictions": str(out / PREDICTIONS),
        "scans": len(done),
        "left_out": len(cases) - len(done),
        "maps": model.has_maps,
        "seconds": {one.case: one.seconds for one in done},
        "probabilities": {one.case: one.probabilities for one in done},
    }


def check_asked(how: Segmenting, attention: bool) -> None:
    """UsageFault for options that do nothing here."""
    if how != Segmenting():
        raise UsageFault(
            "--batch, --flips, --largest-component, --except, --format and --precision are for label maps, and this "
            "model tells findings of whole studies; leave them out, or give a run of dagman-finetune --task "
            "segmentation"
        )
    if attention:
        raise UsageFault(
            "--attention shows where an encoder looks, and this model has maps of its findings, which are written "
            "where its head has any; leave it out, or give the encoder.safetensors that the run began with"
        )


def ask(model: StudyModel, case: Case, place: torch.device) -> Asked:
    """Read one scan and ask what it shows."""
    begun = time.perf_counter()
    volume = read_volume(case.image, modality=case.modality, subject=case.subject, series=case.series)
    return Asked(model.volume(volume, place), Grid(volume.shape, volume.affine), begun)


def write_study(model: StudyModel, case: Case, asked: Asked, out: Path) -> Told:
    """Write what was found in one scan."""
    folder, found, grid = console.results_folder(out), asked.found, asked.grid
    if found.maps is not None:
        for n, finding in enumerate(model.findings):
            write_volume(folder / map_name(case.name, finding), found.on_grid(n, grid), grid.affine)
    told = dict(zip(model.findings, found.probabilities.tolist(), strict=True))
    add_rows(folder / PREDICTIONS, case, told)
    return Told(case.name, round(time.perf_counter() - asked.begun, 2), told)


def check_names(cases: Sequence[Case], model: StudyModel, out: Path) -> None:
    """Two results may not be one file, nor of one name, and nothing is written over: OUT may be the folder of the
    scans."""
    if twice := [name for name, count in Counter(case.name for case in cases).items() if count > 1]:
        raise DataFault(f"two scans would both be called {twice[0]}; predict them into different --out folders")
    if not model.has_maps:
        return
    names = map_names([case.name for case in cases], model.findings, "predict their scans into different --out folders")
    if there := next((name for name in names if (out / name).exists()), None):
        raise DataFault(f"{out / there}: exists already, and would be written over; give another --out")


def check_rows(cases: Sequence[Case], table: Path) -> None:
    """DataFault for a scan that the table has already: it does not say by which model."""
    if not table.is_file():
        return
    with open(table, newline="", encoding="utf-8") as file:
        there = {row["case"] for row in csv.DictReader(file)}
    if again := [case.name for case in cases if case.name in there]:
        raise DataFault(f"{table}: has {again[0]} already; give another --out")


def add_rows(table: Path, case: Case, told: dict[str, float]) -> None:
    """The probabilities of a scan, all digits, as rows behind those that a table has."""
    rows = [(case.name, case.subject, finding, share) for finding, share in told.items()]
    try:
        with open(table, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows if file.tell() else [COLUMNS, *rows])
    except OSError as error:
        raise Fault(f"{table}: cannot be written ({error.strerror}); give another --out") from error
