"""Ranks: the processes that share one run, and what they tell each other. One process alone is rank 0 of 1.

`torchrun` or `srun` start the same command several times; `joined` makes one run of these processes. Each rank learns
from its share of every batch, and what a loss needs of the others is told to all: the loss of a batch, its gradient,
memories and centres are those of the whole batch on one process, up to rounding. Alone, everything here gives back what
it was given.
"""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from spade3d.faults import Fault, Preempted, UsageFault

SILENCE = timedelta(minutes=10)  # of a rank in a step, after which the others give up
TURN = timedelta(seconds=2)  # of waiting for word
LOST = "another process of this run has ended; its own message says why"
PATIENCE = timedelta(days=7)  # with a rank that prepares or judges scans

S, T = TypeVar("S"), TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and which of those on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


@dataclass
class _Run:
    """The run that this process has joined."""

    place: Place = Place()
    store: Any = None  # where the first rank leaves word for the others
    words: int = 0


_run = _Run()


def rank() -> int:
    return _run.place.rank


def world() -> int:
    return _run.place.world


def first() -> bool:
    """Whether this is the one process that writes and speaks."""
    return _run.place.rank == 0


def place_of(environment: Mapping[str, str]) -> Place:
    """What `torchrun` (RANK, WORLD_SIZE, LOCAL_RANK) or `srun` (SLURM_PROCID of SLURM_STEP_NUM_TASKS) say; alone
    without them. A batch script without `srun` is one process, whatever number of tasks the job has."""
    named = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    for names in named:
        if names[0] in environment and names[1] in environment:
            return Place(*(int(environment.get(name, 0)) for name in names))
    return Place()


def alone(what: str) -> None:
    """UsageFault where several processes were started for what only one can do."""
    if (world := place_of(os.environ).world) > 1:
        raise UsageFault(f"{what} runs in one process, and {world} were started; start it without torchrun or srun -n")


def gpu_of(place: Place, environment: Mapping[str, str]) -> int:
    """The number of a process's GPU among those that it sees: that of its place on the machine, or the only one, where
    it was given one of its own, as by `srun --gpus-per-task=1`. UsageFault where there is none for it.

    Processes of one `torchrun` see the same GPUs: one alone would be that of all.
    """
    there = torch.cuda.device_count()
    named = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if there == len(named) == 1 and "TORCHELASTIC_RUN_ID" not in environment:
        return 0
    if place.local >= there:
        raise UsageFault(f"process {place.local} of this machine, which has {there} GPUs; start one for each GPU")
    return place.local


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other processes of this run, if there are any; gloo between processors, NCCL between GPUs.

    device: "cpu", or "cuda": each process then takes its GPU (`gpu_of`). UsageFault where there are fewer GPUs than
    processes, or where `srun` was told no address to meet at.
    """
    place = place_of(os.environ)
    if place.world == 1:
        yield
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageFault(
            f"{place.world} processes, but no {' and no '.join(missing)} to meet at; start with torchrun, or export "
            "both before srun (docs/cluster.md)"
        )
    if device == "cuda":
        torch.cuda.set_device(gpu_of(place, os.environ))
    # srun's names are not those that torch reads.
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world))
    store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=SILENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore("collectives", store),
        rank=place.rank,
        world_size=place.world,
        timeout=SILENCE,
    )
    _run.place, _run.store, _run.words = place, dist.PrefixStore("words", store), 0
    try:
        with nullcontext() if first() else redirect_stderr(io.StringIO()):  # notes are said once; faults are raised
            yield
        dist.barrier()
    finally:
        _run.place, _run.store = Place(), None
        dist.destroy_process_group()


def once(do: Callable[[], T]) -> T:
    """Have the first rank alone do something while the others wait; all get its result, or the fault that ended it."""
    if world() == 1:
        return do()
    _run.words += 1
    key = str(_run.words)
    return _leave_word(key, do) if first() else _hear(key)


def each(items: Sequence[S], do: Callable[[S], T]) -> list[T]:
    """What `do` makes of every item, in their order: ranks take the items in turn, and all get all of it. Some may take
    hours longer than others. The fault of one rank ends all."""
    if world() == 1:
        return [do(item) for item in items]
    _run.words += 1
    keys = [f"{_run.words} of {number}" for number in range(world())]
    others = [key for key in keys if key != keys[rank()]]

    def own_items() -> list[T]:
        done = []
        for item in items[rank() :: world()]:
            for key in others:
                if _run.store.check([key]):
                    _hear(key)  # raises where that rank ended by a fault
            done.append(do(item))
        return done

    _leave_word(keys[rank()], own_items)
    parts = [iter(_hear(key)) for key in keys]
    return [next(parts[number % world()]) for number in range(len(items))]


def _leave_word(key: str, do: Callable[[], T]) -> T:
    """Do something, and tell what came of it."""
    try:
        outcome = do()
    except BaseException as error:
        code = error.exit_code if isinstance(error, Fault | Preempted) else 1
        with suppress(dist.DistError):  # the process that keeps the words may have ended, and this error is the news
            _run.store.set(key, pickle.dumps((False, (str(error), code))))
        raise
    try:
        _run.store.set(key, pickle.dumps((True, outcome)))
    except dist.DistError as lost:
        raise Told(LOST, 1) from lost
    return outcome


def _hear(key: str) -> Any:
    """What a rank told, waiting for it as long as it takes, in short turns: a signal is heard between them."""
    begun = time.monotonic()
    while True:
        try:
            _run.store.wait([key], TURN)
            break
        except dist.DistStoreError:
            if time.monotonic() - begun > PATIENCE.total_seconds():
                raise
        except dist.DistError as lost:
            raise Told(LOST, 1) from lost
    done, outcome = pickle.loads(_run.store.get(key))
    if not done:
        raise Told(*outcome)
    return outcome


class Told(Fault):
    """What ended another rank, as the rest hear of it; they need not say it again."""

    said = True

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def share(whole: int, what: str) -> int:
    """This rank's part of so many; UsageFault where they cannot be shared evenly."""
    if whole % world():
        raise UsageFault(
            f"{what} {whole} cannot be shared evenly by {world()} processes; give a multiple of {world()} (it counts "
            "the whole batch, so that a run is the same on any number of processes)"
        )
    return whole // world()


