"""The affine frame: the similarity by its definition, a known stretch and shift found again, noise not placed."""

import weakref
from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from spade3d.volumes.affine_frame import fit
from spade3d.volumes.coarse_scan import UNSEEN, CoarseScan, cell_mm, coarse_scan
from spade3d.volumes.frame_methods import place_scans
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.preprocessing import Normalisation
from spade3d.volumes.registration_kernels import (
    BINS,
    normalised_mutual_information,
    pattern_search,
    registration,
    score,
    scores_of_ways,
)


def entropy(counts):
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log(share)).sum()


def of_bins(rng, shape, unseen=0.03):
    """Bin numbers, some cells unseen, no value halfway between two bins."""
    values = rng.uniform(0, BINS - 1, shape).astype(np.float32)
    values[rng.uniform(size=shape) < unseen] = UNSEEN
    return values


def slow_similarity(moving, fixed, scale, shift):
    joint, count = np.zeros((BINS, BINS)), 0
    last = np.array(fixed.shape) - 1
    for index in np.ndindex(moving.shape):
        place = scale * index + shift
        if (place < 0).any() or (place > last).any() or moving[index] < 0:
            continue
        corner = np.minimum(place.astype(int), np.maximum(last - 1, 0))
        parts = [[(c, 1 - p), (min(c + 1, end), p)] for c, p, end in zip(corner, place - corner, last, strict=True)]
        cells = [(tuple(c for c, _ in one), np.prod([p for _, p in one])) for one in product(*parts)]
        if any(fixed[cell] < 0 for cell, _ in cells):
            continue
        value = sum(fixed[cell] * weight for cell, weight in cells)
        joint[int(moving[index] + 0.5), int(value + 0.5)] += 1
        count += 1
    if entropy(joint) < 1e-9:
        return 0.0, count
    return (entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1))) / entropy(joint) - 1, count


@pytest.mark.parametrize("seed", range(8))
def test_mutual_information_equals_its_definition(seed):
    rng = np.random.default_rng(seed)
    moving, fixed = of_bins(rng, rng.integers(3, 12, 3)), of_bins(rng, rng.integers(1, 12, 3))
    scale, shift = rng.uniform(0.75, 4 / 3, 3), rng.uniform(-2, 2, 3)
    shift = np.where(np.array(fixed.shape) == 1, 0.0, shift)  # a single layer is met by places on it alone
    found, compared = normalised_mutual_information(registration(moving, fixed, 6.0), scale, shift)
    expected, count = slow_similarity(moving, fixed, scale, shift)
    assert compared == count > 0
    assert found == pytest.approx(expected, abs=1e-6)


def test_all_eight_cells_around_a_place_must_be_seen_even_one_without_weight():
    rng = np.random.default_rng(0)
    moving, fixed = of_bins(rng, (4, 4, 4), unseen=0), of_bins(rng, (5, 5, 5), unseen=0)
    assert normalised_mutual_information(registration(moving, fixed, 6.0), np.ones(3), np.zeros(3))[1] == 64
    fixed[4] = UNSEEN
    assert normalised_mutual_information(registration(moving, fixed, 6.0), np.ones(3), np.zeros(3))[1] == 48


def test_nothing_in_common_is_worth_nothing():
    flat = registration(np.ones((4, 4, 4)), np.ones((4, 4, 4)), 6.0)
    assert normalised_mutual_information(flat, np.ones(3), np.zeros(3)) == (0.0, 64)
    assert normalised_mutual_information(flat, np.ones(3), np.full(3, 9.0)) == (0.0, 0)
    assert score(flat, np.array([0, 0, 0, 9.0, 0, 0])) == -1


def test_a_single_slice_counts_as_a_slab_of_itself():
    rng = np.random.default_rng(0)
    one, moving = of_bins(rng, (1, 6, 5), 0), of_bins(rng, (1, 6, 5), 0)
    shift = np.array([0, 0.5, 0])
    alone = normalised_mutual_information(registration(moving, one, 6.0), np.ones(3), shift)
    thick = registration(moving, np.repeat(one, 2, axis=0), 6.0)
    assert alone == normalised_mutual_information(thick, np.ones(3), shift)
    assert alone[0] > 0 and alone[1] == 25


