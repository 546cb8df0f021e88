"""Pairs: the batches of pretraining, each a pure function of (seed, step), so that resuming is starting at a step.

One batch is Spade's sampling (framework figure): an anchor scan gives two overlapping crops, `a` and `b`; every other
scan of the batch gives their counterparts, found through the body frames. Each crop is seen twice, by the student and
by the teacher, under separately drawn spatial and intensity transforms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from spade3d.crops import coloured_batches
from spade3d.crops.bodies import Bodies
from spade3d.crops.coloured_batches import Looks
from spade3d.crops.correspondences import cell_places, match, voxels_at
from spade3d.crops.crop import (
    Box,
    Crop,
    Views,
    coloured,
    cut_together,
    draw_box,
    draw_partner,
    draw_view,
    region,
    scan_bounds,
)
from spade3d.crops.focus import FocusedView, draw_focused_pair, draw_ordinary_box, draw_parent, hide
from spade3d.crops.focus_rule import Focus
from spade3d.crops.salient import Saliency
from spade3d.crops.selection import Places, Selection, alike


@dataclass(frozen=True)
class Sampling:
    """What a batch is made of. Sizes in voxels of the crop, spacing in mm, overlap as a share of the crop's volume."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    anchors: int = 1
    scans: int = 2  # for each anchor, itself included
    overlap: tuple[float, float] = (0.2, 0.8)
    alike_iou: float = 0.5
    grid: tuple[int, int, int] = (8, 8, 8)  # cells on which places of two crops are matched
    places: int = 64  # matched places drawn for each crop
    hidden: float = 0.0  # share of the student's view that is hidden from it
    hidden_grid: tuple[int, int, int] = (4, 4, 4)  # cells, each hidden or shown
    views: Views = Views()
    selection: Selection = Selection()
    focus: Focus | None = None  # views that spare what matters; None: ordinary views
    one_parent: bool = False  # with focus: crops a and b are views of one parent, for methods that call them alike
    one_geometry: bool = False  # the teacher's view of a crop is turned and zoomed as the student's is


@dataclass(frozen=True, eq=False)
class Seen:
    """One view of a box, and the part of the scan that it shows (turning and zooming of ordinary views left out)."""

    crop: Crop
    region: Box
    focused: FocusedView | None = None  # None: an ordinary view


