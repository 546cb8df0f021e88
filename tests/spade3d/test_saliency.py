"""spade-saliency: from gaze, labels, an encoder and a trained predictor into a store; every exit code as promised."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from spade3d.crops.saliency_crops import SaliencyStream
from spade3d.saliency import attention_source
from spade3d.saliency_commands import main
from spade3d.saliency_predictor import PredictorSettings, gazed_split, train_predictor
from spade3d.training import loop
from spade3d.training.prefetch import Prefetched
from spade3d.volumes.channels import OF_LABELS, SOURCES, write_saliency
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.store import VolumeStore


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three labelled patients and one without, with lesions and gaze: the data, and a store of it."""
    folder = tmp_path_factory.mktemp("scans")
    size = {"shape": (40, 40, 28), "spacing": (9.0, 9.0, 10.0)}
    write_dataset("abdomen-ct", folder / "data", patients=3, unlabelled=1, lesions=True, **size)
    store = prepare(read_layout(folder / "data"), folder / "store", Preprocessing(spacing=(10.0, 10.0, 10.0)))
    return folder / "data", store.path


@pytest.fixture
def store(scans, tmp_path):
    return shutil.copytree(scans[1], tmp_path / "store")


def call(capsys, *tokens):
    """(exit code, standard output, standard error) of the command."""
    with pytest.raises(SystemExit) as ended:
        main([str(token) for token in tokens])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_gaze_becomes_saliency_and_nothing_is_lost_uncounted(scans, store, capsys):
    code, out, err = call(capsys, "gaze", store, "--fixations", scans[0] / "gaze", "--json")
    result = json.loads(out)
    assert (code, result["written"], result["source"], result["readers"]) == (0, 4, "gaze", 2) and "4/4" in err
    assert result["first_slice"] == "1 in .json (assumed)" and result["left_out"] == 0
    recorded = [
        record for file in (scans[0] / "gaze").iterdir() for record in json.loads(file.read_text(encoding="utf-8"))
    ]
    assert sum(result["fixations"].values()) == sum(len(record["T"]) for record in recorded)
    assert result["fixations"]["under_50_ms"] == 16 and result["fixations"]["outside_the_body"] > 0
    after = VolumeStore.open(store)
    assert {case.saliency_source for case in after.cases} == {"gaze"}
    on_lesions = [after.saliency(i)[after.labels(i) == 14].mean() / after.saliency(i).mean() for i in range(3)]
    assert min(on_lesions) > 5

    code, out, err = call(capsys, "labels", store, "--json")
    assert (code, json.loads(out)["written"]) == (0, 0) and "3 cases have saliency already and keep it" in err
    code, out, _ = call(capsys, "labels", store, "--names", "lesion", "--replace", "--json")
    assert (code, json.loads(out)) == (
        0, {"store": str(store), "source": "labels", "written": 3, "with_saliency": 4, "structures": ["lesion"]}
    )  # fmt: skip
    assert [case.saliency_source for case in VolumeStore.open(store).cases] == ["labels"] * 3 + ["gaze"]


def test_a_predictor_is_trained_on_gaze_and_fills_in_the_rest(scans, store, tmp_path, capsys):
    some = tmp_path / "some"
    some.mkdir()
    for name in ("img0001", "img0002", "img0003"):
        shutil.copy(scans[0] / "gaze" / f"{name}.json", some)
    assert call(capsys, "gaze", store, "--fixations", some)[0] == 0
    run = tmp_path / "run"
    small = ("--steps", 3, "--width", 4, "--crop", 32, 32, 16, "--device", "cpu")
    code, out, err = call(capsys, "train", store, "--out", run, *small, "--json")
    result = json.loads(out)
    assert (code, result["steps"], result["taught_by"], result["judged_on"]) == (0, 3, "gaze", 1), err
    assert {"config.yaml", "log.jsonl", "scores.json", "saliency.safetensors", "provenance.json"} <= {
        path.name for path in run.iterdir()
    }
    assert set(json.loads((run / "scores.json").read_text(encoding="utf-8"))["mean"]) == {"cc", "kl", "nss"}
    first = load_file(run / "saliency.safetensors")
    code, _, err = call(capsys, "train", store, "--out", run, "--resume", "--json")
    again = load_file(run / "saliency.safetensors")
    assert code == 0 and "resuming" in err and all(np.array_equal(first[name], again[name]) for name in first)
    assert call(capsys, "train", store, "--out", run, *small)[0] == 3  # holds a run

    code, out, err = call(capsys, "predict", store, "--model", run, "--device", "cpu", "--json")
    assert (code, json.loads(out)["written"]) == (0, 1) and "3 cases have saliency already" in err
    after = VolumeStore.open(store)
    assert [case.saliency_source for case in after.cases] == ["gaze"] * 3 + ["predicted"]
    assert after.saliency(3).max() == 255 and after.verify() == []


