"""Where do organs of two patients lie, once each scan is in the body frame? Distances in mm between their centroids.

    python benchmarks/science/body_frames.py DATA --out WORK

DATA is the folder of real scans (hippocampus_mr, ct_torso_totalseg, mr_torso_totalseg, pretrain, sts_sarcoma); the
phantoms are drawn into WORK, and what is there is not drawn again. Every pair of scans of two patients that share an
organ counts once for each organ that lies wholly within both fields of view. `scanner`: the scanners' own coordinates;
`centred`: the fields of view put upon each other. Phantoms come as drawn, in scanner coordinates that agree to some
centimetres, and `cut`: 50 to 90 % of the length and 70 to 100 % of the width, and the table anywhere.

A frame that cannot place a scan leaves its pairs out, perhaps the hard ones. `common` are the pairs that every frame
places: there, all are judged by the same scans.

The settings of the frames were chosen on other phantoms (seeds 1000 to 1019) and on the first 40 hippocampi, which are
placed here but not judged. There is only one pair of torsos, so those settings have seen it.
"""

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from spade3d.provenance import without_nan, write_json
from spade3d.volumes.frame_methods import FRAMES, place_scans
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.organs import BTCV, MM_WHS, canonical_organ
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import read_volume, write_volume

RESULTS = Path(__file__).resolve().parents[1] / "results"
PATIENTS, FIRST_SEED = 20, 5000
LOOKED_AT = {"hippocampus": 40}  # of each set, the first scans: the settings were chosen on them
LEAST_VOXELS = 8  # of an organ: a centroid of fewer says little


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", nargs="+", choices=FRAMES, default=FRAMES)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sets: dict[str, Callable[[Path], Path]] = {
        f"{kind}{', cut' if cut else ''}": lambda out, of=(kind, names, cut): drawn(out, *of)
        for kind, names in (("abdomen-ct", BTCV), ("heart-mr", MM_WHS))
        for cut in (False, True)
    } | {
        "hippocampus": lambda out: asked.data / "hippocampus_mr",
        "torso": lambda out: torso(asked.data, out),
    }
    results = {}
    for name, source in sets.items():
        folder = asked.out / name.replace(", ", "-")
        store = prepare(read_layout(source(folder)), folder.with_name(f"{folder.name}-store"), Preprocessing())
        results[name] = judged(name, store, asked.frames, asked.seed)
    RESULTS.mkdir(exist_ok=True)
    result = {"seed": asked.seed, "patients": PATIENTS, "sets": results}
    write_json(RESULTS / "body_frames.json", without_nan(result))


def drawn(out: Path, kind: str, names: dict[int, str], cut: bool) -> Path:
    """A set of phantoms."""
    if (out / "dataset.json").exists():
        return out
    for patient in range(PATIENTS):
        one, rng = phantom(kind, FIRST_SEED + patient), np.random.default_rng([FIRST_SEED, patient])
        voxels, labels, affine = one.voxels, one.labels, one.affine
        if cut:
            whole = np.array(voxels.shape)
            size = np.round(whole * rng.uniform((0.7, 0.7, 0.5), (1, 1, 0.9))).astype(int)
            start = rng.integers(whole - size + 1)
            box = tuple(slice(int(a), int(a + b)) for a, b in zip(start, size, strict=True))
            voxels, labels, affine = voxels[box], labels[box], affine.copy()
            affine[:3, 3] += affine[:3, :3] @ start + rng.uniform(-1, 1, 3) * (20, 60, 200)
        write_pair(out, f"p{patient:03d}", voxels, labels, affine)
    write_description(out, names, {"0": kind[-2:].upper()})
    return out


def torso(data: Path, out: Path) -> Path:
    """The CT and the MR torso with their labels by name, among unlabelled scans of trunks and one of a limb."""
    if (out / "dataset.json").exists():
        return out
    tables = {kind: json.loads((data / f"{kind}_torso_totalseg/labels.json").read_text()) for kind in ("ct", "mr")}
    names = sorted({canonical_organ(name) for table in tables.values() for name in table.values()})
    for whose, (kind, table) in zip(("first", "second"), tables.items(), strict=True):  # not one patient's
        image = read_volume(data / f"{kind}_torso_totalseg/{kind}.nii.gz")
        labels = read_volume(data / f"{kind}_torso_totalseg/seg.nii.gz").voxels.astype(int)
        common = np.zeros(max(labels.max(), *map(int, table)) + 1, np.uint16)
        for value, name in table.items():
            common[int(value)] = names.index(canonical_organ(name)) + 1
        write_pair(out, f"{whose}_{kind.upper()}", image.voxels.astype(np.int16), common[labels], image.affine)
    for scan in sorted((data / "pretrain").glob("*.nii.gz")):
        shutil.copy(scan, out / "imagesTr" / scan.name)
    for kind in ("CT", "MR_T1"):
        shutil.copy(data / f"sts_sarcoma/STS_002/{kind}_image.nii.gz", out / "imagesTr" / f"limb_{kind}.nii.gz")
    write_description(out, dict(enumerate(names, 1)), {})
    return out