def slow_score(moving, fixed, at, apart_cells):
    scale, way = np.exp(at[:3]), at[3:]
    shift = (np.array(fixed.shape) - 1) / 2 + way - scale * (np.array(moving.shape) - 1) / 2
    value, count = slow_similarity(moving, fixed, scale, shift)
    overlap = min(1.0, count * scale.prod() / min((moving >= 0).sum() * scale.prod(), (fixed >= 0).sum()))
    if overlap < 0.25:
        return -1.0
    return value * overlap**0.5 - 2.0 * at[:3] @ at[:3] - 0.01 * np.log(1 + way @ way / apart_cells**2)


def slow_search(judge, at, scale_step, least):
    at, value, steps = at.copy(), judge(at), np.array([scale_step] * 3 + [1.0] * 3)
    while steps[3] > least:
        before = value
        for d in range(6):
            for sign in (1, -1):
                there = at.copy()
                there[d] += sign * steps[d]
                if (d >= 3 or abs(there[d]) <= np.log(4 / 3)) and judge(there) > value:
                    at, value = there, judge(there)
                    break
        if value == before:
            steps /= 2
    return value, at


def test_the_pattern_search_is_the_slow_one():
    rng = np.random.default_rng(1)
    fixed = ndimage.gaussian_filter(rng.uniform(size=(9, 10, 8)), 1.2)
    fixed = ((fixed - fixed.min()) / np.ptp(fixed) * (BINS - 1)).astype(np.float32)
    moving = np.ascontiguousarray(fixed[1:, :-2, :-1])
    scans, begin = registration(moving, fixed, 6.0), np.array([0.05, 0, 0, 0, 0, -1.0])

    def judge(at):
        return slow_score(moving, fixed, at, 6.0)

    ways = rng.uniform(-3, 3, (5, 3))
    assert scores_of_ways(scans, ways) == pytest.approx([judge(np.array([0, 0, 0, *way])) for way in ways], abs=1e-6)
    value, at = pattern_search(scans, begin, 0.1, 0.3)
    slow_value, slow_at = slow_search(judge, begin, 0.1, 0.3)
    assert value == pytest.approx(slow_value, abs=1e-6)
    np.testing.assert_allclose(at, slow_at, atol=1e-9)
    assert value > judge(begin) + 0.1


def anatomy(points):
    """Brightness 0..1 of a made-up body at points (..., 3) in mm: an ellipsoid with six organs and no symmetry."""
    organs = [(-60, 10, 80, 50, 0.9), (70, -20, 60, 35, 0.3), (10, 40, -20, 40, 0.7), (-40, -50, -90, 30, 0.2)]
    organs += [(50, 30, -120, 45, 0.85), (0, -60, 130, 30, 0.1)]
    value = np.where(((points / (150, 100, 220)) ** 2).sum(axis=-1) < 1, 0.5, 0.0)
    for *centre, radius, brightness in organs:
        value = np.where(((points - centre) ** 2).sum(axis=-1) < radius**2, brightness, value)
    return value


def scanned(low, high, mm=8.0, scale=(1.0, 1.0, 1.0), invert=False):
    """(voxels 0..1000, affine) of the body, its places stretched by `scale`, between two corners in mm."""
    shape = np.round((np.array(high) - low) / mm).astype(int)
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = low
    places = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) / scale
    value = anatomy(places)
    value = np.where(value > 0, 1 - value, 0.0) if invert else value
    noise = np.random.default_rng(shape.sum()).normal(0, 0.02, value.shape)
    return np.round(1000 * np.clip(value + noise, 0, 1)), affine


WHOLE = scanned((-180, -130, -240), (180, 130, 240))
SCANS = [
    WHOLE,
    scanned((-170, -120, -60), (190, 130, 240), scale=(1.1, 1.05, 0.95)),  # without the lower third
    scanned((-180, -130, -240), (150, 110, 80), scale=(0.92, 1.0, 1.05)),  # without the upper third
    scanned((-160, -120, -200), (160, 120, 200), invert=True),  # as another modality shows it
]
SCALES = [(1, 1, 1), (1.1, 1.05, 0.95), (0.92, 1.0, 1.05), (1, 1, 1)]


