"""Preprocessing: exact places, stated rounding, and every unusable scan refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.preprocessing import Normalisation, Preprocessing, choose_spacing, foreground_of
from spade3d.volumes.volume import Grid, Volume

LPS = np.array([[-0.8, 0, 0, 90.0], [0, -0.8, 0, 110.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]])
OBLIQUE = np.array([[0.96, -0.56, 0, 7.0], [0.28, 1.92, 0, -3.0], [0, 0, 3.0, 11.0], [0, 0, 0, 1]])


def volume(voxels, affine=LPS, modality="MR"):
    return Volume(np.asarray(voxels), affine, modality, "P1", Path("P1.nii.gz"))


def places(shape, affine):
    """Each voxel's own place in mm, (i, j, k, 3)."""
    return apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(float))


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["flipped", "oblique"])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5), (0.5, 3.0, 1.0)])
@pytest.mark.parametrize("axis", range(3))
def test_every_stored_voxel_lies_where_its_affine_says(affine, spacing, axis):
    """The ramp: each voxel holds its own place in mm. Stored in steps of 1/100 HU by scaling, so exact to 0.005 mm."""
    shape = (30, 26, 14)
    ramp = places(shape, affine)[..., axis]
    prepared = Preprocessing(spacing=spacing).prepare(volume(ramp * 100, affine, "CT"))
    if spacing is not None:
        assert np.allclose(np.linalg.norm(prepared.affine[:3, :3], axis=0), spacing)
    inside = np.abs(ramp * 100).max() < 32767
    assert inside
    expected = places(prepared.voxels.shape, prepared.affine)[..., axis]
    assert np.abs(prepared.voxels / 100 - expected).max() <= 0.0051
    assert (np.diag(prepared.affine)[:3] > 0).all()
    assert prepared.source_grid.shape == shape
    assert np.array_equal(prepared.source_grid.affine, affine)


def test_labels_move_with_their_image_and_are_never_mixed():
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 4, (12, 10, 8)) * 7
    prepared = Preprocessing(spacing=(1.0, 1.0, 1.0)).prepare(volume(voxels * 100.0, modality="CT"), voxels)
    assert prepared.labels.shape == prepared.voxels.shape
    assert prepared.labels.dtype == np.uint16
    assert set(np.unique(prepared.labels)) <= {0, 7, 14, 21}
    same = Preprocessing().prepare(volume(voxels * 100, modality="CT"), voxels)
    assert np.array_equal(same.labels * 100, same.voxels)


def test_preparing_a_flipped_scan_gives_the_same_result():
    voxels = np.random.default_rng(0).normal(100, 30, (13, 12, 11))
    ras = np.diag([1.1, 1.3, 2.0, 1.0])
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = 12
    one = Preprocessing(spacing=(0.9, 1.0, 1.5)).prepare(volume(voxels, ras))
    two = Preprocessing(spacing=(0.9, 1.0, 1.5)).prepare(volume(voxels[::-1], ras @ flip))
    assert np.allclose(one.affine, two.affine)
    assert np.abs(one.voxels.astype(int) - two.voxels).max() <= 1  # one step of rounding


def test_a_spacing_that_is_already_there_changes_nothing():
    voxels = np.random.default_rng(0).integers(-1000, 1500, (9, 8, 7))
    prepared = Preprocessing(spacing=(0.8004, 0.7996, 2.5)).prepare(volume(voxels, modality="CT"))
    assert np.array_equal(prepared.voxels, voxels[::-1, ::-1])


def test_ct_is_kept_in_hounsfield_units_and_shown_through_the_window():
    voxels = np.array([-3024.0, -175, 37.5, 250.4, 3000, 99999]).repeat(9).reshape(6, 3, 3)
    prepared = Preprocessing().prepare(volume(voxels, np.eye(4), "CT"))
    assert prepared.voxels[:, 0, 0].tolist() == [-3024, -175, 38, 250, 3000, 32767]
    assert prepared.rounding == 0.5
    assert prepared.normalisation.intensity(prepared.voxels)[:, 0, 0] == pytest.approx([0, 0, 213 / 425, 1, 1, 1])