def test_a_predictor_is_resumed_with_the_saliency_it_began_with(store, tmp_path, capsys):
    """Wherever the store lies, and whatever was predicted since; maps of another source would make it another model."""
    assert call(capsys, "labels", store)[0] == 0
    run = tmp_path / "run"
    small = ("--steps", 2, "--width", 4, "--crop", 32, 32, 16, "--device", "cpu")
    assert call(capsys, "train", store, "--out", run, *small)[0] == 0
    before = {name: (run / name).read_bytes() for name in ("provenance.json", "saliency.safetensors", "scores.json")}
    moved = store.rename(tmp_path / "moved")
    assert call(capsys, "predict", moved, "--model", run, "--device", "cpu")[0] == 0
    assert call(capsys, "train", moved, "--out", run, "--resume")[0] == 0
    after = VolumeStore.open(moved)
    assert [case.saliency_source for case in after.cases] == ["labels"] * 3 + ["predicted (taught by labels)"]

    maps = {case.name: np.ones(case.shape) for case in after.cases if case.has_labels}
    write_saliency(moved, maps, "attention")
    code, _, err = call(capsys, "train", moved, "--out", run, "--resume")
    assert code == 3 and "(saliency from attention, labels before, its saliency)" in err
    (run / "began_with.json").unlink()  # a run of before there was one
    code, _, err = call(capsys, "train", moved, "--out", run, "--resume")
    assert code == 3 and "(saliency from attention, labels before)" in err
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_gpu_does_not_wait_for_its_batches(store, tmp_path, capsys, monkeypatch):
    fed = []

    class Enough(Exception):
        pass

    def train(task, batches, **how):
        fed.append(batches)
        raise Enough

    assert call(capsys, "labels", store)[0] == 0
    monkeypatch.setattr(loop, "train", train)
    for device in ("cpu", "cuda"):
        settings = PredictorSettings(steps=1, crop=(32, 32, 16), width=4, device=device)
        with pytest.raises(Enough):
            train_predictor(store, tmp_path / device, settings, device, resume=False)
    direct, ahead = fed
    assert isinstance(direct, SaliencyStream) and isinstance(ahead, Prefetched) and ahead.pinned
    assert pickle.loads(pickle.dumps(ahead.batches)).batch(3).images.equal(direct.batch(3).images)


@pytest.mark.parametrize(("crop", "cells"), [((16, 16, 16), "1 x 1 x 1"), ((64, 64, 8), "4 x 4 x 0")])
def test_a_crop_that_leaves_no_cells_is_refused_before_there_is_a_run(store, tmp_path, capsys, crop, cells):
    assert call(capsys, "labels", store)[0] == 0
    tokens = ("train", store, "--out", tmp_path / "run", "--steps", 2, "--width", 4, "--device", "cpu")
    code, _, err = call(capsys, *tokens, "--crop", *crop)
    assert code == 2 and f"which leaves {cells} cells" in err and not (tmp_path / "run").exists()
    if crop == (16, 16, 16):
        assert call(capsys, *tokens, "--crop", 32, 16, 16)[0] == 0


def test_a_predictor_of_another_preparation_is_refused(scans, store, tmp_path, capsys):
    import torch

    from spade3d.networks.saliency_net import SaliencyModel, SaliencyNet

    model = SaliencyModel(SaliencyNet(4), Preprocessing(spacing=(2.0, 2.0, 2.0)), (16, 16, 16), ("gaze",))
    model.save(tmp_path / "saliency.safetensors", {})
    code, _, err = call(capsys, "predict", store, "--model", tmp_path, "--device", "cpu")
    assert code == 3 and "spacing [10.0, 10.0, 10.0] here, [2.0, 2.0, 2.0] there" in err
    assert torch.cuda.is_available() or call(capsys, "predict", store, "--model", tmp_path, "--device", "cuda")[0] == 2


