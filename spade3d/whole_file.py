"""Files that appear under their name only when they are whole: what every writer of this project uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name once it is on the disk; after an error or a kill the old one is still there.

    OSError and whatever the writing raises pass through; the half-written file is gone then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
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
