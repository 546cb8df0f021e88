"""Focus: every view keeps what it must, is drawn uniformly from those that do, and grows where there is none."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from spade3d.crops.crop import Box, Crop, Views, body_bounds, mm_to_stored, rotation, touched
from spade3d.crops.focus import (
    draw_focused,
    draw_focused_pair,
    draw_ordinary_box,
    draw_parent,
    hide,
    soft_mask,
)
from spade3d.crops.focus_kernels import box_sums, integral_volume
from spade3d.crops.focus_rule import Focus
from spade3d.crops.salient import Saliency
from spade3d.faults import UsageFault
from spade3d.volumes.preprocessing import Normalisation

seeds = st.integers(0, 2**32 - 1)
STRAIGHT = Views(flip=(False, False, False), rotation_deg=0.0)
WILD = Views(rotation_deg=180.0)
CROP_ONLY = Focus(cutout_chance=0.0, mask_chance=0.0)


@pytest.fixture(scope="module")
def salient(in_memory):
    """Makes the saliency of scans from arrays (i, j, k), None for a scan without: `salient([S, ...], Focus(), ...)`."""

    def make(maps, focus, *, shape=None, spacing=(1.0, 1.0, 1.0)):
        images = [np.zeros(shape if values is None else values.shape) for values in maps]
        store = in_memory(images, spacing=spacing, normalisation=Normalisation(0.0, 1.0, -2.0, 8.0))
        for case, values in zip(store.cases, maps):
            case.saliency = None if values is None else "saliency.b2nd"
        store.saliency = lambda i, box=None: maps[i] if box is None else maps[i][tuple(map(slice, *box))]
        return Saliency(store, range(len(maps)), focus)

    return make


def random_saliency(rng, shape):
    """Foci, or islands and specks of noise, dense or thin."""
    if rng.random() < 0.5:
        noise = ndimage.gaussian_filter(rng.random(shape), rng.uniform(0, 2))
        noise[noise < np.quantile(noise, rng.uniform(0, 0.999))] = 0
        return np.uint8(255 * noise / noise.max())
    where = np.stack(np.indices(shape), -1) / shape
    foci = [np.exp(-(((where - rng.random(3)) / rng.uniform(0.02, 0.2)) ** 2).sum(-1)) for _ in range(3)]
    return np.uint8(255 * np.max(foci, axis=0))


def counted(values, spacing, parent, mode):
    """The weights of the parts of a parent, and the mm of all voxels: the slow twin of what focus counts."""
    mm = np.stack(np.indices(values.shape), -1) * spacing
    low, high = parent.corners.reshape(2, 3)
    weights = np.where(((mm >= low) & (mm < high)).all(-1) & (values >= 0.05 * values.max()), values, 0).astype(float)
    if mode == "area":
        weights = (weights > 0).astype(float)
    if mode != "per_component":
        return mm, [weights] if weights.any() else []
    named, count = ndimage.label(weights, np.ones((3, 3, 3)))
    return mm, [weights * (named == n) for n in range(1, count + 1)]


def inside(crop, mm, start=(0, 0, 0), stop=None, slack=0.0):
    """Which places lie in a crop, or in a box of its voxels, made wider by `slack` voxels on each side."""
    to_voxel = np.linalg.inv(crop.to_mm)
    voxel = mm @ to_voxel[:3, :3].T + to_voxel[:3, 3] + 0.5
    return ((voxel >= np.subtract(start, slack)) & (voxel < np.add(stop or crop.shape, slack))).all(-1)


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_box_sums_of_an_integral_volume_equal_adding_voxel_by_voxel(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 7, 3))
    weights = (rng.integers(0, 256, shape) * rng.integers(0, 2, shape)).astype(np.uint8)
    to_cell = np.eye(4)
    to_cell[:3, :3] = rotation(rng.uniform(-3, 3, 3)) @ np.diag(rng.uniform(0.3, 2, 3))
    to_cell[:3, 3] = rng.normal(0, 3, 3)
    first, cells = rng.integers(-4, 4, 3), rng.integers(1, 9, 3)
    integral = np.zeros(cells + 1, dtype=np.int64)
    integral_volume(weights, to_cell, first, integral)
    lowest, size, sums = rng.integers(-6, 6, 3), rng.integers(1, 12, 3), np.empty(rng.integers(1, 5, 3), np.int64)
    box_sums(integral, lowest - first, size, sums)

    cell = np.floor(np.stack(np.indices(weights.shape), -1) @ to_cell[:3, :3].T + to_cell[:3, 3])
    known = ((cell >= first) & (cell < first + cells)).all(-1)
    for at in np.ndindex(sums.shape):
        held = ((cell >= lowest + at) & (cell < lowest + at + size)).all(-1)
        assert sums[at] == weights[known & held].sum(dtype=int)


@settings(max_examples=80, deadline=None)
@given(seed=seeds, mode=st.sampled_from(["mass", "area", "per_component"]))
def test_every_view_keeps_what_it_must(salient, seed, mode):
    """Over random volumes, spacings, parents, turns and zooms; counted anew, voxel by voxel, from the final view."""
    rng = np.random.default_rng(seed)
    values, spacing = random_saliency(rng, tuple(rng.integers(6, 22, 3))), rng.uniform(0.5, 3, 3)
    tau, left = rng.uniform(0, 1, 2)
    focus = Focus(
        crop_retention=tau, cutout_retention=left, cutout_chance=1.0, mode=mode, zoom=(1.0, 3.0), cells=12, parent=1.3
    )
    saliency = salient([values], focus, spacing=tuple(spacing.tolist()))
    parent = draw_parent(rng, saliency, 0, tuple(rng.uniform(0.2, 0.8, 3) * values.shape * spacing))
    view = draw_focused(rng, saliency, 0, parent, tuple(rng.integers(3, 14, 3).tolist()), WILD)

    side = np.linalg.norm(view.crop.to_mm[:3, :3], axis=0) * view.crop.shape
    np.testing.assert_allclose(side * view.zoom, parent.size)
    assert view.zoom <= view.asked_zoom and 1 - 1e-9 <= view.asked_zoom <= 3 + 1e-9
    mm, parts = counted(values, spacing, parent, mode)
    kept = np.array([part[inside(view.crop, mm)].sum() / part.sum() for part in parts])
    assert (view.retention is None) == (len(parts) == 0)
    if parts:
        assert ((kept >= tau - 1e-9) | (kept == 0)).all() and (kept >= tau - 1e-9).any()
        assert view.retention == pytest.approx(kept[kept > 0].min(initial=1.0), abs=1e-9) or not kept.any()
    if view.cutout is not None:
        start, stop = view.cutout
        assert all(0 <= a < b <= n for a, b, n in zip(start, stop, view.crop.shape))
        hidden, shown = inside(view.crop, mm, start, stop), inside(view.crop, mm)
        read = read_by(view.crop, saliency.store.cases[0])
        _, parts = counted(values, spacing, read, mode) if read else (mm, [])
        spared = [1 - part[hidden].sum() / part[shown].sum() for part in parts if part[shown].any()]
        assert min(spared, default=1) >= left - 1e-9
        assert view.cutout_retention == (pytest.approx(min(spared)) if spared else None)


def read_by(crop, case):
    """The box of stored voxels that a cut of the crop reads: within it, components are joined for a cutout."""
    start, stop = touched(mm_to_stored(case) @ crop.to_mm, crop.shape, case.shape)
    if start is None:
        return None
    low, high = (np.array([start, stop]) - 0.5) * case.spacing
    return Box(tuple((low + high) / 2), tuple(high - low))


def test_retention_is_that_of_the_continuous_map(salient):
    """A finely sampled view sees the share that was counted on the voxels."""
    spacing, centre = (0.9, 1.3, 2.1), np.array([30.0, 27.0, 33.0])
    mm = np.stack(np.indices((70, 50, 30)), -1) * spacing
    blob = np.exp(-0.5 * (((mm - centre) / 6) ** 2).sum(-1))
    saliency = salient([np.uint8(255 * blob)], replace(CROP_ONLY, zoom=(1.5, 2.5), least=0.0), spacing=spacing)
    parent, rng = Box(tuple(centre - 4), (40.0, 40.0, 40.0)), np.random.default_rng(0)
    total = ((2 * np.pi) ** 0.5 * 6 * (stats.norm.cdf(16 / 6) - stats.norm.cdf(-24 / 6))) ** 3  # of the parent
    for _ in range(10):
        view = draw_focused(rng, saliency, 0, parent, (60, 60, 60), WILD)
        seen = np.stack(np.indices((60, 60, 60)), -1) @ view.crop.to_mm[:3, :3].T + view.crop.to_mm[:3, 3]
        volume = abs(np.linalg.det(view.crop.to_mm[:3, :3]))
        density = np.exp(-0.5 * (((seen - centre) / 6) ** 2).sum(-1)) * (np.abs(seen - centre + 4) < 20).all(-1)
        share = density.sum() * volume / total
        assert view.retention == pytest.approx(share, abs=0.02)


class Seen(np.random.Generator):
    """Chance that remembers what it was last to choose from, each as likely as any other."""

    def choice(self, offered):
        self.offered = offered
        return super().choice(offered)


def places_within(parent, size, zoom, cells):
    """How far a view of `size` cells may begin from one of `cells` in the middle of its parent, along each axis: while
    it stays inside the parent, or once it is larger the parent inside it; by half a cell it may always leave."""
    spare = max(abs(cells * zoom - size), 1) / 2
    return [n for n in range(-40, 41) if abs(n + (size - cells) / 2) <= spare + 1e-9]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, mode=st.sampled_from(["mass", "area", "per_component"]), cells=st.integers(2, 7))
def test_places_are_drawn_from_exactly_the_feasible_ones(salient, seed, mode, cells):
    """Over small volumes, spacings, parents and zooms; each place looked at, voxel by voxel, and no view larger than
    the smallest that has one."""
    rng = Seen(np.random.PCG64(seed))
    values, spacing, tau = random_saliency(rng, tuple(rng.integers(3, 10, 3))), rng.uniform(0.5, 3, 3), rng.uniform()
    focus = replace(CROP_ONLY, crop_retention=tau, mode=mode, zoom=(1.0, 2.5), cells=cells)
    middle, size_mm = (
        rng.uniform(0.3, 0.7, 3) * values.shape * spacing,
        rng.uniform(0.4, 1.2, 3) * values.shape * spacing,
    )
    parent, saliency = Box(tuple(middle), tuple(size_mm)), salient([values], focus, spacing=tuple(spacing.tolist()))
    view = draw_focused(rng, saliency, 0, parent, (8, 8, 8), STRAIGHT)

    mm, parts = counted(values, spacing, parent, mode)
    cell = size_mm / view.asked_zoom / cells
    first_cell = middle - cells * cell / 2
    for size in itertools.count(cells):
        begins = places_within(parent, size, view.asked_zoom, cells)
        feasible = []
        for place in itertools.product(begins, repeat=3):
            low = first_cell + np.array(place) * cell
            held = ((mm >= low) & (mm < low + size * cell)).all(-1)
            kept = [part[held].sum() for part in parts]
            enough = [k >= tau * part.sum() for k, part in zip(kept, parts)]
            feasible.append(not parts or (any(enough) and all(e or k == 0 for e, k in zip(enough, kept))))
        if any(feasible):
            break
    assert rng.offered.tolist() == np.flatnonzero(feasible).tolist()
    assert view.zoom == pytest.approx(view.asked_zoom * cells / size)
    corner = (view.crop.to_mm @ [-0.5, -0.5, -0.5, 1])[:3]
    begun = np.round((corner - first_cell) / cell)
    np.testing.assert_allclose(first_cell + begun * cell, corner, atol=1e-9)
    assert feasible[
        len(begins) ** 2 * begins.index(begun[0]) + len(begins) * begins.index(begun[1]) + begins.index(begun[2])
    ]


def test_places_are_uniform_among_the_feasible_ones(salient):
    values = random_saliency(np.random.default_rng(5), (12, 12, 12))
    counts = np.where(values >= 0.05 * values.max(), values, 0).astype(float)
    # A view is 8 mm wide, in 6 steps of 4/3 mm; its centre may leave that of the parent by 2 mm: by one step.
    share = {}
    for place in itertools.product((-4 / 3, 0.0, 4 / 3), repeat=3):
        mm = np.stack(np.indices(values.shape), -1) - 5.5 - place
        share[tuple(np.round(place, 6))] = counts[(np.abs(mm) < 4).all(-1)].sum() / counts.sum()
    tau = float(np.median(list(share.values())))
    feasible = [place for place in share if share[place] >= tau - 1e-9]
    assert len(feasible) < 20
    saliency = salient([values], replace(CROP_ONLY, crop_retention=tau - 1e-9, zoom=(1.5, 1.5), cells=6))
    parent = Box((5.5, 5.5, 5.5), (12.0, 12.0, 12.0))
    rng, drawn = np.random.default_rng(0), dict.fromkeys(feasible, 0)
    for _ in range(100 * len(feasible)):
        view = draw_focused(rng, saliency, 0, parent, (6, 6, 6), STRAIGHT)
        drawn[tuple(np.round((view.crop.to_mm @ [2.5, 2.5, 2.5, 1])[:3] - 5.5, 6))] += 1
    assert set(drawn) == set(feasible)  # a KeyError above: not feasible
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


def test_a_view_grows_only_as_far_as_it_must(salient):
    values = np.zeros((16, 16, 16), np.uint8)
    values[2, 8, 8] = values[12, 8, 8] = 200  # half each: at 0.8 a view has to hold both
    focus = replace(CROP_ONLY, zoom=(2.0, 2.0), cells=8)
    parent = Box((7.5, 7.5, 7.5), (16.0, 16.0, 16.0))
    rng = np.random.default_rng(0)
    views = [draw_focused(rng, salient([values], focus), 0, parent, (8, 8, 8), STRAIGHT) for _ in range(50)]
    assert {view.retention for view in views} == {1.0} and {view.asked_zoom for view in views} == {2.0}
    assert {round(16 / view.zoom, 9) for view in views} == {11.0}  # eleven voxels from the one to the other
    assert {round(float(view.crop.to_mm[0, 3] - 11 / 16), 9) for view in views} == {1.5 + 0.0}
    loose = [draw_focused(rng, salient([values], replace(focus, crop_retention=0.5)), 0, parent, (8, 8, 8), STRAIGHT)]
    assert loose[0].zoom == 2.0


def test_a_view_may_grow_beyond_its_parent(salient):
    """Turned by 45 degrees, the corners of a parent leave a view of its own size."""
    values = np.zeros((20, 20, 20), np.uint8)
    values[np.ix_((0, -1), (0, -1), (9, 10))] = 255
    saliency = salient([values], replace(CROP_ONLY, zoom=(1.0, 1.0), crop_retention=1.0))
    parent, rng = Box((9.5, 9.5, 9.5), (20.0, 20.0, 20.0)), np.random.default_rng(0)
    views = [draw_focused(rng, saliency, 0, parent, (8, 8, 8), WILD) for _ in range(20)]
    assert 0.7 < min(view.zoom for view in views) < 0.75  # 1 / sqrt 2, and a little for voxels short of the corners
    assert {view.retention for view in views} == {1.0}


def test_the_drawn_zoom_is_the_realised_one_wherever_that_is_feasible(salient):
    values = np.zeros((24, 24, 24), np.uint8)
    values[11:13, 11:13, 11:13] = 255
    saliency, rng = salient([values], CROP_ONLY), np.random.default_rng(0)
    parent = Box((11.5, 11.5, 11.5), (24.0, 24.0, 24.0))
    views = [draw_focused(rng, saliency, 0, parent, (8, 8, 8), WILD) for _ in range(300)]
    assert all(view.zoom == view.asked_zoom for view in views)
    assert stats.kstest(np.log2([view.zoom for view in views]), "uniform").pvalue > 1e-3


def test_matched_zoom_shares_the_zoom_with_focus_and_nothing_else(salient):
    values = random_saliency(np.random.default_rng(2), (24, 24, 24))
    parent, drawn = Box((11.5, 11.5, 11.5), (20.0, 20.0, 20.0)), {}
    for control in ("none", "matched_zoom", "random"):
        saliency = salient([values], Focus(control=control, cutout_chance=1.0, zoom=(1.5, 2.0)))
        drawn[control] = [
            draw_focused(np.random.default_rng(s), saliency, 0, parent, (8, 8, 8), STRAIGHT, mask=True)
            for s in range(60)
        ]
    zoom = {control: [view.zoom for view in views] for control, views in drawn.items()}
    asked = [view.asked_zoom for view in drawn["none"]]
    assert zoom["none"] == zoom["matched_zoom"] != asked == zoom["random"]
    assert min(view.retention for view in drawn["none"]) >= 0.8
    assert min(view.retention for view in drawn["matched_zoom"]) < 0.8 > min(v.retention for v in drawn["random"])
    assert all(view.mask == (control == "none") for control, views in drawn.items() for view in views)


@pytest.mark.parametrize("control", ["none", "matched_zoom", "random"])
@pytest.mark.parametrize("values", [None, np.zeros((20, 20, 20), np.uint8)])
def test_where_nothing_is_salient_views_are_ordinary(salient, values, control):
    """A crop's box for both views, anywhere in the parent; the control that knows no saliency cannot know this."""
    focus = Focus(cutout_chance=1.0, mask_chance=1.0, salient_chance=1.0, control=control)
    saliency, rng, centres = salient([values], focus, shape=(20, 20, 20)), np.random.default_rng(0), []
    for _ in range(200):
        parent = draw_parent(rng, saliency, 0, (8.0, 8.0, 8.0))
        assert parent.size == (12.0, 12.0, 12.0)
        box = draw_ordinary_box(rng, saliency, 0, parent)
        if control == "random":
            assert box is None
            assert draw_focused(rng, saliency, 0, parent, (8, 8, 8), STRAIGHT).cutout is not None
            continue
        assert box.size == (8.0, 8.0, 8.0)
        centres.append(np.subtract(box.centre, parent.centre))
        view = draw_focused(rng, saliency, 0, parent, (8, 8, 8), STRAIGHT, mask=True)
        assert view.cutout is None and not view.mask and view.retention is None
    if centres:
        assert np.abs(np.mean(centres, axis=0)).max() < 0.3 and 1.9 < np.abs(centres).max() <= 2.0


