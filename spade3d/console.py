"""How every command begins and ends: options before heavy imports, one message for a fault, the promised exit codes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import App, CoercionError, CycloptsError, MissingArgumentError, Parameter
from cyclopts import ValidationError as BadValue
from pydantic import ValidationError

from spade3d import __version__
from spade3d.claim import CLAIM, held
from spade3d.configuration import Settings, encoder_of_run, explain, spelled_out
from spade3d.faults import PREEMPTED, UNFINISHED, DataFault, Fault, Preempted, UsageFault

# OpenMP threads that wait by spinning turn one busy neighbour into a standstill: with two threads on two cores, one of
# them kept busy by another program, a training step took 26 to 50 s instead of 1.6. Never spinning costs 45 % on a
# quiet machine, 2,000 rounds cost 5 %. libgomp reads this when torch is imported, which happens later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def command_line(name: str, help_text: str) -> App:
    """An empty command; its options come from the function that is registered as its default."""
    no_empty = Parameter(negative_iterable=())  # or every range would also have a switch --empty-RANGE
    return App(
        name=name,
        help=help_text,
        version=__version__,
        help_format="plaintext",
        default_parameter=no_empty,
        suppress_keyboard_interrupt=False,  # `run` answers it
    )


def run(app: App, tokens: list[str], tree: type[Settings] | None = None) -> int:
    """Run a command and return its exit code; a fault becomes one line on standard error.

    An error that nobody foresaw keeps its traceback and ends with 1: it is ours, and a report needs it.
    """
    usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        app(spelled_out(tokens), exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _say(app, UsageFault(_bad_option(error, tree)))
    except (Fault, Preempted) as fault:
        return _say(app, fault)
    except KeyboardInterrupt as stopped:
        print(f"{app.name[0]}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual
    return 0


def _say(app: App, fault: Fault | Preempted) -> int:
    if not fault.said:
        print(f"{app.name[0]}: {' '.join(str(fault).split())}", file=sys.stderr)
    return fault.exit_code


def _bad_option(error: CycloptsError, tree: type[Settings] | None) -> str:
    cause = error.__cause__
    if isinstance(error, BadValue) and isinstance(cause, ValidationError) and tree is not None:
        return "; ".join(explain(tree, problem, {}) for problem in cause.errors()).replace("configuration: ", "--")
    said = " ".join(str(error).split())
    needed = _in_words(error.argument.hint) if isinstance(error, CoercionError | MissingArgumentError) else ""
    if "number" in needed:  # a wrong choice among words is told well
        told = [token for token in error.argument.tokens if token.keyword]
        option = getattr(error, "keyword", None) or (told[0].keyword if told else error.argument.name)
        given = [token.value for token in told]
        if option in (line := error.root_input_tokens or []):  # what is no value of the type is not among its tokens
            given = list(takewhile(lambda token: not token.startswith("--"), line[line.index(option) + 1 :]))
        said = f"{option}: {' '.join(given) or 'nothing'} given; it takes {needed}"
    return f"{said} (--help lists the options)"


def _in_words(hint: Any) -> str:
    """The numbers, or the words in their place, that an option takes; nothing of an option that takes others."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _in_words(parts[0])
    if kind is Literal:
        return " or ".join(map(str, parts))
    if kind in (Union, UnionType):
        told = [_in_words(part) for part in parts if part is not NoneType]
        return ", or ".join(told) if all(told) else ""
    if kind is tuple and Ellipsis not in parts and len({_in_words(part) for part in parts}) == 1:
        one = _in_words(parts[0]).removeprefix("a ")
        return f"{len(parts)} {one}s" if one else ""
    return {int: "a whole number", float: "a number"}.get(hint, "")


def existing(path: Path, what: str) -> Path:
    """The path, if there is something; DataFault otherwise."""
    if not os.path.lexists(path):
        raise DataFault(f"{path}: no such file or folder; {what} is needed")
    return path


