"""A run that is asked to stop, or is shot, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_task import PointStream, Tiny, digest, written

from spade3d.console import fresh_folder
from spade3d.faults import Fault, Preempted
from spade3d.training import checkpoint
from spade3d.training.interruption import Interruption, preemptible
from spade3d.training.loop import Optimiser, train


def fit(task, out, batches=None, **more):
    return train(
        task,
        batches or PointStream(),
        steps=8,
        out=out,
        optimiser=Optimiser(lr=0.05),
        device=torch.device("cpu"),
        **{"save_every": 100} | more,
    )


def signalled(number: int, at: int) -> PointStream:
    """The signal arrives while batch `at` is being made."""
    return PointStream(lambda index: os.kill(os.getpid(), number) if index == at else None)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, Preempted), (signal.SIGUSR1, Preempted), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_saves_and_stops(tmp_path, number, raised):
    whole, resumed = Tiny(), Tiny()
    fit(whole, tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(raised, match=f"{signal.Signals(number).name} after step 4 of 8"):
        fit(Tiny(), tmp_path / "run", signalled(number, at=3))
    assert signal.getsignal(number) is before
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").path.name == "step-0000004.pt"
    assert (tmp_path / "run" / "preempted").exists() == (raised is Preempted)
    fit(resumed, tmp_path / "run", resume=True)
    assert digest(whole) == digest(resumed)
    assert not (tmp_path / "run" / "preempted").exists()


@pytest.mark.parametrize(
    ("there", "resume", "then", "marked", "again"),
    [
        ([], False, [], False, "again"),  # an empty folder that the command has not come to
        ([], False, ["unfinished"], True, "again"),
        ([], False, ["config.yaml"], True, "with --resume"),
        (["config.yaml"], True, [], True, "with --resume"),
        (["config.yaml"], False, [], False, "again"),  # another's run, which the command would have refused
    ],
)
def test_what_is_preempted_is_marked_where_it_is_this_command_s(tmp_path, there, resume, then, marked, again):
    out, before = tmp_path / "run", signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Preempted), preemptible(out, "config.yaml", resume=resume):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert not out.exists()
    out.mkdir()
    for name in there:
        (out / name).touch()
    with (
        pytest.raises(Preempted, match=f"run the same command {again}"),
        preemptible(out, "config.yaml", resume=resume),
    ):
        for name in then:
            (out / name).touch()
        os.kill(os.getpid(), signal.SIGUSR1)
    assert sorted(path.name for path in out.iterdir()) == sorted(there + then + ["preempted"] * marked)
    assert signal.getsignal(signal.SIGUSR1) is before
    with pytest.raises(Fault, match="another"), preemptible(out, "config.yaml", resume=resume):
        raise Fault("another")
    assert (out / "preempted").exists() == marked
    with preemptible(out, "config.yaml", resume=True):
        pass
    assert not (out / "preempted").exists()


def test_a_folder_in_which_nothing_was_begun_may_be_begun_in_again(tmp_path):
    """A job script made it, and its job was preempted before it came to it."""
    with pytest.raises(Preempted), preemptible(tmp_path, "config.yaml", resume=False):
        os.kill(os.getpid(), signal.SIGTERM)
    with fresh_folder(tmp_path, "config.yaml"):
        (tmp_path / "config.yaml").touch()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_the_last_step_is_judged_is_heard(tmp_path, number, raised):
    """It was forgotten, and the command went on to its next run."""

    def judged(task, step):
        if step == 8:
            os.kill(os.getpid(), number)
        return {"dice": 0.0}

    with pytest.raises(raised, match="after step 8 of 8, and saved"):
        fit(Tiny(), tmp_path, validate=judged, validate_every=4)
    assert checkpoint.newest(tmp_path / "checkpoints").path.name == "step-0000008.pt"
    resumed, whole = Tiny(), Tiny()
    fit(resumed, tmp_path, resume=True, validate=lambda task, step: {"dice": 0.0}, validate_every=4)
    fit(whole, tmp_path / "whole")
    assert digest(resumed) == digest(whole)


def test_who_listened_before_hears_of_a_signal_that_nobody_asked_for(tmp_path):
    listening = preemptible(tmp_path, "config.yaml", resume=False)
    with pytest.raises(Preempted, match="SIGUSR1"), listening, Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.received == signal.SIGUSR1
    listening = preemptible(tmp_path, "config.yaml", resume=False)
    with pytest.raises(Fault, match="its own"), listening, Interruption():
        os.kill(os.getpid(), signal.SIGUSR1)
        raise Fault("its own")


def test_an_interruption_among_updates_that_are_not_finite_loses_nothing(tmp_path):
    """It saves, the saves from before them stay, and the resumed run names those."""
    spoilt = frozenset(range(2, 8))
    with pytest.raises(Preempted, match="after step 4 of 8, and saved"):
        fit(Tiny(spoilt), tmp_path, signalled(signal.SIGTERM, at=3), save_every=1, skip_bad_batches=3)
    there = [path.stem for path in checkpoint.steps_in(tmp_path / "checkpoints")]
    assert there == ["step-0000001", "step-0000002", "step-0000004"]
    with pytest.raises(
        Fault, match=r"3 to 6; the last weights saved that gave a finite loss are in \S*step-0000001.pt"
    ):
        fit(Tiny(spoilt), tmp_path, resume=True, save_every=1, skip_bad_batches=3)


def test_a_validation_that_an_interruption_left_out_is_made_up_for(tmp_path):
    seen = []

    def validate(task, step):
        seen.append(step)
        return {"dice": step / 10}

    asked = {"validate": validate, "validate_every": 4, "better": "dice"}
    with pytest.raises(Preempted):
        fit(Tiny(), tmp_path, signalled(signal.SIGTERM, at=3), **asked)
    assert seen == []
    for _ in range(2):  # the second has nothing left to do
        assert fit(Tiny(), tmp_path, resume=True, **asked).best.step == 8
        assert seen == [4, 8]


def test_other_threads_take_no_signals(tmp_path):
    failed = []

    def run():
        try:
            fit(Tiny(), tmp_path)
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed and checkpoint.newest(tmp_path / "checkpoints").state["at"]["step"] == 8


VICTIM = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import torch.utils.tensorboard
from spade3d.training.loop import Optimiser, train
from tiny_task import PointStream, Tiny

torch.set_num_threads(1)
chance, killed = random.Random(0), 0
for trial in range(7):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(Tiny(), PointStream(lambda index: time.sleep(0.005)), steps=60, out=Path(sys.argv[1]),
                  optimiser=Optimiser(lr=0.05), device=torch.device("cpu"), save_every=3, resume=trial > 0,
                  validate=lambda task, step: {"dice": step % 7 / 7}, validate_every=5, better="dice")
            code = 0
        finally:
            os._exit(code)
    if trial < 6:  # the last may finish
        time.sleep(chance.uniform(0.05, 0.25))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
print(killed)
"""


def test_a_run_that_was_shot_many_times_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, "-c", VICTIM, str(tmp_path / "shot")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and int(done.stdout) >= 2, done.stderr
    train(
        Tiny(),
        PointStream(),
        steps=60,
        out=tmp_path / "whole",
        optimiser=Optimiser(lr=0.05),
        device=torch.device("cpu"),
        save_every=3,
        validate=lambda task, step: {"dice": step % 7 / 7},
        validate_every=5,
        better="dice",
    )
    for name in ("step-0000060.pt", "best.pt"):
        shot, whole = (written(tmp_path / run / "checkpoints" / name) for run in ("shot", "whole"))
        assert shot == whole


@pytest.mark.parametrize(("signals", "status"), [(1, 0), (2, 128 + signal.SIGTERM)])
def test_a_second_signal_ends_at_once(signals, status):
    child = os.fork()
    if child == 0:
        try:
            with Interruption():
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
        finally:
            os._exit(1)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == status
