"""The machine: its memory, who counts processes alike, and whether one of them still lives."""

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container or a batch job


def usable_memory() -> int:
    """Bytes of main memory that the machine has, or that a container or a batch system left of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return min(limits)


@cache
def counting() -> str:
    """Equal for processes that see each other under the same numbers: of one host, one boot and one container."""
    return " ".join((socket.gethostname(), _boot(), _namespace()))


def began(process: int) -> int | None:
    """When a process of this machine began, in ticks since the boot; None where that is not known (no /proc)."""
    fields = _status(process)
    return int(fields[19]) if fields else None


def lives(process: int, when: int | None) -> bool:
    """Whether a process of this machine lives: one of that number which began then, if that is known of both."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it lives, and is someone else's
        pass
    fields = _status(process)
    if not fields:
        return True
    return fields[0] not in "ZX" and when in (None, int(fields[19]))  # Z: dead, and its parent has not asked yet


@cache
def booted() -> float:
    """When this machine began, in seconds as `time.time` counts them; the beginning of time where that is not known."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("btime ")))
    except (OSError, StopIteration):
        return 0.0


def _status(process: int) -> list[str]:
    """What /proc says of a process after its name, which may hold anything: its state, ..., the 20th its beginning."""
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
