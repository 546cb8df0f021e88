"""A ramp, in which each voxel holds its own place in mm, tells right from nearly right."""

import re
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade3d.faults import DataFault
from spade3d.volumes.geometry import (
    apply_affine,
    axis_codes,
    canonical_flips,
    check_affine,
    compose,
    inverse,
    resample,
    same_grid,
    spacing_of,
)

SHAPE = (7, 9, 5)


def rotation(degrees: float, axis: int) -> np.ndarray:
    turn, (a, b) = np.eye(4), [other for other in range(3) if other != axis]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
    return turn


def grid(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), turn=0.0, axis=2) -> np.ndarray:
    placed = rotation(turn, axis) @ np.diag([*spacing, 1.0])
    placed[:3, 3] = origin
    return placed


def ramp(shape, affine) -> np.ndarray:
    """(i, j, k, 3): each voxel holds its own place in mm."""
    return apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))


def every_orientation():
    """The 48 ways in which the axes of a file can lie along those of the body."""
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        affine = np.zeros((4, 4))
        affine[3] = 0, 0, 0, 1
        for column, (row, sign) in enumerate(zip(order, signs, strict=True)):
            affine[row, column] = sign * (0.8, 1.1, 2.5)[column]
        affine[:3, 3] = -20, 5, 300
        yield affine


def test_spacing_and_codes_by_hand():
    affine = np.array([[0, 0, -2.0, 1], [3.0, 0, 0, 2], [0, -0.5, 0, 3], [0, 0, 0, 1]])
    assert spacing_of(affine) == (3.0, 0.5, 2.0)
    assert axis_codes(affine) == "AIL"
    assert apply_affine(affine, np.array([1, 2, 3])).tolist() == [-5.0, 5.0, 2.0]


def test_compose_and_inverse_undo_each_other():
    a, b = grid((1, 2, 3), (5, 6, 7), 20), grid((0.5, 1, 1), (1, 0, 0), 35, axis=0)
    point = np.array([1.0, -2.0, 3.0])
    assert np.allclose(apply_affine(compose(a, b), point), apply_affine(a, apply_affine(b, point)))
    assert np.allclose(apply_affine(inverse(a), apply_affine(a, point)), point)


@pytest.mark.parametrize("affine", list(every_orientation()), ids=axis_codes)
def test_canonical_is_ras_and_no_voxel_moves(affine):
    turn = canonical_flips(affine, SHAPE)
    places = ramp(SHAPE, affine)
    canonical = turn.apply(places)
    assert axis_codes(turn.affine(affine)) == "RAS"
    assert canonical.shape[:3] == turn.canonical_shape
    assert np.abs(canonical - ramp(turn.canonical_shape, turn.affine(affine))).max() < 1e-9
    assert (turn.undo(canonical) == places).all()


def test_an_oblique_grid_goes_to_the_nearest_axes_and_stays_oblique():
    affine = grid((1, 1, 3), turn=20) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    turn = canonical_flips(affine, SHAPE)
    assert turn.flips == (True, True, False)
    assert spacing_of(turn.affine(affine)) == pytest.approx((1, 1, 3))
    assert np.allclose(turn.apply(ramp(SHAPE, affine)), ramp(SHAPE, turn.affine(affine)))


def test_a_reorientation_refuses_an_array_of_another_grid():
    turn = canonical_flips(np.eye(4), SHAPE)
    with pytest.raises(ValueError, match="stored grid"):
        turn.apply(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="canonical grid"):
        turn.undo(np.zeros((2, 2, 2)))


sheared = grid()
sheared[0, 2] = 0.1
nan = grid()
nan[0, 3] = np.nan


@pytest.mark.parametrize(
    "affine, reason",
    [(sheared, "shear.* 84.29 degrees"), (nan, "NaN"), (np.zeros((4, 4)), "singular"), (grid((1, 0, 1)), "singular")],
)
def test_an_affine_that_places_nothing_is_refused(affine, reason):
    with pytest.raises(DataFault, match=f"^scan.nii: .*{reason}"):
        check_affine(Path("scan.nii"), affine)


