"""Arms of a study at equal steps: what each pretrained encoder knows, and its few-shot Dice.

Each arm is pretrained with each seed by `spade-pretrain`, probed on held-out scans (dagman/evaluation/probes.py), and
fine-tuned by `dagman-finetune`; all arms share scans, crops, steps and labelled subjects. The arm `untrained` is the
floor: random weights for the probes, from scratch for the Dice. Differences are paired with --control by subject and
seed. What is finished in WORK is not run again, and what was interrupted is resumed. Words after `--` go to both
commands (`-- --network.feature_size 12`), those after a second `--` to spade-pretrain alone, after a third to
dagman-finetune alone. Recipes whose networks differ by default need words that make them alike (`--network.window`,
`--network.heads`), the fine-tuning from scratch among them. Writes benchmarks/results/NAME.json.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from dagman.evaluation.attention_heads import head_scores
from dagman.evaluation.comparison import check_protocols
from dagman.evaluation.crop_features import Encoder, Probing, Scores, standardised
from dagman.evaluation.equivariance import twin_agreement
from dagman.evaluation.probes import gains, held_out, probe, summary_of, untrained_like
from dagman.evaluation.retrieval import draw_crops
from dagman.evaluation.scores import read_rows, read_summary
from dagman.evaluation.statistics import paired_comparison
from spade3d.networks.features import CELLS
from spade3d.networks.foreign import read_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.provenance import without_nan, write_json, write_text
from spade3d.training.checkpoint import newest
from spade3d.volumes.split import split_cases
from spade3d.volumes.store import VolumeStore

RESULTS = Path(__file__).resolve().parents[1] / "results"
UNTRAINED = "untrained"
PROBES = 4  # goes up when the probes change, so that no kept answer of older ones is used
DECODED_CELL = 4  # voxels of the decoded cells that Spade's local contrast reads
WITHOUT_NETWORK = {
    "position": "by place alone",
    "chance": "by chance",
    "random": "anywhere",
    "floor": "at best",
    "ceiling": "at best",
}
OF_ENCODERS = re.compile("features|agreement|^heads")  # the other measures are controls, the same for every arm

Run = tuple[str, int]  # arm, seed
Extra = tuple[list[str], list[str], list[str]]  # words for both commands, for pretraining, for fine-tuning
Words = tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What is compared: the words of each arm for spade-pretrain, those that run unless others are asked for, the arm
    that all are compared with, and the measures that its table shows. `decoded`: the decoder of the pretraining is
    judged as well, which every arm then must have."""

    summary: str
    arms: Mapping[str, Words]
    usual: Sequence[str]
    control: str
    headlines: Mapping[str, str]
    decoded: bool = False


def run_study(study: Study) -> None:
    """What each script of a study does."""
    asked, extra = options(sys.argv[1:], study, labels_and_scans)
    begin(asked, extra, {"labels": asked.labels})
    runs = [(arm, seed) for seed in asked.seeds for arm in asked.arms]
    with ThreadPoolExecutor(asked.jobs) as pool:  # after a failure no further run begins
        list(pool.map(lambda run: train(run, asked, extra), runs))
    store, cases, how = probing(asked, runs)
    torch.set_num_threads(asked.jobs)
    scores = defined({run: probed(run, asked, store, cases, how) for run in runs})
    result = {
        **origin(asked, extra),
        "probing": asdict(how) | {"scans": len(cases), "subjects": len({store.cases[i].subject for i in cases})},
        "pretraining_seconds": {arm: seconds_of(asked, arm) for arm in asked.arms if arm != UNTRAINED},
        "probes": of_probes(asked, scores),
        "few_shot": of_few_shots(asked) if asked.steps[1] else None,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{asked.name}.json", without_nan(result))
    show(result, study.headlines)


def labels_and_scans(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", default="8")
    parser.add_argument("--scans", type=int, default=24, help="held-out scans that are probed, at most")


def options(
    words: list[str], study: Study, add_own: Callable[[argparse.ArgumentParser], None]
) -> tuple[argparse.Namespace, Extra]:
    """Ours, and what follows `--`: words for both commands, for the first, and for the second."""
    cuts = [n for n, word in enumerate(words) if word == "--"]
    parts = [words[a + 1 : b] for a, b in zip([-1, *cuts], [*cuts, len(words)], strict=True)]
    parser = argparse.ArgumentParser(description=study.summary)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("PRE", "FINE"), required=True, help="FINE 0: no Dice")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=study.arms, default=list(study.usual))
    parser.add_argument("--control", choices=study.arms, default=study.control, help="what every arm is compared with")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    add_own(parser)
    asked = parser.parse_args(parts[0])
    asked.study = study
    if len(parts) > 4:
        parser.error("-- given more than three times; words for both commands, for the first and for the second")
    if asked.control not in asked.arms:
        parser.error(f"--control {asked.control} is not among the --arms {' '.join(asked.arms)}; add it")
    return asked, tuple(parts[1:] + [[]] * (4 - len(parts)))


