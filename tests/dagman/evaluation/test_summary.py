"""summary.json says what the rows say, by hand: means per case first, undefined left out and counted, no NaN."""

import json
import math
from types import SimpleNamespace

import pytest

from dagman.evaluation.scores import read_summary
from dagman.evaluation.statistics import COMPARABLE, mean_with_interval
from dagman.evaluation.summary import summarise
from dagman.recipes.finetuning import FinetuneSettings
from spade3d.configuration import with_values
from spade3d.provenance import write_json
from spade3d.volumes.split import Split

NOBODY = {"pretraining": "none", "validation_in_training": [], "validation_in_pretraining": []}
SETTINGS = with_values(
    FinetuneSettings(seed=7), {"crop.shape": (16, 16, 16), "data.spacing": (1.5, 1.5, 2.0), "labels": 2.0}
)
SPLIT = Split((0, 1, 2), (3, 4), "by hand")
STORE = SimpleNamespace(
    cases=[SimpleNamespace(subject=subject) for subject in ("A", "A", "B", "C", "D")],
    rejected=[{"name": "x", "reason": "constant"}],
)


def row(case: str, subject: str, value: int, dice: float, true: int = 10, predicted: int = 10) -> dict:
    distance = math.nan if math.isnan(dice) else 3.0
    who = {"case": case, "subject": subject, "class": value, "name": {1: "liver", 2: "spleen"}[value]}
    scores = {"dice": dice, "hd95_mm": distance, "nsd": dice, "asd_mm": distance / 2}
    scores["volume_difference_ml"] = (predicted - true) / 10 if true or predicted else math.nan
    return who | scores | {"voxels_true": true, "voxels_predicted": predicted}


ROWS = [
    row("c", "C", 1, 0.8),
    row("c", "C", 2, 0.0, predicted=0),  # missed
    row("d", "D", 1, 0.6),
    row("d", "D", 2, math.nan, 0, 0),  # absent from both
]


def summary(rows=ROWS) -> dict:
    return summarise(rows, SETTINGS, STORE, SPLIT, (0, 1, 2), None, NOBODY)


def test_means_by_hand():
    said = summary()
    assert said["mean_dice"] == pytest.approx(((0.8 + 0.0) / 2 + 0.6) / 2)
    assert said["mean_nsd"] == pytest.approx(0.5) and (said["mean_hd95_mm"], said["mean_asd_mm"]) == (3.0, 1.5)
    by_hand = mean_with_interval({"C": [0.4], "D": [0.6]})
    assert said["mean_dice_interval"] == pytest.approx([by_hand.low, by_hand.high])
    assert (said["cases"], said["subjects"]) == (2, 2)
    liver, spleen = said["per_class"]["liver"], said["per_class"]["spleen"]
    assert liver["dice"] == pytest.approx(0.7) and spleen["dice"] == 0.0
    assert [spleen[key] for key in ("cases", "undefined", "missed", "invented")] == [2, 1, 1, 0]
    assert (liver["asd_mm"], liver["volume_difference_ml"], spleen["volume_difference_ml"]) == (1.5, 0.0, -1.0)
    assert spleen["dice_interval"] == [None, None]  # one subject says nothing of the next


def test_a_volume_that_is_too_large_and_one_too_small_cancel_in_the_difference_and_not_in_its_size():
    rows = [row("c", "C", 1, 0.8, predicted=40), row("d", "D", 1, 0.6, true=40)]  # + 3 ml and - 3 ml
    liver = summary(rows)["per_class"]["liver"]
    assert (liver["volume_difference_ml"], liver["volume_error_ml"]) == (0.0, 3.0)


def test_every_metric_is_defined_where_it_is_written():
    said = summary()["protocol"]
    assert {*COMPARABLE, "volume_difference_ml", "empty", "grid"} <= said["definitions"].keys()
    assert said["tolerance_mm"] == 2.0 and "tolerances_mm" not in said
    own = with_values(SETTINGS, {"scoring.tolerances_mm": {"spleen": 1.0}})
    assert summarise(ROWS, own, STORE, SPLIT, (0,), None, NOBODY)["protocol"]["tolerances_mm"] == {"spleen": 1.0}


def test_a_summary_says_between_which_surfaces_distances_are():
    """What is not said is of voxels, as in runs that are older than the choice."""
    plain, own = (
        summarise(ROWS, with_values(SETTINGS, {"scoring.surface": surface}), STORE, SPLIT, (0,), None, NOBODY)[
            "protocol"
        ]
        for surface in ("voxels", "elements")
    )
    assert "surface" not in plain and own["surface"] == "elements between voxels"
    other = {name for name, text in own["definitions"].items() if plain["definitions"][name] != text}
    assert other == {"hd95_mm", "nsd", "asd_mm", "grid"}


def test_who_learned_and_who_judged_are_subjects():
    said = summary()
    assert said["split"] == {"train": ["A", "B"], "validation": ["C", "D"]}
    assert (said["labels"], said["labelled_scans"], said["seed"]) == (2, 3, 7)
    assert said["leakage"] == NOBODY and said["left_out"] == [{"name": "x", "reason": "constant"}]
    assert said["protocol"]["split"] == "by hand" and said["protocol"]["spacing_mm"] == [1.5, 1.5, 2.0]


def test_nothing_defined_is_null_and_the_file_is_read_back(tmp_path):
    said = summary([row("c", "C", 1, math.nan, 0, 0)])
    assert said["mean_dice"] is None and said["mean_dice_interval"] == [None, None]
    json.dumps(said, allow_nan=False)
    write_json(tmp_path / "summary.json", said)
    assert read_summary(tmp_path) == said
