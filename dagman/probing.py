"""One run of dagman-probe: what frozen encoders know of held-out scans, beside controls, from options to report."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dagman.evaluation.answers import Answers, Shown, ask, ask_without, collapse, of_encoder, show
from dagman.evaluation.cka import cka_matrix
from dagman.evaluation.crop_features import Probing, Scores
from dagman.evaluation.leakage import find_leakage
from dagman.evaluation.probe_report import probe_report
from dagman.evaluation.probes import gains, held_out, summary_of
from dagman.frozen_encoders import said_of, trained, untrained
from dagman.recipes.probing import ProbeSettings, choose_crop, prepared_like
from spade3d import console
from spade3d.commands import STORE, find_device, report_rejected
from spade3d.configuration import Data
from spade3d.faults import DataFault
from spade3d.networks.foreign import SETTINGS
from spade3d.provenance import write_json, write_text
from spade3d.scans import open_scans, typical_grid
from spade3d.volumes.split import Split, split_cases
from spade3d.volumes.store import VolumeStore, is_store

RESULT, TABLE = "probes.json", "probes.csv"
UNTRAINED = "untrained"
COLUMNS = ("measure", "encoder", "mean", "low", "high", "subjects", "gain", "gain_low", "gain_high", "p")
HEADLINES = {  # what is printed, in this order, where it was asked
    "linear.accuracy.features": "linear_accuracy",
    "knn.accuracy.features": "knn_accuracy",
    "retrieval.features": "retrieval_overlap",
    "landmarks.centroid.features_mm": "landmarks_mm",
    "equivariance.moved.features": "equivariance",
}

Said = Mapping[str, Mapping[str, Any]]  # encoder -> what its file says


def run_probing(data: Path, encoders: Sequence[Path], settings: ProbeSettings, out: Path, *, strict: bool) -> dict:
    """What `dagman-probe` does; returns what it prints."""
    if (out / RESULT).exists():
        raise DataFault(f"{out}: already holds probes; give another --out")
    named = dict(zip(names_of(encoders), encoders, strict=True))
    said = {name: said_of(path) for name, path in named.items()}  # refused before hours of preparing
    device = find_device(settings.device)
    with console.fresh_folder(out, RESULT):
        asked = Data() if is_store(data) else prepared_like(list(said.values()))
        store = open_scans(data, out / STORE, asked, workers=settings.workers, strict=strict)
        report_rejected(store)
        judged = probed_scans(store, settings)
        leakage = {
            name: find_leakage(store, judged, one.get("provenance", {}), strict=strict) for name, one in said.items()
        }
        shape, chosen = choose_crop(settings, said, store, judged.validation, device)
        spacing = typical_grid(store, judged.validation)[1]
        shown = show(store, judged.validation, Probing(shape, spacing, seed=settings.seed, device=device))
        notes = [*shown.left_out, *(spacing_notes(said, spacing))]
        announce(named, shown, judged, chosen, notes)
        answers, twins = ask_all(named, said, shown)
        result = {
            "data": str(data),
            "split": judged.rule,
            "scans": [store.cases[i].name for i in judged.validation],
            "subjects": sorted({store.cases[i].subject for i in judged.validation}),
            "probing": asdict(shown.how) | {"crop": chosen},
            "notes": list(dict.fromkeys([*notes, *(line for one in answers.values() for line in one.left_out)])),
            "encoders": {
                name: about(said[name], path, leakage[name]) | described(name, answers, twins)
                for name, path in named.items()
            },
            "untrained": {name: described(name, answers, {}) for name in dict.fromkeys(twins.values())},
            "controls": controls_of(answers, shown),
            "cka": cka_of(answers, twins),
        }
        result = plain(result)
        write_text(out / TABLE, csv_of(result))
        report = probe_report(out, result)
        write_json(out / RESULT, result)
    return headline(result) | {"report": str(report)}


def names_of(encoders: Sequence[Path]) -> list[str]:
    """What each encoder is called: its run's folder where the file has the name that every run gives, else the file's;
    numbered where two would be called the same."""
    plainly = [path.resolve().parent.name if path.stem == "encoder" else path.stem for path in encoders]
    return [
        f"{name} {plainly[: n + 1].count(name)}" if plainly.count(name) > 1 else name for n, name in enumerate(plainly)
    ]


def probed_scans(store: VolumeStore, settings: ProbeSettings) -> Split:
    """The scans that are probed, as the judges of a split: those that pretraining with this fold left alone; all where
    no labels say who judges. At most `scans` of them, of as many subjects as possible."""
    split = split_cases(store.cases, settings.folds, settings.fold)
    if split.validation:
        return Split((), held_out(store.cases, split.validation, settings.scans), split.rule)
    chosen = held_out(store.cases, range(len(store)), settings.scans)
    return Split((), chosen, "too few labels to hold anybody out: pretraining on these scans learned from all of them")


def spacing_notes(said: Said, spacing: Sequence[float]) -> list[str]:
    """Encoders that are shown voxels of another size than they were trained on."""
    trained = {name: one.get("preprocessing", {}).get("spacing") for name, one in said.items()}
    return [
        f"{name} was trained at {mm(theirs)}, the scans are stored at {mm(spacing)}: it never saw voxels of this size"
        for name, theirs in trained.items()
        if theirs is not None
        and not all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(theirs, spacing, strict=True))
    ]


def mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{one:g}" for one in spacing) + " mm"


def ask_all(named: Mapping[str, Path], said: Said, shown: Shown) -> tuple[dict[str, Answers], dict[str, str]]:
    """The answers of all encoders and of an untrained twin of each architecture; encoder -> name of its twin."""
    architectures: dict[str, list[str]] = {}
    for name, one in said.items():
        architectures.setdefault(str([one[key] for key in SETTINGS]), []).append(name)
    alone = len(architectures) == 1
    twins = {name: UNTRAINED if alone else f"{UNTRAINED} {of[0]}" for of in architectures.values() for name in of}
    loaders = {name: lambda path=path: trained(path) for name, path in named.items()}
    for name, twin in twins.items():
        loaders.setdefault(twin, lambda one=said[name]: untrained(one, shown.how.seed))
    answers: dict[str, Answers] = {}
    with console.progress_of("probing") as progress:
        for n, (name, load) in enumerate(loaders.items()):
            progress(n, len(loaders), name)
            answers[name] = ask(load().to(torch.device(shown.how.device)), shown)
        progress(len(loaders), len(loaders), "")
    return answers, twins


def about(said: Mapping[str, Any], path: Path, leakage: Mapping[str, Any]) -> dict[str, Any]:
    """Where an encoder comes from."""
    network = {key: said[key] for key in SETTINGS}
    return {"path": str(path), "run": said.get("run"), "network": network, "leakage": dict(leakage)}


def described(name: str, answers: Mapping[str, Answers], twins: Mapping[str, str]) -> dict[str, Any]:
    """The measures of an encoder, and what it gained over its untrained twin where it has one."""
    mine = answers[name]
    scores = own(mine.scores)
    found = {
        "measures": summarised(scores) | {key: one._asdict() for key, one in mine.joint.items()},
        "by_subject": scores,
        "signs": mine.signs,
        "collapsed": {stage: said for stage, signs in mine.signs.items() if (said := collapse(signs))},
    }
    if name in twins:
        shared = own(answers[twins[name]].scores)
        found |= {"untrained": twins[name], "gains": gains({0: scores}, {0: shared})}
    return found


def own(scores: Scores) -> dict[str, Mapping[str, Sequence[float]]]:
    """The measures that are an encoder's, without controls."""
    return {measure: of for measure, of in scores.items() if of_encoder(measure)}


