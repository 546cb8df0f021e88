"""CLARiTy's pieces, and maps that know nothing: who finds planted lesions of which only the study is told.

DATA is a set of phantoms with findings, all labelled (`python -m spade3d.volumes.phantoms --kind abdomen-ct --findings
...`). With each seed one encoder is pretrained (words after the second `--`: `-- -- --recipe dagman`), and each arm
trains a head on it by `dagman-finetune --task localisation`: `clarity`, the same without one piece each, and with a
teacher. Its prior are the organs of the studies that teach; of those that judge it is told nothing. The same judge, on
the same studies, sees Grad-CAM of a linear head on that encoder, chance, the middle of the volume, and the
true organs of each scan: flat, and highest in their middle. A map of the organs names the place that the question
names, so what a head has more is what it knows of the look. `truth on cells` is what cells of that size allow.

The threshold that makes a box of a map is chosen on half of the judged subjects for the other half, for every row of
the table alike (dagman/evaluation/localisation.py). Differences are those of --control to each row, paired by box
and seed, with intervals over subjects. What is finished in WORK is not run again, and what was interrupted is resumed.
Words after `--` go to both commands (`-- --folds 3 --device cpu`), those after a second `--` to spade-pretrain alone,
after a third to dagman-finetune alone. Writes benchmarks/results/NAME.json.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from arms import RESULTS, Extra, Run, Study, begin, cell, continued, options, origin
from rich.console import Console
from rich.table import Table

from dagman.downstream.studies import Findings, read_findings
from dagman.downstream.study_model import load_study_model
from dagman.downstream.token_cache import TokenCache, mark_of
from dagman.downstream.token_grids import CELL, channels_of
from dagman.evaluation.annotations import Annotation, HeatMap, read_boxes
from dagman.evaluation.boxes import inside
from dagman.evaluation.finding_means import Row, difference, summary
from dagman.evaluation.localisation import MEASURES, Judging, measured, rows_of
from dagman.evaluation.localisation_baselines import truth_on_cells
from dagman.recipes.studies import trained_crop
from dagman.study_baselines import Way, asked_of, drawn, grad_cams, of_no_network
from dagman.study_judging import Judge
from spade3d.provenance import without_nan, write_json, write_text
from spade3d.volumes.findings import FINDINGS
from spade3d.volumes.split import split_cases
from spade3d.volumes.store import VolumeStore

ORGANS = {kind.name: kind.organs for kind in FINDINGS}
PRIOR = ("--config", "{work}/prior.yaml")  # in which organs a finding may be
SIZE = ("--clarity.dim", "96", "--clarity.width", "16")  # for a CPU
CLARITY = ("--task", "localisation", "--head", "clarity", *SIZE)
WHOLE = (*CLARITY, *PRIOR)
JUDGED = 1  # goes up when the judging changes, so that nothing kept of an older one is used
UNTRAINED, GRAD_CAM = "no-pretraining", "grad-cam"
ARMS: dict[str, tuple[str, ...]] = {
    "clarity": WHOLE,
    "no-segment-cam": (*WHOLE, "--clarity.no-segment-cam"),
    UNTRAINED: WHOLE,
    "no-forcing": (*WHOLE, "--clarity.no-prior-forcing"),
    "no-orthogonal": (*WHOLE, "--clarity.orthogonal_weight", "0"),
    "no-pooling": (*WHOLE, "--clarity.no-attention-pooling"),
    "no-prior": CLARITY,
    "teacher": (*WHOLE, "--clarity.teacher_weight", "0.5"),
    "attention": ("--task", "localisation", "--head", "attention"),
    GRAD_CAM: ("--task", "classification", "--head", "linear"),
}
HEADLINES = {
    "iou": "IoU",
    "t_iou_0.1": "T(IoU 0.1)",
    "t_iou_0.3": "T(IoU 0.3)",
    "t_iobb_0.25": "T(IoBB 0.25)",
    "centre_inside": "centre inside",
    "pointing": "pointing",
    "pointing_near": "pointing, 10 mm",
    "voxel_ap": "voxel AP",
}


@dataclass(frozen=True)
class Judged:
    """The studies that judge, and where their findings are."""

    store: VolumeStore
    findings: Findings
    cases: tuple[int, ...]
    annotations: Sequence[Annotation]


def main() -> None:
    asked, extra = options(
        sys.argv[1:], Study(__doc__.split("\n\n")[0], ARMS, list(ARMS), "clarity", HEADLINES), nothing
    )
    if missing := [name for name in ("findings.csv", "boxes.csv") if not (asked.data / name).is_file()]:
        sys.exit(f"{asked.data}: has no {' and no '.join(missing)}; draw phantoms with --findings")
    begin(asked, extra, {})
    write_prior(asked.out / "prior.yaml")
    runs = [(arm, seed) for arm in asked.arms for seed in asked.seeds]  # two at once: tokens of two encoders
    with ThreadPoolExecutor(asked.jobs) as pool:  # after a failure no further run begins
        list(pool.map(lambda seed: pretrain(asked, seed, extra), asked.seeds))
        list(pool.map(lambda run: tune(asked, run, extra), runs))
    torch.set_num_threads(asked.jobs)
    judged = judges(asked)
    rows = {**of_arms(asked, judged), **of_baselines(asked, judged)}
    first = asked.control
    result = {
        **origin(asked, extra),
        "studies": len(judged.store),
        "judged": {"studies": len(judged.cases), "boxes": len(judged.annotations)},
        "voxel_mm": judged.store.cases[judged.cases[0]].spacing,
        "macro_auroc": {arm: fmean(auroc(asked, (arm, seed)) for seed in asked.seeds) for arm in asked.arms},
        "measures": {name: summary(of, MEASURES) for name, of in rows.items()},
        "by_finding": {name: by_finding(of) for name, of in rows.items()},
        "by_size": {name: by_size(of) for name, of in rows.items()},
        "over_others": {
            name: {measure: asdict(difference(of, rows[first], measure)) for measure in MEASURES}
            for name, of in rows.items()
            if name != first
        },
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{asked.name}.json", without_nan(result))
    show(result)


def nothing(parser: argparse.ArgumentParser) -> None:
    """Scans and labels are all taken."""


def pretrained(asked: argparse.Namespace, seed: int) -> Path:
    return asked.out / f"pretrained-{seed}"


def tuned(asked: argparse.Namespace, run: Run) -> Path:
    return asked.out / f"{run[0]}-{run[1]}"


def pretrain(asked: argparse.Namespace, seed: int, extra: Extra) -> None:
    """One encoder for all arms of a seed, as far as that is not done yet."""
    out = pretrained(asked, seed)
    if not (out / "report.html").exists():
        words = ("--seed", seed, "--steps", asked.steps[0], *extra[0], *extra[1])
        continued("spade-pretrain", asked.out / "store", out, (), *words)


def tune(asked: argparse.Namespace, run: Run, extra: Extra) -> None:
    """The head of one arm and seed; arms of one encoder share its tokens."""
    (arm, seed), out = run, tuned(asked, run)
    if (out / "summary.json").exists():
        return
    trained = arm != UNTRAINED
    init = (
        ("--init", pretrained(asked, seed) / "encoder.safetensors")
        if trained
        else ("--config", write_like(asked, seed))
    )
    # Baselines are judged here, once for all arms.
    boxes = () if arm == GRAD_CAM else ("--boxes", asked.data / "boxes.csv", "--scoring.no-baselines")
    tables = ("--findings", asked.data / "findings.csv", *boxes)
    tokens = ("--tokens", asked.out / f"tokens-{'pretrained' if trained else 'untrained'}-{seed}")
    words = (*init, *tables, *tokens, "--seed", seed, "--steps", asked.steps[1], *extra[0], *extra[2])
    own = [word.format(work=asked.out) for word in ARMS[arm]]
    continued("dagman-finetune", asked.out / "store", out, own, *words)


def write_prior(path: Path) -> None:
    """What the arms are told of findings: their organs, which the labels of each study that teaches show."""
    table = {name: {"organs": [organs[0].split()[-1]]} for name, organs in ORGANS.items()}  # a kidney on either side
    prior = {"source": "labels", "table": table}
    path.write_text(yaml.safe_dump({"clarity": {"prior": prior}}), encoding="utf-8")


def write_like(asked: argparse.Namespace, seed: int) -> Path:
    """The settings of an encoder that differs from the pretrained one in its weights alone."""
    first = pretrained(asked, seed)
    said = yaml.safe_load((first / "config.yaml").read_text(encoding="utf-8"))
    path = asked.out / f"like-{seed}.yaml"
    shape = list(trained_crop(str(first / "encoder.safetensors")))
    path.write_text(yaml.safe_dump({"network": said["network"], "crop": {"shape": shape}}), encoding="utf-8")
    return path


def judges(asked: argparse.Namespace) -> Judged:
    """The studies that every run held out."""
    store = VolumeStore.open(asked.out / "store")
    findings = read_findings(asked.data / "findings.csv", store.cases)
    said = yaml.safe_load((tuned(asked, (asked.arms[0], asked.seeds[0])) / "config.yaml").read_text(encoding="utf-8"))
    cases = split_cases(findings.studies, said["folds"], said["fold"]).validation
    subjects = {store.cases[case].subject for case in cases}
    boxes = [box for box in read_boxes(asked.data / "boxes.csv") if box.subject in subjects]
    return Judged(store, findings, cases, boxes)


def of_arms(asked: argparse.Namespace, judged: Judged) -> dict[str, list[Row]]:
    """The rows of every arm, of all seeds, as its runs judged themselves; Grad-CAM's are judged here."""
    rows: dict[str, list[Row]] = {}
    for arm in asked.arms:
        for seed in asked.seeds:
            folder = tuned(asked, (arm, seed))
            if arm == GRAD_CAM:
                tokens = asked.out / f"tokens-pretrained-{seed}"
                maps = partial(of_linear_head, folder, judged, tokens)
                (found,) = kept(asked, f"{arm}-{seed}", [seed], judged, maps, folder / "model.safetensors")
            else:
                found = read_judged(folder)
            rows.setdefault(arm, []).extend(row | {"seed": seed} for row in found)
    return rows


