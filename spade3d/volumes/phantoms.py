"""Scans with every answer known: abdominal CT, heart CT and heart MR of drawn patients; and the ramp.

`python -m spade3d.volumes.phantoms --kind abdomen-ct --patients 12 --out DIR` writes a data set as BTCV or MM-WHS lay
theirs out, so that the same readers read it; with `--lesions` the organs have small lesions, labelled, that simulated
readers look at, and a dataset.json names them; with `--findings` (`findings.py`) studies have findings, told by tables
with boxes; with `--layout` names, numbers and label values are a published data set's to the letter. In `ramp` each
voxel holds its own place in mm.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from spade3d.faults import DataFault, Fault, UsageFault
from spade3d.volumes.abdomen import abdomen, abdomen_hu
from spade3d.volumes.anatomy import Anatomy, Wave
from spade3d.volumes.findings import (
    Lump,
    Planting,
    Study,
    healed,
    plant,
    truth_folder,
    write_mask,
    write_tables,
)
from spade3d.volumes.heart import heart, heart_hu, heart_mr
from spade3d.volumes.lesions import Reading, label_names, read_by, with_lesions, write_description, write_gaze
from spade3d.volumes.naming import patient_of
from spade3d.volumes.phantom_layouts import LAYOUTS, PhantomLayout
from spade3d.volumes.volume import scan_stem, write_volume

KINDS = ("abdomen-ct", "heart-ct", "heart-mr")
SHAPE = (96, 96, 64)
SPACING = {"abdomen-ct": (4.0, 4.0, 4.0), "heart-ct": (3.0, 3.0, 3.0), "heart-mr": (3.0, 3.0, 3.0)}


@dataclass(frozen=True, eq=False)
class Phantom:
    """One drawn scan: voxels int16 (i, j, k) in HU or MR brightness, labels uint16, affine (4, 4) voxel -> RAS mm."""

    voxels: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    readings: tuple[Reading, ...] = ()  # of a scan with lesions
    lumps: tuple[Lump, ...] = ()  # of a scan with planted findings


def ramp(shape: tuple[int, int, int], affine: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Each voxel's own place in mm (i, j, k, 3): right or wrong after any cut, flip or resampling, never nearly.

    `ramp(...)[..., axis]` is the same as a scalar volume.
    """
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return (index @ affine[:3, :3].T + affine[:3, 3]).astype(dtype)


def phantom(
    kind: str,
    seed: int,
    *,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Sequence[float] | None = None,
    lesions: bool = False,
    radius_mm: tuple[float, float] | None = None,
    findings: Planting | None = None,
) -> Phantom:
    """Draw one patient and scan it. The same seed gives the same voxels.

    `kind`: one of KINDS; `spacing`: nominal, in mm; each scan has its own, some percent off, and its own field of view.
    `lesions`: the same patient and the same noise with lesions in some organs (`lesions.py`), and readers' fixations.
    `radius_mm`: of lesions, from and to; left out, those of `lesions.py`.
    `findings`: the same patient and noise, healed of lesions of its own, with what is drawn of `findings.py`.
    """
    rng = np.random.default_rng(seed)
    anatomy = draw_anatomy(kind, rng)
    own_spacing = np.asarray(spacing or SPACING[kind], float) * np.repeat(rng.uniform(0.94, 1.06, 2), (2, 1))
    centre = rng.normal(0, (6, 6, 18 if kind == "abdomen-ct" else 8))
    affine = np.diag([*own_spacing, 1.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) - 1) / 2
    if findings:
        anatomy = healed(anatomy)
    tissues, labels = paint(anatomy, shape, affine)
    if findings:
        lumps, added = plant(findings, labels, affine, seed)
        return Phantom(scan(anatomy, tissues, rng, added), labels, affine, lumps=lumps)
    if not lesions:
        return Phantom(scan(anatomy, tissues, rng), labels, affine)
    of_lesions = np.random.default_rng([seed, 1])  # its own chance, so that the patient stays who it is
    body = tissues != sorted(anatomy.look).index("air")
    anatomy, tissues, labels = with_lesions(anatomy, tissues, labels, affine, of_lesions, radius_mm)
    readings = read_by(labels, body, max(label_names(kind)), affine, of_lesions)
    return Phantom(scan(anatomy, tissues, rng), labels, affine, tuple(readings))


