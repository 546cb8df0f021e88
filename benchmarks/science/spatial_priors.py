"""Heads that follow spatial priors: how well their attention finds organs in held-out scans, and is it more than the
prior?

    python benchmarks/science/spatial_priors.py DATA --out WORK --name priors_abdomen_ct --steps 400 0 \\
        --regions spleen "right kidney" "left kidney" liver -- --network.feature_size 24 -- --distill.stage 2

Every arm is pretrained with each seed by `spade-pretrain` on the same crops, as plain distillation of the whole view
(nothing is masked); words after `--` as in arms.py. `guided`: one head a region follows a prior made from one
labelled scan; `guided-atlas`: from --labelled scans; `wrong`: each region has the prior of the next; `wrong-place`: its
own, moved; `free`: no prior.
`location` is `guided` by a prior that does not read the image.

Judged is the voxel average precision of maps enlarged to voxels (dagman/evaluation/attention_precision.py), by subject
and organ, in crops drawn anywhere in the body: `within` is the mean over crops, `pooled` takes the voxels of all crops
together. Attention sums to one in every crop, however much of an organ that shows, and a prior does not: pooled, the
prior alone knows the scale, which no head can. Beside the arms: the prior alone used as the prediction, on the cells of
the attention and on finer ones, one value everywhere (its precision is the prevalence), and the truth on the cells of
the attention. The best head of the arms without prior is chosen, for each region, on the labelled training scans. These
stand for a validation set: the fold's judges are kept for judging only. Differences are paired by subject and seed.
Where the second of `--steps` is not 0, each arm is fine-tuned on `--labels` subjects, too, and a linear map on its
frozen features is asked which organ is shown: what the prior gave the encoder, beside the arm without one. Few
subjects judge in a fold of a small data set: `--judge-folds 0 2` trains every arm in each of these, in WORK/fold-N, and
puts their judges together. What is finished in WORK is not run again (but for these linear maps), and what was
interrupted is resumed. Writes benchmarks/results/NAME.json.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from arms import (
    RESULTS,
    UNTRAINED,
    Extra,
    Study,
    begin,
    cell,
    of_few_shots,
    of_probes,
    options,
    origin,
    pretrained,
    probing,
    settings_of,
    train,
    weights_of,
)
from rich.console import Console
from rich.table import Table

from dagman.attention.guidance import GuidedHeads
from dagman.attention.maps import Looker
from dagman.attention.semantic import SemanticAttention
from dagman.attention.spatial_prior import Priors
from dagman.attention_prediction import attention_of_run
from dagman.evaluation.attention_precision import (
    MapsOf,
    Precisions,
    attention_precision,
    heads_of,
    prior_alone,
    truth_on_cells,
)
from dagman.evaluation.crop_features import NothingToAsk, Probing, Scores, standardised
from dagman.evaluation.organ_places import OrganPlaces, draw_places, vectors_of_places
from dagman.evaluation.organ_probes import organ_probes
from dagman.evaluation.probes import gains, held_out, summary_of, untrained_like
from dagman.recipes.distillation import GUIDED
from dagman.recipes.priors import PriorSettings, build_priors
from spade3d.commands import ENCODER
from spade3d.networks.foreign import read_encoder
from spade3d.networks.swin import SwinTransformer
from spade3d.provenance import without_nan, write_json, write_text
from spade3d.recipes.pair_crops import frames_of
from spade3d.volumes.split import split_cases
from spade3d.volumes.store import VolumeStore

PLAIN = ("--recipe", "dagman", "--distill.variant", "dino")
ONE = ("--prior.source", "one_label")
GUIDED_ARMS: dict[str, tuple[str, ...]] = {
    "guided": ONE,
    "guided-atlas": ("--prior.source", "atlas"),
    "wrong": (*ONE, "--prior.wrong", "permuted"),
    "wrong-place": (*ONE, "--prior.wrong", "shifted"),
    "location": (*ONE, "--prior.likelihood", "location"),
}
WRONG = ("wrong", "wrong-place")
FREE = "free"
STUDY = Study(
    summary=__doc__.split("\n\n")[0].replace("\n", " "),
    arms={arm: (*PLAIN, *how) for arm, how in GUIDED_ARMS.items()} | {FREE: PLAIN, UNTRAINED: ()},
    usual=("guided", "guided-atlas", "wrong", FREE, UNTRAINED),
    control="guided",
    headlines={},
)
FINE = 2  # voxels of the cells of the finer prior
LEAST = 0.002  # share of a crop that an organ must take, as for a head to be guided
PRECISIONS = 1  # goes up when what is measured changes, so that no kept answer of older ones is used

BySeed = Mapping[int, Scores]  # seed -> measure -> subject -> its values


@dataclass(frozen=True)
class Judged:
    """The scans that judge, those that choose the best head, all that are placed together, and what is looked for."""

    store: VolumeStore
    cases: Sequence[int]
    choosing: Sequence[int]
    trained_on: Sequence[int]
    how: Probing
    organs: Mapping[str, int]

    def precision(self, maps_of: MapsOf, cases: Sequence[int] | None = None) -> Precisions:
        return attention_precision(
            maps_of, self.store, self.cases if cases is None else cases, self.how, self.organs, LEAST
        )


def main() -> None:
    asked, extra = asked_for(sys.argv[1:])
    fine_tuned = {"labels": asked.labels} if asked.steps[1] else {}
    folds = {"folds": asked.judge_folds} if asked.judge_folds else {}
    begin(asked, extra, {"regions": asked.regions, "labelled": asked.labelled, **fine_tuned, **folds})
    runs = [(arm, seed) for seed in asked.seeds for arm in asked.arms]
    parts = by_fold(asked, extra)
    with ThreadPoolExecutor(asked.jobs) as pool:  # after a failure no further run begins
        list(pool.map(lambda one: train(one[0], *one[1]), ((run, part) for run in runs for part in parts)))
    torch.set_num_threads(asked.jobs)
    judged = [judges(part, runs) for part, _ in parts]
    rows = together([rows_of(part, one) for (part, _), one in zip(parts, judged, strict=True)])
    transferred = transfer(asked, judged[0], runs) if asked.steps[1] else None
    result = {
        **origin(asked, extra),
        "regions": list(judged[0].organs),
        "judged": asdict(judged[0].how)
        | {"folds": asked.judge_folds, "scans": sum(len(one.cases) for one in judged)}
        | {"subjects": len({one.store.cases[i].subject for one in judged for i in one.cases})}
        | {"scans_that_choose": max(len(one.choosing) for one in judged), "least": LEAST},
        "precision": {row: summary_of(*of.values()) for row, of in rows.items()},
        "over_others": {row: gains(rows[asked.control], of) for row, of in rows.items() if row != asked.control},
        "over_own_prior": {
            arm: gains(rows[arm], rows[f"prior of {arm}, alone"])
            for arm in asked.arms
            if f"prior of {arm}, alone" in rows
        },
        "transfer": transferred,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{asked.name}.json", without_nan(result))
    show(result)


def by_fold(asked: argparse.Namespace, extra: Extra) -> list[tuple[argparse.Namespace, Extra]]:
    """What is asked of each fold, in a folder of its own with the same store; all of it where no folds are named."""
    if not asked.judge_folds:
        return [(asked, extra)]
    found = []
    for fold in asked.judge_folds:
        out = asked.out / f"fold-{fold}"
        out.mkdir(exist_ok=True)
        if not (out / "store").exists():
            (out / "store").symlink_to(Path("..") / "store", target_is_directory=True)
        words = (*extra[0], "--fold", str(fold))
        found.append((argparse.Namespace(**vars(asked) | {"out": out}), (words, *extra[1:])))
    return found


def together(parts: Sequence[Mapping[str, BySeed]]) -> dict[str, BySeed]:
    """The rows of several folds as one; each subject judges in one of them."""
    return {
        row: {
            seed: {
                measure: {subject: values for part in parts for subject, values in part[row][seed][measure].items()}
                for measure in scores
            }
            for seed, scores in of.items()
        }
        for row, of in parts[0].items()
    }


def add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regions", nargs="+", required=True, help="organs by name; at most half as many as heads")
    parser.add_argument("--labels", default="4", help="labelled subjects of the fine-tuning")
    parser.add_argument("--labelled", type=int, default=4, help="scans that make the atlas")
    parser.add_argument("--scans", type=int, default=24, help="held-out scans that judge, at most; as many choose")
    parser.add_argument("--crops", type=int, default=16, help="of each scan")
    parser.add_argument(
        "--judge-folds", type=int, nargs="+", help="train in each of them, and put their judges together"
    )


def asked_for(words: list[str]) -> tuple[argparse.Namespace, Extra]:
    """What arms.py parses, with the regions in the words of the arms that are guided."""
    asked, extra = options(words, STUDY, add_own)
    if asked.control not in GUIDED_ARMS:
        sys.exit(f"--control {asked.control} is not guided; give one of {', '.join(GUIDED_ARMS)}")
    if asked.steps[1] and FREE not in asked.arms:
        sys.exit(
            f"--steps {asked.steps[0]} {asked.steps[1]}: what a prior gave an encoder is seen beside the arm "
            f"without one; add {FREE} to --arms, or let the second be 0"
        )
    if asked.judge_folds and (asked.steps[1] or "--fold" in (*extra[0], *extra[1])):
        sys.exit("--judge-folds names the folds and judges maps alone: leave --fold out; the second of --steps is 0")
    attached = [after for word, after in zip(extra[1], extra[1][1:]) if word == "--prior.attachment"]
    if attached and attached[-1] != "semantic":
        sys.exit(f"--prior.attachment {attached[-1]}: arms without a prior are read at [CLS]; only semantic compares")
    named = tuple(word for region in asked.regions for word in ("--prior.regions", region))
    arms = {arm: (*how, *named) if arm in GUIDED_ARMS else how for arm, how in STUDY.arms.items()}
    arms["guided-atlas"] += ("--prior.labelled", str(asked.labelled))
    asked.study = replace(STUDY, arms=arms)
    return asked, extra


def judges(asked: argparse.Namespace, runs: Sequence[tuple[str, int]]) -> Judged:
    store, cases, how = probing(asked, runs)
    said = settings_of(asked, next(run for run in runs if run[0] != UNTRAINED))
    trained_on = split_cases(store.cases, said["folds"], said["fold"]).train
    choosing = held_out(store.cases, [i for i in trained_on if store.cases[i].has_labels], asked.scans)
    value_of = {name: value for value, name in store.label_names.items()}
    if unknown := [region for region in asked.regions if region not in value_of]:
        sys.exit(f"--regions: {', '.join(unknown)} not in the label table, which holds {', '.join(value_of)}")
    organs = {region: value_of[region] for region in asked.regions}
    return Judged(store, cases, choosing, trained_on, replace(how, crops=asked.crops), organs)


def rows_of(asked: argparse.Namespace, judged: Judged) -> dict[str, BySeed]:
    """Of each row of the table and each seed, the precision of each organ's map in each subject."""
    rows: dict[str, dict[int, Scores]] = {}
    for arm in asked.arms:
        for seed in asked.seeds:
            for row, scores in kept(asked, judged, (arm, seed)).items():
                rows.setdefault(row, {})[seed] = scores
    for row, scores in without_network(asked, judged).items():
        rows[row] = dict.fromkeys(asked.seeds, scores)
    return rows