def begin(asked: argparse.Namespace, extra: Extra, fixed: Mapping[str, Any]) -> None:
    """WORK and its store. Runs in WORK are taken for what is asked for, so WORK remembers it: data, steps, words and
    what is `fixed`; arms and seeds may be added."""
    asked.out.mkdir(parents=True, exist_ok=True)
    keep_to_what_was_begun(asked, extra, fixed)
    if not (asked.out / "store" / "index.json").exists():
        command(asked.out / "prepare.log", "spade-prepare", asked.data, "--out", asked.out / "store")


def keep_to_what_was_begun(asked: argparse.Namespace, extra: Extra, fixed: Mapping[str, Any]) -> None:
    path = asked.out / "asked.json"
    now = {"data": str(asked.data), "steps": asked.steps, **fixed, "extra": list(extra), "arms": {}}
    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    arms = {arm: list(asked.study.arms[arm]) for arm in asked.arms}
    other = [key for key in now if key != "arms" and begun.get(key) != now[key]]
    other += [arm for arm, words in arms.items() if begun["arms"].get(arm, words) != words]
    if other:
        sys.exit(f"{asked.out}: was begun with other settings ({', '.join(other)}); give another --out")
    write_json(path, now | {"arms": begun["arms"] | arms})


def origin(asked: argparse.Namespace, extra: Extra) -> dict[str, Any]:
    """What every result says of where it comes from."""
    return {
        "name": asked.name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "torch": version("torch")},
        "code": revision(),
        "steps": dict(zip(("pretraining", "fine-tuning"), asked.steps, strict=True)),
        "words": {arm: asked.study.arms[arm] for arm in asked.arms},
        "extra_words": dict(zip(("both", "pretraining", "fine-tuning"), extra, strict=True)),
        "seeds": asked.seeds,
        "control": asked.control,
    }


def revision() -> str:
    """The commit that made a result's table; runs kept in WORK may be older. Unknown where there is no git."""
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def pretrained(asked: argparse.Namespace, run: Run) -> Path:
    return asked.out / f"pretrained-{run[0]}-{run[1]}"


def tuned(asked: argparse.Namespace, run: Run) -> Path:
    return asked.out / f"tuned-{run[0]}-{run[1]}"


def train(run: Run, asked: argparse.Namespace, extra: Extra) -> None:
    """Pretrain and fine-tune one arm with one seed, as far as that is not done yet."""
    pretrain(run, asked, extra)
    if asked.steps[1]:
        fine_tune(run, tuned(asked, run), asked, extra, "--labels", asked.labels)


def pretrain(run: Run, asked: argparse.Namespace, extra: Extra) -> None:
    """As far as it is not done yet; the arm without pretraining has nothing to do."""
    (arm, seed), out = run, pretrained(asked, run)
    if arm != UNTRAINED and not (out / "report.html").exists():
        words = ("--seed", seed, "--steps", asked.steps[0], *extra[0], *extra[1])
        continued("spade-pretrain", asked.out / "store", out, asked.study.arms[arm], *words)


def fine_tune(run: Run, out: Path, asked: argparse.Namespace, extra: Extra, *few: object) -> None:
    """As far as it is not done yet; `few`: words that say which labelled subjects."""
    arm, seed = run
    if not (out / "summary.json").exists():
        init = () if arm == UNTRAINED else ("--init", pretrained(asked, run) / "encoder.safetensors")
        words = (*few, "--strict", "--seed", seed, "--steps", asked.steps[1], *extra[0], *extra[2])
        continued("dagman-finetune", asked.out / "store", out, init, *words)


def continued(name: str, store: Path, out: Path, own: Sequence[object], *words: object) -> None:
    """Run a command into `out`, or resume what it began there."""
    resume = ["--resume"] if (out / "config.yaml").exists() else []
    command(out.with_name(f"{out.name}.log"), name, store, "--out", out, *own, *words, *resume)


