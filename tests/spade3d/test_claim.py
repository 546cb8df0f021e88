"""One process at a time writes into a folder: who waits, who is refused, who is overruled."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from spade3d import claim
from spade3d.claim import CLAIM, Overruled, claimed, held
from spade3d.faults import DataFault
from spade3d.machine import began, counting


def test_a_claim_is_waited_for_and_a_dead_one_overruled(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for left_behind in ({"process": dead.pid, "host": os.uname().nodename, "since": 0}, {"process": 1, "host": "far"}):
        (tmp_path / CLAIM).write_text(json.dumps(left_behind))
        if left_behind["host"] == "far":  # on another machine, silent for two hours
            os.utime(tmp_path / CLAIM, (time.time() - 7200,) * 2)
        with claimed(tmp_path) as renew:
            renew()
        assert not (tmp_path / CLAIM).exists()
    (tmp_path / CLAIM).write_text(json.dumps({"process": 1, "host": "far"}))
    threading.Timer(0.3, (tmp_path / CLAIM).unlink).start()
    told = []
    with claimed(tmp_path, told.append):
        assert (tmp_path / CLAIM).exists()
    assert len(told) == 1
    assert "process 1 on far" in told[0]


def test_a_run_that_a_living_process_writes_is_refused_and_left_as_it_is(tmp_path):
    here = {"process": os.getppid(), "host": socket.gethostname(), "since": 0}
    (tmp_path / CLAIM).write_text(json.dumps(here))
    said = f"process {os.getppid()} of this machine is running there; wait until it ends"
    with pytest.raises(DataFault, match=said), held(tmp_path, print):
        raise AssertionError
    assert json.loads((tmp_path / CLAIM).read_text()) == here


@pytest.fixture
def sleeper():
    """A process that lives and does nothing."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def claim_of(process, **known):
    here = {"process": process, "host": socket.gethostname(), "counting": counting(), "began": began(process)}
    return json.dumps({**here, **known})


def test_a_living_process_of_this_machine_holds_its_claim_however_long_it_is_silent(tmp_path, sleeper):
    os.kill(sleeper.pid, signal.SIGSTOP)
    (tmp_path / CLAIM).write_text(claim_of(sleeper.pid))
    os.utime(tmp_path / CLAIM, (time.time() - 100_000,) * 2)
    with pytest.raises(DataFault, match=f"process {sleeper.pid} of this machine"), held(tmp_path, print):
        raise AssertionError


def test_a_process_that_died_is_overruled_at_once_though_its_number_lives(tmp_path, sleeper):
    if began(sleeper.pid) is None:
        pytest.skip("no /proc: who began when is not known here")
    (tmp_path / CLAIM).write_text(claim_of(sleeper.pid, began=began(sleeper.pid) - 1))
    with held(tmp_path, print):
        assert json.loads((tmp_path / CLAIM).read_text())["process"] == os.getpid()
    os.kill(sleeper.pid, signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, but its parent has not asked yet
    (tmp_path / CLAIM).write_text(claim_of(sleeper.pid))
    with held(tmp_path, print):
        assert json.loads((tmp_path / CLAIM).read_text())["process"] == os.getpid()


def test_a_container_of_the_same_name_is_another_machine(tmp_path):
    """There the numbers mean other processes: one that none here has may live, and only its silence tells."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / CLAIM).write_text(claim_of(dead.pid, counting="another boot, another container"))
    threading.Timer(0.3, (tmp_path / CLAIM).unlink).start()
    told = []
    with held(tmp_path, told.append):
        pass
    assert len(told) == 1 and f"waiting for process {dead.pid} on {socket.gethostname()}" in told[0]
    assert f"remove {tmp_path / CLAIM}" in told[0]


def test_one_process_does_not_take_its_own_claim_twice(tmp_path):
    with held(tmp_path, print):
        with pytest.raises(DataFault, match="of this machine is running there"), held(tmp_path, print):
            raise AssertionError
        assert (tmp_path / CLAIM).exists()


def test_who_was_overruled_learns_it_and_leaves_the_claim_of_the_next(tmp_path):
    taken_over = json.dumps({"process": 7, "host": "far"})
    with pytest.raises(Overruled, match="process 7 on far has taken over"), held(tmp_path, print) as still_ours:
        still_ours()
        (tmp_path / CLAIM).write_text(taken_over)
        os.utime(tmp_path / CLAIM, (1, 1))
        still_ours()
    assert (tmp_path / CLAIM).read_text() == taken_over and (tmp_path / CLAIM).stat().st_mtime == 1


def test_a_claim_that_was_removed_is_laid_again(tmp_path):
    with held(tmp_path, print) as still_ours:
        (tmp_path / CLAIM).unlink()
        still_ours()
        assert json.loads((tmp_path / CLAIM).read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_of_two_that_overrule_one_dead_claim_the_second_does_not_remove_that_of_the_first(
    tmp_path, monkeypatch, sleeper
):
    """Between judging the old claim and removing it another process has laid its own."""
    (tmp_path / CLAIM).write_text("cut short")
    os.utime(tmp_path / CLAIM, (1, 1))
    judge, first = claim._is_gone, claim_of(sleeper.pid)

    def late(path, text, stale_s):
        gone = judge(path, text, stale_s)
        if text == "cut short":
            path.write_text(first)
        return gone

    monkeypatch.setattr(claim, "_is_gone", late)
    with pytest.raises(DataFault, match=f"process {sleeper.pid} of this machine"), held(tmp_path, print):
        raise AssertionError
    assert (tmp_path / CLAIM).read_text() == first and [entry.name for entry in tmp_path.iterdir()] == [CLAIM]


def test_a_run_of_another_machine_is_waited_for_until_it_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "SILENT_S", 0.4)
    (tmp_path / CLAIM).write_text(json.dumps({"process": 1, "host": "far"}))
    told, begun = [], time.monotonic()
    with held(tmp_path, told.append):
        assert json.loads((tmp_path / CLAIM).read_text())["process"] == os.getpid()
    assert time.monotonic() - begun > 0.2 and len(told) == 1 and "waiting for process 1 on far" in told[0]


def test_a_run_renews_its_claim_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "RENEW_S", 0.01)
    with held(tmp_path / "run", print):
        os.utime(tmp_path / "run" / CLAIM, (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / "run" / CLAIM).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / "run" / CLAIM).stat().st_mtime > 0
    assert not (tmp_path / "run" / CLAIM).exists()
    assert all(thread.name != "claim" for thread in threading.enumerate())


def test_a_claim_from_before_this_machine_was_started_is_nobodys(tmp_path, monkeypatch):
    before = {"process": os.getppid(), "host": socket.gethostname(), "counting": "another boot", "since": 0}
    (tmp_path / CLAIM).write_text(json.dumps(before))
    monkeypatch.setattr(claim, "booted", lambda: time.time() + 60)
    with claimed(tmp_path, wait_here=False):
        assert json.loads((tmp_path / CLAIM).read_text())["process"] == os.getpid()
