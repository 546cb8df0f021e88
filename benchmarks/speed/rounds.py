"""Interleaved rounds: contenders take turns on the same input, so that a busy machine slows all of them alike.

What counts is the CPU time of this process (one thread for everybody), which waiting for a busy core does not add to;
caches and memory are still shared, hence the turns, the medians and the spread. Trust the ratios, not the seconds.

malloc is told to keep what is freed. By default it gives large arrays back at once, and the kernel clears their pages
anew for every call: of the others 72 % of the time in `selection.py` (MONAI 279 ms instead of 77), half of it in
`correspondences.py`, none in `views.py`. The ratios without this would be 3.6 and 2 times as high; they say little.

Scripts whose goals were set with malloc as users have it time that, too, in a process of its own (`as_users_have_it`).

A first call of each compiles, and fills caches and what the allocator keeps. It does not count, but of what takes more
than a second: there it is one of the rounds, which a median of seven forgives. SPEED_ALLOCATOR=system leaves malloc as
users have it.
"""

import ctypes
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from spade3d.provenance import write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROUNDS = 7
SLOW_S = 1.0  # what takes so long at first is not called once more before the rounds
LEAST_S = 0.005  # what is faster is repeated within its turn, until the clock's grain no longer shows

torch.set_num_threads(1)
if platform.libc_ver()[0] == "glibc" and os.environ.get("SPEED_ALLOCATOR") != "system":
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**30)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass(frozen=True)
class Timing:
    """CPU seconds of one call."""

    median: float
    spread: float  # the middle half of the rounds, as a share of the median
    rounds: int

    def times(self, factor: float) -> "Timing":
        """Of a whole, of which only one part in `factor` was run."""
        return Timing(self.median * factor, self.spread, self.rounds)


def most_held_mib() -> int:
    """The most memory that this program held. `resource.getrusage` would say that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def timed(
    contenders: Mapping[str, Callable[[int], Any]],
    rounds: int = ROUNDS,
    agree: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Timing]:
    """Time each contender, a function of the number of the round, in turns; the one that begins changes by rounds.
    `agree` is given what each of them returned first, and raises before they are called again."""
    names, answers, first = list(contenders), {}, {}
    for name in names:
        begun = time.process_time()
        answer = contenders[name](0)
        first[name] = time.process_time() - begun
        if agree is not None:
            answers[name] = answer
        del answer
    if agree is not None:
        agree(answers)
        del answers
    seconds = {name: [first[name]] if first[name] > SLOW_S else [] for name in names}
    repeats = {name: 1 if seconds[name] else _repeats(contenders[name]) for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if len(seconds[name]) < rounds:
                seconds[name].append(_called(contenders[name], number, repeats[name]))
    return {name: _timing(of) for name, of in seconds.items()}


def _called(contender: Callable[[int], Any], number: int = 0, repeats: int = 1) -> float:
    """CPU seconds of a call."""
    begun = time.process_time()
    for _ in range(repeats):
        contender(number)
    return (time.process_time() - begun) / repeats


def _repeats(contender: Callable[[int], Any]) -> int:
    """How often to call within a turn; the first call warmed caches and compiled what is compiled."""
    begun = time.process_time()
    for count in itertools.count(1):
        contender(0)
        if time.process_time() - begun >= LEAST_S:
            return count


def _timing(seconds: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(middle, (high - low) / middle, len(seconds))


def machine(packages: tuple[str, ...]) -> dict[str, Any]:
    """The machine, what one of its cores can do at most, and the versions of what was run."""
    here, there = np.ones(2**25, np.float32), np.ones(2**25, np.float32)
    a = torch.ones(1024, 1024)
    limits = timed({"copy": lambda _: np.copyto(there, here), "gemm": lambda _: a @ a})
    model = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "copy_gb_per_s": round(2 * here.nbytes / limits["copy"].median / 1e9, 1),
        "gemm_fp32_gflop_per_s": round(2 * 1024**3 / limits["gemm"].median / 1e9, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def as_users_have_it(script: str, *arguments: str) -> Any:
    """What a script, with these arguments, prints last, from JSON: in a process of its own, malloc left as it is."""
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    done = subprocess.run(command, env=os.environ | {"SPEED_ALLOCATOR": "system"}, stdout=subprocess.PIPE, check=True)
    *before, last = done.stdout.decode().splitlines()
    print("\n".join(before))
    return json.loads(last)


def tabled(title: str, timings: Mapping[str, Timing], moved_bytes: float, of: dict[str, Any]) -> list[dict[str, Any]]:
    """Print one table, the first contender as unit, and return its rows for the JSON.

    The share of the limit is the time that copying `moved_bytes` (what has to be read and written at least) takes,
    over the time taken.
    """
    ours, copied = next(iter(timings.values())).median, moved_bytes / (of["copy_gb_per_s"] * 1e9)
    table = Table("", "ms", "spread", "ours is faster by", "of the limit", title=title, title_justify="left")
    rows = []
    for name, timing in timings.items():
        ratio, share = timing.median / ours, copied / timing.median
        rows.append(
            {
                "who": name,
                "ms": float(f"{timing.median * 1e3:.4g}"),
                "spread": round(timing.spread, 3),
                "rounds": timing.rounds,
                "ratio": float(f"{ratio:.4g}"),
                "share_of_copy": float(f"{share:.3g}"),
            }
        )
        table.add_row(name, f"{timing.median * 1e3:.4g}", f"{timing.spread:.0%}", f"{ratio:.4g}", f"{share:.2%}")
    Console(width=110).print(table)
    return rows


def written(name: str, what: dict[str, Any]) -> None:
    """Write one JSON to benchmarks/results."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", what)
