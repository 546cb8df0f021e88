"""Attention judged as segmentation: which crops count, and what maps of cells can reach."""

import numpy as np
import pytest
import torch

from dagman.attention.maps import Looker, enlarged
from dagman.attention.semantic import SemanticAttention
from dagman.attention.spatial_prior import Priors, PriorVolume
from dagman.evaluation.attention_precision import (
    attention_precision,
    heads_of,
    prior_alone,
    truth_on_cells,
)
from dagman.evaluation.average_precision import average_precision
from dagman.evaluation.crop_features import Probing
from dagman.evaluation.retrieval import draw_crops
from spade3d.crops.crop import cut, cut_labels
from spade3d.faults import DataFault
from spade3d.networks.swin import SwinTransformer

HOW = Probing((16, 16, 16), (1.0, 1.0, 1.0), crops=5)
ORGANS = {"ball": 1, "cube": 2}


@pytest.fixture(scope="module")
def patients(in_memory):
    """Three scans with a ball and a cube, of which the third has no cube."""
    images, labels = [], []
    for n in range(3):
        places = np.stack(np.meshgrid(*[np.arange(28)] * 3, indexing="ij"))
        one = np.zeros((28, 28, 28), np.uint16)
        one[np.linalg.norm(places - np.array([9 + n, 12, 12])[:, None, None, None], axis=0) < 6] = 1
        if n < 2:
            one[18:25, 14:22, 12 + n : 20 + n] = 2
        labels.append(one)
        images.append(1000.0 * one)
    return in_memory(images, labels=labels)


def test_precision_is_of_the_crops_that_show_the_organ_pooled_and_one_by_one(patients):
    noise = {case: np.random.default_rng(case) for case in range(3)}
    drawn = {}

    def maps_of(crops):
        maps = np.stack([noise[crop.case].random((2, *crop.shape)) for crop in crops])
        drawn.setdefault(crops[0].case, []).append(maps)
        return maps

    found = attention_precision(maps_of, patients, [0, 1, 2], HOW, ORGANS)
    assert set(found.pooled["ball"]) == {"patient 0", "patient 1", "patient 2"}
    assert set(found.pooled["cube"]) == {"patient 0", "patient 1"}
    for case in range(2):
        crops, maps = draw_crops(patients, case, HOW), np.concatenate(drawn[case])
        for organ, value in ORGANS.items():
            truth = [cut_labels(patients, crop) == value for crop in crops]
            shown = [n for n, one in enumerate(truth) if one.any()]
            for m in range(2):
                pooled = average_precision(
                    np.concatenate([maps[n, m].ravel() for n in shown]),
                    np.concatenate([truth[n].ravel() for n in shown]),
                )
                assert found.pooled[organ][f"patient {case}"][m] == pytest.approx(pooled)
                within = np.mean([average_precision(maps[n, m], truth[n]) for n in shown])
                assert found.within[organ][f"patient {case}"][m] == pytest.approx(within)


def test_crops_that_show_too_little_of_an_organ_do_not_count(patients):
    shares = {
        case: [(cut_labels(patients, crop) == 1).mean() for crop in draw_crops(patients, case, HOW)] for case in (0, 1)
    }
    least = float(np.median([share for of in shares.values() for share in of]))
    found = attention_precision(
        lambda crops: np.zeros((len(crops), 1, 16, 16, 16)), patients, [0, 1], HOW, {"ball": 1}, least
    )
    for case, of in shares.items():
        counted = [share for share in of if share >= least]
        if counted:  # what says nothing gets the prevalence
            assert found.pooled["ball"][f"patient {case}"] == [pytest.approx(np.mean(counted))]
        else:
            assert f"patient {case}" not in found.pooled["ball"]


def test_an_organ_that_nobody_shows_and_a_scan_without_labels_are_said(patients, in_memory):
    def nothing(crops):
        return np.zeros((len(crops), 1, 16, 16, 16))

    with pytest.raises(DataFault, match="no crop of 1 scans shows cube"):
        attention_precision(nothing, patients, [2], HOW, ORGANS)
    bare = in_memory([np.zeros((28, 28, 28))])
    with pytest.raises(DataFault, match="no labels"):
        attention_precision(nothing, bare, [0], HOW, ORGANS)


def test_cells_limit_what_a_map_can_reach_and_the_right_prior_reaches_it(patients):
    on_voxels = attention_precision(truth_on_cells(patients, ORGANS, (1, 1, 1)), patients, [0, 1], HOW, ORGANS)
    on_cells = attention_precision(truth_on_cells(patients, ORGANS, (4, 4, 4)), patients, [0, 1], HOW, ORGANS)
    true = {case: 255 * np.stack([patients.labels(case) == value for value in (1, 2)], axis=-1) for case in (0, 1)}
    priors = Priors(
        ("ball", "cube"),
        {"ball": "ball", "cube": "cube"},
        "the truth",
        patients,
        lambda case: PriorVolume(np.ascontiguousarray(true[case].astype(np.uint8)), np.eye(4)),
    )
    told = attention_precision(prior_alone(priors, (4, 4, 4)), patients, [0, 1], HOW, ORGANS)
    for m, organ in enumerate(ORGANS):
        for subject, precision in on_cells.pooled[organ].items():
            assert on_voxels.pooled[organ][subject][m] == pytest.approx(1)
            assert 0.5 < precision[m] < 0.99
            # A prior is read between voxels, labels at the nearest: half a voxel of difference in place.
            assert told.pooled[organ][subject][m] == pytest.approx(precision[m], abs=0.1)
            assert precision[m] > precision[1 - m]  # the other organ's map is not this one's


def test_maps_of_a_network_are_the_mean_over_heads_then_each_head(patients):
    torch.manual_seed(0)
    encoder = SwinTransformer(1, 12, heads=(3, 2, 4, 6), window=(3, 3, 3)).eval()
    looker = Looker(encoder, 1, SemanticAttention(24, heads=4).eval())
    crops = draw_crops(patients, 0, HOW)[:2]
    found = heads_of(looker, patients)(crops)
    assert found.shape == (2, 5, 16, 16, 16)
    np.testing.assert_allclose(found[:, 0], found[:, 1:].mean(axis=1), rtol=1e-4)
    image = torch.from_numpy(cut(patients, crops[1]))[None, None]
    cells = looker.by_head(image)[:, 2:3]
    twin = enlarged(cells / cells.mean(), looker.cell, (16, 16, 16))[0, 0].numpy()
    np.testing.assert_allclose(found[1, 3], twin, rtol=1e-4)
