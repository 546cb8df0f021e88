"""Baselines of a run: which organs a table means, who is asked about what, and chance that depends on nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest

from dagman.evaluation.annotations import Annotation
from dagman.evaluation.localisation_baselines import centre_map, organ_core_map, random_map
from dagman.study_baselines import asked_of, drawn, of_no_network, organs_in_labels

LABELS = {1: "spleen", 2: "right kidney", 3: "left kidney", 6: "liver"}
BOX = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


@pytest.fixture
def store():
    rng = np.random.default_rng(0)
    cases = [
        SimpleNamespace(subject=f"s{n}", shape=(12, 10, 8 + n), affine=np.diag([2.0, 2.0, 3.0, 1.0])) for n in range(3)
    ]
    labels = [(rng.random(case.shape) < 0.4).astype(np.uint8) * 6 for case in cases]
    return SimpleNamespace(cases=cases, labels=lambda i: labels[i], label_names=LABELS)


def test_a_table_of_organs_means_labels_by_name_and_both_sides_where_none_is_named():
    table = {"stone": ["kidney"], "lump": ["liver", "spleen"], "left": ["left kidney"], "fat": ["dark"], "any": []}
    assert organs_in_labels(table, LABELS) == {"stone": [2, 3], "lump": [6, 1], "left": [3]}


def test_asked_are_annotated_findings_of_the_cases_that_judge_in_the_order_of_the_findings(store):
    boxes = [
        Annotation(subject, finding, BOX) for subject, finding in (("s2", "b"), ("s0", "b"), ("s0", "a"), ("x", "a"))
    ]
    assert asked_of(store, (0, 2), ("a", "b"), boxes) == [(0, "a"), (0, "b"), (2, "b")]
    assert asked_of(store, (1, 2), ("b", "a"), boxes) == [(2, "b")]


def test_maps_without_a_network_are_those_of_the_baselines(store):
    asked = [(0, "a"), (2, "b")]
    ways = of_no_network(store, lambda case: (4, 4, 4), 7, {"a": [6], "b": [1, 6]})
    assert list(ways) == ["random", "centre", "organ", "organ, its middle"]
    maps = {name: list(drawn(store, asked, way)) for name, way in reversed(ways.items())}
    rng = np.random.default_rng(7)  # of chance alone: the others were drawn before it
    for n, (case, finding) in enumerate(asked):
        stored, organ = store.cases[case], store.labels(case) == 6
        expected = {
            "random": random_map(stored.shape, (4, 4, 4), rng),
            "centre": centre_map(stored.shape),
            "organ": organ,
            "organ, its middle": organ_core_map(organ, stored.affine),
        }
        for name, values in expected.items():
            heat = maps[name][n]
            assert (heat.subject, heat.finding) == (stored.subject, finding)
            np.testing.assert_array_equal(heat.values, values)
    assert list(of_no_network(store, lambda case: (4, 4, 4), 7, {})) == ["random", "centre"]
