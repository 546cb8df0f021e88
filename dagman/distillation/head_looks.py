"""A look, every now and then, at how different the heads of the encoder are while it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from dagman.attention.diversity import head_diversity
from spade3d.crops.pairs import PairBatch

CROPS = 2  # of a batch that are looked at


class LooksAtHeads(nn.Module):
    """Measures the diversity of heads some `times` in a run; how often it has done so is kept with the task, so that
    a resumed run looks when it would have."""

    def __init__(self, times: int, spacing_mm: Sequence[float]):
        super().__init__()
        self.times, self.spacing_mm = times, tuple(spacing_mm)
        self.done = 0

    def get_extra_state(self) -> int:
        """Kept with the task's state; no tensor, which would have to be waited for on a device."""
        return self.done

    def set_extra_state(self, state: int) -> None:
        self.done = state

    def notes(self, encoder: nn.Module, batch: PairBatch, progress: float) -> Mapping[str, float]:
        """Numbers for the log where a look is due, at equal shares of the run and at its end; else nothing.

        Seen are the first clean crops of the batch, whole. (Waits for the device, a few times a run.)
        """
        due = int(progress * self.times + 1e-9)
        if due <= self.done:
            return {}
        self.done = due
        return head_diversity(encoder, batch.clean[:CROPS], self.spacing_mm)
