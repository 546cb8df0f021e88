"""The journal of a run: `log.jsonl` (one row a step), TensorBoard beside it, and progress on standard error.

A row: {"step", "losses": {name: weighted value}, "total", "lr", "grad_norm", "seconds", "data_seconds",
"crops_per_second"}, with "signs" every so often, "notes" {name: value} of tasks that have some, and "skipped": true
where the update was not made. A validation is a line of its own, {"step", "validation": {name: value}}, that
`read_log` joins to the row of its step. Values that are not finite are null. Steps order the rows, never the clock.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from spade3d.faults import DataFault, Fault
from spade3d.whole_file import whole_file

PLAIN_EVERY_S = 10.0  # between two lines of progress where there is no terminal
_SMOOTHING = 0.9  # of the seconds a step takes


class Journal:
    """Keeps the log of a run in its folder and shows its progress; a context manager.

    `done` is the step the run continues from: rows of later steps, written before an interruption, are dropped.
    """

    def __init__(self, out: Path, *, label: str, steps: int, done: int = 0):
        self.label, self.steps = label, steps
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        path = out / "log.jsonl"
        if path.exists():
            kept = [row for row in read_log(path) if row["step"] <= done]
            with whole_file(path) as file:
                file.writelines(_line(row) for row in kept)
        self._file = open(path, "ab", buffering=0)  # one write a line: a failed one is not tried again at close
        self._board = self._open_board(out / "tensorboard", done)
        self._seconds_per_step = 0.0
        self._shown_at = -math.inf
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=self._console, redirect_stdout=False)
            self._shown = self._bar.add_task(label, total=steps, completed=done, state=f"{done}/{steps}")

    def __enter__(self) -> "Journal":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()
        self._file.close()

    def step(self, row: Mapping[str, Any]) -> None:
        """Log a step and show it."""
        self._write(row)
        scalars = {f"losses/{name}": value for name, value in row["losses"].items()}
        scalars |= {name: row[name] for name in ("total", "lr", "grad_norm", "crops_per_second")}
        scalars |= {f"signs/{n}": v for n, v in row.get("signs", {}).items() if isinstance(v, int | float)}
        scalars |= {f"notes/{name}": value for name, value in row.get("notes", {}).items()}
        self._chart(row["step"], scalars)
        first = self._seconds_per_step == 0.0
        kept = 0.0 if first else _SMOOTHING
        self._seconds_per_step = kept * self._seconds_per_step + (1 - kept) * row["seconds"]
        self._show(row)

    def validation(self, step: int, values: Mapping[str, int | float]) -> None:
        """Log what validation found at a step."""
        self._write({"step": step, "validation": dict(values)})
        self._chart(step, {f"validation/{name}": value for name, value in values.items()})
        self.say(f"{self.label} {step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def say(self, message: str) -> None:
        """One line to the user, above the bar."""
        self._console.print(message, markup=False)

    def sync(self) -> None:
        """Have the disk hold every row so far: a checkpoint must not be newer than its log."""
        os.fsync(self._file.fileno())

    def _write(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line(row))
        except OSError as error:
            raise Fault(
                f"{self._file.name}: {error}; make room, then run the same command again with --resume"
            ) from error

    def _show(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        left = _clock((self.steps - step) * self._seconds_per_step)
        state = f"{step}/{self.steps}  loss {row['total']:.4f}  {row['crops_per_second']:.1f} crops/s  {left} left"
        if self._bar:
            self._bar.update(self._shown, completed=step, state=state)
        elif step == self.steps or time.monotonic() - self._shown_at >= PLAIN_EVERY_S:
            self._shown_at = time.monotonic()
            self.say(f"{self.label} {state}")

    def _open_board(self, folder: Path, done: int) -> Any:
        try:
            # Here and not above: the import takes seconds, and everyone who only reads a log would pay them.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.say(f"no TensorBoard ({error}): curves go to log.jsonl only; `pip install tensorboard` mends it")
            return None
        return SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def _chart(self, step: int, scalars: Mapping[str, int | float]) -> None:
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


class Silence:
    """The journal of a rank that is not the first: it keeps and shows nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None: ...

    def step(self, row: Mapping[str, Any]) -> None: ...

    def validation(self, step: int, values: Mapping[str, int | float]) -> None: ...

    def say(self, message: str) -> None: ...

    def sync(self) -> None: ...


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, one a step. A last line cut short by an interruption is left out; DataFault for any other bad
    line."""
    if not path.is_file():
        raise DataFault(f"{path}: no such log; give the folder of a run")
    lines = path.read_bytes().split(b"\n")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("a row needs a step")
        except ValueError as error:
            if number == len(lines):  # no line end follows it
                break
            raise DataFault(f"{path}: line {number} is no row of a log ({error}); remove it by hand") from error
        rows.setdefault(row["step"], {}).update(row)
    return list(rows.values())


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(_finite(row), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