def test_a_parent_beside_what_is_salient_has_ordinary_views_too(salient):
    values = np.zeros((30, 30, 30), np.uint8)
    values[25, 25, 25] = 255
    saliency, rng = salient([values], Focus()), np.random.default_rng(0)
    assert draw_ordinary_box(rng, saliency, 0, Box((8.0, 8.0, 8.0), (12.0, 12.0, 12.0))) is not None
    assert draw_ordinary_box(rng, saliency, 0, Box((22.0, 22.0, 22.0), (12.0, 12.0, 12.0))) is None


def test_a_lesion_is_kept_or_left_alone_but_never_cut(salient):
    values = np.zeros((30, 30, 30), np.uint8)
    values[4:10, 12:18, 12:18] = values[22:26, 12:16, 12:16] = 255
    parent, rng = Box((14.5, 14.5, 14.5), (30.0, 30.0, 30.0)), np.random.default_rng(0)
    shares = {}
    for mode in ("mass", "per_component"):
        saliency = salient([values], replace(CROP_ONLY, zoom=(1.2, 2.0), crop_retention=0.7, mode=mode))
        mm, lesions = counted(values, np.ones(3), parent, "per_component")
        views = [draw_focused(rng, saliency, 0, parent, (8, 8, 8), WILD) for _ in range(60)]
        shares[mode] = np.array([[part[inside(v.crop, mm)].sum() / part.sum() for part in lesions] for v in views])
    cut = (shares["per_component"] > 0) & (shares["per_component"] < 0.7)
    assert not cut.any() and (shares["per_component"] >= 0.7).any(axis=1).all()
    assert (shares["per_component"] == 0).any()  # one of the two is enough
    assert ((shares["mass"] > 0) & (shares["mass"] < 0.7)).any()


