"""Interruption: a run that is asked to stop finishes its step, saves itself, and ends with the exit code of the asking.

SIGTERM and SIGUSR1 come from a scheduler that wants the machine back (exit 75: run me again), SIGINT from a person
(exit 130).
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from spade3d.faults import PREEMPTED, UNFINISHED, Preempted


class Interruption:
    """Remembers that a signal asked the run to stop; a second one ends the process at once. A context manager.

    The handler only sets a flag: saving inside it could meet a half-done update. Signals reach the main thread only, so
    in any other nothing is installed. The handlers that were there before come back after, and hear of a signal that
    nobody has asked for.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and kind is None:
            signal.raise_signal(self.received)

    def stop(self, number: int, step: int, steps: int, out: Path) -> None:
        """End a run that has been saved, after signal `number` to any of its processes: KeyboardInterrupt after SIGINT;
        else Preempted, and the file PREEMPTED."""
        name = signal.Signals(number).name
        message = f"stopped by {name} after step {step} of {steps}, and saved; run the same command with --resume"
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        (out / PREEMPTED).write_text(f"{message}\n", encoding="utf-8")
        raise Preempted(message)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the progress bar has hidden the cursor
            os._exit(128 + number)
        self.received = number


@contextmanager
def preemptible(out: Path, holds: str, *, resume: bool) -> Iterator[None]:
    """The work of a command in the folder `out`, outside of its loops, which have their own way to end. A run has begun
    there once it holds the file `holds`.

    Every file appears whole or not at all and the last save holds all that was learnt, so SIGTERM and SIGUSR1 end the
    work where it stands, by Preempted. Where the folder is this command's, the file PREEMPTED tells of it, and of a
    loop within that was preempted, until a run ends as it should.
    """
    others = not resume and (out / holds).exists()  # a run that this command is going to refuse

    def begun() -> bool:
        return not others and (out / holds).exists()

    def stop(number: int, _: FrameType | None) -> None:
        name, again = signal.Signals(number).name, "with --resume" if begun() else "again"
        raise Preempted(f"stopped by {name}, and what is finished is kept; run the same command {again}")

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1) if here}
    try:
        yield
        (out / PREEMPTED).unlink(missing_ok=True)
    except Preempted as stopped:
        if begun() or (not others and (out / UNFINISHED).exists()):
            (out / PREEMPTED).write_text(f"{stopped}\n", encoding="utf-8")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
