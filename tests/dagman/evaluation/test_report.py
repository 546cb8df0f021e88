"""The report of a fine-tuning run says what was found, warns where it is worth less, and never claims more."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dagman.evaluation.case_pictures import CasePicture
from dagman.evaluation.cases_table import write_cases
from dagman.evaluation.report import finetuning_report
from dagman.evaluation.scores import case_means, telling_cases
from spade3d.faults import DataFault

NAMES = {1: "liver", 2: "spleen <b>"}


def rows(subjects: int, gain: float = 0.0, seed: int = 0) -> list[dict]:
    """Two cases a subject, two structures; liver in case 0 is undefined, spleen in case 1 is missed."""
    rng = np.random.default_rng(seed)
    table = []
    for case in range(2 * subjects):
        for label, name in NAMES.items():
            row = {"case": f"case_{case}", "subject": f"s{case // 2}", "class": label, "name": name}
            row |= {"dice": float(rng.uniform(0.6, 0.8)) + gain, "hd95_mm": 4.0, "nsd": 0.9, "asd_mm": 1.25}
            row["volume_difference_ml"] = -1.5
            table.append(row | {"voxels_true": 100, "voxels_predicted": 90})
    table[0] |= {"dice": math.nan, "hd95_mm": math.nan, "nsd": math.nan, "voxels_true": 0, "voxels_predicted": 0}
    table[3] |= {"dice": 0.0, "hd95_mm": 173.2, "nsd": 0.0, "voxels_predicted": 0}
    return table


def make_run(folder, table, **changed):
    folder.mkdir()
    (folder / "config.yaml").write_text("task: segmentation\nsteps: 2\nseed: 0\n")
    timing = {"seconds": 1.0, "data_seconds": 0.1, "crops_per_second": 2.0}
    log = [{"step": n, "losses": {"dice": 1.0}, "total": 1.0, "lr": 0.1, "grad_norm": 1.0, **timing} for n in (1, 2)]
    log.append({"step": 2, "validation": {"mean_dice": 0.7}})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "provenance.json").write_text(json.dumps({"versions": {"dagman": "0.1"}}))
    write_cases(folder / "cases.csv", table)
    leakage = {"validation_in_training": [], "validation_in_pretraining": [], "pretraining": "checked"}
    summary = {
        "mean_dice": 0.7012,
        "mean_dice_interval": [0.65, 0.75],
        "mean_hd95_mm": 4.0,
        "mean_nsd": 0.9,
        "protocol": {"name": "subject split"},
        "coverage": {"loaded": 126, "total": 126, "source": "run1/encoder.safetensors"},
        "labels": 8,
        "seed": 0,
        "split": {"train": ["p1", "p2"], "validation": sorted({row["case"] for row in table})},
        "leakage": leakage | changed.pop("leakage", {}),
        "notes": [],
    }
    (folder / "summary.json").write_text(json.dumps(summary | changed))
    return folder


def text(path) -> str:
    return path.read_text(encoding="utf-8").replace("\u00a0", " ")


def test_the_headline_the_undefined_and_the_missed(tmp_path):
    html = text(finetuning_report(make_run(tmp_path / "run", rows(4))))
    assert "Mean Dice 0.701 (95 % interval 0.650 to 0.750) over 2 structures, 8 validation cases of 4 subjects." in html
    assert "compared with nothing here" in html
    assert "Loaded 126 of 126 encoder tensors from run1/encoder.safetensors." in html
    assert "no validation subject entered training" in html
    assert "No validation subject is among the subjects that the checkpoint was pretrained on." in html
    assert "Validation Dice while training" in html and "spleen &lt;b&gt;" in html
    liver = html[html.index("<tbody>") :].split("</tr>")[0]
    spleen = html[html.index("<tbody>") :].split("</tr>")[1]
    assert ">1.25<" in liver and ">-1.5<" in liver.replace("\u2212", "-")
    assert [cell.split("<")[0] for cell in liver.split('class="right">')[-4:]] == ["7", "1", "0", "0"]
    assert [cell.split("<")[0] for cell in spleen.split('class="right">')[-4:]] == ["8", "0", "1", "0"]


@pytest.mark.parametrize(
    "leakage, warning, reassured",
    [
        ({"validation_in_training": ["s1"]}, "1 validation subject also entered training (s1)", "entered training."),
        (
            {"validation_in_pretraining": ["s1", "s2"]},
            "2 validation subjects had been in the pretraining",
            "pretrained on.",
        ),
        (
            {"suspected_in_pretraining": ["s1"]},
            "1 validation subject may have been in the pretraining",
            "pretrained on.",
        ),
        ({"pretraining": "unknown"}, "does not say what it was pretrained on", "pretrained on."),
    ],
)
def test_leakage_is_said_beside_the_headline_and_nothing_reassures(tmp_path, leakage, warning, reassured):
    html = text(finetuning_report(make_run(tmp_path / "run", rows(2), leakage=leakage)))
    assert warning in html[: html.index("<nav")]
    assert not any(reassured in part.split("</p>")[0] for part in html.split('class="callout good"')[1:])


def test_labels_that_steered_the_pretraining_are_said_beside_the_headline(tmp_path):
    leakage = {"steered": {"labels": 7}, "validation_in_pretraining": ["s1", "s2"], "steered_by_validation": ["s2"]}
    html = text(finetuning_report(make_run(tmp_path / "run", rows(2), leakage=leakage)))
    headline = html[: html.index("<nav")]
    assert "Labels that this run does not learn from steered the pretraining, its views or its heads (" in headline
    assert "labels: 7 scans)" in headline and "and the labels of s2 steered it (s1, s2)" in headline
    assert "as images without labels" not in headline


def test_it_is_said_by_what_a_seen_subject_is_known(tmp_path):
    one = {"case": "c1", "seen_as": "<old> scan", "by": "similar voxels", "sure": True, "unlikeness": 0.031}
    leakage = {"validation_in_pretraining": ["s1"], "evidence": {"s1": [one]}}
    html = text(finetuning_report(make_run(tmp_path / "run", rows(2), leakage=leakage)))
    assert (
        "s1: by similar voxels, 3% of the bits differ (c1 was seen as &lt;old&gt; scan)" in html[: html.index("<nav")]
    )


def test_what_could_not_be_compared_by_voxels_is_said(tmp_path):
    html = text(finetuning_report(make_run(tmp_path / "run", rows(2), leakage={"compared_by_voxels": [3, 40]})))
    assert "Only 3 of 40 scans of the pretraining could be compared by what they show" in html


def test_a_case_on_both_sides_of_the_split_is_found_even_if_the_run_did_not(tmp_path):
    split = {"train": ["case_1", "case_9"], "validation": ["case_0", "case_1"]}
    html = text(finetuning_report(make_run(tmp_path / "run", rows(1), split=split)))
    assert "1 validation subject also entered training (case_1)" in html


def test_a_run_from_scratch_and_a_partial_checkpoint(tmp_path):
    scratch = make_run(tmp_path / "scratch", rows(2), coverage=None, leakage={"pretraining": "none"})
    assert "from scratch" in text(finetuning_report(scratch))
    partial = make_run(tmp_path / "partial", rows(2), coverage={"loaded": 100, "total": 126, "source": "x.pt"})
    assert "Loaded 100 of 126 encoder tensors from x.pt; 26 began at random" in text(finetuning_report(partial))


def test_one_subject_has_no_interval(tmp_path):
    run = make_run(tmp_path / "run", rows(1), mean_dice_interval=[None, None])
    assert "Mean Dice 0.701 (no interval: too few subjects)" in text(finetuning_report(run))


def test_pictures_show_three_planes_of_scan_truth_prediction_and_difference(tmp_path):
    truth = np.zeros((20, 24, 6), np.uint8)
    truth[5:12, 6:14, 2:4] = 1
    image = np.random.default_rng(0).uniform(size=truth.shape)
    spacing = (1.0, 1.0, 8.0)
    missed = CasePicture("case <7>", image, truth, np.roll(truth, 2, axis=0), spacing, "worst")
    empty = CasePicture("empty", image, np.zeros_like(truth), np.zeros_like(truth), spacing, "nothing to see")
    html = text(finetuning_report(make_run(tmp_path / "run", rows(2)), [missed, empty]))
    assert html.count("data:image/png;base64,") == 2 * 3 * 4
    assert "case &lt;7&gt;" in html and "axial 3 of 6" in html and "liver" in html
    with pytest.raises(ValueError, match="one grid"):
        replace(missed, truth=truth[:-1])


def test_the_cases_to_show_are_chosen_by_rank():
    table = [{"case": name, "class": 1, "dice": dice} for name, dice in zip("abcde", (0.9, math.nan, 0.1, 0.5, 0.7))]
    assert list(case_means(table)) == ["c", "d", "e", "a", "b"]
    assert telling_cases(table) == [("c", "worst"), ("e", "median"), ("a", "best")]
    assert telling_cases(table[:2]) == [("a", "the only case")]
    assert telling_cases(table[1:2]) == []


@pytest.mark.parametrize("name, text", [("summary.json", None), ("summary.json", "{}"), ("cases.csv", None)])
def test_what_is_missing_is_named(tmp_path, name, text):
    run = make_run(tmp_path / "run", rows(2))
    (run / name).unlink()
    if text:
        (run / name).write_text(text)
    with pytest.raises(DataFault, match=name):
        finetuning_report(run)