def command(log: Path, name: str, *words: object) -> None:
    """Run one console script of this environment, one thread, what it says in a file."""
    script = Path(sys.executable).with_name(name)
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    print(f"{log.stem}: {name} ...", flush=True)
    with open(log, "a", encoding="utf-8") as said:
        done = subprocess.run([script, *map(str, words)], stdout=said, stderr=subprocess.STDOUT, env=alone, check=False)
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise SystemExit(f"{name} ended with {done.returncode}: {' '.join(last)} (all of it: {log})")


def probing(asked: argparse.Namespace, runs: Sequence[Run]) -> tuple[VolumeStore, tuple[int, ...], Probing]:
    """The store, the held-out scans and the crops of the probes: those that every pretraining took."""
    trained = [run for run in runs if run[0] != UNTRAINED]
    if not trained:
        sys.exit(f"--arms {' '.join(asked.arms)}: at least one that is trained is needed, whose crops the probes take")
    said = {run: settings_of(asked, run) for run in trained}
    first = said[trained[0]]
    for run, one in said.items():
        for part, key in (("crop", "shape"), ("data", "spacing"), (None, "fold"), (None, "folds"), (None, "steps")):
            ours, theirs = ((of[part] if part else of)[key] for of in (first, one))
            if ours != theirs:
                sys.exit(f"{pretrained(asked, run)}: {key} {theirs}, others {ours}; give the same to all arms")
    store = VolumeStore.open(asked.out / "store")
    validation = split_cases(store.cases, first["folds"], first["fold"]).validation
    shape, spacing = tuple(first["crop"]["shape"]), tuple(first["data"]["spacing"])
    return store, held_out(store.cases, validation, asked.scans), Probing(shape, spacing, device=first["device"])


def settings_of(asked: argparse.Namespace, run: Run) -> dict[str, Any]:
    return yaml.safe_load((pretrained(asked, run) / "config.yaml").read_text(encoding="utf-8"))


def probed(run: Run, asked: argparse.Namespace, store: VolumeStore, cases: Sequence[int], how: Probing) -> Scores:
    """All measures of one run, from WORK where the same was asked before."""
    path, (arm, seed) = asked.out / f"probes-{run[0]}-{run[1]}.json", run
    like = run if arm != UNTRAINED else (next(one for one in asked.arms if one != UNTRAINED), seed)
    what = json.loads(json.dumps([PROBES, asdict(how), list(cases), weights_of(pretrained(asked, like))]))
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["what"] == what:
            return kept["scores"]
    checkpoint = pretrained(asked, like) / "encoder.safetensors"
    encoder = untrained_like(checkpoint, seed) if arm == UNTRAINED else read_encoder(checkpoint)
    print(f"probing {arm}, seed {seed}", flush=True)
    found = probe(encoder.to(how.device), store, cases, how)
    crops = [draw_crops(store, case, how)[0] for case in cases]
    scores = {**found.scores, **head_scores(encoder, store, crops, how)}
    if asked.study.decoded:
        decoder = decoded_maps(asked, like, trained=arm != UNTRAINED, device=how.device)
        one_map = replace(how, stages=(CELLS.index(DECODED_CELL),))
        decoded, _ = twin_agreement(standardised(decoder, store, cases, how), store, cases, one_map)
        scores |= {f"decoded.{measure}": of for measure, of in decoded.items()}
    for fault in found.not_asked:
        print(f"left out: {fault}", flush=True)
    kept = {"what": what, "left_out": found.left_out, "not_asked": found.not_asked, "scores": scores}
    write_text(path, json.dumps(kept))  # read here alone, and a head that is alone has NaN
    return scores


