"""Which runs are set against which: sides by what they began with and learned by, pairs by seed, draw and fold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dagman.evaluation.folds import fold_of
from dagman.evaluation.ways_of_learning import BEGUN
from spade3d.faults import DataFault, UsageFault

SCRATCH = "from scratch"
_NOTHING = "nothing"  # of a key that one of two trees does not have
FINISHED = "summary.json"  # of a run: what says that it was judged


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
    """side -> pair -> run, pairs in order of seed, draw and fold, the reference first: the one side from scratch, else
    the side of the first run. `names`: the side of each run."""
    sides: dict[str, dict[str, Path]] = defaultdict(dict)
    pairs = pairs_of(summaries)
    for run in summaries:
        side, pair = names[run], pairs[run]
        if pair in sides[side]:
            raise UsageFault(f"{run} and {sides[side][pair]}: both are {side} with {pair}; give one of each")
        sides[side][pair] = run
    if len(sides) < 2:
        raise UsageFault(
            f"all runs are {next(iter(sides))}; to compare, give runs that began with "
            "another encoder, or that learned by other settings"
        )
    scratch = {names[run] for run, summary in summaries.items() if not summary["coverage"]}
    first = scratch.pop() if len(scratch) == 1 else next(iter(sides))
    order = {pairs[run]: (said["seed"], said.get("draw") or 0, fold_of(said) or 0) for run, said in summaries.items()}
    for side, of in sides.items():
        lone = sorted(of.keys() ^ sides[first].keys(), key=lambda pair: (order[pair], pair))
        if lone:
            there, missing = (side, first) if lone[0] in of else (first, side)
            raise UsageFault(
                f"{there} was run with {lone[0]}, {missing} was not ({len(lone)} runs without a partner); run both "
                "with the same seeds, draws and folds"
            )
    in_turn = [first, *(side for side in sides if side != first)]
    return {side: {pair: sides[side][pair] for pair in sorted(sides[side], key=order.__getitem__)} for side in in_turn}


def beginnings(summaries: Mapping[Path, Mapping]) -> dict[Path, str]:
    """What the encoder of each run began as, in the words of `side_of`.

    Encoders that were pretrained anew for each fold, as they must be lest they see its judges, are one, by recipe and
    settings: those that learned from other scans in each fold. By the name of the file where it says nothing.
    """
    names = {run: side_of(summary) for run, summary in summaries.items()}
    folds: dict[str, set[int | None]] = defaultdict(set)
    for run, name in names.items():
        folds[name].add(fold_of(summaries[run]))
    every = set().union(*folds.values())
    some = {run: _of_each_fold(summaries[run]) for run, name in names.items() if folds[name] != every}
    of = {one: {names[run] for run in some if some[run] == one} for one in some.values()}
    scans = {one: [_scans(summaries[run]) for run in some if some[run] == one] for one in of}
    anew = {one for one, marks in scans.items() if len(of[one]) > 1 and (None in marks or len({*marks}) > 1)}
    return names | {run: one for run, one in some.items() if one in anew}


def _scans(summary: Mapping) -> str | None:
    """The mark of the scans that an encoder learned from; None where it does not say."""
    return ((summary["coverage"] or {}).get("run") or {}).get("scans")


def _of_each_fold(summary: Mapping) -> str:
    if not summary["coverage"]:
        return SCRATCH
    run = summary["coverage"].get("run")
    if not run:
        return f"from {Path(summary['coverage']['source']).name}, one for each fold"
    return f"pretrained ({run['recipe']} {run['settings']}, one for each fold)"


def side_of(summary: Mapping) -> str:
    """What a run's encoder began as: recipe, settings and scans, whatever the seed; the file where it does not say."""
    if not summary["coverage"]:
        return SCRATCH
    run = summary["coverage"].get("run")
    if not run:
        return f"from {summary['coverage']['source']}"
    scans = f" on {run['scans']}" if "scans" in run else ""  # encoders of before say nothing of them
    return f"pretrained ({run['recipe']} {run['settings']}{scans})"


def pairs_of(summaries: Mapping[Path, Mapping]) -> dict[Path, str]:
    """Which runs of two sides belong together: what each says ("seed 0, draw 2"), else its seed; and its fold, where
    the runs are of several."""
    several = len({fold_of(summary) for summary in summaries.values()}) > 1
    pairs = {}
    for run, summary in summaries.items():
        pair, fold = str(summary.get("pair", f"seed {summary['seed']}")), fold_of(summary)
        pairs[run] = f"{pair}, fold {fold}" if several and fold is not None else pair
    return pairs


def first_difference(one: object, other: object) -> str:
    """What two values differ in, for people; of two trees the first leaf: "judging.tolerance_mm: 10.0 and 5.0"."""
    where: list[str] = []
    while isinstance(one, Mapping) and isinstance(other, Mapping):
        key = next(key for key in one | other if one.get(key, _NOTHING) != other.get(key, _NOTHING))
        where.append(f"{key}")
        one, other = one.get(key, _NOTHING), other.get(key, _NOTHING)
    return ": ".join(filter(None, (".".join(where), f"{one} and {other}")))