def test_a_cutout_shrinks_until_it_spares_enough(salient):
    focus = Focus(cutout_chance=1.0, cutout_side=(1.0, 1.0), zoom=(1.0, 1.0))
    saliency = salient([np.full((10, 10, 10), 9, np.uint8)], focus)
    parent, rng, starts = Box((4.5, 4.5, 4.5), (10.0, 10.0, 10.0)), np.random.default_rng(0), set()
    for _ in range(50):
        view = draw_focused(rng, saliency, 0, parent, (10, 10, 10), STRAIGHT)
        start, stop = view.cutout
        assert np.subtract(stop, start).tolist() == [4, 4, 4]  # 4^3 voxels are less than a tenth of 10^3, 5^3 are more
        assert view.cutout_retention == pytest.approx(1 - 0.064)
        starts.add(start)
    assert len(starts) > 40
    view = draw_focused(rng, saliency, 0, parent, (1, 1, 1), STRAIGHT)
    assert view.cutout is None and view.cutout_retention is None  # its one voxel holds all


def test_parents_lie_around_voxels_drawn_in_proportion_to_their_saliency(salient):
    values = np.zeros((70, 9, 40), np.uint8)
    where = {(3, 2, 1): 255, (3, 2, 2): 45, (40, 8, 39): 100, (69, 0, 0): 200}
    for voxel, value in {**where, (50, 4, 4): 12}.items():  # the last one lies below 5 % of the highest
        values[voxel] = value
    saliency, rng = salient([values], Focus(salient_chance=1.0), spacing=(1.0, 2.0, 0.5)), np.random.default_rng(0)
    places = [tuple(np.rint(saliency.draw_place(rng, 0) / (1, 2, 0.5)).astype(int).tolist()) for _ in range(1200)]
    expected = np.array(list(where.values())) * 1200 / sum(where.values())
    assert set(places) == set(where)
    assert stats.chisquare([places.count(voxel) for voxel in where], expected).pvalue > 1e-3
    bounds = body_bounds(saliency.store.cases[0])
    for _ in range(20):
        low, high = draw_parent(rng, saliency, 0, (6.0, 6.0, 6.0)).corners.reshape(2, 3)
        assert (low >= bounds[0] - 1e-9).all() and (high <= bounds[1] + 1e-9).all()
        near = np.array(list(where)) * (1, 2, 0.5)  # up to half a voxel from the parent's centre, or clipped
        assert ((near >= low) & (near <= high)).all(axis=1).any()


