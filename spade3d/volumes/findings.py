"""Planted findings: classes told by an organ and by a look together, so that neither place nor brightness suffices.

A dark lump in the liver is one finding and a dark lump in the spleen another, a bright one in the liver a third; a
striped one is as bright as its organ on average. Distractors have the same looks in organs where they are no finding.
Each is there or not by its own chance, so that no finding tells of another. What the patient had of its own in these
organs is healed: it would look like a finding that the labels deny. The labels of the organs know nothing of any of
it, and the truth (a mask of each scan) lies beside the data set, never in it.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from spade3d.faults import UsageFault
from spade3d.volumes.anatomy import Anatomy
from spade3d.volumes.body_box import field_of_view
from spade3d.volumes.geometry import apply_affine, spacing_of
from spade3d.volumes.nifti import write_volume
from spade3d.volumes.organs import BTCV

LOOKS = ("dark", "bright", "striped")
STRIPES_MM = (
    16.0  # from one bright stripe to the next; never finer than STRIPES_VOXELS, which a scanner would blur away
)
STRIPES_VOXELS = 3.0
GAP_MM = 6.0  # kept between two lumps, and one voxel at least
LEAST_SHARE = 0.25  # of a drawn lump that must fit within its organ; else it is absent
BOXES = ("subject", "finding", "x0", "y0", "z0", "x1", "y1", "z1")
PLANTED = (
    *("subject", "kind", "finding", "organ", "look", "contrast_hu", "radius_i_mm", "radius_j_mm", "radius_k_mm", "ml"),
    *BOXES[2:],
)
HEALED = "lesion"  # name of the parts that a patient has of its own


@dataclass(frozen=True)
class Kind:
    """A look in an organ (or in one of several: a kidney is a kidney). It is a finding, or a distractor."""

    name: str
    organs: tuple[str, ...]
    look: str
    is_finding: bool = True


KIDNEYS = ("right kidney", "left kidney")
FINDINGS = (
    Kind("dark_liver", ("liver",), "dark"),
    Kind("bright_liver", ("liver",), "bright"),
    Kind("striped_liver", ("liver",), "striped"),
    Kind("dark_spleen", ("spleen",), "dark"),
    Kind("bright_spleen", ("spleen",), "bright"),
)
DISTRACTORS = (
    Kind("striped_spleen", ("spleen",), "striped", is_finding=False),
    Kind("dark_kidney", KIDNEYS, "dark", is_finding=False),
    Kind("bright_kidney", KIDNEYS, "bright", is_finding=False),
    Kind("striped_kidney", KIDNEYS, "striped", is_finding=False),
)


@dataclass(frozen=True)
class Planting:
    """How findings are drawn: how often each is there, the half axes of its ellipsoid and how much it differs.

    UsageFault where a value means nothing.
    """

    share: float = 0.4  # of the studies that have a finding, each for itself
    distractors: float = 0.4
    radius_mm: tuple[float, float] = (14.0, 24.0)
    contrast_hu: tuple[float, float] = (80.0, 120.0)  # from its organ; of stripes, to either side
    kinds: tuple[Kind, ...] = field(default=(*FINDINGS, *DISTRACTORS))

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.distractors <= 1):
            raise UsageFault(
                f"findings in a share of {self.share:g} and distractors in {self.distractors:g} of the studies; "
                "a share is 0 to 1"
            )
        for what, (low, high) in (("radius", self.radius_mm), ("contrast", self.contrast_hu)):
            if not 0 < low <= high:
                raise UsageFault(
                    f"findings of {what} {low:g} to {high:g}; the lower must be above 0, the higher not below"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the findings, in the order of the labels."""
        return tuple(kind.name for kind in self.kinds if kind.is_finding)


@dataclass(frozen=True, eq=False)
class Lump:
    """One planted finding or distractor: where it is (i, j, k), in which organ, and how it was drawn."""

    kind: Kind
    organ: str
    mask: np.ndarray
    radii_mm: tuple[float, float, float]
    contrast_hu: float

    def box_mm(self, affine: np.ndarray) -> np.ndarray:
        """The least box (2, 3) of RAS mm that holds all of its voxels, edge to edge; low corner first."""
        return box_mm(self.mask, affine)