def test_an_encoder_says_where_it_looks(store, tmp_path, capsys):
    from spade3d.networks.foreign import save_encoder
    from spade3d.networks.swin_unetr import SwinUNETR

    of_itself = {"provenance": {"saliency": {}}}
    save_encoder(tmp_path / "encoder.safetensors", SwinUNETR(feature_size=12, window=3), of_itself)
    code, out, _ = call(capsys, "attention", store, "--init", tmp_path / "encoder.safetensors", "--device", "cpu")
    assert code == 0 and "source: attention" in out and "shows: attention that cells receive in stage 3" in out
    after = VolumeStore.open(store)
    assert {case.saliency_source for case in after.cases} == {"attention"} and after.saliency(0).max() > 200
    assert not after.saliency(0)[0].any()  # outside the body
    said = {"preprocessing": Preprocessing(spacing=(2.0, 2.0, 2.0)).to_dict()}
    save_encoder(tmp_path / "finer.safetensors", SwinUNETR(feature_size=12, window=3), said)
    code, _, err = call(capsys, "attention", store, "--init", tmp_path / "finer.safetensors", "--replace")
    assert code == 3 and "spacing [10.0, 10.0, 10.0] here, [2.0, 2.0, 2.0] there" in err


@pytest.mark.parametrize(
    ("said", "source"),
    [
        ({"provenance": {"saliency": {"gaze": 2}}}, "attention"),
        ({"provenance": {"saliency": {"attention": 2}}}, "attention"),
        ({"provenance": {"saliency": {"gaze": 1, "labels, as a prior": 2}}}, "attention (taught by labels)"),
        ({"provenance": {"saliency": {"labels": 2}}}, "attention (taught by labels)"),
        ({"provenance": {"saliency": {"predicted (taught by labels)": 2}}}, "attention (taught by labels)"),
        ({"provenance": {"saliency": {"attention (taught by labels)": 2}}}, "attention (taught by labels)"),
        ({"provenance": {"saliency": {"attention (of unknown teaching)": 2}}}, "attention (of unknown teaching)"),
        ({"provenance": {"saliency": {"predicted (of unknown teaching)": 2}}}, "attention (of unknown teaching)"),
        ({"provenance": {"cases": []}}, "attention (of unknown teaching)"),
        ({}, "attention (of unknown teaching)"),
        ({"format": "pt", "depths": [2, 2, 2, 2]}, "attention (of unknown teaching)"),
        ({"format": "dagman-segmentation-1"}, "attention (taught by labels)"),
        ({"format": "dagman-study-2"}, "attention (taught by labels)"),
    ],
)
def test_attention_is_named_by_what_taught_the_encoder(said, source):
    assert attention_source(said) == source and source in SOURCES


def test_labels_that_taught_an_encoder_are_said_of_what_its_attention_gives(store, tmp_path, capsys):
    """Through the command into the store; and a predictor that learns from it has learned from labels, too."""
    import torch

    from spade3d.networks.foreign import save_encoder
    from spade3d.networks.swin_unetr import SwinUNETR

    network = SwinUNETR(feature_size=12, window=3)
    save_encoder(tmp_path / "guided.safetensors", network, {"provenance": {"saliency": {"labels, as a prior": 4}}})
    torch.save({f"swinViT.{name}": value for name, value in network.swinViT.state_dict().items()}, tmp_path / "a.pt")
    for name, source, why in [
        ("guided.safetensors", "attention (taught by labels)", "labels taught this encoder or steered its pretraining"),
        ("a.pt", "attention (of unknown teaching)", "the file does not say whether labels taught this encoder"),
    ]:
        tokens = ("attention", store, "--init", tmp_path / name, "--device", "cpu", "--replace", "--json")
        code, out, err = call(capsys, *tokens)
        assert code == 0 and json.loads(out)["source"] == source and f"{name}: {why}" in err
        after = VolumeStore.open(store)
        assert {case.saliency_source for case in after.cases} == {source} and after.verify() == []
        assert (source in OF_LABELS) == (name == "guided.safetensors")


