"""Comparison of fine-tuning runs: sides by their encoder, pairs by case and seed; all else must be the same."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dagman.evaluation.report import comparison_report
from dagman.evaluation.scores import read_rows, read_summary
from dagman.evaluation.statistics import paired_comparison
from spade3d import console
from spade3d.faults import DataFault, UsageFault
from spade3d.provenance import write_json

SCRATCH = "from scratch"


def compare_runs(runs: Sequence[Path], out: Path) -> dict:
    """Write OUT/comparison.json and OUT/report.html; returns the headline numbers of each side minus the reference.

    The reference is the side from scratch, else the side of the first run. Raises DataFault where protocol, labels,
    judges or cases differ, UsageFault where there is one side only or the sides were not run with the same seeds.
    """
    summaries = {run: read_summary(run) for run in runs}
    check_protocols(summaries)
    sides = sides_of(summaries)
    reference, *others = sides
    rows = {
        side: [row | {"seed": seed} for seed, run in of.items() for row in read_rows(run)] for side, of in sides.items()
    }
    found = {side: paired_comparison(rows[reference], rows[side]) for side in others}
    console.results_folder(out)
    result = {
        "reference": reference,
        "runs": {side: {str(seed): str(run) for seed, run in of.items()} for side, of in sides.items()},
        "comparisons": {side: [_plain(asdict(one)) for one in found[side]] for side in others},
    }
    write_json(out / "comparison.json", result)
    report = comparison_report(out, found, {side: list(of.values()) for side, of in sides.items()})
    return {
        "reference": reference,
        **{f"{side}, against it": _headline(found[side][0]) for side in others},
        "report": str(report),
    }


def sides_of(summaries: Mapping[Path, Mapping]) -> dict[str, dict[int, Path]]:
    """side -> seed -> run, seeds in order, the reference first."""
    sides: dict[str, dict[int, Path]] = defaultdict(dict)
    for run, summary in summaries.items():
        side, seed = side_of(summary), summary["seed"]
        if seed in sides[side]:
            raise UsageFault(f"{run} and {sides[side][seed]}: both are {side} with seed {seed}; give one of each seed")
        sides[side][seed] = run
    if len(sides) < 2:
        raise UsageFault(f"all runs are {next(iter(sides))}; to compare, give runs that began with another encoder")
    first = SCRATCH if SCRATCH in sides else next(iter(sides))
    seeds = sorted(sides[first])
    for side, of in sides.items():
        if sorted(of) != seeds:
            raise UsageFault(
                f"{side} was run with seeds {sorted(of)}, {first} with {seeds}; run both with the same seeds"
            )
    order = [first, *(side for side in sides if side != first)]
    return {side: {seed: sides[side][seed] for seed in seeds} for side in order}


def side_of(summary: Mapping) -> str:
    """What a run's encoder began as: recipe and settings, whatever the seed; the file where it does not say."""
    if not summary["coverage"]:
        return SCRATCH
    run = summary["coverage"].get("run")
    return f"pretrained ({run['recipe']} {run['settings']})" if run else f"from {summary['coverage']['source']}"


def check_protocols(summaries: Mapping[Path, Mapping]) -> None:
    """Only the encoder may differ: same protocol, same number of labels, same judges, same learning subjects a seed."""
    (first, said), *others = summaries.items()
    learned = {summary["seed"]: (run, summary["split"]["train"]) for run, summary in summaries.items()}
    for run, summary in others:
        for key in ("protocol", "labels"):
            if summary[key] != said[key]:
                other = _first_difference(said[key], summary[key])
                raise DataFault(f"{run}: another {key} than {first} ({other}); compare runs that share it")
        if summary["split"]["validation"] != said["split"]["validation"]:
            raise DataFault(f"{run}: judged on other subjects than {first}; compare runs of one --fold and one dataset")
    for run, summary in summaries.items():
        twin, subjects = learned[summary["seed"]]
        if summary["split"]["train"] != subjects:
            raise DataFault(f"{run}: learned from other subjects than {twin}, with the same seed; run both anew")


def _first_difference(one: object, other: object) -> str:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{one} and {other}"
    key = next(key for key in one | other if one.get(key) != other.get(key))
    return f"{key}: {one.get(key)} and {other.get(key)}"


def _headline(whole) -> str:
    sure = "" if math.isnan(whole.low) else f" [{whole.low:+.4f}, {whole.high:+.4f}]"
    return (
        f"{whole.difference:+.4f}{sure} Dice ({whole.mean_b:.4f} against {whole.mean_a:.4f}), "
        f"p {whole.p:.3g}, {whole.pairs} pairs of {whole.subjects} subjects"
    )


def _plain(values: dict) -> dict:
    """JSON has no NaN."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}
