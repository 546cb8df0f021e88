"""Comparison of fine-tuning runs: sides by their encoder, pairs by case, seed and draw; all else must be the same."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dagman.evaluation.comparison_tables import METRIC_NAMES, as_csv, as_latex, as_markdown, signed
from dagman.evaluation.report import comparison_report
from dagman.evaluation.scores import read_rows, read_summary
from dagman.evaluation.statistics import COMPARABLE, Comparison, Row, adjusted_over_sides, paired_comparison
from spade3d import console
from spade3d.faults import DataFault, UsageFault
from spade3d.provenance import write_json, write_text

SCRATCH = "from scratch"
BEGUN, FINISHED = "config.yaml", "summary.json"  # of a run: what it writes first, and what says that it was judged


def compare_runs(runs: Sequence[Path], out: Path, metric: str = "dice") -> dict:
    """Write OUT/comparison.json, .csv, .md, .tex and OUT/report.html; returns the headline numbers of each side minus
    the reference.

    `runs`: folders of runs, or of several runs each (`runs_in`). The reference is the side from scratch, else the side
    of the first run. `metric`, one of COMPARABLE, is what the report is about; the CSV has every metric that all runs
    have. Raises DataFault where protocol, labels, judges or cases differ, UsageFault where there is one side only or
    the sides were not run with the same seeds and draws.
    """
    summaries = {run: read_summary(run) for run in runs_in(runs)}
    if len(summaries) < 2:
        raise UsageFault(f"{len(summaries)} runs given; a comparison needs at least two")
    check_protocols(summaries)
    sides = sides_of(summaries)
    reference, *others = sides
    rows = {side: _rows_of(of) for side, of in sides.items()}
    by_metric = {one: _compared(rows, one) for one in COMPARABLE if one == metric or _all_have(rows, one)}
    found = by_metric[metric]
    console.results_folder(out)
    result = {
        "metric": metric,
        "reference": reference,
        "protocol": next(iter(summaries.values()))["protocol"],
        "labels": next(iter(summaries.values()))["labels"],
        "runs": {side: {pair: str(run) for pair, run in of.items()} for side, of in sides.items()},
        "comparisons": _as_json(found),
        "other_metrics": {one: _as_json(of) for one, of in by_metric.items() if one != metric},
    }
    write_json(out / "comparison.json", result)
    write_text(out / "comparison.csv", as_csv(reference, by_metric))
    write_text(out / "comparison.md", as_markdown(reference, metric, by_metric))
    write_text(out / "comparison.tex", as_latex(reference, found))
    report = comparison_report(out, found, {side: list(of.values()) for side, of in sides.items()})
    return {
        "reference": reference,
        **{f"{side}, against it": _headline(found[side][0]) for side in others},
        "report": str(report),
        "tables": ", ".join(str(out / f"comparison.{kind}") for kind in ("csv", "md", "tex")),
    }


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


def sides_of(summaries: Mapping[Path, Mapping]) -> dict[str, dict[str, Path]]:
    """side -> pair -> run, pairs in order of seed and draw, the reference first."""
    sides: dict[str, dict[str, Path]] = defaultdict(dict)
    for run, summary in summaries.items():
        side, pair = side_of(summary), pair_of(summary)
        if pair in sides[side]:
            raise UsageFault(f"{run} and {sides[side][pair]}: both are {side} with {pair}; give one of each")
        sides[side][pair] = run
    if len(sides) < 2:
        raise UsageFault(f"all runs are {next(iter(sides))}; to compare, give runs that began with another encoder")
    first = SCRATCH if SCRATCH in sides else next(iter(sides))
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


def check_protocols(summaries: Mapping[Path, Mapping]) -> None:
    """Only the encoder may differ: same protocol, same number of labels, same judges, same learning subjects a pair."""
    (first, said), *others = summaries.items()
    learned = {pair_of(summary): (run, summary["split"]["train"]) for run, summary in summaries.items()}
    for run, summary in others:
        for key in ("protocol", "labels"):
            if summary[key] != said[key]:
                other = _first_difference(said[key], summary[key])
                raise DataFault(f"{run}: another {key} than {first} ({other}); compare runs that share it")
        if summary["split"]["validation"] != said["split"]["validation"]:
            raise DataFault(f"{run}: judged on other subjects than {first}; compare runs of one --fold and one dataset")
    for run, summary in summaries.items():
        twin, subjects = learned[pair_of(summary)]
        if summary["split"]["train"] != subjects:
            raise DataFault(f"{run}: learned from other subjects than {twin}, with the same seed; run both anew")


def _rows_of(runs: Mapping[str, Path]) -> list[Row]:
    return [row | {"pair": pair} for pair, run in runs.items() for row in read_rows(run)]


def _all_have(rows: Mapping[str, Sequence[Row]], metric: str) -> bool:
    return all(metric in row for of in rows.values() for row in of)


def _compared(rows: Mapping[str, Sequence[Row]], metric: str) -> dict[str, list[Comparison]]:
    reference, *others = rows
    return adjusted_over_sides({side: paired_comparison(rows[reference], rows[side], metric=metric) for side in others})


def _first_difference(one: object, other: object) -> str:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{one} and {other}"
    key = next(key for key in one | other if one.get(key) != other.get(key))
    return f"{key}: {one.get(key)} and {other.get(key)}"


def _headline(whole: Comparison) -> str:
    sure = "" if math.isnan(whole.low) else f" [{whole.low:+.4f}, {whole.high:+.4f}]"
    adjusted = "" if whole.p_holm == whole.p or math.isnan(whole.p) else f" ({whole.p_holm:.3g} over the sides)"
    said = (
        f"{signed(whole.difference, 4)}{sure} {METRIC_NAMES[whole.metric]} ({whole.mean_b:.4f} against "
        f"{whole.mean_a:.4f}), p {whole.p:.3g}{adjusted}, {whole.wins} better, {whole.ties} equal, {whole.losses} "
        f"worse, {whole.pairs} pairs of {whole.subjects} subjects"
    )
    return f"{said}; {whole.note}" if whole.note else said


def _as_json(found: Mapping[str, Sequence[Comparison]]) -> dict[str, list[dict]]:
    return {side: [_plain(asdict(one)) for one in of] for side, of in found.items()}


def _plain(values: dict) -> dict:
    """JSON has no NaN."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}
