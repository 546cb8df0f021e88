"""A crop: a box of a patient, turned and coloured as chance decided, and the exact cut of it.

`draw_*` are the only places of this room where chance is used; what they return is a frozen record. `cut` obeys the
record to the last digit, so a crop can be tested, replayed and drawn on a screen.

    crop voxel (i, j, k)  --to_mm-->  millimetres of the scan  --/ spacing-->  stored voxel

Millimetres of the scan run along the axes of the stored array from the centre of its first voxel, so that a crop of an
oblique scan (a short-axis heart) is cut along its own slices; `scan_to_world` carries them to RAS+ patient space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from spade3d.crops import kernels

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Intensity:
    """How a view is coloured: x -> clip(contrast * blur(x)^gamma + brightness + noise) for x in the scan's [low, high].

    gamma acts on x as a share of [low, high], which is x itself for CT and percentiles ([0, 1]).
    """

    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    blur: float = 0.0  # standard deviation of a Gaussian, in voxels of the crop
    noise: float = 0.0  # standard deviation
    noise_seed: int = 0


PLAIN = Intensity()
NOTHING = np.empty((0, 0, 0), dtype=np.int16)


@dataclass(frozen=True, eq=False)
class Crop:
    """Where one crop lies and how it looks. `to_mm` takes crop voxels (centres at integers) to scan millimetres."""

    case: int
    shape: tuple[int, int, int]
    to_mm: np.ndarray
    intensity: Intensity = PLAIN

    def plain(self) -> Crop:
        """The same place without intensity change: what restoration has to find again."""
        return replace(self, intensity=PLAIN)


@dataclass(frozen=True)
class Box:
    """An axis-parallel box of a scan, in millimetres."""

    centre: Triple
    size: Triple

    @property
    def corners(self) -> np.ndarray:
        """(6,): the lowest corner, then the highest."""
        centre, half = np.asarray(self.centre), np.asarray(self.size) / 2
        return np.concatenate([centre - half, centre + half])


@dataclass(frozen=True)
class Views:
    """What chance may do to a view: the spatial transform T_s, then the intensity transform T_i, of Spade's figure."""

    flip: tuple[bool, bool, bool] = (True, True, True)
    rotation_deg: float = 15.0
    zoom: tuple[float, float] = (0.8, 1.25)
    gamma: tuple[float, float] = (0.7, 1.5)
    contrast: tuple[float, float] = (0.8, 1.2)
    brightness: float = 0.1
    blur: tuple[float, float] = (0.0, 1.0)
    blur_chance: float = 0.3
    noise: float = 0.05


def draw_box(rng: np.random.Generator, size: Triple, bounds: np.ndarray) -> Box:
    """A box of `size` mm, inside `bounds` ((2, 3) mm) on each axis that can hold it and centred there on the others."""
    size_mm = np.asarray(size, dtype=float)
    room = np.maximum(bounds[1] - bounds[0] - size_mm, 0.0)
    centre = (bounds[0] + bounds[1]) / 2 + (rng.random(3) - 0.5) * room
    return Box(tuple(centre), tuple(size_mm))


def draw_partner(rng: np.random.Generator, box: Box, bounds: np.ndarray, overlap: tuple[float, float]) -> Box:
    """A box of the same size that shares a part of `box`: a share of its volume drawn from `overlap`.

    The share v is spread over the axes as v^w with w uniform on the simplex, so that no axis is preferred and nothing
    is rejected. A partner that would leave `bounds` is moved back, which only enlarges the share.
    """
    share = rng.uniform(*overlap) ** rng.dirichlet((1.0, 1.0, 1.0))
    size = np.asarray(box.size)
    centre = np.asarray(box.centre) + rng.choice((-1.0, 1.0), 3) * (1 - share) * size
    return Box(tuple(keep_inside(centre, size, bounds)), box.size)


