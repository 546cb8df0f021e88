"""Prediction: any scans in, label maps on their own grids out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dagman.downstream.model import load_model
from spade3d import console
from spade3d.commands import find_device
from spade3d.faults import DataFault
from spade3d.volumes.geometry import spacing_of
from spade3d.volumes.layouts import Case, read_layout
from spade3d.volumes.volume import Grid, read_volume, write_on_grid


def predict_scans(model_path: Path, scans: Sequence[Path], out: Path, device: str, strict: bool) -> dict:
    """Segment every scan; a bad one is named and left out unless `strict`. Returns what the command prints."""
    model = load_model(model_path)
    place = torch.device(find_device(device))
    cases = [case for path in scans for case in read_layout(path).cases]
    check_names(cases, out)
    volumes, left_out = {}, 0
    with console.progress_of("segmenting") as progress:
        for done, case in enumerate(cases):
            progress(done, len(cases), case.name)
            try:
                volume = read_volume(case.image, modality=case.modality, subject=case.subject, series=case.series)
                found = model.segment(volume, place)
            except DataFault as fault:
                if strict:
                    raise
                print(f"left out {case.name}: {fault}", file=sys.stderr)
                left_out += 1
                continue
            write_on_grid(console.results_folder(out) / file_name(case), found, Grid(volume.shape, volume.affine))
            ml = float(np.prod(spacing_of(volume.affine))) / 1000
            volumes[case.name] = {
                name: round(int((found == value).sum()) * ml, 3)
                for name, value in zip(model.classes.names, model.classes.values, strict=True)
            }
        progress(len(cases), len(cases), cases[-1].name)
    if not volumes:
        raise DataFault(f"none of {len(cases)} scans could be segmented; the reasons stand above")
    return {"predictions": str(out), "scans": len(volumes), "left_out": left_out, "volumes_ml": volumes}


def file_name(case: Case) -> str:
    return f"{case.name.replace('/', '_')}.nii.gz"


def check_names(cases: Sequence[Case], out: Path) -> None:
    """Two scans may not write one file, and nothing is written over: OUT may be the folder of the scans."""
    names = [file_name(case) for case in cases]
    if there := next((out / name for name in names if (out / name).exists()), None):
        raise DataFault(f"{there}: exists already, and would be written over; give another --out")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataFault(f"two scans are both called {twice[0]}; predict them into different --out folders")
