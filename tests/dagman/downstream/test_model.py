"""A fine-tuned model on disk: it comes back whole, sees a scan in any orientation alike, and refuses what it is not."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dagman.downstream.labelled import Classes
from dagman.downstream.model import SegmentationModel, load_model
from spade3d.configuration import Network
from spade3d.faults import DataFault, UsageFault
from spade3d.recipes.recipe import build_network
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import Volume

CPU = torch.device("cpu")
SETTINGS = Network(feature_size=12, window=3)


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    torch.manual_seed(0)
    return SegmentationModel(
        build_network(SETTINGS, out_channels=3),
        SETTINGS,
        Classes(("liver", "spleen"), (205, 500)),
        Preprocessing(spacing=(2.0, 2.0, 3.0), window_hu=(-100.0, 300.0)),
        (16, 16, 8),
        0.25,
    )


@pytest.fixture(scope="module")
def scan() -> Volume:
    voxels = np.random.default_rng(0).integers(-200, 400, (20, 18, 12)).astype(np.int16)
    return Volume(voxels, np.diag([2.5, 2.0, 3.0, 1.0]), "CT", "p", None)


def test_what_is_saved_comes_back(tmp_path, model, scan):
    model.save(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again = load_model(path)
        for name in ("settings", "classes", "preprocessing", "window", "overlap"):
            assert getattr(again, name) == getattr(model, name)
        theirs = again.network.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.network.state_dict().items())
    np.testing.assert_array_equal(again.segment(scan, CPU), model.segment(scan, CPU))


def test_it_answers_in_the_precision_that_training_has_on_the_device_or_the_one_asked_for(model, monkeypatch):
    images = torch.randn(1, 1, 16, 16, 8)
    with torch.no_grad():
        exact, network = model.logits(images), model.network
        assert torch.equal(exact, network.logits(network(images)))  # a CPU trains in float32
        # What is wrong on some CPUs are gradients, which answers do without.
        monkeypatch.setattr("spade3d.training.precision.cpu_bf16_is_right", lambda: False)
        rough = model.logits(images, "bf16")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = network.logits(network(images))
    assert rough.dtype == exact.dtype == torch.float32
    assert torch.equal(rough, expected.float())
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()
    with pytest.raises(UsageFault, match="precision 'fp8' is not known"):
        model.logits(images, "fp8")


def test_the_precision_reaches_the_network(model, scan):
    ready = model.preprocessing.prepare(scan)
    given = ready.normalisation.intensity(ready.voxels), ready.affine, ready.source_grid, CPU
    of_network, seen = model.network.forward, []

    def watched(images):
        seen.append(torch.is_autocast_enabled("cpu"))
        return of_network(images)

    model.network.forward = watched
    try:
        for precision in ("auto", "fp32", "bf16"):
            model.segment_prepared(*given, fill=0.0, precision=precision)
            assert set(seen) == {precision == "bf16"}
            seen.clear()
    finally:
        del model.network.forward


def test_a_scan_is_segmented_on_its_own_grid_with_the_values_of_the_table(model, scan):
    found = model.segment(scan, CPU)
    assert found.shape == scan.shape and found.dtype == np.uint16
    assert set(np.unique(found).tolist()) <= {0, 205, 500} and len(np.unique(found)) > 1


def test_the_same_body_lying_otherwise_is_segmented_alike(model, scan):
    flip = np.array([[-1.0, 0, 0, 19], [0, 1, 0, 0], [0, 0, -1, 11], [0, 0, 0, 1]])
    turned = Volume(np.ascontiguousarray(scan.voxels[::-1, :, ::-1]), scan.affine @ flip, "CT", "p", None)
    np.testing.assert_array_equal(model.segment(turned, CPU), model.segment(scan, CPU))  # canonical axes, both


def test_what_is_no_model_is_refused(tmp_path, model):
    with pytest.raises(DataFault, match="no model there; give a finished run of dagman-finetune"):
        load_model(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", {"format": "spade3d-encoder-1"})
    with pytest.raises(DataFault, match="format 'spade3d-encoder-1'; a dagman-segmentation-1"):
        load_model(tmp_path / "other.safetensors")
    model.save(tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    for part in (0, 100, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:part])
        with pytest.raises(DataFault, match="not readable as safetensors"):
            load_model(tmp_path)