def own(rows: T) -> T:
    """This rank's part of rows that all ranks know alike: equal parts in the order of ranks."""
    part = len(rows) // world()
    return rows[rank() * part : (rank() + 1) * part]


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks in their order, (all, ...), without gradient; ranks may have different numbers of them."""
    if world() == 1:
        return rows.detach()
    rows = rows.detach().contiguous()
    counts = row_counts(rows)
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def row_counts(rows: Tensor) -> list[int]:
    """How many rows each rank has; between processors, so that no device is waited for."""
    if world() == 1:
        return [len(rows)]
    counts = torch.zeros(world(), dtype=torch.int64)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    return counts.tolist()


def rows_before(rows: Tensor) -> int:
    """How many rows of lower ranks come before this rank's among those that are `gathered`."""
    return sum(row_counts(rows)[: rank()])


def gathered_with_gradient(rows: Float[Tensor, "n d"]) -> Float[Tensor, "all d"]:
    """`gathered`, of as many rows each, through which gradients of all ranks come back."""
    if world() == 1:
        return rows
    placed = rows.new_zeros(world(), *rows.shape)
    placed[rank()] = rows
    return summed(placed).flatten(0, 1)


def summed(values: Tensor) -> Tensor:
    """The sum over ranks, element by element; its gradient is that of the losses of all ranks."""
    return values if world() == 1 else _Sum.apply(values)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_reduced(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def mean_of_whole(total: Float[Tensor, ""], count: Tensor) -> Float[Tensor, ""]:
    """This rank's part of a mean over the whole batch, from the sum and the number of its own terms.

    The mean over ranks of these parts, which is what the loop minimises, is the mean over all terms, however unevenly
    they are spread. 0 where there is none.
    """
    return total * world() / summed(count.detach()).clamp(min=1)


def averaged(values: Tensor) -> Tensor:
    """The mean over ranks, without gradient."""
    return values if world() == 1 else summed(values.detach()) / world()


def largest(number: int) -> int:
    """The largest of the ranks' numbers."""
    if world() == 1:
        return number
    all_of_them = torch.tensor([number])
    dist.all_reduce(all_of_them, dist.ReduceOp.MAX)
    return int(all_of_them)


def names_of_all(names: list[str]) -> list[str]:
    """The names that any rank has, in order."""
    if world() == 1:
        return names
    of_all: list[list[str] | None] = [None] * world()
    dist.all_gather_object(of_all, names)
    return sorted({name for some in of_all for name in some})


def barrier() -> None:
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier()
