"""Files that appear under their name only when they are whole: what every writer of this project uses."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from spade3d.machine import counting, lives

PARTIAL = ".partial"  # the end of a temporary name: .NAME.MACHINE.PROCESS.partial
STALE_S = 3600.0  # nobody writes one file for an hour


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name once it is on the disk; after an error or a kill the old one is still there.

    OSError and whatever the writing raises pass through; the half-written file is gone then.
    """
    partial = path.with_name(f".{path.name}.{_machine()}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left half-written in a folder and those below it, never what a living one writes.

    Of another machine, or container, nobody knows who lives: a file that was not touched for an hour is left over.
    """
    for partial in folder.rglob(f"*{PARTIAL}"):
        rest, _, process = partial.name.removesuffix(PARTIAL).rpartition(".")
        with suppress(FileNotFoundError):
            if process.isdecimal() and rest.endswith(f".{_machine()}"):
                left_over = not lives(int(process), None)
            else:
                left_over = time.time() - partial.stat().st_mtime > STALE_S
            if left_over:
                partial.unlink()


def _machine() -> str:
    """The machine, in so few letters that a name stays short."""
    return hashlib.sha256(counting().encode()).hexdigest()[:8]