def weights_of(folder: Path) -> str:
    """One digest of all weights that a run handed on: an answer that is kept is one about these."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def defined(scores: Mapping[Run, Scores]) -> dict[Run, Scores]:
    """Without the measures that no run has: a stage of one token has no entropy, and a head that is alone no
    divergence."""
    nobody = {
        measure
        for measure in next(iter(scores.values()))
        if all(math.isnan(value) for one in scores.values() for values in one[measure].values() for value in values)
    }
    return {run: {measure: of for measure, of in one.items() if measure not in nobody} for run, one in scores.items()}


def decoded_maps(asked: argparse.Namespace, run: Run, *, trained: bool, device: str) -> Encoder:
    """The decoder that an arm was pretrained with, from its last checkpoint: what a local contrast acts upon. It is no
    part of the encoder that a pretraining hands on, and the instance baselines leave it as it was drawn."""
    torch.manual_seed(run[1])
    network = SwinUNETR(out_channels=1, **settings_of(asked, run)["network"])
    if trained:
        state, prefix = newest(pretrained(asked, run) / "checkpoints").state["task"], "student.network."
        network.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
    network.to(device).eval()
    return lambda images: network(images, finest=DECODED_CELL).decoded


def seconds_of(asked: argparse.Namespace, arm: str) -> float:
    """Of all steps of a pretraining, mean over seeds: equal steps are not equal costs."""
    logs = [pretrained(asked, (arm, seed)) / "log.jsonl" for seed in asked.seeds]
    steps = [json.loads(line) for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    return round(math.fsum(step.get("seconds", 0.0) for step in steps) / len(logs), 1)


def of_probes(asked: argparse.Namespace, scores: dict[Run, Scores]) -> dict[str, Any]:
    """Of each arm: every measure over subjects and seeds, what it gained over the control, and over random weights."""
    by_seed = {arm: {seed: scores[arm, seed] for seed in asked.seeds} for arm in asked.arms}
    found = {}
    for arm, of in by_seed.items():
        found[arm] = {"measures": summary_of(*of.values())}
        for name, other in references(asked, arm):
            gained = gains(of, by_seed[other])
            found[arm][name] = {measure: gained[measure] for measure in gained if OF_ENCODERS.search(measure)}
    return found


def references(asked: argparse.Namespace, arm: str) -> list[tuple[str, str]]:
    """What an arm is compared with, (name in the result, arm): the control, and, once trained, the untrained."""
    found = [] if arm == asked.control else [("over_control", asked.control)]
    return found + ([("over_untrained", UNTRAINED)] if arm != UNTRAINED in asked.arms else [])


def of_few_shots(asked: argparse.Namespace) -> dict[str, Any]:
    """Of each arm: mean Dice by seed, what it gained over the control, and over the run from scratch, paired by case
    and seed; of several structures, the same of each."""
    runs = {(arm, seed): tuned(asked, (arm, seed)) for arm in asked.arms for seed in asked.seeds}
    summaries = {run: read_summary(folder) for run, folder in runs.items()}
    check_protocols({runs[run]: summary for run, summary in summaries.items()})
    rows = {
        arm: [row | {"seed": seed} for seed in asked.seeds for row in read_rows(runs[arm, seed])] for arm in asked.arms
    }
    found = {}
    for arm in asked.arms:
        dice = [summaries[arm, seed]["mean_dice"] for seed in asked.seeds]
        found[arm] = {"labels": asked.labels, "mean_dice": fmean(dice), "by_seed": dice}
        for name, other in references(asked, arm):
            compared = [asdict(one) for one in paired_comparison(rows[other], rows[arm])]
            for seed in asked.seeds:
                both = ([row for row in rows[run] if row["seed"] == seed] for run in (other, arm))
                for one, in_seed in zip(compared, paired_comparison(*both), strict=True):
                    one.setdefault("by_seed", []).append(in_seed.difference)
            found[arm][name], *classes = compared
            if len(classes) > 1:
                found[arm][f"{name}_by_class"] = {one["name"]: one for one in classes}
    return found


def show(result: dict[str, Any], headlines: Mapping[str, str]) -> None:
    """One row an arm, then what needs no network."""
    caption = f"below: difference to {result['control']}, with its 95 % interval over subjects"
    known = result["probes"][result["control"]]["measures"]
    headlines = {name: said for name, said in headlines.items() if name in known}  # of one organ there are no clusters
    table = Table("", *headlines.values(), title=result["name"], caption=caption, show_lines=True)
    if result["few_shot"]:
        table.add_column("Dice")
    for arm, found in result["probes"].items():
        over = found.get("over_control", {})
        cells = [cell(found["measures"][name]["mean"], over.get(name)) for name in headlines]
        if result["few_shot"]:
            dice = result["few_shot"][arm]
            cells.append(cell(dice["mean_dice"], dice.get("over_control")))
        table.add_row(arm + (" (control)" if arm == result["control"] else ""), *cells)
    for measure, said in WITHOUT_NETWORK.items():
        names = [without_network(name, measure) for name in headlines]
        table.add_row(said, *(cell(known[name]["mean"], None) if name in known else "" for name in names))
    Console(width=max(120, Console().width)).print(table)


def without_network(name: str, kind: str) -> str | None:
    """The measure `name` of what needs no encoder, one of WITHOUT_NETWORK; None for what only an encoder has, such as
    the entropy of its heads."""
    return name.replace("features", kind) if "features" in name else None


def cell(mean: float, over: dict[str, float] | None) -> str:
    if over is None:
        return f"{mean:.3f}"
    return f"{mean:.3f}\n{over['difference']:+.3f}\n({over['low']:+.3f}, {over['high']:+.3f})"
