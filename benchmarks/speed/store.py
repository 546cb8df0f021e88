"""Random crops from a store whose files are opened anew: ours against .nii.gz, and against memory-mapped arrays.

    python benchmarks/speed/store.py [SCAN.nii.gz ...]

Crops of 96^3 voxels anywhere in phantoms of an abdomen, 256 x 256 x 160 voxels of 1.5 mm, with a CT's noise (8 to 18
HU, and the grain of the tissues); scans given on the command line are measured by the same rules, one by one.
Everybody gives the same int16 voxels from files that the system has in its cache. `files re-opened`: the array is
opened for every crop, as nobody can keep 10,000 files open; `the store opened anew`: index and checksum too, as for
the first crop of all; `open`: what a run reads most. nibabel reads a .nii.gz as its `dataobj` slices it, and whole,
whichever is faster; MONAI's LoadImage reads it whole. Memory-mapped .npy costs the whole raw size on disk: the limit
of what reading can reach, not another way to keep 10,000 scans. What no file can be much smaller than is estimated, too
(`least_share`). Cost against size: crops of four sides, and a scan
of 512 x 512 x 400 voxels (phantoms side by side), since a .nii.gz is read as far as a crop reaches.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
from monai.transforms import LoadImage, SpatialCrop
from rounds import machine, tabled, timed, written

from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.sealed import READING
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import write_volume

SHAPE, SPACING_MM, PATIENTS = (256, 256, 160), 1.5, 2
LARGE = (512, 512, 400)
SIDES, GOAL_SIDE = (32, 64, 96, 128), 96
ROUNDS = 9
WINDOW_HU = (-1024.0, 3071.0)
PACKAGES = ("spade3d", "monai", "nibabel", "blosc2", "numpy")

Boxes = list[tuple[int, tuple[slice, slice, slice]]]


class Kept:
    """Scans kept in every way: a store, .nii.gz, .npy; crops are read by the methods."""

    def __init__(self, folder: Path, scans: list[Path]):
        self.store = prepare(read_layout(folder / "scans"), folder / "store", Preprocessing(window_hu=WINDOW_HU))
        self.path = folder / "store"
        self.nii = [folder / "stored" / f"{i}.nii.gz" for i in range(len(scans))]
        self.npy = [path.with_suffix("").with_suffix(".npy") for path in self.nii]
        self.nii[0].parent.mkdir()
        for i, (nii, npy) in enumerate(zip(self.nii, self.npy, strict=True)):
            write_volume(nii, self.store.image(i), self.store.cases[i].affine)
            np.save(npy, self.store.image(i))
        self.mapped = [np.load(npy, mmap_mode="r") for npy in self.npy]
        self.load = LoadImage(image_only=True, ensure_channel_first=True, dtype=np.int16)

    def bytes(self) -> dict[str, int]:
        """On disk, by who keeps them."""
        kept = {"ours": [self.path / case.image.file for case in self.store.cases], ".nii.gz": self.nii}
        return {who: sum(path.stat().st_size for path in paths) for who, paths in kept.items()} | {
            "raw int16": sum(2 * int(np.prod(case.shape)) for case in self.store.cases)
        }

    def reopened(self, i: int, box) -> np.ndarray:
        array = blosc2.open(str(self.path / self.store.cases[i].image.file), mode="r", dparams=READING)
        return array[box]

    def opened(self, i: int, box) -> np.ndarray:
        return self.store.image(i, (tuple(s.start for s in box), tuple(s.stop for s in box)))

    def first(self, i: int, box) -> np.ndarray:
        """The store opened anew, its index read, the array's checksum taken."""
        return VolumeStore.open(self.path).image(i, (tuple(s.start for s in box), tuple(s.stop for s in box)))

    def nibabel_sliced(self, i: int, box) -> np.ndarray:
        return np.asarray(nib.load(self.nii[i]).dataobj[box])

    def nibabel_whole(self, i: int, box) -> np.ndarray:
        return np.ascontiguousarray(np.asanyarray(nib.load(self.nii[i]).dataobj)[box])

    def monai(self, i: int, box) -> np.ndarray:
        return SpatialCrop(roi_slices=list(box))(self.load(self.nii[i]))[0].numpy()

    def remapped(self, i: int, box) -> np.ndarray:
        return np.array(np.load(self.npy[i], mmap_mode="r")[box])


def drawn(kept: Kept, side: int, number: int, count: int) -> Boxes:
    rng = np.random.default_rng([side, number])
    scans = rng.integers(len(kept.store), size=count)
    shapes = [kept.store.cases[i].shape for i in scans]
    starts = [[int(rng.integers(whole - min(side, whole) + 1)) for whole in shape] for shape in shapes]
    return [
        (int(i), tuple(slice(a, a + min(side, whole)) for a, whole in zip(start, shape, strict=True)))
        for i, start, shape in zip(scans, starts, shapes, strict=True)
    ]


def all_of(read, boxes: list[Boxes], number: int) -> None:
    for i, box in boxes[number]:
        read(i, box)


