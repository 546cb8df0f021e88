"""A tiny task with everything that continuing must carry: dropout, a frozen teacher, a memory; and its batches."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spade3d.training import checkpoint
from spade3d.training.loop import Task


@dataclass
class Points:
    """Four points of five numbers."""

    x: Tensor
    index: int

    @property
    def scans(self) -> tuple[str, ...]:
        return (f"scan {self.index % 3}",)

    def to(self, device: torch.device) -> "Points":
        return Points(self.x.to(device), self.index)

    def __len__(self) -> int:
        return len(self.x)


class PointStream:
    """The batch at an index is a pure function of the index; `happen(index)` runs before it is given."""

    def __init__(self, happen=lambda index: None):
        self.happen = happen
        self.given: list[int] = []

    def stream(self, start: int, stop: int) -> Iterator[Points]:
        torch.rand(3)  # as a DataLoader does when it starts: it must not shift the chance of the task
        for index in range(start, stop):
            self.happen(index)
            self.given.append(index)
            yield Points(torch.randn(4, 5, generator=torch.Generator().manual_seed(index)), index)


class Tiny(Task):
    """The student recalls the teacher's view of the points, and what the memory holds."""

    def __init__(self, spoil: frozenset[int] = frozenset()):
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        self.student = nn.Linear(5, 3)
        with torch.no_grad():
            self.student.weight.copy_(torch.randn(3, 5, generator=chance))
            self.student.bias.zero_()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("memory", torch.zeros(3))
        self.spoil = spoil
        self.waiting: list[Tensor] = []

    def losses(self, batch: Points, progress: float) -> dict[str, Tensor]:
        z = self.student(self.dropout(batch.x))
        self.waiting.append(z.detach().mean(dim=0))
        self.embedding = z.detach()
        recall = (z - self.teacher(batch.x) - 1).square().mean()
        if batch.index in self.spoil:
            recall = recall * float("nan")
        return {"recall": recall, "memory": 0.1 * (z.mean(dim=0) - self.memory).square().sum()}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        for ours, its in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            its.lerp_(ours, 0.1)
        self.memory.copy_(torch.stack(self.waiting).mean(dim=0))
        self.waiting.clear()

    def after_skip(self) -> None:
        self.waiting.clear()


def digest(task: nn.Module) -> list[bytes]:
    """All bits of a task's state."""
    return [tensor.numpy().tobytes() for tensor in task.state_dict().values()]


def written(path: Path) -> str:
    """All that a checkpoint holds, but for Python's own generator: the type checker of the tests draws from it."""
    state = checkpoint.load(path)
    if "rng" in state:
        del state["rng"]["python"]
    return json.dumps(state, default=lambda tensor: tensor.tolist())
