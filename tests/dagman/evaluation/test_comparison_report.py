"""The report of a comparison says which side was better only where it is shown, and never claims more."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dagman.evaluation.cases_table import write_cases
from dagman.evaluation.comparison_report import comparison_report, headline
from dagman.evaluation.scores import read_rows
from dagman.evaluation.statistics import paired_comparison

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


def make_run(folder, table):
    folder.mkdir()
    write_cases(folder / "cases.csv", table)
    leakage = {"validation_in_training": [], "validation_in_pretraining": [], "pretraining": "checked"}
    summary = {"mean_dice": 0.7012, "mean_dice_interval": [0.65, 0.75], "mean_hd95_mm": 4.0, "mean_nsd": 0.9}
    summary |= {"protocol": {"name": "subject split"}, "labels": 8, "seed": 0, "leakage": leakage}
    summary |= {"coverage": {"loaded": 126, "total": 126, "source": "run1/encoder.safetensors"}}
    summary |= {"split": {"train": ["p1", "p2"], "validation": sorted({row["case"] for row in table})}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def compared(tmp_path, subjects: int, gain: float):
    arms, tables = {}, {}
    for arm, more, seed in (("scratch", 0.0, 1), ("pretrained <x>", gain, 1 if gain else 2)):
        folders = [make_run(tmp_path / f"{arm[:4]}-{n}", rows(subjects, more, seed + 10 * n)) for n in range(2)]
        arms[arm] = folders
        tables[arm] = [{**row, "seed": n} for n, folder in enumerate(folders) for row in read_rows(folder)]
    found = paired_comparison(*tables.values())
    path = comparison_report(tmp_path, {"pretrained <x>": found}, arms)
    return path.read_text(encoding="utf-8").replace("\u00a0", " "), found


def test_a_gain_in_every_subject_is_shown(tmp_path):
    html, found = compared(tmp_path, 8, 0.05)
    assert "pretrained &lt;x&gt; had a better mean Dice than scratch: mean difference +0.04" in html
    assert html.count("<td>better</td>") == 3
    assert html.count('class="pair"') == 8 and "Mean Dice of each subject" in html
    assert html.count('class="dot"') == 2 * (16 + 15 + 16)  # two seeds; the mean, liver (one undefined) and spleen
    assert all(one.low > 0 for one in found)


def test_no_gain_is_not_called_one(tmp_path):
    html, _ = compared(tmp_path, 8, 0.0)
    assert "No difference in Dice shown between pretrained &lt;x&gt; and scratch: " in html
    assert "had a better" not in html and "had a worse" not in html


def test_too_few_subjects_cannot_show_a_difference_however_large(tmp_path):
    html, found = compared(tmp_path, 4, 0.1)
    assert found[0].low > 0
    assert (
        "No difference in Dice shown between pretrained &lt;x&gt; and scratch, and 4 subjects could not show one"
        in html
    )
    assert "only 4 subjects" in html[: html.index("<nav")]


def test_a_smaller_distance_is_better_and_nan_shows_nothing(tmp_path):
    _, (whole, *_) = compared(tmp_path, 8, 0.05)
    farther = replace(whole, metric="hd95_mm", difference=1.0, low=0.5, high=1.5)
    assert "pretrained had a worse mean HD95 (mm) than scratch" in headline(farther, "scratch", "pretrained")
    nothing = replace(whole, low=math.nan, high=math.nan, p=math.nan, p_holm=math.nan)
    assert headline(nothing, "scratch", "pretrained").startswith("No difference")


def test_arms_that_do_not_pair_are_refused(tmp_path):
    run = make_run(tmp_path / "run", rows(2))
    with pytest.raises(ValueError, match="do not match"):
        comparison_report(tmp_path, {"b": []}, {"a": [run], "b": [run, run]})
