"""Judging: a model predicts the cases that it did not learn from; they are written, measured and shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dagman.downstream.components import keep_largest
from dagman.downstream.labelled import Classes
from dagman.downstream.model import SegmentationModel
from dagman.evaluation.case_pictures import CasePicture
from dagman.evaluation.metrics import case_metrics, tolerances_of
from dagman.recipes.finetuning import FinetuneSettings, Scoring
from spade3d import console
from spade3d.training import ranks
from spade3d.training.loop import Task
from spade3d.volumes.geometry import canonical_flips, spacing_of
from spade3d.volumes.organs import canonical_organ
from spade3d.volumes.split import Split
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import Grid, write_on_grid


def look(task: Task, model: SegmentationModel, store, split: Split, settings, device) -> dict[str, float]:
    """A quick look while training: mean Dice of a few validation cases. It chooses nothing that is reported."""
    few = split.validation[: settings.scoring.look_cases]

    def dice_of(i: int) -> list[float]:
        case = store.cases[i]
        low = case.normalisation.low
        found = model.segment_prepared(intensities(store, i), case.affine, case.source_grid, device, fill=low)
        truth, dice = store.truth(i), []
        for value in model.classes.values:
            both = int(((found == value) & (truth == value)).sum())
            either = int((found == value).sum() + (truth == value).sum())
            if either:
                dice.append(2 * both / either)
        return dice

    dice = [one for of_case in ranks.each(few, dice_of) for one in of_case]
    return {"mean_dice": float(np.mean(dice)) if dice else 0.0}


def intensities(store: VolumeStore, i: int) -> np.ndarray:
    return store.cases[i].normalisation.intensity(store.image(i))


def judge(model: SegmentationModel, store, split: Split, folder: Path, settings, device) -> list[dict]:
    """Predict every validation case, write it on the input's own grid, and measure it on the grid of `scoring`.
    Processes that share a run take the cases in turn."""
    folder.mkdir(exist_ok=True)
    names, tolerances = scored_classes(settings, model.classes)
    cases = split.validation
    with console.progress_of("judging") as progress:

        def rows_of(number: int) -> list[dict]:
            i = cases[number]
            case = store.cases[i]
            progress(number, len(cases), case.name)
            found = segmented(model, store, i, case.source_grid, settings, device)
            write_on_grid(folder / f"{safe_name(case.name)}.nii.gz", found, case.source_grid)
            truth, spacing = store.truth(i), canonical_spacing(case)
            if settings.scoring.grid == "prepared":
                found = segmented(model, store, i, Grid(case.shape, case.affine), settings, device)
                truth, spacing = store.labels(i), case.spacing
            measured = case_metrics(truth, found, spacing, tuple(names), tolerances, settings.scoring.surface)
            who = {"case": case.name, "subject": case.subject}
            return [who | {"name": names[row["class"]]} | row for row in measured]

        rows = [row for of_case in ranks.each(range(len(cases)), rows_of) for row in of_case]
        progress(len(cases), len(cases), store.cases[cases[-1]].name)
    return rows


def scored_classes(settings: FinetuneSettings, classes: Classes) -> tuple[dict[int, str], list[float]]:
    """What is scored, label value -> name, and with which tolerances in mm; UsageFault for a tolerance of no class."""
    names = dict(zip(classes.values, classes.names, strict=True))
    if settings.scoring.background:
        names = {0: "background"} | names
    return names, tolerances_by_name([*names.values()], settings.scoring)


def tolerances_by_name(names: Sequence[str], scoring: Scoring) -> list[float]:
    """The tolerance of each structure in mm, however its name is written; UsageFault for a tolerance of none."""
    asked, known = scoring.tolerances_mm, {name: canonical_organ(name) for name in names}
    own = {name: asked[structure] for name, structure in known.items() if structure in asked}
    of_none = {structure: mm for structure, mm in asked.items() if structure not in known.values()}
    return tolerances_of(names, scoring.tolerance_mm, own | of_none)


def segmented(
    model: SegmentationModel, store, i: int, grid: Grid, settings: FinetuneSettings, device: torch.device
) -> np.ndarray:
    """Values of the label table on a grid, flipped and cleaned as the settings say."""
    how, case = settings.scoring.segmenting(), store.cases[i]
    asked = {"fill": case.normalisation.low, "flips": how.axes}
    found = model.segment_prepared(intensities(store, i), case.affine, grid, device, **asked)
    if how.largest_component:
        keep_largest(found, model.classes.values)
    return found


def canonical_spacing(case) -> tuple[float, float, float]:
    """The spacing of a case's source along R, A, S, in mm."""
    grid = case.source_grid
    return spacing_of(canonical_flips(grid.affine, grid.shape).affine(grid.affine))


def safe_name(name: str) -> str:
    """A case's name as one file name."""
    return name.replace("/", "_")


def show(
    model: SegmentationModel, store, name: str, why: str, settings: FinetuneSettings, device: torch.device
) -> CasePicture:
    """A case for the report, on the prepared grid of the store."""
    i = store.index_of(name)
    case, image = store.cases[i], intensities(store, i)
    found = segmented(model, store, i, Grid(case.shape, case.affine), settings, device)
    norm = case.normalisation
    grey = (image - norm.low) / (norm.high - norm.low)
    return CasePicture(name, grey, store.labels(i).astype(np.int64), found.astype(np.int64), case.spacing, why)
