"""The clock of the speed benchmarks: what takes long may be timed in fewer rounds, and is called no oftener."""

import os
import subprocess
import sys
from pathlib import Path

SPEED = Path(__file__).resolve().parents[1] / "benchmarks" / "speed"
TRIED = """
import rounds
rounds.SLOW_S = float({slow})
for of in rounds.timed({{"one": lambda number: sum(range(1000)), "other": lambda number: None}}, rounds=2).values():
    print(of.rounds, of.spread == 0, of.median > 0)
"""
COUNTED = """
import rounds
calls = []
rounds.SLOW_S, rounds.LONG_S = 0.0, float({long})
print(rounds.timed({{"one": lambda number: calls.append(sum(range(100_000)))}}, rounds=4)["one"].rounds, len(calls))
"""


def test_what_takes_long_may_be_timed_once_and_has_no_spread():
    assert said_by(TRIED.format(slow="0"), SPEED_ROUNDS="1") == ["1 True True"] * 2
    assert said_by(TRIED.format(slow="1e9"), SPEED_ROUNDS="1") == ["2 False True"] * 2


def test_what_takes_long_is_called_once_a_round_and_the_rest_once_more():
    assert said_by(COUNTED.format(long="0")) == ["4 4"]
    assert said_by(COUNTED.format(long="1e9")) == ["4 5"]


def said_by(program: str, **settings: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SPEED), **settings},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()
