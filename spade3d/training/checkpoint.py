"""Checkpoints: written whole or not at all, checked before they are believed, found again after any interruption.

A file is what `torch.save` writes (tensors and plain values only, so `torch.load(..., weights_only=True)` reads it)
followed by a footer: a mark and the SHA-256 of everything before it. Without one, a flipped bit loads in silence.
A folder holds `step-0001000.pt`, the one before it, and `last`, a line of text for people and scripts: resuming trusts
the files themselves.
"""

import hashlib
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spade3d.faults import DataFault, Fault
from spade3d.whole_file import whole_file

SCHEMA = 1
KEEP = 2
_MARK = b"spade3d\x01"
_FOOTER = len(_MARK) + hashlib.sha256().digest_size
_GIB = 2**30


class Damaged(DataFault):
    """A checkpoint that is not what was written; the one before it may be."""


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that can be believed, and what is wrong with each newer one."""

    path: Path
    state: dict[str, Any]
    damaged: tuple[str, ...]


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; a file that was there is replaced only by a whole new one.

    Twice the size must be free: `best.pt` of about the same size follows a checkpoint. Raises Fault when the disk is
    too full or the writing fails, TypeError for a value that is neither tensor nor plain.
    """
    state = {"schema": SCHEMA, **plain(state)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state))
    free = shutil.disk_usage(path.parent).free
    if free < 2 * size:
        raise Fault(
            f"{path}: {free / _GIB:.2f} GiB are free on this disk and a checkpoint needs {2 * size / _GIB:.2f} GiB; "
            "make room, then run the same command again with --resume"
        )
    try:
        with whole_file(path) as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)
            file.write(_MARK + hashed.sha256.digest())
            file.flush()
            if not _intact(file):
                raise OSError("what was read back is not what was written")
    except (OSError, RuntimeError) as error:
        # torch hides the system's own error ("No space left on device") behind one about file positions.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise Fault(
            f"{path}: writing the checkpoint failed ({reason}; {size} bytes to write); what was there before is "
            "untouched; make room, then run the same command again with --resume"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU. Damaged when it is not what was written, DataFault when it is missing or
    of a newer schema."""
    if not path.is_file():
        raise DataFault(f"{path}: no such checkpoint; give the path of a file written by this program")
    with open(path, "rb") as file:
        if not _intact(file):
            raise Damaged(f"{path}: damaged or cut short (its checksum does not match its content)")
    try:
        _refuse_bomb(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise Damaged(f"{path}: not a checkpoint of this program ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
        raise Damaged(f"{path}: not a checkpoint of this program (it names no schema)")
    if state["schema"] > SCHEMA:
        raise DataFault(
            f"{path}: written by a newer version (checkpoint schema {state['schema']}, this version reads up to "
            f"{SCHEMA}); update spade3d"
        )
    return state


def put(folder: Path, step: int, state: Mapping[str, Any], *, streak: int = 0) -> Path:
    """Add the checkpoint of a step to a run's folder, point `last` at it, and keep the `KEEP` newest.

    Files of later steps are leftovers of a future that was lost (see `newest`) and are removed as well. `streak`: that
    many updates up to this step were not made; nothing that was kept before them gives way to what follows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.partial"):  # of a process that was killed while it saved
        leftover.unlink()
    path = folder / f"step-{step:07d}.pt"
    save(path, state)
    with whole_file(folder / "last") as file:
        file.write(f"{path.name}\n".encode())
    kept = [*steps_in(folder, until=step - streak)[-KEEP:], path]
    for other in steps_in(folder):
        if other not in kept:
            other.unlink()
    return path


def newest(folder: Path) -> Found:
    """The newest checkpoint of a run that is whole. DataFault when there is none: a run never starts afresh in
    silence."""
    damaged: list[str] = []
    for path in reversed(steps_in(folder)):
        try:
            return Found(path, load(path), tuple(damaged))
        except Damaged as fault:
            damaged.append(str(fault))
    raise DataFault(
        f"{folder}: no checkpoint to resume from ({'; '.join(damaged) or 'none was written'}); "
        "start again with another --out, or put a good checkpoint back"
    )


def steps_in(folder: Path, *, until: int | None = None) -> list[Path]:
    """The checkpoints of a run, up to a step where one is given; oldest first."""
    found = (path for path in folder.glob("step-*.pt") if path.stem[5:].isdigit())
    return sorted((path for path in found if until is None or _step_of(path) <= until), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def plain(value: Any) -> Any:
    """The same value of nothing but tensors and plain types. Subclasses and attributes of tensors are left behind:
    MONAI's MetaTensor carries the name of the patient's file."""
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values only, not {type(value).__name__}")


class _Hashed:
    """A file that also hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _intact(file: BinaryIO) -> bool:
    """Whether the content of an open file hashes to what its footer says."""
    left = file.seek(0, os.SEEK_END) - _FOOTER
    file.seek(0)
    sha256 = hashlib.sha256()
    while left > 0:
        block = file.read(min(left, 2**20))
        sha256.update(block)
        left -= len(block) or math.inf
    return left == 0 and file.read() == _MARK + sha256.digest()


def _refuse_bomb(path: Path) -> None:
    """torch stores its members as they are; a compressed one may unfold to any size."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if (
        any(m.compress_type != zipfile.ZIP_STORED for m in members)
        or sum(m.file_size for m in members) > path.stat().st_size
    ):
        raise Damaged(f"{path}: not a checkpoint of this program (its members are compressed)")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)
