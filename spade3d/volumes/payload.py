"""The bytes behind a scan file: all of them and no more, or a fault that says what is wrong.

SimpleITK hands out zeros where a file is cut short, and nibabel never looks at a gzip checksum; so every file is
measured here first. Nothing larger than the header promises is ever inflated.
"""

import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from spade3d.faults import DataFault

DEFLATE_LIMIT = 1032  # bytes that one byte of deflate can grow into at most
MAX_VOXELS = 2**31
PIECE = 2**18
GZIP_MAGIC = b"\x1f\x8b"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path: Path) -> int:
    """The size in bytes of a regular, readable, non-empty file; DataFault for anything else."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataFault(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for ever
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise DataFault(f"{path}: is {kind}; a scan file is needed")
    if status.st_size == 0:
        raise DataFault(f"{path}: is empty (0 bytes); copy or download it again")
    if first_bytes(path, len(LFS_POINTER)) == LFS_POINTER:
        raise DataFault(f"{path}: is a git-lfs pointer, not the scan itself; run `git lfs pull`")
    return status.st_size


def first_bytes(path: Path, count: int) -> bytes:
    """Up to `count` bytes of a file as stored; DataFault where it may not be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataFault(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def check_promise(path: Path, shape: tuple[int, ...], promised: int, stored: int, compressed: bool) -> None:
    """Refuse a header whose `promised` bytes cannot lie in the `stored` ones, before anything is allocated."""
    if math.prod(shape) > MAX_VOXELS:
        raise DataFault(
            f"{path}: the header declares {shape} voxels, more than {MAX_VOXELS}; it is damaged or too large"
        )
    if compressed and promised > stored * DEFLATE_LIMIT:
        raise DataFault(
            f"{path}: the header declares {shape} voxels ({promised} bytes), more than {stored} compressed bytes can "
            "hold; the file is damaged"
        )
    if not compressed and promised != stored:
        found = "truncated" if stored < promised else "longer than its header says"
        raise DataFault(f"{path}: is {found}: {stored} bytes, {promised} are needed; copy or download it again")


def three_dimensional(path: Path, sides: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape if it has three axes; else DataFault that names it."""
    if len(sides) != 3:
        hint = "split it into its channels or time points" if len(sides) > 3 else "stack the slices"
        raise DataFault(f"{path}: is {len(sides)}-D with shape {sides}; a 3-D scan is needed; {hint}")
    i, j, k = sides
    return i, j, k


def inflate(path: Path, expected: int, start: int = 0) -> Iterator[bytes]:
    """The `expected` bytes of a gzip or zlib stream that fills a file from `start` on, piece by piece.

    Read to its end, so that length and checksum (CRC-32, Adler-32) are verified. DataFault where it is truncated,
    damaged, shorter or longer than expected.
    """
    given = 0
    for piece in inflate_pieces(path, start):
        given += len(piece)
        if given > expected:
            raise DataFault(f"{path}: holds more than the {expected} bytes that its header declares; it is damaged")
        yield piece
    if given < expected:
        raise DataFault(f"{path}: is truncated: {given} bytes, {expected} are needed; copy or download it again")


def inflate_pieces(path: Path, start: int = 0) -> Iterator[bytes]:
    """The same without a promised length: stop asking when you have enough. No piece is longer than PIECE."""
    stream = zlib.decompressobj(wbits=47)  # 47: gzip or zlib, by its first bytes
    with open(path, "rb") as file:
        file.seek(start)
        waiting = file.read(PIECE)
        while waiting or not stream.eof:
            if stream.eof:  # after a member: zeros are padding, and another member may follow (block gzip)
                waiting = waiting.lstrip(b"\0")
                if not waiting:
                    waiting = file.read(PIECE)
                    continue
                stream = zlib.decompressobj(wbits=31)
            try:
                piece = stream.decompress(waiting, PIECE)
            except zlib.error as error:
                raise DataFault(
                    f"{path}: the compressed data is damaged ({error}); copy or download it again"
                ) from error
            if not (waiting or piece or stream.eof):
                raise DataFault(f"{path}: is truncated: the compressed data stops early; copy or download it again")
            yield piece
            waiting = (stream.unused_data if stream.eof else stream.unconsumed_tail) or file.read(PIECE)
