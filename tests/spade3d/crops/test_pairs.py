"""Pairs: a batch is a pure function of (seed, step), and all that it says about places is true in millimetres."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spade3d.crops.crop import Box, Views, body_bounds, coloured, cut, rotation, scan_to_world
from spade3d.crops.focus import hide
from spade3d.crops.focus_rule import Focus
from spade3d.crops.pairs import PairBatch, PairStream, Sampling
from spade3d.crops.selection import BODY, Selection, alike
from spade3d.volumes.body_frame import box_frames

SAMPLING = Sampling(shape=(12, 10, 8), spacing=(1.5, 1.5, 2.0), scans=3, grid=(6, 5, 4), places=7)
SHAPES = [(30, 26, 14), (33, 24, 15), (28, 30, 12)]
AFFINES = [
    np.diag([0.9, 1.1, 3.0, 1.0]),
    np.array([[0.0, -1.2, 0, 40], [0.8, 0, 0, -7], [0, 0, 2.5, 300], [0, 0, 0, 1]]),
    np.diag([1.0, 1.0, 3.5, 1.0]),
]


@pytest.fixture(scope="module")
def store(in_memory):
    rng = np.random.default_rng(0)
    return in_memory([rng.integers(0, 1000, shape) for shape in SHAPES], affines=AFFINES)


@pytest.fixture(scope="module")
def frames(store):
    return [frame.to_frame for frame in box_frames([case.body_box_mm for case in store.cases])]


def stream_of(store, frames, sampling=SAMPLING, seed=0, **how):
    return PairStream(store, range(len(store.cases)), dict(enumerate(frames)), sampling, seed=seed, **how)


def drawn_in(stream, step):
    """Box, student's view and teacher's view of every crop."""
    drawn = stream.draw(np.random.default_rng([stream.seed, step]))
    return [(ours.region, ours.crop, its.crop) for ours, its in drawn]


def equal(one, other):
    tensors = [name for name, value in vars(one).items() if torch.is_tensor(value)]
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return same and all(
        np.array_equal(getattr(one, name).mm, getattr(other, name).mm)
        and np.array_equal(getattr(one, name).space, getattr(other, name).space)
        for name in ("boxes", "places")
    )


def test_views_say_where_the_students_images_were_cut(store, frames):
    batch = stream_of(store, frames).batch(3)
    for image, clean, view in zip(batch.student, batch.clean, batch.views, strict=True):
        np.testing.assert_array_equal(clean[0], cut(store, view.plain()))
        np.testing.assert_array_equal(image[0], cut(store, view))


def test_with_one_geometry_the_two_views_of_a_crop_differ_in_colour_only(store, frames):
    stream = stream_of(store, frames, replace(SAMPLING, one_geometry=True))
    for _, ours, its in drawn_in(stream, 2):
        np.testing.assert_array_equal(ours.to_mm, its.to_mm)
        assert ours.intensity != its.intensity
    other = [its.to_mm for _, ours, its in drawn_in(stream_of(store, frames), 2)]
    assert not any(np.array_equal(ours.to_mm, to_mm) for (_, ours, _), to_mm in zip(drawn_in(stream, 2), other))
    batch = stream.batch(2)  # a place matched with the partner is still read where the partner shows it
    assert (batch.key_crop == batch.query_crop ^ 1).all()


def test_what_is_known_beforehand_travels_with_the_students_views(store, frames):
    def corner(crop):
        return np.full((2, 1, 1, 1), crop.to_mm[:3, 3].sum())

    stream = PairStream(store, range(len(store.cases)), dict(enumerate(frames)), SAMPLING, prior=corner)
    batch = stream.batch(0)
    assert batch.priors.shape == (len(batch.views), 2, 1, 1, 1) and batch.priors.dtype == torch.float32
    np.testing.assert_allclose(batch.priors[:, 0, 0, 0, 0], [v.to_mm[:3, 3].sum() for v in batch.views], rtol=1e-6)
    assert stream_of(store, frames).batch(0).priors is None


def test_a_batch_is_a_pure_function_of_seed_and_step(store, frames):
    batches = list(stream_of(store, frames).stream(0, 4))
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    (again,) = stream_of(store, frames).stream(2, 3)  # resuming is starting there
    assert equal(again, batches[2]) and not equal(again, batches[1])
    assert not equal(stream_of(store, frames, seed=1).batch(2), again)


def test_the_layout_of_a_batch(store, frames):
    batch = stream_of(store, frames).batch(0)
    n = 2 * SAMPLING.scans
    for images in (batch.student, batch.teacher, batch.clean):
        assert images.shape == (n, 1, *SAMPLING.shape) and images.dtype == torch.float32
    assert len(batch) == 2 * n and batch.boxes.mm.shape == (n, 6) and batch.alike.shape == (n, n)
    m = len(batch.places)
    assert 0 < m <= n * SAMPLING.places
    assert batch.query_voxel.shape == batch.key_voxel.shape == (m, 3) and batch.places.mm.shape == (m, 3)
    # Places are read from a crop and its overlapping partner: a with b, b with a.
    assert torch.equal(batch.key_crop, batch.query_crop ^ 1) and batch.query_crop.dtype == torch.int64
    for voxel in (batch.query_voxel, batch.key_voxel):
        assert (voxel >= -0.5).all() and (voxel <= torch.tensor(SAMPLING.shape) - 0.5).all()


def test_moving_a_batch_leaves_places_in_main_memory(store, frames):
    batch = stream_of(store, frames).batch(0)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, PairBatch) and moved.student.is_meta and moved.key_voxel.is_meta
    assert moved.boxes is batch.boxes and moved.places is batch.places and moved.step == 0


def test_views_that_are_coloured_where_they_go_look_the_same(store, frames):
    """And nothing else of the batch changes; clean views move once, as what the student is shown before."""
    usual = stream_of(store, frames).batch(3)
    later = stream_of(store, frames, colour_later=True).batch(3)
    assert later.student is later.clean and not torch.equal(later.student, usual.student)
    moved, span = later.to(torch.device("cpu")), max(np.ptp(store.image(n)) for n in range(len(SHAPES)))
    assert moved.looks is None
    for branch in ("student", "teacher"):
        torch.testing.assert_close(getattr(moved, branch), getattr(usual, branch), rtol=0, atol=2e-5 * span)
    assert equal(replace(moved, student=usual.student, teacher=usual.teacher), usual)


def test_what_is_not_moved_yet_is_pinned_with_its_looks(store, frames, monkeypatch):
    """As far as there is no GPU: what asks for pinned memory is asked of every tensor, each once."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(tensor.data_ptr()) or tensor.clone())
    batch = stream_of(store, frames, colour_later=True).batch(0)
    pinned = batch.pin_memory()
    assert pinned.student is pinned.clean and asked.count(batch.clean.data_ptr()) == 1
    assert batch.looks[0].gamma.data_ptr() in asked and pinned.looks[0].gamma is not batch.looks[0].gamma