def test_a_pair_is_two_views_of_one_parent_of_which_at_most_one_is_masked(salient):
    values = random_saliency(np.random.default_rng(1), (24, 24, 24))
    saliency, parent = salient([values], Focus()), Box((11.5, 11.5, 11.5), (20.0, 20.0, 20.0))
    pairs = [draw_focused_pair(np.random.default_rng(s), saliency, 0, parent, (8, 8, 8), WILD) for s in [*range(80), 3]]
    masks = np.array([[view.mask for view in pair] for pair in pairs])
    assert masks.sum(axis=1).max() == 1 and masks.any(axis=0).all() and 25 < masks.sum() < 55
    assert all(view.retention >= 0.8 for pair in pairs for view in pair)
    for view, again in zip(pairs[3], pairs[-1]):  # the same seed
        np.testing.assert_array_equal(view.crop.to_mm, again.crop.to_mm)
        assert view.crop.intensity == again.crop.intensity
        assert replace(view, crop=again.crop).__dict__ == again.__dict__
    assert not np.allclose(pairs[0][0].crop.to_mm, pairs[0][1].crop.to_mm)


def test_the_mask_shows_the_most_salient_share(salient):
    rng = np.random.default_rng(0)
    values = rng.permutation(10**3).reshape(10, 10, 10) // 4
    crop = Crop(0, (10, 10, 10), np.eye(4))
    sharp = soft_mask(salient([values.astype(np.uint8)], Focus(mask_blur=0.0)), crop)
    assert (sharp > 0.1).sum() == 200 and sharp.min() == np.float32(0.1) and sharp.max() == 1
    assert values[sharp > 0.1].min() > values[sharp <= 0.1].max() - 1
    speck = np.zeros((10, 10, 10), np.uint8)
    speck[2, 2, 2] = 255
    soft = soft_mask(salient([speck], Focus(mask_blur=0.1)), crop)
    distance = np.sqrt(((np.stack(np.indices(speck.shape), -1) - 2.0) ** 2).sum(-1))
    np.testing.assert_allclose(soft[:, 2, 2], np.minimum(np.exp(-0.5 * (np.arange(10) - 2.0) ** 2) + 0.1, 1), atol=0.02)
    assert (soft[distance > 5.2] == np.float32(0.1)).all()