def kept(asked: argparse.Namespace, judged: Judged, run: tuple[str, int]) -> dict[str, Scores]:
    """The rows that one run gives, from WORK where the same was asked before."""
    path = asked.out / f"precision-{run[0]}-{run[1]}.json"
    scans = [list(judged.cases), list(judged.choosing)]
    weights = weights_of(pretrained(asked, run if run[0] != UNTRAINED else (asked.control, run[1])))
    what = json.loads(json.dumps([PRECISIONS, asdict(judged.how), scans, judged.organs, LEAST, weights]))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["what"] == what:
            return found["rows"]
    print(f"judging {run[0]}, seed {run[1]}", flush=True)
    rows = of_guided(asked, judged, run) if run[0] in GUIDED_ARMS else of_free(asked, judged, run)
    write_text(path, json.dumps({"what": what, "rows": rows}))  # read here alone; NaN stays NaN
    return rows


def of_guided(asked: argparse.Namespace, judged: Judged, run: tuple[str, int]) -> dict[str, Scores]:
    """Each region's own head, and its prior alone, on the same cells and on finer ones."""
    folder, arm = pretrained(asked, run), run[0]
    said = json.loads((folder / GUIDED).read_text(encoding="utf-8"))
    looker = attention_of_run(folder, None if said["attachment"] == "semantic" else said["stage"]).looker
    table = GuidedHeads.from_dict(said)
    looked = judged.precision(heads_of(looker, judged.store))
    rows = {arm: scores_of(looked, {organ: 1 + table.regions.index(organ) for organ in judged.organs})}
    if arm in WRONG:
        return rows
    priors = priors_of(settings_of(asked, run), judged)
    own = {organ: priors.regions.index(organ) for organ in judged.organs}
    rows[f"prior of {arm}, alone"] = scores_of(judged.precision(prior_alone(priors, looker.cell)), own)
    rows[f"the same on cells of {FINE} voxels, {arm}"] = scores_of(
        judged.precision(prior_alone(priors, (FINE,) * 3)), own
    )
    return rows


