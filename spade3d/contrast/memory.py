"""A memory: the latest vectors of the teacher, each with the place of the body it came from."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade3d.crops.selection import Places
from spade3d.training import ranks


class Memory(nn.Module):
    """A ring of `size` unit vectors. Vectors live on the device, places (for the selection kernels) in main memory.

    Both travel in the state dict, so that a resumed run selects the very same negatives.
    """

    def __init__(self, size: int, dim: int, place_width: int):
        super().__init__()
        self.register_buffer("ring", torch.zeros(size, dim))
        self._mm = np.zeros((size, place_width), dtype=np.float32, order="F")  # as `Places` keeps them
        self._space = np.full(size, -1, dtype=np.int32)
        self._next = 0
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @property
    def vectors(self) -> Tensor:
        """(len, dim), on the unit sphere, in no particular order."""
        return self.ring[: self._filled]

    @property
    def places(self) -> Places:
        return Places(self._mm[: self._filled], self._space[: self._filled])

    @torch.no_grad()
    def remember(self, vectors: Tensor, places: Places) -> None:
        """Add vectors (n, dim) with their places; the oldest give way. Of more than `size`, the last are kept."""
        size = len(self.ring)
        vectors, mm, space = vectors[-size:], places.mm[-size:], places.space[-size:]
        # Their slots are one run, which goes on at the start of the ring where it meets the end.
        before_end = min(len(vectors), size - self._next)
        for ring, new in ((self.ring, F.normalize(vectors.float(), dim=-1)), (self._mm, mm), (self._space, space)):
            ring[self._next : self._next + before_end] = new[:before_end]
            ring[: len(vectors) - before_end] = new[before_end:]
        self._next = int((self._next + len(vectors)) % size)
        self._filled = min(self._filled + len(vectors), size)

    def get_extra_state(self) -> dict:
        return {
            "mm": torch.from_numpy(self._mm.copy()),
            "space": torch.from_numpy(self._space.copy()),
            "next": self._next,
            "filled": self._filled,
        }

    def set_extra_state(self, state: dict) -> None:
        self._mm = np.array(state["mm"].numpy(), dtype=np.float32, order="F")
        self._space = np.array(state["space"].numpy(), dtype=np.int32)
        self._next, self._filled = int(state["next"]), int(state["filled"])


def places_of_all(places: Places) -> Places:
    """The places of all ranks, in the order of `ranks.gathered`."""
    mm, space = (ranks.gathered(torch.from_numpy(np.ascontiguousarray(part))) for part in (places.mm, places.space))
    return Places(mm.numpy(), space.numpy())
