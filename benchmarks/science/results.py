"""docs/results.md, made of what the studies beside this file wrote to benchmarks/results.

    python benchmarks/science/results.py

A study that has not been run is named. The numbers come from the files; what they say, and what they do not, a person
writes into notes.py once they are known.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import contrast
import distillation
import localisation
from arms import RESULTS, UNTRAINED, WITHOUT_NETWORK, without_network
from few_shot import SAID
from notes import NOTES, SHORT

PAGE = RESULTS.parents[1] / "docs" / "results.md"

HEAD = """# What was found

Made by `benchmarks/science/results.py` from the files in `benchmarks/results`, not by hand; the words, seeds and steps
of every arm are in them, and [the log](log.md) tells how they came about, failures too. Everything here is small:
narrow networks and short runs on a CPU of two cores. It says what the parts do beside their controls at equal steps. It
says nothing of how far a long run on many scans gets.

Means are over seeds (and draws of labelled subjects); (a, b) are 95 % intervals over subjects, of a difference that is
paired by case, seed and draw. They take seeds and draws as given: with few of these, other ones may say otherwise.
**Bold** differences are those whose interval does not hold 0 and that have the same sign with every seed, one by one:
no correction for how many there are. Dice of results up to now: the sign of a seed is that of the two runs' own means,
which leave out what a paired difference counts, a structure that one of two runs rightly does not find (about a
hundredth). Maps of findings, and two runs that are compared, have no seeds apart: there the interval alone decides.
"""

ORGANS_AND_CHANCE = {
    "truth on cells": "the truth on cells of that size",
    "organ": "the true organ of the judged scan",
    "organ, its middle": "the true organ, highest in its middle",
    "grad-cam": "Grad-CAM of a linear head",
    "random": "chance",
    "centre": "the middle of the volume",
}
LOCALISED = ("pointing", "t_iou_0.3", "voxel_ap")
BY_LINEAR_PROBE = {
    "linear.accuracy.features": "organ by a linear probe, balanced accuracy",
    "linear.precision.features": "the same, macro average precision",
}
BY_FINDING = ("pointing", "iou")
Rows = Iterator[list[str]]


def with_interval(of: Mapping[str, Any], digits: int = 3, by_seed: Sequence[float] | None = None) -> str:
    """A difference; bold where its interval does not hold 0 and no seed has another sign. One judge has no interval.
    by_seed: the differences of the runs' own means, of results that do not hold the paired ones."""
    difference, low, high = (of[name] for name in ("difference", "low", "high"))
    said = f"{difference:+.{digits}f}"
    if low is None:
        return said
    each = of.get("by_seed", by_seed or ())
    clear = (low > 0 or high < 0) and all(one * difference > 0 for one in each) and float(said) != 0
    return f"{f'**{said}**' if clear else said} ({low:+.{digits}f}, {high:+.{digits}f})"


def few_shot(of: dict[str, Any]) -> Rows:
    """A row for each number of labelled subjects; the range is that of the runs."""
    control, *others = sorted(of["words"], key=lambda arm: arm != of["control"])
    yield ["labelled subjects", named(control), *(cell for arm in others for cell in (named(arm), "gained"))]
    for labels, found in sorted(of["labels"].items(), key=lambda item: item[1]["subjects"]):
        runs = {arm: found["arms"][arm]["by_pair"] for arm in (control, *others)}
        cells = [f"{found['subjects']:g}" + (" (all)" if labels == "all" else "")]
        for arm in (control, *others):
            one, dice = found["arms"][arm], list(runs[arm].values())
            cells.append(f"{fmean(dice):.3f} ({min(dice):.2f} to {max(dice):.2f})")
            if arm != control:
                each = [runs[arm][pair] - runs[control][pair] for pair in runs[arm]]
                cells.append(with_interval(one["over_control"], by_seed=each))
        yield cells


def compared(of: dict[str, Any]) -> Rows:
    """What dagman-compare said of some runs: a row for each side against the reference."""
    yield ["", of["reference"], "", "gained", "p", "subjects"]
    for side, (whole, *_) in of["comparisons"].items():
        means = [f"{whole[name]:.4f}" for name in ("mean_a", "mean_b")]
        yield [side, *means, with_interval(whole, 4), f"{whole['p']:.2g}", str(whole["subjects"])]


def named(arm: str) -> str:
    return SAID.get(arm, arm)


