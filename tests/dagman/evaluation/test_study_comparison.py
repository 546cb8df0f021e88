"""Runs of studies compared: AUROC by study, maps by box, sides by what learned; what does not compare is refused."""

import csv
import json
import math

import numpy as np
import pytest

from dagman.evaluation.classification import auroc, compare_findings, read_predictions, write_predictions
from dagman.evaluation.comparison import compare_runs
from dagman.evaluation.comparison_tables import METRIC_NAMES
from dagman.evaluation.localisation import MEASURES
from dagman.evaluation.study_comparison import MEASURED, read_boxes_judged
from spade3d.faults import DataFault, UsageFault

FINDINGS = ("lump", "cyst")
PROTOCOL = {"name": "holdout", "split": "fold 0 of 5", "spacing_mm": [2.0, 2.0, 2.0], "overlap": 0.5, "head": "linear"}
NOBODY = {"pretraining": "none", "validation_in_training": [], "validation_in_pretraining": []}
JUDGES = [f"s{n:02}" for n in range(24)]


def make_run(folder, *, source=None, seed=0, gain=0.0, boxes=True, settings="head: linear", **changed):
    """A finished run that judged 24 studies for two findings, and a box in each of the first eight; `gain` parts
    studies with a finding from those without, and moves boxes nearer."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: {seed}\nout: same\n{settings}\n")
    rng = np.random.default_rng(seed)
    rows = [
        {"case": f"c{who}", "subject": who, "finding": finding, "label": float((n + m) % 2)}
        | {"probability": float(0.3 + 0.3 * rng.random() + gain * ((n + m) % 2))}
        for n, who in enumerate(JUDGES)
        for m, finding in enumerate(FINDINGS)
    ]
    write_predictions(folder / "predictions.csv", rows)
    where = None
    if boxes:
        judged = [
            {"subject": who, "finding": FINDINGS[n % 2], "box": 0, "diameter_mm": 20.0 + n, "threshold": 0.5}
            | {name: 0.2 + 0.1 * rng.random() + gain for name in MEASURES}
            | {"peak_mm": 9.0 - gain, "error_x_mm": None}
            for n, who in enumerate(JUDGES[:8])
        ]
        where = {
            "judging": {"tolerance_mm": 10.0, "seed": seed},
            "measures": {name: {"mean": 0.2} for name in MEASURES},
        }
        (folder / "localisation.json").write_text(json.dumps(where | {"rows": judged}))
    summary = {"task": "localisation", "macro_auroc": 0.6, "macro_auroc_interval": [0.4, 0.8], "macro_ap": 0.6}
    summary |= {"per_finding": dict.fromkeys(FINDINGS, {}), "undefined": [], "protocol": PROTOCOL, "fold": 0}
    summary |= {"localisation": where, "labels": 4, "seed": seed, "leakage": NOBODY, "taught": {"lump": 2}}
    summary |= {"coverage": source and {"loaded": 1, "total": 1, "source": source}}
    summary |= {"split": {"train": [f"t{seed}"], "validation": JUDGES}}
    (folder / "summary.json").write_text(json.dumps(summary | changed))
    return folder


def result(out) -> dict:
    return json.loads((out / "comparison.json").read_text(encoding="utf-8"))


def test_sides_are_paired_by_study_and_seed_and_the_tables_have_every_measure(tmp_path):
    ours = [make_run(tmp_path / f"ours{s}", source="a.pt", seed=s, gain=0.25) for s in (1, 0)]
    scratch = [make_run(tmp_path / f"scratch{s}", seed=s) for s in (0, 1)]
    said = compare_runs([*ours, *scratch], tmp_path / "out")
    assert said["reference"] == "from scratch"
    found = result(tmp_path / "out")
    assert (found["metric"], found["findings"], found["runs"]["from a.pt"]["seed 1"]) == (
        "auroc",
        list(FINDINGS),
        str(ours[0]),
    )
    assert list(found["other_metrics"]) == [name for name in MEASURED if name != "auroc"]
    whole, lump, cyst = found["comparisons"]["from a.pt"]
    by_hand = [
        np.mean([score(run, finding) for finding in FINDINGS for run in side]) for side in (scratch, ours)
    ]  # the mean over findings, then over seeds, is the mean of all
    assert (whole["mean_a"], whole["mean_b"]) == pytest.approx(tuple(by_hand))
    assert whole["difference"] == pytest.approx(by_hand[1] - by_hand[0]) and whole["low"] > 0
    assert (whole["pairs"], whole["subjects"], whole["wins"], lump["name"], cyst["class_"]) == (48, 24, None, "lump", 2)
    iou, *_ = found["other_metrics"]["iou"]["from a.pt"]
    assert (iou["pairs"], iou["subjects"], iou["wins"], iou["difference"]) == (16, 8, 8, pytest.approx(0.25))
    assert iou["p"] == iou["smallest_p"] == 2 / 10_000  # all eight gained: no set of subjects did not
    peak, *_ = found["other_metrics"]["peak_mm"]["from a.pt"]
    assert (peak["difference"], peak["wins"]) == (pytest.approx(-0.25), 8)  # nearer is better
    missing, *_ = found["other_metrics"]["error_x_mm"]["from a.pt"]
    assert (missing["difference"], missing["pairs"], missing["left_out"]) == (None, 0, 16)
    assert f"AUROC ({by_hand[1]:.4f} against {by_hand[0]:.4f})" in said["from a.pt, against it"]
    assert "48 pairs of 24 subjects" in said["from a.pt, against it"] and "better," not in said["from a.pt, against it"]


def score(run, finding: str) -> float:
    rows = [row for row in read_predictions(run / "predictions.csv") if row["finding"] == finding]
    return auroc(np.array([row["label"] for row in rows]), np.array([row["probability"] for row in rows]))


def test_every_output_says_the_same_of_findings_and_of_how_it_was_tested(tmp_path):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt", gain=0.25)]
    out = tmp_path / "out"
    compare_runs(runs, out)
    with open(out / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(MEASURED) * 3 and {row["metric"] for row in rows} == set(MEASURED)
    (one,) = (row for row in rows if (row["metric"], row["name"]) == ("auroc", "lump"))
    assert float(one["difference"]) > 0 and one["wins"] == "" and one["class"] == "1"
    written = (out / "comparison.md").read_text(encoding="utf-8")
    assert written.startswith("# AUROC against from scratch\n") and "| Finding | Reference |" in written
    assert "mean over findings" in written and "p: bootstrap over subjects" in written
    assert "bootstrap over subjects" in (out / "comparison.tex").read_text(encoding="utf-8")
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "from a.pt had a better mean AUROC than from scratch" in html
    assert "AUROC of each finding" in html and html.count('class="pair"') == 2
    assert "T(IoU) 0.3" in html and "structure" not in html.lower() and "Wilcoxon" not in html
    compare_runs(runs, tmp_path / "where", "pointing")
    html = (tmp_path / "where" / "report.html").read_text(encoding="utf-8")
    assert "had a better mean pointing" in html and html.count('class="pair"') == 8
    assert "two-sided bootstrap; the least possible is 0.0002" in html and "Wilcoxon" not in html
    assert "p: bootstrap over subjects" in (tmp_path / "where" / "comparison.md").read_text(encoding="utf-8")


def test_runs_that_learned_otherwise_are_sides_by_that(tmp_path):
    """Seeds, places, what is the same in all, and settings of a head that a run does not have, make no side."""
    told = {"linear": "head: linear\nattention: {dim: 4}\ntokens: x"}
    told |= {f"dim{dim}": f"head: attention\nattention: {{dim: {dim}, places: true}}\ntokens: y" for dim in (8, 16)}
    runs = [
        make_run(tmp_path / f"{head}{seed}", seed=seed, settings=text) for seed in (0, 1) for head, text in told.items()
    ]
    said = compare_runs(runs, tmp_path / "out")
    assert said["reference"] == "from scratch, head linear"
    assert [key.removesuffix(", against it") for key in said if "against" in key] == [
        f"from scratch, head attention, attention.dim {dim}" for dim in (8, 16)
    ]
    assert compare_runs(runs[:2], tmp_path / "out")["reference"] == "from scratch, head linear"
    pretrained = make_run(tmp_path / "ours", source="a.pt", settings=told["linear"])
    assert compare_runs([pretrained, runs[0]], tmp_path / "out")["reference"] == "from scratch"
    with pytest.raises(UsageFault, match="head linear was run with seed 1, from scratch, head attention was not"):
        compare_runs([*runs[:2], runs[3]], tmp_path / "other")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "classification"}, "another task than .*localisation and classification"),
        ({"per_finding": {"lump": {}}}, "another findings than .*lump, cyst and lump"),
        ({"fold": 1}, "another fold than .*0 and 1"),
        (
            {"protocol": PROTOCOL | {"split": "fold 0 of 4"}},
            "another protocol than .*split: fold 0 of 5 and fold 0 of 4",
        ),
        ({"labels": 8}, "another labels than"),
        ({"split": {"train": ["t0"], "validation": JUDGES[1:]}}, "judged on other subjects"),
        (
            {"split": {"train": ["x"], "validation": JUDGES}},
            "learned from other subjects than .*scratch, with the same",
        ),
        ({"taught": {"lump": 3}}, "learned from other labels than .*scratch; compare runs of one --findings"),
    ],
)
def test_runs_that_do_not_share_what_judges_them_are_refused(changed, message, tmp_path):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt", **changed)]
    with pytest.raises(DataFault, match=message):
        compare_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_labels_boxes_and_ways_of_judging_maps_are_refused(tmp_path):
    scratch, ours = make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt")
    table, where = ours / "predictions.csv", ours / "localisation.json"
    before = {path: path.read_text(encoding="utf-8") for path in (table, where)}

    def refused(message):
        with pytest.raises(DataFault, match=message):
            compare_runs([scratch, ours], tmp_path / "out")
        for path, text in before.items():
            path.write_text(text)

    table.write_text(before[table].replace("cs00,s00,lump,0", "cs00,s00,lump,1"))
    refused("or with other labels; compare runs of one split and one CSV of findings")
    where.write_text(before[where].replace('"diameter_mm": 20.0', '"diameter_mm": 30.0'))
    refused("s00 lump 0: a box of 20 mm in one run and of 30 mm in another")
    where.write_text(before[where].replace('"subject": "s00"', '"subject": "s09"'))
    refused("2 boxes were judged by one method alone")
    where.write_text("{}")
    refused("localisation.json: cannot be read")
    summary = json.loads((ours / "summary.json").read_text(encoding="utf-8"))
    summary["localisation"]["judging"]["tolerance_mm"] = 5.0
    (ours / "summary.json").write_text(json.dumps(summary))
    refused("judges maps otherwise than .*tolerance_mm: 10.0 and 5.0")
    assert not (tmp_path / "out").exists()


def test_runs_that_differ_in_the_judging_of_maps_alone_are_told_so(tmp_path):
    """Both are from scratch with one seed: that they are one side is true, and not the reason."""
    runs = [make_run(tmp_path / name) for name in ("near", "far")]
    said = json.loads((runs[1] / "summary.json").read_text(encoding="utf-8"))
    said["localisation"]["judging"]["tolerance_mm"] = 20.0
    (runs[1] / "summary.json").write_text(json.dumps(said))
    with pytest.raises(DataFault, match="far: judges maps otherwise than .*near .tolerance_mm: 10.0 and 20.0"):
        compare_runs(runs, tmp_path / "out")
    said["localisation"]["judging"]["tolerance_mm"] = 10.0
    (runs[1] / "summary.json").write_text(json.dumps(said))
    with pytest.raises(UsageFault, match="both are from scratch with seed 0; give one of each"):
        compare_runs(runs, tmp_path / "out")


def test_kinds_of_runs_and_metrics_do_not_mix(tmp_path):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt", boxes=False)]
    with pytest.raises(
        UsageFault, match="--metric dice: runs of classification and localisation are compared in one of"
    ):
        compare_runs(runs, tmp_path / "out", "dice")
    with pytest.raises(DataFault, match="a: judged no maps and has no iou"):
        compare_runs(runs, tmp_path / "out", "iou")
    compare_runs(runs, tmp_path / "out")
    assert list(result(tmp_path / "out")["other_metrics"]) == ["ap"]  # what all runs have
    segments = tmp_path / "segments"
    segments.mkdir()
    (segments / "summary.json").write_text(json.dumps({"mean_dice": 0.5, "leakage": NOBODY}))
    with pytest.raises(UsageFault, match="scratch tells findings of studies and .*segments segments"):
        compare_runs([runs[0], segments], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_judges_that_a_pretraining_saw_stand_beside_the_result(tmp_path):
    seen = NOBODY | {"pretraining": "checked", "validation_in_pretraining": ["s01"]}
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt", leakage=seen)]
    assert compare_runs(runs, tmp_path / "out")["judges that were seen in pretraining"] == "from a.pt: 1 (s01)"
    assert result(tmp_path / "out")["leakage"]["sides"]["from a.pt"]["seen"] == ["s01"]
    for name in ("comparison.md", "report.html"):
        said = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Judges that were seen in pretraining: from a.pt: 1 (s01)." in said, name


def test_few_subjects_and_rare_findings_are_said_and_show_nothing(tmp_path):
    runs = [make_run(tmp_path / "scratch", boxes=False), make_run(tmp_path / "a", source="a.pt", gain=0.5, boxes=False)]
    for run in runs:  # four studies; cyst is absent in all, or not said
        rows = [row for row in read_predictions(run / "predictions.csv") if row["subject"] in JUDGES[:4]]
        rows = [row | ({"label": 0.0} if row["finding"] == "cyst" else {}) for row in rows]
        write_predictions(
            run / "predictions.csv", [row | ({"label": math.nan} if n == 1 else {}) for n, row in enumerate(rows)]
        )
    compare_runs(runs, tmp_path / "out")
    whole, lump, cyst = result(tmp_path / "out")["comparisons"]["from a.pt"]
    assert "only 4 subjects" in whole["note"] and "subjects with it 2, without it 2: few" in lump["note"]
    assert cyst["difference"] is None and "undefined: it takes studies with" in cyst["note"]
    assert (cyst["pairs"], cyst["left_out"]) == (3, 1)
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "No difference in AUROC shown between from a.pt and from scratch, and 4 subjects could not show one" in html


def test_pairs_of_runs_share_the_drawn_subjects():
    """Two pairs that say the same are one pair: same mean, same interval; two that say the opposite cancel out."""
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 30), rng.random((2, 30))

    def rows(of, pair=None):
        made = [
            {"case": f"c{n}", "subject": f"p{n}", "finding": "lump", "label": float(label), "probability": float(share)}
            for n, (label, share) in enumerate(zip(labels, of, strict=True))
        ]
        return made if pair is None else [row | {"pair": pair} for row in made]

    a, b = scores
    once = compare_findings(rows(a), rows(b))
    twice = compare_findings(rows(a, "0") + rows(a, "1"), rows(b, "0") + rows(b, "1"))
    assert once == twice
    opposite = compare_findings(rows(a, "0") + rows(b, "1"), rows(b, "0") + rows(a, "1"))
    assert [(one.difference, one.low, one.high) for one in opposite] == [(0, 0, 0)] * 2
    with pytest.raises(DataFault, match="only one side has 1; compare runs with the same seeds"):
        compare_findings(rows(a, "0"), rows(b, "0") + rows(b, "1"))


def test_every_measure_has_a_name_and_every_missing_value_is_nan(tmp_path):
    assert METRIC_NAMES.keys() >= set(MEASURED)
    rows = read_boxes_judged(make_run(tmp_path / "run"))
    assert all(math.isnan(row["error_x_mm"]) and row["peak_mm"] == 9.0 for row in rows)
