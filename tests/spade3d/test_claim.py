"""One process at a time writes into a folder: who waits, who is refused, who is overruled."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from spade3d import claim
from spade3d.claim import CLAIM, claimed, held
from spade3d.faults import DataFault


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