def test_an_unknown_modality_is_told_from_the_voxels():
    rng = np.random.default_rng(0)
    assert Preprocessing().prepare(volume(rng.integers(-1000, 400, (8, 8, 8)), modality="unknown")).modality == "CT"
    assert Preprocessing().prepare(volume(rng.integers(0, 400, (8, 8, 8)), modality="unknown")).modality == "MR"


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32]),
        (4, 5, 6),
        elements=st.integers(0, 255),
    ).filter(lambda a: a.min() < a.max())
)
@settings(max_examples=40, deadline=None)
def test_integers_within_int16_are_stored_as_they_are(voxels):
    prepared = Preprocessing().prepare(volume(voxels, np.eye(4)))
    assert np.array_equal(prepared.voxels, voxels)
    assert prepared.rounding == 0


@given(st.integers(0, 2**32 - 1), st.sampled_from(["percentile", "zscore"]), st.floats(1e-6, 1e6), st.floats(-1e4, 1e4))
@settings(max_examples=40, deadline=None)
def test_rounding_stays_within_what_is_promised(seed, mr, scale, shift):
    """Also with one voxel a million times as bright as the others, which would eat all the steps."""
    voxels = np.random.default_rng(seed).gamma(2.0, scale, (8, 9, 10)) + shift
    voxels[0, 0, 0] = scale * 1e6 + shift
    prepared = Preprocessing(mr=mr).prepare(volume(voxels, np.eye(4)))
    norm = prepared.normalisation
    step = 2 * prepared.rounding
    assert norm.scale <= 3 * (norm.high - norm.low) / 65535 * 1.000001
    low_raw = voxels.min() if mr == "zscore" else np.percentile(voxels, 0.5)
    if mr == "percentile":
        exact = np.clip((voxels - low_raw) * norm.scale / step, 0, 1)
        assert np.abs(norm.intensity(prepared.voxels) - exact).max() <= 2.3e-5 + 1e-6
    intensities = norm.intensity(prepared.voxels)
    assert norm.low - 1e-6 <= intensities.min()
    assert intensities.max() <= norm.high + 1e-6


