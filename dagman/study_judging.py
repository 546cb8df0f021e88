"""What a model of studies says of those that judge: probabilities, maps on the scan's grid, and pictures of both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dagman.downstream.studies import Findings
from dagman.downstream.study_model import StudyFound, StudyModel
from dagman.downstream.token_cache import TokenCache
from dagman.evaluation.boxes import inside
from dagman.evaluation.case_pictures import CasePicture
from dagman.evaluation.classification import score_findings
from dagman.evaluation.localisation import Annotation, HeatMap, annotations_of_labels, read_boxes
from spade3d import console
from spade3d.faults import DataFault
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import Grid, write_volume

SHOWN = 0.5  # probability from which a finding's map is written though the study does not have it

Row = dict[str, str | float]


@dataclass(frozen=True, eq=False)
class Judge:
    """Asks a model about some cases; `tokens` holds their cells where an encoder that stays has made them."""

    model: StudyModel
    store: VolumeStore
    findings: Findings
    cases: tuple[int, ...]
    device: torch.device
    tokens: TokenCache | None

    def found(self, case: int) -> StudyFound:
        """What the model says of a case."""
        if self.tokens is None:
            return self.model.study(self.store, case, self.device)
        there = self.tokens.tokens(case).astype(np.float32)
        return self.model.of_tokens(there, self.store.cases[case], self.tokens.cells(case), self.device)

    def rows(self, case: int, found: StudyFound) -> list[Row]:
        """The rows of predictions.csv of a case, a finding each."""
        study = self.findings.studies[case]
        told = zip(self.findings.names, study.labels, found.probabilities.tolist(), strict=True)
        who: Row = {"case": study.name, "subject": study.subject}
        return [who | {"finding": name, "label": label, "probability": share} for name, label, share in told]

    def predictions(self, maps: Path | None = None) -> list[Row]:
        """The rows of all cases; into the folder `maps`, where one is given, on the scan's own grid the map of each
        finding that a study has or is thought to have (a probability of 0.5)."""
        if maps is not None:
            maps.mkdir(exist_ok=True)
        rows = []
        with console.progress_of("judging") as progress:
            for done, case in enumerate(self.cases):
                stored = self.store.cases[case]
                progress(done, len(self.cases), stored.name)
                found = self.found(case)
                here = self.rows(case, found)
                rows += here
                for n, row in enumerate(here):
                    if maps is not None and (row["label"] == 1 or row["probability"] >= SHOWN):
                        file, grid = map_name(stored.name, row["finding"]), stored.source_grid
                        write_volume(maps / file, found.on_grid(n, grid), grid.affine)
            progress(len(self.cases), len(self.cases), self.store.cases[self.cases[-1]].name if self.cases else "")
        return rows

    def heat_maps(self, annotations: Sequence[Annotation]) -> Iterator[HeatMap]:
        """The maps of annotated findings, on the grid of the store."""
        wanted = {(one.subject, one.finding) for one in annotations}
        for case in self.cases:
            stored = self.store.cases[case]
            names = [(n, name) for n, name in enumerate(self.findings.names) if (stored.subject, name) in wanted]
            found = self.found(case) if names else None
            for n, name in names:
                values = found.on_grid(n, Grid(stored.shape, stored.affine))
                yield HeatMap(stored.subject, name, values, stored.affine)

    def pictures(self, rows: Sequence[Mapping], annotations: Sequence[Annotation]) -> list[CasePicture]:
        """Worst, median and best by the IoU of the box: annotation as truth, what is above the threshold as prediction.
        `rows` as the judge of maps gives them."""
        ranked = sorted((row for row in rows if not math.isnan(row["iou"])), key=lambda row: row["iou"])
        chosen = {0: "worst", len(ranked) // 2: "median", len(ranked) - 1: "best"} if ranked else {}
        return [self._picture(ranked[n], why, annotations) for n, why in chosen.items()]

    def _picture(self, row: Mapping, why: str, annotations: Sequence[Annotation]) -> CasePicture:
        whose = [one for one in annotations if (one.subject, one.finding) == (row["subject"], row["finding"])]
        (heat,) = self.heat_maps(whose)
        case = next(i for i in self.cases if self.store.cases[i].subject == row["subject"])
        stored, norm = self.store.cases[case], self.store.cases[case].normalisation
        grey = (norm.intensity(self.store.image(case)) - norm.low) / (norm.high - norm.low)
        truth = np.zeros(stored.shape, dtype=bool)
        for one in whose:
            truth |= inside(one.box_mm, stored.shape, stored.affine) if one.mask is None else one.mask
        highest = heat.values.max()
        above = heat.values >= row["threshold"] * highest if highest > 0 else np.zeros_like(truth)
        caption = f"{row['finding']}, {why}, IoU {row['iou']:.2f}"
        return CasePicture(stored.name, grey, truth.astype(int), above.astype(int), stored.spacing, caption)


def map_name(case: str, finding: str) -> str:
    """The file of the map of a finding."""
    return f"{case}_{finding}.nii.gz".replace("/", "_")


def map_names(cases: Sequence[str], findings: Sequence[str], otherwise: str) -> list[str]:
    """The files of the maps of all findings of some cases; DataFault where two would be one (finding c of a_b, and b_c
    of a), with what to do."""
    names = Counter(map_name(case, finding) for case in cases for finding in findings)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise DataFault(f"two maps would both be called {twice}; {otherwise}")
    return list(names)


def look(judge: Judge) -> dict[str, float]:
    """While training: the mean AUROC of the validation studies, NaN where none is defined. It chooses nothing that is
    reported."""
    rows = [row for case in judge.cases for row in judge.rows(case, judge.found(case))]
    return {"macro_auroc": score_findings(rows, resamples=1)[0].value}


def annotations_of(
    store: VolumeStore, findings: Findings, cases: Sequence[int], boxes: Path | None
) -> list[Annotation]:
    """Where the findings of some cases are: the boxes of a CSV; without one the labels of the store whose names are
    findings, each connected part by itself. DataFault for boxes of something else, and where an annotated subject has
    several scans: boxes in mm are of one."""
    stored = [store.cases[i] for i in cases]
    if boxes is not None:
        subjects = {case.subject for case in stored}
        given = read_boxes(boxes)
        if strangers := sorted({one.finding for one in given} - set(findings.names)):
            raise DataFault(
                f"{boxes}: boxes of {', '.join(strangers[:6])}, which is no finding; there are "
                f"{', '.join(findings.names)}: name them alike, or leave these boxes out"
            )
        found = [one for one in given if one.subject in subjects]
        if not found:
            raise DataFault(
                f"{boxes}: no box is of a study that judges and of a finding; name subjects as the CSV does"
            )
    else:
        values = {value: name for value, name in store.label_names.items() if name in findings.names}
        found = [
            one
            for i, case in zip(cases, stored, strict=True)
            if case.has_labels and values
            for one in annotations_of_labels(case.subject, store.labels(i).astype(np.int64), case.affine, values)
        ]
    scans = Counter(case.subject for case in stored)
    if several := sorted({one.subject for one in found if scans[one.subject] > 1}):
        raise DataFault(
            f"{', '.join(several[:6])}: annotated, and {scans[several[0]]} scans of one subject judge; an annotation "
            "in mm is of one scan: leave the other scans out"
        )
    return found


def annotation_notes(annotations: Sequence[Annotation], findings: Findings, cases: Sequence[int]) -> list[str]:
    """What the user should know of the annotations of the cases that judge."""
    if not annotations:
        return ["no --boxes, and no label of these studies is named as a finding: maps are written, none is judged"]
    studies = [findings.studies[i] for i in cases]
    absent = {
        (study.subject, name)
        for study in studies
        for name, label in zip(findings.names, study.labels, strict=True)
        if label == 0
    }
    wrong = [f"{one.subject} {one.finding}" for one in annotations if (one.subject, one.finding) in absent]
    some = ", ".join(dict.fromkeys(wrong[:6]))
    return [f"{len(wrong)} annotations are of findings that the CSV calls absent: {some}"] if wrong else []
