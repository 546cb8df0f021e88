"""dagman-predict with a model of studies: a line, rows and, where the head has maps, volumes on the scan's own grid."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dagman.commands
from dagman.downstream.study_model import StudyModel, build_head
from dagman.downstream.token_grids import Windows, channels_of
from dagman.study_judging import Judge, map_names
from spade3d.configuration import Network
from spade3d.faults import DataFault
from spade3d.recipes.recipe import build_network
from spade3d.volumes.itk_writing import write_itk
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import Grid, read_volume, write_volume

CPU = torch.device("cpu")
NAMES = ("lump", "odd/cyst")
HEADS = {"linear": {}, "attention": {"dim": 16, "places": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """A run's folder for each head, and the model in it."""
    network, made = Network(feature_size=12, window=4), {}
    for kind, how in HEADS.items():
        torch.manual_seed(0)
        encoder = build_network(network, out_channels=1).swinViT.eval()
        head = build_head(kind, channels_of(encoder), 2, how).eval()
        windows = Windows((16, 32, 16), (2.0,) * 3, 0.25)
        model = StudyModel(encoder, head, network, kind, how, NAMES, Preprocessing(spacing=(2.0,) * 3), windows)
        folder = tmp_path_factory.mktemp(kind)
        model.save(folder / "model.safetensors")
        made[kind] = folder, model
    return made


@pytest.fixture
def scans(tmp_path):
    """Two scans whose axes run neither in the order nor in the direction of R, A, S, in two formats."""
    voxels = np.random.default_rng(0).integers(-900, 900, (2, 22, 18, 16)).astype(np.int16)
    affine = np.array([[0, 0, 1.8, 31], [-1.5, 0, 0, -50], [0, 2.2, 0, 12], [0, 0, 0, 1]])
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in" / "one.nii.gz", voxels[0], affine)
    write_itk(tmp_path / "in" / "two.mha", voxels[1], affine)
    return tmp_path / "in"


def call(*tokens) -> int:
    with pytest.raises(SystemExit) as end:
        dagman.commands.predict([*map(str, tokens), "--device", "cpu"])
    return end.value.code


def rows_of(out) -> list[dict]:
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_line_and_rows_for_each_scan_and_maps_on_its_grid(models, scans, tmp_path, capsys):
    run, model = models["attention"]
    assert call(run, scans, "--out", tmp_path / "out") == 0
    lines, rows = capsys.readouterr().out.splitlines(), rows_of(tmp_path / "out")
    assert [(row["case"], row["finding"]) for row in rows] == [
        (case, name) for case in ("one", "two") for name in NAMES
    ]
    assert lines[2:] == [
        f"predictions: {tmp_path / 'out' / 'predictions.csv'}",
        "scans: 2",
        "left_out: 0",
        "maps: True",
    ]
    highest = []
    for n, file in enumerate(("one.nii.gz", "two.mha")):
        scan, case = read_volume(scans / file), file.split(".")[0]
        found = model.volume(scan, CPU)
        said = [float(row["probability"]) for row in rows[2 * n : 2 * n + 2]]
        assert said == found.probabilities.tolist()
        assert lines[n].startswith(f"{case}: ") and f"lump {said[0]:.3f}, odd/cyst {said[1]:.3f}" in lines[n]
        for finding, name in enumerate(("lump", "odd_cyst")):
            map_ = read_volume(tmp_path / "out" / f"{case}_{name}.nii.gz")
            np.testing.assert_allclose(map_.affine, scan.affine, atol=1e-5)
            np.testing.assert_array_equal(map_.voxels, found.on_grid(finding, Grid(scan.shape, scan.affine)))
            highest.append(map_.voxels.max())
    assert max(highest) > 0


def test_a_head_without_maps_writes_a_table_alone_and_later_scans_are_added_to_it(models, scans, tmp_path, capsys):
    run, _ = models["linear"]
    assert call(run / "model.safetensors", scans / "one.nii.gz", "--out", tmp_path / "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == {"predictions", "scans", "left_out", "maps", "seconds", "probabilities"} and not said["maps"]
    assert said["probabilities"]["one"].keys() == set(NAMES)
    assert call(run, scans / "two.mha", "--out", tmp_path / "out") == 0
    assert [row["case"] for row in rows_of(tmp_path / "out")] == ["one", "one", "two", "two"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


def test_a_bad_scan_is_named_and_left_out(models, scans, tmp_path, capsys):
    (scans / "bad.nii.gz").write_bytes(b"")
    run, _ = models["linear"]
    assert call(run, scans, "--out", tmp_path / "out", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["left_out"] == 1 and "left out bad: " in printed.err
    assert call(run, scans / "bad.nii.gz", "--out", tmp_path / "none") == 3
    assert "none of 1 scans could be read" in capsys.readouterr().err
    assert call(run, scans, "--out", tmp_path / "strict", "--strict") == 3
    assert not (tmp_path / "none").exists() and not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--flips", "all"], 2, "--largest-component, --except, --format and --precision are for label maps"),
        (["--batch", "2"], 2, "this model tells findings of whole studies; leave them out"),
        (["--largest-component", "--except", "lump"], 2, "are for label maps"),
        (["--format", "same"], 2, "are for label maps"),
        (["--attention"], 2, "--attention shows where an encoder looks, and this model has maps of its findings"),
        (["SCANS"], 3, "two scans would both be called one"),
        (["--out", "RUN"], 3, "predictions.csv: exists already, and is no table of dagman-predict"),
        (["--out", "MAPS"], 3, "one_lump.nii.gz: exists already, and would be written over"),
        (["--out", "RUN", "--flips", "all"], 2, "are for label maps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(more, code, message, models, scans, tmp_path, capsys):
    run, maps = tmp_path / "run", tmp_path / "maps"
    for folder in (run, maps):
        folder.mkdir()
    (run / "predictions.csv").write_text("case,subject,finding,label,probability\n")
    (maps / "one_lump.nii.gz").touch()
    before = sorted(tmp_path.rglob("*"))
    places = {"SCANS": scans / "one.nii.gz", "RUN": run, "MAPS": maps}
    out = [] if "--out" in more else ["--out", tmp_path / "out"]
    ended = call(models["attention"][0], scans / "one.nii.gz", *(places.get(token, token) for token in more), *out)
    assert ended == code and message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_no_map_takes_the_place_of_another():
    assert map_names(["a/1", "b"], ["c"], "rename") == ["a_1_c.nii.gz", "b_c.nii.gz"]
    with pytest.raises(DataFault, match="two maps would both be called a_b_c.nii.gz; rename one"):
        map_names(["a", "a_b"], ["c", "b_c"], "rename one")


def test_where_nobody_judges_nothing_is_predicted():
    assert Judge.predictions(SimpleNamespace(cases=(), store=None)) == []


def test_maps_of_one_name_are_refused(models, scans, tmp_path, capsys):
    (scans / "one.nii.gz").rename(scans / "two_odd.nii.gz")
    network, model = models["attention"][1].network, models["attention"][1]
    twins = StudyModel(model.encoder, model.head, network, "attention", HEADS["attention"], ("odd_cyst", "cyst"),
                       model.preprocessing, model.windows)  # fmt: skip
    twins.save(tmp_path / "model.safetensors")
    assert call(tmp_path, scans, "--out", tmp_path / "out") == 3
    assert "two maps would both be called two_odd_cyst.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
