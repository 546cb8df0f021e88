"""The whole road on seven phantoms: scans in, encoder, fine-tuned twins, predictions, comparison and reports out."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import dagman.commands
import spade3d.commands
import spade3d.saliency_commands
from spade3d.networks.foreign import describe_encoder, load_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training.checkpoint import steps_in
from spade3d.training.journal import read_log
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.volume import read_grid, read_labels, read_volume, write_volume

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 10
PRETRAIN = ["--steps", STEPS, "--save-every", 3, "--crop.shape", 16, 16, 16, "--crop.places", 16]
PRETRAIN += ["--network.feature-size", 12, "--network.window", 4, "--contrast.global-memory", 32]
PRETRAIN += ["--contrast.local-memory", 64, "--seed", 3, "--device", "cpu"]
FINETUNE = ["--steps", 4, "--save-every", 2, "--crop.shape", 24, 24, 24, "--labels", 3, "--scoring.looks", 1]
FINETUNE += ["--scoring.overlap", 0.25, "--device", "cpu"]
TWIN = ["--network.feature-size", 12, "--network.window", 4]  # what a run from scratch is told, and a checkpoint says


def run(command, *tokens) -> dict:
    """Call a console script as a shell would, expect success, and return what it prints with --json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        command([*map(str, tokens), "--json"])
    assert end.value.code == 0
    return json.loads(printed.getvalue())


def losses(folder: Path) -> list[dict]:
    return [row["losses"] for row in read_log(folder / "log.jsonl")]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopped(number: int, rows: int, folder: Path, module: str, tokens) -> int:
    """Run a console script in a process of its own, signal it once its log holds `rows`, and return how it ended."""
    script = f"import sys; from {module.rpartition('.')[0]} import {module.rpartition('.')[2]} as command; command()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, tokens)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, patience = folder / "log.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < patience:
        if log.exists() and log.read_bytes().count(b"\n") >= rows:
            process.send_signal(number)
            break
        time.sleep(0.005)
    return process.wait(timeout=60)


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """scans -> store -> pretrained -> finetuned and scratch -> predicted, comparison."""
    place = tmp_path_factory.mktemp("road")
    size = {"shape": (40, 40, 32), "spacing": (6.0, 6.0, 6.0)}
    write_dataset("heart-ct", place / "scans", patients=5, unlabelled=2, seed=1, **size)
    prepared = run(spade3d.commands.prepare, place / "scans", "--out", place / "store", "--spacing", 6.5, 6.5, 6.5)
    assert prepared == {"store": str(place / "store"), "scans": 7, "labelled": 5, "left_out": 0}
    store, pretrained = place / "store", place / "pretrained"
    said = run(spade3d.commands.pretrain, store, "--out", pretrained, *PRETRAIN)
    assert said["steps"] == STEPS and Path(said["encoder"]) == pretrained / "encoder.safetensors"
    begin = ["--init", pretrained / "encoder.safetensors"]
    run(dagman.commands.finetune, store, "--out", place / "finetuned", *begin, *FINETUNE)
    run(dagman.commands.finetune, store, "--out", place / "scratch", *TWIN, *FINETUNE)
    sides = (place / "finetuned", place / "scratch")
    said = run(dagman.commands.compare, *sides, "--out", place / "comparison")
    assert said["reference"] == "from scratch"
    return place


@pytest.mark.parametrize("name", ["pretrained", "finetuned", "scratch"])
def test_a_run_leaves_what_it_promises(road, name):
    folder = road / name
    promised = {"config.yaml", "log.jsonl", "checkpoints", "provenance.json", "report.html", "tensorboard"}
    promised |= {"began_with.json"}
    if name == "pretrained":
        promised |= {"encoder.safetensors", "body_frames.json"}
    else:
        promised |= {"model.safetensors", "predictions", "cases.csv", "summary.json"}
    assert {path.name for path in folder.iterdir()} == promised
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows = read_log(folder / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, config["steps"] + 1))
    assert all(np.isfinite(row["total"]) and row["total"] == pytest.approx(sum(row["losses"].values())) for row in rows)
    assert steps_in(folder / "checkpoints")[-1].name == f"step-{config['steps']:07d}.pt"
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["versions"]["torch"] == torch.__version__
    assert all(len(case["fingerprint"]) == 64 for case in provenance["cases"])