def stored(in_memory, scans, modalities=None):
    images, affines = zip(*scans, strict=True)
    store = in_memory(images, affines=list(affines), normalisation=Normalisation(0.0, 1e-3, 0.0, 1.0))
    for case, modality in zip(store.cases, modalities or ["MR"] * len(scans), strict=True):
        case.modality = modality
    return store


def test_parts_of_stretched_and_recoloured_bodies_are_placed_and_noise_is_not(in_memory, monkeypatch):
    monkeypatch.setattr("spade3d.volumes.coarse_scan.CELLS", 32)  # quicker: cells of 15 mm
    noise = np.random.default_rng(0).normal(500, 200, (40, 30, 30)).clip(0, 1000).round()
    store = stored(in_memory, [*SCANS, (noise, WHOLE[1])])
    frames = place_scans(store, range(5), "affine", seed=1)
    assert frames[4] is None
    landmarks = np.array([[-60, 10, 60], [50, 30, -50], [10, 40, -20.0]])
    placed = [frames[i].place(landmarks * scale) for i, scale in enumerate(SCALES)]
    apart = np.linalg.norm(np.array(placed) - np.mean(placed, axis=0), axis=-1)
    assert apart.mean() < 10
    assert np.median([frames[i].to_frame.diagonal() for i in range(4)], axis=0) == pytest.approx([1] * 4)
    monkeypatch.setattr("spade3d.cores.usable_cores", lambda: 1)
    again = place_scans(store, range(5), "affine", seed=1)
    assert all((frames[i].to_frame == again[i].to_frame).all() for i in range(4))
    assert place_scans(store, [], "affine") == {}


INSIDE = [  # of the body without its outline, (lowest, highest corner), scale: only organs tell where they lie
    ((-105, -70, -200), (105, 70, 200), (1.0, 1.0, 1.0)),
    ((-105, -70, -100), (105, 70, 200), (1.08, 1.0, 0.95)),
    ((-105, -70, -200), (105, 70, 110), (0.94, 1.05, 1.0)),
]
INSIDE_CT = [
    ((-105, -70, -200), (105, 70, 200), (1.0, 1.0, 1.0)),
    ((-105, -70, -110), (105, 70, 210), (1.05, 0.95, 1.0)),
    ((-105, -70, -210), (105, 70, 100), (1.0, 1.0, 1.05)),
]


def test_ct_meets_mr_though_the_first_scan_of_the_set_shows_next_to_nothing(in_memory, monkeypatch):
    """A set that starts from its first scan loses the others, and CT in a mean of MR is grey all over."""
    monkeypatch.setattr("spade3d.volumes.coarse_scan.CELLS", 32)
    scans = [scanned((40, -20, 60), (110, 50, 120))]
    scans += [scanned(low, high, scale=scale) for low, high, scale in INSIDE]
    scans += [scanned(low, high, scale=scale, invert=True) for low, high, scale in INSIDE_CT]
    frames = place_scans(stored(in_memory, scans, ["MR"] * 4 + ["CT"] * 3), range(7), "affine", seed=1)
    assert all(frames[i] is not None for i in range(1, 7))
    landmarks = np.array([[-60, 10, 60], [50, 30, -50], [10, 40, -20.0]])
    scales = [scale for *_, scale in INSIDE + INSIDE_CT]
    placed = np.array([frames[i].place(landmarks * scale) for i, scale in enumerate(scales, 1)])
    assert np.linalg.norm(placed - np.median(placed, axis=0), axis=-1).mean(axis=1).max() < 6


def texture(rng, shape):
    """Brightness 0..1 of smooth noise, which has no two places alike."""
    values = ndimage.gaussian_filter(rng.normal(size=shape), 2.5, mode="wrap")
    return np.clip(0.5 + values / values.std() / 5, 0, 1)


