"""Batches made by other processes: the same ones in the same order, and the same faults."""

from dataclasses import dataclass

import pytest
import torch
from tiny_task import PointStream

from spade3d.faults import DataFault
from spade3d.training import prefetch
from spade3d.training.prefetch import Prefetched, own_cores, prefetched

DAMAGED = 4


@dataclass(frozen=True)
class Damage:
    """Happens when the batch of an index is made."""

    def __call__(self, index: int) -> None:
        if index == DAMAGED:
            raise DataFault(f"scan {index}: damaged")


def test_two_loaders_give_the_batches_of_none_and_pass_on_a_fault():
    batches = PointStream(Damage())
    direct = list(PointStream().stream(1, DAMAGED))
    made = Prefetched(batches, loaders=2).stream(1, DAMAGED + 2)
    for ours in direct:
        its = next(made)
        assert its.index == ours.index and its.x.equal(ours.x)
    with pytest.raises(DataFault, match=r"^scan 4: damaged$"):
        next(made)
    assert prefetched(batches, 0, torch.device("cpu")) is batches


def test_a_cpu_makes_its_own_batches_unless_it_is_told_otherwise():
    batches = PointStream()
    assert prefetched(batches, None, torch.device("cpu")) is batches
    assert prefetched(batches, 3, torch.device("cpu")) == Prefetched(batches, 3, pinned=False)
    assert prefetched(batches, None, torch.device("cuda")).pinned


@pytest.mark.parametrize(
    ("environment", "cores", "own"),
    [
        ({}, 12, 12),
        ({"LOCAL_WORLD_SIZE": "8"}, 96, 12),  # torchrun: all processes see the machine
        ({"SLURM_PROCID": "63", "SLURM_CPUS_PER_TASK": "12"}, 12, 12),  # srun: each sees what is its own
        ({"SLURM_PROCID": "63", "SLURM_CPUS_PER_TASK": "12"}, 96, 12),  # or all, where tasks are not bound
        ({"SLURM_CPUS_PER_TASK": "12"}, 4, 4),  # a batch script without srun
    ],
)
def test_a_process_feeds_its_gpu_with_its_own_cores(monkeypatch, environment, cores, own):
    monkeypatch.setattr(prefetch, "usable_cores", lambda: cores)
    assert own_cores(environment) == own
