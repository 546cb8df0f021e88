"""The clock of the speed benchmarks: a script may be tried with one round."""

import os
import subprocess
import sys
from pathlib import Path

SPEED = Path(__file__).resolve().parents[1] / "benchmarks" / "speed"
TRIED = """
from rounds import timed
for rounds in timed({"one": lambda number: sum(range(1000)), "other": lambda number: None}).values():
    print(rounds.rounds, rounds.spread, rounds.median > 0)
"""


def test_one_round_is_a_timing_without_spread():
    done = subprocess.run(
        [sys.executable, "-c", TRIED],
        env={**os.environ, "SPEED_ROUNDS": "1", "PYTHONPATH": str(SPEED)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["1 0.0 True"] * 2
