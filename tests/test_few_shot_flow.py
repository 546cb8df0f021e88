"""Few-shot: draws of labelled subjects and twins from scratch by one command, and whatever interrupts it."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dagman.commands
import dagman.few_shot
from dagman.evaluation.scores import read_rows
from spade3d.networks.foreign import save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training.journal import read_log
from spade3d.volumes.phantoms import write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--data.spacing", 30, 30, 30, "--crop.shape", 16, 16, 16, "--crop.crops", 1, "--network.feature-size", 12]
TINY += ["--network.window", 2, "--scoring.looks", 0, "--scoring.overlap", 0, "--device", "cpu", "--steps", 2]
TINY += ["--save-every", 1]
FEW = [*TINY, "--labels", 2, "--tuning.layer-decay", 0.9]


def run(*tokens) -> dict:
    """Call dagman-finetune as a shell would, expect success, and return what it prints with --json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        dagman.commands.finetune([*map(str, tokens), "--json"])
    assert end.value.code == 0
    return json.loads(printed.getvalue())


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans") / "hearts"
    write_dataset("heart-ct", folder, patients=5, shape=(12, 12, 10), spacing=(30.0, 30.0, 30.0))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(7)
    save_encoder(path, SwinUNETR(1, 1, feature_size=12, window=2))
    return path


@pytest.fixture(scope="module")
def study(scans, encoder, tmp_path_factory) -> Path:
    """Two draws of two subjects, each with its twin from scratch."""
    out = tmp_path_factory.mktemp("study") / "out"
    said = run(scans, "--init", encoder, "--out", out, *FEW, "--draws", 2, "--from-scratch-twin")
    (out.parent / "said.json").write_text(json.dumps(said))
    return out


NAMES = [f"{begun}-seed0-draw{draw}" for draw in (0, 1) for begun in ("pretrained", "scratch")]


def test_draws_and_twins_are_runs_of_their_own(study):
    assert {path.name for path in study.iterdir()} == {
        "began_with.json",
        "config.yaml",
        "store",
        "runs.csv",
        "comparison",
        *NAMES,
    }
    said = {name: summary_of(study / name) for name in NAMES}
    for draw in (0, 1):
        pretrained, scratch = (said[f"{begun}-seed0-draw{draw}"] for begun in ("pretrained", "scratch"))
        assert pretrained["split"] == scratch["split"] and pretrained["protocol"] == scratch["protocol"]
        assert (pretrained["draw"], pretrained["seed"]) == (draw, 0) and len(pretrained["split"]["train"]) == 2
        assert pretrained["pair"] == scratch["pair"] == f"seed 0, draw {draw}"
        assert pretrained["coverage"]["loaded"] == pretrained["coverage"]["total"] and scratch["coverage"] is None
        assert (pretrained["tuning"]["layer_decay"], scratch["tuning"]["layer_decay"]) == (0.9, 1.0)
    assert said[NAMES[0]]["split"]["train"] != said[NAMES[2]]["split"]["train"]
    assert said[NAMES[0]]["split"]["validation"] == said[NAMES[2]]["split"]["validation"]


