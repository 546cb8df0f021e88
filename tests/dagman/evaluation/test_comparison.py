"""A comparison pairs runs by seed and draw, sets sides by their encoder, and refuses whatever differs besides."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from dagman.evaluation.cases_table import read_cases, write_cases
from dagman.evaluation.comparison import compare_runs, runs_in
from dagman.evaluation.comparison_sides import first_difference
from dagman.evaluation.comparison_tables import as_latex, as_markdown, latex_escaped
from dagman.evaluation.statistics import COMPARABLE, paired_comparison
from spade3d.faults import DataFault, UsageFault

PROTOCOL = {"name": "holdout", "split": "the dataset's own", "overlap": 0.5, "spacing_mm": [2.0, 2.0, 2.0]}
PROTOCOL |= {"definitions": {"dice": "as ever"}}
NOBODY = {"pretraining": "none", "validation_in_training": [], "validation_in_pretraining": []}


def make_run(folder, *, source=None, seed=0, gain=0.0, begun=None, older=False, settings="", judges=None, **changed):
    """A finished run of eight subjects and two structures, as its summary and its table tell of it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"steps: 1\nseed: {seed}\nout: same\n{settings}\n")
    judges = range(8) if judges is None else judges
    rng = np.random.default_rng(seed)
    rows = [
        {"case": f"c{n}", "subject": f"s{n}", "class": value, "name": name, "dice": 0.5 + 0.2 * rng.random() + gain}
        | {"hd95_mm": 3.0, "nsd": 0.5, "voxels_true": 10, "voxels_predicted": 10}
        for n in judges
        for value, name in ((1, "liver"), (2, "spleen"))
    ]
    if not older:
        rows = [row | {"asd_mm": 2.0 - gain, "volume_difference_ml": 0.0} for row in rows]
    write_cases(folder / "cases.csv", rows)
    dice = float(np.mean([row["dice"] for row in rows]))
    summary = {"mean_dice": dice, "mean_dice_interval": [0.4, 0.9], "mean_hd95_mm": 3.0, "mean_nsd": 0.5}
    summary |= {"protocol": PROTOCOL, "labels": 2, "seed": seed, "leakage": NOBODY}
    summary |= {"coverage": source and {"loaded": 118, "total": 118, "source": source, "run": begun}}
    summary |= {"split": {"train": [f"t{seed}"], "validation": [f"s{n}" for n in judges]}}
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
    assert "8 better, 0 equal, 0 worse" in told
    result = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert result["runs"]["pretrained (spade 0badcafe)"] == {"seed 0": str(ours[1]), "seed 1": str(ours[0])}
    whole, liver, spleen = result["comparisons"]["pretrained (spade 0badcafe)"]
    assert whole["difference"] == pytest.approx(0.1) and whole["p"] == pytest.approx(2 / 2**8)
    assert (whole["wins"], liver["name"], spleen["pairs"]) == (8, "liver", 16)
    assert "had a better mean Dice than from scratch" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_without_a_run_from_scratch_the_first_side_is_the_reference(tmp_path):
    runs = [make_run(tmp_path / name, source=name) for name in ("z.pt", "a.pt", "m.pt")]
    said = compare_runs(runs, tmp_path / "out")
    assert said["reference"] == "from z.pt"
    assert [key for key in said if "against" in key] == ["from a.pt, against it", "from m.pt, against it"]


