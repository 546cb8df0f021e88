"""Values that were given and change nothing in a run: named before it begins, with the reason.

No fault: the arms of a study are given the same values, and those without a prior or without attention read fewer.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dagman.recipes.distillation_settings import DistillSettings
    from dagman.recipes.priors import PriorSettings
    from spade3d.configuration import Settings

Idle = dict[str, tuple[str, ...]]  # why -> the names of values that nothing reads


def note_idle(prior: PriorSettings, distill: DistillSettings, usual: DistillSettings) -> None:
    """One line on standard error for all given values that change nothing; none without any.

    distill, usual  chosen: as given, and where nothing but its variant and masking is given
    """
    said = given(prior, type(prior)(), "prior", idle_of_prior(prior))
    said |= given(distill, usual, "distill", idle_of_distillation(distill))
    if said:
        parts = [f"{', '.join(names)} ({why})" for why, names in said.items()]
        print(f"note: given, but without effect in this run: {'; '.join(parts)}", file=sys.stderr)


def given(settings: Settings, usual: Settings, group: str, idle: Idle) -> Idle:
    """Those of some values that differ from the usual ones, as written on the command line."""
    found = {
        why: tuple(f"{group}.{name}" for name in names if getattr(settings, name) != getattr(usual, name))
        for why, names in idle.items()
    }
    return {why: names for why, names in found.items() if names}


def idle_of_prior(prior: PriorSettings) -> Idle:
    """What is not read of how heads are guided."""
    if prior.source == "none":
        return {"prior.source is none": tuple(name for name, _ in prior)}
    idle: Idle = {}
    if prior.source not in ("atlas", "one_label"):
        idle["only prior.source atlas and one_label read it"] = ("likelihood", "sigma_mm")
    if prior.source != "atlas":
        idle["only prior.source atlas takes several labelled scans"] = ("labelled",)
    if prior.attachment == "semantic":
        idle["prior.attachment semantic reads the stage of distill.stage"] = ("stage",)
    return idle


def idle_of_distillation(distill: DistillSettings) -> Idle:
    """What is not read of what is masked and what the teacher sees."""
    idle: Idle = {}
    if distill.masking == "none":
        idle["distill.masking is none"] = ("ratio", "hint", "mask_token", "drop_hidden")
    if distill.masking in ("none", "random", "block"):
        idle["no mask follows attention"] = ("attention_from",)
    elif not distill.patch_dropout:
        idle["the teacher has one look, a clean one"] = ("attention_from",)
    if not distill.patch_dropout:
        idle["distill.patch_dropout is 0"] = ("dropped",)
    if not distill.semantic:
        idle["there is no semantic attention"] = ("semantic_blocks", "semantic_heads")
    return idle
