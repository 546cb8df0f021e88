"""Classification and localisation from the command line: phantoms and a CSV in, probabilities, maps and reports out."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dagman.commands
from dagman.downstream.study_model import load_study_model
from spade3d.commands import prepare
from spade3d.networks.foreign import save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training.journal import read_log
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import read_grid, read_volume, write_volume

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--network.feature-size", 12, "--network.window", 4, "--device", "cpu", "--scoring.overlap", 0.25]
HEAD = [*SMALL, "--crop.shape", 32, 32, 32, "--steps", 6, "--save-every", 2, "--studies", 3, "--scoring.looks", 1]
TASK = ["--task", "classification"]
TOKENS = ["--clarity.dim", 24, "--clarity.heads", 2]
LUMPS = (2, 3, 6, 7)  # who has one; 3 and 5 judge
ENDED = [
    "began_with.json",
    "config.yaml",
    "log.jsonl",
    "model.safetensors",
    "predictions.csv",
    "provenance.json",
    "report.html",
]


def end(*tokens) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        dagman.commands.finetune([*map(str, tokens), "--json"])
    return ended.value.code, printed.getvalue()


def run(*tokens) -> dict:
    code, printed = end(*tokens)
    assert code == 0
    return json.loads(printed)


def refused(capsys, *tokens) -> tuple[int, str]:
    code, printed = end(*tokens)
    assert printed == ""
    return code, capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Eight phantoms, a store of them, findings of all and boxes of some; and a finished run from scratch."""
    place = tmp_path_factory.mktemp("studies")
    size = {"shape": (40, 40, 32), "spacing": (8.0, 8.0, 8.0)}
    write_dataset("abdomen-ct", place / "scans", patients=8, seed=1, **size)
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        prepare([str(place / "scans"), "--out", str(place / "store"), "--spacing", "8", "8", "8"])
    lines = [f"img{n:04},{int(n in LUMPS)},{'' if n == 3 else int(n > 4)},0" for n in range(1, 9)]
    (place / "findings.csv").write_text("subject,lump,cyst,never\n" + "\n".join(lines) + "\n")
    boxes = [f"img{n:04},lump,-60,-40,-40,0,20,20" for n in LUMPS]
    (place / "boxes.csv").write_text("subject,finding,x0,y0,z0,x1,y1,z1\n" + "\n".join(boxes) + "\n")
    run(place / "store", *TASK, "--findings", place / "findings.csv", "--out", place / "run", *HEAD)
    return place


def losses(folder: Path) -> list[dict]:
    return [row["losses"] for row in read_log(folder / "log.jsonl")]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_promises(place):
    folder = place / "run"
    left = {path.name for path in folder.iterdir()}
    assert left == {*ENDED, "summary.json", "checkpoints", "tensorboard", "tokens"}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    judges = set(summary["split"]["validation"])
    assert {row["subject"] for row in rows} == judges and not judges & set(summary["split"]["train"])
    assert len(rows) == 3 * summary["cases"] and all(0 < float(row["probability"]) < 1 for row in rows)
    truth = {
        line.split(",")[0]: line.split(",")[1:]
        for line in (place / "findings.csv").read_text(encoding="utf-8").split()[1:]
    }
    for row in rows:
        assert row["label"] == truth[row["subject"]][("lump", "cyst", "never").index(row["finding"])]
    assert (
        summary["undefined"] == ["cyst", "never"] and summary["macro_auroc"] == summary["per_finding"]["lump"]["auroc"]
    )
    assert (
        summary["per_finding"]["never"]["note"] == "undefined: none of 2 has it"
        and summary["per_finding"]["never"]["auroc"] is None
    )
    assert any("random weights. This is the control" in note for note in summary["notes"])
    assert any("never is never present" in note for note in summary["notes"])
    assert summary["leakage"]["pretraining"] == "none" and summary["coverage"] is None
    html = unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert "Mean AUROC" in html and "This is the control" in html and "default-src 'none'" in html
    assert len(list((folder / "tokens").iterdir())) == 8


