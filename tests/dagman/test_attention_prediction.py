"""dagman-predict --attention: maps lie on the grid of the scan, bright places where they are in mm, words say which."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import dagman.commands
import spade3d.commands
import spade3d.saliency_commands
from dagman import attention_prediction
from dagman.attention.maps import Looker, relative_maps
from dagman.attention.semantic import SemanticAttention
from dagman.attention.semantic_file import save_semantic
from dagman.attention_prediction import AttentionModel, attention_of_run, saliency_of_run
from dagman.downstream.labelled import Classes
from dagman.downstream.model import SegmentationModel
from dagman.downstream.study_model import STUDY
from spade3d.configuration import Network
from spade3d.crops.crop import rotation
from spade3d.faults import DataFault
from spade3d.networks.foreign import describe_encoder, save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.recipes.recipe import build_network
from spade3d.saliency import attention_source
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import Volume, read_volume, write_volume

CPU = torch.device("cpu")
SHAPE, SPACING = (26, 40, 34), (3.0, 1.5, 2.0)
HOW = Preprocessing(spacing=(2.0, 2.0, 2.5), window_hu=(-1000.0, 1000.0))
PLACE = (9, 28, 11)  # the voxel at the middle of what is bright


@pytest.fixture(scope="module")
def affine() -> np.ndarray:
    """Oblique, anisotropic, its axes neither in the order nor in the direction of R, A, S."""
    turned = rotation(np.radians([8.0, -11.0, 14.0])) @ np.array([[0, -1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    made = np.eye(4)
    made[:3, :3], made[:3, 3] = turned * SPACING, (31.0, -50.0, 12.0)
    return made


@pytest.fixture(scope="module")
def scan(affine) -> Volume:
    """A dark CT with one bright ball of 8 mm."""
    far = np.linalg.norm((np.stack(np.indices(SHAPE), axis=-1) - PLACE) * SPACING, axis=-1)
    return Volume(np.where(far < 8, 900, -900).astype(np.int16), affine, "CT", "p", None)


@pytest.fixture(scope="module")
def network() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(feature_size=12, window=3)


@pytest.fixture
def run(tmp_path, network):
    """A pretraining run: an encoder, its settings and a semantic attention over stage 2."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_encoder(folder / "encoder.safetensors", network, {"preprocessing": HOW.to_dict()})
    (folder / "config.yaml").write_text("crop: {shape: [24, 32, 24]}\n")
    torch.manual_seed(1)
    save_semantic(folder / "semantic_attention.safetensors", SemanticAttention(48, heads=4), 2)
    return folder


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    torch.manual_seed(2)
    settings = Network(feature_size=12, window=3)
    folder = tmp_path_factory.mktemp("finetuned")
    SegmentationModel(
        build_network(settings, out_channels=2), settings, Classes(("liver",), (7,)), HOW, (24, 24, 24), 0.25
    ).save(folder / "model.safetensors")
    return folder


@pytest.fixture
def scans(tmp_path, scan):
    (tmp_path / "scans").mkdir()
    write_volume(tmp_path / "scans" / "one.nii.gz", scan.voxels, scan.affine)
    return tmp_path / "scans"


def predict(capsys, *tokens) -> tuple[dict, str]:
    """What the command prints with --json, and on standard error."""
    with pytest.raises(SystemExit) as end:
        dagman.commands.predict([*map(str, tokens), "--device", "cpu", "--json"])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return json.loads(printed.out), printed.err


def refused(capsys, *tokens) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        dagman.commands.predict([*map(str, tokens), "--device", "cpu"])
    printed = capsys.readouterr()
    assert printed.out == ""
    return end.value.code, printed.err.splitlines()[-1]


