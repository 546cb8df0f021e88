"""Sealed files: whole or not there, and known to the last bit.

Blosc2 has no checksum (29 of 30 flipped bits read back silently wrong), and a file cut short by a crash opens: so
each file is written under a temporary name, synced and renamed, and its size and xxh3 are kept where it is listed.
JSON records carry their own.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import xxhash

from spade3d.faults import DataFault, Fault
from spade3d.whole_file import whole_file

SCHEMA = 1
CHUNK, BLOCK = 64, 32
# One thread: Blosc2's pool does not survive a fork, and parallel reading is by processes.
WRITING = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
READING = {"nthreads": 1}
AGAIN = "run spade-prepare again, it redoes only what is damaged"


class Damaged(DataFault):
    """A record that is not as it was written, and may be written anew; one of a newer program is no such."""


@dataclass(frozen=True)
class ArrayFile:
    """One compressed array on disk."""

    file: str  # relative to the store
    bytes: int
    xxh3: str


def write_array(store: Path, file: str, voxels: np.ndarray) -> ArrayFile:
    """Compress an array into the store; the checksum is of what was meant, before the disk has seen it."""
    chunks = tuple(min(CHUNK, n) for n in voxels.shape)
    blocks = tuple(min(BLOCK, n) for n in voxels.shape)
    compressed = blosc2.asarray(voxels, chunks=chunks, blocks=blocks, cparams=WRITING, dparams=READING, contiguous=True)
    frame = compressed.to_cframe()
    write_atomically(store / file, frame)
    return ArrayFile(file, len(frame), xxhash.xxh3_64_hexdigest(frame))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record together with its schema and its checksum."""
    body = _canonical(content)
    sealed = {"schema": SCHEMA, "xxh3": xxhash.xxh3_64_hexdigest(body), "content": content}
    write_atomically(path, json.dumps(sealed, indent=1, ensure_ascii=True, allow_nan=False).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The record in a file, None if there is no file; Damaged, or DataFault if it cannot be read or is newer."""
    try:
        sealed = json.loads(path.read_bytes())
        schema, content = int(sealed["schema"]), sealed["content"]
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise DataFault(f"{path}: cannot be read ({problem.strerror}); check its permissions") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise Damaged(f"{path}: damaged, not a record of a store; {AGAIN}") from problem
    if schema > SCHEMA:
        raise DataFault(
            f"{path}: written by a newer spade3d (schema {schema}, this one knows {SCHEMA}); install that one"
        )
    if sealed.get("xxh3") != xxhash.xxh3_64_hexdigest(_canonical(content)):
        raise Damaged(f"{path}: damaged, its checksum does not match; {AGAIN}")
    return content


def size_fault(store: Path, array: ArrayFile) -> str | None:
    """What is wrong with the size of an array's file, if anything."""
    try:
        size = (store / array.file).stat().st_size
    except OSError as problem:
        return f"{array.file} cannot be read ({problem.strerror})"
    return None if size == array.bytes else f"{array.file} has {size} bytes, {array.bytes} were written"


def checksum_fault(store: Path, array: ArrayFile) -> str | None:
    """What is wrong with the bytes of an array's file, if anything."""
    try:
        found = checksum_of(store / array.file)
    except OSError as problem:
        return f"{array.file} cannot be read ({problem.strerror})"
    return None if found == array.xxh3 else f"{array.file} is damaged, its checksum does not match"


def checksum_of(path: Path) -> str:
    """The xxh3 of a file, read piece by piece; OSError where it cannot be read."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Either the whole file is there under its name, on the disk, or the old one still is. Fault if it cannot be."""
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as file:
            file.write(data)
    except OSError as problem:
        raise Fault(
            f"{path}: cannot write {len(data)} bytes ({problem.strerror}); free space or choose another --out"
        ) from problem


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