def checkpoint(path: Path) -> Path:
    """The file of a checkpoint: in the folder of a run its encoder. DataFault if nothing is there."""
    return Path(encoder_of_run(str(existing(path, "a checkpoint, such as RUN/encoder.safetensors,"))))


@contextmanager
def fresh_folder(out: Path, holds: str) -> Iterator[Path]:
    """A folder for a new run, which has begun once it holds the file `holds`. Refused when it has, is not empty, or is
    another's who lives.

    Whatever goes wrong before leaves nothing behind. Where the process was preempted, or killed and could not clean up,
    UNFINISHED tells that what lies there never began to run: it may be begun again, and takes up what was prepared. The
    claim (claim.py) tells it from one that is still preparing: that one is left alone.
    """
    begun = DataFault(f"{out}: already holds a run; give another --out, or continue this one with --resume")
    if (out / holds).exists():
        raise begun
    if out.exists() and not out.is_dir():
        raise DataFault(f"{out}: is a file; --out needs a folder, new or empty")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            entries = [entry.name for entry in out.iterdir()]
            if entries and UNFINISHED not in entries:
                raise DataFault(f"{out}: is not empty ({len(entries)} entries); give a new or an empty --out")
            (out / UNFINISHED).touch()
            (out / PREEMPTED).unlink(missing_ok=True)
        except OSError as error:
            raise DataFault(f"{out}: cannot be written ({error.strerror}); give another --out") from error
        with held(out, lambda who: print(who, file=sys.stderr, flush=True)) as still_ours:
            if (out / holds).exists():  # by another process, while this one waited for it
                (out / UNFINISHED).unlink(missing_ok=True)
                raise begun
            try:
                yield out
                still_ours()
            except Preempted:  # what was prepared is taken up again
                raise
            except BaseException:
                if not (out / holds).exists():
                    still_ours()  # what lies there may be another's by now
                    _empty(out)
                raise
            (out / UNFINISHED).unlink()
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it is not empty, or not there
                folder.rmdir()
        raise


def _empty(out: Path) -> None:
    """Remove all of an unfinished run but the claim on it, and last the file that tells what it is."""
    entries = [entry for entry in out.iterdir() if entry.name not in (CLAIM, UNFINISHED)]
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
    (out / UNFINISHED).unlink(missing_ok=True)


def results_folder(out: Path) -> Path:
    """The folder of results, made where it is not there yet; DataFault where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataFault(f"{out}: no folder can be made there ({error.strerror}); give another --out") from error
    return out


def print_choice(title: str, rows: Mapping[str, Any]) -> None:
    """What was chosen, on standard error."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False, box=None)
    for key, value in rows.items():
        table.add_row(key, Text(str(value)))  # as it is: a subject may be called [b]
    Console(stderr=True).print(table)


def print_result(values: Mapping[str, Any], as_json: bool) -> None:
    """The result, on standard output: lines for people, one JSON object with --json."""
    if as_json:
        print(json.dumps(values))
    else:
        _print_lines(values, "")


def _print_lines(values: Mapping[str, Any], indent: str) -> None:
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        print(f"{indent}{key}:" if nested else f"{indent}{key}: {value}")
        if nested:
            _print_lines(value, f"{indent}  ")


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error with the time left; plain lines where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    about, name = (TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[name]"))
    columns = (about, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), name)
    if not console.is_terminal:
        yield (
            lambda done, total, name: (
                print(f"{what}: {done}/{total} {name}", file=sys.stderr) if _worth_a_line(done, total) else None
            )
        )
        return
    # Where results are piped on, rich would carry them to the terminal with the bar.
    with Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task(what, total=None, name="")
        yield lambda done, total, name: progress.update(task, completed=done, total=total, name=name)


def _worth_a_line(done: int, total: int) -> bool:
    """About ten lines for any number of things."""
    return done == total or done % max(1, total // 10) == 0
