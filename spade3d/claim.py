"""A claim: the file by which one process at a time writes into a folder, on any file system and from any machine.

In a store (`claimed`) it spares two processes the same work. What it guards is safe without it: everything is written
under a temporary name of its own and renamed, so even two writers, should a claim be lost, leave whole files. In a run
(`held`) it is what keeps two processes that resume it at once from writing one log and taking each other's saves.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spade3d.faults import DataFault

CLAIM = "claim"
STALE_S = 3600.0  # a holder renews its claim after each case; an hour of silence means that it is gone
POLL_S = 0.2
RENEW_S, SILENT_S = 20.0, 120.0  # of a run: it renews its claim by itself; a job that was killed may go on elsewhere


@contextmanager
def claimed(
    folder: Path, waiting: Callable[[str], None] | None = None, *, stale_s: float = STALE_S, wait_here: bool = True
) -> Iterator[Callable[[], None]]:
    """Hold the claim on a folder; gives a function that renews it. Waits while another process holds it.

    A holder that is dead (same machine) or silent for `stale_s` is overruled. `waiting` is told once who is waited for.
    Without `wait_here` a living one of this machine is not waited for, but a DataFault.
    """
    path = folder / CLAIM
    mine = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.time()})
    told = False
    while not _take(path, mine):
        holder = _holder(path)
        if holder is None:
            continue
        if _is_gone(path, holder, stale_s):
            path.unlink(missing_ok=True)
            continue
        if holder["host"] == socket.gethostname() and not wait_here:
            raise DataFault(
                f"{folder}: process {holder['process']} of this machine is running there; wait until it ends, or end it"
            )
        if waiting is not None and not told:
            waiting(f"{folder}: waiting for process {holder['process']} on {holder['host']}, which is writing here")
            told = True
        time.sleep(POLL_S)
    try:
        yield lambda: _renew(path)
    finally:
        if _text(path) == mine:
            path.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the claim on the folder of a run, renewed by itself for as long as this process lives.

    DataFault while a living process of this machine holds it. One of another machine is waited for: until it gives
    its claim back, or is silent for two minutes, as one that was killed is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, waiting, stale_s=SILENT_S, wait_here=False) as renew:
        ended = threading.Event()

        def keep() -> None:
            while not ended.wait(RENEW_S):
                renew()

        keeper = threading.Thread(target=keep, name="claim", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()


def _take(path: Path, mine: str) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        return False
    except OSError as problem:
        raise DataFault(f"{path.parent}: cannot be written ({problem.strerror}); choose another --out") from problem
    return True


def _renew(path: Path) -> None:
    try:
        os.utime(path)
    except (
        FileNotFoundError
    ):  # overruled after an hour of silence: the work goes on, whole files are renamed into place
        return


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _holder(path: Path) -> dict | None:
    """Who holds the claim; None if it was just given back. A claim cut short by a crash has an unknown holder."""
    text = _text(path)
    if text is None:
        return None
    try:
        holder = json.loads(text)
        return {"process": int(holder["process"]), "host": str(holder["host"])}
    except (ValueError, KeyError, TypeError):
        return {"process": 0, "host": "an unknown machine"}


def _is_gone(path: Path, holder: dict, stale_s: float) -> bool:
    try:
        silent_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    if silent_s > stale_s:
        return True
    if holder["process"] == 0:
        return silent_s > 10  # long enough for the one who is writing it this instant
    if holder["host"] != socket.gethostname():
        return False
    if holder["process"] == os.getpid():  # a container that was killed and began again with the same numbers
        return True
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is someone else's
        return False
    return False
