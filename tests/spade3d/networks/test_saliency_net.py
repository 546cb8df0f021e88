"""The saliency predictor: its loss is the formula, it learns, and it comes back from disk as it was."""

import math

import numpy as np
import pytest
import torch

from spade3d.crops.saliency_crops import SaliencyBatch
from spade3d.faults import DataFault
from spade3d.networks.saliency_net import SaliencyModel, SaliencyNet, SaliencyPrediction, load_saliency_model
from spade3d.networks.sliding import over_scan
from spade3d.volumes.preprocessing import Preprocessing

CPU = torch.device("cpu")


def batch(seed, n=2):
    """A bright ball somewhere, and a Gaussian over it."""
    rng = np.random.default_rng(seed)
    index = np.indices((32, 16, 16))
    images, maps = [], []
    for _ in range(n):
        centre = rng.uniform((8, 5, 5), (24, 11, 11))
        square = sum((axis - c) ** 2 for axis, c in zip(index, centre, strict=True))
        images.append((square < 12) + rng.normal(0, 0.1, square.shape))
        maps.append(np.exp(-square / 18))
    images, maps = (torch.from_numpy(np.stack(some)[:, None]).float() for some in (images, maps))
    return SaliencyBatch(images, maps, ("ball",) * n)


def test_the_loss_is_its_formula():
    given = batch(0, 1)
    task = SaliencyPrediction(SaliencyNet(4))
    p = task.network(given.images).sigmoid().double().flatten().tolist()
    s = given.saliency.double().flatten().tolist()
    terms = [-b * math.log(a) - (1 - b) * math.log(1 - a) for a, b in zip(p, s, strict=True)]
    assert task.losses(given, 0.0)["bce"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_it_learns_where_to_look_and_the_model_comes_back(tmp_path, capsys):
    torch.manual_seed(0)
    task = SaliencyPrediction(SaliencyNet(4))
    adam = torch.optim.Adam(task.parameters(), 2e-2)
    for step in range(16):
        loss = task.losses(batch(step, 1), 0.0)["bce"]
        loss.backward()
        adam.step()
        adam.zero_grad()
    model = SaliencyModel(task.network, Preprocessing(spacing=(1.0, 1.0, 2.0)), (32, 16, 16), ("gaze",))
    unseen = batch(1000, 1)
    image, truth = unseen.images[0, 0].numpy(), unseen.saliency[0, 0].numpy()
    found = model.saliency(image, -0.5, CPU)
    assert (found.min(), found.max()) == (0.0, 1.0) and np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.6

    model.save(tmp_path / "saliency.safetensors", {"steps": 40})
    again = load_saliency_model(tmp_path)
    assert (again.block, again.taught_by, again.preprocessing) == ((32, 16, 16), ("gaze",), model.preprocessing)
    assert np.array_equal(again.saliency(image, -0.5, CPU), found)
    assert capsys.readouterr().out == ""  # a command's standard output holds its result alone


def test_a_file_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataFault, match="no saliency model there; give a finished run"):
        load_saliency_model(tmp_path)
    (tmp_path / "saliency.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(DataFault, match="not readable as safetensors"):
        load_saliency_model(tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"format": "another"})
    with pytest.raises(DataFault, match="format 'another'; a spade3d-saliency-1"):
        load_saliency_model(tmp_path / "other.safetensors")


@pytest.mark.parametrize("shape", [(40, 24, 16), (10, 33, 17)])
def test_blocks_over_a_scan_give_the_map_of_the_scan(shape):
    scan = np.random.default_rng(0).random(shape)
    found = over_scan(lambda crops: 2 * crops, scan, (16, 16, 16), CPU, fill=0.0)
    assert found.shape == shape and found.dtype == np.float32
    assert np.allclose(found, 2 * scan, atol=1e-5)