def test_what_is_hidden_lies_at_the_lowest_value(salient):
    values = np.zeros((10, 10, 10), np.uint8)
    values[5, 5, 5] = 255
    saliency = salient([values], Focus(cutout_chance=1.0))
    view = draw_focused(
        np.random.default_rng(0), saliency, 0, Box((4.5, 4.5, 4.5), (10.0, 10.0, 10.0)), (8, 8, 8), WILD, mask=True
    )
    image = np.random.default_rng(0).uniform(-2, 8, (8, 8, 8)).astype(np.float32)
    seen = hide(image.copy(), view, saliency)
    expected = -2 + (image + 2) * soft_mask(saliency, view.crop)
    box = tuple(map(slice, *view.cutout))
    expected[box] = -2
    assert view.mask
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    np.testing.assert_array_equal(hide(image.copy(), replace(view, mask=False, cutout=None), saliency), image)


def test_controls_read_another_saliency(salient):
    one, other = np.zeros((20, 20, 20), np.uint8), np.zeros((40, 20, 20), np.uint8)
    one[3, 3, 3], other[30:32, 10, 10] = 255, 255
    shuffled = salient([one, other], Focus(control="shuffled"))
    np.testing.assert_array_equal(np.argwhere(shuffled.voxels(0, (0, 0, 0), (20, 20, 20))), [[15, 10, 10]])
    np.testing.assert_array_equal(np.argwhere(shuffled.voxels(0, (14, 9, 10), (20, 20, 20))), [[1, 1, 0]])
    np.testing.assert_array_equal(np.argwhere(shuffled.voxels(1, (0, 0, 0), (40, 20, 20)))[:, 1:], [[3, 3]] * 2)
    centre = salient([None], Focus(control="centre"), shape=(21, 11, 31)).voxels(0, (0, 0, 0), (21, 11, 31))
    assert centre[10, 5, 15] == centre.max() == 255 and centre[0].max() == centre[:, :, -1].max() == 0
    empty = np.zeros_like(one)
    beyond = salient([one, empty, other], Focus(control="shuffled"))  # an empty one is not another's saliency
    assert np.argwhere(beyond.voxels(0, (0, 0, 0), (20, 20, 20))).tolist() == [[15, 10, 10]]
    with pytest.raises(UsageFault, match="two patients with saliency"):
        salient([one, empty], Focus(control="shuffled")).voxels(0, (0, 0, 0), (1, 1, 1))
    with pytest.raises(UsageFault, match="two patients with saliency"):
        salient([one, None], Focus(control="shuffled"), shape=(20, 20, 20)).voxels(0, (0, 0, 0), (1, 1, 1))


def test_impossible_shares_are_refused():
    with pytest.raises(UsageFault, match=r"crop_retention 1\.5: a share between 0 and 1"):
        Focus(crop_retention=1.5)
