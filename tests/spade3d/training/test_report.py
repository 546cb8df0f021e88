"""The pretraining report says what was learned from, what was left out, and whether the embedding is alive."""

import json
import math
import re

import numpy as np
import pytest

from spade3d.faults import DataFault
from spade3d.training.report import life, pretraining_report


def step(at: int, **more) -> dict:
    losses = {"global": 2.0 / at, "local": 1.0 / at}
    timing = {"seconds": 0.5, "data_seconds": 0.05, "crops_per_second": 8.0}
    return {"step": at, "losses": losses, "total": 3.0 / at, "lr": 1e-3, "grad_norm": 1.0, **timing, **more}


def signs(rank: float, spread: float = 0.8) -> dict:
    return {"rows": 16, "dims": 32, "rank": rank, "spread": spread, "uniformity": -2.0, "alignment": 0.3}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run & <one>"
    folder.mkdir()
    config = "recipe: spade\nsteps: 20\ncrop: {shape: [32, 32, 24]}\nspacing: null\n"
    config += "network: {feature_size: 12}\noptim: {lr: 0.0003}\n"
    (folder / "config.yaml").write_text(config)
    rows = [step(n, **({"signs": signs(9.0 + n / 10)} if n % 5 == 0 else {})) for n in range(1, 21)]
    rows[3] |= {"grad_norm": None, "skipped": True}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = [{"name": f"scan_{n}", "subject": f"patient_{n // 2}", "modality": "CT" if n else "MR"} for n in range(4)]
    rejected = [{"name": "<script>alert(1)</script>", "reason": "12 NaN voxels"}]
    provenance = {"versions": {"torch": "2.13.0"}, "cases": cases, "rejected": rejected}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def test_a_reader_in_a_hurry_learns_what_was_learned_from(run):
    html = pretraining_report(run).read_text(encoding="utf-8")
    assert "Learned without labels from 4 scans of 2 subjects, in 20 steps." in html
    assert "no sign of collapse: it spreads over 11.0 of 16 directions" in html
    assert "1 scan was left out" in html and "12 NaN voxels" in html
    assert "1 update was skipped" in html
    for shown in ("32 × 32 × 24", "not set", "0.0003", "Modality CT", "torch", "run &amp; &lt;one&gt;"):
        assert shown in html
    assert "<script" not in html


def test_labels_that_steered_the_views_are_said_first(run):
    said = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    for saliency, labelled in ({"gaze": 2}, 0), ({"gaze": 1, "labels": 2, "predicted (taught by labels)": 1}, 3):
        (run / "provenance.json").write_text(json.dumps(said | {"saliency": saliency}))
        html = pretraining_report(run).read_text(encoding="utf-8")
        assert "Steered by gaze" in html and f"{saliency['gaze']} of 4" in html
        assert ("Learned without labels from 4 scans" in html) == (not labelled)
        assert ("Learned with help from labels, from 4 scans" in html) == bool(labelled)
        assert ("Label maps of 3 scans steered views or heads" in html) == bool(labelled)
    for saliency, how in [
        ({"attention (of unknown teaching)": 2}, "perhaps with help from labels,"),
        ({"predicted (of unknown teaching)": 2}, "perhaps with help from labels,"),
        ({"attention (of unknown teaching)": 2, "labels": 1}, "with help from labels,"),
        ({"attention": 2}, "without labels"),
    ]:
        (run / "provenance.json").write_text(json.dumps(said | {"saliency": saliency}))
        html = pretraining_report(run).read_text(encoding="utf-8")
        assert f"Learned {how} from 4 scans" in html
        assert ("steered views of 2 scans of which nobody knows" in html) == ("perhaps" in how or "labels" in saliency)


def test_views_that_had_nothing_to_keep_are_said(run):
    config = (run / "config.yaml").read_text(encoding="utf-8")
    for views, said in ("focused", True), ("centre", False), ("ordinary", False):
        (run / "config.yaml").write_text(config + f"focus:\n  views: {views}\n")
        html = pretraining_report(run).read_text(encoding="utf-8")
        assert (f"Views were to be {views}, but the saliency of the scans is empty: all were ordinary" in html) == said
    provenance = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(config + "focus:\n  views: focused\n")
    (run / "provenance.json").write_text(json.dumps(provenance | {"saliency": {"gaze": 1}}))
    assert "all were ordinary" not in pretraining_report(run).read_text(encoding="utf-8")


