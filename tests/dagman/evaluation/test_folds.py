"""What all folds of a split share is read from the rules that splits say, whichever way they were drawn."""

import types

import pytest

from dagman.downstream.protocols import PROTOCOLS
from dagman.evaluation.folds import fold_of, split_rule


def cases(names: list[str], part: str = "training") -> list:
    return [types.SimpleNamespace(name=n, subject=n, part=part, has_labels=True) for n in names]


BTCV = [f"img{n:04}" for n in (*range(1, 11), *range(21, 41))]
HEARTS = [f"ct_train_{n}" for n in range(1001, 1021)]


@pytest.mark.parametrize(
    ("protocol", "names", "folds", "rule"),
    [
        ("holdout", [f"p{n}" for n in range(9)], 4, "one of 4 folds by subject: 9 labelled subjects"),
        ("btcv-5fold", BTCV, 5, "BTCV, one of 5 folds as nnU-Net draws them"),
        ("mmwhs-5fold", HEARTS, 5, "MM-WHS CT, one of 5 folds as nnU-Net draws them"),
        (
            "msd",
            [f"p{n}" for n in range(9)],
            4,
            "no labelled validation part: one of 4 folds as nnU-Net draws them, 9 labelled subjects",
        ),
    ],
)
def test_all_folds_of_a_split_share_one_rule(protocol, names, folds, rule):
    splits = [PROTOCOLS[protocol].split(cases(names), folds, fold) for fold in range(folds)]
    assert {split_rule(split.rule) for split in splits} == {rule}
    assert [fold_of({"protocol": {"split": split.rule}}) for split in splits] == list(range(folds))


def test_a_split_without_folds_is_its_rule_and_has_none():
    split = PROTOCOLS["btcv-24-6"].split(cases(BTCV), 5, 0)
    assert split_rule(split.rule) == split.rule and fold_of({"protocol": {"split": split.rule}}) is None
    assert fold_of({"protocol": {}}) is None  # what an older summary does not say
