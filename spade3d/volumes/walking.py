"""Walking a folder: its regular files, each folder once, and a word about everything that is neither."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Walk:
    """The regular files below a folder, sorted, and notes on what was passed by."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def some(names: list[str], most: int = 8) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def walk(root: Path) -> Walk:
    """Find every regular file below `root`. Links are followed; a link back to a folder already seen ends there."""
    files: list[Path] = []
    passed: dict[str, list[str]] = {}
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        path = waiting.pop()
        where = str(path.relative_to(root))
        try:
            status = path.stat()
            if not stat.S_ISDIR(status.st_mode):
                if stat.S_ISREG(status.st_mode):
                    files.append(path)
                else:
                    passed.setdefault("neither files nor folders", []).append(where)
                continue
            if (status.st_dev, status.st_ino) in seen:
                passed.setdefault("links to folders that are read elsewhere", []).append(where)
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in sorted(os.listdir(path), reverse=True):
                if name.startswith("."):  # .DS_Store, .git, and the ._x.nii.gz that macOS leaves in archives
                    passed.setdefault("hidden", []).append(str((path / name).relative_to(root)))
                else:
                    waiting.append(path / name)
        except OSError as error:  # a dangling link, a loop of links, a folder we may not read
            passed.setdefault(f"not readable ({error.strerror})", []).append(where)
    return Walk(tuple(sorted(files)), tuple(f"left out, {why}: {some(names)}" for why, names in passed.items()))
