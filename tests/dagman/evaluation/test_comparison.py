"""A comparison pairs runs by seed, sets sides by their encoder, and refuses whatever differs besides."""

import json

import numpy as np
import pytest

from dagman.evaluation.comparison import compare_runs
from dagman.evaluation.statistics import write_cases
from spade3d.faults import DataFault, UsageFault

PROTOCOL = {"name": "holdout", "crop": [16, 16, 16]}
NOBODY = {"pretraining": "none", "validation_in_training": [], "validation_in_pretraining": []}


def make_run(folder, *, source=None, seed=0, gain=0.0, begun=None, **changed):
    """A finished run of eight subjects and two structures, as its summary and its table tell of it."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    rows = [
        {"case": f"c{n}", "subject": f"s{n}", "class": value, "name": name, "dice": 0.5 + 0.2 * rng.random() + gain}
        | {"hd95_mm": 3.0, "nsd": 0.5, "voxels_true": 10, "voxels_predicted": 10}
        for n in range(8)
        for value, name in ((1, "liver"), (2, "spleen"))
    ]
    write_cases(folder / "cases.csv", rows)
    dice = float(np.mean([row["dice"] for row in rows]))
    summary = {"mean_dice": dice, "mean_dice_interval": [0.4, 0.9], "mean_hd95_mm": 3.0, "mean_nsd": 0.5}
    summary |= {"protocol": PROTOCOL, "labels": 2, "seed": seed, "leakage": NOBODY}
    summary |= {"coverage": source and {"loaded": 118, "total": 118, "source": source, "run": begun}}
    summary |= {"split": {"train": [f"t{seed}"], "validation": [f"s{n}" for n in range(8)]}}
    (folder / "summary.json").write_text(json.dumps(summary | changed))
    return folder


def test_sides_are_pretrainings_pairs_are_seeds_and_scratch_is_the_reference(tmp_path):
    ours = [
        make_run(
            tmp_path / f"ours{s}",
            source=f"run{s}/encoder.safetensors",  # one pretraining, done once for each seed
            seed=s,
            gain=0.1,
            begun={"recipe": "spade", "seed": s, "settings": "0badcafe"},
        )
        for s in (1, 0)
    ]
    scratch = [make_run(tmp_path / f"scratch{s}", seed=s) for s in (0, 1)]
    said = compare_runs([*ours, *scratch], tmp_path / "out")
    assert said["reference"] == "from scratch"
    told = said["pretrained (spade 0badcafe), against it"]
    assert told.startswith("+0.1000 [+0.1000, +0.1000] Dice") and "16 pairs of 8 subjects" in told
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["runs"]["pretrained (spade 0badcafe)"] == {"0": str(ours[1]), "1": str(ours[0])}
    whole, liver, spleen = result["comparisons"]["pretrained (spade 0badcafe)"]
    assert whole["difference"] == pytest.approx(0.1) and whole["p"] == pytest.approx(2 / 2**8)
    assert (whole["wins"], liver["name"], spleen["pairs"]) == (8, "liver", 16)
    assert "had a better mean Dice than from scratch" in (tmp_path / "out" / "report.html").read_text()


def test_without_a_run_from_scratch_the_first_side_is_the_reference(tmp_path):
    runs = [make_run(tmp_path / name, source=name) for name in ("z.pt", "a.pt", "m.pt")]
    said = compare_runs(runs, tmp_path / "out")
    assert said["reference"] == "from z.pt"
    assert [key for key in said if "against" in key] == ["from a.pt, against it", "from m.pt, against it"]


@pytest.mark.parametrize(
    ("changed", "fault", "message"),
    [
        ({"protocol": PROTOCOL | {"crop": [8, 8, 8]}}, DataFault, "another protocol than .*crop: .*16.* and .*8"),
        ({"labels": 4}, DataFault, "another labels than .*2 and 4"),
        ({"split": {"train": ["t0"], "validation": ["x"]}}, DataFault, "judged on other subjects"),
        ({"split": {"train": ["x"], "validation": [f"s{n}" for n in range(8)]}}, DataFault, "learned from other"),
        ({"coverage": None}, UsageFault, "both are from scratch with seed 0"),
        ({"coverage": None, "seed": 1}, UsageFault, "all runs are from scratch"),
        ({"seed": 1}, UsageFault, r"from a.pt was run with seeds \[1\], from scratch with \[0\]"),
    ],
)
def test_runs_that_differ_in_more_than_the_encoder_are_refused(tmp_path, changed, fault, message):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "ours", source="a.pt", **changed)]
    with pytest.raises(fault, match=message):
        compare_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_judged_other_cases_are_refused(tmp_path):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "ours", source="a.pt")]
    lines = (runs[1] / "cases.csv").read_text().splitlines()
    (runs[1] / "cases.csv").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(DataFault, match=r"only the first run has c7 \(class 1, seed 0\)"):
        compare_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
