"""The teacher: a moving average of its student, which only looks and never takes a gradient."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from spade3d.training import schedules


class Teacher(nn.Module):
    """Begins as a copy of the student and follows it after each step; always in evaluation mode, always frozen.

    `teacher(...)` takes what `student(...)` takes. (He et al., MoCo, 2020, eq. 2; Grill et al., BYOL, 2020, eq. 1.)
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.copied = copy.deepcopy(student).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Whatever the task around it does, the teacher stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.copied(*args, **kwargs)

    def restart(self, student: nn.Module) -> None:
        """Become a copy of the student again."""
        self.copied.load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, student: nn.Module, progress: float, *, start: float) -> None:
        """its <- m its + (1 - m) ours, where m rises from `start` to 1. Running statistics, if any, are taken over."""
        momentum = schedules.momentum(progress, start=start)
        # All at once: on a GPU each small tensor would cost as much as a large one.
        torch._foreach_lerp_(list(self.copied.parameters()), list(student.parameters()), 1 - momentum)
        by_type = defaultdict(list)
        for its, ours in zip(self.copied.buffers(), student.buffers(), strict=True):
            by_type[its.dtype].append((its, ours))
        for pairs in by_type.values():
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