def of_free(asked: argparse.Namespace, judged: Judged, run: tuple[str, int]) -> dict[str, Scores]:
    """The head that is best at each region in training scans, and the mean of all heads."""
    arm, seed = run
    looker = untrained(asked, seed) if arm == UNTRAINED else attention_of_run(pretrained(asked, run), None).looker
    chosen = best_heads(judged.precision(heads_of(looker, judged.store), judged.choosing))
    looked = judged.precision(heads_of(looker, judged.store))
    rows = {f"{arm}, best head": scores_of(looked, chosen)}
    return rows | {f"{arm}, mean of heads": scores_of(looked, dict.fromkeys(judged.organs, 0))}


def without_network(asked: argparse.Namespace, judged: Judged) -> dict[str, Scores]:
    """One value everywhere, and the truth on the cells of the attention."""
    cells = looker_of(asked, asked.seeds[0]).cell
    same = judged.precision(lambda crops: np.zeros((len(crops), 1, *judged.how.shape)))
    truth = judged.precision(truth_on_cells(judged.store, judged.organs, cells))
    return {
        "uniform": scores_of(same, dict.fromkeys(judged.organs, 0)),
        "truth on these cells": scores_of(truth, {organ: n for n, organ in enumerate(judged.organs)}),
    }


def transfer(asked: argparse.Namespace, judged: Judged, runs: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Few-shot Dice and linear probes of every arm, beside the arm without a prior; no probes where fewer than two of
    the subjects that judge show an organ."""
    beside = argparse.Namespace(**vars(asked) | {"control": FREE})
    how = replace(judged.how, crops=Probing.crops)  # as in the other studies
    try:
        places = draw_places(judged.store, judged.cases, how)
    except NothingToAsk as fault:
        print(f"left out: {fault}", flush=True)
        probes = {}
    else:
        print("linear probes", flush=True)
        scores = {run: linear_probe(encoder_of(asked, run).to(how.device), judged, how, places) for run in runs}
        probes = of_probes(beside, scores)
    return {"control": FREE, "probes": probes, "few_shot": of_few_shots(beside)}


def linear_probe(encoder: SwinTransformer, judged: Judged, how: Probing, places: OrganPlaces) -> Scores:
    """Which organ is at a place, read off frozen features by a linear map that learned from other subjects."""
    evenly = standardised(encoder, judged.store, judged.cases, how)
    found = organ_probes(vectors_of_places(evenly, judged.store, places, how), places)
    return {measure: of for measure, of in found.items() if measure.startswith("linear.")}


def encoder_of(asked: argparse.Namespace, run: tuple[str, int]) -> SwinTransformer:
    """What an arm handed on; random weights where nothing was trained."""
    if run[0] != UNTRAINED:
        return read_encoder(pretrained(asked, run) / ENCODER)
    return untrained_like(pretrained(asked, (asked.control, run[1])) / ENCODER, run[1])


def untrained(asked: argparse.Namespace, seed: int) -> Looker:
    """What the guided arm began as: random weights everywhere."""
    of, encoder = looker_of(asked, seed), encoder_of(asked, (UNTRAINED, seed))
    dim, heads, blocks = of.semantic.class_token.numel(), of.heads, len(of.semantic.blocks)
    return Looker(encoder, of.stage, SemanticAttention(dim, heads=heads, blocks=blocks).eval())


def looker_of(asked: argparse.Namespace, seed: int) -> Looker:
    return attention_of_run(pretrained(asked, (asked.control, seed)), None).looker


def priors_of(settings: Mapping[str, Any], judged: Judged) -> Priors:
    """The priors of a run, from its own labelled scans, for scans that it has not seen: all are placed together."""
    both = sorted({*judged.trained_on, *judged.cases})
    how = SimpleNamespace(crop=SimpleNamespace(frame=settings["crop"]["frame"]), seed=settings["seed"])
    frames = frames_of(how, judged.store, both)
    return build_priors(PriorSettings(**settings["prior"]), judged.store, judged.trained_on, frames)


def best_heads(found: Precisions) -> dict[str, int]:
    """For each organ the map, not the mean of all (0), of the highest mean precision within crops over subjects."""
    return {
        organ: 1 + int(np.mean([values[1:] for values in of.values()], axis=0).argmax())
        for organ, of in found.within.items()
    }


def scores_of(found: Precisions, maps: Mapping[str, int]) -> Scores:
    """Measures "pooled.ORGAN" and "within.ORGAN" of one map for each organ, and their means over a subject's organs."""
    scores: dict[str, dict[str, list[float]]] = {}
    for kind, of in (("pooled", found.pooled), ("within", found.within)):
        for organ, chosen in maps.items():
            scores[f"{kind}.{organ}"] = {subject: [values[chosen]] for subject, values in of[organ].items()}
        organs = [scores[f"{kind}.{organ}"] for organ in maps]
        subjects = sorted({subject for one in organs for subject in one})
        scores[f"{kind}.mean"] = {s: [fmean(one[s][0] for one in organs if s in one)] for s in subjects}
    return scores


def show(result: dict[str, Any]) -> None:
    """One row a way to find the organs; what the control gained over it."""
    measures = ["within.mean", *(f"within.{organ}" for organ in result["regions"]), "pooled.mean"]
    caption = f"below: what {result['control']} has more, with its 95 % interval over subjects"
    table = Table("average precision", *measures, title=result["name"], caption=caption, show_lines=True)
    for row, of in result["precision"].items():
        over = result["over_others"].get(row, {})
        table.add_row(row, *(cell(of[measure]["mean"], over.get(measure)) for measure in measures))
    Console(width=max(120, Console().width)).print(table)
    if result["transfer"]:
        print(json.dumps(result["transfer"], indent=1))


if __name__ == "__main__":
    main()
