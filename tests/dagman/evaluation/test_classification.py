"""Scores of findings: worked out by hand, with ties, with one kind only; intervals draw patients, twins share draws."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from dagman.evaluation.classification import (
    auroc,
    average_precision,
    compare_findings,
    read_predictions,
    score_findings,
    weighted_ap,
    weighted_auroc,
    write_predictions,
)
from spade3d.faults import DataFault

NAN = math.nan


def rows(labels, scores, *, finding: str = "lump", subjects=None) -> list[dict]:
    who = subjects or [f"p{n:03}" for n in range(len(labels))]
    return [
        {"case": f"c{n}", "subject": who[n], "finding": finding, "label": float(label), "probability": float(score)}
        for n, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]


def test_auroc_by_hand():
    """Present 0.8, 0.4; absent 0.6, 0.2: of four pairs 0.8 wins two and 0.4 one."""
    assert auroc(np.array([1.0, 1, 0, 0]), np.array([0.8, 0.4, 0.6, 0.2])) == 3 / 4


def test_a_tie_counts_half():
    assert auroc(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == 0.5
    assert auroc(np.array([1.0, 0, 0]), np.array([0.5, 0.5, 0.1])) == 0.75


def test_average_precision_by_hand():
    """By falling score 1 0 1 0: precision 1 at half the recall, 2/3 at the other half."""
    assert average_precision(np.array([1.0, 0, 1, 0]), np.array([4.0, 3, 2, 1])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([1.0, 0, 0, 0]), np.full(4, 0.5)) == 0.25  # no order: the prevalence


def test_labels_that_are_not_said_are_left_out_and_one_kind_has_no_score():
    assert auroc(np.array([1.0, NAN, 0]), np.array([0.9, 0.0, 0.1])) == 1.0
    for labels in ([1.0, 1, NAN], [0.0, 0, 0], [NAN] * 3):
        assert math.isnan(auroc(np.array(labels), np.arange(3.0)))
        assert math.isnan(average_precision(np.array(labels), np.arange(3.0)))


def test_weighted_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    present, scores = rng.random(40) < 0.3, rng.integers(0, 8, 40).astype(float)  # many ties
    weights = rng.integers(0, 4, (20, 40)).astype(float)
    for ask, theirs in ((weighted_auroc, roc_auc_score), (weighted_ap, average_precision_score)):
        expected = [theirs(present, scores, sample_weight=one) for one in weights]
        np.testing.assert_allclose(ask(present, scores, weights), expected, atol=1e-12)
    nobody = np.where(present, 0.0, 1.0)[None]
    assert np.isnan(weighted_auroc(present, scores, nobody)).all()
    assert np.isnan(weighted_ap(present, scores, nobody)).all()


def test_the_mean_is_over_findings_that_are_defined():
    table = rows([1, 1, 0, 0], [0.8, 0.4, 0.6, 0.2]) + rows([0, 0, 0, 0], [0.1] * 4, finding="cyst")
    found = {(one.finding, one.metric): one for one in score_findings(table)}
    assert found[None, "auroc"].value == found["lump", "auroc"].value == 3 / 4
    assert (found[None, "auroc"].present, found[None, "auroc"].absent) == (1, 1)
    cyst = found["cyst", "auroc"]
    assert math.isnan(cyst.value) and math.isnan(cyst.low) and cyst.note == "undefined: none of 4 has it"
    assert "only 4 subjects" in found[None, "auroc"].note


def test_nothing_to_score_is_said():
    for ask in (score_findings, lambda none: compare_findings(none, none)):
        with pytest.raises(DataFault, match="0 predictions of studies; one row for each study and finding is needed"):
            ask([])


def test_the_interval_draws_patients_not_scans():
    """Each patient has five scans that say the same: as uncertain as one scan of each, not as five times as many."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 24)
    scores = labels + rng.normal(0, 1.5, 24)
    once = score_findings(rows(labels, scores))[0]
    five = [np.repeat(one, 5) for one in (labels, scores)]
    of_patients = score_findings(rows(*five, subjects=[f"p{n // 5:03}" for n in range(120)]))[0]
    of_scans = score_findings(rows(*five))[0]
    assert of_patients.value == once.value
    assert (of_patients.low, of_patients.high) == pytest.approx((once.low, once.high))  # the same draws
    assert of_scans.high - of_scans.low < 0.6 * (once.high - once.low)
    assert once.low < once.value < once.high


def test_the_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(2)
    labels = (rng.random(30) < 0.4).astype(float)
    scores = labels + rng.normal(0, 1, 30)
    one = score_findings(rows(labels, scores))[1]
    found = []
    for _ in range(2000):
        drawn = rng.integers(0, 30, 30)
        if 0 < labels[drawn].sum() < 30:
            found.append(roc_auc_score(labels[drawn], scores[drawn]))
    assert (one.low, one.high) == pytest.approx(tuple(np.percentile(found, (2.5, 97.5))), abs=0.02)


def test_twins_are_compared_on_the_same_patients():
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], 20)
    noise = rng.normal(0, 1, 40)
    worse, better = rows(labels, 0.3 * labels + noise), rows(labels, 1.3 * labels + noise)
    mean, lump = compare_findings(worse, better)
    assert mean.finding is None and lump.finding == "lump"
    assert mean.difference == pytest.approx(lump.b - lump.a) and mean.low > 0 and mean.p < 0.01
    same, _ = compare_findings(worse, worse)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    for other in (rows(labels[1:], noise[1:]), rows(1 - labels, noise), rows(labels, noise, finding="cyst")):
        with pytest.raises(DataFault, match="compare runs of one split"):
            compare_findings(worse, other)


def test_predictions_come_back_from_their_file(tmp_path):
    table = rows([1, 0, NAN], [0.1, 1 / 3, 0.9])
    write_predictions(tmp_path / "p.csv", table)
    assert (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()[:2] == [
        "case,subject,finding,label,probability",
        "c0,p000,lump,1,0.1",
    ]
    for one, other in zip(read_predictions(tmp_path / "p.csv"), table, strict=True):
        assert one == other or math.isnan(other["label"]) and math.isnan(one["label"])
    (tmp_path / "p.csv").write_text("case,subject,finding,label,probability\na,a,lump,maybe,1\n")
    with pytest.raises(DataFault, match=r"p\.csv: could not convert"):
        read_predictions(tmp_path / "p.csv")
    with pytest.raises(DataFault, match="one row for each study and finding"):
        score_findings(table + rows([1], [0.5], finding="cyst"))
