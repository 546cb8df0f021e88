"""The probes find what is there, give chance to what knows nothing, and are not fooled by where in its crop a place is
shown."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from dagman.evaluation.crop_features import Probing, best_of, tile_centres
from dagman.evaluation.equivariance import CHANGES, agreement, draw_twin, shared_places, twin_agreement
from dagman.evaluation.landmarks import landmark_errors, landmarks_of
from dagman.evaluation.probes import gains, held_out, probe, summary_of, untrained_like
from dagman.evaluation.retrieval import organ_overlap, retrieve
from spade3d.crops.correspondences import voxels_at
from spade3d.crops.crop import Box, cut
from spade3d.faults import DataFault
from spade3d.networks.features import read_at
from spade3d.networks.foreign import save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.volumes.preprocessing import Normalisation

HOW = Probing((16, 16, 16), (1.0, 1.0, 1.0), stages=(0,), crops=6, twins=3, points=64, near=2.0)


def local_filters(images):
    """An encoder that is equivariant by construction: what it says of a place depends on means over the cubes around
    it, which neither a move nor a flip changes. Random waves of these means tell places apart by cosine."""
    cubes = [(1 + r) ** 0.75 * cube_mean(images**power, r) for power in (1, 2) for r in (0, 1, 2, 3)]
    of = torch.Generator().manual_seed(0)
    waves, phase = 0.7 * torch.randn(96, len(cubes), generator=of), 6.3 * torch.rand(96, generator=of)
    return [torch.cos(torch.einsum("bcijk,fc->bfijk", torch.cat(cubes, dim=1), waves) + phase[:, None, None, None])]


def cube_mean(images, r):
    return F.avg_pool3d(F.pad(images, [r] * 6, mode="replicate"), 2 * r + 1, 1)


def patches(images):
    """An encoder that moves with the picture but does not turn with it: 27 voxels around a place, 2 apart."""
    i, j, k = images.shape[2:]
    padded = F.pad(images, [2] * 6, mode="replicate")
    shifts = [(a, b, c) for a in (0, 2, 4) for b in (0, 2, 4) for c in (0, 2, 4)]
    return [torch.cat([padded[:, :, a : a + i, b : b + j, c : c + k] for a, b, c in shifts], dim=1)]


def only_place_in_crop(images):
    """An encoder that sees nothing: what it says of a cell is where in the crop that lies."""
    axes = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in images.shape[2:]], indexing="ij"))
    return [torch.cat([axes, torch.ones_like(axes[:1])]).expand(len(images), -1, -1, -1, -1)]


def collapsed(images):
    """An encoder that says the same of everything."""
    return [torch.ones(len(images), 5, *images.shape[2:])]


def random_features():
    """An encoder whose answers have nothing to do with what it is asked."""
    of = torch.Generator().manual_seed(1)
    return lambda images: [torch.randn(len(images), 32, *images.shape[2:], generator=of)]


@pytest.fixture(scope="module")
def anatomy():
    """One texture and one organ of two parts, as three fields of view show them: images and labels."""
    texture = gaussian_filter(np.random.default_rng(0).standard_normal((48, 48, 48)), 2.0)
    parts = np.zeros(texture.shape, np.uint16)
    parts[18:26, 18:30, 20:28], parts[26:32, 18:30, 20:28] = 1, 2
    seen = [tuple(slice(start, start + 32) for start in shift) for shift in ((6, 8, 8), (9, 6, 10), (12, 11, 6))]
    return [1000 * texture[box] / texture.std() for box in seen], [parts[box] for box in seen]


@pytest.fixture(scope="module")
def patients(in_memory, anatomy):
    """Three patients who differ in their field of view."""
    images, labels = anatomy
    return in_memory(images, labels=labels, normalisation=Normalisation(0.0, 0.001, -10.0, 10.0))


def means(scores):
    return {measure: of["mean"] for measure, of in summary_of(scores).items()}


def test_overlap_of_organs_equals_its_definition():
    assert organ_overlap(np.array([[2, 2], [1, 3], [0, 5]])) == pytest.approx(
        np.array([[1, 3 / 5, 2 / 7], [3 / 5, 1, 3 / 6], [2 / 7, 3 / 6, 1]])
    )


def test_equally_near_keys_share_and_forbidden_ones_do_not_count():
    similarity = np.array([[0.5, 0.9, 0.9 + 1e-8, -np.inf]])
    assert best_of(similarity, np.array([[9.0, 1.0, 2.0, 9.0]])) == pytest.approx([1.5])


def test_retrieval_lies_between_chance_and_ceiling_and_a_collapse_is_chance(patients, in_memory, anatomy):
    shown = in_memory(anatomy[1], labels=anatomy[1])  # the labels themselves
    found, _ = retrieve(lambda images: [torch.cat([images == 1, images == 2], 1).float()], shown, range(3), HOW)
    found = means(found)
    assert found["retrieval.chance"] + 0.1 < found["retrieval.features"] <= found["retrieval.ceiling"]
    lost, left_out = retrieve(collapsed, patients, range(3), HOW)
    assert means(lost)["retrieval.features"] == pytest.approx(means(lost)["retrieval.chance"])
    assert left_out + sum(map(len, lost["retrieval.features"].values())) == 3 * HOW.crops
    with pytest.raises(DataFault, match="2 subjects are needed"):
        retrieve(collapsed, patients, [0], HOW)


def test_what_scans_cannot_answer_is_left_out_and_the_rest_is_asked(in_memory):
    """An organ through the whole scan, as the ventricle of a short-axis heart: there is no landmark to be found."""
    rng = np.random.default_rng(0)
    organ = np.zeros((16, 16, 16), np.uint16)
    organ[5:11, 5:11] = 1
    shown = in_memory([rng.integers(0, 1000, organ.shape) for _ in range(3)], labels=[organ] * 3)
    found = probe(random_features(), shown, range(3), replace(HOW, shape=(8, 8, 8)))
    assert len(found.not_asked) == 1 and "no two subjects share an organ" in found.not_asked[0]
    assert {name.split(".")[0] for name in found.scores} == {"retrieval", "equivariance"}
    assert found.left_out.keys() == {"crops without an organ", "twins too far off"}


def test_landmarks_are_centroid_and_sides_of_whole_organs(in_memory):
    labels = np.zeros((10, 12, 14), np.uint16)
    labels[2:6, 3:5, 4:9] = 3
    labels[0, 8:10, 8:10] = 4  # touches the edge
    affine = np.array([[0, 3.0, 0, 5], [2.0, 0, 0, 6], [0, 0, -1.0, 7], [0, 0, 0, 1]])  # i to the front, k to the feet
    store = in_memory([np.zeros(labels.shape)], affines=[affine], labels=[labels])
    found, cut_off = landmarks_of(store, 0)
    assert cut_off == 1 and {value for value, _ in found} == {3}
    middle = np.array([3.5, 3.5, 6]) * (2, 3, 1)
    assert found[3, "centroid"] == pytest.approx(middle)
    for side, axis, voxel in (("A", 0, 5), ("P", 0, 2), ("R", 1, 4), ("L", 1, 3), ("I", 2, 8), ("S", 2, 4)):
        expected = middle.copy()
        expected[axis] = voxel * (2, 3, 1)[axis]
        assert found[3, side] == pytest.approx(expected), side


def test_patches_find_landmarks_and_place_in_the_crop_does_not(patients):
    found = means(landmark_errors(patches, patients, range(3), replace(HOW, step=1))[0])
    for kind in ("centroid", "surface"):
        floor, error = (found[f"landmarks.{kind}.{measure}_mm"] for measure in ("floor", "features"))
        assert floor <= error < floor + 0.8, kind
        assert found[f"landmarks.{kind}.random_mm"] > 8
    fooled = means(landmark_errors(only_place_in_crop, patients, range(3), HOW)[0])
    assert fooled["landmarks.surface.features_mm"] > fooled["landmarks.surface.position_mm"] + 3
    with pytest.raises(DataFault, match="no two subjects share"):
        landmark_errors(collapsed, patients, [0], HOW)


def test_matched_points_of_a_crop_and_its_twin_are_one_place(ramps):
    rng, box = np.random.default_rng(0), Box((20.0, 21.0, 18.0), (16.0, 16.0, 16.0))
    stores = ramps((40, 40, 40), np.eye(4))
    crop = draw_twin(rng, 0, box, HOW.shape, "moved")
    for change in CHANGES:
        twin = draw_twin(rng, 0, Box((22.0, 18.0, 20.0), box.size), HOW.shape, change)
        places = shared_places(rng, stores[0].cases[0], crop, twin, 50)
        assert len(places) == 50
        for axis, store in enumerate(stores):
            for one in (crop, twin):
                image = torch.from_numpy(cut(store, one))[None, None]
                points = torch.from_numpy(voxels_at(one, places)).float()
                shown = read_at(image, points, torch.zeros(50, dtype=torch.long), one.shape)[:, 0]
                assert shown.numpy() == pytest.approx(places[:, axis], abs=1e-3), change
    assert np.linalg.det(draw_twin(rng, 0, box, HOW.shape, "scaled").to_mm[:3, :3]) != pytest.approx(1)


def test_equivariance_is_seen_where_it_is_and_nowhere_else(patients):
    equivariant, translating, chance, nothing, fooled = (
        means(twin_agreement(encoder, patients, range(3), HOW)[0])
        for encoder in (local_filters, patches, random_features(), collapsed, only_place_in_crop)
    )
    for name in (f"equivariance.{change}" for change in CHANGES):
        assert equivariant[f"{name}.features"] > 0.6 and equivariant[f"{name}.agreement"] > 0.3, name
        assert abs(chance[f"{name}.features"] - chance[f"{name}.chance"]) < 0.06
        assert abs(chance[f"{name}.agreement"]) < 0.06
        assert nothing[f"{name}.features"] == pytest.approx(nothing[f"{name}.chance"])
        assert nothing[f"{name}.agreement"] == pytest.approx(0, abs=1e-6)
        assert fooled[f"{name}.features"] < 0.4, name  # each twin lies some way off
        assert fooled[f"{name}.features"] == pytest.approx(fooled[f"{name}.position"], abs=0.05)
    assert translating["equivariance.moved.features"] > 0.8
    assert translating["equivariance.flipped.features"] < 0.3


def test_agreement_is_counted_by_hand():
    places = np.array([[0.0, 0, 0], [1.0, 0, 0], [9.0, 0, 0]])
    cosines = np.array([[0.9, 0.2, 0.1], [0.8, 0.7, 0.0], [0.9, 0.0, 0.5]])  # found, found next door, lost
    measured = agreement(cosines, places, places + (9, 0, 0), places, near_mm=1.0)
    # By its place in the crop, the first point is taken for the third one, and so are the others.
    expected = {"agreement": 0.7 - 2.0 / 6, "features": 2 / 3, "position": 1 / 3, "chance": 5 / 9}
    assert measured == pytest.approx(expected)


def test_crops_cover_a_scan_and_overlap_by_half():
    for size in (40.0, 16.0, 11.0):
        centres = tile_centres(-3.0, 32.0, size)
        low, high = centres - size / 2, centres + size / 2
        assert low[0] <= -3.0 and high[-1] >= 32.0
        assert (np.diff(centres) <= size / 2 + 1e-9).all()
    assert tile_centres(0.0, 10.0, 12.0).tolist() == [5.0]


def test_probing_a_network_and_its_untrained_twin(patients, tmp_path):
    how = Probing((16, 16, 16), (1.0, 1.0, 1.0), crops=2, twins=1, points=16, step=16)
    torch.manual_seed(3)
    network = SwinUNETR(feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=2)
    save_encoder(tmp_path / "encoder.safetensors", network)
    twin = untrained_like(tmp_path / "encoder.safetensors", 3)
    for ours, its in zip(network.swinViT.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, its)  # the very weights that a training with this seed began with
    probed = probe(twin, patients, range(2), how)
    assert probed == probe(twin, patients, range(2), how)
    assert set(probed.scores["landmarks.centroid.features_mm"]) == {"patient 0", "patient 1"}
    assert {name.split(".")[0] for name in probed.scores} == {"retrieval", "landmarks", "equivariance", "clusters"}


def test_gains_are_paired_by_subject_and_seed_and_errors_by_their_median():
    control = {s: {"x_mm": {"a": [1.0, 2.0, 99.0], "b": [4.0]}, "y": {"a": [0.1, 0.3], "b": [0.5]}} for s in (0, 1)}
    ours = {
        0: {"x_mm": {"a": [1.0, 1.0, 50.0], "b": [3.0]}, "y": {"a": [0.4, 0.4], "b": [0.7]}},
        1: {"x_mm": {"a": [2.0, 2.0, 2.0], "b": [4.0]}, "y": {"a": [0.2, 0.2], "b": [0.6]}},
    }
    found = gains(ours, control)
    assert found["x_mm"]["difference"] == pytest.approx((-1 - 1 + 0 + 0) / 4)
    assert found["y"]["by_seed"] == pytest.approx([0.2, 0.05])
    assert found["y"]["p"] == 0.5 and found["y"]["subjects"] == 2
    assert summary_of(control[0])["x_mm"]["median"] == 3.0
    without = {s: {"y": {**of["y"], "c": [math.nan]}} for s, of in ours.items()}  # a subject with nothing to measure
    beside = {s: {"y": {**of["y"], "c": [0.5]}} for s, of in control.items()}
    assert gains(without, beside)["y"] == found["y"]
    both = {name: [summary_of(*arm.values())[name]["mean"] for arm in (ours, control)] for name in ("x_mm", "y")}
    for name, (theirs, its) in both.items():  # the table's numbers differ by the table's difference
        assert theirs - its == pytest.approx(found[name]["difference"])


def test_held_out_scans_are_of_as_many_subjects_as_possible(in_memory):
    store = in_memory([np.zeros((2, 2, 2))] * 5)
    for case, subject in zip(store.cases, "aabbc", strict=True):
        case.subject = subject
    assert held_out(store.cases, range(5), 3) == (0, 2, 4)
    assert held_out(store.cases, range(5), 4) == (0, 1, 2, 4)
