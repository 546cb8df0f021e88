"""Sources of priors: boxes whose shares are counted by hand, and phantoms whose organs are known."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from dagman.attention.intensity_bands import Band, clusters
from dagman.attention.intensity_likelihood import BINS, bins_of, likelihoods
from dagman.attention.prior_files import check_values, covered, volume_of_files
from dagman.attention.prior_sources import atlas, bands, from_files, mean_image, one_label, own_labels
from dagman.attention.scan_blocks import body_of, largest, scan_blocks
from dagman.attention.spatial_prior import wrong_atlas
from dagman.recipes.priors import PriorSettings, build_priors
from spade3d.crops.crop import Box, Crop, box_to_mm, cut_labels, scan_bounds
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.body_box import field_of_view
from spade3d.volumes.frame_methods import place_scans
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.preprocessing import Normalisation
from spade3d.volumes.volume import Grid, write_volume

SHOWN = Normalisation(-175.0, 1 / 425, 0.0, 1.0)
NAMES = {6: "liver", 2: "right kidney", 3: "left kidney"}


def whole(store, i, shape, linear=None):
    """A crop of all that a scan shows."""
    low, high = scan_bounds(store.cases[i])
    return Crop(i, shape, box_to_mm(Box(tuple((low + high) / 2), tuple(high - low)), shape, linear))


def named(store, modality="CT"):
    for case in store.cases:
        case.modality = modality
    return store


def box_scan():
    """A body of 40 HU in air with two lungs, gas between them, a spine, and fat around it: voxels (i, j, k)."""
    voxels = np.full((24, 20, 12), -1000)
    voxels[2:22, 2:18] = -100
    voxels[4:20, 4:16] = 40
    voxels[5:9, 6:12], voxels[15:19, 6:12] = -800, -850
    voxels[11:13, 12:14, 4:6] = -700
    voxels[11:13, 5:7] = 500
    return voxels


@pytest.fixture(scope="module")
def boxes(in_memory):
    """Two scans of the same boxes, in different places; of the two labelled ones 7 is on the right and darker."""
    voxels, labels = box_scan(), np.zeros((24, 20, 12), dtype=np.uint16)
    for value, start, hu in ((7, 15, 150), (8, 5, 200)):
        box = (slice(start, start + 4), slice(13, 16), slice(4, 8))
        voxels[box], labels[box] = hu, value
    names = {7: "right kidney", 8: "left kidney", 9: "spleen"}
    there = np.diag([4.0, 4, 4, 1])
    there[:3, 3] = 100, -50, 20
    affines = [np.diag([4.0, 4, 4, 1]), there]
    return named(in_memory([voxels] * 2, affines=affines, labels=[labels] * 2, label_names=names, normalisation=SHOWN))


def frames_of(store):
    """The body box frames: they undo where the second scan lies."""
    return {i: frame.to_frame for i, frame in place_scans(store, range(len(store.cases)), "box").items()}


def test_bands_of_a_ct_are_regions_of_its_body(boxes):
    priors = bands(boxes, [0, 1])
    lung, fat, soft, bone = priors.of_crop(whole(boxes, 0, (24, 20, 12)), 1)
    voxels = boxes.images[0]
    np.testing.assert_array_equal(lung > 0, (voxels == -800) | (voxels == -850))  # not the gas, which is smaller
    np.testing.assert_array_equal(fat > 0, voxels == -100)
    np.testing.assert_array_equal(soft > 0, voxels == 40)
    np.testing.assert_array_equal(bone > 0, (voxels == 500) | (voxels == 200))
    assert {lung.max(), fat.max(), soft.max(), bone.max()} == {1.0}
    assert priors.source.startswith("intensity bands (lung -950..-500")


def test_bands_in_blocks_are_shares(boxes):
    voxels = boxes.images[0]
    priors = bands(boxes, [0, 1], {"bone": Band(200.0, 2000.0)}, resolution_mm=1e9)
    resolution = 24 * 4 / 56  # a 56th of the longest side is the coarsest
    assert scan_blocks(boxes, 0, resolution).block == (1, 1, 1)
    blocks = scan_blocks(boxes, 0, 8.0)
    assert blocks.block == (2, 2, 2) and blocks.voxels.shape == voxels.shape
    expected = (voxels >= 200).reshape(12, 2, 10, 2, 6, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(blocks.mean(voxels >= 200), expected)
    shares = priors.of_crop(whole(boxes, 0, (24, 20, 12)), 2)[0]
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    # The centre of the first block lies between the first two voxels.
    assert np.allclose(np.linalg.inv(blocks.from_scan) @ [0, 0, 0, 1], [2, 2, 2, 1])


def test_blocks_of_fine_voxels_look_at_two_along_each_axis(in_memory):
    index = np.indices((23, 8, 8))[0]
    store = in_memory([index], spacing=(1.0, 1.0, 1.0))
    blocks = scan_blocks(store, 0, 6.0)
    assert blocks.voxels[:, 0, 0].tolist() == [1, 4, 7, 10, 13, 16, 19, 22] and blocks.block == (2, 2, 2)
    assert blocks.mean(blocks.voxels)[:, 0, 0].tolist() == [2.5, 8.5, 14.5, 20.5]
    np.testing.assert_allclose(np.linalg.inv(blocks.from_scan) @ [1, 0, 0, 1], [8.5, 2.5, 2.5, 1])


def test_bands_of_an_mr_are_percentiles_of_its_body(in_memory):
    voxels = np.zeros((16, 16, 16))
    voxels[2:14, 2:14, 2:14] = 100 + 10 * np.arange(12)[:, None, None]
    voxels += np.random.default_rng(0).integers(0, 20, voxels.shape)
    store = named(in_memory([voxels], spacing=(3.0, 3.0, 3.0)), "MR")
    bright = bands(store, [0], {"bright": Band(75.0, 100.0)}).of_crop(whole(store, 0, (16, 16, 16)), 1)[0] > 0
    top = np.zeros(voxels.shape, dtype=bool)
    top[11:14, 2:14, 2:14] = True  # the last three of twelve planes
    assert (bright == top).mean() > 0.98 and not bright[:9].any() and not bright[14:].any()


def test_bands_that_cannot_be_are_refused(boxes, in_memory):
    with pytest.raises(UsageFault, match="band lung: -400 to -900.*in HU.*lower end first"):
        bands(boxes, [0], {"lung": Band(-400.0, -900.0)})
    with pytest.raises(UsageFault, match="no intensity bands"):
        bands(boxes, [0], {})
    mixed = named(in_memory([box_scan()] * 2))
    mixed.cases[1].modality = "MR"
    with pytest.raises(UsageFault, match="2 scans of CT and MR.*one modality"):
        bands(mixed, [0, 1])
    with pytest.raises(UsageFault, match="band bright: 85 to 200.*percentiles of the body"):
        bands(mixed, [1], {"bright": Band(85.0, 200.0)})


def test_the_largest_components_are_kept():
    mask = np.zeros((9, 3, 3), dtype=bool)
    mask[0], mask[2:4], mask[5, 0, 0] = True, True, True  # 9, 18 and 1 voxels
    assert largest(mask, 1).sum() == 18 and largest(mask, 2).sum() == 27 and largest(mask, None).sum() == 28
    assert largest(mask, None, 0.1).sum() == 27
    assert not largest(np.zeros((2, 2, 2), dtype=bool), 2).any()


def test_the_body_holds_its_lungs_but_not_the_table(boxes):
    voxels = box_scan()
    voxels[:, 19] = 300  # one voxel thick
    table = replace_image(boxes, voxels)
    body = body_of(scan_blocks(table, 0, 4.0), "CT")
    expected = np.zeros(voxels.shape, dtype=bool)
    expected[2:22, 2:18] = True
    np.testing.assert_array_equal(body, expected)


def replace_image(store, voxels):
    other = type(store)(store.cases, [voxels.astype(np.int16)] * 2, store.labelled, store.label_names)
    return other


def test_clusters_part_a_line():
    values = np.array([1.0, 1.1, 1.2, 5.0, 5.1, 9.0, 9.1, 9.2, 9.3])
    assert clusters(values, 3, "kmeans").tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert clusters(values, 3, "quantiles").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert clusters(values, 1, "kmeans").tolist() == [0] * 9


def test_an_atlas_is_the_frequency_of_a_structure_at_a_place(boxes):
    frames = frames_of(boxes)
    priors = atlas(boxes, [0, 1], frames, sigma_mm=0.0, resolution_mm=4.0)
    assert priors.regions == ("right kidney", "left kidney") and priors.mirror["left kidney"] == "right kidney"
    for i in (0, 1):
        shares = priors.of_crop(whole(boxes, i, (24, 20, 12)), 2)
        truth = np.stack([boxes.labels(i) == value for value in (7, 8)])
        expected = truth.reshape(2, 12, 2, 10, 2, 6, 2).mean(axis=(2, 4, 6))
        assert np.abs(shares - expected).max() < 0.15 and np.corrcoef(shares.ravel(), expected.ravel())[0, 1] > 0.98


def test_an_atlas_counts_the_scans_that_show_a_place(in_memory):
    labels = [np.zeros((20, 8, 8), dtype=np.uint16) for _ in range(4)]
    labels[0][2:6], labels[1][2:6], labels[2][12:16] = 1, 1, 1
    store = named(in_memory([np.zeros((20, 8, 8))] * 4, spacing=(4.0, 4, 4), labels=labels, label_names={1: "liver"}))
    for case in store.cases[3:]:
        case.shape = (10, 8, 8)  # this one ends half-way, and holds nothing
    store.labelled[3] = store.labelled[3][:10]
    frames = dict.fromkeys(range(4), np.eye(4))
    liver = atlas(store, [0, 1, 2, 3], frames, sigma_mm=0.0, resolution_mm=4.0).of_crop(whole(store, 0, (20, 8, 8)), 1)
    profile = liver[0, :, 4, 4]
    assert profile[3:5] == pytest.approx(2 / 4, abs=0.01) and profile[13:15] == pytest.approx(1 / 3, abs=0.01)
    assert profile[8] == profile[18] == 0


def test_one_label_is_blurred_and_asks_the_image(boxes):
    frames = frames_of(boxes)
    crop = whole(boxes, 1, (24, 20, 12))
    blurred, asked, seen = (
        one_label(boxes, 0, frames, likelihood=likelihood, sigma_mm=10.0).of_crop(crop, 1)
        for likelihood in ("location", "both", "intensity")
    )
    inside = boxes.labels(1) == 7
    assert 0.05 < blurred[0].max() < 0.9  # 16 x 12 x 16 mm under 10 mm
    assert blurred[0][~inside].sum() > blurred[0][inside].sum()  # the blur alone reaches far beyond
    assert asked[0][inside].sum() > 5 * asked[0][~inside].sum()
    assert seen[0][inside].min() > 0.9 and seen[0][boxes.images[1] == 40].max() < 0.05
    np.testing.assert_allclose(asked, blurred * seen, atol=0.02)


def test_the_likelihood_is_bayes_rule_at_even_odds(boxes):
    table = likelihoods(boxes, [0, 1], [7, 8], 4.0)
    assert table.shape == (BINS, 2) and table.min() >= 0 and table.max() <= 1
    body = body_of(scan_blocks(boxes, 0, 4.0), "CT")
    at = bins_of(np.array([150]), SHOWN)[0]
    near = np.abs(bins_of(boxes.images[0][body], SHOWN).astype(int) - at) == 0
    # All of the structure and a known share of the body lie in this bin: both are smoothed alike.
    assert table[at, 0] == pytest.approx(1 / (1 + near.mean()), abs=0.03)
    assert table[bins_of(np.array([40]), SHOWN)[0], 0] < 0.01


def test_brightness_is_read_in_its_own_modality(in_memory):
    """The same boxes as CT and as MR, where what is bright is dark: what CT teaches says nothing of MR."""
    ct, labels = box_scan(), np.zeros((24, 20, 12), dtype=np.uint16)
    for value, start, hu in ((7, 15, 150), (8, 5, 200)):
        box = (slice(start, start + 4), slice(13, 16), slice(4, 8))
        ct[box], labels[box] = hu, value
    mr, only_right = -ct, np.where(labels == 7, labels, 0)

    def asked(mr_labels, likelihood="both"):
        affines = [np.diag([4.0, 4, 4, 1])] * 2
        held = [labels, np.zeros_like(labels) if mr_labels is None else mr_labels]
        names = {7: "right kidney", 8: "left kidney"}
        store = in_memory([ct, mr], affines=affines, normalisation=SHOWN, labels=held, label_names=names)
        store.cases[0].modality, store.cases[1].modality = "CT", "MR"
        labelled = [0] if mr_labels is None else [0, 1]
        priors = atlas(store, labelled, {0: np.eye(4), 1: np.eye(4)}, likelihood=likelihood, resolution_mm=4.0)
        return priors, [priors.of_crop(whole(store, i, (24, 20, 12)), 1) for i in (0, 1)]

    location = asked(None, "location")[1][1]
    priors, (of_ct, of_mr) = asked(None)
    assert priors.source.endswith("by location alone: everything in MR (no such scan is labelled)")
    np.testing.assert_allclose(of_mr, location, atol=1 / 255)
    assert np.abs(of_ct - location).max() > 0.1
    priors, (_, of_mr) = asked(None, "intensity")
    assert "not known: everything in MR" in priors.source and not of_mr.any()

    priors, (_, of_mr) = asked(only_right)
    assert priors.source.endswith("by location alone: left kidney in MR (no such scan is labelled)")
    there, bin_of = labels == 7, bins_of(np.array([-150]), SHOWN)[0]
    own, its = (
        likelihoods(named(in_memory([image], labels=[of], normalisation=SHOWN), kind), [0], [7], 4.0)[bin_of, 0]
        for kind, image, of in (("MR", mr, only_right), ("CT", ct, labels))
    )
    assert own > 0.8 and its < 0.1  # what CT knows of this brightness would hide the kidney
    blurred = asked(only_right, "location")[1][1]
    np.testing.assert_allclose(of_mr[0][there].mean(), own * blurred[0][there].mean(), rtol=0.1)
    np.testing.assert_allclose(of_mr[1][labels == 8].mean(), blurred[1][labels == 8].mean(), rtol=0.1)
    assert "no such scan" not in asked(labels)[0].source


def test_a_scan_without_a_frame_switches_its_heads_off(boxes):
    frames = frames_of(boxes) | {1: None}
    crop = whole(boxes, 1, (24, 20, 12))
    sources = [
        atlas(boxes, [0, 1], frames),
        one_label(boxes, 0, frames),
        mean_image(boxes, [0, 1], frames),
    ]
    for priors in sources:
        assert not priors.of_crop(crop, 4).any()
        assert priors.of_crop(replace(crop, case=0), 4).any()
    assert one_label(boxes, 0, {0: None, 1: None}, likelihood="intensity").of_crop(crop, 4).any()
    with pytest.raises(DataFault, match="none of the scans.*scan 1.*could be placed"):
        one_label(boxes, 1, frames)
    with pytest.raises(UsageFault, match="scan 1: no body frame was looked for"):
        atlas(boxes, [0], {0: np.eye(4)}).of_crop(crop, 4)


def test_structures_that_are_not_there_are_refused(boxes, in_memory):
    frames = frames_of(boxes)
    with pytest.raises(
        UsageFault, match="a prior for heart: not in the label table.*right kidney, left kidney, spleen"
    ):
        atlas(boxes, [0, 1], frames, regions=["left_kidney", "heart"])
    with pytest.raises(DataFault, match="none of the labelled scans .scan 0, scan 1. holds spleen"):
        atlas(boxes, [0, 1], frames, regions=["spleen"])
    assert atlas(boxes, [0], frames, regions=["kidney_left"]).regions == ("left kidney",)
    with pytest.raises(UsageFault, match="'all'.*location, intensity, both"):
        atlas(boxes, [0], frames, likelihood="all")
    unlabelled = named(in_memory([box_scan()]))
    with pytest.raises(DataFault, match="scan 0: has no labels"):
        one_label(unlabelled, 0, {0: np.eye(4)})


def test_the_mean_image_is_parted_by_its_brightness(boxes):
    priors = mean_image(boxes, [0, 1], frames_of(boxes), regions=3, resolution_mm=4.0)
    assert priors.regions == ("brightness 1 of 3", "brightness 2 of 3", "brightness 3 of 3")
    shares = priors.of_crop(whole(boxes, 1, (24, 20, 12)), 1)
    brightness = [boxes.images[1][share > 0.9].mean() for share in shares]
    assert brightness == sorted(brightness) and brightness[2] - brightness[0] > 100
    assert not shares[:, boxes.images[1] == -1000].max() > 0.7  # the air about the body is none of them
    with pytest.raises(UsageFault, match="'median'.*kmeans or quantiles"):
        mean_image(boxes, [0], frames_of(boxes), by="median")
    with pytest.raises(UsageFault, match="0 bands"):
        mean_image(boxes, [0], frames_of(boxes), regions=0)


def test_the_mean_of_ct_and_mr_is_refused_as_their_bands_are(in_memory):
    mixed = named(in_memory([box_scan()] * 2, normalisation=SHOWN))
    mixed.cases[1].modality = "MR"
    with pytest.raises(UsageFault, match="2 scans of CT and MR.*one modality"):
        mean_image(mixed, [0, 1], frames_of(mixed))
    assert mean_image(mixed, [1], frames_of(mixed), resolution_mm=4.0).regions


@pytest.fixture(scope="module")
def abdomens(in_memory):
    """Four phantoms of 8 mm."""
    drawn = [phantom("abdomen-ct", seed, shape=(48, 40, 36), spacing=(8.0, 8.0, 8.0)) for seed in (3, 4, 5, 6)]
    labels = [np.where(np.isin(one.labels, list(NAMES)), one.labels, np.uint16(0)) for one in drawn]
    return named(
        in_memory(
            [one.voxels for one in drawn],
            affines=[one.affine for one in drawn],
            labels=labels,
            label_names=NAMES,
            normalisation=SHOWN,
        )
    )


def average_precision(score, truth):
    hit = truth.ravel()[np.argsort(-score.ravel(), kind="stable")]
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())


def test_priors_of_other_patients_find_the_organs_and_wrong_ones_do_not(abdomens):
    frames = frames_of(abdomens)
    crop = whole(abdomens, 3, (48, 40, 36))
    liver = cut_labels(abdomens, crop) == 6
    found = {
        name: average_precision(priors.of_crop(crop, 1)[list(priors.regions).index("liver")], liver)
        for name, priors in {
            "atlas": atlas(abdomens, [0, 1, 2], frames),
            "one label": one_label(abdomens, 0, frames, likelihood="location"),
            "and intensity": one_label(abdomens, 0, frames),
            "permuted": wrong_atlas(atlas(abdomens, [0, 1, 2], frames), "permuted"),
            "shifted": wrong_atlas(atlas(abdomens, [0, 1, 2], frames), "shifted"),
        }.items()
    }
    assert found["atlas"] > 0.6 and found["and intensity"] > found["one label"] > 4 * liver.mean()
    assert max(found["permuted"], found["shifted"]) < found["one label"] / 3


def test_a_mirrored_crop_has_the_kidneys_changed_over(abdomens):
    priors = one_label(abdomens, 0, frames_of(abdomens), regions=["right kidney", "left kidney"])
    plain, mirrored = (
        priors.of_crop(whole(abdomens, 1, (48, 40, 36), linear), 4) for linear in (None, np.diag([-1.0, 1, 1]))
    )
    np.testing.assert_allclose(mirrored[0], np.flip(plain[1], 0), atol=1e-6)
    # In the mirrored picture, too, what is called the left kidney lies towards the first voxels.
    side = [np.average(np.arange(12), weights=share.sum(axis=(1, 2))) for share in mirrored]
    assert side[1] < 5.5 < side[0]


def test_priors_go_to_workers(boxes):
    frames, crop = frames_of(boxes), whole(boxes, 1, (24, 20, 12))
    for priors in (bands(boxes, [0, 1]), atlas(boxes, [0], frames), one_label(boxes, 0, frames)):
        here = priors.of_crop(crop, 4)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(priors)).of_crop(crop, 4), here)


def test_a_scans_own_labels_are_its_prior_and_of_others_nothing_is_known(boxes):
    priors = own_labels(boxes, [1], ["left kidney", "right kidney"], resolution_mm=4.0)
    assert priors.regions == ("left kidney", "right kidney")
    truth = np.stack([boxes.labels(1) == 8, boxes.labels(1) == 7])
    np.testing.assert_allclose(priors.of_crop(whole(boxes, 1, (24, 20, 12)), 1), truth, atol=1e-5)
    assert not priors.of_crop(whole(boxes, 0, (24, 20, 12)), 1).any()
    halves = own_labels(boxes, [1], ["right kidney"], resolution_mm=8.0).of_crop(whole(boxes, 1, (12, 10, 6)), 1)
    np.testing.assert_allclose(halves.sum(), truth[1].sum() / 8, rtol=0.02)  # shares of blocks of 2 x 2 x 2 voxels
    with pytest.raises(DataFault, match="spleen"):
        own_labels(boxes, [0, 1], ["spleen"])


@pytest.mark.parametrize("mm", [1.0, 0.7])
def test_blocks_of_fine_labels_lie_where_those_of_the_image_do(in_memory, mm):
    labels = np.zeros((33, 29, 21), dtype=np.uint16)
    labels[8:20, 6:20, 4:16] = 7
    image = np.where(labels == 7, 200, -1000)
    affine = np.diag([mm, mm, mm, 1.0])
    store = named(in_memory([image], affines=[affine], labels=[labels], label_names={7: "liver"}, normalisation=SHOWN))
    priors = own_labels(store, [0], resolution_mm=4.0)
    crop = whole(store, 0, (11, 10, 7))
    share = priors.of_crop(crop, 1)[0]
    centre = np.argwhere(labels == 7).mean(axis=0)
    found = (share[..., None] * np.moveaxis(np.indices(share.shape), 0, -1)).sum((0, 1, 2)) / share.sum()
    there = crop.to_mm @ [*found, 1]
    np.testing.assert_allclose(there[:3] / mm, centre, atol=0.6)  # voxels; a stride's offset would be 1


def test_priors_from_files_lie_where_their_headers_say(boxes, tmp_path):
    for value, name in ((7, "right"), (8, "left")):
        mask = (boxes.labels(0) == value).astype(np.uint8)
        write_volume(tmp_path / f"{name}.nii.gz", mask[::-1], boxes.cases[0].affine @ flipped(24))
    files = {f"{name} kidney": tmp_path / f"{name}.nii.gz" for name in ("right", "left")}
    truth = np.stack([boxes.labels(0) == 7, boxes.labels(0) == 8])
    of_scan = from_files(boxes, {"scan 0": files})
    np.testing.assert_allclose(of_scan.of_crop(whole(boxes, 0, (24, 20, 12)), 1), truth, atol=1e-5)
    assert not of_scan.of_crop(whole(boxes, 1, (24, 20, 12)), 1).any()  # nothing was given for it
    frames = frames_of(boxes)
    there = {i: np.linalg.inv(frames[0]) @ frame for i, frame in frames.items()}  # the frame is the first scan's mm
    in_frame = from_files(boxes, files, there)
    np.testing.assert_allclose(in_frame.of_crop(whole(boxes, 1, (24, 20, 12)), 1), truth, atol=1e-5)


def flipped(size):
    """The affine of an array that was turned round along i."""
    matrix = np.diag([-1.0, 1, 1, 1])
    matrix[0, 3] = size - 1
    return matrix


def moved(affine, voxels):
    """The affine of a grid that begins some voxels further."""
    there = affine.copy()
    there[:3, 3] += affine[:3, :3] @ voxels
    return there


def test_what_a_file_covers_is_counted_within_the_body_of_an_oblique_scan():
    c, s = np.cos(np.pi / 4), np.sin(np.pi / 4)
    affine = np.array([[2 * c, -2 * s, 0, 5], [2 * s, 2 * c, 0, -7], [0, 0, 3.0, 1], [0, 0, 0, 1]])
    shape = (32, 32, 16)
    case = SimpleNamespace(shape=shape, affine=affine, body_box_mm=field_of_view(shape, affine))
    assert covered(case, Grid(shape, affine)) == 1
    assert covered(case, Grid((16, 32, 16), affine)) == covered(case, Grid(shape, moved(affine, (0, 0, 8)))) == 0.5
    assert covered(case, Grid(shape, moved(affine, (32, 0, 0)))) == 0
    straight = np.diag([2.0, 2, 3, 1])
    low, high = field_of_view((16, 32, 16), straight)
    half = SimpleNamespace(shape=shape, affine=straight, body_box_mm=(low, high))  # air beyond it
    assert covered(half, Grid((16, 32, 16), straight)) == 1
    thin = SimpleNamespace(shape=shape, affine=straight, body_box_mm=(low, (high[0], high[1], low[2] + 0.1)))
    assert covered(thin, Grid(shape, straight)) == 1


def test_scans_that_reach_beyond_their_files_are_named(boxes, tmp_path, capsys):
    for n in (0, 1):
        (tmp_path / f"scan {n}").mkdir()
    for n, low in ((0, 0), (1, 5)):
        affine = moved(boxes.cases[n].affine, (low, 0, 0))
        write_volume(tmp_path / f"scan {n}" / "liver.nii.gz", np.ones((24, 20, 12), dtype=np.uint8), affine)
    settings = PriorSettings(source="files", folder=str(tmp_path))
    assert build_priors(settings, boxes, [0, 1], {}).regions == ("liver",)
    said = "note: prior files cover less than 90 % of the body in 1 of 2 scans (scan 1 81 %); beyond them no head is"
    assert said in capsys.readouterr().err


def test_files_that_do_not_fit_are_refused(boxes, tmp_path):
    here, elsewhere = tmp_path / "here.nii.gz", tmp_path / "elsewhere.nii.gz"
    write_volume(here, np.full((24, 20, 12), 3.0, dtype=np.float32), boxes.cases[0].affine)
    write_volume(elsewhere, np.ones((24, 20, 10), dtype=np.uint8), np.diag([4.0, 4, 4, 1]) + 1e3 * np.eye(4, k=3))
    with pytest.raises(DataFault, match="elsewhere.nii.gz: lies on another grid than.*here.nii.gz: shape"):
        from_files(boxes, {"scan 0": {"liver": here, "spleen": elsewhere}})
    with pytest.raises(DataFault, match="elsewhere.nii.gz: lies from .998.*the scan scan 0 from .-2"):
        from_files(boxes, {"scan 0": {"liver": elsewhere}})
    corner, shifted = tmp_path / "corner.nii.gz", tmp_path / "shifted.nii.gz"
    write_volume(corner, np.ones((10, 10, 10), dtype=np.uint8), boxes.cases[0].affine)
    write_volume(shifted, np.ones((24, 20, 12), dtype=np.uint8), moved(boxes.cases[0].affine, (14, 0, 0)))
    for path, share in ((corner, 18), (shifted, 44)):
        needed = (
            f"{path.name}: lies from .* so that {share} % of the scan's body box is covered; .* cover 50 %: resample"
        )
        with pytest.raises(DataFault, match=needed):
            from_files(boxes, {"scan 0": {"liver": path}})
    with pytest.raises(DataFault, match="here.nii.gz: values from 3 to 3 for liver; .*: divide it by its maximum"):
        from_files(boxes, {"scan 0": {"liver": here}}).of_crop(whole(boxes, 0, (8, 8, 8)), 2)
    with pytest.raises(UsageFault, match="scan 7: priors for a scan that the store does not hold"):
        from_files(boxes, {"scan 7": {"liver": here}})
    with pytest.raises(UsageFault, match="scan 1: priors for .'spleen'.*'liver'"):
        from_files(boxes, {"scan 0": {"liver": here}, "scan 1": {"spleen": here}})
    with pytest.raises(UsageFault, match="`frames` is needed"):
        from_files(boxes, {"liver": here})
    with pytest.raises(UsageFault, match="leave `frames` out"):
        from_files(boxes, {"scan 0": {"liver": here}}, {0: np.eye(4)})
    with pytest.raises(UsageFault, match="no files"):
        from_files(boxes, {})


def test_values_of_files_that_are_no_prior_are_said_by_file_region_and_place(tmp_path):
    voxels = np.full((6, 5, 4), 0.5, dtype=np.float32)

    def file(name, values):
        nib.save(nib.Nifti1Image(values, np.diag([4.0, 4, 4, 1])), tmp_path / f"{name}.nii.gz")
        return {"liver": tmp_path / f"{name}.nii.gz"}

    for n, (where, value, said) in enumerate(
        [
            ((1, 2, 3), np.nan, r"1 of 120 voxels for liver are NaN or Inf, the first at \(1, 2, 3\); write 0"),
            ((0, 0, 1), np.inf, r"1 of 120 voxels for liver are NaN or Inf, the first at \(0, 0, 1\); write 0"),
            ((0, 0, 0), -2, "values from -2 to 0.5 for liver; a prior holds 0 to 1: set what is below to 0, and"),
            ((0, 0, 0), 255, "values from 0.5 to 255 for liver; a prior holds 0 to 1: divide it by its maximum"),
        ]
    ):
        values = voxels.copy()
        values[where] = value
        wrong, fine = file(n, values), file("fine", voxels)
        with pytest.raises(DataFault, match=f"{n}.nii.gz: {said}"):
            volume_of_files(wrong, 4.0)
        with pytest.raises(DataFault, match=f"{n}.nii.gz: {said}"):
            check_values({"a": fine, "b": wrong}, most=240)
        check_values({"a": fine, "b": wrong}, most=120)  # reads every second scan
