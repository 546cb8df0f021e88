"""Clusters of organs: distances worked out by hand, an encoder that knows organs and one that knows nothing."""

import tracemalloc

import numpy as np
import pytest
import torch

from dagman.evaluation.clustering import cluster_scores, kmeans_agreement, organ_clusters
from dagman.evaluation.crop_features import Probing, standardised
from spade3d.faults import DataFault
from spade3d.volumes.preprocessing import Normalisation

HOW = Probing((8, 8, 8), (1.0, 1.0, 1.0), crops=4)


@pytest.fixture(scope="module")
def patients(in_memory):
    """Three patients with two organs of different brightness, at different places."""
    images, labels = [], []
    for shift in (0, 2, 4):
        image, label = np.zeros((32, 24, 24)), np.zeros((32, 24, 24), np.uint16)
        label[4 + shift : 10 + shift, 8:14, 8:14], label[20:26, 6 + shift : 12 + shift, 8:14] = 1, 2
        image[label == 1], image[label == 2] = 400, 800
        images.append(image)
        labels.append(label)
    return in_memory(images, labels=labels, normalisation=Normalisation(0.0, 0.001, -10.0, 10.0))


def test_distances_worked_out_by_hand():
    features = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0], [3.0, 0.0]])
    organs, subjects = np.array([1, 2, 1, 2]), np.array(["a", "a", "b", "b"])
    found = cluster_scores(features, organs, subjects)
    root = 2**0.5
    # a: its organ 1 is 2 from b's, its organ 2 is 4; to b's others 3 and sqrt(9 + 4)
    assert found["clusters.intra.features"]["a"] == pytest.approx([3 / root])
    assert found["clusters.inter.features"]["a"] == pytest.approx([(3 + 13**0.5) / 2 / root])
    assert found["clusters.ratio.features"]["a"] == pytest.approx([(3 + 13**0.5) / 2 / 3])


def test_many_structures_of_many_channels_need_no_memory_for_their_pairs():
    """The distances alone: 240 crops of 768 channels take 340 MiB as differences, channel by channel."""
    features = np.random.default_rng(0).normal(size=(240, 768))
    organs, subjects = np.arange(240) % 60, np.array(list("abcd")).repeat(60)
    tracemalloc.start()
    found = cluster_scores(features, organs, subjects)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 240**2 * 8
    far = [np.linalg.norm(features[:60] - features[n : n + 60], axis=1) for n in (60, 120, 180)]
    assert found["clusters.intra.features"]["a"] == pytest.approx([np.mean(far) / 768**0.5])


def test_a_subject_is_never_compared_with_itself():
    features = np.array([[0.0], [0.0], [5.0], [1.0], [7.0]])
    organs, subjects = np.array([1, 1, 2, 1, 2]), np.array(["a", "a", "a", "b", "b"])  # two scans of a show organ 1
    found = cluster_scores(features, organs, subjects)
    assert found["clusters.intra.features"]["a"] == pytest.approx([(1 + 2) / 2])  # the organ once, not twice
    assert found["clusters.intra.features"]["b"] == pytest.approx([(1 + 2) / 2])


def test_an_encoder_that_sees_organs_clusters_them_and_one_that_sees_nothing_does_not(patients):
    mean_brightness = standardised(lambda images: [images], patients, range(3), HOW)
    assert organ_clusters(mean_brightness, patients, range(3), HOW)["clusters.ratio.features"].keys() == {
        "patient 0",
        "patient 1",
        "patient 2",
    }
    of = torch.Generator().manual_seed(0)
    noise = organ_clusters(
        lambda images: [torch.randn(len(images), 256, 1, 1, 1, generator=of)], patients, range(3), HOW
    )
    for brightness, of_noise in zip(
        organ_clusters(mean_brightness, patients, range(3), HOW)["clusters.ratio.features"].values(),
        noise["clusters.ratio.features"].values(),
        strict=True,
    ):
        assert brightness[0] > 3
        assert of_noise[0] == pytest.approx(1, abs=0.1)


def test_an_encoder_that_has_collapsed_tells_nothing_apart(patients):
    found = organ_clusters(lambda images: [torch.ones(len(images), 3, 1, 1, 1)], patients, range(3), HOW)
    assert set(map(tuple, found["clusters.ratio.features"].values())) == {(1.0,)}


def test_one_subject_alone_is_refused(patients):
    with pytest.raises(DataFault, match="1 subjects with 2 organs shown whole"):
        organ_clusters(lambda images: [images], patients, [0], HOW)


def test_k_means_finds_what_lies_apart_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    organs = np.tile(np.repeat([2, 5, 7], 8), 6)
    subjects = np.repeat([f"patient {n}" for n in range(6)], 24)
    apart = 9.0 * (organs[:, None] == np.array([2, 5, 7])) + rng.standard_normal((len(organs), 3))
    found = kmeans_agreement(apart, organs, subjects, 0)
    assert all((one.mean, one.low, one.high, one.subjects) == (1, 1, 1, 6) for one in found.values())
    noise = kmeans_agreement(rng.standard_normal((len(organs), 3)), organs, subjects, 0)
    for one in noise.values():
        assert one.mean == pytest.approx(0, abs=0.1) and one.low < one.mean < one.high
    with pytest.raises(DataFault, match="6 subjects with 1 organs"):
        kmeans_agreement(apart, np.ones_like(organs), subjects, 0)