def summarised(scores: Scores) -> dict[str, dict[str, float | int]]:
    """Mean over subjects with its interval, and the number of subjects."""
    return {measure: one | {"subjects": len(scores[measure])} for measure, one in summary_of(scores).items()}


def controls_of(answers: Mapping[str, Answers], shown: Shown) -> dict[str, Any]:
    """What is found without an encoder: it is the same whichever encoder was asked."""
    scores, joint = ask_without(shown)
    for one in answers.values():
        scores = {measure: of for measure, of in one.scores.items() if not of_encoder(measure)} | scores
    measures = summarised(scores) if scores else {}
    return {"measures": measures | {key: one._asdict() for key, one in joint.items()}, "by_subject": scores}


def cka_of(answers: Mapping[str, Answers], twins: Mapping[str, str]) -> list[dict[str, Any]]:
    """CKA of all layers of an encoder with its own, with its untrained twin's, and with each other encoder's."""
    names = list(twins)
    pairs = [(name, name) for name in names] + list(twins.items())
    pairs += [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
    return [
        {
            "rows": a,
            "columns": b,
            "row_layers": list(answers[a].layers),
            "column_layers": list(answers[b].layers),
            "cka": cka_matrix(list(answers[a].layers.values()), list(answers[b].layers.values())).tolist(),
        }
        for a, b in pairs
    ]


def announce(named: Mapping[str, Path], shown: Shown, judged: Split, chosen: str, notes: Sequence[str]) -> None:
    """What will be asked, before it takes its time."""
    subjects = {shown.store.cases[i].subject for i in judged.validation}
    console.print_choice(
        "dagman-probe",
        {
            "encoders": ", ".join(named),
            "probed": f"{len(judged.validation)} scans of {len(subjects)} subjects; {judged.rule}",
            "crop": " x ".join(map(str, shown.how.shape)) + f" voxels of {mm(shown.how.spacing)}, {chosen}",
            "device": shown.how.device,
        },
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the command prints."""
    said = {}
    for name, found in result["encoders"].items():
        measures = found["measures"]
        said[name] = {
            key: {
                **{end: rounded(measures[measure][end]) for end in ("mean", "low", "high")},
                "over_untrained": rounded(found["gains"][measure]["difference"]),
            }
            for measure, key in HEADLINES.items()
            if measure in measures
        }
        said[name] |= {"collapsed": list(found["collapsed"])}
        said[name] |= {"seen_in_pretraining": found["leakage"]["validation_in_pretraining"]}
    return {"scans": len(result["scans"]), "subjects": len(result["subjects"]), "encoders": said}


def rounded(value: float | int | None) -> float | int | None:
    return None if value is None else round(value, 4)


def csv_of(result: Mapping[str, Any]) -> str:
    """Every measure of every encoder and every control, a row each; gains are over the untrained twin."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    groups = {**result["encoders"], **result["untrained"], "": result["controls"]}
    for name, found in groups.items():
        for measure, one in found["measures"].items():
            row = {"measure": measure, "encoder": name} | {key: one[key] for key in ("mean", "low", "high", "subjects")}
            if gained := found.get("gains", {}).get(measure):
                row |= {"gain": gained["difference"], "gain_low": gained["low"], "gain_high": gained["high"]}
                row |= {"p": gained["p"]}
            writer.writerow(row)
    return text.getvalue()


def plain(value: Any) -> Any:
    """As JSON has it: no NaN, no tuples."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
