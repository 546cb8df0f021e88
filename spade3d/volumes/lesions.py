"""Lesions in phantoms, and readers who look for them: small labelled lumps in organs, and simulated fixations.

A reader's fixations gather around most lesions, and as many rest elsewhere in the body; a few are too short to count
and a few miss the body, as an eye tracker's are. The gaze is written as CT-ScanGaze writes it. It is made up: it shows
that the machinery works, not how radiologists look.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from spade3d.volumes.anatomy import Anatomy
from spade3d.volumes.geometry import spacing_of
from spade3d.volumes.organs import BTCV, MM_WHS
from spade3d.volumes.volume import scan_stem

NAME = "lesion"
HOSTS = {
    "abdomen-ct": ("liver", "spleen", "right kidney", "left kidney"),
    "heart-ct": ("left ventricular myocardium",),
    "heart-mr": ("left ventricular myocardium",),
}
RADIUS_MM = {"abdomen-ct": (5.0, 10.0), "heart-ct": (4.0, 7.0), "heart-mr": (4.0, 7.0)}
MOST = 4  # lesions of a patient; one at least
READERS = 2
FOUND = 0.9  # chance that a reader looks at a lesion


@dataclass(frozen=True, eq=False)
class Reading:
    """One reader's fixations: voxels (n, 3) counted from 0, seconds (n,)."""

    reader: int
    voxels: np.ndarray
    seconds: np.ndarray


def label_names(kind: str) -> dict[int, str]:
    """The table of a data set with lesions: its own structures, and the lesion one above the highest."""
    table = dict(BTCV if kind == "abdomen-ct" else MM_WHS)
    return table | {max(table) + 1: NAME}


def with_lesions(
    anatomy: Anatomy,
    tissues: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    rng: np.random.Generator,
    radius_mm: tuple[float, float] | None = None,
) -> tuple[Anatomy, np.ndarray, np.ndarray]:
    """The same patient with one to four lesions: its looks, tissues and labels (i, j, k), drawn from `rng` alone.

    Each is an ellipsoid about a voxel of its host, kept within it, 30 to 60 HU darker or brighter (MR: 30 to 50 %), of
    radii between the two of `radius_mm` (those of RADIUS_MM, left out).
    """
    table = label_names(anatomy.kind)
    value, host_values = max(table), [v for v, name in table.items() if name in HOSTS[anatomy.kind]]
    looks, labels, lumps = dict(anatomy.look), labels.copy(), []
    names = sorted(looks)
    for number in range(int(rng.integers(1, MOST + 1))):
        present = [v for v in host_values if np.count_nonzero(labels == v)]
        if not present:
            break
        host = labels == present[rng.integers(len(present))]
        core = np.argwhere(ndimage.binary_erosion(host))
        core = core if len(core) else np.argwhere(host)
        centre = core[rng.integers(len(core))]
        radii = rng.uniform(*(radius_mm or RADIUS_MM[anatomy.kind]), 3)
        offset = (np.indices(labels.shape, sparse=True)[axis] - centre[axis] for axis in range(3))
        distance = sum((o * mm / r) ** 2 for o, mm, r in zip(offset, spacing_of(affine), radii, strict=True))
        lump = host & (distance <= 1)
        look = looks[names[tissues[tuple(centre)]]]
        sign, step = rng.choice([-1.0, -1.0, 1.0]), rng.uniform(0.0, 1.0)
        mr = anatomy.kind == "heart-mr"
        looks[f"{NAME} {number}"] = float(
            look * (1 + sign * (0.3 + 0.2 * step)) if mr else look + sign * (30 + 30 * step)
        )
        labels[lump] = value
        lumps.append(lump)
    order = sorted(looks)
    tissues = np.array([order.index(name) for name in names], np.uint8)[tissues]  # more names, other numbers
    for number, lump in enumerate(lumps):
        tissues[lump] = order.index(f"{NAME} {number}")
    return replace(anatomy, look=looks), tissues, labels


def read_by(
    labels: np.ndarray, body: np.ndarray, value: int, affine: np.ndarray, rng: np.random.Generator
) -> list[Reading]:
    """Where READERS readers look in a scan: `value` is the lesions' label, `body` (i, j, k) is True within the body."""
    components, count = ndimage.label(labels == value)
    lesions = [np.argwhere(components == n).mean(axis=0) for n in range(1, count + 1)]
    somewhere, air = np.argwhere(body), np.argwhere(~body)
    spacing = np.array(spacing_of(affine))
    readings: list[Reading] = []
    for reader in range(1, READERS + 1):
        places, seconds = [], []
        for lesion in lesions:
            if rng.random() < FOUND:
                n = int(rng.integers(4, 9))
                places.append(lesion + rng.normal(0, 4.0, (n, 3)) / spacing)
                seconds.append(rng.lognormal(np.log(0.40), 0.4, n))
        elsewhere = int(rng.integers(6, 13))
        places.append(somewhere[rng.integers(len(somewhere), size=elsewhere)].astype(float))
        seconds.append(rng.lognormal(np.log(0.20), 0.4, elsewhere))
        places.append(somewhere[rng.integers(len(somewhere), size=2)].astype(float))
        seconds.append(rng.uniform(0.01, 0.04, 2))
        if len(air):
            places.append(air[rng.integers(len(air), size=2)].astype(float))
            seconds.append(rng.uniform(0.1, 0.3, 2))
        voxels = np.clip(np.concatenate(places), 0, np.array(labels.shape) - 1)
        voxels[:, 2] = np.rint(voxels[:, 2])  # a slice is shown or not
        order = rng.permutation(len(voxels))
        readings.append(Reading(reader, voxels[order], np.concatenate(seconds)[order]))
    return readings


def write_gaze(folder: Path, image: Path, readings: Sequence[Reading]) -> Path:
    """Write the readings of a scan as CT-ScanGaze does: one record a reader, voxels and slices counted from 1."""
    records = [
        {
            "name": image.name,
            "subject": reading.reader,
            **{axis: (reading.voxels[:, n] + 1).round(3).tolist() for n, axis in enumerate("XYZ")},
            "T": reading.seconds.round(3).tolist(),
            "length": len(reading.seconds),
            "split": "train",
        }
        for reading in readings
    ]
    folder.mkdir(exist_ok=True)
    path = folder / f"{scan_stem(image)}.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return path


def write_description(root: Path, kind: str, cases: Mapping[Path, Path | None]) -> None:
    """dataset.json: the label table with the lesion in it, and the scans, image -> labels; the layouts that are known
    by their file names alone have a table without."""
    table = {"0": "background"} | {str(value): name for value, name in label_names(kind).items()}
    inside = {image.relative_to(root): labels and labels.relative_to(root) for image, labels in cases.items()}
    content = {
        "name": f"{kind} phantoms with lesions",
        "modality": {"0": "MR" if kind == "heart-mr" else "CT"},
        "labels": table,
        "training": [{"image": str(image), "label": str(labels)} for image, labels in inside.items() if labels],
        "test": [str(image) for image, labels in inside.items() if not labels],
    }
    (root / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
