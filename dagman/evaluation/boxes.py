"""Boxes of lesions: a heat map made into boxes, and how well two boxes agree.

A voxel reaches half an index to each side of its centre, so a box of one voxel has that voxel's size. Boxes in mm have
their sides along R, A, S; what lies on an oblique grid is enclosed by one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import ndimage

from spade3d.faults import UsageFault
from spade3d.volumes.body_box import field_of_view
from spade3d.volumes.geometry import apply_affine

KEEP = ("largest", "mass")

BoxMm = Float[np.ndarray, "2 3"]  # low corner, high corner, RAS mm


@dataclass(frozen=True)
class Box:
    """Voxels `start` to `stop` (not in it) along i, j, k, and the share of what was kept of the map that is in it."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    mass: float

    def in_mm(self, affine: Float[np.ndarray, "4 4"]) -> BoxMm:
        """From edge to edge of its voxels."""
        return _enclosing(np.array(self.start), np.array(self.stop), affine)


def boxes_of(
    heat: Shaped[np.ndarray, "i j k"], threshold: float, *, keep: str = "largest", mass: float = 0.2
) -> list[Box]:
    """The boxes around what is at least `threshold` (0 to 1) of the map's maximum, of most mass first.

    Voxels above it that touch, at a corner too (26 neighbours), are one component; its mass is the sum of the map over
    it. `keep` "largest": the component of most mass alone; "mass": also the others that hold at least the share `mass`
    of what is above the threshold. Nothing where the map is 0 everywhere. UsageFault: see `check_heat`.
    """
    check_heat(heat)
    if not 0 < threshold <= 1 or keep not in KEEP:
        raise UsageFault(f"threshold {threshold:g}, keep {keep!r}; needed are above 0 to 1, and {' or '.join(KEEP)}")
    highest = heat.max(initial=0)
    if highest <= 0:
        return []
    above = heat >= threshold * highest
    (part,) = ndimage.find_objects(above.astype(np.int8))  # a high threshold leaves little of a large volume
    components, count = ndimage.label(above[part], np.ones((3, 3, 3)))
    masses = np.bincount(components.ravel(), heat[part].ravel(), count + 1)[1:]
    shares = masses / masses.sum()
    order = np.argsort(-shares, kind="stable")
    kept = order[:1] if keep == "largest" else [n for n in order if shares[n] >= mass or n == order[0]]
    found, first = ndimage.find_objects(components), [side.start for side in part]

    def corner(n: np.integer | int, end: str) -> tuple[int, int, int]:
        i, j, k = (getattr(side, end) + start for side, start in zip(found[n], first, strict=True))
        return i, j, k

    return [Box(corner(n, "start"), corner(n, "stop"), float(shares[n])) for n in kept]


def check_heat(heat: Shaped[np.ndarray, "i j k"]) -> None:
    """UsageFault for a map with NaN, Inf or values below 0: it has no maximum of which a threshold is a share."""
    if not np.isfinite(heat).all() or heat.min(initial=0) < 0:
        raise UsageFault("a heat map holds NaN, Inf or values below 0; evidence of 0 and more is needed")


def around(mask: Bool[np.ndarray, "i j k"], affine: Float[np.ndarray, "4 4"]) -> BoxMm:
    """The box around all voxels of a mask. UsageFault for an empty one."""
    if not mask.any():
        raise UsageFault("an empty mask has no box; leave the finding out")
    places = np.argwhere(mask)
    return _enclosing(places.min(axis=0), places.max(axis=0) + 1, affine)


def inside(box: BoxMm, shape: tuple[int, int, int], affine: Float[np.ndarray, "4 4"]) -> Bool[np.ndarray, "i j k"]:
    """The voxels of a grid whose centres lie in a box, its faces included."""
    corners = apply_affine(np.linalg.inv(affine), np.stack(np.meshgrid(*box.T), axis=-1)).reshape(8, 3)
    low = np.clip(np.floor(corners.min(axis=0)), 0, shape).astype(int)  # no centre of it lies out of these
    high = np.clip(np.ceil(corners.max(axis=0)) + 1, low, shape).astype(int)
    part = tuple(slice(start, stop) for start, stop in zip(low, high, strict=True))
    centres = apply_affine(affine, np.stack(np.mgrid[part], axis=-1))
    found = np.zeros(shape, dtype=bool)
    found[part] = ((centres >= box[0] - 1e-6) & (centres <= box[1] + 1e-6)).all(axis=-1)
    return found


def overlap(one: BoxMm, other: BoxMm) -> float:
    """The volume in mm^3 that two boxes share."""
    return float(np.prod(np.clip(np.minimum(one[1], other[1]) - np.maximum(one[0], other[0]), 0, None)))


def iou(one: BoxMm, other: BoxMm) -> float:
    """Intersection over union; 0 for boxes that only touch."""
    shared = overlap(one, other)
    union = volume(one) + volume(other) - shared
    return shared / union if union > 0 else 0.0


def iobb(truth: BoxMm, predicted: BoxMm) -> float:
    """Intersection over the *predicted* box (Wang et al. 2017, ChestX-ray8): how much of what is shown is right. A box
    that is too small loses nothing by it."""
    whole = volume(predicted)
    return overlap(truth, predicted) / whole if whole > 0 else 0.0


def volume(box: BoxMm) -> float:
    """In mm^3."""
    return float(np.prod(box[1] - box[0]))


def diameter_mm(box: BoxMm) -> float:
    """The geometric mean of its sides: the diameter of the sphere as large as the ellipsoid that just fits in."""
    return volume(box) ** (1 / 3)


def _enclosing(start: np.ndarray, stop: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Of the voxels from `start` to `stop` (not in it), to their outer faces."""
    moved = affine.astype(np.float64)
    moved[:3, 3] = apply_affine(affine, start)
    return np.array(field_of_view((stop - start).tolist(), moved))
