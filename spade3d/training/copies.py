"""Copies to the device that nobody waits for: of the next batch, while a GPU learns from this one, and of a tensor."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Moved:
    """The batches of a stream, on the device.

    On a GPU `ahead`, called once the work of a step has been asked for, fetches one batch more and begins to copy it;
    elsewhere it does nothing. A batch that was fetched and never asked for is no loss: it is a pure function of its
    index. What goes wrong is raised where the batch is asked for. Nobody may hold a part of a batch when the step after
    its own begins.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device):
        self._batches, self._device, self._beside = batches, device, stream_beside(device)
        self._present = self._next = self._end = None

    def __next__(self) -> Any:
        if self._end is not None:
            raise self._end
        batch = self._fetched() if self._next is None else self._next
        self._next = None
        if self._beside is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._beside)
            # The memory of the batch before is given back below, to the stream beside: what `here` was asked to do with
            # it comes first. (This takes the place of `record_stream`, which would have to know each tensor.)
            self._beside.wait_stream(here)
            self._present = batch
        return batch

    def ahead(self) -> None:
        """Begin to copy the next batch."""
        if self._beside is None or self._next is not None or self._end is not None:
            return
        try:
            self._next = self._fetched()
        except Exception as end:
            self._end = end

    def _fetched(self) -> Any:
        # A DataLoader takes one number from torch's generator when it starts: a resumed run would be one ahead.
        with torch.random.fork_rng(devices=[]):
            batch = next(self._batches)
        with torch.cuda.stream(self._beside):  # without one this is nothing
            return batch.to(self._device)


def stream_beside(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies, where there are streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of what the host holds. A GPU copies it from pinned memory: from other memory the host would have to wait
    until all is done that was asked for before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, copy=True)
