"""Comparison of fine-tuning runs: sides by their encoder, pairs by case and seed, nothing compared that differs else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dagman.evaluation.report import comparison_report
from dagman.evaluation.scores import read_summary
from dagman.evaluation.statistics import paired_comparison, read_cases, values_by_subject
from spade3d.faults import DataFault, UsageFault
from spade3d.provenance import write_json

SCRATCH = "from scratch"


def compare_runs(runs: Sequence[Path], out: Path) -> dict:
    """Write OUT/comparison.json and OUT/report.html; returns the headline numbers of candidate minus reference.

    Raises DataFault where protocol, labels or cases differ, UsageFault where there are not exactly two sides.
    """
    summaries = {run: read_summary(run) for run in runs}
    check_protocols(summaries)
    sides: dict[str, list[Path]] = defaultdict(list)
    for run, summary in summaries.items():
        sides[side_of(summary)].append(run)
    if len(sides) != 2:
        raise UsageFault(
            f"{len(sides)} sides ({'; '.join(sides)}); two are needed, told apart by the encoder they began with: "
            "compare a run with --init and one without"
        )
    reference = SCRATCH if SCRATCH in sides else next(iter(sides))
    candidate = next(side for side in sides if side != reference)
    rows = {side: seeded_rows(sides[side], summaries) for side in (reference, candidate)}
    found = paired_comparison(rows[reference], rows[candidate])
    result = {
        "candidate": candidate,
        "reference": reference,
        "runs": {side: [str(run) for run in sides[side]] for side in sides},
        "seeds": sorted({summaries[run]["seed"] for run in runs}),
        "notes": [one.note for one in found[:1] if one.note],
        "rows": [
            {
                "name": one.name,
                "differences": differences(rows[reference], rows[candidate], one.class_),
                "candidate": one.mean_b,
                "reference": one.mean_a,
                "mean": one.difference,
                "interval": None if one.low != one.low else [one.low, one.high],
                "p_value": None if one.p != one.p else one.p,
                "p_holm": None if one.p_holm != one.p_holm else one.p_holm,
                "wins": one.wins,
                "ties": one.ties,
                "losses": one.losses,
                "cases": len({row["case"] for row in rows[reference]}),
                "subjects": one.subjects,
                "note": one.note,
            }
            for one in found
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "comparison" if (out / "summary.json").exists() else out  # a run keeps its own report
    folder.mkdir(exist_ok=True)
    write_json(folder / "comparison.json", result)
    report = comparison_report(folder, result, list(runs))
    whole = result["rows"][0]
    return {
        "candidate": f"{candidate}: {whole['candidate']:.4f}",
        "reference": f"{reference}: {whole['reference']:.4f}",
        "difference": whole["mean"],
        "interval": whole["interval"],
        "p_value": whole["p_value"],
        "cases": whole["cases"],
        "subjects": whole["subjects"],
        "report": str(report),
    }


def side_of(summary: dict) -> str:
    """What a run's encoder began as."""
    return f"encoder {summary['coverage']['source']}" if summary["coverage"] else SCRATCH


def check_protocols(summaries: dict[Path, dict]) -> None:
    """Only the encoder may differ: same protocol, same number of labels, same judges."""
    (first, said), *others = summaries.items()
    for run, summary in others:
        for key in ("protocol", "labels"):
            if summary[key] != said[key]:
                other = _first_difference(said[key], summary[key])
                raise DataFault(f"{run}: another {key} than {first} ({other}); compare runs that share it")
        if summary["split"]["validation"] != said["split"]["validation"]:
            raise DataFault(f"{run}: judged on other subjects than {first}; compare runs of one --fold and one dataset")


def _first_difference(one, other) -> str:
    if not isinstance(one, dict):
        return f"{one} and {other}"
    key = next(key for key in one | other if one.get(key) != other.get(key))
    return f"{key}: {one.get(key)} and {other.get(key)}"


def seeded_rows(runs: Sequence[Path], summaries: dict[Path, dict]) -> list[dict]:
    """The rows of several runs of one side, each with the seed of its run."""
    return [row | {"seed": summaries[run]["seed"]} for run in runs for row in read_cases(run / "cases.csv")]


def differences(reference: Sequence[dict], candidate: Sequence[dict], of_class: int | None) -> list[float]:
    """Candidate minus reference in Dice, one for each case and seed in which both have a value."""
    found = []
    keys = sorted({(row["seed"], row["case"]) for row in reference})
    by_key = [_by_key(rows) for rows in (reference, candidate)]
    for key in keys:
        pair = []
        for rows in by_key:
            of = values_by_subject(rows[key], "dice", of_class)
            pair.append(next(iter(of.values()))[0] if of else float("nan"))
        if pair[0] == pair[0] and pair[1] == pair[1]:
            found.append(pair[1] - pair[0])
    return found


def _by_key(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    keyed = defaultdict(list)
    for row in rows:
        keyed[row["seed"], row["case"]].append(row)
    return keyed