def probed(headlines: Mapping[str, str]) -> Callable[[dict[str, Any]], Rows]:
    """A row for each arm: its probes, with what it gained over the control; then what needs no network."""

    def rows(of: dict[str, Any]) -> Rows:
        dice, known = of.get("few_shot"), of["probes"][of["control"]]["measures"]
        shown = {name: said for name, said in headlines.items() if name in known}
        yield ["arm", *shown.values(), *(["Dice"] if dice else [])]
        for arm, found in of["probes"].items():
            gained = found.get("over_control", {})
            cells = [f"{arm} (control)" if arm == of["control"] else arm]
            for name in shown:
                digits = 1 if name.endswith("_mm") else 4 if name.startswith("heads.") else 3
                mean = f"{found['measures'][name]['mean']:.{digits}f}"
                cells.append(f"{mean}, {with_interval(gained[name], digits)}" if name in gained else mean)
            if dice:
                cells.append(dice_of(dice, arm, of["control"]))
            yield cells
        for said in dict.fromkeys(WITHOUT_NETWORK.values()):
            kinds = [kind for kind, name in WITHOUT_NETWORK.items() if name == said]
            found = [[known.get(without_network(name, kind)) for kind in kinds] for name in shown]
            cells = [next((f"{one['mean']:.3g}" for one in some if one), "") for some in found]
            if any(cells):
                yield [said, *cells]

    return rows


def since_untrained(headlines: Mapping[str, str]) -> Callable[[dict[str, Any]], Rows]:
    """A row for each trained arm: what it has more than random weights, of Dice than the run from scratch. Nothing for
    results of before this was asked."""

    def rows(of: dict[str, Any]) -> Rows:
        trained = {arm: found["over_untrained"] for arm, found in of["probes"].items() if "over_untrained" in found}
        if not trained:
            return
        dice, known = of.get("few_shot"), next(iter(trained.values()))
        shown = {name: said for name, said in headlines.items() if name in known}
        yield ["arm, less untrained", *shown.values(), *(["Dice, less from scratch"] if dice else [])]
        for arm, gained in trained.items():
            cells = [with_interval(gained[name], 1 if name.endswith("_mm") else 3) for name in shown]
            if dice:
                each = [ours - theirs for ours, theirs in zip(*(dice[a]["by_seed"] for a in (arm, UNTRAINED)))]
                cells.append(with_interval(dice[arm]["over_untrained"], by_seed=each))
            yield [arm, *cells]

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


def guided(of: dict[str, Any]) -> Rows:
    """A row for each way to find the organs: what the guided heads have more."""
    measures = ("within.mean", *(f"within.{organ}" for organ in of["regions"]), "pooled.mean")
    yield ["", "mean of organs", *of["regions"], "mean, all crops together"]
    for name, found in sorted(of["precision"].items(), key=lambda row: row[0] in of["over_others"]):  # control first
        over = of["over_others"].get(name, {})
        cells = [f"{found[one]['mean']:.3f}" for one in measures]
        yield [
            name,
            *(f"{c}, {with_interval(over[m])}" if m in over else c for c, m in zip(cells, measures, strict=True)),
        ]


def by_structure(of: dict[str, Any]) -> Rows:
    """A row for each arm: the Dice of each structure. Nothing of one structure, nor of results before it was kept."""
    compared = {arm: found.get("over_control_by_class") for arm, found in (of.get("few_shot") or {}).items()}
    compared = {arm: found for arm, found in compared.items() if found}
    if not compared:
        return
    first = next(iter(compared.values()))
    yield ["Dice", *first]
    yield [f"{of['control']} (control)", *(f"{one['mean_a']:.3f}" for one in first.values())]
    for arm, found in compared.items():
        yield [arm, *(f"{one['mean_b']:.3f}, {with_interval(one)}" for one in found.values())]


def transferred(of: dict[str, Any]) -> Rows:
    """A row for each arm: what its encoder knows, and learns, beside the one without a prior. Nothing where no
    fine-tuning was asked for."""
    found = of.get("transfer")
    if not found:
        return
    control, probes = found["control"], found["probes"]
    yield ["arm", *(BY_LINEAR_PROBE.values() if probes else ()), "Dice"]
    for arm in found["few_shot"]:
        cells = [f"{arm} (control)" if arm == control else arm]
        for measure in BY_LINEAR_PROBE if probes else ():
            mean = f"{probes[arm]['measures'][measure]['mean']:.3f}"
            over = probes[arm].get("over_control")
            cells.append(f"{mean}, {with_interval(over[measure])}" if over else mean)
        yield [*cells, dice_of(found["few_shot"], arm, control)]


