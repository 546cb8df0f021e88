"""Selection: who attracts, who repels, and who is left alone.

Spade removes the false negatives of instance discrimination by place: what shows the same part of the body attracts,
what shows a part far away repels, and the band between does neither. Everything is a boolean mask over
(query, key); one loss, `contrast.objectives.info_nce`, serves them all.

Reconstructed from the abstract and the framework figure; thresholds are ours (docs/concepts.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spade3d.crops import kernels


@dataclass(frozen=True)
class Selection:
    """Which rules of place are in force: what carries Spade's claim, and what it must be held against.

    positives  the overlapping partner and the counterparts in other scans attract, too; else only the crop (or the
               place) itself, seen twice
    negatives  only what lies far away repels; else everything that does not attract
    shuffled   every rule holds, of the places of other crops: those of another anchor of the batch
    """

    positives: bool = True
    negatives: bool = True
    shuffled: bool = False

    @staticmethod
    def named(control: str) -> Selection:
        """`both` is Spade. `restoration` has no contrast, so that its rules do not matter."""
        return {
            "restoration": Selection(positives=False, negatives=False),
            "instance": Selection(positives=False, negatives=False),
            "positives": Selection(negatives=False),
            "negatives": Selection(positives=False),
            "both": Selection(),
            "shuffled": Selection(shuffled=True),
        }[control]


BODY = 0  # the space of every scan that the body frame could place


@dataclass(frozen=True, eq=False)
class Places:
    """Points (n, 3) or boxes (n, 6: lowest, highest corner) in mm, each within a space of its own kind.

    Space 0 is the body frame, common to all placed scans. A scan that could not be placed has a space of its own
    (its case + 1) and is compared with itself only.

    Kept as the kernels want them, whatever they are made of: each coordinate of all places together in memory, as
    float32. A metre from the origin that is exact to 0.0001 mm; the overlap of boxes is exact to 0.000001.
    """

    mm: np.ndarray  # float32 (n, 3 or 6), in Fortran order
    space: np.ndarray  # int32 (n,)

    def __len__(self) -> int:
        return len(self.mm)

    def __post_init__(self):
        if self.mm.ndim != 2 or self.mm.shape[1] not in (3, 6) or self.space.shape != self.mm.shape[:1]:
            raise ValueError(f"places {self.mm.shape} in spaces {self.space.shape}; (n, 3 or 6) and (n,) needed")
        object.__setattr__(self, "mm", np.asfortranarray(self.mm, dtype=np.float32))
        object.__setattr__(self, "space", np.ascontiguousarray(self.space, dtype=np.int32))

    @property
    def centres(self) -> Places:
        return self if self.mm.shape[1] == 3 else Places((self.mm[:, :3] + self.mm[:, 3:]) / 2, self.space)

    def rolled(self, by: int) -> Places:
        """The same places, each moved on by some positions."""
        return Places(np.roll(self.mm, by, axis=0), np.roll(self.space, by))

    @staticmethod
    def joined(parts: list[Places]) -> Places:
        return Places(np.concatenate([part.mm for part in parts]), np.concatenate([part.space for part in parts]))


def alike(queries: Places, keys: Places, iou: float) -> np.ndarray:
    """Global positives: bool (query, key), boxes that overlap by at least `iou` (intersection over union)."""
    out = np.empty((len(queries), len(keys)), dtype=np.bool_)
    kernels.boxes_alike(queries.mm.T, queries.space, keys.mm.T, keys.space, iou, out)
    return out


def apart(queries: Places, keys: Places, far_mm: float) -> np.ndarray:
    """Negatives of both scopes: bool (query, key), centres more than `far_mm` apart."""
    queries, keys = queries.centres, keys.centres
    out = np.empty((len(queries), len(keys)), dtype=np.bool_)
    kernels.places_apart(queries.mm.T, queries.space, keys.mm.T, keys.space, far_mm, out)
    return out