def test_what_each_branch_sees(store, frames):
    """The student's view is its clean view coloured; the teacher's is the same box, turned otherwise."""
    stream = stream_of(store, frames)
    batch = stream.batch(1)
    for n, (box, view, other) in enumerate(drawn_in(stream, 1)):
        assert view.case == other.case and not np.allclose(view.to_mm, other.to_mm)
        middle = [*((np.array(SAMPLING.shape) - 1) / 2), 1]
        for crop in (view, other):
            np.testing.assert_allclose((crop.to_mm @ middle)[:3], box.centre)
        clean = cut(store, view.plain())
        np.testing.assert_array_equal(batch.clean[n, 0], clean)
        np.testing.assert_array_equal(
            batch.student[n, 0], coloured(clean, view.intensity, store.cases[view.case].normalisation)
        )
        np.testing.assert_array_equal(batch.teacher[n, 0], cut(store, other))


def test_matched_places_are_one_place_in_both_views(store, frames):
    stream = stream_of(store, frames)
    for step in range(4):
        batch, drawn = stream.batch(step), drawn_in(stream, step)
        for q, query, k, key, place, space in zip(
            batch.query_crop.tolist(),
            batch.query_voxel.double().numpy(),
            batch.key_crop.tolist(),
            batch.key_voxel.double().numpy(),
            batch.places.mm,
            batch.places.space,
            strict=True,
        ):
            view, other = drawn[q][1], drawn[k][2]
            mm = view.to_mm @ [*query, 1]
            np.testing.assert_allclose(mm, other.to_mm @ [*key, 1], atol=1e-4)
            case = store.cases[view.case]
            np.testing.assert_allclose(frames[view.case] @ scan_to_world(case) @ mm, [*place, 1], atol=1e-4)
            assert space == BODY
            voxel = mm[:3] / case.spacing
            assert (voxel >= -0.5 - 1e-4).all() and (voxel <= np.array(case.shape) - 0.5 + 1e-4).all()


