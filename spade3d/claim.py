"""A claim: the file by which one process at a time writes into a folder, on any file system and from any machine.

In a store (`claimed`) it spares two processes the same work. What it guards is safe without it: everything is written
under a temporary name of its own and renamed, so even two writers, should a claim be lost, leave whole files. In a run
(`held`) it is what keeps two processes that resume it at once from writing one log and taking each other's saves.

A process of this machine holds its claim for as long as it lives, however long it is silent. Of another machine, or
container, silence is all that is known: there a process that only slept can be overruled. It learns of it when it
renews its claim next, and ends.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from spade3d.faults import DataFault, Fault
from spade3d.machine import began, booted, counting, lives

CLAIM = "claim"
STALE_S = 3600.0  # a holder renews its claim after each case; an hour of silence means that it is gone
POLL_S = 0.2
RENEW_S, SILENT_S = 20.0, 120.0  # of a run: it renews its claim by itself; a job that was killed may go on elsewhere
WRITING_S = 10.0  # an unreadable claim: long enough for the one who is writing it this instant
_OURS: set[str] = set()  # the claims that this process itself holds


class Overruled(Fault):
    """Another process holds the claim that was this one's."""


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: the process, who counts it so (machine.py), when it began; 0 where a crash cut that short."""

    process: int = 0
    host: str = "an unknown machine"
    counting: str | None = None
    began: int | None = None

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine; a claim that does not say how it counts is believed its host."""
        return self.host == socket.gethostname() and self.counting in (None, counting())


@contextmanager
def claimed(
    folder: Path, waiting: Callable[[str], None] | None = None, *, stale_s: float = STALE_S, wait_here: bool = True
) -> Iterator[Callable[[], None]]:
    """Hold the claim on a folder; gives a function that renews it. Waits while another process holds it.

    A holder that is dead (same machine) or silent for `stale_s` (another) is overruled. `waiting` is told once who is
    waited for. Without `wait_here` a living one of this machine is not waited for, but a DataFault. Renewing raises
    Overruled where another process has taken the claim over.
    """
    path, process = folder / CLAIM, os.getpid()
    mine = json.dumps(
        {**asdict(Holder(process, socket.gethostname(), counting(), began(process))), "since": time.time()}
    )
    told = False
    while not _take(path, mine):
        text = _text(path)
        if text is None:  # just given back
            continue
        if _is_gone(path, text, stale_s):
            _overrule(path, text, stale_s)
            continue
        holder = _holder(text)
        if holder.here and not wait_here:
            raise DataFault(
                f"{folder}: process {holder.process} of this machine is running there; wait until it ends, or end it"
            )
        if waiting is not None and not told:
            waiting(
                f"{folder}: waiting for process {holder.process} on {holder.host}, which is writing here; if you know "
                f"that it has ended, remove {path}"
            )
            told = True
        time.sleep(POLL_S)
    _OURS.add(mine)
    try:
        yield lambda: _renew(path, mine)
    finally:
        _OURS.discard(mine)
        if _text(path) == mine:
            path.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, waiting: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the claim on the folder of a run, renewed by itself for as long as this process lives.

    DataFault while a living process of this machine holds it. One of another machine is waited for: until it gives
    its claim back, or is silent for two minutes, as one that was killed is. Gives a function to be called before
    anything is written there: Overruled where the run is another process's by now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, waiting, stale_s=SILENT_S, wait_here=False) as renew:
        ended = threading.Event()

        def still() -> None:
            with suppress(OSError):  # a file system that stumbles may recover; if not, the next file tells it better
                renew()

        def keep() -> None:
            while not ended.wait(RENEW_S):
                with suppress(Fault):  # whoever writes next is told
                    still()

        keeper = threading.Thread(target=keep, name="claim", daemon=True)
        keeper.start()
        try:
            yield still
        finally:
            ended.set()
            keeper.join()


def _take(path: Path, mine: str) -> bool:
    """Lay a claim where there is none."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        return False
    except OSError as problem:
        raise DataFault(f"{path.parent}: cannot be written ({problem.strerror}); choose another --out") from problem
    return _text(path) == mine  # or it was moved aside while it was still empty


def _renew(path: Path, mine: str) -> None:
    """Say that the holder lives. A claim that is gone, by hand or because it lies aside, is laid again."""
    if _text(path) is None:
        _take(path, mine)
    text = _text(path)
    if text == mine:
        with suppress(FileNotFoundError):
            os.utime(path)
    elif text is not None:
        holder = _holder(text)
        raise Overruled(
            f"{path.parent}: process {holder.process} on {holder.host} has taken over what this one was writing, which "
            "was silent for too long (stopped, or its machine asleep); this one ends: wait for that one, or end it "
            "and run this command again"
        )


def _overrule(path: Path, text: str, stale_s: float) -> None:
    """Remove the claim that was judged, and no other: the next process may have laid its own there since."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    found = _text(aside)
    if found is not None and not (found == text and _is_gone(aside, found, stale_s)):
        _take(path, found)  # back; should a third have come in between, the one that was moved learns it as it renews
    aside.unlink(missing_ok=True)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _holder(text: str) -> Holder:
    """Who holds a claim. One cut short by a crash has an unknown holder."""
    try:
        said = json.loads(text)
        return Holder(int(said["process"]), str(said["host"]), said.get("counting"), said.get("began"))
    except (ValueError, KeyError, TypeError):
        return Holder()


def _is_gone(path: Path, text: str, stale_s: float) -> bool:
    """Whether nobody holds the claim any more that lies at `path`."""
    try:
        heard = path.stat().st_mtime
    except FileNotFoundError:
        return True
    holder, silent_s = _holder(text), time.time() - heard
    if holder.process <= 0:
        return silent_s > WRITING_S
    if not holder.here:  # of this machine before it was started anew, or of another
        return silent_s > stale_s or (holder.host == socket.gethostname() and heard < booted())
    if holder.process == os.getpid():  # else of a container that was killed and began again with the same numbers
        return text not in _OURS
    return not lives(holder.process, holder.began)
