"""Heat maps of findings, and where the findings truly are: boxes from a CSV, or masks made into both."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import ndimage

from dagman.evaluation.boxes import BoxMm, around
from spade3d.faults import DataFault

BOXES = ("subject", "finding", "x0", "y0", "z0", "x1", "y1", "z1")


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Where one finding is seen in one study: evidence, 0 and more, and the affine from voxel to RAS mm."""

    subject: str
    finding: str
    values: Shaped[np.ndarray, "i j k"]
    affine: Float[np.ndarray, "4 4"]


@dataclass(frozen=True, eq=False)
class Annotation:
    """Where one finding of one study truly is: a box, and the voxels of the map's grid where they are known."""

    subject: str
    finding: str
    box_mm: BoxMm
    mask: Bool[np.ndarray, "i j k"] | None = None


def read_boxes(path: Path) -> list[Annotation]:
    """The boxes of a CSV with the columns BOXES, in RAS mm. DataFault, with the line, for what cannot be read."""
    needed = f"the columns {','.join(BOXES)}, RAS mm, are needed"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFault(f"{path}: not readable as CSV ({error}); {needed}") from error
    if not lines or tuple(lines[0]) != BOXES:
        raise DataFault(f"{path}: the columns are {','.join(lines[0]) if lines else 'nothing'}; {needed}")
    annotations = []
    for number, line in ((n, line) for n, line in enumerate(lines[1:], start=2) if any(line)):
        try:
            subject, finding, *corners = line
            box = np.array([float(corner) for corner in corners]).reshape(2, 3)
        except ValueError as error:
            raise DataFault(f"{path}: line {number} ({error}); {needed}") from error
        if not np.isfinite(box).all() or (box[1] <= box[0]).any():
            raise DataFault(f"{path}: line {number}: the box goes from {box[0]} to {box[1]} mm; each side must grow")
        annotations.append(Annotation(subject, finding, box))
    return annotations


def annotations_of_labels(
    subject: str, labels: Int[np.ndarray, "i j k"], affine: Float[np.ndarray, "4 4"], findings: Mapping[int, str]
) -> list[Annotation]:
    """An annotation of each component (26 neighbours) of each finding's value (value -> finding) in a label map that
    lies on the grid of the heat maps."""
    found = []
    for value, finding in findings.items():
        components, count = ndimage.label(labels == value, np.ones((3, 3, 3)))
        for n in range(1, count + 1):
            mask = components == n
            found.append(Annotation(subject, finding, around(mask, affine), mask))
    return found