def test_matched_places_are_drawn_without_repetition(store, frames):
    batch = stream_of(store, frames).batch(0)
    read = torch.cat([batch.query_crop[:, None], batch.query_voxel], dim=1)
    assert len(read.unique(dim=0)) == len(read)
    assert batch.query_crop.bincount().max() <= SAMPLING.places


def test_places_outside_the_scan_are_not_matched(in_memory):
    """Crops of twice the scan: most of their cells show nothing at all."""
    store = in_memory([np.ones((8, 8, 8))])
    sampling = replace(SAMPLING, shape=(16, 16, 16), spacing=(1.0, 1.0, 1.0), grid=(8, 8, 8), places=999)
    batch = PairStream(store, [0], {0: np.eye(4)}, sampling).batch(0)
    assert 0 < len(batch.places) < 2 * 8**3 / 4
    assert (batch.places.mm >= -0.5).all() and (batch.places.mm <= 7.5).all()


def test_positives_are_the_same_scan_and_the_same_place(store, frames):
    stream = stream_of(store, frames)
    for step in range(3):
        batch, drawn = stream.batch(step), drawn_in(stream, step)
        for q, k in np.ndindex(6, 6):
            low_q, high_q = batch.boxes.mm[q].reshape(2, 3)
            low_k, high_k = batch.boxes.mm[k].reshape(2, 3)
            shared = np.prod(np.maximum(np.minimum(high_q, high_k) - np.maximum(low_q, low_k), 0))
            union = np.prod(high_q - low_q) + np.prod(high_k - low_k) - shared
            expected = drawn[q][1].case == drawn[k][1].case or shared / union >= SAMPLING.alike_iou
            assert batch.alike[q, k] == expected
        # a of the anchor and its counterparts lie at one place of the body.
        assert batch.alike[0, 2] and batch.alike[0, 4] and batch.alike[1, 3] and batch.alike[1, 5]


def test_the_two_crops_of_a_scan_overlap_as_asked(store, frames):
    stream = stream_of(store, frames, replace(SAMPLING, scans=1, shape=(6, 6, 3)))
    for step in range(20):
        (a, *_), (b, *_) = drawn_in(stream, step)
        sides = np.asarray(a.size) - np.abs(np.subtract(a.centre, b.centre))
        assert a.size == b.size and np.prod(np.maximum(sides, 0)) / np.prod(a.size) >= 0.2 - 1e-9


def test_the_counterpart_of_equal_frames_is_the_same_box(in_memory):
    store = in_memory([np.ones((20, 20, 20))] * 2)
    stream = PairStream(store, [0, 1], dict.fromkeys(range(2), np.eye(4)), SAMPLING)
    box = Box((9.0, 8.0, 10.0), (6.0, 7.0, 8.0))
    found = stream.bodies.counterpart(box, 0, 1)
    np.testing.assert_allclose(found.corners, box.corners)


def test_a_larger_patient_has_a_larger_counterpart(in_memory):
    store = in_memory([np.ones((20, 20, 20)), np.ones((20, 20, 20))], affines=[np.eye(4), np.diag([2.0, 2, 2, 1])])
    frames = [frame.to_frame for frame in box_frames([case.body_box_mm for case in store.cases])]
    found = PairStream(store, [0, 1], dict(enumerate(frames)), SAMPLING).bodies.counterpart(
        Box((9.5, 4.5, 9.5), (6.0, 6.0, 6.0)), 0, 1
    )
    np.testing.assert_allclose(found.size, 12)
    np.testing.assert_allclose(found.centre, (19, 9, 19))  # the same voxel of twice the size