def mm_of(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Where the brightest hundredth of a map has its middle."""
    weight = np.where(volume >= np.percentile(volume, 99), volume, 0)
    middle = (np.stack(np.indices(volume.shape), axis=-1) * weight[..., None]).sum(axis=(0, 1, 2)) / weight.sum()
    return affine[:3, :3] @ middle + affine[:3, 3]


def test_a_bright_cell_lies_where_it_is_in_mm(tmp_path, scan, network, monkeypatch):
    """Heads that attend to what is bright, one of them three times as sharply, see the ball where it is."""

    def bright(self, images):
        cells = F.avg_pool3d(images, self.cell, ceil_mode=True)
        return torch.cat([cells + 0.01, cells**3 + 0.01], dim=1)

    monkeypatch.setattr(Looker, "by_head", bright)
    monkeypatch.setattr(Looker, "heads", 2)
    model = AttentionModel(Looker(network.swinViT, 1), HOW, (12, 16, 12))
    ready = HOW.prepare(scan)
    model.write(model.look(ready.normalisation.intensity(ready.voxels), CPU), ready, tmp_path, "one")
    place_mm = scan.affine[:3, :3] @ PLACE + scan.affine[:3, 3]
    mean = nib.load(tmp_path / "one_attention.nii.gz")
    heads = nib.load(tmp_path / "one_attention_heads.nii.gz")
    assert heads.shape == (*SHAPE, 2)
    for written in (mean, heads):
        np.testing.assert_allclose(written.affine, scan.affine, atol=1e-5)
    for found in (mean.get_fdata(), heads.get_fdata()[..., 0], heads.get_fdata()[..., 1]):
        assert found.shape == SHAPE
        assert np.linalg.norm(mm_of(found, scan.affine) - place_mm) < 1.5  # cells are 4 x 4 x 5 mm
        assert found[PLACE] > 3 and found[2, 2, 2] == pytest.approx(1, abs=1e-2)  # a crop where nothing stands out


def test_the_class_token_s_attention_is_written_where_the_run_has_one(capsys, tmp_path, run, scans, scan, network):
    said, noted = predict(capsys, run, scans, "--out", tmp_path / "out", "--attention")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "one_attention.nii.gz",
        "one_attention_heads.nii.gz",
    }
    shows = "[CLS] attention over the tokens of stage 2 (cells of 8 x 8 x 8 voxels)"
    assert said["attention"] == {"shows": shows, "heads": 4, "crop": [24, 32, 24], "unit": "1 is the average of a crop"}
    assert said["scans"] == 1 and "volumes_ml" not in said and f"note: {shows}; 1 is the average of a crop" in noted
    mean = read_volume(tmp_path / "out" / "one_attention.nii.gz")
    heads = nib.load(tmp_path / "out" / "one_attention_heads.nii.gz")
    assert mean.shape == SHAPE and mean.voxels.dtype == np.float32 and heads.shape == (*SHAPE, 4)
    np.testing.assert_allclose(mean.affine, scan.affine, atol=1e-5)
    np.testing.assert_allclose(heads.affine, scan.affine, atol=1e-5)

    # Nothing but the networks' own maps: of one crop that holds the scan, at the voxels that both grids share.
    model = attention_of_run(run, None)
    ready = HOW.prepare(scan)
    intensities = ready.normalisation.intensity(ready.voxels)
    whole = AttentionModel(model.looker, HOW, (99, 99, 99))
    expected = relative_maps(model.looker, torch.from_numpy(intensities)[None, None])[0]
    torch.testing.assert_close(whole.look(intensities, CPU), expected, rtol=1e-5, atol=1e-5)


def test_the_class_token_gives_saliency_to_a_store(capsys, tmp_path, run, scan):
    store, scans = tmp_path / "store", tmp_path / "tissue"
    scans.mkdir()
    body = np.pad(np.maximum(scan.voxels[1:-1, 1:-1, 1:-1], 40), 1, constant_values=-1000)  # it nearly fills the scan
    write_volume(scans / "one.nii.gz", body, scan.affine)
    as_trained = ["--spacing", "2", "2", "2.5", "--window", "-1000", "1000"]
    with pytest.raises(SystemExit):
        spade3d.commands.prepare([str(scans), "--out", str(store), *as_trained])
    with pytest.raises(SystemExit) as end:
        spade3d.saliency_commands.main(["attention", str(store), "--init", str(run / "encoder.safetensors")])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "shows: [CLS] attention over the tokens of stage 2 (cells of 8 x 8 x 8" in said
    found = VolumeStore.open(store)
    norm = found.cases[0].normalisation
    mean = attention_of_run(run, None).look(norm.intensity(found.image(0)), CPU)[0].numpy()
    above = np.maximum(mean - 1, 0)
    expected = np.clip(above / np.percentile(above[above > 0], 99.5), 0, 1)
    written = found.saliency(0) / 255
    assert written.max() == 1 and np.abs(written - expected)[written > 0].max() <= 1 / 255  # the body's box, no more


def test_the_attention_of_a_fine_tuned_model_is_named_as_taught_by_labels(finetuned):
    for described in describe_encoder(finetuned / "model.safetensors"), {"format": STUDY.format}:
        assert attention_source(described) == "attention (taught by labels)"


def test_a_scan_of_one_cell_has_no_saliency(run):
    look, _ = saliency_of_run(run / "encoder.safetensors")
    assert not look(np.ones((8, 8, 8), np.float32), 0.0, CPU).any()


def test_heads_that_were_guided_are_named_where_they_are_shown_and_not_elsewhere(capsys, tmp_path, run, scans):
    table = {"attachment": "semantic", "stage": 2, "heads": 4, "regions": ["liver", "spleen"]}
    (run / "guided_heads.json").write_text(json.dumps(table))
    said, noted = predict(capsys, run, scans, "--out", tmp_path / "out", "--attention")
    assert said["attention"]["regions"] == ["liver", "spleen"] and "; guided heads 0: liver, 1: spleen" in noted
    blocks, noted = predict(capsys, run, scans, "--out", tmp_path / "blocks", "--attention", "--attention-stage", 2)
    assert "regions" not in blocks["attention"] and "guided" not in noted
    (run / "guided_heads.json").write_text(json.dumps(table | {"attachment": "native"}))
    assert attention_of_run(run, 2).regions == ("liver", "spleen") and attention_of_run(run, 3).regions == ()
    (run / "guided_heads.json").write_text("{}")
    assert attention_of_run(run, None).regions == ()


@pytest.mark.parametrize("stage, crop", [((), None), (("--attention-stage", 2), None), ((), [24, 24, 24])])
def test_a_run_without_a_class_token_shows_what_cells_receive(capsys, tmp_path, run, scans, stage, crop):
    """Or a stage that was asked for; without the settings of its run an encoder sees its own attention window."""
    if not stage:
        (run / "semantic_attention.safetensors").unlink()
    if crop:
        (run / "config.yaml").unlink()
    model = run / "encoder.safetensors" if crop else run
    said, _ = predict(capsys, model, scans, "--out", tmp_path / "out", "--attention", *stage)
    number, heads = (2, 6) if stage else (3, 12)
    assert said["attention"]["shows"].startswith(f"attention that cells receive in the last block of stage {number} ")
    assert (said["attention"]["heads"], said["attention"]["crop"]) == (heads, crop or [24, 32, 24])
    assert nib.load(tmp_path / "out" / "one_attention_heads.nii.gz").shape == (*SHAPE, heads)


def test_a_fine_tuned_model_segments_as_before_and_shows_where_it_looks(capsys, tmp_path, finetuned, scans):
    plain, _ = predict(capsys, finetuned, scans, "--out", tmp_path / "plain")
    said, noted = predict(capsys, finetuned, scans, "--out", tmp_path / "out", "--attention", "--attention-stage", 1)
    assert said["volumes_ml"] == plain["volumes_ml"] and "attention" not in plain
    assert "note: attention that cells receive in the last block of stage 1 (cells of 2 x 2 x 2 voxels)" in noted
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {"one.nii.gz", "volumes.csv"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "volumes.csv",
        "one.nii.gz",
        "one_attention.nii.gz",
        "one_attention_heads.nii.gz",
    }
    assert (tmp_path / "out" / "one.nii.gz").read_bytes() == (tmp_path / "plain" / "one.nii.gz").read_bytes()


def test_nothing_is_written_over_and_bad_scans_are_left_out(capsys, tmp_path, run, scans):
    (scans / "two.nii.gz").write_bytes(b"")
    said, noted = predict(capsys, run, scans, "--out", tmp_path / "out", "--attention")
    assert (said["scans"], said["left_out"]) == (1, 1) and "left out two" in noted
    code, message = refused(capsys, run, scans / "one.nii.gz", "--out", tmp_path / "out", "--attention")
    assert code == 3 and "one_attention.nii.gz: exists already" in message
    (scans / "one_attention.nii.gz").write_bytes((scans / "one.nii.gz").read_bytes())
    (scans / "one.nii.gz").unlink()
    code, message = refused(capsys, run, scans / "two.nii.gz", "--out", tmp_path / "new", "--attention")
    assert code == 3 and "none of 1 scans could be looked at" in message


def test_models_that_cannot_look_are_refused(capsys, tmp_path, run, scans, network):
    out = ("--out", tmp_path / "out", "--attention")
    bare = tmp_path / "bare.safetensors"
    save_file({name: tensor.clone() for name, tensor in network.swinViT.state_dict().items()}, bare)
    code, message = refused(capsys, bare, scans, *out)
    assert code == 3 and "bare.safetensors: says not how scans are prepared" in message
    save_semantic(run / "semantic_attention.safetensors", SemanticAttention(24), 2)
    code, message = refused(capsys, run, scans, *out)
    assert code == 3 and "reads tokens of 24 channels, and stage 2 of encoder.safetensors has 48" in message
    code, message = refused(capsys, scans, scans, *out)
    assert code == 3 and "no model there; give a finished run of spade-pretrain or of dagman-finetune" in message
    assert not (tmp_path / "out").exists()


def test_a_scan_within_one_cell_says_nothing(network):
    model = AttentionModel(Looker(network.swinViT, 4), HOW, (32, 32, 32))
    with pytest.raises(DataFault, match="16 x 12 x 16 voxels at once are one cell of 16 x 16 x 16"):
        model.look(np.zeros((40, 12, 16), np.float32)[:16], CPU)
    model.look(np.zeros((17, 12, 16), np.float32), CPU)


def test_a_large_scan_is_seen_in_crops_of_the_training(network, monkeypatch):
    seen = []

    def noted(looker, images):
        seen.append(tuple(images.shape[2:]))
        return torch.ones(len(images), 1 + looker.heads, *images.shape[2:])

    monkeypatch.setattr(attention_prediction, "relative_maps", noted)
    model = AttentionModel(Looker(network.swinViT, 3), HOW, (24, 16, 24))
    found = model.look(np.zeros((30, 12, 24), np.float32), CPU)
    assert set(seen) == {(24, 12, 24)} and len(seen) == 2 and found.shape == (13, 30, 12, 24) and (found == 1).all()