def test_several_starts_find_a_place_that_the_best_start_misses():
    """The part itself lies between the starts; what merely resembles it lies on one, and looks better from there."""
    rng = np.random.default_rng(0)
    whole, part, other = (texture(rng, shape) for shape in ((80, 32, 32), (24, 24, 24), (24, 24, 24)))
    whole[46:70, 6:30, 2:26] = part
    whole[8:32, 4:28, 4:28] = 0.5 + (0.8 * (part - 0.5) + 0.2 * (other - 0.5)) / np.hypot(0.8, 0.2)
    found = fit(*(CoarseScan(values.astype(np.float32), np.eye(4)) for values in (part, whole)))
    assert found.way == pytest.approx([18, 2, -2], abs=0.5)  # cells between the centres; of the other: -20, 0, 0
    assert np.abs(found.log_scale).max() < 0.02


def test_of_many_scans_some_make_the_mean_and_each_is_read_once(in_memory, monkeypatch):
    monkeypatch.setattr("spade3d.volumes.coarse_scan.CELLS", 32)
    monkeypatch.setattr("spade3d.volumes.affine_frame.SAMPLE_OF", 3)
    monkeypatch.setattr("spade3d.cores.usable_cores", lambda: 1)
    reads, alive, most, told = [], weakref.WeakSet(), 0, []

    def read(store, i, mm):
        nonlocal most
        reads.append(i)
        alive.add(scan := coarse_scan(store, i, mm))
        most = max(most, len(alive))
        return scan

    monkeypatch.setattr("spade3d.volumes.affine_frame.coarse_scan", read)
    store = stored(in_memory, [*SCANS[:3], *SCANS[:3]])

    def progress(done, of, what):
        told.append((done, of))

    frames = place_scans(store, range(6), "affine", seed=0, progress=progress)
    assert sorted(reads) == list(range(6)) and most <= 3 + 2, "those of the mean, and one after the other"
    assert told[-1] == (15, 15)
    landmarks = np.array([[-60, 10, 60], [50, 30, -50], [10, 40, -20.0]])
    placed = [frames[i].place(landmarks * SCALES[i % 3]) for i in range(6)]
    assert np.linalg.norm(np.array(placed) - np.mean(placed, axis=0), axis=-1).mean() < 10
    # A scan lies where it lies whether it makes the mean or not.
    assert all((frames[i].to_frame == frames[i + 3].to_frame).all() for i in range(3))


def test_a_part_is_moved_not_stretched():
    body = CoarseScan(
        anatomy(np.moveaxis(np.indices((45, 33, 60)), 0, -1) * 8.0 - (176, 128, 236)), np.diag([8.0, 8, 8, 1])
    )
    body = CoarseScan(body.values.astype(np.float32), body.affine)
    upper = body.affine.copy()
    upper[2, 3] = 900.0  # its own table
    found = fit(CoarseScan(np.ascontiguousarray(body.values[:, :, 32:]), upper), body)
    assert np.abs(found.log_scale).max() < 0.04
    assert found.way == pytest.approx([0, 0, 16], abs=1)  # cells between the centres


def test_a_coarse_grid_keeps_places_and_says_what_is_unseen(in_memory):
    turned = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -7], [0, 0, 2.0, 3], [0, 0, 0, 1]])
    places = apply_affine(turned, np.moveaxis(np.indices((60, 50, 40)), 0, -1))
    store = in_memory(
        [np.round(1000 + 10 * places[..., 0])], affines=[turned], normalisation=Normalisation(0.0, 1e-3, 0.0, 2.0)
    )
    mm = cell_mm(store, [0])
    assert mm == pytest.approx(80 / 56)
    coarse = coarse_scan(store, 0, 4 * mm)
    centres = apply_affine(coarse.affine, np.moveaxis(np.indices(coarse.values.shape), 0, -1))
    inside = coarse.values >= 0
    assert 0.4 < inside.mean() < 0.9  # the corners of a turned scan are empty
    middle = ndimage.binary_erosion(inside, iterations=2)
    assert coarse.values[middle] == pytest.approx((1 + centres[..., 0] / 100)[middle] / 2, abs=0.005)
    assert np.allclose(coarse.centre_mm, apply_affine(turned, np.array([29.5, 24.5, 19.5])), atol=1e-6)