def test_matched_points_carry_the_same_number_in_both_crops(run):
    a = np.random.default_rng(0).normal(size=(12, 10, 8)).astype(np.float32)
    points = np.random.default_rng(1).uniform(0, 8, (40, 3))
    pictures = {"a": a, "b": a + 1, "points_a": points, "points_b": points * 0.5, "spacing": np.array([1.0, 1.0, 3.0])}
    html = pretraining_report(run, {**pictures, "restored": a}).read_text(encoding="utf-8")
    assert html.count('class="match"') == 2 * 8
    assert html.count("data:image/png;base64,") == 3
    empty = np.empty((0, 3))
    pretraining_report(run, {**pictures, "points_a": empty, "points_b": empty})


def test_a_matched_point_lies_on_its_voxel(run):
    crop = np.zeros((8, 6, 4), np.float32)
    points = np.array([[7.0, 0.0, 2.0]])  # rightmost and rearmost: the picture's left and bottom
    html = pretraining_report(run, {"a": crop, "b": crop, "points_a": points, "points_b": points}).read_text("utf-8")
    assert 'viewBox="0 0 360 270"' in html  # 8 voxels across, 6 down
    assert 'cx="22.5" cy="247.5"' in html


def test_life_reads_the_alarm_at_the_end_and_remembers_an_earlier_one():
    alive, dead = step(10, signs=signs(9.0)), step(20, signs=signs(1.0, spread=0.001))
    assert life([alive])[0] == "good"
    kind, words = life([alive, dead])
    assert kind == "warning" and "collapsed" in words and "step 20" in words
    kind, words = life([dead | {"step": 5}, alive])
    assert kind == "note" and "rang 1 time, last at step 5" in words
    assert life([step(1)])[0] == "note"
    assert "too few to judge" in life([step(1, signs=signs(1.0, spread=0.0) | {"rows": 4})])[1]
    assert life([step(1, signs=signs(math.nan))])[0] == "warning"


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "log.jsonl"])
def test_a_folder_that_is_no_run_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(DataFault, match="run & <one>"):
        pretraining_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name, text", [("config.yaml", "a: [1"), ("provenance.json", "{"), ("config.yaml", "[]")])
def test_a_damaged_settings_file_is_a_data_fault(run, name, text):
    (run / name).write_text(text)
    with pytest.raises(DataFault, match="run it again"):
        pretraining_report(run)


def test_a_report_that_cannot_say_what_was_learned_from_is_not_written(run):
    (run / "provenance.json").write_text('{"cases": []}')
    with pytest.raises(DataFault, match="no rejected"):
        pretraining_report(run)


def test_a_run_without_a_step_is_still_reported(run):
    (run / "log.jsonl").write_text("")
    assert "Nothing was logged" in pretraining_report(run).read_text(encoding="utf-8")


def test_where_heads_look_is_drawn_where_it_was_measured(run):
    assert "Where heads look" not in pretraining_report(run).read_text(encoding="utf-8")
    rows = [step(n) for n in range(1, 21)]
    for at in (4, 9, 19):  # every so many steps
        of_stages = {f"stage{stage}.entropy": 0.2 * stage + at / 100 for stage in (1, 3)}
        rows[at] |= {"notes": {**of_stages, "stage1.distance_mm": 6.0, "stage3.distance_mm": None, "retention": 0.9}}
    rows[10] |= {"notes": {"retention": 0.8}}
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = pretraining_report(run).read_text(encoding="utf-8")
    section = html[html.rindex(">Where heads look<") :]  # after the list of contents
    section = section[: section.index("</section>")]
    assert [title in section for title in ("Entropy", "Distance (mm)", "Divergence", "Spread of")] == [1, 1, 0, 0]
    assert section.count("<svg") == 2 and "retention" not in section
    _, entropy, distance = section.split("<figure")
    assert [line.count(",") for line in re.findall(r'points="([^"]*)"', entropy)] == [3, 3]  # three points a stage
    assert [name in entropy for name in ("stage 1", "stage 2", "stage 3")] == [True, False, True]
    assert len(re.findall(r'points="', distance)) == 1  # of stage 3 nothing finite was measured
