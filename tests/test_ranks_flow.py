"""Several processes, one run: two ranks learn what one learns, and a run goes on with another number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spade3d.networks.foreign import save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training.journal import read_log
from spade3d.volumes.phantoms import write_dataset

SCRIPT = Path(__file__).parent / "spade3d" / "training" / "two_ranks.py"
SLOW = SCRIPT.with_name("slow_save.py")
RECIPES = ("spade", "simclr", "moco", "byol", "dagman", "dagman-visible", "spade-dagman")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PRETRAIN = "from spade3d.commands import pretrain; pretrain()"


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans") / "abdomen"
    write_dataset("abdomen-ct", folder, patients=6, shape=(32, 32, 24), spacing=(11.0, 11.0, 11.0))
    return folder


def losses(run: Path) -> list[dict[str, float]]:
    return [row["losses"] for row in read_log(run / "log.jsonl")]


def noted(row: dict) -> dict[str, float]:
    """What is noted beside the losses; numbers that there are not (of heads in one window, say) left out."""
    return {name: value for name, value in row.get("notes", {}).items() if value is not None}


def test_two_ranks_log_what_one_process_with_the_same_batch_does(scans, tmp_path):
    """Losses, also where blocks are dropped by chance; and what is noted beside them, of the batch of both."""
    one, two = (
        subprocess.Popen(
            [*start, str(SCRIPT), str(scans), str(tmp_path / name), *RECIPES],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for name, start in (("one", (sys.executable,)), ("two", TORCHRUN))
    )
    for process in (one, two):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-2000:]
    for recipe in RECIPES:
        alone, shared = (read_log(tmp_path / name / recipe / "log.jsonl") for name in ("one", "two"))
        assert len(alone) == len(shared) == 3
        for ours, its in zip(alone, shared, strict=True):
            assert its["losses"] == pytest.approx(ours["losses"], rel=1e-4)
            assert noted(its) == pytest.approx(noted(ours), rel=1e-3)
        assert shared[-1]["signs"] == pytest.approx(alone[-1]["signs"], rel=1e-3)
        assert shared[-1]["signs"]["rows"] >= 8  # of one rank alone there would be 4 crops
    assert all("prior.active" in row["notes"] for row in read_log(tmp_path / "two" / "dagman" / "log.jsonl"))


def command(out: Path, scans: Path) -> list[str]:
    words = f"{scans} --out {out} --steps 8 --save-every 2 --crop.shape 16 16 16 --crop.anchors 2 --crop.places 8"
    words += " --crop.frame box --network.feature-size 12 --network.window 4 --contrast.global-memory 16"
    words += " --contrast.local-memory 32 --device cpu --seed 1"
    return words.split()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Makes the words that start a pretraining on a number of ranks, in the environment of ENVIRONMENT."""
    entry = tmp_path_factory.mktemp("entry") / "entry.py"
    entry.write_text(PRETRAIN)
    return {1: (sys.executable, str(entry)), 2: (*TORCHRUN, str(entry))}