def test_one_command_gives_the_table_pretrained_minus_scratch(study):
    said = json.loads((study.parent / "said.json").read_text(encoding="utf-8"))
    dice = {name: summary_of(study / name)["mean_dice"] for name in NAMES}
    assert said["mean_dice"] == dice
    rows = {name: {(row["case"], row["class"]): row["dice"] for row in read_rows(study / name)} for name in NAMES}
    for draw in (0, 1):
        after, before = rows[NAMES[2 * draw]], rows[NAMES[2 * draw + 1]]
        by_case: dict[str, list[float]] = {}
        for case, value in after:  # absent, and invented by one alone: the other is right, which is a Dice of 1
            one, other = after[case, value], before[case, value]
            one, other = (1.0 if one != one else one), (1.0 if other != other else other)
            by_case.setdefault(case, []).append(one - other)
        gain = np.mean([np.mean(gained) for gained in by_case.values()])
        assert said["pretrained minus scratch"][f"seed 0, draw {draw}"] == pytest.approx(gain, abs=1e-6)
    assert said["reference"] == "from scratch"
    compared = json.loads((study / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    ((whole, *_),) = compared["comparisons"].values()
    assert whole["pairs"] == 2 and whole["difference"] == pytest.approx(
        sum(said["pretrained minus scratch"].values()) / 2, abs=1e-5
    )
    with open(study / "runs.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == NAMES


def test_a_run_of_many_is_what_it_would_be_alone(study, tmp_path):
    run(study / "store", "--out", tmp_path, *FEW, "--draw", 1)
    alone, among = tmp_path, study / "scratch-seed0-draw1"
    assert [row["losses"] for row in read_log(alone / "log.jsonl")] == [
        row["losses"] for row in read_log(among / "log.jsonl")
    ]
    assert (alone / "cases.csv").read_bytes() == (among / "cases.csv").read_bytes()
    assert {path.name for path in alone.iterdir()} == {path.name for path in among.iterdir()}


def test_its_configuration_repeats_a_study(study, tmp_path):
    run("--config", study / "config.yaml", "--out", tmp_path)
    for name in NAMES:
        assert (tmp_path / name / "cases.csv").read_bytes() == (study / name / "cases.csv").read_bytes()


def finished(out: Path) -> dict[str, bytes]:
    return {name: (out / name / "report.html").read_bytes() for name in NAMES if (out / name / "report.html").exists()}


def test_an_interrupted_study_goes_on_where_it_was(study, encoder, tmp_path):
    """Cut in the second run; what was finished is not touched, what was begun goes on, the others begin."""
    begun = [study / "store", "--init", encoder, "--out", tmp_path, *FEW, "--draws", 2, "--from-scratch-twin"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from dagman.commands import finetune; finetune()", *map(str, begun)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, patience = tmp_path / NAMES[1] / "log.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < patience and not (log.exists() and log.read_bytes()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "preempted").read_text().startswith("stopped by SIGTERM")
    before = finished(tmp_path)
    assert list(before) == NAMES[:1] and not (tmp_path / "runs.csv").exists()
    run(*begun, "--resume")
    assert not (tmp_path / "preempted").exists()
    assert {name: finished(tmp_path)[name] for name in before} == before
    for name in NAMES:
        assert (tmp_path / name / "cases.csv").read_bytes() == (study / name / "cases.csv").read_bytes()
        ours, theirs = (load_file(out / name / "model.safetensors") for out in (tmp_path, study))
        assert all(torch.equal(weights, theirs[key]) for key, weights in ours.items())


def test_where_out_is_a_file_that_is_said(study, tmp_path, capsys):
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([str(study / "store"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert end.value.code == 3 and "is a file; --out needs a folder" in capsys.readouterr().err


def test_between_its_runs_too_a_study_ends_with_the_code_that_asks_to_be_run_again(
    study, encoder, tmp_path, monkeypatch
):
    real, calls = dagman.few_shot.run_finetuning, []

    def interrupted(*given, **more):
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(given)
        return real(*given, **more)

    begun = [study / "store", "--init", encoder, "--out", tmp_path, *FEW, "--from-scratch-twin"]
    monkeypatch.setattr(dagman.few_shot, "run_finetuning", interrupted)
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([str(word) for word in begun])
    assert end.value.code == 75 and len(calls) == 1
    monkeypatch.setattr(dagman.few_shot, "run_finetuning", real)
    assert "pretrained minus scratch" in run(*begun, "--resume")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--draws", 2], "--draws 2 of all labelled subjects are the same; say how many: --labels N"),
        (["--draws", 2, "--labels", 9], "--labels 9: only 4 labelled subjects may train"),
        (["--from-scratch-twin"], "--from-scratch-twin: the twin of a run that is from scratch, too; give that run an"),
    ],
)
def test_what_cannot_be_several_runs_is_refused_and_leaves_nothing(more, message, study, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([str(word) for word in [study / "store", "--out", tmp_path / "out", *TINY, *more]])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resuming_does_not_make_one_study_into_another(study, capsys):
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune(["--out", str(study), "--resume", "--draws", "3"])
    assert end.value.code == 2 and "was begun with other settings (draws)" in capsys.readouterr().err