@pytest.mark.parametrize(
    ("changed", "fault", "message"),
    [
        ({"protocol": PROTOCOL | {"overlap": 0.7}}, DataFault, "another protocol than .*scratch .overlap: 0.5 and 0.7"),
        ({"protocol": PROTOCOL | {"flips": "ras"}}, DataFault, "another protocol than .*flips: none and ras"),
        ({"protocol": PROTOCOL | {"surface": "elements"}}, DataFault, "surface: voxels and elements"),
        ({"protocol": PROTOCOL | {"name": "msd"}}, DataFault, "another protocol than .*name: holdout and msd"),
        (
            {"protocol": PROTOCOL | {"spacing_mm": [1.0, 1.0, 1.0]}},
            DataFault,
            r"spacing_mm: \[2.0, 2.0, 2.0\] and \[1.0, 1.0, 1.0\]",
        ),
        (
            {"protocol": PROTOCOL | {"definitions": {"dice": "odd"}}},
            DataFault,
            r"\(definitions.dice: as ever and odd\); compare",
        ),
        ({"labels": 4}, DataFault, "another labels than .*2 and 4"),
        ({"split": {"train": ["t0"], "validation": ["x"]}}, DataFault, "judged on other subjects"),
        ({"split": {"train": ["x"], "validation": [f"s{n}" for n in range(8)]}}, DataFault, "learned from other"),
        ({"coverage": None}, UsageFault, "both are from scratch with seed 0; give one of each"),
        ({"pair": "seed 0, draw 1"}, UsageFault, "from scratch was run with seed 0, from a.pt was not .2"),
        ({"coverage": None, "seed": 1}, UsageFault, "all runs are from scratch"),
        ({"seed": 1}, UsageFault, "from scratch was run with seed 0, from a.pt was not"),
    ],
)
def test_runs_that_were_judged_otherwise_or_have_no_partner_are_refused(tmp_path, changed, fault, message):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "ours", source="a.pt", **changed)]
    with pytest.raises(fault, match=message):
        compare_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_judged_other_cases_are_refused(tmp_path):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "ours", source="a.pt")]
    lines = (runs[1] / "cases.csv").read_text(encoding="utf-8").splitlines()
    (runs[1] / "cases.csv").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(DataFault, match=r"only the first run has c7 \(class 1, seed 0\)"):
        compare_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def several(folder, draws=(0, 1, 2), **gained):
    """The runs of one command with --draws and --from-scratch-twin."""
    for draw in draws:
        drawn = {"pair": f"seed 0, draw {draw}", "draw": draw} | {
            "split": {"train": [f"t{draw}"], "validation": [f"s{n}" for n in range(8)]}
        }
        make_run(folder / f"pretrained-seed0-draw{draw}", source="a.pt", gain=0.1, **drawn, **gained)
        make_run(folder / f"scratch-seed0-draw{draw}", **drawn)
    return folder


