"""Splits: nobody trains on a judge, and the same names split the same way everywhere."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.split import draw_labelled, split_cases, split_named


def cases_of(*described):
    """(subject, has_labels) or (subject, has_labels, part)."""
    fields = [(*one, "")[:3] for one in described]
    return [SimpleNamespace(subject=subject, has_labels=labels, part=part) for subject, labels, part in fields]


def subjects_in(cases, chosen):
    return {cases[i].subject for i in chosen}


TEN = cases_of(*((f"s{n // 2}", True) for n in range(20)))  # ten subjects, two scans each

any_cases = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.booleans(), st.sampled_from(["", "", "training", "validation", "test"])),
    min_size=1,
    max_size=20,
).map(lambda described: cases_of(*described))


@given(cases=any_cases, folds=st.integers(2, 6), fold=st.integers(0, 5))
def test_no_subject_is_on_both_sides(cases, folds, fold):
    try:
        split = split_cases(cases, folds, fold)
    except UsageFault as fault:
        assert str(fold) in str(fault)
        return
    assert not subjects_in(cases, split.train) & subjects_in(cases, split.validation)
    assert split.train and all(cases[i].has_labels for i in split.validation)
    # Left out of both: only unlabelled scans of those who judge.
    left = set(range(len(cases))) - set(split.train) - set(split.validation)
    assert all(not cases[i].has_labels and cases[i].subject in subjects_in(cases, split.validation) for i in left)
    assert split == split_cases(cases, folds, fold)


@given(order=st.permutations(range(20)))
def test_the_split_depends_on_names_alone(order):
    shuffled = [TEN[i] for i in order]
    expected = subjects_in(TEN, split_cases(TEN, 5, 2).validation)
    assert subjects_in(shuffled, split_cases(shuffled, 5, 2).validation) == expected


def test_folds_judge_every_subject_once():
    judged = [subjects_in(TEN, split_cases(TEN, 5, fold).validation) for fold in range(5)]
    assert sorted(s for fold in judged for s in fold) == sorted({case.subject for case in TEN})
    assert [len(fold) for fold in judged] == [2] * 5
    assert split_cases(TEN, 5, 0).rule == "fold 0 of 5 by subject: 2 of 10 labelled subjects judge"


def test_the_split_of_these_names_never_changes():
    """Recorded: a model that was judged on some subjects must be judged on them after an update, too."""
    assert subjects_in(TEN, split_cases(TEN, 5, 0).validation) == {"s6", "s7"}


def test_a_fold_that_is_not_there_is_refused():
    with pytest.raises(UsageFault, match="fold 5 of 5 asked for; folds are counted from 0 to 4"):
        split_cases(TEN, 5, 5)
    with pytest.raises(UsageFault, match="fold 2 of 2"):  # as many folds as subjects
        split_cases(cases_of(("a", True), ("b", True)), 5, 2)


def test_few_subjects():
    two = cases_of(("a", True), ("b", True), ("b", False), ("c", False))
    for fold in (0, 1):
        split = split_cases(two, 5, fold)
        assert len(subjects_in(two, split.validation)) == 1 and 3 in split.train
    one = split_cases(cases_of(("a", True), ("c", False)), 5, 0)
    assert one.train == (0, 1) and one.validation == () and "one labelled subject (a)" in one.rule
    none = split_cases(cases_of(("a", False), ("c", False)), 5, 0)
    assert none.train == (0, 1) and none.validation == () and none.rule.startswith("no labels")


def test_the_dataset_s_own_validation_part_judges():
    cases = cases_of(
        ("a", True, "training"),
        ("b", True, "validation"),
        ("b", False, "training"),
        ("c", False, "test"),
        ("d", True, "test"),
    )
    split = split_cases(cases, 5, 0)
    assert split.train == (0, 3) and split.validation == (1, 4)
    assert split.rule == "the dataset's own validation part: 2 subjects"
    with pytest.raises(UsageFault, match=r"fold 3 asked for, but .* own validation part judges \(2 subjects\)"):
        split_cases(cases, 5, 3)


def test_a_validation_part_that_leaves_nobody_to_train_is_split_by_folds():
    cases = cases_of(*((name, True, "validation") for name in "abcde"))
    split = split_cases(cases, 5, 0)
    assert len(split.train) == 4 and len(split.validation) == 1 and split.rule.startswith("fold 0 of 5")


def test_a_subject_of_undecodable_name_is_split_too():
    assert split_cases(cases_of(("a", True), ("b\udcff", True)), 2, 0).validation


@given(seed=st.integers(0, 2**31), few=st.integers(1, 10), more=st.integers(1, 10))
def test_fewer_labels_are_among_more(seed, few, more):
    few, more = sorted((few, more))
    train = range(20)
    first, second = (draw_labelled(TEN, train, float(n), seed) for n in (few, more))
    assert set(first) <= set(second)
    assert len(subjects_in(TEN, first)) == few and len(first) == 2 * few  # a subject comes with all of its scans
    assert first == draw_labelled(TEN, train, float(few), seed)


def test_seeds_draw_differently():
    assert len({draw_labelled(TEN, range(20), 3.0, seed) for seed in range(20)}) > 10


@pytest.mark.parametrize(("labels", "count"), [(None, 10), (0.5, 5), (0.25, 2), (0.001, 1), (1.0, 1), (10.0, 10)])
def test_a_count_or_a_share_of_subjects(labels, count):
    assert len(subjects_in(TEN, draw_labelled(TEN, range(20), labels, 0))) == count


@pytest.mark.parametrize("labels", [0.0, -1.0, 2.5, -0.5])
def test_labels_that_are_neither_are_refused(labels):
    with pytest.raises(UsageFault, match="a whole number of subjects, or a share between 0 and 1"):
        draw_labelled(TEN, range(20), labels, 0)


def test_more_labels_than_there_are_is_refused():
    with pytest.raises(UsageFault, match="--labels 11: only 10 labelled subjects may train"):
        draw_labelled(TEN, range(20), 11.0, 0)


def test_labels_are_drawn_from_the_training_side_only():
    cases = cases_of(("a", True), ("b", True), ("c", False))
    assert draw_labelled(cases, (0, 2), 1.0, 0) == (0,)
    with pytest.raises(DataFault, match="no labelled scan is left to train on"):
        draw_labelled(cases, (2,), None, 0)


def test_subjects_by_name_are_held_out_with_all_their_scans():
    cases = [SimpleNamespace(subject=name, has_labels=False, part="") for name in ("a", "b", "a", "c")]
    split = split_named(cases, ["a", "", " c "], "judges.txt")
    assert split.train == (1,) and split.validation == (0, 2, 3) and "2 subjects of judges.txt" in split.rule
    with pytest.raises(DataFault, match="no scan is of z"):
        split_named(cases, ["z"], "judges.txt")
    with pytest.raises(DataFault, match="nobody is left"):
        split_named(cases, ["a", "b", "c"], "judges.txt")
