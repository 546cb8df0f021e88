"""What an evaluated run says of itself: summary.json, read back and checked, and the cases worth a look."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from dagman.evaluation.cases_table import read_cases
from dagman.evaluation.pairs import Row, mean_of
from spade3d.faults import DataFault

# What every reader of a summary counts on, and what it must say about subjects on both sides of a split.
_SUMMARY = frozenset({"mean_dice", "mean_dice_interval", "mean_hd95_mm", "mean_nsd", "protocol", "coverage", "split"})
_STUDIES = frozenset(
    {"macro_auroc", "macro_auroc_interval", "macro_ap", "per_finding", "undefined", "task", "localisation"}
) | {"taught", "labels", "seed", "fold", "protocol", "coverage", "split"}
_LEAKAGE = frozenset({"validation_in_training", "validation_in_pretraining", "pretraining"})


def read_summary(run: Path) -> dict:
    """RUN/summary.json; DataFault when it is missing, damaged or incomplete."""
    path, summary = run / "summary.json", _said(run)
    if "macro_auroc" in summary:
        raise DataFault(f"{path}: of a run that classifies studies; give runs of segmentation, which have cases.csv")
    if missing := sorted((_SUMMARY - summary.keys()) | (_LEAKAGE - summary["leakage"].keys())):
        raise DataFault(f"{path}: no {', '.join(missing)}; evaluate the run again")
    return summary


def of_studies(run: Path) -> bool:
    """Whether a finished run is one of classification or localisation."""
    return "macro_auroc" in _said(run)


def read_study_summary(run: Path) -> dict:
    """RUN/summary.json of classification or localisation; DataFault when it is missing, damaged or incomplete."""
    path, summary = run / "summary.json", _said(run)
    if "macro_auroc" not in summary:
        raise DataFault(f"{path}: no macro_auroc; a run of classification or localisation is needed")
    if missing := sorted((_STUDIES - summary.keys()) | (_LEAKAGE - summary["leakage"].keys())):
        raise DataFault(f"{path}: no {', '.join(missing)}; judge the run again")
    return summary


def _said(run: Path) -> dict:
    path = run / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as broken:
        raise DataFault(f"{path}: cannot be read ({broken}); evaluate the run again") from broken
    if not isinstance(summary, dict) or not isinstance(summary.get("leakage"), dict):
        raise DataFault(f"{path}: no names and values with a `leakage` among them; evaluate the run again")
    return summary


def read_rows(run: Path) -> list[Row]:
    """RUN/cases.csv; DataFault when it cannot be read or holds no case."""
    rows = read_cases(run / "cases.csv")
    if not rows:
        raise DataFault(f"{run / 'cases.csv'}: no case was evaluated; a report needs at least one")
    return rows


def case_means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean Dice of each case over the structures that are defined in it, worst first; cases without one come last."""
    by_case: dict[str, list[float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row["dice"])
    means = {case: mean_of(values) for case, values in by_case.items()}
    return dict(sorted(means.items(), key=lambda item: (math.isnan(item[1]), item[1], item[0])))


def telling_cases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(case, "worst" | "median" | "best") by mean Dice: the cases to show, chosen by nobody's eye; fewer if there are
    fewer."""
    ranked = [case for case, dice in case_means(rows).items() if not math.isnan(dice)]
    if len(ranked) < 3:
        return list(zip(ranked, ("worst", "best") if len(ranked) == 2 else ("the only case",)))
    return [(ranked[0], "worst"), (ranked[len(ranked) // 2], "median"), (ranked[-1], "best")]