def draw_anatomy(kind: str, rng: np.random.Generator) -> Anatomy:
    """Draw one patient. `kind`: one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no phantom; there are {', '.join(KINDS)}")
    of_heart = kind != "abdomen-ct"
    parts = (heart if of_heart else abdomen)(rng)
    look = {"abdomen-ct": abdomen_hu, "heart-ct": heart_hu, "heart-mr": heart_mr}[kind](rng)
    size = np.exp(rng.normal(0, 0.06) + rng.normal(0, 0.05, 3))
    turn = Rotation.from_euler("xyz", rng.normal(0, 3, 3), degrees=True).as_matrix()
    waves = tuple(
        Wave(
            rng.uniform(-1, 1, 3) * (3.0 if of_heart else 5.0),
            (direction := rng.normal(size=3)) / np.linalg.norm(direction) * 2 * np.pi / rng.uniform(220, 450),
            rng.uniform(0, 2 * np.pi, 3),
        )
        for _ in range(4)
    )
    mr = kind == "heart-mr"
    texture, noise = (0.06, rng.uniform(0.04, 0.1)) if mr else (6.0, rng.uniform(8, 18))
    return Anatomy(kind, parts, look, turn * size, waves, texture, float(noise))


def paint(anatomy: Anatomy, shape: tuple[int, int, int], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tissue (index into the sorted names of `anatomy.look`) and label of each voxel."""
    names = sorted(anatomy.look)
    world = np.moveaxis(ramp(shape, affine, np.float32), -1, 0)
    to_body = np.linalg.inv(anatomy.to_world)
    points = np.tensordot(to_body.astype(np.float32), world, axes=1)
    for wave in anatomy.waves:
        angle = np.tensordot(wave.vector.astype(np.float32), world, axes=1)
        points += np.stack([a * np.sin(angle + phase) for a, phase in zip(wave.amplitude, wave.phase, strict=True)])
    stray = np.sum([np.abs(wave.amplitude) for wave in anatomy.waves], axis=0)
    to_voxel = np.linalg.inv(affine)
    tissues = np.full(shape, names.index("air"), np.uint8)
    labels = np.zeros(shape, np.uint16)
    cavity = np.zeros(shape, bool)
    for part in anatomy.parts:
        for form in part.shapes:
            low, high = form.bounds()
            # Only the voxels of the box that may hold it are asked.
            corners = np.stack(np.meshgrid(*zip(low - stray, high + stray, strict=True)), -1).reshape(-1, 3)
            corners = corners @ anatomy.to_world.T @ to_voxel[:3, :3].T + to_voxel[:3, 3]
            first = np.clip(np.floor(corners.min(0)), 0, shape).astype(int)
            last = np.clip(np.ceil(corners.max(0)) + 1, 0, shape).astype(int)
            box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
            if any(side.start >= side.stop for side in box):
                continue
            held = form.holds(points[(slice(None), *box)])
            if part.name == "cavity":
                cavity[box] |= held
            if part.inside:
                held &= cavity[box]
            tissues[box][held] = names.index(part.tissue)
            if part.label is not None:
                labels[box][held] = part.label
    return tissues, labels