def test_a_folder_of_several_runs_is_all_of_them_paired_by_draw(tmp_path):
    folder = several(tmp_path / "few")
    said = compare_runs([folder], folder / "comparison")
    assert "24 pairs of 8 subjects" in said["from a.pt, against it"]
    result = json.loads((folder / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    assert list(result["runs"]["from a.pt"]) == [f"seed 0, draw {draw}" for draw in range(3)]
    assert (result["metric"], result["labels"], result["protocol"]) == ("dice", 2, result["protocol"] | PROTOCOL)
    assert list(result["other_metrics"]) == ["hd95_mm", "nsd", "asd_mm", "volume_error_ml"]
    # Named again one by one they are the same runs, and what compare wrote among them is none.
    runs = runs_in([folder, *folder.glob("*-draw0")])
    assert len(runs) == 6 and all(run.parent == folder for run in runs)


def test_a_folder_with_an_unfinished_run_or_with_none_is_refused(tmp_path):
    folder = several(tmp_path / "few", (0, 1))
    (folder / "scratch-seed0-draw1" / "summary.json").unlink()
    with pytest.raises(DataFault, match="scratch-seed0-draw1: is not finished, as are 3 runs beside it"):
        compare_runs([folder], tmp_path / "out")
    with pytest.raises(DataFault, match="holds no finished run"):
        compare_runs([tmp_path / "few" / "scratch-seed0-draw1"], tmp_path / "out")
    with pytest.raises(UsageFault, match="1 runs given"):
        compare_runs([folder / "scratch-seed0-draw0"] * 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_csv_has_one_row_a_side_structure_and_metric(tmp_path):
    runs = [make_run(tmp_path / name, source=source, gain=gain) for name, source, gain in THREE]
    compare_runs(runs, tmp_path / "out", "asd_mm")
    with open(tmp_path / "out" / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * len(COMPARABLE) == 30
    assert {(row["side"], row["class"], row["metric"]) for row in rows} == {
        (side, value, metric)
        for side in ("from a.pt", "from b.pt")
        for value in ("", "1", "2")
        for metric in COMPARABLE
    }
    (one,) = (row for row in rows if (row["side"], row["name"], row["metric"]) == ("from a.pt", "liver", "asd_mm"))
    assert float(one["difference"]) == pytest.approx(-0.1) and (one["wins"], one["losses"]) == ("8", "0")
    assert float(one["p_holm"]) == pytest.approx(4 * float(one["p"]))
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "had a better mean ASD (mm) than from scratch" in html and html.count("Mean ASD (mm) of each subject") == 4


def test_runs_that_learned_otherwise_are_sides_by_that(tmp_path):
    """Only what judges must agree; what summary.json says of training and tuning is what is compared."""
    learned = {
        "plain": "optim: {lr: 0.0005}\ntuning: {encoder: full}\ndevice: cpu\nscoring: {looks: 0}",
        "fast": "optim: {lr: 0.002}\ntuning: {encoder: full}\ndevice: cuda\nscoring: {looks: 4}",
        "frozen": "optim: {lr: 0.0005}\ntuning: {encoder: frozen}\ndevice: cpu\nscoring: {looks: 0}",
    }
    runs = [
        make_run(
            tmp_path / f"{name}{seed}",
            source="a.pt",
            seed=seed,
            settings=text,
            protocol=PROTOCOL | {"training": {"optim": name}, "tuning": name, "deviations": [f"crop {name}"]},
        )
        for seed in (0, 1)
        for name, text in learned.items()
    ]
    said = compare_runs(runs, tmp_path / "out")
    assert said["reference"] == "from a.pt, optim.lr 0.0005, tuning.encoder full"
    assert [key.removesuffix(", against it") for key in said if "against" in key] == [
        "from a.pt, optim.lr 0.002, tuning.encoder full",
        "from a.pt, optim.lr 0.0005, tuning.encoder frozen",
    ]
    result = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert result["protocol"]["deviations"] == ["crop plain", "crop fast", "crop frozen"]
    assert "training" not in result["protocol"]


def test_older_runs_whose_definitions_lack_a_metric_compare_in_what_both_define(tmp_path):
    newer = PROTOCOL | {"definitions": PROTOCOL["definitions"] | {"volume_error_ml": "its size"}}
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt", protocol=newer)]
    assert compare_runs(runs, tmp_path / "out")["reference"] == "from scratch"


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, "a.b.d: 2 and 3"),
        ({"a": {"b": 1}}, {"a": {}}, "a.b: 1 and nothing"),
        ({"a": None}, {}, "a: None and nothing"),
        ({"a": {"b": 1}}, {"a": 2}, "a: {'b': 1} and 2"),
        (4, 8, "4 and 8"),
    ],
)
def test_a_difference_is_named_by_its_leaf(one, other, said):
    assert first_difference(one, other) == said


def fold(folder, k, of=4, **more):
    """A run of one of four folds over the eight subjects: two judge, the others teach."""
    judges = [2 * k, 2 * k + 1]
    split = {"train": [f"s{n}" for n in range(8) if n not in judges], "validation": [f"s{n}" for n in judges]}
    rule = f"fold {k} of {of} by subject: 2 of 8 labelled subjects judge"
    said = {"protocol": PROTOCOL | {"split": rule}, "split": split, "fold": k, "labels": 6} | more
    return make_run(folder, judges=judges, **said)


def folds(tmp_path, which=range(4)) -> list:
    """Twins of every fold; the pretrained one gains 0.0, 0.1, ... by its fold."""
    scratch = [fold(tmp_path / f"scratch{k}", k) for k in which]
    return [*scratch, *(fold(tmp_path / f"ours{k}", k, source="a.pt", gain=k / 10) for k in which)]


def test_folds_are_pooled_to_all_cases_judged_once(tmp_path):
    runs = folds(tmp_path)
    said = compare_runs(runs, tmp_path / "out")
    assert "8 pairs of 8 subjects" in said["from a.pt, against it"] and "was not run" not in str(said)
    result = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert list(result["runs"]["from a.pt"]) == [f"seed 0, fold {k}" for k in range(4)]
    whole, *_ = result["comparisons"]["from a.pt"]
    assert whole["difference"] == pytest.approx((0.0 + 0.1 + 0.2 + 0.3) / 4)
    dice = [row["dice"] for k in range(4) for row in read_cases(runs[k] / "cases.csv")]
    assert len(dice) == 16 and whole["mean_a"] == pytest.approx(np.mean(dice))
    assert (result["protocol"]["split"], result["folds"]) == (
        "one of 4 folds by subject: 8 labelled subjects",
        [0, 1, 2, 3],
    )


def test_encoders_that_were_pretrained_for_each_fold_are_one_side(tmp_path):
    """Each fold has an encoder that did not see its judges: other scans, another file, and yet one pretraining."""

    def pretrained(k, settings="0badcafe"):
        begun = {"recipe": "spade", "settings": settings, "scans": f"{k}{k}{k}"}
        return fold(tmp_path / f"{settings}{k}", k, source=f"fold{k}/encoder.safetensors", begun=begun)

    ours, scratch = [pretrained(k) for k in (0, 1)], [fold(tmp_path / f"scratch{k}", k) for k in (0, 1)]
    said = compare_runs([*scratch, *ours], tmp_path / "out")
    assert "4 pairs of 4 subjects" in said["pretrained (spade 0badcafe, one for each fold), against it"]
    files = [fold(tmp_path / f"file{k}", k, source=f"fold{k}/model.pt") for k in (0, 1)]
    assert "from model.pt, one for each fold, against it" in compare_runs([*scratch, *files], tmp_path / "out")
    other = [pretrained(k, "other") for k in (0, 1)]
    both = compare_runs([*scratch, *ours, *other], tmp_path / "two")
    assert all(f"pretrained (spade {mark}, one for each fold), against it" in both for mark in ("0badcafe", "other"))
    with pytest.raises(UsageFault, match="was not .1 runs without a partner"):  # of two pretrainings, one in each fold
        compare_runs([*scratch, ours[0], other[1]], tmp_path / "mixed")


def test_folds_that_were_not_run_are_named(tmp_path):
    runs = folds(tmp_path, (0, 2))
    said = compare_runs(runs, tmp_path / "out")["from a.pt, against it"]
    assert "fold 1, 3 of 4 was not run: this is not yet the number of all cases" in said
    assert "was not run" not in compare_runs([runs[0], runs[2]], tmp_path / "one")["from a.pt, against it"]
    with pytest.raises(UsageFault, match="from scratch was run with seed 0, fold 2, from a.pt was not .1 runs"):
        compare_runs(runs[:3], tmp_path / "missing")


def test_folds_of_other_splits_or_of_other_subjects_are_not_pooled(tmp_path):
    runs = folds(tmp_path, (0, 1))
    more = [fold(tmp_path / "five", 2, of=5), fold(tmp_path / "fives", 2, of=5, source="a.pt")]
    with pytest.raises(DataFault, match="split: one of 4 folds by subject: .* and one of 5 folds"):
        compare_runs([*runs, *more], tmp_path / "out")
    again = {"split": {"train": ["s7"], "validation": ["s1", "s9"]}}
    twice = [fold(tmp_path / "two", 2, **again), fold(tmp_path / "twos", 2, source="a.pt", **again)]
    with pytest.raises(DataFault, match="two: judged s1, as did .*scratch0 in another fold; pool folds of one split"):
        compare_runs([*runs, *twice], tmp_path / "out")
    others = {"split": {"train": ["s0"], "validation": ["s4", "s5"]}}
    with pytest.raises(DataFault, match="ours2: learned from other subjects than .*scratch2"):
        compare_runs(
            [*runs, fold(tmp_path / "scratch2", 2), fold(tmp_path / "ours2", 2, source="a.pt", **others)],
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_what_follows_the_scans_of_a_fold_makes_no_side(tmp_path):
    """Crop and labels are others in each fold where they were left open; the learning rate is what differs."""
    runs = [
        fold(tmp_path / f"{lr}-{k}", k, source="a.pt", labels=6 + k, settings=f"crop: [{k}]\noptim: {{lr: {lr}}}")
        for k in (0, 1)
        for lr in (0.1, 0.2)
    ]
    assert compare_runs(runs, tmp_path / "out")["reference"] == "from a.pt, optim.lr 0.1"


def test_folds_that_were_told_other_numbers_of_labels_are_not_pooled(tmp_path):
    runs = folds(tmp_path, (0, 1))
    few = {"labels": 4, "settings": "labels: 4"}
    with pytest.raises(DataFault, match="scratch2: another labels than .*scratch0 .--labels: all and 4"):
        compare_runs(
            [*runs, fold(tmp_path / "scratch2", 2, **few), fold(tmp_path / "ours2", 2, source="a.pt", **few)],
            tmp_path / "out",
        )


def test_a_fold_number_where_a_split_has_no_folds_is_no_pair(tmp_path):
    runs = [make_run(tmp_path / "scratch", fold=0), make_run(tmp_path / "again", fold=1)]
    with pytest.raises(UsageFault, match="both are from scratch with seed 0; give one of each"):
        compare_runs(runs, tmp_path / "out")


def test_judges_that_a_pretraining_saw_stand_beside_every_result(tmp_path):
    seen = NOBODY | {"pretraining": "checked", "validation_in_pretraining": ["s1", "s2"]}
    runs = [
        make_run(tmp_path / "scratch"),
        make_run(tmp_path / "a", source="a.pt", leakage=seen | {"suspected_in_pretraining": ["s3"]}),
        make_run(tmp_path / "b", source="b.pt", leakage=NOBODY | {"pretraining": "unknown"}),
    ]
    said = compare_runs(runs, tmp_path / "out")
    told = "from a.pt: 2 (s1, s2), perhaps 1 (s3); from b.pt: unknown, its encoder does not say what it was pretrained"
    assert said["judges that were seen in pretraining"].startswith(told)
    result = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))["leakage"]
    assert result["judges that were seen in pretraining"] == said["judges that were seen in pretraining"]
    assert result["sides"]["from a.pt"] == {
        "pretraining": ["checked"],
        "seen": ["s1", "s2"],
        "suspected": ["s3"],
        "in_training": [],
    }
    assert result["sides"]["from scratch"]["pretraining"] == ["none"]
    for name in ("comparison.md", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert f"Judges that were seen in pretraining: {told}" in text, name


def test_where_no_encoder_saw_a_judge_that_is_said_too_and_a_split_that_leaks_is_named(tmp_path):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt")]
    assert compare_runs(runs, tmp_path / "out")["judges that were seen in pretraining"] == "none"
    assert "Judges that were seen in pretraining: none." in (tmp_path / "out" / "report.html").read_text(
        encoding="utf-8"
    )
    both = {"split": {"train": ["s0", "t0"], "validation": [f"s{n}" for n in range(8)]}}
    runs = [make_run(tmp_path / f"{name}-leaks", source=name, **both) for name in ("a.pt", "b.pt")]
    said = compare_runs(runs, tmp_path / "out")["judges that were seen in pretraining"]
    assert said == "from a.pt: 1 (s0) even taught it; from b.pt: 1 (s0) even taught it"


THREE = (("scratch", None, 0.0), ("a", "a.pt", 0.1), ("b", "b.pt", -0.1))


def test_a_metric_that_older_runs_do_not_have_is_refused_and_left_out_of_the_csv(tmp_path):
    runs = [make_run(tmp_path / "scratch", older=True), make_run(tmp_path / "a", source="a.pt")]
    with pytest.raises(DataFault, match="judged before there was asd_mm; judge it anew, or compare another"):
        compare_runs(runs, tmp_path / "out", "asd_mm")
    assert not (tmp_path / "out").exists()
    compare_runs(runs, tmp_path / "out")
    assert "asd_mm" not in (tmp_path / "out" / "comparison.csv").read_text(encoding="utf-8")


def test_few_subjects_are_said_to_be_few_everywhere(tmp_path):
    runs = [make_run(tmp_path / "scratch"), make_run(tmp_path / "a", source="a.pt", gain=0.1)]
    for run in runs:
        lines = (run / "cases.csv").read_text(encoding="utf-8").splitlines()
        (run / "cases.csv").write_text("\n".join(lines[:7]) + "\n")  # three of the eight subjects
    said = compare_runs(runs, tmp_path / "out")
    few = "with 3 subjects the smallest possible p is 0.25"
    assert few in said["from a.pt, against it"]
    for name in ("comparison.json", "comparison.csv", "comparison.md", "report.html"):
        assert few in (tmp_path / "out" / name).read_text(encoding="utf-8"), name


ODD = r"R&D_50% #1 $x^{2}$ ~ C:\run <b>|</b> " + "\u00fc\u4e2d\ny"


def odd_comparison():
    rows = [
        {"case": f"c{n}", "subject": f"s{n}", "class": 1, "name": ODD, "dice": 0.5, "hd95_mm": 3.0, "nsd": 0.5}
        for n in range(3)
    ]
    return {ODD: paired_comparison(rows, [row | {"dice": 0.4} for row in rows])}


def test_latex_is_a_plain_tabular_with_every_sign_escaped():
    written = as_latex(ODD, odd_comparison())
    body = written.split("\\begin{tabular}{lrrrrrrr}\n")[1].split("\\end{tabular}")[0]
    rows = [line for line in body.splitlines() if line != r"\hline"]
    assert all(line.endswith(r" \\") for line in rows)
    for line in rows:  # a row has 8 cells, or one that spans 8
        assert len(re.findall(r"(?<!\\)&", line)) == (0 if line.startswith(r"\multicolumn{8}{l}") else 7), line
        assert not re.search(r"(?<!\\)[#%_]", line), line
        assert line.count("{") == line.count("}")  # an escaped brace comes in pairs, too
    assert latex_escaped(ODD).startswith(
        r"R\&D\_50\% \#1 \$x\textasciicircum{}\{2\}\$ \textasciitilde{} C:\textbackslash{}run "
    )
    assert latex_escaped(ODD).endswith(
        r"\textless{}b\textgreater{}\textbar{}\textless{}/b\textgreater{} " + "\u00fc[U+4E2D] y"
    )
    assert "$-$0.100" in written


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles_in_a_bare_article(tmp_path):
    document = "\\documentclass{article}\\begin{document}\n" + as_latex(ODD, odd_comparison()) + "\\end{document}\n"
    (tmp_path / "table.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_cells_hold_what_they_are_given():
    written = as_markdown(ODD, "dice", {"dice": odd_comparison()})
    table = [line for line in written.splitlines() if line.startswith("|")]
    assert len(table) == 4 and all(len(re.findall(r"(?<!\\)\|", line)) == 9 for line in table)
    assert "0/0/3" in table[-1] and "only 3 subjects" in written
