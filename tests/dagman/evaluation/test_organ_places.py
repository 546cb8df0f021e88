"""Places of the organ probes: each shows the organ that it is said to show, and is described in its own row."""

import numpy as np
import pytest
import torch

from dagman.evaluation.crop_features import NothingToAsk, Probing
from dagman.evaluation.organ_places import (
    ELSEWHERE,
    PER_ORGAN,
    draw_places,
    patches_of,
    places_in_body,
    vectors_of_places,
)
from spade3d.volumes.preprocessing import Normalisation

HOW = Probing((12, 12, 12), (2.0, 2.0, 3.0), stages=(0, 1), crops=4)
SPACING = np.array(HOW.spacing)


@pytest.fixture(scope="module")
def patients(in_memory):
    """Three patients whose voxels hold their own place along i in mm, with two organs; the third shows none."""
    images, labels = [], []
    for shift in (0, 3, 0):
        label = np.zeros((24, 20, 16), np.uint16)
        label[4 + shift : 10 + shift, 8:14, 6:12], label[15:20, 4:8, 3:7] = 1, 5
        images.append(np.indices(label.shape)[0])
        labels.append(label)
    labels[2][:] = 0
    return in_memory(images, labels=labels, spacing=HOW.spacing, normalisation=Normalisation(0.0, 2.0, -1e4, 1e4))


@pytest.fixture(scope="module")
def places(patients):
    return draw_places(patients, range(3), HOW)


def test_each_place_shows_its_organ_and_all_organs_have_as_many(patients, places):
    assert set(places.subject) == {"patient 0", "patient 1"}
    for subject in (0, 1):
        ours = places.subject == f"patient {subject}"
        values, counts = np.unique(places.organ[ours], return_counts=True)
        assert values.tolist() == [ELSEWHERE, 1, 5] and set(counts.tolist()) == {PER_ORGAN}
        i, j, k = np.rint(places.mm[ours] / SPACING).astype(int).T
        assert np.array_equal(patients.labelled[subject][i, j, k], places.organ[ours])
    assert len(places.crops) == 2 * HOW.crops


def test_every_organ_has_a_crop_however_few_are_asked_for(patients):
    one = draw_places(patients, (0, 1), Probing(HOW.shape, HOW.spacing, crops=1))
    assert len(one.crops) == 4 and set(one.organ) == {ELSEWHERE, 1, 5}


def test_places_of_a_scan_do_not_depend_on_which_other_scans_are_asked_for(places, patients):
    other = draw_places(patients, (1, 0), HOW)
    for subject in ("patient 0", "patient 1"):
        assert np.array_equal(places.mm[places.subject == subject], other.mm[other.subject == subject])


def test_vectors_stand_in_the_order_of_their_places(patients, places):
    """Of an encoder that says (place along i, 1), brought to unit length, the ratio is the place."""
    encoder = lambda images: [torch.cat([images, torch.ones_like(images)], dim=1)] * 2  # noqa: E731
    found = vectors_of_places(encoder, patients, places, HOW)
    assert list(found) == [0, 1]
    assert np.linalg.norm(found[0], axis=1) == pytest.approx(np.ones(len(places.mm)), abs=1e-5)
    assert found[1][:, 0] / found[1][:, 1] == pytest.approx(places.mm[:, 0], rel=1e-3, abs=0.05)


def test_a_patch_is_centred_on_its_place(patients, places):
    patches = patches_of(patients, places)
    assert patches.shape == (len(places.mm), 250)
    assert patches.mean(axis=0) == pytest.approx(np.zeros(250), abs=1e-4)
    middle = patches[:, [62, 187]].T  # of either scale
    expected = (places.mm[:, 0] - places.mm[:, 0].mean()) / places.mm[:, 0].std()
    for one in middle:
        assert one == pytest.approx(expected, abs=0.05)


def test_the_place_in_the_body_is_a_share_of_its_box(patients, places):
    where = places_in_body(patients, places)
    assert where == pytest.approx((places.mm + SPACING / 2) / (np.array([24, 20, 16]) * SPACING))


def test_one_subject_with_organs_is_too_few(patients):
    with pytest.raises(NothingToAsk, match="of which 1 subjects show one"):
        draw_places(patients, (0, 2), HOW)