def scan(
    anatomy: Anatomy, tissues: np.ndarray, rng: np.random.Generator, added: np.ndarray | None = None
) -> np.ndarray:
    """What the scanner makes of the tissues: partial volume, texture, noise; for MR also a bias field and any scale.

    `added` (i, j, k): what some voxels have more than their tissue.
    """
    look = np.array([anatomy.look[name] for name in sorted(anatomy.look)], np.float32)
    image = gaussian_filter(look[tissues] if added is None else look[tissues] + added, 0.5)
    solid = tissues != sorted(anatomy.look).index("air")
    texture = gaussian_filter(rng.standard_normal(tissues.shape, np.float32), 1.5)
    image += solid * texture * (anatomy.texture / texture.std())
    noise = [gaussian_filter(rng.standard_normal(tissues.shape, np.float32), 0.6) for _ in range(2)]
    noise = [one * (anatomy.noise / one.std()) for one in noise]
    if anatomy.kind != "heart-mr":
        return np.clip(np.round(image + noise[0]), -1024, 3071).astype(np.int16)
    bias = np.exp(0.25 * _gentle(tissues.shape, rng))
    brightness = np.hypot(image * bias + noise[0], noise[1])  # Rician, as magnitude images are
    return np.clip(np.round(brightness * rng.uniform(40, 900)), 0, 32767).astype(np.int16)


def _gentle(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A field (i, j, k) of about unit size that changes slowly over the whole volume: a random quadratic."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij", sparse=True)
    linear, square = rng.normal(0, 0.6, (2, 3)).astype(np.float32)
    return sum((a * x + b * (x**2 - 1 / 3) for a, b, x in zip(linear, square, axes, strict=True)), np.float32(0))