def dice_of(few_shots: Mapping[str, Any], arm: str, control: str) -> str:
    """The mean Dice of an arm, with what it gained over the control."""
    one, others = few_shots[arm], few_shots[control]["by_seed"]
    mean, over = f"{one['mean_dice']:.3f}", one.get("over_control")
    each = [ours - theirs for ours, theirs in zip(one["by_seed"], others, strict=True)]
    return f"{mean}, {with_interval(over, by_seed=each)}" if over else mean


def localised_by_finding(of: dict[str, Any]) -> Rows:
    """A row for each finding: the whole beside the most that an organ says of a lesion in it."""
    both = (of["control"], "organ, its middle")
    names = [ORGANS_AND_CHANCE.get(name, name) for name in both]
    yield ["", *(f"{localisation.HEADLINES[one]}, {name}" for one in BY_FINDING for name in names)]
    for finding in of["by_finding"][of["control"]]:
        means = [of["by_finding"][name][finding][one] for one in BY_FINDING for name in both]
        yield [finding, *(f"{mean:.3f}" for mean in means)]


def frames(of: dict[str, Any]) -> Rows:
    """A row for each frame: median and 90th percentile of the distances in every set, over what the frame places."""
    names = [one["frame"] for one in next(iter(of["sets"].values()))]
    yield ["frame, over the pairs it places", *of["sets"]]
    for n, name in enumerate(names):
        rows = [one[n] for one in of["sets"].values()]
        share = ["" if row["placed"] == 1 else f" ({row['placed']:.0%} placed)" for row in rows]
        yield [name, *(distances(row) + said for row, said in zip(rows, share, strict=True))]


def frames_on_common_pairs(of: dict[str, Any]) -> Rows:
    """The same over the pairs that every frame places: what a frame refuses does not flatter it."""
    names = [one["frame"] for one in next(iter(of["sets"].values()))]
    pairs = [rows[0]["common"]["pairs"] for rows in of["sets"].values()]
    heads = (f"{name} ({count:,} pairs)" for name, count in zip(of["sets"], pairs, strict=True))
    yield ["frame, over the pairs that every frame places", *heads]
    for n, name in enumerate(names):
        yield [name, *(distances(rows[n]["common"]) for rows in of["sets"].values())]


def distances(of: Mapping[str, Any]) -> str:
    return f"{of['median_mm']:.1f}, {of['p90_mm']:.1f}" if of["pairs"] else "-"


# Title, what was done, tables of each result, names of the results.
Section = tuple[str, str, tuple[Callable[[dict[str, Any]], Rows], ...], tuple[str, ...]]
SECTIONS: tuple[Section, ...] = (
    (
        "Dice against the number of labelled subjects",
        "`few_shot.py`. Differences are to the run from scratch with the same subjects, crops, steps and rate.",
        (few_shot,),
        ("few_shot_hippocampus_mr", "few_shot_heart_mr", "few_shot_abdomen_ct"),
    ),
    (
        "Pretrained minus scratch at full length",
        "`dagman-compare` of three twins, eight labelled hippocampi.",
        (compared,),
        ("hippocampus_mr_8",),
    ),
    (
        "Spade and its controls",
        "`contrast.py`. Label-free probes on held-out scans; differences are to `instance`, the same contrast without "
        "any spatial selection. Distances in mm are the better the smaller. Where a second table stands, it has what "
        "each arm gained over random weights, and its Dice over the run from scratch.",
        (probed(contrast.STUDY.headlines), since_untrained(contrast.STUDY.headlines)),
        (
            "contrast_abdomen_ct",
            "contrast_few_shot_abdomen_ct",
            "contrast_hippocampus_mr",
            "contrast_boxes_hippocampus_mr",
            "contrast_overlaps_hippocampus_mr",
            "contrast_long_hippocampus_mr",
            "contrast_heart_mr",
            "contrast_long_heart_mr",
        ),
    ),
    (
        "Views that spare what matters",
        "`contrast.py`, the arms of FocusContrast on Spade; differences are to `focused`, whose views keep the gaze.",
        (probed(contrast.STUDY.headlines), by_structure),
        (
            "contrast_focus_abdomen_ct",
            "contrast_focus_no_mask_abdomen_ct",
            "focus_few_shot_abdomen_ct",
            "focus_hippocampus_mr",
            "focus_simclr_hippocampus_mr",
            "focus_heart_mr",
        ),
    ),
    (
        "DAGMaN's ladder",
        "`distillation.py`. Label-free probes; the normalised entropy of attention (1 is uniform), and the "
        "Jensen-Shannon divergence between heads (JSD, 0 where they are alike); differences are to `smit`: random "
        "masks, no semantic attention, a clean teacher.",
        (probed(distillation.STUDY.headlines), since_untrained(distillation.STUDY.headlines)),
        (
            "distillation_abdomen_ct",
            "distillation_few_shot_abdomen_ct",
            "distillation_hippocampus_mr",
            "distillation_long_hippocampus_mr",
            "distillation_cells_hippocampus_mr",
            "distillation_heart_mr",
        ),
    ),
    (
        "Heads that follow a prior",
        "`spatial_priors.py`. Voxel average precision of attention maps on held-out scans, within crops; differences "
        "are what the first row has more. The best head without a prior is chosen on labelled training scans, which "
        "stand for a validation set: the judges of the fold are kept for judging only. `location`: heads guided by "
        "where an organ lay in one labelled scan. Where encoders were handed on, the second table tells what of it: "
        "gains over the arm without a prior. Everywhere the prior weighs 1, not the default's 0.1, beside plain "
        "distillation without masking, and guides heads over early stages (1 or 2): the small runs need it.",
        (guided, transferred),
        (
            "priors_abdomen_ct",
            "priors_atlas_abdomen_ct",
            "priors_rate_abdomen_ct",
            "priors_hippocampus_mr",
            "priors_location_hippocampus_mr",
            "priors_rate_hippocampus_mr",
            "priors_rate_controls_hippocampus_mr",
            "priors_rate_fold2_hippocampus_mr",
            "priors_heart_mr",
            "priors_long_heart_mr",
            "priors_views_heart_mr",
            "priors_box_heart_mr",
        ),
    ),
    (
        "Finding lesions that only the study was told of",
        "`localisation.py`. Differences are what whole CLARiTy has more than the row.",
        (localised, localised_by_finding),
        ("localisation_abdomen_ct",),
    ),
    (
        "Where the frames of two scans meet",
        "`body_frames.py`. Distance in mm between the centroids of the same organ in two scans, median and 90th "
        "percentile, after both were put into a frame.",
        (frames, frames_on_common_pairs),
        ("body_frames",),
    ),
)


