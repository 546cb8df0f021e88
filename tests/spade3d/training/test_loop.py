"""The loop on a task small enough to follow by hand."""

import copy
import json
import math
import os
import socket

import numpy as np
import pytest
import torch
from tiny_task import PointStream, Tiny, digest, written
from torch import nn

from spade3d.claim import Overruled
from spade3d.faults import DataFault, Fault, UsageFault
from spade3d.training import checkpoint
from spade3d.training import precision as precision_module
from spade3d.training.journal import read_log
from spade3d.training.loop import Optimiser, Task, train
from spade3d.training.schedules import warmup_cosine

CPU = torch.device("cpu")
TIMES = ("seconds", "data_seconds", "crops_per_second")


def fit(task, out, *, steps=8, batches=None, lr=0.05, accumulate=1, clip_norm=1.0, save_every=3, **more):
    return train(
        task,
        batches or PointStream(),
        steps=steps,
        out=out,
        optimiser=Optimiser(lr=lr, accumulate=accumulate, clip_norm=clip_norm, warmup=0.25),
        device=CPU,
        save_every=save_every,
        **more,
    )


def untimed(out) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_log(out / "log.jsonl")]


def test_it_equals_the_loop_written_by_hand(tmp_path):
    task, twin = Tiny(), Tiny()
    outcome = fit(task, tmp_path, steps=6, accumulate=2)
    optimizer = torch.optim.AdamW(
        [{"params": [twin.student.weight]}, {"params": [twin.student.bias], "weight_decay": 0.0}], weight_decay=0.05
    )
    torch.manual_seed(0)
    points = [torch.randn(4, 5, generator=torch.Generator().manual_seed(index)) for index in range(12)]
    twin.train()
    for step in range(1, 7):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * warmup_cosine(step / 6, warmup=0.25, floor=0.01)
        totals = []
        for index in (2 * step - 2, 2 * step - 1):
            losses = twin.losses(type("Batch", (), {"x": points[index], "index": index}), step / 6)
            (sum(losses.values()) / 2).backward()
            totals.append(sum(losses.values()).item())
        nn.utils.clip_grad_norm_(twin.student.parameters(), 1.0)
        optimizer.step()
        twin.after_step(step / 6)
        optimizer.zero_grad()
    assert digest(task) == digest(twin)
    assert outcome.step == 6
    assert sum(outcome.losses.values()) == pytest.approx(sum(totals) / 2, rel=1e-6)


def test_the_log_holds_what_was_minimised(tmp_path):
    fit(Tiny(), tmp_path, steps=4, signs_every=2)
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["total"] == pytest.approx(row["losses"]["recall"] + row["losses"]["memory"])
        assert row["grad_norm"] > 0 and row["crops_per_second"] == pytest.approx(4 / row["seconds"])
        assert ("signs" in row) == (row["step"] % 2 == 0)
    assert rows[0]["lr"] == pytest.approx(0.05) and rows[-1]["lr"] == pytest.approx(0.05 * 0.01)
    assert {"rank", "uniformity", "spread"} <= rows[1]["signs"].keys()
    fit(Tiny(), tmp_path / "short", steps=3, signs_every=25)
    assert ["signs" in row for row in read_log(tmp_path / "short" / "log.jsonl")] == [False, False, True]


def test_same_seed_same_bits(tmp_path):
    tasks = [Tiny(), Tiny(), Tiny()]
    for number, (task, seed) in enumerate(zip(tasks, (1, 1, 2), strict=True)):
        fit(task, tmp_path / str(number), seed=seed)
    assert digest(tasks[0]) == digest(tasks[1]) != digest(tasks[2])
    assert untimed(tmp_path / "0") == untimed(tmp_path / "1")


class Broken(Exception):
    """What a test throws into a run."""


def broken_at(index: int) -> PointStream:
    def happen(now: int) -> None:
        if now == index:
            raise Broken

    return PointStream(happen)