def test_an_unplaced_scan_is_compared_with_itself_only(store, frames):
    stream = stream_of(store, [frames[0], None, frames[2]])
    for step in range(6):
        batch, drawn = stream.batch(step), drawn_in(stream, step)
        cases = np.array([view.case for _, view, _ in drawn])
        assert (batch.boxes.space == np.where(cases == 1, 2, BODY)).all()
        assert (batch.places.space == np.where(cases[batch.query_crop] == 1, 2, BODY)).all()
        lone = torch.from_numpy(cases == 1)
        assert not batch.alike[lone][:, ~lone].any() and not batch.alike[~lone][:, lone].any()
        # It learns from its own places: its two crops overlap as the anchor's do, and its places are matched.
        (a, view, _), (b, _, _) = (drawn[n] for n in np.flatnonzero(lone))
        sides = np.asarray(a.size) - np.abs(np.subtract(a.centre, b.centre))
        assert np.prod(np.maximum(sides, 0)) / np.prod(a.size) >= 0.2 - 1e-9
        low, high = body_bounds(store.cases[1])
        fits = np.asarray(a.size) <= high - low
        assert (a.corners[:3] >= low - 1e-9)[fits].all() and (a.corners[3:] <= high + 1e-9)[fits].all()
        assert torch.isin(torch.from_numpy(np.flatnonzero(lone)), batch.query_crop).all()


def test_without_frames_every_scan_stands_alone(store):
    batch = stream_of(store, [None] * 3).batch(0)
    assert sorted(set(batch.boxes.space.tolist())) == [1, 2, 3]
    assert batch.alike.sum() == 3 * 4


def test_fewer_scans_than_asked_for_make_a_smaller_batch(store, frames):
    batch = PairStream(store, [2], dict(enumerate(frames)), SAMPLING).batch(0)
    assert len(batch.student) == 2 and batch.alike.all()
    with pytest.raises(ValueError, match="no cases"):
        PairStream(store, [], dict(enumerate(frames)), SAMPLING)


def test_views_that_share_no_cell_make_a_batch_without_places(in_memory):
    store = in_memory([np.ones((40, 4, 4))])
    still = Views(rotation_deg=0.0)
    sampling = replace(SAMPLING, shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0), overlap=(0.0, 0.0), views=still)
    batches = [
        PairStream(store, [0], {0: np.eye(4)}, replace(sampling, grid=(1, 1, 1))).batch(step) for step in range(9)
    ]
    empty = [batch for batch in batches if len(batch.places) == 0]
    assert empty and all(batch.query_voxel.shape == (0, 3) and batch.places.mm.shape == (0, 3) for batch in empty)


def test_pictures_show_the_matched_places_of_the_anchor(store, frames):
    stream = stream_of(store, frames)
    pictures, batch = stream.pictures(0), stream.batch(0)
    np.testing.assert_array_equal(pictures["a"], batch.student[0, 0])
    np.testing.assert_array_equal(pictures["b"], batch.teacher[1, 0])
    assert pictures["points_a"].shape == pictures["points_b"].shape and len(pictures["points_a"]) > 0
    mm_a, mm_b = (
        np.c_[pictures[name], np.ones(len(pictures[name]))] @ crop.to_mm.T
        for name, crop in (("points_a", drawn_in(stream, 0)[0][1]), ("points_b", drawn_in(stream, 0)[1][2]))
    )
    np.testing.assert_allclose(mm_a, mm_b, atol=1e-4)


def test_the_size_of_a_crop_is_voxels_times_spacing(store, frames):
    assert stream_of(store, frames).size_mm == (18.0, 15.0, 16.0) and math.prod(SAMPLING.grid) == 120


def with_selection(control):
    return replace(SAMPLING, selection=Selection.named(control))