def keep_inside(centre: np.ndarray, size: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The nearest centre whose box lies in `bounds`; on an axis too short for the box, the middle of the bounds."""
    low, high = bounds[0] + size / 2, bounds[1] - size / 2
    return np.where(low <= high, np.clip(centre, low, high), bounds.mean(axis=0))


def draw_view(rng: np.random.Generator, case: int, box: Box, shape: tuple[int, int, int], views: Views) -> Crop:
    """One view of a box: turned, flipped and zoomed about its centre, then coloured."""
    turn = rotation(np.radians(rng.uniform(-views.rotation_deg, views.rotation_deg, 3)))
    signs = np.where(rng.random(3) < 0.5 * np.asarray(views.flip), -1.0, 1.0)
    zoom = math.exp(rng.uniform(*np.log(views.zoom)))
    return Crop(case, shape, box_to_mm(box, shape, turn * (signs / zoom)), draw_intensity(rng, views))


def draw_intensity(rng: np.random.Generator, views: Views) -> Intensity:
    blur, wants_blur = rng.uniform(*views.blur), rng.random() < views.blur_chance
    return Intensity(
        gamma=math.exp(rng.uniform(*np.log(views.gamma))),
        contrast=rng.uniform(*views.contrast),
        brightness=rng.uniform(-views.brightness, views.brightness),
        blur=blur if wants_blur else 0.0,
        noise=rng.uniform(0.0, views.noise),
        noise_seed=int(rng.integers(2**63)),
    )


def box_to_mm(box: Box, shape: tuple[int, int, int], linear: np.ndarray | None = None) -> np.ndarray:
    """The affine that spreads `shape` voxels over a box: voxel centres lie half a voxel inside its faces.

    `linear` (3, 3) acts in millimetres about the centre of the box, so that angles stay angles when voxels are not
    cubes.
    """
    to_mm = np.eye(4)
    to_mm[:3, :3] = (np.eye(3) if linear is None else linear) @ np.diag(np.asarray(box.size) / shape)
    to_mm[:3, 3] = np.asarray(box.centre) - to_mm[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return to_mm


def region(crop: Crop) -> Box:
    """The axis-parallel box of the same centre and extents as a crop that may be turned."""
    shape = np.asarray(crop.shape)
    centre = crop.to_mm[:3, :3] @ ((shape - 1) / 2) + crop.to_mm[:3, 3]
    return Box(tuple(centre), tuple(np.linalg.norm(crop.to_mm[:3, :3] * shape, axis=1)))


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) about the three axes, R = Rz Ry Rx, angles in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def cut(store, crop: Crop) -> np.ndarray:
    """The voxels of a crop, float32 (i, j, k), normalised as the store says; outside the scan lies its lowest value.

    One pass from the stored integers: trilinear interpolation, normalisation and intensity together; only a blur
    needs passes of its own. Only the part of the scan that the crop touches is read and decompressed.
    """
    case = store.cases[crop.case]
    start, stop = touched(mm_to_stored(case) @ crop.to_mm, crop.shape, case.shape)
    voxels = NOTHING if start is None else as_the_kernels_read(store.image(crop.case, (start, stop)))
    return cut_from(voxels, start or (0, 0, 0), case, crop)


def cut_together(store, crops: list[Crop]) -> list[np.ndarray]:
    """`cut` of each of some crops of one scan, to the last digit.

    What they touch together is read and decompressed once, where that is less than what they touch one by one: two
    views of 96^3 of one box take 0.86 of the time (benchmarks/speed/views.py).
    """
    case = store.cases[crops[0].case]
    boxes = [touched(mm_to_stored(case) @ crop.to_mm, crop.shape, case.shape) for crop in crops]
    if all(start is not None for start, _ in boxes):
        starts, stops = np.swapaxes(boxes, 0, 1)
        start, stop = starts.min(axis=0), stops.max(axis=0)
        if (stop - start).prod() < (stops - starts).prod(axis=1).sum():
            first = tuple(start.tolist())
            voxels = as_the_kernels_read(store.image(crops[0].case, (first, tuple(stop.tolist()))))
            return [cut_from(voxels, first, case, crop) for crop in crops]
    return [cut(store, crop) for crop in crops]


def as_the_kernels_read(voxels: np.ndarray) -> np.ndarray:
    """Stored voxels as int16 of this machine, k fastest; no copy where they are so already."""
    return np.ascontiguousarray(voxels, dtype=np.int16)


def cut_from(voxels: np.ndarray, first: tuple[int, int, int], case, crop: Crop) -> np.ndarray:
    """`cut` from voxels that are already there, to the last digit: int16 (i, j, k), C order, whose first one is that
    voxel of the stored scan, and which hold all that the crop touches."""
    look, norm = crop.intensity, case.normalisation
    colours = _colours(PLAIN if look.blur > 0 else look)
    to_stored = mm_to_stored(case) @ crop.to_mm
    start, stop = touched(to_stored, crop.shape, case.shape)
    box = np.zeros((2, 3), np.int64)
    if start is not None:
        to_stored[:3, 3] -= start
        box = np.array([start, stop]) - first
    out = np.empty(crop.shape, dtype=np.float32)
    scaling = np.array([norm.offset, norm.scale, norm.low, norm.high], dtype=np.float32)
    kernels.resample(voxels, box, to_stored, scaling, colours, look.noise_seed, out)
    return _colour(out, look, norm) if look.blur > 0 else out


def coloured(clean: np.ndarray, look: Intensity, normalisation) -> np.ndarray:
    """The intensity change alone: `cut(crop) == coloured(cut(crop.plain()), crop.intensity)`, to rounding."""
    return _colour(np.array(clean, np.float32, order="C"), look, normalisation)


def _colour(out: np.ndarray, look: Intensity, normalisation) -> np.ndarray:
    """Change `out`, which is C-contiguous, in place."""
    if look.blur > 0:
        kernels.blur(out, look.blur)
    low, high = np.float32(normalisation.low), np.float32(normalisation.high)
    kernels.recolour(out.reshape(-1), _colours(look), look.noise_seed, 0, low, high)
    return out


def _colours(look: Intensity) -> np.ndarray:
    return np.array([look.gamma, look.contrast, look.brightness, look.noise], dtype=np.float32)


def cut_labels(store, crop: Crop) -> np.ndarray:
    """The labels of a crop by nearest neighbour, uint16 (i, j, k), as the file's own values; 0 outside the scan."""
    case = store.cases[crop.case]
    to_stored = mm_to_stored(case) @ crop.to_mm
    start, stop = touched(to_stored, crop.shape, case.shape)
    out = np.zeros(crop.shape, dtype=np.uint16)
    if start is not None:
        to_stored[:3, 3] -= start
        labels = store.labels(crop.case, (start, stop))
        kernels.resample_labels(labels.astype(np.uint16, copy=False), to_stored, out)
    return out


def mm_to_stored(case) -> np.ndarray:
    """(4, 4): millimetres of a scan to voxels of its stored array."""
    return np.diag([*(1 / np.linalg.norm(case.affine[:3, :3], axis=0)), 1.0])


def scan_to_world(case) -> np.ndarray:
    """(4, 4): millimetres of a scan to RAS+ millimetres of the patient."""
    return case.affine @ mm_to_stored(case)


def scan_bounds(case) -> np.ndarray:
    """The faces of a scan, (2, 3) in its millimetres: half a voxel beyond its outermost voxel centres."""
    spacing = np.linalg.norm(case.affine[:3, :3], axis=0)
    return np.stack([-0.5 * spacing, (np.asarray(case.shape) - 0.5) * spacing])


def body_bounds(case) -> np.ndarray:
    """The body's box within its scan, (2, 3) in millimetres of the scan, never beyond the scan's faces."""
    (low, high), from_world = case.body_box_mm, np.linalg.inv(scan_to_world(case))
    corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
    body = corners @ from_world[:3, :3].T + from_world[:3, 3]
    return np.clip([body.min(axis=0), body.max(axis=0)], *scan_bounds(case))


def touched(to_stored: np.ndarray, shape, stored_shape):
    """The box of stored voxels that a crop reads, (start, stop); (None, None) when it lies wholly outside."""
    start, stop = [], []
    for (*steps, first), size in zip(to_stored[:3].tolist(), stored_shape, strict=True):
        reach = [step * (count - 1) for step, count in zip(steps, shape, strict=True)]
        low, high = first + sum(min(r, 0.0) for r in reach), first + sum(max(r, 0.0) for r in reach)
        start.append(min(max(math.floor(low), 0), size))
        stop.append(min(max(math.floor(high) + 2, 0), size))
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        return None, None
    return tuple(start), tuple(stop)
