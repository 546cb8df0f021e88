"""Batches made ahead of time by processes of their own, so that the device never waits for a crop.

Any `Batches` will do, because the batch at an index is a pure function of it: which process made it, or how many there
are, changes nothing. Processes are spawned (threads of Blosc2 and CUDA do not survive a fork); batches come in order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from spade3d.cores import usable_cores
from spade3d.faults import Fault
from spade3d.training import ranks
from spade3d.training.loop import Batch, Batches

AHEAD = 2  # batches that each process has ready
MOST = 8  # processes that feed a GPU, unless a run says otherwise


def prefetched(batches: Batches, loaders: int | None, device: torch.device) -> Batches:
    """The same batches, made by `loaders` processes; 0 makes them in the training process when they are asked for.

    None: 0 on a CPU, which has its cores busy with training; for a GPU this process's share of the machine's cores but
    one, MOST at most.
    """
    if loaders is None:
        loaders = 0 if device.type == "cpu" else max(1, min(MOST, own_cores(os.environ) - 1))
    return Prefetched(batches, loaders, pinned=device.type == "cuda") if loaders else batches


def own_cores(environment: Mapping[str, str]) -> int:
    """The cores of this one process: what `srun` gave each task, or an even share with the others of this machine."""
    if "LOCAL_WORLD_SIZE" in environment:  # of torchrun, whose processes see all that the launcher may use
        return usable_cores() // int(environment["LOCAL_WORLD_SIZE"])
    if "SLURM_PROCID" in environment and "SLURM_CPUS_PER_TASK" in environment:
        return min(int(environment["SLURM_CPUS_PER_TASK"]), usable_cores())
    return usable_cores() // ranks.world()


@dataclass(frozen=True)
class Prefetched:
    """Batches from `loaders` processes; `pinned`, in memory from which a GPU copies while it computes."""

    batches: Batches
    loaders: int
    pinned: bool = False

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches start, ..., stop - 1; a fault of a process is raised here, as if there were none."""
        loader = DataLoader(
            _Indexed(self.batches),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.loaders,
            prefetch_factor=AHEAD,
            multiprocessing_context="spawn",
            worker_init_fn=_begin,
            pin_memory=self.pinned,
        )
        for made in loader:
            if isinstance(made, Fault):
                raise made
            yield made


@dataclass(frozen=True)
class _Indexed(Dataset):
    batches: Batches

    def __getitem__(self, index: int) -> Any:
        try:
            return next(iter(self.batches.stream(index, index + 1)))
        except Fault as fault:  # a loader would wrap it into a traceback
            return fault


def _begin(_: int) -> None:
    """One thread each, and no ear for signals: the training process hears them, and ends its loaders with itself."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
