"""Prediction: any scans in; label maps, and maps of where the network looks, on their own grids out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dagman.attention_prediction import (
    HEADS,
    MAP,
    UNIT,
    AttentionModel,
    attention_of_model,
    attention_of_run,
    is_finetuned,
)
from dagman.downstream.labelled import Classes
from dagman.downstream.model import SegmentationModel, load_model
from spade3d import console
from spade3d.commands import find_device
from spade3d.faults import DataFault
from spade3d.volumes.layouts import Case, read_layout
from spade3d.volumes.volume import read_volume, write_on_grid

ENDING = ".nii.gz"  # of a label map, after a scan's name


def predict_scans(
    model_path: Path,
    scans: Sequence[Path],
    out: Path,
    device: str,
    strict: bool,
    *,
    attention: bool = False,
    attention_stage: int | None = None,
) -> dict:
    """Segment every scan, write where the network looks (`attention`), or both; a bad scan is named and left out unless
    `strict`. An encoder of pretraining only looks. Returns what the command prints."""
    model, looks = open_models(model_path, attention, attention_stage)
    place = torch.device(find_device(device))
    cases = [case for path in scans for case in read_layout(path).cases]
    endings = ([ENDING] if model else []) + ([MAP, HEADS] if looks else [])
    check_names(cases, out, endings)
    if looks:
        print(f"note: {looks.looker.said}; {UNIT}", file=sys.stderr)
    volumes, done = {}, 0
    with console.progress_of("segmenting" if model else "looking") as progress:
        for number, case in enumerate(cases):
            progress(number, len(cases), case.name)
            try:
                volume = read_volume(case.image, modality=case.modality, subject=case.subject, series=case.series)
                ready = (model or looks).preprocessing.prepare(volume)
                intensities = ready.normalisation.intensity(ready.voxels)
                maps = looks.look(intensities, place) if looks else None
                found = model.segment_prepared(intensities, ready.affine, ready.source_grid, place) if model else None
            except DataFault as fault:
                if strict:
                    raise
                print(f"left out {case.name}: {fault}", file=sys.stderr)
                continue
            folder, done = console.results_folder(out), done + 1
            if model:
                write_on_grid(folder / (file_stem(case) + ENDING), found, ready.source_grid)
                volumes[case.name] = volumes_ml(found, model.classes, volume.spacing)
            if looks:
                looks.write(maps, ready, folder, file_stem(case))
        progress(len(cases), len(cases), cases[-1].name)
    if not done:
        what = "segmented" if model else "looked at"
        raise DataFault(f"none of {len(cases)} scans could be {what}; the reasons stand above")
    said = {"predictions": str(out), "scans": done, "left_out": len(cases) - done}
    said |= {"attention": looks.said} if looks else {}
    return said | ({"volumes_ml": volumes} if model else {})


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


def volumes_ml(found: np.ndarray, classes: Classes, spacing: tuple[float, float, float]) -> dict[str, float]:
    """The volume of every class in a label map."""
    ml = float(np.prod(spacing)) / 1000
    return {
        name: round(int((found == value).sum()) * ml, 3)
        for name, value in zip(classes.names, classes.values, strict=True)
    }


def file_stem(case: Case) -> str:
    return case.name.replace("/", "_")


def check_names(cases: Sequence[Case], out: Path, endings: Sequence[str]) -> None:
    """Two results may not be one file, and nothing is written over: OUT may be the folder of the scans."""
    names = [file_stem(case) + ending for case in cases for ending in endings]
    if there := next((out / name for name in names if (out / name).exists()), None):
        raise DataFault(f"{there}: exists already, and would be written over; give another --out")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataFault(f"two scans would both be written to {twice[0]}; predict them into different --out folders")
