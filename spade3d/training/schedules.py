"""Schedules: functions of progress, which runs from 0 to 1, so that nobody counts steps."""

import math


def warmup_cosine(progress: float, *, warmup: float = 0.05, floor: float = 0.01) -> float:
    """Factor of the learning rate: a line from 0 to 1 over the share `warmup` of the run, then half a cosine from 1 to
    `floor` (Loshchilov & Hutter, SGDR, 2017, without restarts)."""
    if progress < warmup:
        return progress / warmup
    fallen = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    return floor + (1 - floor) * (1 + math.cos(math.pi * fallen)) / 2


def momentum(progress: float, *, start: float = 0.996) -> float:
    """Of the teacher: `start` at first, 1 at the end, along a cosine (Grill et al., BYOL, 2020, section 3.3)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float, *, start: float, end: float, until: float = 1.0) -> float:
    """A line from `start` to `end` over the share `until` of the run (0: none), then `end`: a temperature, a weight."""
    return end if progress >= until else start + (end - start) * progress / until