def test_the_saved_model_says_of_a_scan_what_the_run_said(place):
    model = load_study_model(place / "run")
    assert model.findings == ("lump", "cyst", "never")
    with open(place / "run" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    name = rows[0]["case"]
    found = model.volume(
        read_volume(place / "scans" / "RawData" / "Training" / "img" / f"{name}.nii.gz"), torch.device("cpu")
    )
    said = [float(row["probability"]) for row in rows[:3]]
    np.testing.assert_allclose(found.probabilities, said, atol=2e-3)  # tokens on disk are float16


def test_the_same_settings_give_the_same_run_and_tokens_are_reused(place, tmp_path, capsys):
    again = [place / "store", *TASK, "--findings", place / "findings.csv", *HEAD]
    before = {path.name: path.stat().st_mtime_ns for path in (place / "run" / "tokens").iterdir()}
    run(*again, "--out", tmp_path / "again", "--tokens", place / "run" / "tokens")
    assert "encoding" not in capsys.readouterr().err and not (tmp_path / "again" / "tokens").exists()
    assert before == {path.name: path.stat().st_mtime_ns for path in (place / "run" / "tokens").iterdir()}
    assert losses(tmp_path / "again") == losses(place / "run") and same_weights(tmp_path / "again", place / "run")
    run(*again, "--out", tmp_path / "other", "--seed", 1)
    assert losses(tmp_path / "other") != losses(place / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_with_the_same_bits(number, place, tmp_path):
    begun = [place / "store", *TASK, "--findings", place / "findings.csv", "--out", tmp_path / "run", *HEAD]
    script = "from dagman.commands import finetune as command; command()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, begun)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, patience = tmp_path / "run" / "log.jsonl", time.monotonic() + 90
    while process.poll() is None and time.monotonic() < patience:
        if log.exists() and log.read_bytes().count(b"\n") >= 1:
            process.send_signal(number)
            break
        time.sleep(0.002)
    assert process.wait(timeout=60) in (75, -number)
    assert not (tmp_path / "run" / "summary.json").exists()
    run("--out", tmp_path / "run", "--resume")  # the task is that of the run
    assert losses(tmp_path / "run") == losses(place / "run") and same_weights(tmp_path / "run", place / "run")
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == (place / "run" / "predictions.csv").read_bytes()


def test_a_run_does_not_resume_under_other_labels(place, tmp_path, capsys):
    table = tmp_path / "findings.csv"
    table.write_text((place / "findings.csv").read_text(encoding="utf-8"))
    begun = [place / "store", *TASK, "--findings", table, "--out", tmp_path / "run", *HEAD]
    run(*begun)
    table.write_text(table.read_text(encoding="utf-8").replace("img0002,1", "img0002,0"))
    code, said = refused(capsys, *begun, "--resume")
    assert code == 3 and "files of findings that were changed, added or removed: findings.csv" in said


def test_a_run_does_not_resume_with_other_scans(place, tmp_path, capsys):
    """A scan that teaches is another one now; the table of findings is the same."""
    shutil.copytree(place / "scans", tmp_path / "scans")
    preparing = [str(tmp_path / "scans"), "--out", str(tmp_path / "store"), "--spacing", "8", "8", "8"]
    with pytest.raises(SystemExit) as done:
        prepare(preparing)
    assert not done.value.code
    begun = [tmp_path / "store", *TASK, "--findings", place / "findings.csv", "--out", tmp_path / "run", *HEAD]
    run(*begun)
    before = (tmp_path / "run" / "predictions.csv").read_bytes()
    (path,) = (tmp_path / "scans").rglob("img0002.nii.gz")
    scan = read_volume(path)
    write_volume(path, np.ascontiguousarray(scan.voxels[::-1]), scan.affine)
    with pytest.raises(SystemExit) as done:
        prepare(preparing)
    assert not done.value.code
    code, said = refused(capsys, *begun, "--resume")
    assert code == 3 and "(changed: img0002 (its voxels, its preparation))" in said
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize(
    "how",
    [
        ["--arrangement", "bag", "--tuning", "full", "--crop.crops", 2, "--crop.shape", 16, 16, 16],
        ["--arrangement", "bag", "--head", "clarity", "--crop.crops", 2, "--crop.shape", 16, 16, 16, *TOKENS],
        ["--arrangement", "whole", "--tuning", "full", "--head", "linear", "--low-mm", 12],
    ],
)
def test_every_arrangement_trains_and_judges_whole_studies(how, place, tmp_path):
    begun = [place / "store", *TASK, "--findings", place / "findings.csv", "--out", tmp_path / "run", *SMALL]
    begun += ["--steps", 2, "--studies", 2, "--scoring.looks", 0, *how]
    said = run(*begun)
    assert said["studies"] == len(
        json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["split"]["validation"]
    )
    assert not (tmp_path / "run" / "tokens").exists()
    before = load_file(place / "run" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    moved = any(not torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert moved == ("full" in how)  # the same seed drew both encoders


@pytest.mark.parametrize("head", ["attention", "clarity"])
def test_localisation_writes_maps_on_the_grid_of_the_scan_and_judges_them(head, place, tmp_path):
    more = TOKENS if head == "clarity" else []
    said = run(
        *(place / "store", "--task", "localisation", "--findings", place / "findings.csv", "--out", tmp_path / "run"),
        *("--boxes", place / "boxes.csv", "--head", head, "--tokens", place / "run" / "tokens", *HEAD, *more),
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    lumps = [name for name in summary["split"]["validation"] if int(name[3:]) in LUMPS]
    for name in lumps:
        written, scan = tmp_path / "run" / "maps" / f"{name}_lump.nii.gz", f"{name}.nii.gz"
        grid, theirs = read_grid(written), read_grid(place / "scans" / "RawData" / "Training" / "img" / scan)
        assert grid.shape == theirs.shape
        np.testing.assert_allclose(grid.affine, theirs.affine, atol=1e-4)
        assert read_volume(written).voxels.min() >= 0
    assert summary["localisation"]["boxes"] == len(lumps) > 0
    assert said["pointing"] == summary["localisation"]["measures"]["pointing"]["mean"]
    assert len(json.loads((tmp_path / "run" / "localisation.json").read_text(encoding="utf-8"))["rows"]) == len(lumps)
    assert "T(IoU) 0.3" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_baselines_are_judged_beside_the_run_in_the_same_table(place, tmp_path):
    """Those of which there are data: without a prior chance, the middle and Grad-CAM; with one its places, too, and the
    organ by the labels of the judged scans, whose pointing is the share of the liver in the box."""
    boxes = [f"img{n:04},lump,-60,-40,-40,0,20,20" for n in range(1, 9)]
    (tmp_path / "boxes.csv").write_text("subject,finding,x0,y0,z0,x1,y1,z1\n" + "\n".join(boxes) + "\n")
    begun = [place / "store", "--task", "localisation", "--findings", place / "findings.csv", *HEAD]
    begun += ["--boxes", tmp_path / "boxes.csv", "--tokens", place / "run" / "tokens"]
    prior = ["--clarity.prior.source", "atlas", "--clarity.prior.frame", "box"]
    prior += ["--clarity.prior.table.lump.organs", "liver"]
    for name, more, judged in (
        ("attention", ["--head", "attention"], {"random", "centre", "grad-cam"}),
        ("told", [*TOKENS, *prior], {"random", "centre", "prior", "organ", "organ, its middle", "grad-cam"}),
        ("without", ["--head", "attention", "--scoring.no-baselines"], None),
    ):
        out = tmp_path / name
        run(*begun, "--out", out, *more)
        found = json.loads((out / "localisation.json").read_text(encoding="utf-8"))
        html = unescape((out / "report.html").read_text(encoding="utf-8"))
        assert "T(IoBB) 0.25" in html and "Off along S, mm" in html
        if judged is None:
            assert "baselines" not in found and "Middle of the volume" not in html
            continue
        assert set(found["baselines"]) == set(found["baselines_by_finding"]) == judged
        assert set(found["baselines_left_out"]) == {"prior", "organ", "organ, its middle"} - judged
        assert "Grad-CAM of this head (all findings)" in html and "Middle of the volume" in html
        assert ("True organ, its middle, not judged" in html) == ("organ" not in judged)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))["localisation"]
        assert summary["baselines"] == found["baselines"] and "baselines_by_finding" not in summary
        for of in found["baselines"].values():
            more_than = of["over"]["pointing"]
            mine, theirs = (one["measures"]["pointing"]["mean"] for one in (found, of))
            assert more_than["difference"] == pytest.approx(mine - theirs) and more_than["subjects"] == 2
    store = VolumeStore.open(place / "store")
    (liver,) = (value for value, label in store.label_names.items() if label == "liver")
    told = json.loads((tmp_path / "told" / "localisation.json").read_text(encoding="utf-8"))
    judges, shares = {row["subject"] for row in told["rows"]}, []
    for i, case in enumerate(store.cases):
        if case.subject in judges:
            where = apply_affine(case.affine, np.argwhere(store.labels(i) == liver))
            shares.append(((where >= (-60, -40, -40)) & (where <= (0, 20, 20))).all(axis=1).mean())
    assert told["baselines"]["organ"]["measures"]["pointing"]["mean"] == pytest.approx(np.mean(shares))


def test_a_run_says_how_well_its_teachers_tell_what_they_have_not_seen(place, tmp_path, capsys):
    teacher = ["--clarity.teacher-weight", 0.5, "--clarity.teacher.folds", 2, "--clarity.teacher.steps", 1]
    teacher += ["--clarity.teacher.shape", 32, 32, 32, "--head", "clarity", *TOKENS]
    begun = [place / "store", *TASK, "--findings", place / "findings.csv", "--tokens", place / "run" / "tokens", *HEAD]
    run(*begun, "--out", tmp_path / "run", *teacher)
    said = "the CNN teachers tell findings of studies that they have not seen with an AUROC of"
    assert f"note: {said}" in capsys.readouterr().err
    notes = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["notes"]
    assert sum(note.startswith(said) for note in notes) == 1


def test_a_prior_that_scans_that_judge_do_not_have_is_left_out_and_said(place, tmp_path):
    """A run that has ended well does not fail by what it is held against."""
    for n in (1, 2, 4, 6, 7, 8):  # not those that judge
        scan = read_grid(place / "scans" / "RawData" / "Training" / "img" / f"img{n:04}.nii.gz")
        (tmp_path / "files" / f"img{n:04}").mkdir(parents=True)
        everywhere = np.ones(scan.shape, np.float32)
        write_volume(tmp_path / "files" / f"img{n:04}" / "liver.nii.gz", everywhere, scan.affine)
    run(
        *(place / "store", "--task", "localisation", "--findings", place / "findings.csv", "--out", tmp_path / "run"),
        *("--boxes", place / "boxes.csv", "--tokens", place / "run" / "tokens", *HEAD, *TOKENS),
        *("--clarity.prior.source", "files", "--clarity.prior.folder", tmp_path / "files"),
        *("--clarity.prior.table.lump.organs", "liver"),
    )
    found = json.loads((tmp_path / "run" / "localisation.json").read_text(encoding="utf-8"))
    assert set(found["baselines"]) == {"random", "centre", "organ", "organ, its middle", "grad-cam"}
    assert "no priors of these scans there" in found["baselines_left_out"]["prior"]
    assert "The prior alone, not judged" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_what_is_odd_about_boxes_is_said_and_json_has_no_nan(place, tmp_path, capsys):
    """Nobody has `never`, so no AUROC is defined; one subject judges a box that its CSV calls absent."""
    (tmp_path / "never.csv").write_text("subject,never\n" + "".join(f"img{n:04},0\n" for n in range(1, 9)))
    (tmp_path / "boxes.csv").write_text("subject,finding,x0,y0,z0,x1,y1,z1\nimg0003,never,-60,-40,-40,0,20,20\n")
    begun = [place / "store", "--task", "localisation", "--findings", tmp_path / "never.csv", "--head", "attention"]
    begun += ["--tokens", place / "run" / "tokens", *HEAD]
    for name, more, note in (
        ("boxed", ["--boxes", tmp_path / "boxes.csv"], "1 annotations are of findings that the CSV calls absent"),
        ("bare", [], "maps are written, none is judged"),
    ):
        run(*begun, "--out", tmp_path / name, *more)
        assert note in capsys.readouterr().err
        summary = (tmp_path / name / "summary.json").read_text(encoding="utf-8")
        assert any(note in one for one in json.loads(summary)["notes"]) and "NaN" not in summary
        looks = [row["validation"] for row in read_log(tmp_path / name / "log.jsonl") if "validation" in row]
        assert looks and all(one == {"macro_auroc": None} for one in looks)
    assert "NaN" not in (tmp_path / "boxed" / "localisation.json").read_text(encoding="utf-8")


def test_an_encoder_brings_its_window_and_its_past(place, tmp_path):
    """The crop that it was trained with is the window; what it has seen is checked; it stays as it is."""
    (tmp_path / "pre").mkdir()
    torch.manual_seed(9)
    network = SwinUNETR(1, 1, feature_size=12, window=4)
    store = {"name": "scans", "layout": "BTCV"}
    seen = [{"name": f"img{n:04}", "subject": f"img{n:04}", "fingerprint": "0"} for n in range(1, 9)]
    past = {"preprocessing": {"spacing": [4.0, 4.0, 4.0], "window_hu": [-175.0, 250.0], "mr": "percentile"}}
    save_encoder(
        tmp_path / "pre" / "encoder.safetensors", network, past | {"provenance": {"dataset": store, "cases": seen}}
    )
    (tmp_path / "pre" / "config.yaml").write_text("crop: {shape: [40, 33, 24]}\n")
    tokens = [place / "store", *TASK, "--findings", place / "findings.csv", "--out", tmp_path / "run", "--steps", 2]
    tokens += ["--init", tmp_path / "pre" / "encoder.safetensors", "--device", "cpu", "--head", "linear"]
    run(*tokens)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["protocol"]["window"] == [32, 32, 32]  # the nearest multiples of 16: 40 is as near to 48
    assert summary["coverage"]["loaded"] == summary["coverage"]["total"]
    assert summary["leakage"]["validation_in_pretraining"] == summary["split"]["validation"]
    assert any("prepared otherwise than for the pretraining: spacing" in note for note in summary["notes"])
    assert not any("random weights" in note for note in summary["notes"])
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(kept[f"encoder.{name}"], tensor) for name, tensor in network.swinViT.state_dict().items())


@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        ("--findings CSV --tuning full", 2, "cached tokens are of an encoder that stays; --arrangement bag or whole"),
        ("--findings CSV --task localisation --head linear", 2, "a linear probe of the mean token has no map"),
        ("--findings CSV --boxes CSV", 2, "boxes judge maps; --task localisation makes them"),
        ("--findings CSV --low-mm 4", 2, "low_mm is the voxel of --arrangement whole"),
        ("--findings CSV --crop.shape 20 16 16", 2, "each side is a multiple of 16 voxels"),
        ("", 2, "no findings given; --findings names a CSV"),
        ("--findings NONE", 3, "no such file or folder; a CSV of findings is needed"),
        ("--findings CSV --labels 99", 2, "--labels 99: only"),
        ("--findings CSV --fold 8 --folds 9", 2, "fold 8 of 8 asked for"),
        ("--findings ALONE", 3, "findings of 1 subjects (img0001) among 8 scans; at least 2 are needed"),
        ("--findings TWINS --task localisation", 3, "maps would both be called img0003_lump_x.nii.gz; name one of the"),
        ("--findings CSV --task localisation --boxes CSV", 3, "the columns are subject,lump,cyst,never; the columns"),
        ("--findings CSV --task localisation --boxes AWAY", 3, "no box is of a study that judges and of a finding"),
        ("--findings CSV --task localisation --boxes ODD", 3, "boxes of bump, which is no finding; there are lump,"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tokens, code, message, place, tmp_path, capsys):
    places = {"CSV": place / "findings.csv", "NONE": place / "none.csv"}
    places |= {"ALONE": tmp_path / "alone.csv", "AWAY": tmp_path / "away.csv"}
    places["ALONE"].write_text("subject,lump\nimg0001,1\n")
    places["TWINS"] = tmp_path / "twins.csv"
    places["TWINS"].write_text("subject,lump/x,lump_x\n" + "".join(f"img{n:04},{n % 2},1\n" for n in range(1, 9)))
    places["ODD"] = tmp_path / "odd.csv"
    for name, finding in (("AWAY", "lump"), ("ODD", "bump")):
        places[name].write_text(f"subject,finding,x0,y0,z0,x1,y1,z1\nnobody,{finding},0,0,0,1,1,1\n")
    given = [places.get(token, token) for token in tokens.split()]
    task = [] if "--task" in given else TASK
    ended, said = refused(capsys, place / "store", "--out", tmp_path / "run", "--steps", 2, *SMALL, *task, *given)
    assert ended == code and message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("head: clarity", ["--clarity.dim", 64, "--clarity.heads", 4], "no findings given"),
        ("clarity: {heads: 4}", ["--head", "clarity", "--clarity.dim", 64], "no findings given"),
        ("arrangement: bag", ["--tuning", "full", "--encoder-lr", 0.5], "no findings given"),
        ("head: linear", ["--task", "localisation"], "a linear probe of the mean token has no map"),
        ("head: linear", ["--clarity.dim", 48], "the head is linear; --head clarity has it"),
        ("clarity: {heads: 5}", ["--head", "clarity", "--clarity.dim", 64], "5 heads cannot share 64 channels evenly"),
    ],
)
def test_what_goes_together_is_asked_of_file_and_flags_as_one(text, flags, message, place, tmp_path, capsys):
    (tmp_path / "half.yaml").write_text(text)
    task = [] if "--task" in flags else TASK
    given = [place / "store", "--config", tmp_path / "half.yaml", "--out", tmp_path / "run", *task, *flags]
    code, said = refused(capsys, *given)
    assert code == 2 and message in said
    assert not (tmp_path / "run").exists()