def page(results: Path = RESULTS) -> str:
    """The text of docs/results.md."""
    text = [HEAD, "## In short", "", *(f"* {one}" for one in SHORT), ""]
    for title, said, tables, names in SECTIONS:
        text += [f"## {title}", "", said, ""]
        for name in names:
            file = results / f"{name}.json"
            if not file.exists():
                text += [f"`{name}` has not been run.", ""]
                continue
            of = json.loads(file.read_text(encoding="utf-8"))
            text += [f"**{name}**{settings(of)}", ""]
            for rows in tables:
                if lines := list(rows(of)):
                    lines.insert(1, ["---"] * len(lines[0]))
                    text += ["| " + " | ".join(line) + " |" for line in lines] + [""]
            text += [NOTES[name], ""] if name in NOTES else []
            if file.with_suffix(".svg").exists():
                text += [f"![{name}: the same as a figure](../benchmarks/results/{name}.svg)", ""]
    return "\n".join(text)


def settings(of: dict[str, Any]) -> str:
    """How large a study was, in words; nothing where it does not say."""
    if "seeds" not in of:
        return ""
    said = [f"{count:,} steps of {what}" for what, count in of["steps"].items() if count]
    said.append(f"seeds {', '.join(map(str, of['seeds']))}")
    if "draws" in of:
        crossed = "each with" if of["every_seed_has_every_draw"] else "one each of"
        said.append(f"{crossed} {of['draws']} draws of labelled subjects")
    if judges := judges_of(of):
        said.append(f"{judges} judge")
    return f": {'; '.join([*said, of['date']])}"


def judges_of(of: dict[str, Any]) -> str:
    """How many subjects judge; of features and of Dice, where those are not as many."""
    asked = {"features": of.get("probes"), "Dice": of.get("few_shot")}
    if not any(asked.values()):
        asked = {"": of.get("over_others", of)}
    counts = {what: max((one["subjects"] for one in overs(part)), default=0) for what, part in asked.items()}
    counts = {what: count for what, count in counts.items() if count}
    if len({*counts.values()}) < 2:
        return "".join(f"{count} subjects" for count in {*counts.values()})
    return " and ".join(f"{count} subjects (of {what})" for what, count in counts.items())


def overs(of: Any) -> Iterator[Mapping[str, Any]]:
    """Every paired difference in a result."""
    if isinstance(of, dict):
        if {"difference", "subjects"} <= of.keys():
            yield of
        else:
            yield from (found for one in of.values() for found in overs(one))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
