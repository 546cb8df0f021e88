"""Ranks: where a process learns its place from, and that alone nothing changes."""

import multiprocessing
import os
import socket

import pytest
import torch

from spade3d.faults import DataFault, UsageFault
from spade3d.training import ranks
from spade3d.training.ranks import Place


@pytest.mark.parametrize(
    ("there", "environment", "wanted"),
    [
        (4, {}, 1),
        (4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1),
        (1, {"CUDA_VISIBLE_DEVICES": "1"}, 0),  # srun --gpus-per-task=1: each process sees its own
        (1, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, 0),
        (1, {}, None),
        (1, {"CUDA_VISIBLE_DEVICES": "0,9"}, None),  # one of them is not there
        (1, {"CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "none"}, None),  # torchrun: all see this one
        (0, {"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_each_process_takes_the_gpu_of_its_place_or_the_only_one_that_it_sees(monkeypatch, there, environment, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    if wanted is None:
        with pytest.raises(UsageFault, match=f"process 1 of this machine, which has {there} GPUs; start one for each"):
            ranks.gpu_of(Place(1, 2, 1), environment)
    else:
        assert ranks.gpu_of(Place(1, 2, 1), environment) == wanted


def test_torchrun_and_srun_say_where_a_process_stands_and_a_batch_script_does_not():
    assert ranks.place_of({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(3, 8, 1)
    assert ranks.place_of({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}) == Place(5, 16, 1)
    assert ranks.place_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}) == Place()
    assert ranks.place_of({}) == Place()


def test_alone_everything_is_given_back_as_it_was():
    rows = torch.arange(6.0).reshape(3, 2)
    assert ranks.gathered(rows).equal(rows) and ranks.own(rows).equal(rows)
    assert ranks.rows_before(rows) == 0 and ranks.largest(7) == 7 and ranks.names_of_all(["b"]) == ["b"]
    assert ranks.mean_of_whole(torch.tensor(6.0), torch.tensor(4)) == 1.5
    assert ranks.mean_of_whole(torch.tensor(0.0), torch.tensor(0)) == 0.0
    assert ranks.once(lambda: "done") == "done" and ranks.share(5, "five") == 5
    assert ranks.each([3, 1, 2], lambda item: item * 10) == [30, 10, 20]


def test_processes_without_a_place_to_meet_are_told_what_is_missing(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageFault, match="no MASTER_ADDR and no MASTER_PORT to meet at"), ranks.joined("cpu"):
        pass


def test_what_runs_in_one_process_is_refused_where_several_were_started(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageFault, match="dagman-finetune runs in one process, and 4 were started"):
        ranks.alone("dagman-finetune")


def two_together(rank: int, port: int, answers) -> None:
    """What one of two processes does, and finds."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with ranks.joined("cpu"):
        x = torch.tensor([1.0 + rank], requires_grad=True)
        (ranks.summed(x) ** 2 * (1 + rank)).sum().backward()  # the losses are s^2 and 2 s^2 of s = 1 + 2
        rows = torch.full((1 + rank, 2), float(rank), requires_grad=True)
        equal = torch.full((1, 2), float(rank), requires_grad=True)
        ranks.gathered_with_gradient(equal)[1].sum().backward()
        found = {
            "gradient": x.grad.item(),
            "gathered": ranks.gathered(rows).tolist(),
            "before": ranks.rows_before(rows),
            "backward": equal.grad.tolist(),
            "mean": ranks.mean_of_whole(torch.tensor(3.0), torch.tensor(1 + rank)).item(),
            "largest": ranks.largest(10 - rank),
            "names": ranks.names_of_all([f"scan {rank}", "both"]),
            "own": ranks.own([0, 1, 2, 3]),
            "once": ranks.once(lambda: f"from {ranks.rank()}"),
            "each": ranks.each("abcde", lambda letter: (letter, ranks.rank())),
            "none": ranks.each([], refuse),
        }
        try:
            ranks.share(3, "--crop.anchors")
        except UsageFault as fault:
            found["share"] = str(fault)
        try:
            ranks.once(refuse)
        except DataFault as fault:
            found["fault"] = (str(fault), fault.exit_code, fault.said)
        except ranks.Told as fault:
            found["fault"] = (str(fault), fault.exit_code, fault.said)
        try:
            ranks.each([0, 1], lambda item: refuse() if item else item)  # the second rank's item
        except (DataFault, ranks.Told) as fault:
            found["fault of one"] = (str(fault), fault.said)
    answers.put((rank, found))


def refuse() -> None:
    raise DataFault("no scan")


def test_two_processes_tell_each_other_what_the_whole_batch_needs():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    both = [spawn.Process(target=two_together, args=(rank, port, answers)) for rank in (0, 1)]
    for process in both:
        process.start()
    found = dict(answers.get(timeout=120) for _ in both)
    for process in both:
        process.join(timeout=60)
    for rank, said in found.items():
        assert said["gradient"] == 18.0  # d (s^2 + 2 s^2) / ds at s = 3
        assert said["gathered"] == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert said["before"] == rank
        assert said["backward"] == [[2.0, 2.0]] if rank == 1 else [[0.0, 0.0]]  # both ranks' losses ask row 1
        assert said["mean"] == 2.0  # 3 * 2 ranks / 3 terms: the mean over ranks is 6 / 3
        assert said["largest"] == 10 and said["names"] == ["both", "scan 0", "scan 1"]
        assert said["own"] == ([0, 1] if rank == 0 else [2, 3])
        assert said["once"] == "from 0"
        assert "cannot be shared evenly by 2 processes" in said["share"]
        assert said["fault"] == ("no scan", 3, rank == 1)
        assert said["each"] == [("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 0)] and said["none"] == []
        assert said["fault of one"] == ("no scan", rank == 0)
