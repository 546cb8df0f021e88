"""The body frames that a run works with: found once for a set of scans, and kept with its store."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from spade3d.faults import DataFault
from spade3d.volumes.body_frame import BodyFrame, load_frames, save_frames
from spade3d.volumes.frame_methods import place_scans

KEPT = "body_frames"  # a folder of the store
FOUND_BY = 2  # goes up when the frames themselves change, so that older ones are found anew


def placed(store, cases: Sequence[int], method: str, *, seed: int, alone: str) -> dict[int, BodyFrame | None]:
    """The body frame of each case, None for one that cannot be placed, of which a note says what it does `alone`.

    What another run found for the same scans, method and seed is read from the store's folder; where that cannot be
    written nothing is kept, and every run finds them anew. DataFault for a kept file that is none.
    """
    from spade3d.console import progress_of

    kept = store.path / KEPT / f"{method}-{_key(store, cases, seed)}.json"
    if method != "box" and kept.exists():  # a box costs nothing
        named, kind = load_frames(kept)
        if kind != method or any(store.cases[i].name not in named for i in cases):
            raise DataFault(
                f"{kept}: holds {kind} frames, or not those of all scans; remove it, and they are found again"
            )
        found = {i: named[store.cases[i].name] for i in cases}
        print(f"note: body frames ({method}) as an earlier run found them, {kept}", file=sys.stderr)
    else:
        with progress_of(f"placing scans ({method} frame)") as progress:
            found = place_scans(store, cases, method, seed=seed, progress=progress)
        if method != "box":
            _keep(kept, {store.cases[i].name: frame for i, frame in found.items()}, method)
    note_lost(store, found, alone)
    return found


def note_lost(store, found: Mapping[int, BodyFrame | None], alone: str) -> None:
    """Say how many scans have no frame, the first of their names, and what they do `alone`."""
    lost = [store.cases[i].name for i, frame in found.items() if frame is None]
    if lost:
        some = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        print(
            f"note: {len(lost)} of {len(found)} scans could not be placed in the body ({some}): {alone}",
            file=sys.stderr,
        )


def _key(store, cases: Sequence[int], seed: int) -> str:
    """Of all that frames depend on: the scans, as they were prepared and in their order, and the seed."""
    scans = [(store.cases[i].name, store.cases[i].signature) for i in cases]
    return hashlib.sha256(json.dumps([FOUND_BY, seed, scans]).encode()).hexdigest()[:16]


def _keep(path: Path, frames: dict[str, BodyFrame | None], method: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        save_frames(path, frames, method)
    except OSError as problem:  # a store may be another's, or on a medium that cannot be written
        reason = f"{path.parent}: {problem.strerror}"
        print(f"note: body frames are not kept with the store ({reason}); other runs find them anew", file=sys.stderr)
