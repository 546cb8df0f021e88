"""Batches that are copied ahead: none is lost, none is read beyond the next, and a resumed run sees what it would have.

No GPU is needed: a stream here writes down what it is asked for.
"""

from contextlib import contextmanager

import pytest
import torch
from tiny_task import Points, PointStream, Tiny, digest
from torch import nn

from spade3d.training import copies
from spade3d.training.copies import Moved
from spade3d.training.loop import Optimiser, train

CPU = torch.device("cpu")


class Stream:
    def __init__(self, name, told):
        self.name, self.told = name, told

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def told(monkeypatch):
    """What streams were told, in order; the CPU has some here."""
    told, here = [], []
    of_steps = Stream("steps", told)

    @contextmanager
    def within(stream):
        here.append(stream)
        yield
        here.pop()

    monkeypatch.setattr(copies, "stream_beside", lambda device: Stream("copies", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: of_steps)
    monkeypatch.setattr(torch.cuda, "stream", within)
    moved = Points.to

    def to(self, device):
        told.append(f"{here[-1].name} move {self.index}")
        return moved(self, device)

    monkeypatch.setattr(Points, "to", to)
    return told


def fit(out, task=None, batches=None, **more):
    task = task or Tiny()
    optimiser = Optimiser(lr=0.05, accumulate=2)
    train(task, batches or PointStream(), steps=6, out=out, optimiser=optimiser, device=CPU, save_every=2, **more)
    return task


def test_the_next_batch_is_copied_beside_the_step_of_the_present_one(told):
    batches = PointStream()
    moved = Moved(batches.stream(0, 3), CPU)
    exchange = ["steps waits for copies", "copies waits for steps"]
    assert next(moved).index == 0 and told == ["copies move 0", *exchange]
    told.clear()
    moved.ahead()
    moved.ahead()  # one batch ahead, not two
    assert batches.given == [0, 1] and told == ["copies move 1"]
    assert next(moved).index == 1 and told[1:] == exchange
    assert [next(moved).index, batches.given] == [2, [0, 1, 2]]
    moved.ahead()
    with pytest.raises(StopIteration):
        next(moved)


def test_a_batchs_memory_is_kept_until_its_step_has_been_asked_for(told):
    """It belongs to the stream of copies, which may fill it again as soon as nobody holds it."""
    moved = Moved(PointStream().stream(0, 3), CPU)
    held = next(moved).x.data_ptr()
    moved.ahead()
    assert moved._present.x.data_ptr() == held
    next(moved)
    assert moved._present.index == 1


def test_where_there_are_no_streams_nothing_is_fetched_before_it_is_asked_for():
    batches = PointStream()
    moved = Moved(batches.stream(0, 3), CPU)
    next(moved)
    moved.ahead()
    assert batches.given == [0]


def test_the_loop_asks_for_the_next_copy_once_the_step_is_under_way(told, tmp_path, monkeypatch):
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (told.append("backward"), backward(loss)))
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *of: (told.append("update"), clip(*of))[1])
    fit(tmp_path)
    said = [one for one in told if "waits" not in one]
    assert said[:7] == [
        "copies move 0",
        "backward",
        "copies move 1",
        "backward",
        "copies move 2",
        "update",
        "backward",
    ]
    assert [one for one in said if "move" in one] == [f"copies move {index}" for index in range(12)]


@pytest.mark.parametrize("failure", [1, 4, 5, 11])
def test_a_run_that_is_one_batch_ahead_resumes_from_the_batch_in_use(told, tmp_path, failure):
    def happen(index):
        if index == failure:
            raise RuntimeError(f"batch {index}")

    whole = fit(tmp_path / "whole")
    begun = PointStream(happen)
    with pytest.raises(RuntimeError, match=f"batch {failure}"):
        fit(tmp_path / "run", batches=begun)
    assert begun.given == list(range(failure))
    again = PointStream()
    assert digest(fit(tmp_path / "run", batches=again, resume=True)) == digest(whole)
    # Two batches a step, saved every second one: what was fetched ahead of a save is fetched again.
    assert again.given == list(range(failure // 4 * 4, 12))


def test_copies_ahead_change_no_number(told, tmp_path, monkeypatch):
    ahead = digest(fit(tmp_path / "ahead"))
    monkeypatch.undo()
    assert digest(fit(tmp_path / "plain")) == ahead
