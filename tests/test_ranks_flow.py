"""Several processes, one run: two ranks learn what one learns, and a run goes on with another number of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spade3d.training.journal import read_log
from spade3d.volumes.phantoms import write_dataset

SCRIPT = Path(__file__).parent / "spade3d" / "training" / "two_ranks.py"
RECIPES = ("spade", "simclr", "moco", "spade-dagman")
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


def test_two_ranks_have_the_losses_of_one_process_with_the_same_batch(scans, tmp_path):
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
        alone, shared = (losses(tmp_path / name / recipe) for name in ("one", "two"))
        assert len(alone) == len(shared) == 3
        for ours, its in zip(alone, shared, strict=True):
            assert its == pytest.approx(ours, rel=1e-4)


def command(out: Path, scans: Path) -> list[str]:
    words = f"{scans} --out {out} --steps 8 --save-every 2 --crop.shape 16 16 16 --crop.anchors 2 --crop.places 8"
    words += " --crop.frame box --network.feature-size 12 --network.window 4 --contrast.global-memory 16"
    words += " --contrast.local-memory 32 --device cpu --seed 1"
    return words.split()


def test_a_run_of_two_ranks_that_was_stopped_goes_on_as_one(scans, tmp_path):
    entry = tmp_path / "entry.py"
    entry.write_text(PRETRAIN)
    shared = subprocess.Popen(
        [*TORCHRUN, str(entry), *command(tmp_path / "shared", scans)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, patience = tmp_path / "shared" / "log.jsonl", time.monotonic() + 120
    while shared.poll() is None and time.monotonic() < patience:
        if log.exists() and log.read_bytes().count(b"\n") >= 3:
            shared.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    shared.wait(timeout=120)
    assert (tmp_path / "shared" / "preempted").exists(), "SIGTERM came too late to stop the run"

    for out, resume in (("shared", ["--resume"]), ("alone", [])):
        done = subprocess.run(
            [sys.executable, "-c", PRETRAIN, *command(tmp_path / out, scans), *resume],
            env=ENVIRONMENT,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    ours, its = (load_file(tmp_path / out / "encoder.safetensors") for out in ("alone", "shared"))
    assert len(losses(tmp_path / "shared")) == 8
    for name, tensor in ours.items():
        torch.testing.assert_close(its[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


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