def measured(kept: Kept, side: int, of: dict, slow: bool) -> list[dict]:
    """Crops per second of each; the .nii.gz, seconds a crop, only where asked for."""
    ways = {
        "ours, files re-opened": kept.reopened,
        "ours, open": kept.opened,
        "ours, the store opened anew": kept.first,
        "mapped .npy, re-opened": kept.remapped,
    }
    slower = {
        ".nii.gz, nibabel, sliced": kept.nibabel_sliced,
        ".nii.gz, nibabel, whole": kept.nibabel_whole,
        ".nii.gz, MONAI": kept.monai,
    }
    for i, box in drawn(kept, side, 0, 2):
        expected = kept.opened(i, box)
        for who, read in (ways | slower).items():
            assert np.array_equal(read(i, box), expected), f"{who} reads other voxels"
    many = [drawn(kept, side, number, 8) for number in range(ROUNDS)]
    timings = timed({who: partial(all_of, read, many) for who, read in ways.items()}, ROUNDS)
    timings = {who: timing.times(1 / 8) for who, timing in timings.items()}
    if slow:
        few = [boxes[:1] for boxes in many]
        # Ours takes its turns among them, too, so that the ratio is of one run.
        again = {"ours, files re-opened": kept.reopened} | slower
        beside = timed({who: partial(all_of, read, few) for who, read in again.items()}, ROUNDS)
        scale = timings["ours, files re-opened"].median / beside["ours, files re-opened"].median
        timings |= {who: beside[who].times(scale) for who in slower}
    rows = tabled(f"one crop of {side}^3", timings, 2 * 2 * side**3, of)
    for row in rows:
        row["crops_per_s_and_core"] = float(f"{1e3 / row['ms']:.4g}")
    print("crops per second and core:", {row["who"]: row["crops_per_s_and_core"] for row in rows})
    return rows


def of_size(kept: Kept) -> dict[str, float]:
    found = kept.bytes()
    least = [least_share(kept.store.image(i)) for i in range(len(kept.store))]
    return found | {
        "share_of_raw": round(found["ours"] / found["raw int16"], 3),
        "least_share_of_raw": round(float(np.mean(least)), 3),
    }


def least_share(voxels: np.ndarray) -> float:
    """The share of the raw size that the surprise in the voxels takes, as well as compressors of medical images guess.

    Each voxel is guessed from the 13 neighbours that a decoder knows by then, linearly, with the weights that fit this
    scan best; the entropy of what is left is taken in 64 classes of how unrestful these neighbours are. Noise cannot be
    guessed: of white noise of 20 HU alone this is 0.4.
    """
    steps = [d for d in np.ndindex(3, 3, 3) if d < (1, 1, 1)]
    known = np.stack([voxels[tuple(slice(a, n - 2 + a) for a, n in zip(d, voxels.shape))].ravel() for d in steps])
    true, some = voxels[1:-1, 1:-1, 1:-1].ravel().astype(np.float64), slice(None, None, 1 + known.shape[1] // 200_000)
    weights = np.linalg.lstsq(known[:, some].T.astype(np.float64), true[some], rcond=None)[0]
    left = np.rint(true - weights @ known).astype(np.int64)
    unrest = np.abs(np.diff(known.astype(np.int32), axis=0)).sum(axis=0)
    bits = 0.0
    for voxels_of_class in np.array_split(left[np.argsort(unrest, kind="stable")], 64):
        share = np.unique(voxels_of_class, return_counts=True)[1] / len(voxels_of_class)
        bits -= len(voxels_of_class) * float(share @ np.log2(share))
    return bits / len(left) / 16


def phantoms(folder: Path) -> list[Path]:
    paths = [folder / f"abdomen_{seed}.nii.gz" for seed in range(PATIENTS)]
    for seed, path in enumerate(paths):
        one = phantom("abdomen-ct", seed, shape=SHAPE, spacing=(SPACING_MM,) * 3)
        write_volume(path, one.voxels, np.diag([SPACING_MM] * 3 + [1.0]))
    return paths


def side_by_side(folder: Path, two: list[Path]) -> list[Path]:
    """A scan as large as a scanner's. Its lines go through both phantoms, for one twice would be packed as one."""
    line, path = np.concatenate([np.asanyarray(nib.load(one).dataobj) for one in two]), folder / "large.nii"
    write_volume(path, np.tile(line, (1, 2, 3))[:, :, : LARGE[2]], np.diag([SPACING_MM / 2] * 3 + [1.0]))
    return [path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", nargs="*", type=Path)
    of, result = machine(PACKAGES), {}
    for scan in [None, *parser.parse_args().scans]:
        with tempfile.TemporaryDirectory() as folder:
            scans = Path(folder) / "scans"
            scans.mkdir()
            if scan is None:
                paths = phantoms(scans)
            else:
                paths = [scans / scan.name]
                paths[0].symlink_to(scan.resolve())
            kept = Kept(Path(folder), paths)
            disk = of_size(kept)
            print(f"{'phantoms' if scan is None else scan.name}: {disk['share_of_raw']:.1%} of the raw size")
            if scan is None:
                curve = [{"side": side, "rows": measured(kept, side, of, side == GOAL_SIDE)} for side in SIDES]
                result |= {"disk": disk, "curve": curve}
                large = Path(folder) / "large"
                (large / "scans").mkdir(parents=True)
                kept = Kept(large, side_by_side(large / "scans", paths))
                rows = measured(kept, GOAL_SIDE, of, True)
                result["large"] = {"shape": kept.store.cases[0].shape, "disk": kept.bytes(), "rows": rows}
            else:
                rows = measured(kept, GOAL_SIDE, of, True)
                real = {"scan": scan.name, "shape": kept.store.cases[0].shape, "disk": disk, "rows": rows}
                result.setdefault("scans", []).append(real)
    goal = "300 crops of 96^3 a second at 30 % of the raw size; 100 x .nii.gz"
    written("speed_store", {"goal": goal, "machine": of, **result})


if __name__ == "__main__":
    main()