def test_what_cannot_be_done_is_said_in_one_line(scans, store, tmp_path, capsys):
    strange = tmp_path / "strange.csv"
    strange.write_text("case,x,y,z,duration_s\nimg9,1,1,1,1\n")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    for tokens, code, said in [
        (("gaze", store, "--fixations", scans[0] / "gaze", "--first-slice", 0), 3, "give --first-slice 1"),
        (("gaze", store, "--fixations", strange), 3, "gaze of img9, and none of these is in the store (img0001"),
        (("gaze", store, "--fixations", empty), 3, "empty.json: no fixations (an empty list)"),
        (("gaze", store, "--fixations", tmp_path / "none"), 3, "no such file or folder"),
        (("gaze", store, "--fixations", strange, "--sigma-mm", 0), 2, "--sigma-mm 0.0: a length above 0"),
        (("labels", store, "--names", "brain"), 2, "not among the store's structures (spleen"),
        (("labels", store, "--blur-mm", -1), 2, "a length of 0 or more"),
        (("labels", scans[0]), 3, "is no store; make one from the scans with spade-prepare"),
        (("train", store, "--out", tmp_path / "run"), 3, "no case that may train has saliency"),
        (("train", store, "--out", tmp_path / "run", "--stepps", 3), 2, "--stepps"),
        (("train", store, "--out", tmp_path / "run", "--steps", 0), 2, "--steps: '0' given"),
        (("attention", store, "--init", strange, "--device", "cpu"), 3, "strange.csv: "),
        (("train", store, "--out", tmp_path / "run", "--resume"), 3, "holds no run to resume"),
        (("train", store, "--out", tmp_path / "run", "--resume", "--lr", 1), 2, "the run began with; leave out lr"),
    ]:
        found, out, err = call(capsys, *tokens)
        assert (found, out) == (code, "") and said in err and err.splitlines()[-1].startswith("spade-saliency: "), err
    assert not (tmp_path / "run").exists()
    assert not any(case.saliency for case in VolumeStore.open(store).cases)


def test_gaze_whose_durations_may_mean_something_else_is_used_and_said(store, tmp_path, capsys):
    for name, seconds, doubts in [
        ("ms", (300, 200, 250, 220, 310), ["are these milliseconds? T and duration_s are in seconds"]),
        ("times", (0.3, 0.5, 0.9, 1.4, 1.6), ["are these times? give how long each fixation lasted"]),
        ("fine", (0.3, 0.5, 0.9, 0.4, 1.6), []),
    ]:
        file = tmp_path / f"{name}.csv"
        file.write_text("case,x,y,z,duration_s\n" + "".join(f"img0001,20,20,14,{s}\n" for s in seconds))
        code, _, err = call(capsys, "gaze", store, "--fixations", file, "--replace")
        assert code == 0 and err.count("note: ") == len(doubts)
        assert all(f"note: {file}: " in err and doubt in err for doubt in doubts)


def test_rows_and_columns_at_an_edge_are_said_where_nothing_speaks_against_them(store, tmp_path, capsys):
    """One fixation at an image's edge ended the command, and two at opposite edges left it without any count."""
    width = VolumeStore.open(store).cases[0].source_grid.shape[0]
    for edges, said in [((width, 20), 1), ((0, 20), 0), ((width, 0), None), ((20, 21), None)]:
        rows = "".join(f"img000{n},{x},20,14,0.3\nimg000{n},20,20,14,0.3\n" for n, x in enumerate(edges, start=1))
        (tmp_path / "some.csv").write_text("case,x,y,z,duration_s\n" + rows)
        for first in (0, 1):
            tokens = ("gaze", store, "--fixations", tmp_path / "some.csv", "--first-slice", first, "--replace")
            code, _, err = call(capsys, *tokens)
            assert code == 0
            assert (f"give --first-slice {1 - first}, and write" in err) == (said == 1 - first), err


def test_gaze_of_strangers_is_named_and_the_rest_is_written(scans, store, tmp_path, capsys):
    rows = "case,x,y,z,duration_s\nimg9,1,1,1,1\nimg0002,20,20,14,0.3\nimg0003,20,20,14,0.01\n"
    (tmp_path / "some.csv").write_text(rows)
    code, out, err = call(capsys, "gaze", store, "--fixations", tmp_path / "some.csv", "--json")
    assert (code, json.loads(out)["written"], json.loads(out)["unknown_cases"]) == (0, 2, 1)
    assert sum(json.loads(out)["fixations"].values()) == 3 and json.loads(out)["fixations"]["of_unknown_cases"] == 1
    assert "left aside: img9" in err and err.count("are empty (img0003): written as zeros") == 1
    after = VolumeStore.open(store)
    assert np.array_equal([case.saliency_source for case in after.cases], ["", "gaze", "gaze", ""])
    assert after.saliency(1).max() == 255 and not after.saliency(2).any()


