"""docs/results.md, made of what the studies beside this file wrote to benchmarks/results.

    python benchmarks/science/results.py

A study that has not been run is named. The numbers come from the files; what they say, and what they do not, a person
writes into NOTES once they are known.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import contrast
import distillation
import localisation
from arms import RESULTS
from few_shot import SAID

PAGE = RESULTS.parents[1] / "docs" / "results.md"

HEAD = """# What was found

Made by `benchmarks/science/results.py` from the files in `benchmarks/results`, not by hand; the words, seeds and steps
of every arm are in them, and [the log](log.md) tells how they came about, failures too. Everything here is small:
narrow networks and short runs on a CPU of two cores. It says what the parts do beside their controls at equal steps. It
says nothing of how far a long run on many scans gets.

Means are over seeds (and draws of labelled subjects); (a, b) are 95 % intervals over subjects, of a difference that is
paired by case, seed and draw. **Bold** differences are those whose interval does not hold 0, one by one: no correction
for how many there are.
"""

# Name of a result -> what it says.
NOTES = {
    "contrast_abdomen_ct": (
        "Positives by place are what helps: of clusters and of local features, and with shuffled correspondences "
        "neither is left. Retrieval and landmarks do not tell the arms apart; whole-crop contrast (MoCo) is better "
        "there, and much worse at the features of single places."
    ),
    "distillation_abdomen_ct": (
        "Each part alone helps clusters a little; that both together help more is not found at this length, and at "
        "retrieval and landmarks every arm is worse than no training."
    ),
    "localisation_abdomen_ct": (
        "Lumps that differ by texture alone are hardly found (16 %). The judges were seen twice on the way (the log "
        "says how); what mends was chosen on other scans."
    ),
}

ORGANS_AND_CHANCE = {
    "truth on cells": "the truth on cells of that size",
    "organ": "the true organ of the judged scan",
    "organ, its middle": "the true organ, highest in its middle",
    "grad-cam": "Grad-CAM of a linear head",
    "random": "chance",
    "centre": "the middle of the volume",
}
LOCALISED = ("pointing", "t_iou_0.3", "voxel_ap")
Rows = Iterator[list[str]]


def with_interval(of: Mapping[str, float], digits: int = 3) -> str:
    """A difference, bold where its interval does not hold 0."""
    difference, low, high = (f"{of[name]:+.{digits}f}" for name in ("difference", "low", "high"))
    clear = of["low"] > 0 or of["high"] < 0
    return f"{f'**{difference}**' if clear else difference} ({low}, {high})"


def few_shot(of: dict[str, Any]) -> Rows:
    """A row for each number of labelled subjects."""
    arms = list(of["words"])
    others = [arm for arm in arms if arm != of["control"]]
    names = {arm: SAID.get(arm, arm) for arm in arms}
    yield ["labelled subjects", names[of["control"]], *(name for arm in others for name in (names[arm], "gained"))]
    for labels, found in sorted(of["labels"].items(), key=lambda item: item[1]["subjects"]):
        said = f"{found['subjects']:g}" + (" (all)" if labels == "all" else "")
        cells = [said, f"{found['arms'][of['control']]['mean_dice']:.3f}"]
        for arm in others:
            one = found["arms"][arm]
            cells += [f"{one['mean_dice']:.3f}", with_interval(one["over_control"])]
        yield cells


def probed(headlines: Mapping[str, str]) -> Callable[[dict[str, Any]], Rows]:
    """A row for each arm: its probes, with what it gained over the control."""

    def rows(of: dict[str, Any]) -> Rows:
        dice = of.get("few_shot")
        yield ["arm", *headlines.values(), *(["Dice"] if dice else [])]
        for arm, found in of["probes"].items():
            gained = found.get("over_control", {})
            cells = [f"{arm} (control)" if arm == of["control"] else arm]
            for name in headlines:
                digits = 1 if name.endswith("_mm") else 3
                mean = f"{found['measures'][name]['mean']:.{digits}f}"
                cells.append(f"{mean}, {with_interval(gained[name], digits)}" if name in gained else mean)
            if dice:
                one = dice[arm]
                over = f", {with_interval(one['over_control'])}" if "over_control" in one else ""
                cells.append(f"{one['mean_dice']:.3f}{over}")
            yield cells

    return rows


def localised(of: dict[str, Any]) -> Rows:
    """A row for each arm and baseline: what the whole has more."""
    yield ["", "AUROC", *(localisation.HEADLINES[name] for name in LOCALISED)]
    for name, found in of["measures"].items():
        over = of["over_others"].get(name, {})
        auroc = of["macro_auroc"].get(name)
        cells = [ORGANS_AND_CHANCE.get(name, name), "" if auroc is None else f"{auroc:.3f}"]
        for measure in LOCALISED:
            mean = f"{found[measure]['mean']:.3f}"
            cells.append(f"{mean}, {with_interval(over[measure])}" if over else mean)
        yield cells


def frames(of: dict[str, Any]) -> Rows:
    """A row for each frame: median and 90th percentile of the distances in every set."""
    names = [one["frame"] for one in next(iter(of["sets"].values()))]
    yield ["frame", *of["sets"]]
    for n, name in enumerate(names):
        yield [name, *(f"{of[n]['median_mm']:.1f}, {of[n]['p90_mm']:.1f}" for of in of["sets"].values())]


Section = tuple[str, str, Callable[[dict[str, Any]], Rows], tuple[str, ...]]
SECTIONS: tuple[Section, ...] = (
    (
        "Dice against the number of labelled subjects",
        "`few_shot.py`. Differences are to the run from scratch with the same subjects, crops, steps and rate.",
        few_shot,
        ("few_shot_hippocampus_mr", "few_shot_heart_mr", "few_shot_abdomen_ct"),
    ),
    (
        "Spade and its controls",
        "`contrast.py`. Label-free probes on held-out scans; differences are to `instance`, the same contrast without "
        "any spatial selection. Distances in mm are the better the smaller.",
        probed(contrast.STUDY.headlines),
        ("contrast_abdomen_ct", "contrast_hippocampus_mr", "contrast_heart_mr"),
    ),
    (
        "DAGMaN's ladder",
        "`distillation.py`. Label-free probes and the entropy of attention heads; differences are to `smit`: random "
        "masks, no semantic attention, a clean teacher.",
        probed(distillation.STUDY.headlines),
        ("distillation_abdomen_ct", "distillation_hippocampus_mr", "distillation_heart_mr"),
    ),
    (
        "Finding lesions that only the study was told of",
        "`localisation.py`. Differences are what whole CLARiTy has more than the row.",
        localised,
        ("localisation_abdomen_ct",),
    ),
    (
        "Where the frames of two scans meet",
        "`body_frames.py`. Distance in mm between the centroids of the same organ in two scans, median and 90th "
        "percentile, after both were put into a frame.",
        frames,
        ("body_frames",),
    ),
)


def page(results: Path = RESULTS) -> str:
    """The text of docs/results.md."""
    text = [HEAD]
    for title, said, rows, names in SECTIONS:
        text += [f"## {title}", "", said, ""]
        for name in names:
            file = results / f"{name}.json"
            if not file.exists():
                text += [f"`{name}` has not been run.", ""]
                continue
            of = json.loads(file.read_text(encoding="utf-8"))
            head, *body = rows(of)
            text += [f"**{name}**{settings(of)}", ""]
            text += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)] + [""]
            text += [NOTES[name], ""] if name in NOTES else []
            if file.with_suffix(".svg").exists():
                text += [f"![{name}: the same as a figure](../benchmarks/results/{name}.svg)", ""]
    return "\n".join(text)


def settings(of: dict[str, Any]) -> str:
    """How large a study was, in words; nothing where it trained nothing."""
    if "steps" not in of:
        return ""
    steps = [f"{count:,} steps of {what}" for what, count in of["steps"].items() if count]
    return f": {', '.join(steps)}; seeds {', '.join(map(str, of['seeds']))}; {of['date']}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
