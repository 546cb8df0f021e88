"""Where a scan is salient, as the store or a control of focus has it, read block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spade3d.crops.crop import body_bounds
from spade3d.crops.focus_rule import Focus
from spade3d.faults import UsageFault

BLOCK = 32  # voxels along the side of the blocks in which a salient place is looked up


class Saliency:
    """The saliency of some cases of a store, 0..255 on the stored grid, as `focus.control` wants it.

    In a scan without a saliency nothing is salient: its views are ordinary.
    """

    def __init__(self, store, cases: Sequence[int], focus: Focus):
        self.store, self.cases, self.focus = store, list(cases), focus
        self._overviews: dict[int, tuple[np.uint8, np.ndarray]] = {}
        self._others: dict[int, int] = {}

    def voxels(self, case: int, start, stop) -> np.ndarray:
        """uint8 (i, j, k) of a box of stored voxels; 0 for what lies below the least share of the scan's highest."""
        values = self._read(case, start, stop)
        return values * (values >= self._overview(case)[0])

    def draw_place(self, rng: np.random.Generator, case: int) -> np.ndarray | None:
        """A place drawn in proportion to saliency, (3,) in scan mm; None where nothing is salient.

        Anywhere in its voxel: were it the centre, that would lie on a face between cells in every view of the parent.
        """
        shape, until = self.store.cases[case].shape, self._overview(case)[1]
        if until[-1] == 0:
            return None
        rest = int(rng.integers(until[-1]))
        block = int(np.searchsorted(until, rest, side="right"))
        start = BLOCK * np.array(np.unravel_index(block, [-(-n // BLOCK) for n in shape]))
        values = self.voxels(case, start, np.minimum(start + BLOCK, shape))
        within = np.cumsum(values, dtype=np.int64)
        voxel = np.searchsorted(within, rest - (until[block] - within[-1]), side="right")
        return (start + np.unravel_index(voxel, values.shape) + rng.random(3) - 0.5) * self.store.cases[case].spacing

    def source(self, case: int) -> str:
        """Where the saliency of a case comes from: one of SOURCES (volumes/channels.py), or "centre"."""
        if self.focus.control == "centre":
            return "centre"
        other = self._other_patient(case) if self.focus.control == "shuffled" else case
        return self.store.cases[other].saliency_source

    def sources(self) -> list[str]:
        """Every `source` of the cases that have one."""
        if self.focus.control == "centre":
            return ["centre"]
        return sorted({self.store.cases[i].saliency_source for i in self.cases if self.store.cases[i].saliency})

    def _overview(self, case: int) -> tuple[np.uint8, np.ndarray]:
        """The lowest value that counts, and the saliency of all blocks up to each one; a scan is read whole, once."""
        if case not in self._overviews:
            shape = self.store.cases[case].shape
            whole = self._read(case, (0, 0, 0), shape)
            lowest = np.uint8(math.ceil(self.focus.least * float(whole.max())))
            sums = whole * (whole >= lowest)
            for axis, n in enumerate(shape):
                sums = np.add.reduceat(sums, np.arange(0, n, BLOCK), axis=axis, dtype=np.int64)
            self._overviews[case] = lowest, np.cumsum(sums)
        return self._overviews[case]

    def _read(self, case: int, start, stop) -> np.ndarray:
        stored = self.store.cases[case]
        if self.focus.control == "centre":  # a Gaussian, its standard deviation an eighth of the body's sides
            shares = _shares_of_body(stored, start, stop)
            i, j, k = (np.exp(-0.5 * ((share - 0.5) / 0.125) ** 2) for share in shares)
            return (255 * i[:, None, None] * j[:, None] * k).astype(np.uint8)
        if self.focus.control == "shuffled":
            return self._at_shares(self._other_patient(case), _shares_of_body(stored, start, stop))
        if stored.saliency is None:
            return np.zeros(np.subtract(stop, start), dtype=np.uint8)
        return self.store.saliency(case, (tuple(map(int, start)), tuple(map(int, stop))))

    def _at_shares(self, case: int, shares: list[np.ndarray]) -> np.ndarray:
        """The saliency of a scan at these shares of its body's sides, from the nearest voxels; 0 beyond the scan."""
        stored = self.store.cases[case]
        (low, high), last = body_bounds(stored), np.asarray(stored.shape) - 1
        index = [np.rint((a + s * (b - a)) / mm).astype(int) for s, a, b, mm in zip(shares, low, high, stored.spacing)]
        near = [np.clip(i, 0, n) for i, n in zip(index, last)]
        start = tuple(int(i.min()) for i in near)
        values = self.store.saliency(case, (start, tuple(int(i.max()) + 1 for i in near)))
        seen = values[np.ix_(*(n - a for n, a in zip(near, start)))]
        for axis, (i, n) in enumerate(zip(index, near)):
            np.moveaxis(seen, axis, 0)[i != n] = 0
        return seen

    def _other_patient(self, case: int) -> int:
        """The next case that has something salient and is of another patient."""
        if case in self._others:
            return self._others[case]
        at, known = self.cases.index(case), self.store.cases
        for other in self.cases[at:] + self.cases[:at]:
            if known[other].subject != known[case].subject and is_salient(self.store, other):
                self._others[case] = other
                return other
        raise UsageFault(
            f"focus: control 'shuffled' found no saliency of a patient other than {known[case].subject}; it needs two "
            "patients with saliency among the scans that train"
        )


def is_salient(store, case: int) -> bool:
    """Whether a scan has a saliency, and it is not empty."""
    return store.cases[case].saliency is not None and bool(store.saliency(case).any())


def _shares_of_body(case, start, stop) -> list[np.ndarray]:
    """Where voxels lie along each axis of a scan: 0 at the lower face of the body's box, 1 at the upper one."""
    low, high = body_bounds(case)
    along = (np.arange(a, b) * mm for a, b, mm in zip(start, stop, case.spacing, strict=True))
    return [(mm - a) / (b - a) for mm, a, b in zip(along, low, high, strict=True)]
