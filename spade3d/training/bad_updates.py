"""Updates that were not made because a loss or the gradient was not finite: what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from spade3d.training.saves import Saves


def not_finite(losses: Mapping[str, float], step: int, skipped: int, saves: Saves, scans: Sequence[str]) -> str:
    """Why a run stops at `step`, after `skipped` such updates in a row: which terms, which weights are good, whose
    batch, and what to do."""
    return (
        f"{unmade(losses, step, skipped)}; {_good(saves, step - skipped)}; the last batch was of {', '.join(scans)}: "
        "look at these scans, lower --optim.lr, or leave more updates out with --skip-bad-batches N"
    )


def came_apart(losses: Mapping[str, float], step: int, skipped: int, saves: Saves, tried: int) -> str:
    """Why nothing is handed on of a run that ended in such updates, after `tried` batches more."""
    return (
        f"{unmade(losses, step, skipped)}, the last, and of {tried} batches more none gives a finite loss: the run has "
        f"come apart, and hands nothing on; {_good(saves, step - skipped)}; lower --optim.lr and begin again"
    )


def unmade(losses: Mapping[str, float], step: int, skipped: int) -> str:
    """Which terms were not finite, and in which steps."""
    terms = " and ".join(name for name, value in losses.items() if not math.isfinite(value)) or "the gradient"
    when = f"step {step}" if skipped == 1 else f"{skipped} steps in a row, {step - skipped + 1} to {step}"
    return f"{terms} not finite in {when}"


def _good(saves: Saves, made: int) -> str:
    """Which weights are good, as far as that is known: that an update is made says that the weights before it gave a
    finite loss, and nothing of those that it leaves."""
    if made == 0:
        return "no update was made"
    proven, unproven = saves.good(made)
    said = f"the last weights saved that gave a finite loss are in {proven}" if proven else "no save is older"
    return f"{said}; those of step {made}, the last update made, are in {unproven} and gave none" if unproven else said
