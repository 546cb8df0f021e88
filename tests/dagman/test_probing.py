"""dagman-probe on small phantoms: what is written, who is probed, what is said without labels, and who is refused."""

import csv
import json
import re
from functools import partial

import numpy as np
import pytest
import torch

import dagman.commands
import dagman.probing
from dagman.attention.diversity import head_diversity
from dagman.evaluation.answers import of_encoder
from dagman.evaluation.crop_features import Probing
from dagman.evaluation.retrieval import draw_crops
from dagman.frozen_encoders import trained
from dagman.probing import names_of, probed_scans
from dagman.recipes.probing import ProbeSettings, prepared_like
from spade3d.configuration import Data
from spade3d.crops.crop import cut
from spade3d.crops.pairs import as_images
from spade3d.networks.foreign import save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.provenance import describe
from spade3d.scans import open_scans
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.split import split_cases
from spade3d.volumes.volume import write_volume

SHOWN = ("--folds", 2, "--crop.shape", 16, 16, 16, "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def few_crops():
    """Fewer crops, twins and points than a user's run, for the sake of time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dagman.probing, "Probing", partial(Probing, crops=4, twins=1, points=16, step=6))
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearts")
    write_dataset("heart-ct", folder / "scans", patients=4, shape=(24, 24, 24), spacing=(8.0, 8.0, 8.0), seed=0)
    return open_scans(folder / "scans", folder / "store", Data())


def encoder(path, seed: int = 0, window: int = 2, **said):
    torch.manual_seed(seed)
    path.parent.mkdir(exist_ok=True)
    network = SwinUNETR(feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=window)
    save_encoder(path, network, said)
    return path


def probe(capsys, *tokens) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of dagman-probe."""
    with pytest.raises(SystemExit) as end:
        dagman.commands.probe([str(token) for token in tokens])
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


@pytest.fixture(scope="module")
def probed(store, tmp_path_factory):
    """The folder of a command that probed an encoder with the very weights of its untrained twin, and another."""
    folder = tmp_path_factory.mktemp("probed")
    everybody = describe(store, range(len(store)), split_cases(store.cases, 2, 0))
    files = [
        encoder(folder / "first" / "encoder.safetensors", provenance=everybody),
        encoder(folder / "other.safetensors", 7),
    ]
    with pytest.raises(SystemExit) as end:
        words = [store.path, "--encoder", *files, "--out", folder / "out", *SHOWN]
        dagman.commands.probe([str(word) for word in words])
    assert end.value.code == 0
    return folder / "out"


@pytest.fixture(scope="module")
def result(probed):
    return json.loads((probed / "probes.json").read_text(encoding="utf-8"))


def test_held_out_subjects_are_probed_and_every_question_is_asked(result, store):
    judges = split_cases(store.cases, 2, 0).validation
    assert result["scans"] == [store.cases[i].name for i in judges]
    measures = result["encoders"]["first"]["measures"]
    assert {name.split(".")[0] for name in measures} == {
        *("knn", "linear", "retrieval", "landmarks", "clusters", "kmeans", "equivariance", "heads")
    }
    assert all(set(of) == set(result["subjects"]) for of in result["encoders"]["first"]["by_subject"].values())
    assert (
        measures["linear.accuracy.features"]["mean"] > result["controls"]["measures"]["linear.accuracy.chance"]["mean"]
    )


def test_controls_are_no_encoders_and_are_given_once(result):
    assert not any(map(of_encoder, result["controls"]["measures"]))
    for found in (*result["encoders"].values(), *result["untrained"].values()):
        assert all(map(of_encoder, found["measures"]))
    asked = {name.rsplit(".", 1)[0] for name in result["encoders"]["first"]["measures"] if name.endswith(".features")}
    without = {name.rsplit(".", 1)[0] for name in result["controls"]["measures"]}
    assert {
        "knn.accuracy",
        "linear.precision",
        "retrieval",
        "equivariance.moved",
        "kmeans.places.ami",
    } <= asked & without


def test_an_encoder_with_the_weights_of_its_untrained_twin_gains_nothing(result):
    first, other = result["encoders"].values()
    assert first["untrained"] == other["untrained"] == "untrained"
    assert {gain["difference"] for gain in first["gains"].values()} == {0}
    assert {gain["difference"] for gain in other["gains"].values()} != {0}


def test_cka_compares_every_layer_with_itself_its_twin_and_the_other_encoder(result):
    pairs = {(one["rows"], one["columns"]): np.array(one["cka"]) for one in result["cka"]}
    assert set(pairs) == {
        ("first", "first"), ("other", "other"), ("first", "untrained"), ("other", "untrained"), ("first", "other")
    }  # fmt: skip
    layers = ["embedding", "1.1", "stage 1", "2.1", "stage 2", "3.1", "stage 3", "4.1", "stage 4"]
    assert result["cka"][0]["row_layers"] == result["cka"][0]["column_layers"] == layers
    for pair in (("first", "first"), ("first", "untrained")):
        assert np.diag(pairs[pair]) == pytest.approx(np.ones(9))
    assert np.diag(pairs["first", "other"]).max() < 1


def test_table_and_report_hold_the_same_numbers_and_the_warnings(probed, result):
    rows = list(csv.DictReader((probed / "probes.csv").open()))
    linear = {row["encoder"]: row for row in rows if row["measure"] == "linear.accuracy.features"}
    assert set(linear) == {"first", "other", "untrained"}
    assert float(linear["other"]["mean"]) == result["encoders"]["other"]["measures"]["linear.accuracy.features"]["mean"]
    assert linear["first"]["gain"] == "0.0" and linear["untrained"]["gain"] == ""
    assert {row["measure"] for row in rows if row["encoder"] == ""} == set(result["controls"]["measures"])
    page = (probed / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5 + 2 and "http" not in re.sub('http-equiv|"http://www.w3.org[^"]*"', "", page)
    assert "2 validation subjects had been in the pretraining" in page
    assert "The checkpoint does not say what it was pretrained on" in page  # of the other


def test_heads_are_measured_in_the_crops_of_the_other_probes_and_shown_by_encoder_and_stage(probed, result, store):
    """The phantoms' crops of 16 voxels leave one token in stage 4, and stage 1 of these encoders has one head."""
    how = Probing((16, 16, 16), tuple(result["probing"]["spacing"]), crops=4)
    network = trained(probed.parent / "other.safetensors")
    for case in split_cases(store.cases, 2, 0).validation:
        image = as_images([cut(store, draw_crops(store, case, how)[0])])
        for name, value in head_diversity(network, image, how.spacing, (1, 2, 3)).items():
            if name != "stage1.divergence":
                of = result["encoders"]["other"]["by_subject"][f"heads.{name}"][store.cases[case].subject]
                assert value in [pytest.approx(one) for one in of], name
    for found in (*result["encoders"].values(), *result["untrained"].values()):
        heads = {name for name in found["measures"] if name.startswith("heads.")}
        measures = ("entropy", "entropy_spread", "distance_mm", "divergence")
        assert heads == {f"heads.stage{n}.{one}" for n in (1, 2, 3) for one in measures} - {"heads.stage1.divergence"}
    assert "heads.stage2.entropy" in result["encoders"]["other"]["gains"]
    said = [note for note in result["notes"] if "heads" in note]
    assert said == [
        "divergence of heads in stage 1 left out: it has one head",
        "heads of stage 4 left out: in crops of this size its tokens see themselves alone",
    ]
    page = (probed / "report.html").read_text(encoding="utf-8")
    table = page[page.index('id="attention-heads"') : page.index('id="signs-of-life"')]
    assert table.count("<tr>") == 1 + 3 * 3 and all(note in page for note in said)
    entropy = result["encoders"]["other"]["measures"]["heads.stage2.entropy"]["mean"]
    assert f"{entropy:.4f} (" in table


def test_strict_refuses_scans_of_the_pretraining_and_leaves_nothing(store, tmp_path, capsys):
    everybody = describe(store, range(len(store)), split_cases(store.cases, 2, 0))
    file = encoder(tmp_path / "run" / "encoder.safetensors", provenance=everybody)
    code, out, err = probe(capsys, store.path, "--encoder", file, "--out", tmp_path / "out", "--strict", *SHOWN)
    assert code == 3 and out == "" and "2 validation subjects were in the pretraining" in err
    assert not (tmp_path / "out").exists()


def test_without_labels_layers_and_signs_are_left_and_one_line_says_so(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for n in range(2):
        write_volume(
            tmp_path / f"scan{n}.nii.gz", rng.integers(-200, 300, (20, 20, 20)).astype(np.int16), np.eye(4) * 2
        )
    file = encoder(tmp_path / "run" / "encoder.safetensors", run={"crop": [16, 16, 16]})
    scans = tmp_path / "scans"
    scans.mkdir()
    for n in range(2):
        (tmp_path / f"scan{n}.nii.gz").rename(scans / f"scan{n}.nii.gz")
    code, out, err = probe(capsys, scans, "--encoder", file, "--out", tmp_path / "out", "--device", "cpu", "--json")
    assert code == 0 and "equivariance" in json.loads(out)["encoders"]["run"]
    assert sum("left out" in line for line in err.splitlines()) == 1
    assert "organ probes, retrieval, landmarks and clusters left out: 0 of the probed subjects show" in err
    result = json.loads((tmp_path / "out" / "probes.json").read_text(encoding="utf-8"))
    assert result["probing"]["shape"] == [16, 16, 16] and len(result["cka"]) == 2
    assert {name.split(".")[0] for name in result["encoders"]["run"]["measures"]} == {"equivariance", "heads"}
    assert len(result["encoders"]["run"]["signs"]) == 5


def test_encoders_trained_on_different_crops_need_to_be_told_which(store, tmp_path, capsys):
    files = [
        encoder(tmp_path / name / "encoder.safetensors", run={"crop": crop})
        for name, crop in {"a": [16, 16, 16], "b": [24, 16, 16]}.items()
    ]
    code, _, err = probe(capsys, store.path, "--encoder", *files, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "a: 16x16x16, b: 24x16x16" in err and "--crop.shape" in err


def test_a_second_run_never_writes_over_the_first(probed, store, capsys):
    before = (probed / "probes.json").read_bytes()
    file = encoder(probed.parent / "again" / "encoder.safetensors")
    code, _, err = probe(capsys, store.path, "--encoder", file, "--out", probed, *SHOWN)
    assert code == 3 and "already holds probes; give another --out" in err
    assert (probed / "probes.json").read_bytes() == before


def test_names_tell_encoders_apart(tmp_path):
    files = [tmp_path / "a" / "encoder.safetensors", tmp_path / "b" / "a.pt", tmp_path / "c" / "encoder.safetensors"]
    assert names_of(files) == ["a 1", "a 2", "c"]


def test_at_most_so_many_scans_are_probed(store):
    assert len(probed_scans(store, ProbeSettings(folds=2)).validation) == 2
    assert len(probed_scans(store, ProbeSettings(folds=2, scans=1)).validation) == 1


def test_scans_are_prepared_as_the_first_encoder_that_tells_was_trained():
    told = {"preprocessing": {"spacing": [2.0, 2.0, 3.0], "window_hu": [-100.0, 200.0], "mr": "zscore"}}
    assert prepared_like([{}, told]) == Data(spacing=(2.0, 2.0, 3.0), window_hu=(-100.0, 200.0), mr="zscore")
    assert prepared_like([{}]) == Data()
