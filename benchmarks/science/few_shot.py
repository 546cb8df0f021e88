"""Dice against the number of labelled subjects: from scratch, Spade, DAGMaN, and both tasks on one encoder.

    python benchmarks/science/few_shot.py DATA --out WORK --steps 400 400 --seeds 0 1 2 --draws 3 --name few_shot_NAME

Each arm is pretrained once a seed, and fine-tuned with every number of labels and every draw of so many subjects; all
arms share subjects, crops, decoder and steps. What an arm gains over --control is paired by case, seed and draw, its
interval is over subjects. `all` is every labelled subject that may train, which needs no draws. Every seed has every
draw; --one-draw-a-seed gives each its own, and cannot tell draws from seeds. How arms are trained and what WORK,
--jobs and the words after `--` are, is in arms.py; numbers of labels and draws may be added later.
Writes benchmarks/results/NAME.json and NAME.svg.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("svg")
from arms import (
    RESULTS,
    UNTRAINED,
    Extra,
    Run,
    Study,
    begin,
    cell,
    fine_tune,
    options,
    origin,
    pretrain,
)
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from dagman.evaluation.comparison import check_protocols
from dagman.evaluation.scores import read_rows, read_summary
from dagman.evaluation.statistics import paired_comparison
from spade3d.provenance import without_nan, write_json

ALL = "all"
ARMS: dict[str, tuple[str, ...]] = {
    UNTRAINED: (),
    "spade": ("--recipe", "spade"),
    "dagman": ("--recipe", "dagman"),
    "both": ("--recipe", "spade-dagman"),
}
STUDY = Study(summary=__doc__.splitlines()[0], arms=ARMS, usual=tuple(ARMS), control=UNTRAINED, headlines={})
SAID = {UNTRAINED: "from scratch"}

Tuning = tuple[str, int, str, int]  # arm, seed, labels, draw


def main() -> None:
    asked, extra = options(sys.argv[1:], STUDY, labels_and_draws)
    if asked.one_draw_a_seed and sorted(seed % asked.draws for seed in asked.seeds) != list(range(asked.draws)):
        sys.exit(f"--one-draw-a-seed: seeds {asked.seeds} do not take {asked.draws} draws once each; ask for as many")
    begin(asked, extra, {})
    tunings = [
        (arm, seed, labels, draw)
        for labels in asked.labels
        for seed in asked.seeds
        for draw in draws_of(labels, seed, asked)
        for arm in asked.arms
    ]
    with ThreadPoolExecutor(asked.jobs) as pool:  # after a failure no further run begins
        list(pool.map(lambda run: pretrain(run, asked, extra), [(a, s) for s in asked.seeds for a in asked.arms]))
        list(pool.map(lambda tuning: tune(tuning, asked, extra), tunings))
    curves = {labels: at(labels, asked, [one for one in tunings if one[2] == labels]) for labels in asked.labels}
    crossed = not asked.one_draw_a_seed
    result = origin(asked, extra) | {"draws": asked.draws, "every_seed_has_every_draw": crossed, "labels": curves}
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{asked.name}.json", without_nan(result))
    draw_figure(result, RESULTS / f"{asked.name}.svg")
    show(result)


def labels_and_draws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", nargs="+", default=["1", "2", "4", "8", "16", ALL], help=f"subjects, or {ALL}")
    parser.add_argument("--draws", type=int, default=3, help="of labelled subjects")
    parser.add_argument("--one-draw-a-seed", action="store_true", help="as many draws as seeds, each with its own seed")


def draws_of(labels: str, seed: int, asked: argparse.Namespace) -> Sequence[int]:
    if labels == ALL:
        return [0]
    return [seed % asked.draws] if asked.one_draw_a_seed else range(asked.draws)


def folder(tuning: Tuning, asked: argparse.Namespace) -> Path:
    arm, seed, labels, draw = tuning
    return asked.out / f"tuned-{arm}-{seed}-labels{labels}-draw{draw}"


def tune(tuning: Tuning, asked: argparse.Namespace, extra: Extra) -> None:
    arm, seed, labels, draw = tuning
    few = ("--draw", draw) if labels == ALL else ("--labels", labels, "--draw", draw)
    run: Run = (arm, seed)
    fine_tune(run, folder(tuning, asked), asked, extra, *few)


def at(labels: str, asked: argparse.Namespace, tunings: Sequence[Tuning]) -> dict[str, Any]:
    """One number of labels: of each arm the mean Dice of every run, and what it gained over the control."""
    summaries = {tuning: read_summary(folder(tuning, asked)) for tuning in tunings}
    check_protocols({folder(tuning, asked): summary for tuning, summary in summaries.items()})
    rows: dict[str, list] = {arm: [] for arm in asked.arms}
    dice: dict[str, dict[str, float]] = {arm: {} for arm in asked.arms}
    for tuning, summary in summaries.items():
        pair = summary["pair"]
        rows[tuning[0]] += [row | {"pair": pair} for row in read_rows(folder(tuning, asked))]
        dice[tuning[0]][pair] = summary["mean_dice"]
    arms = {arm: {"mean_dice": fmean(dice[arm].values()), "by_pair": dice[arm]} for arm in asked.arms}
    for arm in asked.arms:
        if arm != asked.control:
            arms[arm]["over_control"] = asdict(paired_comparison(rows[asked.control], rows[arm])[0])
            each = [
                paired_comparison(*([row for row in rows[run] if row["pair"] == pair] for run in (asked.control, arm)))
                for pair in dice[arm]
            ]
            arms[arm]["over_control"]["by_seed"] = [whole.difference for whole, *_ in each]
    return {"subjects": next(iter(summaries.values()))["labels"], "arms": arms}


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """Left: the mean Dice of each arm, a dot for each run. Right: what each gained, with its interval over subjects."""
    curves = sorted(result["labels"].values(), key=lambda found: found["subjects"])
    subjects = [found["subjects"] for found in curves]
    figure, (whole, gained) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, arm in enumerate(result["words"]):
        colour, name = f"C{number}", SAID.get(arm, arm)
        of = [found["arms"][arm] for found in curves]
        whole.plot(subjects, [one["mean_dice"] for one in of], color=colour, marker="o", label=name)
        for place, one in zip(subjects, of, strict=True):
            dots = [*one["by_pair"].values()]
            whole.plot([place] * len(dots), dots, ".", color=colour, alpha=0.35)
        if arm == result["control"]:
            continue
        over, shift = [one["over_control"] for one in of], 1.04 ** (number - 2)  # side by side, not one on another
        means = [one["difference"] for one in over]
        ends = [[abs(one["difference"] - one[side]) for one in over] for side in ("low", "high")]
        places = [place * shift for place in subjects]
        gained.errorbar(places, means, ends, color=colour, marker="o", capsize=3, label=name)
    gained.axhline(0, color="grey", linewidth=0.8)
    control = SAID.get(result["control"], result["control"])
    whole.set_title("mean Dice; dots are runs")
    gained.set_title(f"mean Dice minus that of {control}; 95 % over subjects")
    for axes in (whole, gained):
        axes.set_xscale("log", base=2)
        axes.set_xticks(subjects, [str(count) for count in subjects])
        axes.set_xlabel("labelled subjects")
        axes.legend()
    crossed = "each with" if result["every_seed_has_every_draw"] else "among them"
    figure.suptitle(f"{result['name']}: {len(result['seeds'])} seeds, {crossed} {result['draws']} draws of subjects")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def show(result: dict[str, Any]) -> None:
    """One row for each number of labels."""
    control = result["control"]
    caption = f"below: difference to {SAID.get(control, control)}, paired by case, seed and draw; 95 % over subjects"
    table = Table("labels", *(SAID.get(arm, arm) for arm in result["words"]), title=result["name"], caption=caption)
    for labels, found in result["labels"].items():
        cells = [cell(one["mean_dice"], one.get("over_control")) for one in found["arms"].values()]
        table.add_row(f"{labels} ({found['subjects']})" if labels == ALL else labels, *cells)
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    main()