@pytest.fixture(scope="module")
def whole(scans, started, tmp_path_factory) -> Path:
    """A run of one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish([*started[1], *command(out, scans)])
    return out


def finish(words: list[str]) -> None:
    done = subprocess.run(
        words, env=ENVIRONMENT, capture_output=True, encoding="utf-8", errors="replace", timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def check_equal(run: Path, whole: Path) -> None:
    """Each step once, and what was learned to what sums of two parts round to."""
    assert len(losses(run)) == len(losses(whole)) == 8
    for its, ours in zip(losses(run), losses(whole), strict=True):
        assert its == pytest.approx(ours, rel=2e-3)
    ours, its = (load_file(out / "encoder.safetensors") for out in (whole, run))
    for name, tensor in ours.items():
        torch.testing.assert_close(its[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


def test_a_run_of_two_ranks_that_was_stopped_goes_on_as_one(scans, started, whole, tmp_path):
    out = tmp_path / "run"
    shared = subprocess.Popen(
        [*started[2], *command(out, scans)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, patience = out / "log.jsonl", time.monotonic() + 120
    while shared.poll() is None and time.monotonic() < patience:
        if log.exists() and log.read_bytes().count(b"\n") >= 3:
            shared.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    shared.wait(timeout=120)
    assert (out / "preempted").exists(), "SIGTERM came too late to stop the run"
    before = losses(out)
    finish([*started[1], *command(out, scans), "--resume"])
    assert losses(out)[: len(before)] == before
    check_equal(out, whole)


def test_a_run_of_one_process_that_was_shot_goes_on_on_two_ranks(scans, started, whole, tmp_path):
    """Shot before its last save: what it logged since the one before is learned again, by two."""
    out = shutil.copytree(whole, tmp_path / "run")
    *_, before, last = sorted((out / "checkpoints").glob("step-*.pt"))
    assert (before.name, last.name) == ("step-0000006.pt", "step-0000008.pt")
    for path in (last, out / "encoder.safetensors"):
        path.unlink()
    finish([*started[2], *command(out, scans), "--resume"])
    assert losses(out)[:6] == losses(whole)[:6] and losses(out)[6:] != losses(whole)[6:]  # two did it
    check_equal(out, whole)


def test_a_run_whose_ranks_are_all_told_to_stop_is_saved_before_one_of_them_leaves(tmp_path):
    """A launcher ends the other processes once one has left: the first one may not be writing then."""
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(SLOW.parent), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*TORCHRUN, str(SLOW), str(tmp_path / "run")], env=environment, capture_output=True, timeout=120)
    assert (tmp_path / "run" / "preempted").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*4.pt")] == ["step-0000004.pt"]


def finetuning(scans: Path, out: Path, *more: object) -> list[str]:
    words = f"{scans} --out {out} --steps 4 --crop.shape 16 16 16 --crop.crops 4 --folds 2 --network.feature-size 12"
    words += " --network.window 4 --device cpu --seed 1 --scoring.looks 2 --scoring.overlap 0"
    return [*words.split(), *map(str, more)]


def test_two_ranks_fine_tune_and_judge_as_one_does(scans, tmp_path):
    """Dice over the crops of both, looks, and three judged scans of which one process takes two."""
    entry = tmp_path / "entry.py"
    entry.write_text("from dagman.commands import finetune; finetune()")
    torch.manual_seed(7)
    save_encoder(tmp_path / "encoder.safetensors", SwinUNETR(1, 1, feature_size=12, window=4))
    words = ("--init", tmp_path / "encoder.safetensors", "--tuning.encoder-warmup", 0.5, "--tuning.layer-decay", 0.8)
    runs = [
        subprocess.Popen(
            [*start, str(entry), *finetuning(scans, tmp_path / name, *words), "--json"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for name, start in (("one", (sys.executable,)), ("two", TORCHRUN))
    ]
    said = []
    for run in runs:
        told, noted = run.communicate(timeout=300)
        assert run.returncode == 0, noted[-2000:]
        said.append(json.loads(told))  # one process alone speaks
    alone, shared = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(alone) == len(shared)
    for ours, its in zip(alone, shared, strict=True):
        for key in ("losses", "validation"):
            if key in ours:
                assert its[key] == pytest.approx(ours[key], rel=1e-3)
    assert said[0]["cases"] == said[1]["cases"] == 3
    assert said[1]["mean_dice"] == pytest.approx(said[0]["mean_dice"], abs=2e-3)
    cases = [(tmp_path / name / "cases.csv").read_text().splitlines() for name in ("one", "two")]
    first = [[line.split(",")[0] for line in lines] for lines in cases]
    assert first[0] == first[1] and len(list((tmp_path / "two" / "predictions").iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--crop.crops", 3), "--crop.crops 3 cannot be shared evenly by 2 processes"),
        (("--task", "classification", "--findings", "x.csv"), "--task classification runs in one process, and 2"),
    ],
)
def test_a_fine_tuning_that_cannot_be_shared_is_refused_before_anything_is_prepared(scans, tmp_path, words, said):
    entry = tmp_path / "entry.py"
    entry.write_text("from dagman.commands import finetune; finetune()")
    refused = subprocess.run(
        [*TORCHRUN, str(entry), str(scans), "--out", str(tmp_path / "odd"), "--device", "cpu", *map(str, words)],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert refused.returncode != 0 and said in refused.stderr
    assert not (tmp_path / "odd").exists()


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_prepared(scans, tmp_path):
    entry = tmp_path / "entry.py"
    entry.write_text(PRETRAIN)
    words = " ".join(command(tmp_path / "odd", scans)).replace("--crop.anchors 2", "--crop.anchors 3").split()
    refused = subprocess.run(
        [*TORCHRUN, str(entry), *words],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert refused.returncode != 0
    assert refused.stderr.count("--crop.anchors 3 cannot be shared evenly by 2 processes") == 1
    assert not (tmp_path / "odd").exists()