def write_dataset(
    kind: str,
    out: Path,
    *,
    patients: int,
    unlabelled: int = 0,
    seed: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Sequence[float] | None = None,
    lesions: bool = False,
    radius_mm: tuple[float, float] | None = None,
    findings: Planting | None = None,
    layout: str | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write `patients` labelled scans and `unlabelled` more as BTCV or MM-WHS are laid out; the images' paths.

    `layout`: one of phantom_layouts.LAYOUTS, to the letter: its numbers, its label values, its dataset.json.
    Patient n is the same whatever the number of patients; `say` is told of each. With `lesions` there are also
    `gaze/<image>.json` of every scan, and a dataset.json; with `findings` a findings.csv and a boxes.csv of every scan,
    and the truth in OUT.truth.
    DataFault where `out` already holds something; UsageFault for findings in another kind than abdomen-ct, and for a
    layout that does not hold what is asked for.
    """
    laid_out = None if layout is None else LAYOUTS[layout]
    if laid_out:
        laid_out.check(kind, patients, unlabelled)
    if findings and kind != "abdomen-ct":
        raise UsageFault(f"findings are planted in organs of the abdomen, not in {kind}; take --kind abdomen-ct")
    if findings and truth_folder(out).exists():
        raise DataFault(f"{truth_folder(out)}: is there already; the truth of findings is written into a new folder")
    if out.exists() and any(out.iterdir()):
        raise DataFault(f"{out}: is not empty; phantoms are written into a new or an empty folder")
    cases: dict[Path, Path | None] = {}
    studies: list[Study] = []
    for number in range(patients + unlabelled):
        # A seed sequence, so that patients of neighbouring seeds have nothing in common.
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        one = phantom(kind, own, shape=shape, spacing=spacing, lesions=lesions, radius_mm=radius_mm, findings=findings)
        image, labels = _places(kind, out, number, patients, laid_out)
        write_volume(image, one.voxels, one.affine)
        if labels is not None:
            write_volume(labels, laid_out.values(kind, one.labels) if laid_out else one.labels, one.affine)
        if lesions:
            write_gaze(out / "gaze", image, one.readings)
        if findings:
            studies.append(Study(patient_of(scan_stem(image)), shape, one.affine, one.lumps))
            write_mask(out, studies[-1], findings.names)
        cases[image] = labels
        if say:
            seen = np.count_nonzero(np.unique(one.labels))
            about = f"{seen} structures" if labels is not None else "no labels"
            say(f"{number + 1}/{patients + unlabelled}  {image.relative_to(out)}  {about}")
    if lesions:
        write_description(out, kind, cases)
    if laid_out:
        laid_out.write_description(out, kind, cases)
    if findings:
        write_tables(out, studies, findings.names)
    return list(cases)


def _places(
    kind: str, out: Path, number: int, patients: int, laid_out: PhantomLayout | None
) -> tuple[Path, Path | None]:
    """Where patient `number` (from 0) goes: image, and labels for the first `patients`; created as needed."""
    labelled = number < patients
    if laid_out:
        image, labels = (out / path for path in laid_out.place(kind, number - (0 if labelled else patients), labelled))
    elif kind == "abdomen-ct":
        folder = out / "RawData" / ("Training" if labelled else "Testing")
        case = number + 1 if labelled else max(61, patients + 1) + number - patients  # 0061 on are BTCV's test cases
        image, labels = folder / "img" / f"img{case:04d}.nii.gz", folder / "label" / f"label{case:04d}.nii.gz"
    else:
        stem = f"{kind[-2:]}_{'train' if labelled else 'test'}"
        name = f"{stem}_{1001 + number if labelled else 2001 + number - patients}"
        image, labels = (out / stem / f"{name}_{role}.nii.gz" for role in ("image", "label"))
    for path in (image, labels) if labelled else (image,):
        path.parent.mkdir(parents=True, exist_ok=True)
    return image, labels if labelled else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m spade3d.volumes.phantoms", description="Draw a data set.")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--patients", type=int, required=True, help="labelled scans")
    parser.add_argument("--unlabelled", type=int, default=0, help="more scans without labels, in the test folder")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=LAYOUTS, help="numbers, names and label values of that data set, exactly")
    parser.add_argument("--lesions", action="store_true", help="lesions in organs, and gaze of readers in OUT/gaze")
    parser.add_argument("--findings", action="store_true", help="findings: OUT/findings.csv, boxes.csv, and OUT.truth")
    parser.add_argument("--share", type=float, default=Planting.share, help="of the studies that have a finding")
    parser.add_argument("--radius", type=float, nargs=2, help="mm; of findings or lesions, from, to")
    parser.add_argument("--contrast", type=float, nargs=2, default=Planting.contrast_hu, help="HU; from, to")
    parser.add_argument("--size", type=int, nargs=3, default=SHAPE, metavar=("I", "J", "K"), help="voxels")
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm; of each scan nearly this")
    given = parser.parse_args(arguments)
    if min(given.patients, given.unlabelled, given.seed) < 0 or given.patients + given.unlabelled == 0:
        parser.error("--patients, --unlabelled and --seed cannot be negative, and one scan is needed at least")
    if min(given.size) < 8 or (given.spacing and min(given.spacing) <= 0):
        parser.error("--size must be 8 voxels at least along each axis, --spacing more than 0 mm")
    if given.findings and given.lesions:
        parser.error("--lesions and --findings at once: a lesion would be a finding that no label knows; give one")
    if given.lesions and given.layout:
        parser.error("--lesions and --layout at once: no published data set has these lesions in its table; give one")
    if given.radius and not (given.findings or given.lesions):
        parser.error("--radius without --lesions or --findings: nothing has it; give one")
    if given.radius and not 0 < given.radius[0] <= given.radius[1]:
        parser.error("--radius must be above 0, the higher not below the lower")
    radius = tuple(given.radius) if given.radius else None
    try:
        drawn = Planting(given.share, given.share, radius or Planting.radius_mm, tuple(given.contrast))
        planting = drawn if given.findings else None
        write_dataset(
            given.kind,
            given.out,
            patients=given.patients,
            unlabelled=given.unlabelled,
            seed=given.seed,
            shape=tuple(given.size),
            spacing=given.spacing,
            lesions=given.lesions,
            radius_mm=radius,
            findings=planting,
            layout=given.layout,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except Fault as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
