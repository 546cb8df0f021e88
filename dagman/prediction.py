"""Prediction: any scans in; label maps, and maps of where the network looks, on their own grids out."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dagman.attention_prediction import (
    HEADS,
    MAP,
    AttentionModel,
    attention_of_model,
    attention_of_run,
    is_finetuned,
)
from dagman.downstream.components import keep_largest
from dagman.downstream.flips import exchange_of
from dagman.downstream.labelled import Classes
from dagman.downstream.model import SegmentationModel, load_model
from dagman.recipes.predicting import Segmenting
from spade3d import console
from spade3d.commands import find_device
from spade3d.faults import DataFault, Fault, UsageFault
from spade3d.volumes.geometry import spacing_of
from spade3d.volumes.layouts import Case, read_layout
from spade3d.volumes.organs import canonical_organ
from spade3d.volumes.preprocessing import Prepared
from spade3d.volumes.volume import Grid, read_volume, write_on_grid

ENDING = ".nii.gz"  # of a label map, after a scan's name
ENDINGS = {".nii": ".nii", ".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}  # --format same
VOLUMES = "volumes.csv"
COLUMNS = ("case", "class", "name", "voxels", "ml")

S, T = TypeVar("S"), TypeVar("T")


@dataclass(frozen=True)
class Segmented:
    """What was found in one scan. `ml` of each class."""

    case: str
    modality: str
    seconds: float
    ml: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {ml:.1f} ml" for name, ml in self.ml.items())
        return f"{self.case}: {self.seconds:.1f} s; {parts}"


def predict_scans(
    model_path: Path,
    scans: Sequence[Path],
    out: Path,
    device: str,
    strict: bool,
    how: Segmenting | None = None,
    *,
    attention: bool = False,
    attention_stage: int | None = None,
    tell: Callable[[Segmented], None] | None = None,
) -> dict:
    """Segment every scan, write where the network looks (`attention`), or both; a bad scan is named and left out unless
    `strict`. An encoder of pretraining only looks. `tell` hears of each segmented scan as it is done. Returns what the
    command prints."""
    how = how or Segmenting()
    model, looks = open_models(model_path, attention, attention_stage)
    in_pieces = check_asked(model, how)
    place = torch.device(find_device(device))
    cases = [case for path in scans for case in read_layout(path).cases]
    check_names(cases, out, lambda case: ([label_ending(case, how)] if model else []) + ([MAP, HEADS] if looks else []))
    if model:
        check_table(out / VOLUMES, COLUMNS)
    if looks:
        print(f"note: {looks.note}", file=sys.stderr)

    def predict(case: Case) -> tuple:
        begun = time.perf_counter()
        ready = prepare(case, model or looks)
        intensities = ready.normalisation.intensity(ready.voxels)
        maps = looks.look(intensities, place) if looks else None
        found = segment(model, intensities, ready, place, how, in_pieces) if model else None
        return begun, ready, maps, found

    def write(case: Case, predicted: tuple) -> Segmented | None:
        begun, ready, maps, found = predicted
        folder = console.results_folder(out)
        if looks:
            looks.write(maps, ready, folder, file_stem(case))
        if not model:
            return None
        write_on_grid(folder / (file_stem(case) + label_ending(case, how)), found, ready.source_grid)
        ml = add_volumes(folder / VOLUMES, case.name, found, model.classes, ready.source_grid)
        one = Segmented(case.name, ready.modality, round(time.perf_counter() - begun, 2), ml)
        warn_of_modality(one, model)
        if tell is not None:
            tell(one)
        return one

    doing = ("segmenting", "segmented") if model else ("looking", "looked at")
    segmented = each_scan(cases, doing, strict, predict, write)
    said = {"predictions": str(out), "scans": len(segmented), "left_out": len(cases) - len(segmented)}
    said |= {"attention": looks.said} if looks else {}
    if model:
        said["other_modality"] = [one.case for one in segmented if is_foreign(one, model)]
        said["seconds"] = {one.case: one.seconds for one in segmented}
        said["volumes_ml"] = {one.case: one.ml for one in segmented}
    return said


def each_scan(
    cases: Sequence[Case],
    doing: tuple[str, str],
    strict: bool,
    predict: Callable[[Case], S],
    write: Callable[[Case, S], T],
) -> list[T]:
    """What `write` made of what `predict` made of every scan. A scan that cannot be predicted is named and left out
    unless `strict`; what cannot be written ends all. `doing`: what is done and has been done to scans, in words.
    DataFault where every scan is bad."""
    done = []
    with console.progress_of(doing[0]) as progress:
        for number, case in enumerate(cases):
            progress(number, len(cases), case.name)
            try:
                predicted = predict(case)
            except DataFault as fault:
                if strict:
                    raise
                print(f"left out {case.name}: {fault}", file=sys.stderr)
                continue
            done.append(write(case, predicted))
        progress(len(cases), len(cases), cases[-1].name)
    if not done:
        raise DataFault(f"none of {len(cases)} scans could be {doing[1]}; the reasons stand above")
    return done


def open_models(
    path: Path, attention: bool, stage: int | None
) -> tuple[SegmentationModel | None, AttentionModel | None]:
    """What segments, and what shows where it looks."""
    if not attention:
        return load_model(path), None
    if not is_finetuned(path):
        return None, attention_of_run(path, stage)
    model = load_model(path)
    return model, attention_of_model(model, stage)


def check_asked(model: SegmentationModel | None, how: Segmenting) -> frozenset[int]:
    """The label values of the classes that may lie in several pieces; UsageFault for what this model cannot do."""
    if model is None:
        if how != Segmenting():
            raise UsageFault(
                "--batch, --flips, --largest-component, --format and --precision are for label maps, and an encoder "
                "does not segment; give a run of dagman-finetune, or leave them out"
            )
        return frozenset()
    exchange_of(model.classes, model.taught, how.axes)  # refused before any scan is read
    value_of = {canonical_organ(name): value for name, value in zip(model.classes.names, model.classes.values)}
    if unknown := [name for name in how.exempt if canonical_organ(name) not in value_of]:
        raise UsageFault(f"--except {unknown[0]}: no such class; the model has {', '.join(model.classes.names)}")
    return frozenset(value_of[canonical_organ(name)] for name in how.exempt)


def prepare(case: Case, model: SegmentationModel | AttentionModel) -> Prepared:
    """A scan as the model wants it."""
    volume = read_volume(case.image, modality=case.modality, subject=case.subject, series=case.series)
    return model.preprocessing.prepare(volume)


def segment(
    model: SegmentationModel,
    intensities: np.ndarray,
    ready: Prepared,
    place: torch.device,
    how: Segmenting,
    in_pieces: frozenset[int],
) -> np.ndarray:
    """The label map of a prepared scan, cleaned where that was asked for."""
    asked = {"fill": ready.normalisation.low, "batch": how.batch, "flips": how.axes, "precision": how.precision}
    found = model.segment_prepared(intensities, ready.affine, ready.source_grid, place, **asked)
    if how.largest_component:
        keep_largest(found, [value for value in model.classes.values if value not in in_pieces])
    return found


def is_foreign(one: Segmented, model: SegmentationModel) -> bool:
    """Whether a scan is of a modality that the model, as far as its file tells, never saw."""
    return bool(model.modalities) and one.modality not in model.modalities


def warn_of_modality(one: Segmented, model: SegmentationModel) -> None:
    if is_foreign(one, model):
        print(
            f"warning: {one.case}: is {one.modality}, and the model learned from {' and '.join(model.modalities)}; "
            "look at its label map before you trust it",
            file=sys.stderr,
        )


def label_ending(case: Case, how: Segmenting) -> str:
    """Of a scan's label map: a folder of DICOM slices gets NIfTI, whatever is asked for."""
    return ENDINGS.get(case.image.suffix.lower(), ENDING) if how.format == "same" else ENDING


