"""dagman-predict: any format in, label maps on the scan's own grid out, a line and a row for every scan and class."""

import csv
import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dagman.commands
from dagman.downstream.components import keep_largest
from dagman.downstream.flips import exchange_of, mean_over_flips
from dagman.downstream.inference import predict_classes
from dagman.downstream.labelled import Classes
from dagman.downstream.model import SegmentationModel, load_model, with_decoder
from spade3d.configuration import Network
from spade3d.crops.crop import rotation
from spade3d.networks.foreign import save_encoder
from spade3d.recipes.recipe import build_network
from spade3d.volumes.itk_writing import write_itk
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import read_labels, read_volume, write_volume

CPU = torch.device("cpu")
SHAPE, SPACING = (22, 18, 16), (1.8, 1.5, 2.2)
SETTINGS = Network(feature_size=12, window=3)
NAMES, VALUES = ("left kidney", "right kidney", "liver"), (3, 2, 500)


@pytest.fixture(scope="module")
def affine() -> np.ndarray:
    """Oblique, its axes neither in the order nor in the direction of R, A, S."""
    turned = rotation(np.radians([8.0, -11.0, 14.0])) @ np.array([[0, -1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    made = np.eye(4)
    made[:3, :3], made[:3, 3] = turned * SPACING, (31.0, -50.0, 12.0)
    return made


@pytest.fixture(scope="module")
def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return SegmentationModel(
        build_network(SETTINGS, out_channels=4),
        SETTINGS,
        Classes(NAMES, VALUES),
        Preprocessing(spacing=(2.0, 2.0, 2.5), window_hu=(-1000.0, 1000.0)),
        (16, 16, 16),
        0.25,
        modalities=("CT",),
    )


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model.save(folder / "model.safetensors")
    return folder


@pytest.fixture
def scan(tmp_path, voxels, affine):
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in" / "one.nii.gz", voxels, affine)
    return tmp_path / "in" / "one.nii.gz"


def predict(capsys, *tokens) -> tuple[str, str]:
    """What the command prints on standard output and on standard error."""
    with pytest.raises(SystemExit) as end:
        dagman.commands.predict([*map(str, tokens), "--device", "cpu"])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return printed.out, printed.err


def refused(capsys, *tokens) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        dagman.commands.predict([*map(str, tokens), "--device", "cpu"])
    printed = capsys.readouterr()
    assert printed.out == ""
    return end.value.code, printed.err.splitlines()[-1]


def by_hand(model, path, axes=()):
    """Classes on the grid of the scan's file, in its axis order."""
    scan = read_volume(path).canonical()
    ready = model.preprocessing.prepare(scan)
    found = predict_classes(
        mean_over_flips(model.logits, axes, exchange_of(model.classes, model.taught, axes)),
        ready.normalisation.intensity(ready.voxels),
        ready.affine,
        ready.source_grid,
        classes=4,
        window=model.window,
        overlap=model.overlap,
        device=CPU,
        fill=ready.normalisation.low,
    )
    return model.classes.written(found)


def canonical(path) -> np.ndarray:
    return read_labels(path).canonical().voxels


def test_a_line_and_rows_for_each_scan_and_class(capsys, tmp_path, run, scan, voxels, affine):
    write_itk(tmp_path / "in" / "two.mha", voxels[:20, 2:], affine)
    out, _ = predict(capsys, run, tmp_path / "in", "--out", tmp_path / "out")
    lines = out.splitlines()
    assert lines[0].startswith("one: ") and lines[1].startswith("two: ")
    assert lines[2:] == [f"predictions: {tmp_path / 'out'}", "scans: 2", "left_out: 0", "other_modality: []"]
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"], row["name"]) for row in rows] == [
        (case, str(value), name) for case in ("one", "two") for name, value in zip(NAMES, VALUES)
    ]
    for row in rows:
        found = nib.load(tmp_path / "out" / f"{row['case']}.nii.gz")
        count = int((np.asarray(found.dataobj) == int(row["class"])).sum())
        assert int(row["voxels"]) == count
        assert float(row["ml"]) == pytest.approx(count * 1.8 * 1.5 * 2.2 / 1000, abs=6e-4)
        assert f"{row['name']} {float(row['ml']):.1f} ml" in lines[row["case"] == "two"]
    assert sum(int(row["voxels"]) for row in rows) > 500


def test_with_json_there_is_one_object_and_nothing_else(capsys, tmp_path, run, scan):
    out, _ = predict(capsys, run, scan, "--out", tmp_path / "out", "--json")
    said = json.loads(out)
    assert said.keys() == {"predictions", "scans", "left_out", "other_modality", "seconds", "volumes_ml"}
    assert said["volumes_ml"]["one"].keys() == set(NAMES) and said["seconds"]["one"] > 0


def dicom(folder, voxels, affine):
    """A CT series as a scanner writes it, slice by slice."""
    folder.mkdir()
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    along_i, along_j = lps[:3, 0] / SPACING[0], lps[:3, 1] / SPACING[1]
    for k in range(voxels.shape[2]):
        image = sitk.GetImageFromArray(voxels[:, :, k].T[None])
        image.SetSpacing(SPACING)
        tags = {
            "0008|0060": "CT",
            "0010|0020": "p",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{k + 1}",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{mm:.10g}" for mm in (lps @ [0, 0, k, 1])[:3]),
            "0020|0037": "\\".join(f"{one:.10g}" for one in (*along_i, *along_j)),
            "0028|0030": f"{SPACING[1]}\\{SPACING[0]}",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(image)
    return folder


def test_any_format_in_gives_the_same_label_map_in_the_format_asked_for(capsys, tmp_path, run, scan, voxels, affine):
    folder = tmp_path / "in"
    for name in ("a.nrrd", "b.mha"):
        write_itk(folder / name, voxels, affine)
    for name in ("c.nhdr", "d.mhd"):
        sitk.WriteImage(sitk.ReadImage(str(folder / "a.nrrd")), str(folder / name))
    write_volume(folder / "e.nii", voxels, affine)
    dicom(tmp_path / "f", voxels, affine)
    scans = [*(folder / name for name in ("a.nrrd", "b.mha", "c.nhdr", "d.mhd", "e.nii", "one.nii.gz")), tmp_path / "f"]
    predict(capsys, run, *scans, "--out", tmp_path / "nifti")
    predict(capsys, run, *scans, "--out", tmp_path / "same", "--format", "same")
    names = {"a.nrrd", "b.mha", "c.nrrd", "d.mha", "e.nii", "one.nii.gz", "f.nii.gz", "volumes.csv"}
    assert {path.name for path in (tmp_path / "same").iterdir()} == names
    expected = canonical(tmp_path / "nifti" / "one.nii.gz")
    assert set(np.unique(expected)) <= {0, *VALUES} and len(np.unique(expected)) > 2
    for name in names - {"volumes.csv"}:
        plain = tmp_path / "nifti" / f"{name.split('.')[0]}.nii.gz"
        for path in (tmp_path / "same" / name, plain):
            # An affine lies rounded in NIfTI, which decides where two classes are nearly equal.
            assert (canonical(path) != expected).mean() < 1e-3
            given = next(read_volume(scan) for scan in scans if scan.name.split(".")[0] == name.split(".")[0])
            assert read_volume(path).shape == given.shape  # the axis order of the file
            np.testing.assert_allclose(read_volume(path).affine, given.affine, atol=2e-5)  # float32 in NIfTI


def test_what_is_written_is_what_the_model_finds(capsys, tmp_path, run, scan, model):
    predict(capsys, run, scan, "--out", tmp_path / "plain")
    np.testing.assert_array_equal(canonical(tmp_path / "plain" / "one.nii.gz"), by_hand(model, scan))
    predict(capsys, run, scan, "--out", tmp_path / "batch", "--batch", 3)
    batched = canonical(tmp_path / "batch" / "one.nii.gz")
    assert (batched != by_hand(model, scan)).mean() < 1e-3  # rounding, where two classes are nearly equal


@pytest.mark.parametrize(("flips", "axes"), [("all", (0, 1, 2)), ("sA", (1, 2))])
def test_flips_are_those_that_were_asked_for(capsys, tmp_path, run, scan, model, flips, axes):
    predict(capsys, run, scan, "--out", tmp_path / "out", "--flips", flips)
    found = canonical(tmp_path / "out" / "one.nii.gz")
    assert np.array_equal(found, by_hand(model, scan, axes)) and not np.array_equal(found, by_hand(model, scan))


def test_only_the_largest_piece_stays_unless_a_class_is_excepted(capsys, tmp_path, run, scan, model):
    plain, cleaned = by_hand(model, scan), by_hand(model, scan)
    taken = keep_largest(cleaned, (3, 2))
    assert max(taken.values()) > 0 and keep_largest(plain.copy(), (500,))[500] > 0
    predict(capsys, run, scan, "--out", tmp_path / "out", "--largest-component", "--except", "LIVER")
    np.testing.assert_array_equal(canonical(tmp_path / "out" / "one.nii.gz"), cleaned)


def test_a_scan_of_another_modality_is_warned_of(capsys, tmp_path, run, scan, voxels, affine):
    write_volume(tmp_path / "in" / "t1_MR.nii.gz", np.abs(voxels), affine)
    out, err = predict(capsys, run, tmp_path / "in", "--out", tmp_path / "out", "--json")
    assert json.loads(out)["other_modality"] == ["t1_MR"]
    assert "warning: t1_MR: is MR, and the model learned from CT; look at its label map" in err
    assert err.count("warning") == 1


def test_a_second_call_adds_to_the_table_and_overwrites_nothing(capsys, tmp_path, run, scan):
    out = tmp_path / "out"
    predict(capsys, run, scan, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, said = refused(capsys, run, scan, "--out", out)
    assert code == 3 and "one.nii.gz: exists already" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shutil.copy(scan, tmp_path / "two.nii.gz")
    predict(capsys, run, tmp_path / "two.nii.gz", "--out", out)
    rows = before["volumes.csv"].decode().splitlines()
    again = [row.replace("one,", "two,") for row in rows[1:]]
    assert (out / "volumes.csv").read_text(encoding="utf-8").splitlines() == rows + again
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "volumes.csv").write_text("my,own\n")
    code, said = refused(capsys, run, scan, "--out", tmp_path / "mine")
    assert code == 3 and "is no table of dagman-predict" in said
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["volumes.csv"]


def test_two_scans_of_one_name_are_refused(capsys, tmp_path, run, scan, voxels, affine):
    write_itk(tmp_path / "one.nrrd", voxels, affine)
    for more in ([], ["--format", "same"]):
        code, said = refused(capsys, run, scan, tmp_path / "one.nrrd", "--out", tmp_path / "out", *more)
        assert code == 3 and "two scans would both be called one" in said and not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_that_is_said_once_and_no_scan_is_blamed(capsys, tmp_path, run, scan):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as end:
        dagman.commands.predict([*map(str, (run, scan, "--out", tmp_path / "file" / "out")), "--device", "cpu"])
    said = capsys.readouterr().err
    assert end.value.code == 3 and "no folder can be made there" in said and "left out" not in said


def test_what_a_model_cannot_do_is_refused_before_any_scan_is_read(capsys, tmp_path, run, scan, model):
    code, said = refused(capsys, run, scan, "--out", tmp_path / "out", "--largest-component", "--except", "spleen")
    assert code == 2 and "--except spleen: no such class; the model has left kidney, right kidney, liver" in said
    one_sided = replace(model, classes=Classes(("left kidney", "spleen", "liver"), VALUES))
    one_sided.save(tmp_path / "model.safetensors")
    code, said = refused(capsys, tmp_path / "model.safetensors", scan, "--out", tmp_path / "out", "--flips", "all")
    assert code == 2 and "no class is the other side of left kidney" in said
    save_encoder(tmp_path / "encoder.safetensors", model.network, {"preprocessing": model.preprocessing.to_dict()})
    code, said = refused(
        capsys, tmp_path / "encoder.safetensors", scan, "--out", tmp_path / "out", "--attention", "--flips", "s"
    )
    assert code == 2 and "an encoder does not segment" in said
    assert not (tmp_path / "out").exists()


def test_a_linear_decoder_is_read_and_segments(capsys, tmp_path, scan, model):
    torch.manual_seed(1)
    linear = replace(
        model, network=with_decoder(build_network(SETTINGS, out_channels=4), "linear", 4), decoder="linear"
    )
    linear.save(tmp_path / "model.safetensors")
    predict(capsys, tmp_path / "model.safetensors", scan, "--out", tmp_path / "out")
    np.testing.assert_array_equal(canonical(tmp_path / "out" / "one.nii.gz"), by_hand(linear, scan))


def test_a_file_of_before_is_read_and_nothing_is_known_of_modalities(tmp_path, model):
    replace(model, taught=(True, False, True)).save(tmp_path / "new.safetensors")
    again = load_model(tmp_path / "new.safetensors")
    assert (again.modalities, again.taught) == (("CT",), (True, False, True))
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    said = json.loads(metadata["model"])
    for name in ("modalities", "taught", "decoder"):
        del said[name]
    save_file(weights, tmp_path / "old.safetensors", metadata | {"model": json.dumps(said)})
    old = load_model(tmp_path / "old.safetensors")
    assert (old.modalities, old.taught, old.decoder) == ((), (False, False, False), "swin-unetr")
