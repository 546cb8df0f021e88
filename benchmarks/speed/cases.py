"""Cost against the number of cases: what a pretraining does with every scan of a store before its first step.

    python benchmarks/speed/cases.py

The index holds as many cases as asked for, each with a name, a subject, a fingerprint and a body of its own; the
arrays of all are those of two phantoms, so that 100,000 cases fit on a disk (the size of each one's file is asked for
all the same; a disk that is not in the cache answers later). In the order of a run: the store is opened, subjects are
split, `box` frames found, what the run begins with is written down and held against itself as on --resume, provenance
is written, the stream of pairs made; then one batch, whose cost must not know the number of cases at all. Frames kept
by an earlier run are read, as `affine` ones are; finding those is `body_frame.py`. Saliency and labels are not here:
they are read scan by scan, whole.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rounds import ROUNDS, machine, tabled, timed, written

from spade3d.began_with import check_beginning, keep_beginning
from spade3d.configuration import Common
from spade3d.crops.pairs import PairStream, Sampling
from spade3d.provenance import PROVENANCE, describe, write_json
from spade3d.volumes import sealed
from spade3d.volumes.body_frame import load_frames, save_frames
from spade3d.volumes.frame_methods import place_scans
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.split import split_cases
from spade3d.volumes.store import INDEX, Contents, VolumeStore, finished_index
from spade3d.volumes.volume import write_volume

COUNTS = (100, 1_000, 10_000, 100_000)
SAMPLING = Sampling(shape=(32, 32, 32), spacing=(4.0, 4.0, 4.0), anchors=2)
BATCH = "a batch"  # everything else is done once for each case


def stored(folder: Path) -> Path:
    """A store of two phantoms."""
    (folder / "scans").mkdir()
    for patient in range(2):
        one = phantom("abdomen-ct", patient, shape=(64, 64, 48), spacing=(4.0, 4.0, 4.0))
        write_volume(folder / "scans" / f"p{patient}.nii.gz", one.voxels, one.affine)
    return prepare(read_layout(folder / "scans"), folder / "store", Preprocessing()).path


def of_many(store: Path, pattern: Contents, count: int) -> VolumeStore:
    """Let the index hold `count` cases; every third subject has two scans, and half of the scans are labelled."""
    rng = np.random.default_rng(count)
    others = [
        {
            "name": f"scan_{n:06d}",
            "subject": f"patient_{n - n % 4 // 3:06d}",
            "fingerprint": rng.bytes(32).hex(),
            "likeness": rng.bytes(128).hex(),
            "signature": rng.bytes(32).hex(),
            "has_labels": n % 2 == 0,
        }
        for n in range(count)
    ]
    two = [case.to_dict() for case in pattern.cases]
    cases = [two[n % 2] | other for n, other in enumerate(others)]
    sealed.write_json(store / INDEX, pattern.to_dict() | {"cases": cases})
    return VolumeStore(
        store, replace(pattern, cases=tuple(replace(pattern.cases[n % 2], **other) for n, other in enumerate(others)))
    )


def ways(store: VolumeStore, run: Path) -> dict[str, Callable[[int], Any]]:
    """What is timed; each takes the number of the round."""
    everybody = range(len(store))
    split = split_cases(store.cases, 5, 0)
    found = place_scans(store, split.train, "box")
    frames = {i: frame.to_frame for i, frame in found.items()}
    save_frames(run / "frames.json", {store.cases[i].name: frame for i, frame in found.items()}, "affine")
    stream = PairStream(store, split.train, frames, SAMPLING)
    keep_beginning(run, store, split.train, split, Common())
    assert {store.cases[i].subject for i in split.train}.isdisjoint(store.cases[i].subject for i in split.validation)
    return {
        "store opened": lambda _: VolumeStore.open(store.path),
        "split by subject": lambda _: split_cases(store.cases, 5, 0),
        "box frames": lambda _: place_scans(store, everybody, "box"),
        "kept frames read": lambda _: load_frames(run / "frames.json"),
        "beginning written": lambda _: keep_beginning(run, store, split.train, split, Common()),
        "beginning checked": lambda _: check_beginning(run, store, split.train, split, Common()),
        "provenance written": lambda _: write_json(run / PROVENANCE, describe(store, split.train, split)),
        "stream made": lambda _: PairStream(store, split.train, frames, SAMPLING),
        BATCH: stream.batch,
    }


def main() -> None:
    of, curve = machine(("spade3d", "numpy", "torch")), []
    with tempfile.TemporaryDirectory() as folder:
        path, run = stored(Path(folder)), Path(folder) / "run"
        run.mkdir()
        pattern = finished_index(path)
        for count in COUNTS:
            store = of_many(path, pattern, count)
            timings = timed(ways(store, run), ROUNDS)
            rows = tabled(f"{count:,} cases", timings, (path / INDEX).stat().st_size, of)
            each = sum(row["ms"] for row in rows if row["who"] != BATCH) * 1e3 / count
            print(f"before the first step: {each:.0f} us a case")
            curve.append({"cases": count, "us_a_case": float(f"{each:.4g}"), "rows": rows})
    goal = "100,000 cases cost no more each than 1,000 do, and a batch of them no more than a batch of 1,000"
    written("speed_cases", {"goal": goal, "machine": of, "curve": curve})


if __name__ == "__main__":
    main()