def file_stem(case: Case) -> str:
    return case.name.replace("/", "_")


def check_names(cases: Sequence[Case], out: Path, endings: Callable[[Case], Sequence[str]]) -> None:
    """Two results may not be one file, and nothing is written over: OUT may be the folder of the scans."""
    for case in cases:
        for ending in endings(case):
            if (there := out / (file_stem(case) + ending)).exists():
                raise DataFault(f"{there}: exists already, and would be written over; give another --out")
    stems = [file_stem(case) for case in cases]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise DataFault(f"two scans would both be called {twice}; predict them into different --out folders")


def check_table(table: Path, columns: Sequence[str]) -> None:
    """Rows are added to the table of an earlier call; DataFault where another file has its name."""
    if not table.exists():
        return
    head = table.read_bytes()[:200].splitlines()[:1] if table.is_file() else []
    if head != [",".join(columns).encode()]:
        raise DataFault(f"{table}: exists already, and is no table of dagman-predict; give another --out")


def add_volumes(table: Path, case: str, found: np.ndarray, classes: Classes, grid: Grid) -> dict[str, float]:
    """The volume (ml) of every class in a label map, also as rows behind those that a table has."""
    counts = sum(np.bincount(plane.ravel(), minlength=max(classes.values) + 1) for plane in found)
    voxel_ml = math.prod(spacing_of(grid.affine)) / 1000
    ml = {name: round(int(counts[value]) * voxel_ml, 3) for name, value in zip(classes.names, classes.values)}
    rows = [(case, value, name, int(counts[value]), ml[name]) for name, value in zip(classes.names, classes.values)]
    try:
        with open(table, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows if file.tell() else [COLUMNS, *rows])
    except OSError as error:
        raise Fault(f"{table}: cannot be written ({error.strerror}); give another --out") from error
    return ml