def box_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The least box (2, 3) in RAS mm around the voxels of a mask (i, j, k), each with its whole extent."""
    places = np.argwhere(mask)
    first = affine.copy()
    first[:3, 3] = apply_affine(affine, places.min(axis=0))
    return np.array(field_of_view((np.ptp(places, axis=0) + 1).tolist(), first))


def healed(anatomy: Anatomy) -> Anatomy:
    """The same patient without cysts and tumours of its own within organs."""
    return replace(anatomy, parts=tuple(part for part in anatomy.parts if part.name != HEALED))


def plant(planting: Planting, labels: np.ndarray, affine: np.ndarray, seed: int) -> tuple[tuple[Lump, ...], np.ndarray]:
    """What is planted in a patient, and the HU (i, j, k) that it adds. `labels`: of the organs, BTCV's values.

    Each kind has its own chance, from `seed` and its place in the table: it is drawn in the same way whatever else is
    there. A kind whose organ is absent or too full is absent.
    """
    value = {name: number for number, name in BTCV.items()}
    added, free = np.zeros(labels.shape, np.float32), np.ones(labels.shape, bool)
    lumps: list[Lump] = []
    for number, kind in enumerate(planting.kinds):
        rng = np.random.default_rng([seed, 2, number])
        if rng.random() >= (planting.share if kind.is_finding else planting.distractors):
            continue
        organs = [organ for organ in rng.permutation(kind.organs).tolist() if (labels == value[organ]).any()]
        if not organs:
            continue
        organ = organs[0]
        radii = rng.uniform(*planting.radius_mm, 3)
        contrast = float(rng.uniform(*planting.contrast_hu))
        mask = _lump(free & (labels == value[organ]), radii, affine, rng)
        if mask is None:
            continue
        added[mask] = _look(kind.look, np.argwhere(mask), contrast, affine, rng)
        distance = ndimage.distance_transform_edt(~mask, sampling=spacing_of(affine))
        free &= distance > max(GAP_MM, 1.5 * max(spacing_of(affine)))
        lumps.append(Lump(kind, organ, mask, (float(radii[0]), float(radii[1]), float(radii[2])), contrast))
    return tuple(lumps), added


def _lump(host: np.ndarray, radii: np.ndarray, affine: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """An ellipsoid within its host, about a voxel that lies deep enough; None where too little of it would fit."""
    if not host.any():
        return None
    spacing = spacing_of(affine)
    depth = ndimage.distance_transform_edt(np.pad(host, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    deep = np.argwhere(depth >= min(radii.min(), 0.7 * depth.max()))
    centre = deep[rng.integers(len(deep))]
    offsets = (np.indices(host.shape, sparse=True)[axis] - centre[axis] for axis in range(3))
    whole = sum((o * mm / r) ** 2 for o, mm, r in zip(offsets, spacing, radii, strict=True)) <= 1
    pieces, _ = ndimage.label(host & whole)
    lump = pieces == pieces[tuple(centre)]
    drawn = 4 / 3 * np.pi * radii.prod() / np.prod(spacing)
    return lump if lump.sum() >= LEAST_SHARE * drawn else None


def _look(look: str, voxels: np.ndarray, contrast: float, affine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HU that a lump adds to its voxels (n, 3); of stripes, nothing on average."""
    if look != "striped":
        return np.full(len(voxels), contrast if look == "bright" else -contrast, np.float32)
    along = rng.normal(size=3)
    along /= np.linalg.norm(along)
    period = max(STRIPES_MM, STRIPES_VOXELS * max(spacing_of(affine)))
    wave = np.sin(2 * np.pi * (apply_affine(affine, voxels) @ along) / period + rng.uniform(0, 2 * np.pi))
    stripes = np.where(wave > 0, contrast, -contrast)
    return (stripes - stripes.mean()).astype(np.float32)


# --- what is written -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Study:
    """One scan of a data set with findings: whose it is, its grid, and what was planted."""

    subject: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    lumps: tuple[Lump, ...]


def truth_folder(out: Path) -> Path:
    """Where masks and distractors are told: beside the data set, because a reader of layouts takes masks within it for
    labels."""
    return out.with_name(f"{out.name}.truth")


def write_mask(out: Path, study: Study, names: Sequence[str]) -> Path:
    """Write the findings of a scan as OUT.truth/masks/SUBJECT.nii.gz: n where the n-th finding is, 0 elsewhere."""
    mask = np.zeros(study.shape, np.uint16)
    for lump in study.lumps:
        if lump.kind.is_finding:
            mask[lump.mask] = 1 + list(names).index(lump.kind.name)
    path = truth_folder(out) / "masks" / f"{study.subject}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, mask, study.affine)
    return path


def write_tables(out: Path, studies: Sequence[Study], names: Sequence[str]) -> None:
    """Write OUT/findings.csv (1 present, 0 absent) and OUT/boxes.csv (RAS mm) of the findings, and
    OUT.truth/planted.csv of all that was planted, distractors too, with organ, size and contrast."""
    found: list[list[object]] = []
    boxes: list[list[object]] = []
    planted: list[list[object]] = []
    for study in studies:
        present = {lump.kind.name for lump in study.lumps}
        found.append([study.subject, *(int(name in present) for name in names)])
        for lump in study.lumps:
            corners = [f"{mm:.3f}" for mm in lump.box_mm(study.affine).ravel()]
            if lump.kind.is_finding:
                boxes.append([study.subject, lump.kind.name, *corners])
            ml = lump.mask.sum() * abs(np.linalg.det(study.affine[:3, :3])) / 1000
            about = [lump.organ, lump.kind.look, f"{lump.contrast_hu:.1f}", *(f"{r:.2f}" for r in lump.radii_mm)]
            planted.append([study.subject, lump.kind.name, int(lump.kind.is_finding), *about, f"{ml:.3f}", *corners])
    _write(out / "findings.csv", ("subject", *names), found)
    _write(out / "boxes.csv", BOXES, boxes)
    truth_folder(out).mkdir(parents=True, exist_ok=True)
    _write(truth_folder(out) / "planted.csv", PLANTED, planted)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
