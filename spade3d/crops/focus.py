"""Focus: views of a parent sub-volume that spare what matters (FocusContrast; Wang et al., arXiv 2305.08826).

A focused view is an ordinary view of its parent (turned, flipped, zoomed about its centre, coloured) that is then moved
to a place drawn uniformly from those where it keeps enough saliency, and grown where there is no such place. Nothing is
rejected, so the zoom that chance drew is the zoom of the view, short of the growth that the rule asks for.

Saliency is counted on stored voxels: a view holds those whose centres lie in it, however it is turned. So retention is
a ratio of integers, exact after every geometric change. Crop, cutout and mask with their thresholds are the paper's (as
its workshop form prints them, PMLR 226:266-279); parents, modes and the construction are ours. The authors' code
redraws up to 200 times and then takes a view that breaks the rule.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from spade3d.crops import kernels
from spade3d.crops.crop import (
    Box,
    Crop,
    Triple,
    Views,
    as_the_kernels_read,
    body_bounds,
    draw_box,
    draw_view,
    keep_inside,
    mm_to_stored,
    touched,
)
from spade3d.crops.focus_kernels import Part, parts_of
from spade3d.crops.focus_rule import Focus
from spade3d.crops.salient import Saliency

VoxelBox = tuple[tuple[int, int, int], tuple[int, int, int]]  # start and stop, along i, j, k


@dataclass(frozen=True, eq=False)
class FocusedView:
    """One view as chance decided it: `hide(cut(store, view.crop), view, saliency)` obeys, logs read what was realised.

    Retention is that of the part that lost most among those the view touches (in modes mass and area there is one
    part), 0 where it touches none, and None where there is nothing salient to keep.
    """

    crop: Crop
    cutout: VoxelBox | None  # in voxels of the view
    mask: bool
    asked_zoom: float  # of the parent, as drawn
    zoom: float  # as realised: less where the view had to grow
    retention: float | None  # kept by the view, of the parent's saliency
    cutout_retention: float | None  # left by the cutout, of the view's saliency


def draw_parent(rng: np.random.Generator, saliency: Saliency, case: int, size_mm: Triple) -> Box:
    """The sub-volume that both views of a pair come from, for crops of `size_mm`; inside the body where it fits."""
    focus, bounds = saliency.focus, body_bounds(saliency.store.cases[case])
    size = tuple(focus.parent * mm for mm in size_mm)
    wanted = rng.random() < focus.salient_chance and focus.control != "random"
    place = saliency.draw_place(rng, case) if wanted else None
    if place is None:
        return draw_box(rng, size, bounds)
    return Box(tuple(keep_inside(place, np.asarray(size), bounds)), size)


def draw_ordinary_box(rng: np.random.Generator, saliency: Saliency, case: int, parent: Box) -> Box | None:
    """Where nothing in a parent is salient there is nothing to spare: a crop's box anywhere in it, for ordinary views.

    None where something is, and for the control that knows no saliency.
    """
    if saliency.focus.control == "random" or _voxels_of_parent(saliency, parent, case)[0].any():
        return None
    return draw_box(rng, tuple(mm / saliency.focus.parent for mm in parent.size), parent.corners.reshape(2, 3))


def draw_focused_pair(
    rng: np.random.Generator, saliency: Saliency, case: int, parent: Box, shape: tuple[int, int, int], views: Views
) -> tuple[FocusedView, FocusedView]:
    """Two views of one parent, each drawn anew; at most one of them is masked, lest the two share its outline."""
    masked = int(rng.integers(2)) if rng.random() < saliency.focus.mask_chance else None
    masks = [masked == n for n in range(2)]
    first, second = (draw_focused(rng, saliency, case, parent, shape, views, mask=mask) for mask in masks)
    return first, second


def draw_focused(
    rng: np.random.Generator,
    saliency: Saliency,
    case: int,
    parent: Box,
    shape: tuple[int, int, int],
    views: Views,
    *,
    mask: bool = False,
) -> FocusedView:
    """One view (voxels of `shape`) of a parent; `views` says all that chance may do but its zoom, which focus says.

    Of a parent without saliency views are ordinary (`draw_ordinary_box`); asked all the same, it hides nothing.
    """
    focus = saliency.focus
    whole = draw_view(rng, case, parent, shape, replace(views, zoom=focus.zoom))
    asked = parent.size[0] / (shape[0] * float(np.linalg.norm(whole.to_mm[:3, 0])))
    wants_crop, wants_cutout = rng.random(2) < (focus.crop_chance, focus.cutout_chance)
    parts = _parts_of_parent(saliency, parent, whole)
    crop, zoom, retention = _moved(rng, focus, whole, parts, asked, focus.crop_retention if wants_crop else 0.0)
    wants_cutout = wants_cutout and (bool(parts) or focus.control == "random")
    cutout, left = _draw_cutout(rng, saliency, crop) if wants_cutout else (None, None)
    shown = mask and focus.knows_saliency and bool(retention)
    return FocusedView(crop, cutout, shown, asked, zoom, retention, left)


def _parts_of_parent(saliency: Saliency, parent: Box, view: Crop) -> list[Part]:
    """The salient parts of a parent on the cells of a view, which divide each of its sides; cell 0 is its first."""
    case, scale = saliency.store.cases[view.case], saliency.focus.cells / np.asarray(view.shape)
    values, start = _voxels_of_parent(saliency, parent, view.case)
    to_cell = _affine(scale, scale / 2) @ np.linalg.inv(mm_to_stored(case) @ view.to_mm) @ _affine(np.ones(3), start)
    return parts_of(values, to_cell, saliency.focus.mode)


def _voxels_of_parent(saliency: Saliency, parent: Box, case: int) -> tuple[np.ndarray, np.ndarray]:
    """The saliency of the stored voxels whose centres lie in a parent, and the first of them, (3,)."""
    stored = saliency.store.cases[case]
    low, high = (parent.corners.reshape(2, 3) / stored.spacing).clip(0, stored.shape)
    start, stop = np.ceil(low).astype(int), np.ceil(high).astype(int)
    if (start >= stop).any():
        return np.zeros((0, 0, 0), dtype=np.uint8), start
    return saliency.voxels(case, start, stop), start


def _moved(
    rng: np.random.Generator, focus: Focus, view: Crop, parts: list[Part], zoom: float, tau: float
) -> tuple[Crop, float, float | None]:
    """A view of a parent at a place that keeps `tau` of every part it touches, and of one at least.

    Places are whole cells apart. The view stays within the parent as turned by the view, while it is the smaller of
    the two; once grown beyond it, the parent stays within the view. Grown far enough the view holds all, so that a
    place is always found; and with fewer cells no place would have done.
    """
    for size in itertools.count(focus.cells):
        reach, grown = max(abs(focus.cells * zoom - size), 1.0) / 2, size - focus.cells
        first = math.ceil(-reach - grown / 2 - 1e-9)
        count = math.floor(reach - grown / 2 + 1e-9) - first + 1
        kept = [part.inside(np.full(3, first), np.full(3, size), np.full(3, count)) for part in parts]
        held = [k >= tau * part.total for k, part in zip(kept, parts, strict=True)]
        feasible = np.ones((count,) * 3, dtype=bool)
        if parts and focus.control != "random" and tau > 0:
            untouched = [k == 0 for k in kept]
            feasible = np.all(np.logical_or(held, untouched), axis=0) & np.any(held, axis=0)
        if feasible.any():
            break
    if not focus.knows_saliency:
        feasible[:] = True
    place = rng.choice(np.flatnonzero(feasible))
    shares = [k.flat[place] / part.total for k, part in zip(kept, parts, strict=True) if k.flat[place] > 0]
    retention = float(min(shares, default=0.0)) if parts else None
    corner, ratio = first + np.array(np.unravel_index(place, feasible.shape)), size / focus.cells
    move = _affine(np.full(3, ratio), corner * np.asarray(view.shape) / focus.cells + (ratio - 1) / 2)
    return replace(view, to_mm=view.to_mm @ move), zoom / ratio, retention


def _draw_cutout(rng: np.random.Generator, saliency: Saliency, crop: Crop) -> tuple[VoxelBox | None, float | None]:
    """A box of a view's voxels that leaves enough of every part it shows, and how much it leaves.

    Where no place is feasible, all sides shrink; no box where not even a single voxel can be spared.
    """
    focus, shape = saliency.focus, np.asarray(crop.shape)
    asked = np.maximum(np.rint(rng.uniform(*focus.cutout_side, 3) * shape), 1)
    parts = _parts_of_view(saliency, crop)
    for longest in range(int(asked.max()), 0, -1):
        size = np.ceil(asked * longest / asked.max()).astype(np.int64)
        hidden = [part.inside(np.zeros(3, np.int64), size, shape - size + 1) for part in parts]
        feasible = np.ones(shape - size + 1, dtype=bool)
        if focus.control != "random":
            for h, part in zip(hidden, parts, strict=True):
                feasible &= part.total - h >= focus.cutout_retention * part.total
        if feasible.any():
            break
    else:
        return None, None
    if not focus.knows_saliency:
        feasible[:] = True
    place = rng.choice(np.flatnonzero(feasible))
    start = np.array(np.unravel_index(place, feasible.shape))
    left = [1 - h.flat[place] / part.total for h, part in zip(hidden, parts, strict=True)]
    cutout = tuple(start.tolist()), tuple((start + size).tolist())
    return cutout, float(min(left)) if left else None


def _parts_of_view(saliency: Saliency, crop: Crop) -> list[Part]:
    """The salient parts that a view shows, on its own voxels."""
    values, to_stored = _touched(saliency, crop)
    to_cell = _affine(np.ones(3), np.full(3, 0.5)) @ np.linalg.inv(to_stored)
    return parts_of(values, to_cell, saliency.focus.mode, np.array([(0, 0, 0), crop.shape]))


def _touched(saliency: Saliency, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """The saliency that a crop reads, and the affine (4, 4) from voxels of the crop to its voxels."""
    case = saliency.store.cases[crop.case]
    to_stored = mm_to_stored(case) @ crop.to_mm
    start, stop = touched(to_stored, crop.shape, case.shape)
    if start is None:
        return np.zeros((0, 0, 0), dtype=np.uint8), to_stored
    to_stored[:3, 3] -= start
    return saliency.voxels(crop.case, start, stop), to_stored


def hide(voxels: np.ndarray, view: FocusedView, saliency: Saliency) -> np.ndarray:
    """Hide what the mask and the cutout of a view hide in its voxels, float32 (i, j, k), in place.

    The mask takes a voxel towards the scan's lowest value, x -> low + (x - low) m; the cutout shows nothing else.
    """
    low = np.float32(saliency.store.cases[view.crop.case].normalisation.low)
    if view.mask:
        voxels -= low
        voxels *= soft_mask(saliency, view.crop)
        voxels += low
    if view.cutout is not None:
        voxels[tuple(map(slice, *view.cutout))] = low
    return voxels


def soft_mask(saliency: Saliency, crop: Crop) -> np.ndarray:
    """m in [floor, 1], float32 (i, j, k): the most salient share of a crop, blurred, over its highest, plus the floor.

    The paper thresholds so that about 80 % are masked, the authors' code blurs the map and adds a floor of 0.1: both.
    """
    focus, shown = saliency.focus, np.empty(crop.shape, dtype=np.float32)
    values, to_stored = _touched(saliency, crop)
    scaling, unchanged = np.array([0, 1, 0, 255], np.float32), np.array([1, 1, 0, 0], np.float32)
    whole = np.array([(0, 0, 0), values.shape])
    kernels.resample(as_the_kernels_read(values), whole, to_stored, scaling, unchanged, 0, shown)
    shown[shown < np.quantile(shown, 1 - focus.mask_kept)] = 0
    if focus.mask_blur > 0:
        kernels.blur(shown, focus.mask_blur * sum(crop.shape) / 3)
    highest = shown.max()
    if highest == 0:  # salient only between the voxels of the crop
        return np.ones_like(shown)
    return np.minimum(shown / highest + np.float32(focus.mask_floor), np.float32(1))


def _affine(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(4, 4): x -> scale x + shift, axis by axis."""
    affine = np.diag([*scale, 1.0])
    affine[:3, 3] = shift
    return affine