def test_without_places_only_the_crop_itself_attracts(store, frames):
    spatial = stream_of(store, frames).batch(2)
    for control in ("instance", "negatives"):
        batch = stream_of(store, frames, with_selection(control)).batch(2)
        assert torch.equal(batch.alike, torch.eye(6, dtype=torch.bool)) and spatial.alike.sum() > 6
        assert torch.equal(batch.query_crop, batch.key_crop)  # a place is matched in the other view of its own crop
        assert torch.equal(batch.student, spatial.student) and torch.equal(batch.teacher, spatial.teacher)
        assert np.array_equal(batch.boxes.mm, spatial.boxes.mm)


def test_shuffled_places_are_those_of_another_anchor(store, frames):
    sampling = replace(SAMPLING, anchors=2)
    true = stream_of(store, frames, sampling)
    control = stream_of(store, frames, replace(sampling, selection=Selection.named("shuffled")))
    for step in range(3):
        honest, batch, n = true.batch(step), control.batch(step), 12
        assert torch.equal(batch.student, honest.student) and torch.equal(batch.teacher, honest.teacher)
        assert np.array_equal(batch.boxes.mm, honest.boxes.mm) and np.array_equal(honest.key_boxes.mm, honest.boxes.mm)
        assert np.array_equal(batch.key_boxes.mm, np.roll(honest.boxes.mm, 6, axis=0))
        for q in range(n):
            for k in range(n):
                assert batch.alike[q, k] == (q == k or honest.alike[q, (k - 6) % n])
        assert len(batch.key_crop) and ((batch.query_crop // 6) != (batch.key_crop // 6)).all()
        assert {tuple(v) for v in batch.key_voxel.tolist()} <= {tuple(v) for v in honest.key_voxel.tolist()}
        known = [(q, *voxel) for q, voxel in zip(honest.query_crop.tolist(), honest.query_voxel.tolist(), strict=True)]
        where = [
            known.index((q, *v)) for q, v in zip(batch.query_crop.tolist(), batch.query_voxel.tolist(), strict=True)
        ]
        assert np.array_equal(batch.places.mm, honest.places.mm[where])


def test_a_counterpart_of_a_turned_scan_still_attracts(store, frames):
    """Frames that turn (affine, learned) keep the extent of a box, so that exact counterparts overlap enough."""
    turn = np.eye(4)
    turn[:3, :3] = rotation(np.radians([0.0, 0.0, 15.0]))
    for turned in ([frames[0], turn @ frames[1], frames[2]], [turn @ frames[0], frames[1], frames[2]]):
        stream = stream_of(store, turned, replace(SAMPLING, shape=(6, 6, 4)))
        box = Box((12.0, 12.0, 20.0), (5.0, 5.0, 5.0))
        other = stream.bodies.counterpart(box, 0, 1)
        both = [stream.bodies.of_box(0, box), stream.bodies.of_box(1, other)]
        assert alike(*both, 0.5).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_hidden_share_comes_in_whole_cells(store, frames, share):
    sampling = replace(SAMPLING, hidden=share, hidden_grid=(3, 2, 2))
    batch = stream_of(store, frames, sampling).batch(0)
    if share == 0:
        assert batch.hidden is None
        return
    assert batch.hidden.shape == (6, 6, 5, 4)  # tokens of 2 voxels
    for crop in batch.hidden.numpy():
        cells = [crop[i : i + 2, j, k : k + 2] for i in (0, 2, 4) for j in (slice(0, 3), slice(3, 5)) for k in (0, 2)]
        assert all(cell.all() or not cell.any() for cell in cells)
        assert sum(bool(cell.all()) for cell in cells) == round(12 * share)
    assert share == 1 or not torch.equal(batch.hidden[0], batch.hidden[1])


class FromLists(PairStream):
    """Anchors and companions drawn from lists of cases, as the runs that were published drew them."""

    def draw(self, rng):
        anchors = self.sampling.anchors
        drawn = rng.choice(self.cases, anchors, replace=anchors > len(self.cases)).tolist()
        return [views for anchor in drawn for views in self.draw_around(rng, anchor)]

    def draw_around(self, rng, anchor):
        candidates = [case for case in self.cases if case != anchor]
        others = rng.choice(candidates, min(self.sampling.scans - 1, len(candidates)), replace=False).tolist()
        pairs = {anchor: self.draw_pair(rng, anchor)}
        for case in others:
            pairs[case] = tuple(self.bodies.counterpart(box, anchor, case) for box in pairs[anchor])
        return [self.draw_views(rng, case, box) for case, boxes in pairs.items() for box in boxes]


@pytest.mark.parametrize("cases", [(0, 1, 2), (2, 0), (1,)])
@pytest.mark.parametrize(("anchors", "scans"), [(1, 1), (1, 3), (2, 2), (5, 3)])
def test_positions_are_drawn_by_the_chance_that_drew_from_lists(store, frames, cases, anchors, scans):
    sampling = replace(SAMPLING, anchors=anchors, scans=scans)
    ours, its = (kind(store, cases, dict(enumerate(frames)), sampling) for kind in (PairStream, FromLists))
    for seed in range(4):
        chances = [np.random.default_rng(seed) for _ in range(2)]
        both = [stream.draw(chance) for stream, chance in zip((ours, its), chances)]
        assert chances[0].bit_generator.state == chances[1].bit_generator.state
        for one, other in zip(*both, strict=True):
            for a, b in zip(one, other, strict=True):
                assert a.crop.case == b.crop.case and np.array_equal(a.crop.to_mm, b.crop.to_mm)


class Counted(Sequence):
    """Cases that count how often one of them is looked up."""

    def __init__(self, cases):
        self.cases, self.looked = cases, 0

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, position):
        self.looked += 1
        return self.cases[position]


def test_drawing_a_batch_looks_at_no_more_cases_than_it_draws(store, frames):
    many = SimpleNamespace(cases=list(store.cases) * 1000)
    frames = {case: frames[case % len(SHAPES)] for case in range(len(many.cases))}
    stream = PairStream(many, range(len(many.cases)), frames, replace(SAMPLING, anchors=4, scans=3))
    stream.cases = Counted(stream.cases)
    stream.draw(np.random.default_rng(0))
    assert stream.cases.looked == 4 * 3
    stream.places_of_crops(20)
    assert stream.cases.looked == 4 * 3 + 20


@pytest.fixture(scope="module")
def salient(store):
    """The same scans with a few salient voxels each; the last one has no saliency."""
    cases = [
        SimpleNamespace(
            **vars(case), saliency=None if n == 2 else "its file", saliency_source="gaze" if n else "attention"
        )
        for n, case in enumerate(store.cases)
    ]
    marks = []
    for shape in SHAPES:
        mark = np.zeros(shape, dtype=np.uint8)
        mark[tuple(np.array(shape) // 2)], mark[tuple(np.array(shape) // 3)] = 255, 100
        marks.append(mark)
    focused = SimpleNamespace(**vars(store) | {"cases": tuple(cases)}, image=store.image)
    focused.saliency = lambda i, box=None: marks[i] if box is None else marks[i][tuple(map(slice, *box))]
    return focused


def test_every_rank_notes_what_focus_came_to_in_the_whole_batch(salient, frames):
    given = salient, range(len(SHAPES)), dict(enumerate(frames))
    sampling = replace(SAMPLING, anchors=2, focus=Focus(salient_chance=1.0))
    alone, *shared = (PairStream(*given, sampling, share=share).batch(1) for share in ((0, 1), (0, 2), (1, 2)))
    assert alone.realised and shared[0].realised == shared[1].realised == alone.realised


@pytest.mark.parametrize(("control", "said"), [("random", set()), ("matched_zoom", set()), ("centre", {"from_centre"})])
def test_a_control_that_reads_no_saliency_names_no_source(salient, frames, control, said):
    batch = stream_of(salient, frames, replace(SAMPLING, focus=Focus(control=control))).batch(0)
    assert {name for name in batch.realised if name.startswith("from_")} == said


def test_the_views_of_an_instance_share_one_parent(salient, frames):
    """A part of the scan that keeps 0.8 of one parent's saliency; so all four views of an instance show some of it."""
    sampling = replace(SAMPLING, anchors=2, focus=Focus(salient_chance=1.0), one_parent=True)
    stream = stream_of(salient, frames, sampling)
    for step in range(3):
        batch, drawn = stream.batch(step), stream.draw(np.random.default_rng([0, step]))
        assert batch.realised["least_retention"] >= 0.8
        for (a, also_a), (b, also_b) in zip(drawn[::2], drawn[1::2], strict=True):
            four = [seen.focused is None for seen in (a, also_a, b, also_b)]
            assert len(set(four)) == 1, "all of them have something to keep, or none"
    apart = stream_of(salient, frames, replace(sampling, one_parent=False))
    assert apart.draw_pair(np.random.default_rng(0), 0)[0] != apart.draw_pair(np.random.default_rng(0), 0)[1]
    a, b = stream.draw_pair(np.random.default_rng(0), 0)
    assert a == b and a == apart.draw_pair(np.random.default_rng(0), 0)[0]


def test_focused_views_are_coloured_by_the_loader(salient, frames):
    """They hide voxels once these are coloured."""
    sampling = replace(SAMPLING, focus=Focus())
    assert stream_of(salient, frames, sampling, colour_later=True).batch(0).looks is None


def test_focus_changes_the_views_and_nothing_else(salient, frames):
    sampling = replace(SAMPLING, focus=Focus(cutout_chance=1.0, mask_chance=1.0, salient_chance=1.0))
    stream = stream_of(salient, frames, sampling)
    hidden = ordinary = 0
    for step in range(4):
        batch, drawn = stream.batch(step), stream.draw(np.random.default_rng([0, step]))
        focused = [seen.focused for pair in drawn for seen in pair if seen.focused is not None]
        kept = [view.retention for view in focused]
        assert batch.realised["least_retention"] == pytest.approx(min(kept)) and min(kept) >= 0.8
        ordinary += batch.realised["without_saliency"] > 0
        assert batch.realised["asked_zoom"] >= batch.realised["zoom"]
        left = [view.cutout_retention for view in focused if view.cutout_retention is not None]
        assert batch.realised["least_cutout_retention"] == pytest.approx(min(left)) and min(left) >= 0.9
        assert batch.realised["cut_out"] == pytest.approx(np.mean([view.cutout is not None for view in focused]))
        assert batch.realised["masked"] == pytest.approx(np.mean([view.mask for view in focused]))
        by_source = Counter("attention" if ours.crop.case == 0 else "gaze" for ours, _ in drawn if ours.focused)
        for source in ("attention", "gaze"):  # also the one that steered none in this batch
            assert batch.realised[f"from_{source}"] == pytest.approx(by_source[source] / len(drawn))
        for n, (ours, its) in enumerate(drawn):
            looked = salient.cases[ours.crop.case].normalisation
            whole = coloured(cut(salient, ours.crop.plain()), ours.crop.intensity, looked)
            np.testing.assert_array_equal(
                batch.clean[n, 0], cut(salient, ours.crop.plain())
            )  # to be restored: unhidden
            if ours.focused is None:  # nothing is salient there: two views of one crop's box, whole
                assert its.focused is None and ours.region == its.region
                np.testing.assert_array_equal(batch.student[n, 0], whole)
                np.testing.assert_array_equal(batch.teacher[n, 0], cut(salient, its.crop))
            else:
                np.testing.assert_array_equal(batch.student[n, 0], hide(whole, ours.focused, stream.saliency))
                np.testing.assert_array_equal(
                    batch.teacher[n, 0], hide(cut(salient, its.crop), its.focused, stream.saliency)
                )
                hidden += ours.focused.cutout is not None or its.focused.mask
            np.testing.assert_allclose(batch.boxes.mm[n], stream.bodies.of_box(ours.crop.case, ours.region).mm[0])
        for q, query, k, key in zip(batch.query_crop, batch.query_voxel, batch.key_crop, batch.key_voxel, strict=True):
            here, there = drawn[q][0].crop.to_mm @ [*query, 1], drawn[k][1].crop.to_mm @ [*key, 1]
            np.testing.assert_allclose(here, there, atol=1e-4)  # one place, whatever the views
    assert hidden > 10 and ordinary
