"""What a comparison leaves beside its report: comparison.json, .csv, .md and .tex; and its headline numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dagman.evaluation.comparison_leakage import SEEN, Leakage, judges_seen
from dagman.evaluation.comparison_tables import METRIC_NAMES, Found, as_csv, as_latex, as_markdown, signed
from dagman.evaluation.statistics import Comparison
from spade3d.provenance import write_json, write_text


def write_tables(
    out: Path,
    metric: str,
    by_metric: Mapping[str, Found],
    sides: Mapping[str, Mapping[str, Path]],
    leakage: Leakage,
    said: Mapping[str, object],
) -> None:
    """Write the four files into OUT. `sides`: side -> pair -> run, the reference first; `leakage`: as `leakage_of` has
    it; `said`: what comparison.json says of the protocol."""
    reference, found = next(iter(sides)), by_metric[metric]
    result = {
        "metric": metric,
        "reference": reference,
        **said,
        "leakage": {SEEN: judges_seen(leakage), "sides": leakage},
        "runs": {side: {pair: str(run) for pair, run in of.items()} for side, of in sides.items()},
        "comparisons": _as_json(found),
        "other_metrics": {one: _as_json(of) for one, of in by_metric.items() if one != metric},
    }
    write_json(out / "comparison.json", result)
    write_text(out / "comparison.csv", as_csv(reference, by_metric))
    write_text(out / "comparison.md", as_markdown(reference, metric, by_metric, (f"{SEEN}: {judges_seen(leakage)}",)))
    write_text(out / "comparison.tex", as_latex(reference, found))


def headlines(out: Path, reference: str, found: Found, leakage: Leakage, report: Path) -> dict[str, str]:
    """What the command prints: each side against the reference, what leaked, and where the rest stands."""
    return {
        "reference": reference,
        **{f"{side}, against it": _headline(whole) for side, (whole, *_) in found.items()},
        SEEN: judges_seen(leakage),
        "report": str(report),
        "tables": ", ".join(str(out / f"comparison.{kind}") for kind in ("csv", "md", "tex")),
    }


def _headline(whole: Comparison) -> str:
    sure = "" if math.isnan(whole.low) else f" [{whole.low:+.4f}, {whole.high:+.4f}]"
    adjusted = "" if whole.p_holm == whole.p or math.isnan(whole.p) else f" ({whole.p_holm:.3g} over the sides)"
    counted = "" if whole.wins is None else f"{whole.wins} better, {whole.ties} equal, {whole.losses} worse, "
    said = (
        f"{signed(whole.difference, 4)}{sure} {METRIC_NAMES[whole.metric]} ({whole.mean_b:.4f} against "
        f"{whole.mean_a:.4f}), p {whole.p:.3g}{adjusted}, {counted}{whole.pairs} pairs of {whole.subjects} subjects"
    )
    return f"{said}; {whole.note}" if whole.note else said


def _as_json(found: Mapping[str, Sequence[Comparison]]) -> dict[str, list[dict]]:
    return {side: [_plain(asdict(one)) for one in of] for side, of in found.items()}


def _plain(values: dict) -> dict:
    """JSON has no NaN."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}