@pytest.mark.parametrize("name", ["pretrained", "finetuned", "scratch", "comparison"])
def test_a_report_is_one_file_that_asks_for_nothing(road, name):
    html = unescape((road / name / "report.html").read_text(encoding="utf-8"))
    assert re.search(r"(?i)content-security-policy[^>]*default-src 'none'", html)
    for request in (r"https?://(?!www\.w3\.org/)", r"<script", r"<link", r"<iframe", r"@import", r"\son\w+="):
        assert not re.search(request, html, re.IGNORECASE), request
    sources = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)""", html)
    assert all((a or b).startswith(("data:", "#")) for a, b in sources)
    assert ("data:image/" in html) == (name != "comparison")


def test_nobody_who_judges_was_seen_before(road):
    pretrained = json.loads((road / "pretrained" / "provenance.json").read_text(encoding="utf-8"))
    for name in ("finetuned", "scratch"):
        folder = road / name
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        judges, taught = set(summary["split"]["validation"]), set(summary["split"]["train"])
        assert judges and len(taught) == summary["labels"] == 3 and not judges & taught
        assert judges == {case["subject"] for case in pretrained["held_out"]}
        assert not judges & {case["subject"] for case in pretrained["cases"]}
        assert {
            case["subject"] for case in json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["cases"]
        } == taught
        checked = {"finetuned": "checked", "scratch": "none"}[name]
        compared = {"finetuned": [len(pretrained["cases"])] * 2, "scratch": [0, 0]}[name]
        nobody = {"validation_in_training": [], "validation_in_pretraining": []}
        nobody |= {"suspected_in_pretraining": [], "evidence": {}, "compared_by_voxels": compared}
        nobody |= {"steered": {}, "steered_by_validation": []}
        assert summary["leakage"] == {"pretraining": checked, **nobody}
        assert "no validation subject entered training" in (folder / "report.html").read_text(encoding="utf-8").replace(
            "\u00a0", " "
        )


def test_the_summary_and_the_cases_say_the_same(road):
    for name in ("finetuned", "scratch"):
        summary = json.loads((road / name / "summary.json").read_text(encoding="utf-8"))
        with open(road / name / "cases.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert ",".join(rows[0]).startswith("case,subject,class,name,dice,hd95_mm,nsd,voxels_true,voxels_predicted,")
        cases = sorted({row["case"] for row in rows})
        assert len(rows) == 7 * len(cases) == 7 * summary["cases"]
        by_case = [[float(row["dice"]) for row in rows if row["case"] == case and row["dice"]] for case in cases]
        assert summary["mean_dice"] == pytest.approx(np.mean([np.mean(dice) for dice in by_case]), abs=1e-5)
        low, high = summary["mean_dice_interval"] or (None, None)
        assert low is None or low <= summary["mean_dice"] <= high
        assert summary["per_class"].keys() == {row["name"] for row in rows}
        assert {row["subject"] for row in rows} == set(summary["split"]["validation"])
        assert summary["protocol"]["spacing_mm"] == [6.5, 6.5, 6.5] and summary["seed"] == 0
        loaded = summary["coverage"] and (summary["coverage"]["loaded"], summary["coverage"]["total"])
        assert loaded == {"finetuned": (118, 118), "scratch": None}[name]
        assert sorted(path.name for path in (road / name / "predictions").iterdir()) == [f"{c}.nii.gz" for c in cases]
        for case in cases:  # what the table counts is what lies in the file, on the scan's own grid
            truth = road / "scans" / "ct_train" / f"{case}_label.nii.gz"
            written = road / name / "predictions" / f"{case}.nii.gz"
            assert_same_grid(written, truth)
            found, drawn = read_labels(written).voxels, read_labels(truth).voxels
            for row in (row for row in rows if row["case"] == case):
                value = int(row["class"])
                assert int(row["voxels_predicted"]) == np.count_nonzero(found == value)
                assert int(row["voxels_true"]) == np.count_nonzero(drawn == value)
                both = np.count_nonzero((found == value) & (drawn == value))
                if both:
                    assert float(row["dice"]) == pytest.approx(
                        2 * both / (int(row["voxels_true"]) + int(row["voxels_predicted"]))
                    )


def assert_same_grid(one: Path, other: Path):
    a, b = read_grid(one), read_grid(other)
    assert a.shape == b.shape
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)


def test_the_twins_differ_in_the_encoder_only(road):
    configs = [
        yaml.safe_load((road / name / "config.yaml").read_text(encoding="utf-8")) for name in ("finetuned", "scratch")
    ]
    begun = [config.pop("init") for config in configs]
    assert begun == [str(road / "pretrained" / "encoder.safetensors"), None]
    assert configs[0] == configs[1]
    result = json.loads((road / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    (side,) = result["comparisons"]
    whole, *classes = result["comparisons"][side]
    means = [
        json.loads((road / name / "summary.json").read_text(encoding="utf-8"))["mean_dice"]
        for name in ("scratch", "finetuned")
    ]
    assert (whole["mean_a"], whole["mean_b"]) == pytest.approx(tuple(means), abs=1e-5) and len(classes) == 7


def test_the_encoder_is_monais_too(road):
    path = road / "pretrained" / "encoder.safetensors"
    weights, said = load_file(path), describe_encoder(path)
    assert all(name.startswith("swinViT.") for name in weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = pytest.importorskip("monai.networks.nets")
    theirs = nets.SwinUNETR(1, 1, feature_size=said["feature_size"], window_size=said["window"][0])
    theirs.swinViT.load_state_dict({name.removeprefix("swinViT."): w for name, w in weights.items()}, strict=True)
    ours = SwinUNETR(1, 1, feature_size=12, window=4)
    coverage = load_encoder(ours, path)
    assert coverage.loaded == coverage.total
    x = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))  # 4^3 cells last: no clipped window
    with torch.no_grad():
        for a, b in zip(ours(x, finest=None).stages, theirs.swinViT(x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_its_configuration_repeats_a_run(road, tmp_path):
    pretrained = road / "pretrained"
    run(spade3d.commands.pretrain, "--config", pretrained / "config.yaml", "--out", tmp_path / "again")
    assert losses(tmp_path / "again") == losses(pretrained)
    assert same_weights(tmp_path / "again" / "encoder.safetensors", pretrained / "encoder.safetensors")
    assert (tmp_path / "again" / "config.yaml").read_text(encoding="utf-8") == (pretrained / "config.yaml").read_text(
        encoding="utf-8"
    )
    config = ["--config", pretrained / "config.yaml"]
    run(spade3d.commands.pretrain, *config, "--out", tmp_path / "other", "--seed", 4, "--steps", 2)
    assert losses(tmp_path / "other") != losses(pretrained)[:2]

    finetuned = road / "finetuned"
    run(dagman.commands.finetune, "--config", finetuned / "config.yaml", "--out", tmp_path / "tuned")
    assert losses(tmp_path / "tuned") == losses(finetuned)
    assert (tmp_path / "tuned" / "cases.csv").read_bytes() == (finetuned / "cases.csv").read_bytes()


def test_a_pretraining_that_was_shot_ends_with_the_same_bits(road, tmp_path):
    begun = [road / "store", "--out", tmp_path, *PRETRAIN]
    assert stopped(signal.SIGKILL, 4, tmp_path, "spade3d.commands.pretrain", begun) == -signal.SIGKILL
    assert not (tmp_path / "encoder.safetensors").exists()
    saved = steps_in(tmp_path / "checkpoints")[-1].name
    assert saved in ("step-0000003.pt", "step-0000006.pt", "step-0000009.pt")
    run(spade3d.commands.pretrain, *begun, "--resume")
    assert losses(tmp_path) == losses(road / "pretrained")
    assert same_weights(tmp_path / "encoder.safetensors", road / "pretrained" / "encoder.safetensors")


@pytest.mark.parametrize("recipe", ["dagman", "spade-dagman"])
def test_a_distillation_that_was_shot_ends_with_the_same_bits(road, tmp_path, recipe):
    """Teacher, centres, memories and guided heads are part of what goes on."""
    words = ["--recipe", recipe, "--steps", 6, "--save-every", 2, "--crop.shape", 16, 16, 16, "--crop.frame", "box"]
    words += ["--network.feature-size", 12, "--network.window", 4, "--distill.stage", 2, "--distill.prototypes", 32]
    words += ["--prior.source", "atlas", "--distill.semantic-heads", 6, "--prior.regions", "left ventricle"]
    words += ["--device", "cpu", "--crop.places", 8] if recipe == "spade-dagman" else ["--device", "cpu"]
    whole, shot = ([road / "store", "--out", tmp_path / name, *words] for name in ("whole", "shot"))
    run(spade3d.commands.pretrain, *whole)
    assert stopped(signal.SIGKILL, 3, tmp_path / "shot", "spade3d.commands.pretrain", shot) == -signal.SIGKILL
    assert steps_in(tmp_path / "shot" / "checkpoints")[-1].name in ("step-0000002.pt", "step-0000004.pt")
    run(spade3d.commands.pretrain, *shot, "--resume")
    assert losses(tmp_path / "shot") == losses(tmp_path / "whole")
    assert same_weights(*(tmp_path / name / "encoder.safetensors" for name in ("shot", "whole")))
    for said in (json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("shot", "whole")):
        assert said["saliency"].keys() == {"labels, as a prior"}, "the atlas is made of labels, and the run says so"


def test_a_fine_tuning_that_was_preempted_ends_with_the_same_bits(road, tmp_path):
    begun = [road / "store", "--out", tmp_path, *TWIN, *FINETUNE]
    assert stopped(signal.SIGTERM, 1, tmp_path, "dagman.commands.finetune", begun) == 75
    assert (tmp_path / "preempted").exists() and not (tmp_path / "summary.json").exists()
    run(dagman.commands.finetune, *begun, "--resume")
    assert losses(tmp_path) == losses(road / "scratch")
    assert same_weights(tmp_path / "model.safetensors", road / "scratch" / "model.safetensors")
    assert (tmp_path / "cases.csv").read_bytes() == (road / "scratch" / "cases.csv").read_bytes()


def test_resuming_does_not_change_what_was_begun(road, capsys):
    before = (road / "pretrained" / "config.yaml").read_bytes()
    with pytest.raises(SystemExit) as end:
        spade3d.commands.pretrain(["--out", str(road / "pretrained"), "--resume", "--optim.lr", "1"])
    assert end.value.code == 2
    assert "was begun with other settings (optim)" in capsys.readouterr().err
    assert (road / "pretrained" / "config.yaml").read_bytes() == before
    # `auto` meant a device when the run began, and still means it.
    run(spade3d.commands.pretrain, "--out", road / "pretrained", "--resume", "--device", "auto")


def test_a_fine_tuning_is_resumed_with_the_labels_it_began_with(road, tmp_path, capsys):
    """One run, and one of several, of which the second would begin with others."""
    store = shutil.copytree(road / "store", tmp_path / "store")
    begun = [store, "--out", tmp_path / "run", *TWIN, *FINETUNE]
    several = [*begun[:2], tmp_path / "several", *begun[3:], "--draws", 2]
    for tokens in (begun, several):
        run(dagman.commands.finetune, *tokens)
    shutil.rmtree(tmp_path / "several" / "scratch-seed0-draw1")  # as if it had been stopped before that one
    before = (tmp_path / "run" / "cases.csv").read_bytes()
    scans = shutil.copytree(road / "scans", tmp_path / "scans")
    for path in scans.rglob("*_label.nii.gz"):
        labels = read_labels(path)
        write_volume(path, labels.voxels * (np.arange(labels.shape[0]) % 5 > 0)[:, None, None], labels.affine)
    run(spade3d.commands.prepare, scans, "--out", store, "--spacing", 6.5, 6.5, 6.5)
    for tokens in (begun, several):
        with pytest.raises(SystemExit) as end:
            dagman.commands.finetune([*map(str, tokens), "--resume"])
        assert end.value.code == 3
        assert re.search(r"the run began with other data .*\(its labels\)", capsys.readouterr().err)
    assert (tmp_path / "run" / "cases.csv").read_bytes() == before


def test_predictions_lie_on_the_grid_of_their_scan_whatever_its_axes(road, tmp_path):
    scan = read_volume(sorted((road / "scans" / "ct_test").glob("*_image.nii.gz"))[0])
    i, _, k = scan.shape
    turned = np.flip(scan.voxels.transpose(2, 0, 1), (0, 1))  # the same body: axes I, L, A instead of R, A, S
    affine = scan.affine @ np.array([[0, -1, 0, i - 1], [0, 0, 1, 0], [-1, 0, 0, k - 1], [0, 0, 0, 1]])
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in" / "straight.nii.gz", scan.voxels, scan.affine)
    write_volume(tmp_path / "in" / "turned.nii.gz", np.ascontiguousarray(turned), affine)
    predict = [road / "finetuned", tmp_path / "in", "--device", "cpu", "--out"]
    said = run(dagman.commands.predict, *predict, tmp_path / "out")
    assert (said["scans"], said["left_out"]) == (2, 0)
    found = {}
    for name in ("straight", "turned"):
        assert_same_grid(tmp_path / "out" / f"{name}.nii.gz", tmp_path / "in" / f"{name}.nii.gz")
        found[name] = read_labels(tmp_path / "out" / f"{name}.nii.gz")
    assert np.array_equal(found["turned"].canonical().voxels, found["straight"].canonical().voxels)
    assert said["volumes_ml"]["turned"] == said["volumes_ml"]["straight"]
    table = {0, 500, 600, 420, 550, 205, 820, 850}
    assert set(np.unique(found["straight"].voxels).tolist()) <= table

    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    with pytest.raises(SystemExit) as end:  # where each prediction would take the place of its scan
        dagman.commands.predict([str(token) for token in (*predict, tmp_path / "in")])
    assert end.value.code == 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_predictions_of_the_run_and_of_the_command_are_the_same(road, tmp_path):
    written = sorted((road / "finetuned" / "predictions").iterdir())[0]
    scan = road / "scans" / "ct_train" / written.name.replace(".nii.gz", "_image.nii.gz")
    run(dagman.commands.predict, road / "finetuned" / "model.safetensors", scan, "--out", tmp_path, "--device", "cpu")
    (found,) = tmp_path.glob("*.nii.gz")
    assert np.array_equal(read_labels(found).voxels, read_labels(written).voxels)


def test_labels_that_steered_the_views_are_said_with_the_encoder(road, tmp_path, capsys):
    """Saliency of the label maps of four subjects, of whom three teach: the fourth is a label that --labels hides."""
    store = shutil.copytree(road / "store", tmp_path / "store")
    run(spade3d.saliency_commands.main, "labels", store)
    small = ["--steps", 1, "--crop.shape", 16, 16, 16, "--network.feature-size", 12, "--network.window", 4]
    more = ["--recipe", "simclr", "--focus.views", "focused", "--device", "cpu"]
    run(spade3d.commands.pretrain, store, "--out", tmp_path / "steered", *small, *more)
    said = json.loads((tmp_path / "steered" / "provenance.json").read_text(encoding="utf-8"))
    assert said["saliency"] == {"labels": 4} and len(said["cases"]) == 6
    encoder = tmp_path / "steered" / "encoder.safetensors"
    assert describe_encoder(encoder)["provenance"]["cases"] == said["cases"]
    assert "Label maps of 4 scans steered views or heads" in (tmp_path / "steered" / "report.html").read_text("utf-8")
    capsys.readouterr()
    run(dagman.commands.finetune, store, "--init", encoder, "--out", tmp_path / "tuned", "--strict", *FINETUNE)
    warned = capsys.readouterr().err
    assert "warning: labels that this run does not learn from steered the pretraining" in warned
    leakage = json.loads((tmp_path / "tuned" / "summary.json").read_text(encoding="utf-8"))["leakage"]
    assert leakage["steered"] == {"labels": 1} and leakage["validation_in_pretraining"] == []
    assert "Labels that this run does not learn from" in (tmp_path / "tuned" / "report.html").read_text("utf-8")


def test_a_checkpoint_that_has_seen_the_judges_is_told_and_strict_refuses_it(road, tmp_path, capsys):
    begin = [road / "store", "--init", road / "pretrained" / "encoder.safetensors", *FINETUNE[2:], "--fold", 1]
    begin += ["--steps", 1]
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([*map(str, begin), "--out", str(tmp_path / "strict"), "--strict"])
    assert end.value.code == 3 and not (tmp_path / "strict").exists()
    assert "1 validation subjects were in the pretraining" in capsys.readouterr().err
    run(dagman.commands.finetune, *begin, "--out", tmp_path / "told")
    leakage = json.loads((tmp_path / "told" / "summary.json").read_text(encoding="utf-8"))["leakage"]
    assert len(leakage["validation_in_pretraining"]) == 1
    html = (tmp_path / "told" / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "had been in the pretraining" in html[: html.index("<nav")]