def write_pair(out: Path, name: str, voxels: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> None:
    for folder, array in (("imagesTr", voxels), ("labelsTr", labels)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        write_volume(out / folder / f"{name}.nii.gz", array, affine)


def write_description(out: Path, names: dict[int, str], modality: dict[str, str]) -> None:
    labels = {"0": "background"} | {str(value): name for value, name in names.items()}
    write_json(out / "dataset.json", {"labels": labels} | ({"modality": modality} if modality else {}))


def judged(name: str, store: VolumeStore, frames: tuple[str, ...], seed: int) -> list[dict]:
    """One row a frame, printed and returned."""
    cases = range(len(store))
    organs = {i: centroids(store, i) for i in cases[LOOKED_AT.get(name, 0) :] if store.cases[i].has_labels}
    ways = {
        "scanner": lambda: dict.fromkeys(cases, np.eye(4)),
        "centred": lambda: {i: centring(store, i) for i in cases},
    } | {
        method: lambda method=method: {
            i: None if frame is None else frame.to_frame
            for i, frame in place_scans(store, cases, method, seed=seed).items()
        }
        for method in frames
    }
    found, seconds = {}, {}
    for way, place in ways.items():
        begun = time.process_time()
        found[way] = place()
        seconds[way] = (time.process_time() - begun) / len(store)
    by_all = {i: organs[i] for i in organs if all(to_frame[i] is not None for to_frame in found.values())}
    heads = ("frame", "placed", "pairs", "median", "90th", "common", "median", "90th", "s a scan")
    table = Table(*heads, title=name, title_justify="left")
    table.columns[0].no_wrap = True
    rows = []
    for way, to_frame in found.items():
        placed = float(np.mean([to_frame[i] is not None for i in cases]))
        row = {"frame": way, "placed": round(placed, 3), "cpu_s_a_scan": round(seconds[way], 3)}
        row["not_placed"] = [store.cases[i].name for i in cases if to_frame[i] is None]
        row |= spread(distances(store, organs, to_frame, lambda a, b: True))
        row["common"] = spread(distances(store, by_all, to_frame, lambda a, b: True))
        if name == "hippocampus":
            sides = {i: side_of(store.cases[i].name) for i in cases}
            for what, same in (("one side", True), ("across sides", False)):
                row[what] = spread(
                    distances(
                        store, organs, to_frame, lambda a, b, same=same, sides=sides: (sides[a] == sides[b]) is same
                    )
                )
        rows.append(row)
        table.add_row(way, f"{placed:.0%}", *shown(row), *shown(row["common"]), f"{seconds[way]:.2f}")
    Console().print(table)
    return rows


def side_of(name: str) -> int:
    """MSD's hippocampi 2k - 1 and 2k are the two sides of one head."""
    return int(name.rsplit("_", 1)[1]) % 2


def centring(store: VolumeStore, i: int) -> np.ndarray:
    case, matrix = store.cases[i], np.eye(4)
    matrix[:3, 3] = -apply_affine(case.affine, (np.array(case.shape) - 1) / 2)
    return matrix


def centroids(store: VolumeStore, i: int) -> dict[int, np.ndarray]:
    """By label, the centroid in mm of each organ that does not touch the border of the scan."""
    labels, case, found = store.labels(i), store.cases[i], {}
    for value in case.label_values:
        voxels = np.argwhere(labels == value)
        if len(voxels) >= LEAST_VOXELS and voxels.min() > 0 and (voxels.max(axis=0) < np.array(case.shape) - 1).all():
            found[value] = apply_affine(case.affine, voxels.mean(axis=0))
    return found


def distances(store: VolumeStore, organs, to_frame, wanted: Callable[[int, int], bool]) -> np.ndarray:
    placed = [i for i in organs if to_frame[i] is not None]
    return np.array(
        [
            np.linalg.norm(apply_affine(to_frame[a], organs[a][organ]) - apply_affine(to_frame[b], organs[b][organ]))
            for a, b in itertools.combinations(placed, 2)
            if store.cases[a].subject != store.cases[b].subject and wanted(a, b)
            for organ in organs[a].keys() & organs[b].keys()
        ]
    )


def spread(mm: np.ndarray) -> dict[str, float | int]:
    if not len(mm):
        return {"pairs": 0}
    median, p90 = np.percentile(mm, (50, 90)).round(2).tolist()
    return {"pairs": len(mm), "median_mm": median, "p90_mm": p90}


def shown(of: dict[str, float | int]) -> list[str]:
    """How many pairs, their median and 90th percentile, in words for the table."""
    return [str(of["pairs"]), *(f"{of[key]:.1f}" if of["pairs"] else "-" for key in ("median_mm", "p90_mm"))]


if __name__ == "__main__":
    main()