def test_gaze_that_cannot_be_used_is_left_out_by_name_and_the_rest_is_written(scans, store, tmp_path, capsys):
    """A reader who saw another scan, one whose lists differ, a slip and a damaged file: everybody else's is kept."""
    gaze = shutil.copytree(scans[0] / "gaze", tmp_path / "gaze")
    total = sum(len(record["T"]) for file in gaze.iterdir() for record in json.loads(file.read_text(encoding="utf-8")))
    of_2 = json.loads((gaze / "img0002.json").read_text(encoding="utf-8"))
    of_2[0]["Z"] = [999] * len(of_2[0]["Z"])
    (gaze / "img0002.json").write_text(json.dumps(of_2))
    of_3 = json.loads((gaze / "img0003.json").read_text(encoding="utf-8"))
    (gaze / "img0003.json").write_text("[{")
    of_1 = json.loads((gaze / "img0001.json").read_text(encoding="utf-8"))
    of_1[0]["T"] = of_1[0]["T"][:-1]
    of_1[1]["Z"][0] = 999
    (gaze / "img0001.json").write_text(json.dumps(of_1))
    code, _, err = call(capsys, "gaze", store, "--fixations", gaze, "--strict")
    assert code == 3 and "img0001.json, record 1: lists of different lengths" in err
    assert not any(case.saliency for case in VolumeStore.open(store).cases)

    code, out, err = call(capsys, "gaze", store, "--fixations", gaze, "--first-slice", 1, "--json")
    result = json.loads(out)
    assert (code, result["written"], result["with_saliency"], result["left_out"]) == (0, 3, 3, 3), err
    assert result["first_slice"] == "1 in .json (as given)"
    assert "left out img0003.json: " in err and f"left out reader {of_2[0]['subject']} of img0002" in err
    assert "left out a part of img0001.json: " in err and "lists of different lengths" in err
    assert result["fixations"]["left_out"] == len(of_2[0]["Z"]) + len(of_1[0]["X"])
    assert sum(result["fixations"].values()) == total - sum(len(record["T"]) for record in of_3)
    after = VolumeStore.open(store)
    assert [case.saliency_source for case in after.cases] == ["gaze", "gaze", "", "gaze"] and after.verify() == []
    (gaze / "img0003.json").unlink()
    (gaze / "img0001.json").unlink()
    code, _, err = call(capsys, "gaze", store, "--fixations", gaze, "--replace", "--strict")
    assert code == 3 and "slices" in err and "999" in err.splitlines()[-1]


def test_a_predictor_that_labels_taught_says_so_in_what_it_writes(store, tmp_path, capsys):
    from spade3d.networks.saliency_net import SaliencyModel, SaliencyNet

    prepared = VolumeStore.open(store).preprocessing
    for taught_by, source in [
        (("labels",), "predicted (taught by labels)"),
        (("attention", "gaze"), "predicted"),
        (("attention (of unknown teaching)", "gaze"), "predicted (of unknown teaching)"),
        (("attention (of unknown teaching)", "labels"), "predicted (taught by labels)"),
    ]:
        SaliencyModel(SaliencyNet(4), prepared, (32, 32, 16), taught_by).save(tmp_path / "saliency.safetensors", {})
        tokens = ("predict", store, "--model", tmp_path, "--device", "cpu", "--replace", "--json")
        code, out, _ = call(capsys, *tokens)
        assert code == 0 and json.loads(out)["source"] == source
        after = VolumeStore.open(store)
        assert {case.saliency_source for case in after.cases} == {source}
        assert gazed_split(after).train == (), "no predictor teaches another"


def test_an_option_that_takes_one_of_several_says_so(capsys):
    _, out, _ = call(capsys, "labels", "--help")
    assert "may be given several times" in " ".join(out.replace("│", " ").split())


def test_help_needs_no_torch():
    code = "import sys, spade3d.saliency_commands as c\n"
    code += "try: c.main(['train', '--help'])\nexcept SystemExit as e: pass\n"
    code += "sys.exit('torch' in sys.modules or 'monai' in sys.modules or 'scipy' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 0 and "--width" in ended.stdout, ended.stderr
