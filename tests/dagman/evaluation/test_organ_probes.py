"""Organ probes: features that say the organ, that say nothing, that say who it is; and subjects on one side only."""

import numpy as np
import pytest

from dagman.evaluation.organ_places import OrganPlaces
from dagman.evaluation.organ_probes import (
    by_linear_map,
    by_neighbours,
    folds_by_subject,
    judged,
    organ_controls,
    organ_probes,
    out_of_subject,
)

PROBES = {"knn": by_neighbours("cosine"), "linear": by_linear_map}
SUBJECTS, EACH = 7, 12
ORGAN = np.tile(np.repeat([0, 3, 8], EACH), SUBJECTS)
SUBJECT = np.repeat([f"patient {n}" for n in range(SUBJECTS)], 3 * EACH)
PLACES = OrganPlaces((), np.zeros(len(ORGAN), int), np.zeros((len(ORGAN), 3)), ORGAN, SUBJECT)


def noise(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((len(ORGAN), channels))


def one_hot(of: np.ndarray) -> np.ndarray:
    return (of[:, None] == np.unique(of)).astype(float)


def mean(answers: dict) -> dict[str, float]:
    return {measure: float(np.mean(list(of.values()))) for measure, of in answers.items()}


@pytest.mark.parametrize("probe", PROBES)
def test_features_that_say_the_organ_score_one_and_noise_scores_chance(probe):
    said = out_of_subject(PROBES[probe], one_hot(ORGAN) + 0.05 * noise(3), ORGAN, SUBJECT)
    assert mean(judged(said, ORGAN, SUBJECT)) == {"accuracy": 1.0, "precision": 1.0}
    silent = mean(judged(out_of_subject(PROBES[probe], noise(20), ORGAN, SUBJECT), ORGAN, SUBJECT))
    assert silent["accuracy"] == pytest.approx(1 / 3, abs=0.08)
    assert silent["precision"] < 0.5  # of 36 places ranked by chance, a little above the third that a draw finds


@pytest.mark.parametrize("probe", PROBES)
def test_what_is_known_of_one_subject_only_does_not_help_for_another(probe):
    """A probe that had seen the subject would find all: each subject has a code of its own for each organ."""
    own = one_hot(np.char.add(SUBJECT, ORGAN.astype(str)))
    found = mean(judged(out_of_subject(PROBES[probe], own, ORGAN, SUBJECT), ORGAN, SUBJECT))
    assert found["accuracy"] < 0.5


@pytest.mark.parametrize("probe", PROBES)
def test_an_encoder_that_has_collapsed_is_chance_to_the_last_digit(probe):
    said = out_of_subject(PROBES[probe], np.ones((len(ORGAN), 4)), ORGAN, SUBJECT)
    assert mean(judged(said, ORGAN, SUBJECT))["precision"] == pytest.approx(1 / 3)
    assert mean(judged(said, ORGAN, SUBJECT))["accuracy"] == pytest.approx(1 / 3)


def test_a_subject_is_on_one_side_only_and_each_is_asked_once():
    asked = np.zeros(len(SUBJECT), dtype=int)
    for learned, judges in folds_by_subject(SUBJECT, 5):
        assert not set(SUBJECT[learned]) & set(SUBJECT[judges])
        assert np.array_equal(learned, ~judges)
        asked += judges
    assert set(asked.tolist()) == {1}
    assert len(list(folds_by_subject(SUBJECT, 99))) == SUBJECTS


def test_measures_are_counted_by_hand():
    organ, subject = np.array([1, 1, 2, 1]), np.array(["a", "a", "a", "b"])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]])
    found = judged(probabilities, organ, subject)
    # a: half of organ 1 and all of organ 2; b: a tie that is shared, and nothing is said of an organ it does not show.
    assert found["accuracy"] == {"a": [pytest.approx((0.5 + 1) / 2)], "b": [0.5]}
    # a, organ 1: found at ranks 1 and 3 of 3; organ 2: at rank 2, behind 0.8.
    assert found["precision"] == {"a": [pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)], "b": [1.0]}


def test_an_organ_that_one_subject_alone_shows_is_missed_not_dropped():
    organ = np.where((SUBJECT == "patient 0") & (ORGAN == 8), 9, ORGAN)
    said = out_of_subject(by_neighbours("cosine"), one_hot(organ), organ, SUBJECT)
    assert said.shape == (len(organ), 4)
    assert judged(said, organ, SUBJECT)["accuracy"]["patient 0"] == [pytest.approx(2 / 3)]


def test_probes_of_all_stages_and_of_each_and_controls_without_any():
    stages = {0: noise(4), 3: one_hot(ORGAN)}
    found = organ_probes(stages, PLACES)
    assert {name.rsplit(".", 1)[1] for name in found} == {"features", "stage0", "stage3"}
    accuracy = mean(found)
    assert accuracy["knn.accuracy.stage3"] > accuracy["knn.accuracy.stage0"] + 0.5
    where = np.random.default_rng(1).random((len(ORGAN), 3))
    where[ORGAN == 3] = 0.5 + (where[ORGAN == 3] - 0.5) / 4  # organ 3 lies amid the others, no half-space tells it
    controls = mean(organ_controls(where, noise(250), PLACES))
    assert {name.rsplit(".", 1)[1] for name in controls} == {"position", "patch", "chance"}
    assert controls["linear.accuracy.chance"] == controls["knn.accuracy.chance"] == pytest.approx(1 / 3)
    assert controls["linear.accuracy.position"] > 0.55 and controls["knn.accuracy.position"] > 0.55
    assert controls["knn.accuracy.patch"] < 0.45
