"""The affine frame: the similarity by its definition, a known stretch and shift found again, noise not placed."""

import numpy as np
import pytest
from scipy import ndimage

from spade3d.volumes.affine_frame import fit
from spade3d.volumes.body_frame import place_scans
from spade3d.volumes.coarse_scan import UNSEEN, CoarseScan, cell_mm, coarse_scan
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.mutual_information import normalised_mutual_information
from spade3d.volumes.preprocessing import Normalisation


def entropy(counts):
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log(share)).sum()


def test_mutual_information_equals_its_definition():
    rng = np.random.default_rng(0)
    bins, moving, fixed = 6, rng.uniform(0, 5, (5, 6, 7)), rng.uniform(0, 5, (6, 5, 4))
    moving[1, 2, 3] = fixed[3, 2, 1] = UNSEEN
    moving, fixed = moving.astype(np.float32), fixed.astype(np.float32)
    scale, shift = np.array([0.9, 1.1, 0.7]), np.array([0.8, -0.7, 0.3])
    joint, count = np.zeros((bins, bins)), 0
    for index in np.ndindex(moving.shape):
        place = scale * index + shift
        inside = (place >= 0).all() and (place <= np.array(fixed.shape) - 1).all()
        corner = np.minimum(place.astype(int), np.array(fixed.shape) - 2)
        if not inside or moving[index] < 0 or fixed[tuple(slice(c, c + 2) for c in corner)].min() < 0:
            continue
        value = ndimage.map_coordinates(fixed, place[:, None], order=1)[0]
        joint[int(moving[index] + 0.5), int(value + 0.5)] += 1
        count += 1
    found, compared = normalised_mutual_information(moving, fixed, scale, shift, np.empty((bins, bins)))
    assert compared == count > 50
    expected = (entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1))) / entropy(joint) - 1
    assert found == pytest.approx(expected, abs=1e-6)


def test_nothing_in_common_is_worth_nothing():
    flat, joint = np.ones((4, 4, 4), np.float32), np.empty((4, 4))
    assert normalised_mutual_information(flat, flat, np.ones(3), np.zeros(3), joint) == (0.0, 64)
    assert normalised_mutual_information(flat, flat, np.ones(3), np.full(3, 9.0), joint) == (0.0, 0)


def test_a_single_slice_counts_as_a_slab_of_itself():
    rng, joint = np.random.default_rng(0), np.empty((6, 6))
    one, moving = (rng.uniform(0, 5, (1, 6, 5)).astype(np.float32) for _ in range(2))
    alone = normalised_mutual_information(moving, one, np.ones(3), np.array([0, 0.5, 0]), joint)
    two = np.repeat(one, 2, axis=0)
    assert alone == normalised_mutual_information(moving, two, np.ones(3), np.array([0, 0.5, 0]), joint)
    assert alone[0] > 0 and alone[1] == 25


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


def stored(in_memory, scans):
    images, affines = zip(*scans, strict=True)
    store = in_memory(images, affines=list(affines), normalisation=Normalisation(0.0, 1e-3, 0.0, 1.0))
    for case in store.cases:
        case.modality = "MR"
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
    again = place_scans(store, range(5), "affine", seed=1)
    assert all((frames[i].to_frame == again[i].to_frame).all() for i in range(4))
    assert place_scans(store, [], "affine") == {}


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