@given(
    hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-(2.0**96), 2.0**96, width=32)),
    st.sampled_from(["percentile", "zscore"]),
    st.sampled_from([None, (0.7, 1.0, 1.3)]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_values_the_intensities_are_finite_and_within_their_limits(voxels, mr, spacing):
    assume(float(voxels.max()) - float(voxels.min()) > 1e-29)
    prepared = Preprocessing(mr=mr, spacing=spacing).prepare(volume(voxels, np.eye(4)))
    norm = prepared.normalisation
    intensities = norm.intensity(prepared.voxels)
    assert np.isfinite([norm.offset, norm.scale]).all()
    assert np.isfinite(intensities).all()
    assert norm.low <= intensities.min()
    assert intensities.max() <= norm.high


def test_percentiles_are_those_of_the_foreground_above_and_of_all_below():
    rng = np.random.default_rng(0)
    voxels = np.abs(rng.normal(0, 3, (40, 40, 40)))
    voxels[10:20, 10:30, 10:30] = rng.normal(500, 100, (10, 20, 20))
    few_bright = Preprocessing().prepare(volume(voxels, np.eye(4))).normalisation
    top = few_bright.offset + 1 / few_bright.scale
    prepared = Preprocessing().prepare(volume(voxels, np.eye(4)))
    tissue = prepared.voxels[10:20, 10:30, 10:30]
    assert (tissue > top).mean() < 0.06  # without a foreground it would be nearer to 6 % of all: blown out
    assert prepared.normalisation.intensity(prepared.voxels)[voxels < 1].max() < 0.01


def test_zscore_is_of_the_foreground():
    rng = np.random.default_rng(0)
    voxels = np.zeros((20, 20, 20))
    voxels[5:15] = rng.normal(300, 20, (10, 20, 20))
    prepared = Preprocessing(mr="zscore").prepare(volume(voxels, np.eye(4)))
    tissue = prepared.normalisation.intensity(prepared.voxels)[5:15]
    assert abs(tissue.mean()) < 1e-3
    assert abs(tissue.std() - 1) < 1e-3
    assert prepared.normalisation.intensity(prepared.voxels).min() == -5


def test_foreground_needs_a_background_peak():
    crop = np.random.default_rng(0).normal(500, 30, 10000)
    assert foreground_of(crop).size == crop.size
    assert foreground_of(np.concatenate([np.zeros(5000), crop])).size == crop.size


def test_cropping_to_the_body_keeps_places_and_labels():
    voxels = np.full((60, 50, 40), -1000)
    voxels[20:40, 15:35] = 40
    labels = (voxels > 0).astype(np.uint8)
    whole = Preprocessing().prepare(volume(voxels, np.diag([4.0, 4, 4, 1]), "CT"), labels)
    part = Preprocessing(crop_to_body=True).prepare(volume(voxels, np.diag([4.0, 4, 4, 1]), "CT"), labels)
    assert part.voxels.shape == (26, 26, 40)  # 10 mm of margin either way
    assert part.labels.sum() == labels.sum()
    assert part.body_box_mm == whole.body_box_mm
    assert np.allclose(part.affine[:3, 3], [17 * 4, 12 * 4, 0])


def test_unusable_scans_are_refused_with_what_was_found():
    good = np.random.default_rng(0).integers(0, 100, (6, 6, 6))

    def refusal(voxels, labels=None, modality="MR", **settings):
        with pytest.raises(DataFault) as refused:
            Preprocessing(**settings).prepare(volume(voxels, np.eye(4), modality), labels)
        assert str(refused.value).startswith("P1.nii.gz: ")
        assert "\n" not in str(refused.value)
        return str(refused.value)

    broken = good.astype(float)
    broken[0, 0, :3] = np.nan, np.inf, -np.inf
    assert "3 of 216 voxels are NaN or Inf" in refusal(broken)
    assert "constant, every voxel is 4" in refusal(np.full((4, 4, 4), 4))
    assert "shape 6x6x1" in refusal(good[..., :1])
    assert "shape 6x6" in refusal(good[0])
    assert "no measurement" in refusal(good * 1e35)
    assert "constant" in refusal(good * 1e-300)
    assert "Hounsfield" in refusal(good / 100, modality="CT")
    assert "labels 5x6x6" in refusal(good, good[:5])
    assert "label values -1 to" in refusal(good, good - 1 - good.min())
    assert "leave 1x1x1 at 9" in refusal(good, spacing=(9.0, 9.0, 9.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"spacing": (1.0, 0.0, 1.0)},
        {"spacing": (1.0, 1.0, float("nan"))},
        {"window_hu": (250.0, -175.0)},
        {"percentiles": (0.5, 101.0)},
        {"mr": "minmax"},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UsageFault, match=next(iter(settings))):
        Preprocessing(**settings)


def test_settings_survive_json_and_have_a_fingerprint():
    one = Preprocessing(spacing=(1.5, 1.5, 2.0), mr="zscore")
    again = Preprocessing.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one
    assert again.fingerprint() == one.fingerprint()
    assert one.fingerprint() != Preprocessing(spacing=(1.5, 1.5, 2.001), mr="zscore").fingerprint()
    with pytest.raises(DataFault, match="newer spade3d"):
        Preprocessing.from_dict(one.to_dict() | {"version": 99})
    with pytest.raises(DataFault, match="denoise"):
        Preprocessing.from_dict(one.to_dict() | {"denoise": True})


def test_the_chosen_spacing_is_the_median_along_the_bodys_axes():
    turned = np.array([[0, 0, 5.0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])  # stored A, S, R
    grids = [Grid((4, 4, 4), matrix) for matrix in (turned, np.diag([1.0, 1, 1, 1]), np.diag([-3.0, 3, 3, 1]))]
    assert choose_spacing(grids) == (3.0, 1.0, 2.0)


def test_normalisation_is_plain_arithmetic():
    stored = np.array([-10, 0, 5, 30], dtype=np.int16)
    assert Normalisation(0.0, 0.1, 0.0, 1.0).intensity(stored).tolist() == pytest.approx([0, 0, 0.5, 1])
