"""The clock of the speed benchmarks: every contender has its rounds; what contenders return is compared before they are
called again."""

import os
import subprocess
import sys
from pathlib import Path

SPEED = Path(__file__).resolve().parents[1] / "benchmarks" / "speed"
TRIED = """
import rounds
for of in rounds.timed({"one": lambda number: sum(range(1000)), "other": lambda number: None}, rounds=3).values():
    print(of.rounds, of.spread > 0, of.median > 0)
"""
COUNTED = """
import rounds
calls = []
rounds.SLOW_S = 0.0
print(rounds.timed({"one": lambda number: calls.append(sum(range(100_000)))}, rounds=4)["one"].rounds, len(calls))
"""
COMPARED = """
import rounds
calls = []
def differ(answers):
    assert calls == [0] and answers == {"one": "answer"}
    raise SystemExit("they differ")
rounds.timed({"one": lambda number: calls.append(number) or "answer"}, rounds=4, agree=differ)
"""


def test_a_table_takes_the_rounds_that_are_asked_for():
    assert said_by(TRIED) == ["3 True True"] * 2


def test_the_first_call_of_what_takes_long_is_one_of_its_rounds():
    assert said_by(COUNTED) == ["4 4"]


def test_nothing_is_called_again_before_its_answer_was_compared():
    assert said_by(COMPARED, fails_with="they differ") == []


def said_by(program: str, *, fails_with: str = "", **settings: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SPEED), **settings},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == bool(fails_with) and fails_with in done.stderr, done.stderr[-2000:]
    return done.stdout.splitlines()