def read_judged(folder: Path) -> list[Row]:
    said = json.loads((folder / "localisation.json").read_text(encoding="utf-8"))["rows"]
    return [{key: float("nan") if value is None else value for key, value in row.items()} for row in said]


def of_baselines(asked: argparse.Namespace, judged: Judged) -> dict[str, list[Row]]:
    """Maps without a network; the halves that choose thresholds are drawn anew with each seed."""
    store, cells = judged.store, (CELL,) * 3
    organs = {
        finding: [value for value, name in store.label_names.items() if name in names]
        for finding, names in ORGANS.items()
    }

    def truth(case: int, finding: str) -> np.ndarray:
        stored = store.cases[case]
        own = [box for box in judged.annotations if (box.subject, box.finding) == (stored.subject, finding)]
        return np.any([inside(box.box_mm, stored.shape, stored.affine) for box in own], axis=0)

    ways: dict[str, Way] = of_no_network(store, lambda case: cells, 0, organs)
    ways["truth on cells"] = lambda case, finding: truth_on_cells(truth(case, finding), cells)
    asked_for = asked_of(store, judged.cases, ORGANS, judged.annotations)
    rows = {}
    for name, way in ways.items():
        found = kept(asked, name, asked.seeds, judged, lambda way=way: drawn(store, asked_for, way))
        rows[name] = [row | {"seed": seed} for seed, of in zip(asked.seeds, found, strict=True) for row in of]
    return rows


