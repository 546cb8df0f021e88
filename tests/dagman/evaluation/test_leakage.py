"""Leakage: who judges may have been seen in the pretraining, by name in the same dataset, by voxels anywhere."""

import numpy as np
import pytest

from dagman.evaluation.leakage import find_leakage
from spade3d.faults import DataFault
from spade3d.provenance import describe
from spade3d.volumes.layouts import Case, Dataset
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.split import Split
from spade3d.volumes.volume import write_volume

SPLIT = Split((0, 1), (2, 3), "by hand")  # b and b2 are two scans of one subject


def stored(folder, name, subjects: dict[str, str], seed: int = 0):
    """A store whose case `c` of subject `s` is {"c": "s"}; the voxels depend on the order and the seed."""
    folder.mkdir()
    cases = []
    for number, (case, subject) in enumerate(sorted(subjects.items())):
        voxels = np.random.default_rng([seed, number]).integers(-500, 500, (8, 8, 8)).astype(np.int16)
        write_volume(folder / f"{case}.nii.gz", voxels, np.eye(4))
        cases.append(Case(case, subject, folder / f"{case}.nii.gz", None, "CT"))
    return prepare(Dataset(name, "folder of scans", folder, tuple(cases)), folder / "store", Preprocessing())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans") / "data"
    return stored(folder, "livers", {"a": "A", "a2": "A", "b": "B", "c": "C"})


def pretraining(store, *cases: int) -> dict:
    """What travels with an encoder that learned from these cases."""
    return describe(store, cases, Split(cases, (), "by hand"))


def found(store, provenance, strict=False) -> tuple:
    said = find_leakage(store, SPLIT, provenance, strict=strict)
    assert said["validation_in_training"] == []
    return said["pretraining"], said["validation_in_pretraining"]


def test_from_scratch_a_silent_checkpoint_and_a_clean_one(store):
    assert found(store, None) == ("none", [])
    assert found(store, {}) == ("unknown", [])
    assert found(store, pretraining(store, 0, 1), strict=True) == ("checked", [])


def test_a_subject_is_found_in_the_same_dataset_by_name(store, tmp_path):
    rescanned = stored(tmp_path / "again", "livers", {"x": "B", "y": "Z"}, seed=1)
    assert found(store, pretraining(rescanned, 0, 1)) == ("checked", ["B"])


def test_in_another_dataset_a_name_means_nobody_and_voxels_tell(store, tmp_path):
    other = stored(tmp_path / "other", "hearts", {"b": "B", "c": "C"}, seed=1)
    assert found(store, pretraining(other, 0, 1)) == ("checked", [])
    renamed = stored(tmp_path / "renamed", "hearts", {f"scan{n}": f"patient{n}" for n in range(4)})
    assert found(store, pretraining(renamed, 1, 3)) == ("checked", ["C"])


def test_strict_refuses_what_was_seen(store):
    with pytest.raises(DataFault, match=r"2 validation subjects were in the pretraining \(B, C\)"):
        found(store, pretraining(store, 0, 2, 3), strict=True)


def test_a_split_that_leaks_is_said(store):
    said = find_leakage(store, Split((0, 2), (1, 3), "badly"), None, strict=False)
    assert said["validation_in_training"] == ["A"]
