"""Checkpoints under everything that can happen to a file: kills, flipped bits, full disks, foreign content."""

import errno
import hashlib
import itertools
import os
import pickle
import random
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch

from spade3d.faults import DataFault, Fault
from spade3d.training import checkpoint


def state(seed: int = 0, size: int = 1000) -> dict:
    chance = torch.Generator().manual_seed(seed)
    return {"task": {"weight": torch.randn(size, generator=chance)}, "at": {"step": seed}, "name": "x", "none": None}


def test_what_is_loaded_is_what_was_saved(tmp_path):
    checkpoint.save(tmp_path / "a.pt", state(3))
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(loaded["task"]["weight"], state(3)["task"]["weight"])
    assert loaded["at"] == {"step": 3} and loaded["none"] is None
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == loaded.keys()  # plain torch reads it too


def test_only_tensors_and_plain_values_are_written(tmp_path):
    monai = pytest.importorskip("monai.data.meta_tensor")
    image = monai.MetaTensor(torch.ones(4), meta={"filename_or_obj": "/scans/SECRET^NAME.nii.gz"})
    marked = torch.ones(3)
    marked.patient = "SECRET^NAME"
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"image": image, "marked": marked, "parameter": torch.nn.Parameter(torch.ones(2))})
    assert b"SECRET" not in path.read_bytes()
    assert {type(value) for value in checkpoint.load(path).values()} == {torch.Tensor, int}
    with pytest.raises(TypeError, match="PosixPath"):
        checkpoint.save(path, {"path": Path("/scans")})


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(30):
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(checkpoint.Damaged, match="damaged or cut short"):
            checkpoint.load(path)
    for length in (0, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.load(path)


def test_two_are_kept_and_last_names_the_newest(tmp_path):
    for step in (0, 10, 20, 30):
        checkpoint.put(tmp_path, step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-0000020.pt", "step-0000030.pt"]
    assert (tmp_path / "last").read_text(encoding="utf-8") == "step-0000030.pt\n"
    assert checkpoint.newest(tmp_path).state["at"]["step"] == 30


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path):
    for step in (10, 20):
        checkpoint.put(tmp_path, step, state(step))
    with open(tmp_path / "step-0000020.pt", "r+b") as file:
        file.seek(500)
        file.write(b"\xff\x00\xff")
    found = checkpoint.newest(tmp_path)
    assert found.path.name == "step-0000010.pt"
    assert len(found.damaged) == 1 and "step-0000020.pt: damaged" in found.damaged[0]
    checkpoint.put(tmp_path, 15, state(15))  # the run goes on from 10: the damaged future goes, the past stays
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-0000010.pt", "step-0000015.pt"]


def test_with_nothing_whole_there_is_no_fresh_start(tmp_path):
    with pytest.raises(DataFault, match="no checkpoint to resume from"):
        checkpoint.newest(tmp_path)
    (tmp_path / "step-0000001.pt").write_bytes(b"")
    with pytest.raises(DataFault, match="step-0000001.pt: damaged"):
        checkpoint.newest(tmp_path)


def test_a_newer_schema_is_refused_not_skipped(tmp_path, monkeypatch):
    checkpoint.put(tmp_path, 1, state(1))
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)
    checkpoint.put(tmp_path, 2, state(2))
    monkeypatch.setattr(checkpoint, "SCHEMA", 1)
    with pytest.raises(DataFault, match="newer version"):
        checkpoint.newest(tmp_path)


def sealed(path: Path) -> None:
    """Give foreign content a valid footer, so that only what lies behind the checksum protects."""
    content = path.read_bytes()
    path.write_bytes(content + b"spade3d\x01" + hashlib.sha256(content).digest())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"schema": 1, "evil": Evil()}, tmp_path / "a.pt")
    sealed(tmp_path / "a.pt")
    with pytest.raises(DataFault, match="not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


def test_a_compressed_bomb_and_a_bare_pickle_are_refused(tmp_path):
    torch.save({"schema": 1, "zeros": torch.zeros(1_000_000)}, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"schema": 1}))
    for name, reason in (("bomb.pt", "compressed"), ("bare.pt", "not a zip file")):
        sealed(tmp_path / name)
        with pytest.raises(DataFault, match=reason):
            checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("after", [0, 100, 3000, 4200])
def test_a_full_disk_leaves_the_old_one_whole(tmp_path, monkeypatch, after):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state(1))
    before = path.read_bytes()
    written = 0

    def write(self, data):
        nonlocal written
        written += len(data)
        if written > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.sha256.update(data)
        return self.file.write(data)

    monkeypatch.setattr(checkpoint._Hashed, "write", write)
    with pytest.raises(Fault, match="No space left on device.*untouched"):
        checkpoint.save(path, state(2))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_disk_that_is_nearly_full_is_not_begun_on(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 7999}))
    with pytest.raises(Fault, match="free on this disk"):
        checkpoint.save(tmp_path / "a.pt", state())  # 4000 bytes of weights
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_instant_leaves_a_whole_newest(tmp_path):
    """Ten processes that do nothing but save, killed at random instants: what is left is the old or the new, never a
    third, and the next run sweeps up."""
    chance = random.Random(0)
    checkpoint.put(tmp_path, 0, state(0, 50_000))
    steps = [0]
    for _ in range(10):
        child = os.fork()
        if child == 0:
            try:
                for step in itertools.count(steps[-1] + 1):
                    checkpoint.put(tmp_path, step, state(step, 50_000))
            finally:
                os._exit(1)  # the child of a test must never go on as a second pytest
        time.sleep(chance.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = checkpoint.newest(tmp_path)
        step = found.state["at"]["step"]
        assert found.damaged == () and found.path.name == f"step-{step:07d}.pt"
        assert torch.equal(found.state["task"]["weight"], state(step, 50_000)["task"]["weight"])
        steps.append(step)
    assert steps == sorted(steps) and steps[-1] > 0
    checkpoint.put(tmp_path, steps[-1] + 1, state(0))
    assert not list(tmp_path.glob(".*.partial"))