def kept(
    asked: argparse.Namespace,
    name: str,
    seeds: Sequence[int],
    judged: Judged,
    maps: Callable[[], Iterator[HeatMap]],
    model: Path | None = None,
) -> list[list[Row]]:
    """The rows of some maps, for each seed as a run with this seed judges its own; what was judged before is not judged
    again, for a map of a whole body takes a second."""
    path = asked.out / f"judged-{name.replace(', ', '-').replace(' ', '-')}.json"
    what = [JUDGED, [*seeds], sorted((one.subject, one.finding) for one in judged.annotations)]
    what = json.loads(json.dumps(what))
    what += [] if model is None else [hashlib.sha256(model.read_bytes()).hexdigest()]
    if path.exists() and (said := json.loads(path.read_text(encoding="utf-8")))["what"] == what:
        return said["rows"]
    print(f"judging {name}", flush=True)
    found = measured(maps(), judged.annotations)
    rows = [rows_of(found, Judging(seed=seed)) for seed in seeds]
    write_text(path, json.dumps({"what": what, "rows": rows}))  # read here alone, and a map of zeros has NaN
    return rows


def of_linear_head(folder: Path, judged: Judged, tokens: Path) -> Iterator[HeatMap]:
    """Grad-CAM of a run of classification, on the tokens that it was trained with."""
    model = load_study_model(folder)
    kept = TokenCache(judged.store, model.windows, tokens, mark_of(model.encoder), channels_of(model.encoder))
    judge = Judge(model, judged.store, judged.findings, judged.cases, torch.device("cpu"), kept)
    return grad_cams(judge, judged.annotations)


def auroc(asked: argparse.Namespace, run: Run) -> float:
    return json.loads((tuned(asked, run) / "summary.json").read_text(encoding="utf-8"))["macro_auroc"]


def by_finding(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    return _means(rows, lambda row: row["finding"])


def by_size(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Below and above the median size of the boxes: a third of an octave is all that phantoms differ by."""
    middle = float(np.median([row["diameter_mm"] for row in rows]))
    return _means(rows, lambda row: f"{'below' if row['diameter_mm'] < middle else 'from'} {middle:.0f} mm")


def _means(rows: Sequence[Row], group: Callable[[Row], str]) -> dict[str, dict[str, float]]:
    names = sorted({group(row) for row in rows})
    return {
        name: {
            measure: found["mean"]
            for measure, found in summary([row for row in rows if group(row) == name], list(HEADLINES)).items()
        }
        for name in names
    }


def show(result: Mapping[str, Any]) -> None:
    """One row a method; what the first arm has more."""
    caption = f"below: what {result['control']} has more, with its 95 % interval over subjects"
    table = Table("", "AUROC", *HEADLINES.values(), title=result["name"], caption=caption, show_lines=True)
    for name, of in result["measures"].items():
        over = result["over_others"].get(name, {})
        said = result["macro_auroc"].get(name)
        cells = (cell(of[measure]["mean"], over.get(measure)) for measure in HEADLINES)
        table.add_row(name, "" if said is None else f"{said:.3f}", *cells)
    Console(width=max(150, Console().width)).print(table)


if __name__ == "__main__":
    main()