def test_runs_are_compared_and_new_scans_are_told_by_one(place, tmp_path, capsys):
    run(
        *(place / "store", *TASK, "--findings", place / "findings.csv", "--out", tmp_path / "linear", *HEAD),
        *("--head", "linear", "--tokens", place / "run" / "tokens"),
    )
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as printed:
        dagman.commands.compare([*map(str, (place / "run", tmp_path / "linear", "--out", tmp_path / "both")), "--json"])
    said = json.loads(printed.getvalue())
    assert ended.value.code == 0 and said["reference"] == "from scratch, head attention"
    assert "2 pairs of 2 subjects" in said["from scratch, head linear, against it"]
    scan = place / "scans" / "RawData" / "Training" / "img" / "img0003.nii.gz"
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as printed:
        dagman.commands.predict([*map(str, (place / "run", scan, "--out", tmp_path / "told")), "--json"])
    told = json.loads(printed.getvalue())["probabilities"]["img0003"]
    with open(place / "run" / "predictions.csv", newline="") as file:
        mine = {row["finding"]: float(row["probability"]) for row in csv.DictReader(file) if row["case"] == "img0003"}
    assert ended.value.code == 0 and told == pytest.approx(mine, abs=2e-3)  # tokens on disk are float16
    written = [path.name for path in (tmp_path / "told").iterdir()]
    assert sorted(written) == [*(f"img0003_{name}.nii.gz" for name in ("cyst", "lump", "never")), "predictions.csv"]
