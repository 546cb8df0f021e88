"""docs/speed.md and docs/results.md are what two scripts make of the results that lie beside them."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_results():
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == tables().page(), (
        "docs/speed.md is not what the results say; run python benchmarks/tables.py"
    )


def test_the_page_of_studies_is_made_of_their_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "science")
    studies = importlib.import_module("results")
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == studies.page(), (
        "docs/results.md is not what the results say; run python benchmarks/science/results.py"
    )
    assert "`contrast_abdomen_ct` has not been run." in studies.page(tmp_path)
    named = {name for _, _, _, names in studies.SECTIONS for name in names}
    found = {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert {name for name in found if not name.startswith(("speed_", "gpu_"))} <= named


def test_what_is_bold_is_clear_of_zero_with_every_seed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "science")
    said = importlib.import_module("results").with_interval
    clear = {"difference": 0.04, "low": 0.01, "high": 0.07}
    assert said(clear | {"by_seed": [0.01, 0.07]}) == "**+0.040** (+0.010, +0.070)"
    assert said(clear | {"by_seed": [-0.01, 0.09]}) == "+0.040 (+0.010, +0.070)"
    assert said(clear, by_seed=[-0.01, 0.09]) == "+0.040 (+0.010, +0.070)"
    assert said(clear | {"low": -0.01}, 1) == "+0.0 (-0.0, +0.1)"
    assert said({"difference": 0.04, "low": None, "high": None}) == "+0.040"  # one judge


def test_a_table_of_few_labels_is_in_order_and_says_how_runs_differ(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "science")
    studies = importlib.import_module("results")

    def at(subjects, dice):
        over = {"difference": 0.1, "low": 0.05, "high": 0.15, "subjects": 9}
        spade = {"mean_dice": dice + 0.1, "by_pair": {"0": dice, "1": dice + 0.2}, "over_control": over}
        scratch = {"mean_dice": dice, "by_pair": {"0": dice - 0.1, "1": dice + 0.1}}
        return {"subjects": subjects, "arms": {"untrained": scratch, "spade": spade}}

    of = {
        "words": {"untrained": [], "spade": []},
        "control": "untrained",
        "labels": {"all": at(30, 0.7), "4": at(4, 0.5)},
    }
    assert list(studies.few_shot(of)) == [
        ["labelled subjects", "from scratch", "spade", "gained"],
        ["4", "0.500 (0.40 to 0.60)", "0.600 (0.50 to 0.70)", "**+0.100** (+0.050, +0.150)"],
        ["30 (all)", "0.700 (0.60 to 0.80)", "0.800 (0.70 to 0.90)", "**+0.100** (+0.050, +0.150)"],
    ]
    of |= {
        "steps": {"pretraining": 300},
        "seeds": [0, 1],
        "draws": 2,
        "every_seed_has_every_draw": False,
        "date": "today",
    }
    assert studies.settings(of) == (
        ": 300 steps of pretraining; seeds 0, 1; one each of 2 draws of labelled subjects; 9 subjects judge; today"
    )


def test_a_goal_is_met_from_its_own_side():
    line = tables().Line
    assert line("a", "b", "c", "d", 2.2, 2.2).met and not line("a", "b", "c", "d", 2.1, 2.2).met
    assert line("a", "b", "c", "d", 1.9, 2, "s", below=True).met and not line("a", "b", "c", "d", 2.1, 2, "s", True).met


def test_what_was_not_measured_is_said(tmp_path):
    assert "Not measured yet: views" in tables().page(tmp_path)


def test_a_localisation_is_told_by_finding_beside_the_middle_of_the_organ(monkeypatch):
    """A mean over findings hides the one that is not found."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "science")
    studies = importlib.import_module("results")
    of = {
        "control": "clarity",
        "by_finding": {
            "clarity": {"bright": {"pointing": 0.8, "iou": 0.4}, "striped": {"pointing": 0.2, "iou": 0.04}},
            "organ, its middle": {"bright": {"pointing": 0.1, "iou": 0.1}, "striped": {"pointing": 0.1, "iou": 0.05}},
        },
    }
    head, *rows = studies.localised_by_finding(of)
    assert [title.split(",")[0] for title in head] == ["", "pointing", "pointing", "IoU", "IoU"]
    assert rows == [["bright", "0.800", "0.100", "0.400", "0.100"], ["striped", "0.200", "0.100", "0.040", "0.050"]]
    (tables,) = (tables for _, _, tables, names in studies.SECTIONS if "localisation_abdomen_ct" in names)
    assert studies.localised_by_finding in tables
    twins = [name for name in importlib.import_module("contrast").STUDY.headlines if "equivariance" in name]
    assert len(twins) == 6 and sum("flipped" in name for name in twins) == sum("scaled" in name for name in twins) == 2


def test_frames_are_compared_over_the_pairs_that_all_of_them_place(monkeypatch):
    """A frame that refuses what is hard is not ahead by it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "science")
    studies = importlib.import_module("results")
    easy, hard = {"pairs": 3, "median_mm": 2.0, "p90_mm": 3.0}, {"pairs": 1200, "median_mm": 9.0, "p90_mm": 30.0}
    rows = [{"frame": "all", "placed": 1.0, "common": easy} | hard]
    rows += [{"frame": "few", "placed": 0.5, "common": easy} | easy]
    none = [row | {"common": {"pairs": 0}} for row in rows]
    of = {"sets": {"hearts": rows, "limbs": none}}
    assert [row[1:] for row in studies.frames(of)][1:] == [["9.0, 30.0"] * 2, ["2.0, 3.0 (50% placed)"] * 2]
    head, *lines = studies.frames_on_common_pairs(of)
    assert head[1:] == ["hearts (3 pairs)", "limbs (0 pairs)"]
    assert lines == [["all", "2.0, 3.0", "-"], ["few", "2.0, 3.0", "-"]]