@dataclass(frozen=True, eq=False)
class PairBatch:
    """One step of pretraining. Crops are ordered a, b of an anchor, then a, b of each of its other scans, then the next
    anchor's (n = 2 x scans x anchors). Where ranks share the batch these are a rank's own, n of the whole.

    Pictures and points move to the device; what selects (boxes and places, in body-frame mm) stays in main memory.
    Where a GPU colours them, views have no intensity change before they move (`looks`).
    """

    student: Tensor  # float32 (n, 1, i, j, k)
    teacher: Tensor  # float32 (n, 1, i, j, k): the same crops, coloured otherwise and, but for one_geometry, turned
    clean: Tensor  # float32 (n, 1, i, j, k): the student's view without intensity change
    hidden: Tensor | None  # bool (n, p, q, r): tokens of 2 voxels that the student is not shown; None: it sees all
    alike: Tensor  # bool (n, whole): teacher crop k attracts student crop q
    query_crop: Tensor  # int64 (m,): the student crop that a matched place is read from
    query_voxel: Tensor  # float32 (m, 3): where, in voxels of that view
    key_crop: Tensor  # int64 (m,): the teacher crop that shows the same place: its partner, or the crop itself
    key_voxel: Tensor  # float32 (m, 3)
    boxes: Places  # (n, 6): where each crop lies in the body
    key_boxes: Places  # (whole, 6): where all the teacher's views lie; in the shuffled control those of other anchors
    places: Places  # (m, 3): where the matched places lie in the body
    scans: tuple[str, ...]  # n: the names of the scans
    views: tuple[Crop, ...]  # n: what the student's images show, and how
    priors: Tensor | None  # float32 (n, region, p, q, r): what is known beforehand of the cells of the student's views
    step: int
    realised: dict[str, float]  # what focus came to in the whole batch, for the log; empty for ordinary views
    looks: tuple[Looks, Looks] | None = None  # of the student's and the teacher's views, to be coloured where they go

    def to(self, device: torch.device) -> PairBatch:
        moved = self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        if self.looks is None:
            return moved
        views = zip((moved.student, moved.teacher), self.looks, strict=True)
        student, teacher = (coloured_batches.coloured(clean, looks.to(device)) for clean, looks in views)
        return replace(moved, student=student, teacher=teacher, looks=None)

    def pin_memory(self) -> PairBatch:
        """In memory from which a GPU copies while it computes."""
        looks = None if self.looks is None else tuple(one.pin_memory() for one in self.looks)
        return replace(self._with_tensors(torch.Tensor.pin_memory), looks=looks)

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> PairBatch:
        """Each tensor is moved once: views that are not coloured yet are the clean ones."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {id(value): value for value in values.values() if torch.is_tensor(value)}
        moved = {key: move(tensor) for key, tensor in tensors.items()}
        return PairBatch(**{name: moved.get(id(value), value) for name, value in values.items()})

    def without_places(self) -> PairBatch:
        """The same crops with no matched places."""
        places = ("query_crop", "query_voxel", "key_crop", "key_voxel")
        none = Places(self.places.mm[:0], self.places.space[:0])
        return replace(self, **{name: getattr(self, name)[:0] for name in places}, places=none)

    def __len__(self) -> int:
        """Crops that pass through a network in this step, both branches counted."""
        return len(self.student) + len(self.teacher)


class PairStream:
    """Batches of pairs from a store, without end and without state.

    `frames` holds, for each of the cases, its way into the body frame (`Bodies`); a scan that could not be placed
    learns from its own places only. `prior` says what is known beforehand of a crop, (region, p, q, r).

    `share` is (rank, world): each of so many ranks cuts an equal part of a batch's anchors. All draw the same chance,
    so that the parts together are the batch of one process alone. ValueError where anchors cannot be shared evenly, or
    where places are shuffled among anchors that other ranks cut.
    """

    def __init__(
        self,
        store,
        cases: Sequence[int],
        frames: Mapping[int, np.ndarray | None],
        sampling: Sampling,
        *,
        seed: int = 0,
        prior: Callable[[Crop], np.ndarray] | None = None,
        share: tuple[int, int] = (0, 1),
        colour_later: bool = False,
    ):
        if not cases:
            raise ValueError("no cases to draw from")
        if sampling.anchors % share[1] or (share[1] > 1 and sampling.selection.shuffled):
            raise ValueError(f"{sampling.anchors} anchors cannot be shared by {share[1]} ranks")
        self.share = share
        self.store, self.cases, self.sampling, self.seed = store, list(cases), sampling, seed
        self.bodies, self.prior = Bodies(store, self.cases, frames), prior
        self.saliency = None if sampling.focus is None else Saliency(store, cases, sampling.focus)
        self.colour_later = colour_later and self.saliency is None

    def stream(self, start: int, stop: int) -> Iterator[PairBatch]:
        return (self.batch(step) for step in range(start, stop))

    def batch(self, step: int) -> PairBatch:
        """The batch of a step: chance draws first, then everything is cut, matched and selected exactly."""
        rng = np.random.default_rng([self.seed, step])
        whole = self.draw(rng)
        rank, world = self.share
        own = slice(rank * len(whole) // world, (rank + 1) * len(whole) // world)
        hidden, drawn = self.hidden(rng, len(whole)), whole[own]
        students, teachers = ([pair[side] for pair in drawn] for side in (0, 1))
        return PairBatch(
            **self.pictured(students, teachers),
            hidden=None if hidden is None else hidden[own],
            **self.alike(own, self.places_of(students), self.places_of([its for _, its in whole])),
            scans=tuple(self.store.cases[seen.crop.case].name for seen in students),
            views=tuple(seen.crop for seen in students),
            priors=self.priors_of(students),
            step=step,
            realised=self.realised([seen for side in zip(*whole) for seen in side]),
            **self.matched(step, own, drawn),
        )

    def pictured(self, students: list[Seen], teachers: list[Seen]) -> dict:
        """What both branches see of each crop, and what the student's view shows without intensity change."""
        later = self.colour_later
        crops = [(ours.crop.plain(), its.crop.plain() if later else its.crop) for ours, its in zip(students, teachers)]
        clean, taught = zip(*[cut_together(self.store, list(pair)) for pair in crops])
        if later:
            looks = tuple(self.looks(views) for views in (students, teachers))
            shown = as_images(list(clean))
            return {"student": shown, "teacher": as_images(list(taught)), "clean": shown, "looks": looks}
        return {
            "student": as_images(list(map(self.shown, clean, students))),
            "teacher": as_images(list(map(self.hidden_by_focus, taught, teachers))),
            "clean": as_images(list(clean)),
        }

    def looks(self, views: list[Seen]) -> Looks:
        """How views are to be coloured."""
        crops = [seen.crop for seen in views]
        return Looks.of(
            [crop.intensity for crop in crops], [self.store.cases[crop.case].normalisation for crop in crops]
        )

    def places_of(self, views: list[Seen]) -> Places:
        """Where views lie in the body, (n, 6)."""
        return Places.joined([self.bodies.of_box(seen.crop.case, seen.region) for seen in views])

    def priors_of(self, views: list[Seen]) -> Tensor | None:
        """What is known beforehand of some views, where anything is."""
        if self.prior is None:
            return None
        return torch.from_numpy(np.stack([self.prior(seen.crop) for seen in views]).astype(np.float32, copy=False))

    def shown(self, clean: np.ndarray, seen: Seen) -> np.ndarray:
        """What the student sees of a view that was cut without intensity change."""
        norm = self.store.cases[seen.crop.case].normalisation
        return self.hidden_by_focus(coloured(clean, seen.crop.intensity, norm), seen)

    def hidden_by_focus(self, image: np.ndarray, seen: Seen) -> np.ndarray:
        """A view's voxels without what its cutout and its mask hide."""
        return image if seen.focused is None else hide(image, seen.focused, self.saliency)

    def realised(self, views: list[Seen]) -> dict[str, float]:
        """What focus came to in some views, and the share of them that each source of saliency steered: all sources of
        the set, those that steered none in this batch with 0."""
        if self.saliency is None:
            return {}
        if not self.saliency.focus.knows_saliency:
            return realised(views)
        steered = Counter(
            self.saliency.source(seen.crop.case)
            for seen in views
            if seen.focused is not None and seen.focused.retention is not None
        )
        return realised(views) | {f"from_{one}": steered[one] / len(views) for one in self.saliency.sources()}

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """The anchor's crop a as the student sees it, and the teacher's crop where its places are matched."""
        batch = self.batch(step).to(torch.device("cpu"))
        of_a = (batch.query_crop == 0).numpy()
        key = int(batch.key_crop[of_a][0]) if of_a.any() else 1
        of_a &= (batch.key_crop == key).numpy()
        return {
            "a": batch.student[0, 0].numpy(),
            "b": batch.teacher[key, 0].numpy(),
            "points_a": batch.query_voxel[of_a].numpy(),
            "points_b": batch.key_voxel[of_a].numpy(),
            "spacing": np.asarray(self.sampling.spacing),
            "restored towards": batch.clean[0, 0].numpy(),
        }

    def draw(self, rng: np.random.Generator) -> list[tuple[Seen, Seen]]:
        """The student's and the teacher's view of boxes a and b of each anchor and of their counterparts."""
        anchors = self.sampling.anchors  # different scans, as long as there are enough
        drawn = rng.choice(len(self.cases), anchors, replace=anchors > len(self.cases)).tolist()
        return [views for position in drawn for views in self.draw_around(rng, position)]

    def draw_around(self, rng: np.random.Generator, position: int) -> list[tuple[Seen, Seen]]:
        """The anchor scan at a position among the cases, and its companions. (Nothing here may look at all cases: there
        may be 100,000.)"""
        anchor, candidates = self.cases[position], len(self.cases) - 1
        chosen = rng.choice(candidates, min(self.sampling.scans - 1, candidates), replace=False).tolist()
        others = [self.cases[number + (number >= position)] for number in chosen]  # the anchor is no candidate
        pairs = {anchor: self.draw_pair(rng, anchor)}
        for case in others:
            if self.bodies.placed(anchor, case):
                pairs[case] = tuple(self.bodies.counterpart(box, anchor, case) for box in pairs[anchor])
            else:
                pairs[case] = self.draw_pair(rng, case)
        return [self.draw_views(rng, case, box) for case, boxes in pairs.items() for box in boxes]

    def draw_views(self, rng: np.random.Generator, case: int, box: Box) -> tuple[Seen, Seen]:
        """Two views of one box: the box itself, or, with focus, parts of it as their parent, which may hold nothing
        salient: then of a box in it."""
        shape, views = self.sampling.shape, self.sampling.views
        whole = box if self.saliency is None else draw_ordinary_box(rng, self.saliency, case, box)
        if whole is not None:
            ours, its = (draw_view(rng, case, whole, shape, views) for _ in range(2))
            if self.sampling.one_geometry:
                its = replace(ours, intensity=its.intensity)
            return Seen(ours, whole), Seen(its, whole)
        ours, its = draw_focused_pair(rng, self.saliency, case, box, shape, views)
        return Seen(ours.crop, region(ours.crop), ours), Seen(its.crop, region(its.crop), its)

    def places_of_crops(self, count: int) -> Places:
        """Where `count` random crops lie in the body: what the data offers to be told apart."""
        rng = np.random.default_rng([self.seed, count])
        drawn = [self.cases[position] for position in rng.choice(len(self.cases), count).tolist()]
        boxes = [self.bodies.of_box(case, self.draw_box(rng, case)) for case in drawn]
        return Places.joined(boxes).centres

    def draw_pair(self, rng: np.random.Generator, case: int) -> tuple[Box, Box]:
        """Two overlapping boxes of one scan: of the anchor, and of a scan that has no place of the body to share."""
        if self.saliency is None:
            a = self.draw_box(rng, case)
        else:
            a = draw_parent(rng, self.saliency, case, self.size_mm)
            if self.sampling.one_parent:
                return a, a
        return a, draw_partner(rng, a, self.bodies.bounds(case), self.sampling.overlap)

    def draw_box(self, rng: np.random.Generator, case: int) -> Box:
        """A crop's box anywhere in the body."""
        return draw_box(rng, self.size_mm, self.bodies.bounds(case))

    @property
    def size_mm(self) -> tuple[float, float, float]:
        return tuple(float(n * mm) for n, mm in zip(self.sampling.shape, self.sampling.spacing, strict=True))

    def alike(self, own: slice, boxes: Places, key_boxes: Places) -> dict:
        """Who attracts whom in the global scope, (n, whole): the same crop; by place its overlapping partner in the
        same scan and the counterparts in others, too. In the shuffled control these are the crops of another anchor."""
        rule, whole = self.sampling.selection, len(key_boxes)
        crop = np.arange(whole)
        attracts = (crop[own, None] // 2 == crop // 2) | alike(boxes, key_boxes, self.sampling.alike_iou)
        if rule.shuffled:
            to_another = (whole // self.sampling.anchors) * (self.sampling.anchors // 2)
            attracts, key_boxes = np.roll(attracts, to_another, axis=1), key_boxes.rolled(to_another)
        attracts = (crop[own, None] == crop) | (attracts & rule.positives)
        return {"alike": torch.from_numpy(attracts), "boxes": boxes, "key_boxes": key_boxes}

    def hidden(self, rng: np.random.Generator, n: int) -> Tensor | None:
        """Which tokens of each crop the student is not shown: as near to the share as whole cells of a grid allow."""
        grid, share = self.sampling.hidden_grid, self.sampling.hidden
        if not share:
            return None
        grid = tuple(min(cells, -(-size // 2)) for cells, size in zip(grid, self.sampling.shape, strict=True))
        cells = np.zeros((n, math.prod(grid)), dtype=bool)
        cells[:, : round(share * cells.shape[1])] = True
        mask = rng.permuted(cells, axis=1).reshape(n, *grid)
        for axis, (size, count) in enumerate(zip(self.sampling.shape, grid, strict=True), start=1):
            tokens = -(-size // 2)
            mask = mask.take(np.arange(tokens) * count // tokens, axis=axis)
        return torch.from_numpy(np.ascontiguousarray(mask))

    def matched(self, step: int, own: slice, drawn: list[tuple[Seen, Seen]]) -> dict:
        """Places that a student's view shares with a teacher's view: of its partner crop (a with b, b with a), or,
        where places select no positives, of the same crop.

        Only within a scan, where correspondence is exact. Cells of the student's view are matched with the teacher's
        grid; the features are then read at the exact place in both views, so no rounding is left in a positive. A view
        may reach beyond the scan, where it shows nothing: places there are left out.
        """
        sampling, rule = self.sampling, self.sampling.selection
        query_crop, query_voxel, key_crop, key_voxel, places = [], [], [], [], []
        for q, (seen, _) in enumerate(drawn):
            view = seen.crop
            k = q ^ 1 if rule.positives else q  # the partner: a <-> b of the same scan
            other = drawn[k][1].crop
            first, last = scan_bounds(self.store.cases[view.case])
            where = cell_places(view, sampling.grid)
            shown = match(view, other, sampling.grid).valid & ((where >= first) & (where <= last)).all(axis=1)
            chance = np.random.default_rng([self.seed, step, own.start + q])  # of each crop its own
            where = where[np.sort(chance.permutation(np.flatnonzero(shown))[: sampling.places])]
            query_crop.append(np.full(len(where), q))
            key_crop.append(np.full(len(where), k))
            query_voxel.append(voxels_at(view, where))
            key_voxel.append(voxels_at(other, where))
            places.append(self.bodies.of_points(view.case, where))
        query_crop, query_voxel, key_crop, key_voxel = map(
            np.concatenate, (query_crop, query_voxel, key_crop, key_voxel)
        )
        lying = Places.joined(places)
        if rule.shuffled:  # what the teacher shows at the place of one anchor is a place of another
            anchors = sampling.anchors
            of_anchor = query_crop // (len(drawn) // anchors)
            fewest = np.bincount(of_anchor, minlength=anchors).min()
            kept = np.concatenate([np.flatnonzero(of_anchor == anchor)[:fewest] for anchor in range(anchors)])
            other = np.roll(kept, fewest * (anchors // 2))
            query_crop, query_voxel, key_crop, key_voxel = (
                query_crop[kept],
                query_voxel[kept],
                key_crop[other],
                key_voxel[other],
            )
            lying = Places(lying.mm[kept], lying.space[kept])
        return {
            "query_crop": torch.from_numpy(query_crop),
            "key_crop": torch.from_numpy(key_crop),
            "query_voxel": torch.from_numpy(query_voxel).float(),
            "key_voxel": torch.from_numpy(key_voxel).float(),
            "places": lying,
        }


def as_images(crops: list[np.ndarray]) -> Tensor:
    """float32 (n, 1, i, j, k)"""
    return torch.from_numpy(np.stack(crops)[:, None])


def realised(views: list[Seen]) -> dict[str, float]:
    """What focus came to in some views: the share of views whose parents hold nothing salient, which are ordinary; of
    the others zoom as asked and as realised, the shares that are cut out of and masked, retention on average and at its
    lowest, and the least that a cutout left."""
    focused = [seen.focused for seen in views if seen.focused is not None]
    kept = [view.retention for view in focused if view.retention is not None]
    said = {"without_saliency": 1 - len(kept) / len(views)}
    if focused:
        said["asked_zoom"] = float(np.mean([view.asked_zoom for view in focused]))
        said["zoom"] = float(np.mean([view.zoom for view in focused]))
        said["cut_out"] = float(np.mean([view.cutout is not None for view in focused]))
        said["masked"] = float(np.mean([view.mask for view in focused]))
    left = [view.cutout_retention for view in focused if view.cutout_retention is not None]
    if left:
        said["least_cutout_retention"] = min(left)
    return said | ({"retention": float(np.mean(kept)), "least_retention": min(kept)} if kept else {})
