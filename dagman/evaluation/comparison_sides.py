"""Which runs are set against which: sides by what they began with, pairs by seed and draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from spade3d.faults import DataFault, UsageFault

SCRATCH = "from scratch"
BEGUN, FINISHED = "config.yaml", "summary.json"  # of a run: what it writes first, and what says that it was judged


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The finished runs that the folders are or hold, each once: OUT of one run, or OUT/* of a command with --draws,
    --seeds or --from-scratch-twin. DataFault where there is none, and where one of several is not finished.
    """
    runs: dict[Path, Path] = {}
    for folder in folders:
        if (folder / FINISHED).is_file():
            runs.setdefault(folder.resolve(), folder)
            continue
        begun = sorted(path.parent for path in folder.glob(f"*/{BEGUN}"))
        inside = sorted(path.parent for path in folder.glob(f"*/{FINISHED}"))
        if not inside:
            raise DataFault(f"{folder}: holds no finished run of dagman-finetune (no summary.json); finish it first")
        if unfinished := [run for run in begun if run not in inside]:
            raise DataFault(
                f"{unfinished[0]}: is not finished, as are {len(inside)} runs beside it; go on with --resume, "
                "or name the runs to be compared one by one"
            )
        for run in inside:
            runs.setdefault(run.resolve(), run)
    return list(runs.values())


def sides_of(summaries: Mapping[Path, Mapping], names: Mapping[Path, str]) -> dict[str, dict[str, Path]]:
    """side -> pair -> run, pairs in order of seed and draw, the reference first: the one side from scratch, else the
    side of the first run. `names`: the side of each run."""
    sides: dict[str, dict[str, Path]] = defaultdict(dict)
    for run, summary in summaries.items():
        side, pair = names[run], pair_of(summary)
        if pair in sides[side]:
            raise UsageFault(f"{run} and {sides[side][pair]}: both are {side} with {pair}; give one of each")
        sides[side][pair] = run
    if len(sides) < 2:
        raise UsageFault(
            f"all runs are {next(iter(sides))}; to compare, give runs that began with "
            "another encoder, or of studies that learned otherwise"
        )
    scratch = {names[run] for run, summary in summaries.items() if not summary["coverage"]}
    first = scratch.pop() if len(scratch) == 1 else next(iter(sides))
    pairs = {pair_of(said): (said["seed"], said.get("draw") or 0) for said in summaries.values()}
    for side, of in sides.items():
        lone = sorted(of.keys() ^ sides[first].keys(), key=lambda pair: (pairs[pair], pair))
        if lone:
            there, missing = (side, first) if lone[0] in of else (first, side)
            raise UsageFault(
                f"{there} was run with {lone[0]}, {missing} was not ({len(lone)} runs without a partner); run both "
                "with the same seeds and draws"
            )
    order = [first, *(side for side in sides if side != first)]
    return {side: {pair: sides[side][pair] for pair in sorted(sides[side], key=pairs.__getitem__)} for side in order}


def side_of(summary: Mapping) -> str:
    """What a run's encoder began as: recipe, settings and scans, whatever the seed; the file where it does not say."""
    if not summary["coverage"]:
        return SCRATCH
    run = summary["coverage"].get("run")
    if not run:
        return f"from {summary['coverage']['source']}"
    scans = f" on {run['scans']}" if "scans" in run else ""  # encoders of before say nothing of them
    return f"pretrained ({run['recipe']} {run['settings']}{scans})"


def pair_of(summary: Mapping) -> str:
    """Which runs of two sides belong together: what the run says ("seed 0, draw 2"), else its seed."""
    return str(summary.get("pair", f"seed {summary['seed']}"))


def first_difference(one: object, other: object) -> str:
    """What two values differ in, for people: of two mappings the first key that does."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{one} and {other}"
    key = next(key for key in one | other if one.get(key) != other.get(key))
    return f"{key}: {one.get(key)} and {other.get(key)}"