@pytest.mark.parametrize("failure", [1, 3, 4, 7])
def test_resumed_equals_uninterrupted(tmp_path, failure):
    whole, first, second = Tiny(), Tiny(), Tiny()
    fit(whole, tmp_path / "whole")
    with pytest.raises(Broken):
        fit(first, tmp_path / "broken", batches=broken_at(failure))
    batches = PointStream()
    outcome = fit(second, tmp_path / "broken", resume=True, batches=batches)
    assert digest(whole) == digest(second)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "broken")
    assert batches.given == list(range(failure // 3 * 3, 8))  # saved every third step
    assert outcome.step == 8
    whole, broken = (written(tmp_path / run / "checkpoints" / "step-0000008.pt") for run in ("whole", "broken"))
    assert whole == broken


def test_resuming_what_was_done_does_nothing(tmp_path):
    task, again = Tiny(), Tiny()
    before = fit(task, tmp_path)
    batches = PointStream()
    assert fit(again, tmp_path, resume=True, batches=batches) == before
    assert digest(task) == digest(again) and batches.given == []


def test_resuming_before_the_first_save_says_so(tmp_path, capfd):
    fit(Tiny(), tmp_path, resume=True)
    assert "nothing was saved yet" in capfd.readouterr().err


def test_a_run_is_never_written_over(tmp_path):
    fit(Tiny(), tmp_path)
    with pytest.raises(UsageFault, match="already holds a run"):
        fit(Tiny(), tmp_path)


def test_two_processes_do_not_write_one_run(tmp_path):
    """The second is refused before it reads or writes anything, and the claim is given back at the end."""
    with pytest.raises(Broken):
        fit(Tiny(), tmp_path, batches=broken_at(4))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert "claim" not in before
    (tmp_path / "claim").write_text(json.dumps({"process": os.getppid(), "host": socket.gethostname()}))
    with pytest.raises(DataFault, match="of this machine is running there"):
        fit(Tiny(), tmp_path, resume=True)
    (tmp_path / "claim").unlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert fit(Tiny(), tmp_path, resume=True).step == 8


def test_a_run_that_another_process_took_over_ends_and_writes_nothing_more(tmp_path):
    """It slept, was believed dead, and wakes up: from there on the run is the other's."""
    theirs, kept = json.dumps({"process": 7, "host": "far"}), []

    def sleep_before(index: int) -> None:
        if index == 4:
            (tmp_path / "claim").write_text(theirs)
            kept.extend((tmp_path / name).read_bytes() for name in ("log.jsonl", "checkpoints/last"))

    with pytest.raises(Overruled, match="process 7 on far has taken over"):
        fit(Tiny(), tmp_path, batches=PointStream(sleep_before))
    assert [(tmp_path / name).read_bytes() for name in ("log.jsonl", "checkpoints/last")] == kept
    assert (tmp_path / "claim").read_text() == theirs


def test_lost_checkpoints_are_no_fresh_start(tmp_path):
    fit(Tiny(), tmp_path)
    for path in checkpoint.steps_in(tmp_path / "checkpoints"):
        path.unlink()
    with pytest.raises(DataFault, match="no checkpoint to resume from"):
        fit(Tiny(), tmp_path, resume=True)


def test_another_configuration_is_named(tmp_path):
    fit(Tiny(), tmp_path, config_hash="abc")
    with pytest.raises(DataFault, match="config 'abc', now 'abd'; seed 0, now 1"):
        fit(Tiny(), tmp_path, config_hash="abd", seed=1, resume=True)


def test_another_task_is_named(tmp_path):
    fit(Tiny(), tmp_path)
    other = Tiny()
    other.student = nn.Linear(7, 3)
    with pytest.raises(DataFault, match="does not fit the task.*student.weight"):
        fit(other, tmp_path, resume=True)


def test_a_damaged_checkpoint_costs_steps_not_the_run(tmp_path, capfd):
    whole, second = Tiny(), Tiny()
    fit(whole, tmp_path / "whole")
    with pytest.raises(Broken):
        fit(Tiny(), tmp_path / "broken", batches=broken_at(7))
    with open(tmp_path / "broken" / "checkpoints" / "step-0000006.pt", "r+b") as file:
        file.seek(1000)
        file.write(b"\x00\xff" * 8)
    batches = PointStream()
    fit(second, tmp_path / "broken", resume=True, batches=batches)
    assert "step-0000006.pt: damaged" in capfd.readouterr().err
    assert batches.given[0] == 3 and digest(whole) == digest(second)


def test_an_update_that_is_not_finite_is_not_made(tmp_path):
    """Batch 3 is spoilt: weights, teacher and memory are as if it had not been there."""
    seen = {}

    class Watched(Tiny):
        def losses(self, batch, progress):
            seen[batch.index] = digest(self)
            return super().losses(batch, progress)

    fit(Watched(spoil=frozenset({3})), tmp_path)
    assert seen[3] == seen[4] and seen[2] != seen[3] and seen[4] != seen[5]
    rows = read_log(tmp_path / "log.jsonl")
    assert [row.get("skipped", False) for row in rows] == [False] * 3 + [True] + [False] * 4
    assert rows[3]["losses"]["recall"] is None and rows[3]["losses"]["memory"] is not None


def saved(out) -> list[str]:
    return [path.stem for path in checkpoint.steps_in(out / "checkpoints")]


def test_ten_in_a_row_end_the_run(tmp_path):
    task = Tiny(spoil=frozenset(range(5, 100)))
    message = (
        r"recall not finite in 10 steps in a row, 6 to 15; the last weights saved that gave a finite loss are in "
        r"\S*step-0000000.pt; those of step 5, the last update made, are in \S*step-0000005.pt and gave none; "
        "the last batch was of scan 2: look at"
    )
    with pytest.raises(Fault, match=message) as caught:
        fit(task, tmp_path, steps=50, save_every=5)
    assert caught.value.exit_code == 1
    assert all(tensor.isfinite().all() for tensor in task.state_dict().values())


def test_updates_that_are_not_finite_push_no_save_out(tmp_path):
    """Two saves fall into them: neither is made, and what stays is from before the update that was the last."""
    with pytest.raises(Fault, match=r"finite loss are in \S*step-0000004.pt; the last batch"):
        fit(Tiny(spoil=frozenset(range(5, 100))), tmp_path, steps=50, save_every=2)
    assert saved(tmp_path) == ["step-0000002", "step-0000004"]


class Exploding(Tiny):
    """The update of one step makes the weights huge: finite, and nothing that they give is."""

    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def after_step(self, progress):
        super().after_step(progress)
        self.left -= 1
        if self.left == 0:
            self.student.weight.data.mul_(1e30)


@pytest.mark.parametrize(("save_every", "good"), [(1, 2), (2, 2), (3, 0)])
def test_the_weights_that_broke_the_run_are_not_called_good(tmp_path, save_every, good):
    """Step 3 has a finite loss, so the weights of step 2 were good; what it made of them is not."""
    with pytest.raises(Fault, match=rf"gave a finite loss are in \S*step-000000{good}.pt") as caught:
        fit(Exploding(3), tmp_path, steps=50, save_every=save_every)
    assert ("step-0000003.pt and gave none" in str(caught.value)) == (3 % save_every == 0)
    kept = checkpoint.load(tmp_path / "checkpoints" / f"step-000000{good}.pt")
    assert kept["task"]["student.weight"].abs().max() < 10


def test_without_an_update_there_is_nothing_good_to_name(tmp_path):
    with pytest.raises(Fault, match="1 to 10; no update was made; the last batch"):
        fit(Tiny(spoil=frozenset(range(100))), tmp_path, steps=50)
    assert saved(tmp_path) == ["step-0000000"]


def test_a_save_that_fell_among_them_is_made_up_for(tmp_path):
    with pytest.raises(Broken):
        fit(Tiny(spoil=frozenset({5, 6, 7})), tmp_path, steps=50, save_every=6, batches=broken_at(9))
    assert saved(tmp_path) == ["step-0000000", "step-0000009"]


def test_a_run_that_ends_among_them_is_saved_and_says_so(tmp_path, capfd):
    outcome = fit(Tiny(spoil=frozenset({6, 7})), tmp_path, steps=8, save_every=3)
    assert outcome.step == 8 and saved(tmp_path) == ["step-0000003", "step-0000006", "step-0000008"]
    assert (
        "recall not finite in 2 steps in a row, 7 to 8, the last: the run ends without them" in capfd.readouterr().err
    )


def test_a_run_that_came_apart_at_its_end_is_not_finished(tmp_path):
    """Its last updates were left out, within what a run may leave out, and no batch more gives a finite loss."""
    message = r"7 to 8, the last, and of 10 batches more none .*come apart.* in \S*step-0000003.pt; .*lower --optim.lr"
    for resume in (False, True):
        with pytest.raises(Fault, match=message) as caught:
            fit(Exploding(6), tmp_path, steps=8, save_every=3, resume=resume)
        assert caught.value.exit_code == 1


def test_a_run_may_stop_at_the_first_or_go_on_for_longer(tmp_path):
    message = "in step 6; .*step-0000005.pt and gave none; the last batch was of scan 2: .*--skip-bad-batches"
    with pytest.raises(Fault, match=message):
        fit(Tiny(spoil=frozenset({5})), tmp_path / "first", save_every=5, skip_bad_batches=0)
    outcome = fit(Tiny(spoil=frozenset(range(5, 17))), tmp_path / "longer", steps=20, skip_bad_batches=12)
    rows = read_log(tmp_path / "longer" / "log.jsonl")
    assert outcome.step == 20 and [row["scans"] for row in rows if row.get("skipped")][:2] == [["scan 2"], ["scan 0"]]


def test_the_count_of_skips_survives_resuming(tmp_path):
    spoilt = frozenset(range(5, 100))

    def broken(index: int) -> None:
        if index == 12:
            raise Broken

    with pytest.raises(Broken):
        fit(Tiny(spoil=spoilt), tmp_path, steps=50, save_every=2, batches=PointStream(broken))
    with pytest.raises(Fault, match="6 to 15"):
        fit(Tiny(spoil=spoilt), tmp_path, steps=50, save_every=2, resume=True)


def quality(values):
    """A validation that gives these values by step, and misuses every generator of chance."""

    def validate(task: Task, step: int) -> dict[str, float]:
        assert not task.training and not torch.is_grad_enabled()
        torch.rand(7), np.random.rand(7)
        return {"mean_dice": values[step], "other": 1.0}

    return validate


def test_the_best_weights_are_kept_and_validation_leaves_no_trace(tmp_path):
    plain, task = Tiny(), Tiny()
    fit(plain, tmp_path / "plain")
    kept = {}
    values = {2: 0.4, 4: 0.7, 6: math.nan, 8: 0.6}

    def validate(task: Task, step: int) -> dict[str, float]:
        kept[step] = copy.deepcopy(task.state_dict())
        return quality(values)(task, step)

    outcome = fit(task, tmp_path / "run", validate=validate, validate_every=2, better="mean_dice")
    assert digest(plain) == digest(task)
    assert (outcome.best.name, outcome.best.value, outcome.best.step) == ("mean_dice", 0.7, 4)
    best = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert all(torch.equal(best["task"][name], kept[4][name]) for name in kept[4])
    rows = {row["step"]: row.get("validation") for row in read_log(tmp_path / "run" / "log.jsonl")}
    assert rows[4] == {"mean_dice": 0.7, "other": 1.0} and rows[6]["mean_dice"] is None and rows[5] is None


def test_validation_always_ends_a_run(tmp_path):
    assert fit(Tiny(), tmp_path, validate=quality({8: 0.5}), better="mean_dice").best.step == 8


def test_the_best_survives_resuming(tmp_path):
    values = {2: 0.4, 4: 0.7, 6: 0.5, 8: 0.6}
    with pytest.raises(Broken):
        fit(
            Tiny(),
            tmp_path,
            batches=broken_at(5),
            validate=quality(values),
            validate_every=2,
            better="mean_dice",
        )
    outcome = fit(Tiny(), tmp_path, resume=True, validate=quality(values), validate_every=2, better="mean_dice")
    assert (outcome.best.value, outcome.best.step) == (0.7, 4)


def test_an_unknown_measure_of_the_best_is_named(tmp_path):
    with pytest.raises(Fault, match="mean_dice, other but not 'dice'"):
        fit(Tiny(), tmp_path, validate=quality({8: 0.5}), better="dice")


def test_collapse_warns_once(tmp_path, capfd):
    class Collapsed(Tiny):
        def losses(self, batch, progress):
            losses = super().losses(batch, progress)
            self.embedding = torch.ones(16, 8)
            return losses

    fit(Collapsed(), tmp_path, signs_every=2)
    assert capfd.readouterr().err.count("the embedding has collapsed") == 1
    assert all("alarm" in row["signs"] for row in read_log(tmp_path / "log.jsonl") if "signs" in row)


def test_decay_spares_vectors_biases_and_tables():
    task = Tiny()
    task.relative_position_bias_table = nn.Parameter(torch.zeros(9, 3))
    task.mask_token = nn.Parameter(torch.zeros(1, 3))
    decayed, free = task.parameter_groups(0.05)
    assert decayed["weight_decay"] == 0.05 and [p is task.student.weight for p in decayed["params"]] == [True]
    assert free["weight_decay"] == 0.0 and len(free["params"]) == 3  # and nothing of the frozen teacher


def test_a_group_scales_the_learning_rate(tmp_path):
    class Frozen(Tiny):
        def parameter_groups(self, weight_decay):
            return [{"params": [self.student.weight], "lr_scale": 0.0}, {"params": [self.student.bias]}]

    task = Frozen()
    fit(task, tmp_path)
    assert torch.equal(task.student.weight, Tiny().student.weight)
    assert not torch.equal(task.student.bias, Tiny().student.bias)


def test_no_clipping_when_none_is_asked(tmp_path):
    clipped, free = Tiny(), Tiny()
    fit(clipped, tmp_path / "clipped", clip_norm=1e-3)
    fit(free, tmp_path / "free", clip_norm=None)
    assert digest(clipped) != digest(free)


def test_exhausted_memory_says_what_to_do(tmp_path):
    class Greedy(Tiny):
        def losses(self, batch, progress):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Fault, match="memory ran out.*smaller"):
        fit(Greedy(), tmp_path)


def test_wrong_bf16_gradients_are_known_from_right_ones(monkeypatch):
    """Without oneDNN the gradients agree; two that differ by a tenth do not."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert precision_module.cpu_bf16_is_right()
    right = torch.autograd.grad
    factors = iter((1.0, 1.1))
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weight: [right(loss, weight)[0] * next(factors)])
    assert not precision_module.cpu_bf16_is_right()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_cannot_be_is_refused(tmp_path, monkeypatch, precision):
    monkeypatch.setattr("spade3d.training.precision.cpu_bf16_is_right", lambda: False)
    with pytest.raises(UsageFault, match="fp32"):
        fit(Tiny(), tmp_path, precision=precision)


def test_what_was_deterministic_before_is_so_after(tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(Broken):
        fit(Tiny(), tmp_path, batches=broken_at(2))
    assert not torch.are_deterministic_algorithms_enabled()
