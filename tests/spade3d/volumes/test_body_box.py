"""The body box and what is cut out by it."""

import numpy as np
import pytest

from spade3d.volumes.body_box import body_box, boxed, field_of_view, in_body, otsu

AIR, TISSUE, TABLE = -1000, 40, -100


def affine(spacing, origin=(0.0, 0.0, 0.0)):
    matrix = np.diag([*spacing, 1.0])
    matrix[:3, 3] = origin
    return matrix


def patient(shape=(100, 80, 60)):
    """Air, a body in voxels 20..69, 30..59 along its whole length, and a table of two voxels below it."""
    voxels = np.full(shape, AIR, dtype=np.int16)
    voxels[20:70, 30:60] = TISSUE
    voxels[10:90, 20:22] = TABLE
    return voxels


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_body_is_found_to_a_coarse_voxel_and_the_table_falls_off(modality):
    voxels = patient() if modality == "CT" else ((patient() + 1000) / 10).astype(np.int16)
    (r0, a0, s0), (r1, a1, s1) = body_box(voxels, affine((4.0, 4.0, 4.0), (-200.0, -160.0, 50.0)), modality)
    # Voxel faces: 19.5 * 4 - 200 and 69.5 * 4 - 200; the body leaves the field of view along S.
    assert (r0, r1, a0, a1) == pytest.approx((-122, 78, -42, 78), abs=1e-9)
    assert (s0, s1) == pytest.approx((48, 288), abs=1e-9)


def test_the_box_follows_the_affine():
    voxels = patient()
    fine = body_box(np.repeat(voxels, 2, axis=0), affine((2.0, 4.0, 4.0), (-1.0, 0.0, 0.0)), "CT")
    whole = body_box(voxels, affine((4.0, 4.0, 4.0)), "CT")
    assert np.allclose(fine, whole, atol=4.0)
    turned = np.array([[0.0, -4, 0, 0], [4, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])
    (r0, a0, _), (r1, a1, _) = body_box(voxels, turned, "CT")
    assert (a0, a1) == pytest.approx((78, 278))
    assert (r0, r1) == pytest.approx((-238, -118))


def test_lungs_lie_in_the_body_and_the_air_around_it_does_not():
    voxels, grid = patient((100, 80, 20)), affine((4.0, 4.0, 4.0), (-200.0, 0.0, 0.0))
    voxels[20:35, 30:40] = AIR  # a corner of the body's box
    voxels[45:55, 40:50] = AIR  # a lung
    places = np.array(
        [[50, 45, 10], [40, 35, 10], [25, 33, 10], [15, 21, 10], [5, 5, 5], [50, 32, 0], [50, 45, 40]], float
    )
    found = in_body(places * 4 + (-200, 0, 0), voxels, grid, "CT")
    assert found.tolist() == [True, True, False, False, False, True, False]
    half = voxels[50:]  # the field of view ends within the lung: tissue is seen on three sides
    there = affine((4.0, 4.0, 4.0))
    assert in_body(np.array([[2.0, 45, 10]]) * 4, half, there, "CT").tolist() == [True]
    nothing = np.full((30, 30, 30), AIR, np.int16)
    assert in_body(np.array([[5.0, 5, 5]]) * 4, nothing, there, "CT").all()


def test_two_legs_are_one_body():
    voxels = np.full((80, 40, 40), AIR, dtype=np.int16)
    voxels[10:30, 10:30] = voxels[50:68, 10:30] = TISSUE
    (r0, _, _), (r1, _, _) = body_box(voxels, affine((4.0, 4.0, 4.0)), "CT")
    assert (r0, r1) == pytest.approx((38, 270))


def test_where_nothing_stands_out_the_box_is_the_field_of_view():
    nothing = np.full((5, 6, 7), AIR, dtype=np.int16)
    assert body_box(nothing, affine((1.0, 1.0, 8.0)), "CT") == field_of_view((5, 6, 7), affine((1.0, 1.0, 8.0)))


class Watched(np.ndarray):
    """Voxels that note how many of them are looked at at once."""

    looked: list[int] = []

    def __array_ufunc__(self, ufunc, method, *inputs, **how):
        Watched.looked.append(self.size)
        plain = [value.view(np.ndarray) if isinstance(value, Watched) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **how)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_of_a_large_scan_only_every_fiftieth_voxel_is_looked_at(modality):
    voxels = np.repeat(np.repeat(patient(), 4, axis=0), 4, axis=1)  # 400 x 320 x 60
    Watched.looked.clear()
    found = body_box(voxels.view(Watched), affine((0.9, 0.9, 3.0)), modality)
    assert found == body_box(voxels, affine((0.9, 0.9, 3.0)), modality)
    assert Watched.looked and max(Watched.looked) <= voxels.size / 50


def test_boxed_is_the_part_inside_and_its_affine_keeps_places():
    grid = affine((2.0, 3.0, 4.0), (-10.0, 5.0, 0.0))
    part, moved = boxed((40, 40, 40), grid, ((0.0, 35.0, 40.0), (20.0, 65.0, 80.0)), 0.0)
    assert part == (slice(5, 16), slice(10, 21), slice(10, 21))
    assert np.allclose(moved @ [0, 0, 0, 1], grid @ [5, 10, 10, 1])


def test_otsu_parts_two_classes_in_spite_of_a_few_hot_voxels():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 2, 5000), rng.normal(100, 5, 4000), [1e6, 1e7]])
    assert 20 < otsu(values) < 80
    assert otsu(np.full(10, 3.0)) == 3.0
