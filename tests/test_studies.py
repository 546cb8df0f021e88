"""What benchmarks/science makes of its runs before it writes a result."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

from dagman.evaluation.probes import gains

SCIENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "science"


@pytest.fixture
def priors(monkeypatch):
    monkeypatch.syspath_prepend(SCIENCE)
    return importlib.import_module("spatial_priors")


def test_judges_of_several_folds_count_together(priors):
    """Heads and priors of each fold are its own; a difference is over the subjects of all."""
    folds = [
        {"heads": {0: {"within.mean": {"a": [0.5]}}}, "prior": {0: {"within.mean": {"a": [0.4]}}}},
        {
            "heads": {0: {"within.mean": {"b": [0.9], "c": [0.7]}}},
            "prior": {0: {"within.mean": {"b": [0.6], "c": [0.5]}}},
        },
    ]
    rows = priors.together(folds)
    assert rows["heads"] == {0: {"within.mean": {"a": [0.5], "b": [0.9], "c": [0.7]}}}
    found = gains(rows["heads"], rows["prior"])["within.mean"]
    assert found["subjects"] == 3 and found["difference"] == pytest.approx(0.2)


def test_each_fold_has_a_folder_of_its_own_on_one_store(priors, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.json").write_text("{}", encoding="utf-8")
    asked = Namespace(out=tmp_path, judge_folds=[0, 2])
    for _ in range(2):  # the second time it is resumed
        parts = priors.by_fold(asked, (["--folds", "3"], [], []))
    assert [part.out.name for part, _ in parts] == ["fold-0", "fold-2"]
    assert [words[0] for _, words in parts] == [("--folds", "3", "--fold", "0"), ("--folds", "3", "--fold", "2")]
    assert all((part.out / "store" / "index.json").read_text(encoding="utf-8") == "{}" for part, _ in parts)
    assert priors.by_fold(Namespace(judge_folds=None), ([], [], [])) == [(Namespace(judge_folds=None), ([], [], []))]
