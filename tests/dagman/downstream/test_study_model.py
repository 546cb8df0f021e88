"""A model of studies: it comes back from its file as it was, and its maps lie where the scan lies."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dagman.downstream.study_model import STUDY, StudyFound, StudyModel, build_head, load_study_model
from dagman.downstream.token_grids import Windows, channels_of
from spade3d.configuration import Network
from spade3d.faults import DataFault
from spade3d.recipes.recipe import build_network
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import Grid, Volume

CPU = torch.device("cpu")
NETWORK = Network(feature_size=12, window=4)
HEADS = {
    "linear": {},
    "attention": {"dim": 16, "places": False},
    "clarity": {"dim": 24, "blocks": 1, "heads": 2, "width": 8},
}


def model(kind: str, *, low: bool = False) -> StudyModel:
    torch.manual_seed(0)
    encoder = build_network(NETWORK, out_channels=1).swinViT.eval()
    head = build_head(kind, channels_of(encoder), 2, HEADS[kind]).eval()
    windows = Windows((16, 32, 16), (8.0,) * 3 if low else (2.0,) * 3, 0.25)
    how = Preprocessing(spacing=(2.0, 2.0, 2.0))
    return StudyModel(encoder, head, NETWORK, kind, HEADS[kind], ("lump", "cyst"), how, windows, low)


def scan() -> Volume:
    voxels = np.random.default_rng(0).integers(-100, 200, (40, 30, 30)).astype(np.int16)
    return Volume(voxels, np.diag([-2.0, 2.0, 3.0, 1.0]), modality="CT")


def test_a_surer_study_is_told_from_a_sure_one():
    told = model("linear")
    told.head.linear.bias.data = torch.tensor([20.0, 30.0])
    assert told.volume(scan(), CPU).probabilities[0] < told.volume(scan(), CPU).probabilities[1] < 1


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_model_comes_back_as_it_was(kind, low, tmp_path):
    before = model(kind, low=low)
    before.save(tmp_path / "model.safetensors")
    after = load_study_model(tmp_path)
    one, other = (each.volume(scan(), CPU) for each in (before, after))
    np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert one.probabilities.shape == (2,) and (one.maps is None) == (not after.has_maps) == (kind == "linear")
    if one.maps is not None:
        np.testing.assert_array_equal(one.maps, other.maps)
        assert one.maps.min() >= 0 and one.on_grid(1, Grid((40, 30, 30), scan().affine)).shape == (40, 30, 30)
    assert (after.findings, after.windows, after.low_resolution) == (before.findings, before.windows, low)
    assert after.preprocessing == before.preprocessing and not after.head.training


def test_a_map_lies_where_its_cells_lie():
    """Of a map that is its own place along R, read back on a scan whose first axis runs to the left."""
    affine = np.diag([16.0, 16.0, 16.0, 1.0])
    affine[:3, 3] = 7.0
    place = 7.0 + 16.0 * np.indices((6, 5, 4), dtype=np.float32)[0]
    found = StudyFound(np.zeros(1), place[None], affine)
    grid = Grid((40, 30, 30), np.array([[-2.0, 0, 0, 80], [0, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
    shown = found.on_grid(0, grid)
    x = 80 - 2.0 * np.arange(40)
    within = (x >= 7) & (x <= 7 + 16 * 5)
    np.testing.assert_allclose(shown[within, 10, 10], x[within], atol=1e-4)
    away = np.diag([2.0, 2.0, 2.0, 1.0])
    away[:3, 3] = 500
    assert (found.on_grid(0, Grid((4, 4, 4), away)) == 0).all()


def test_files_that_are_no_study_model_are_refused(tmp_path):
    with pytest.raises(DataFault, match="no model there"):
        load_study_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(DataFault, match="not readable as safetensors"):
        load_study_model(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "dagman-segmentation-1"})
    with pytest.raises(DataFault, match=f"'dagman-segmentation-1'; a {STUDY.format} of dagman-finetune --task classif"):
        load_study_model(tmp_path)