def test_an_oblique_affine_is_fine():
    check_affine("scan.nii", grid((0.7, 0.7, 5), (1, 2, 3), 20))


@pytest.mark.parametrize(
    "shape, affine, difference",
    [
        (SHAPE, grid(origin=(5e-4, 0, 0)), None),
        ((7, 9, 6), grid(), r"shape \(7, 9, 5\) against \(7, 9, 6\)"),
        (SHAPE, np.diag([-1.0, 1, 1, 1]), "orientation RAS against LAS"),
        (SHAPE, grid((1, 1, 1.1)), "spacing 1x1x1 against 1x1x1.1 mm"),
        (SHAPE, grid(turn=1), "directions"),
        (SHAPE, grid(origin=(0, 7.5, 0)), "origins 7.5 mm apart"),
    ],
)
def test_same_grid_names_the_difference(shape, affine, difference):
    found = same_grid(SHAPE, grid(), shape, affine)
    assert found is None if difference is None else re.match(difference, found)


@given(
    spacing=st.tuples(*[st.floats(0.4, 3.0)] * 3),
    turn=st.floats(-40, 40),
    axis=st.integers(0, 2),
    shift=st.tuples(*[st.floats(-2.0, 2.0)] * 3),
)
def test_resampling_a_ramp_gives_each_voxel_its_own_place(spacing, turn, axis, shift):
    """Trilinear interpolation is exact on a ramp: 1e-3 mm, and only inside the source."""
    source_affine, shape = grid((1.5, 1.0, 2.0), (-250, 300, 700)), (9, 8, 7)
    middle = apply_affine(source_affine, np.array([4.0, 3.5, 3.0]))
    target = grid(spacing, turn=turn, axis=axis)
    target[:3, 3] = middle + shift - target[:3, :3] @ [3, 3, 3]
    places, source = ramp((7, 7, 7), target), ramp(shape, source_affine)
    index = apply_affine(inverse(source_affine), places)
    within = ((index >= 0) & (index <= np.array(shape) - 1)).all(axis=-1)
    beyond = ((index < -0.501) | (index > np.array(shape) - 0.499)).any(axis=-1)
    for axis_mm in range(3):
        out = resample(source[..., axis_mm], source_affine, target, (7, 7, 7), 1, fill=-1e6)
        assert np.abs(out - places[..., axis_mm])[within].max(initial=0) < 1e-3
        assert (out[beyond] == -1e6).all()


def test_the_same_grid_gives_the_same_voxels():
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    affine = grid((0.7, 0.7, 5.0), (-123.4, 56.7, -890.1), 20)
    assert (resample(voxels, affine, affine, SHAPE, 1, fill=-1) == voxels).all()


def test_the_edge_holds_for_half_a_voxel_and_then_comes_fill():
    line = np.array([10.0, 20.0]).reshape(2, 1, 1)
    out = resample(line, np.eye(4), grid((0.25, 1, 1), (-0.75, 0, 0)), (12, 1, 1), 1, fill=-5)
    assert out.ravel().tolist() == [-5, 10, 10, 10, 12.5, 15, 17.5, 20, 20, 20, -5, -5]


def test_nearest_keeps_labels_and_their_dtype():
    labels = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.uint16)
    fine = resample(labels, np.eye(4), grid((0.5, 0.5, 0.5), (-0.25, -0.25, -0.25)), (14, 18, 10), 0, fill=0)
    assert fine.dtype == np.uint16
    assert (fine == labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)).all()


def test_slabs_join_without_a_seam(monkeypatch):
    voxels = np.random.default_rng(1).normal(size=SHAPE)
    target = grid((0.6, 0.8, 0.9), (-1, 0.3, 0.2), 15, axis=1)
    whole = resample(voxels, np.eye(4), target, (11, 9, 8), 1, fill=0)
    monkeypatch.setattr("spade3d.volumes.geometry.SLAB_VOXELS", 200)
    assert np.allclose(resample(voxels, np.eye(4), target, (11, 9, 8), 1, fill=0), whole, atol=1e-6)
