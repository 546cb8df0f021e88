"""Attention of an encoder as saliency: the cell that all look at stands out, and nothing lies below the average."""

import numpy as np
import pytest
import torch

from spade3d.faults import DataFault
from spade3d.networks.attention_saliency import above_average, attention_map, block_of
from spade3d.networks.foreign import read_encoder, save_encoder
from spade3d.networks.swin_unetr import SwinUNETR

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, SwinUNETR(feature_size=12, window=3))
    return path


def test_the_encoder_of_a_checkpoint_is_found_and_asked_by_its_own_window(checkpoint):
    encoder = read_encoder(checkpoint)
    assert block_of(encoder) == (24, 24, 24) and not encoder.training
    with pytest.raises(DataFault, match="no such checkpoint"):
        read_encoder(checkpoint.with_name("none.safetensors"))


def test_it_is_the_mean_attention_received_above_the_average(checkpoint):
    encoder = read_encoder(checkpoint)
    crops = torch.randn(2, 1, 24, 24, 24, generator=torch.Generator().manual_seed(1))
    maps = encoder.attention_maps(crops, 3)
    weights = torch.stack([one.weights[:, 0].mean(dim=1) for one in maps]).mean(dim=0)  # (crop, looks, is seen)
    twin = (weights.mean(dim=1) * weights.shape[-1] - 1).clamp_min(0)
    found = above_average(encoder, crops)
    assert found.shape == crops.shape and (found >= 0).all()
    # At the centre of a cell of 8 voxels, between voxels 3 and 4, lies the cell's own value.
    order = maps[0].cells[0].argsort()
    centres = found[0, 0, 3::8, 3::8, 3::8] + found[0, 0, 4::8, 4::8, 4::8]
    assert torch.allclose(centres.flatten() / 2, twin[0, order], atol=0.35 * float(twin.max()))
    assert int(centres.argmax()) == int(twin[0, order].argmax())


def test_the_map_of_a_scan_lies_between_zero_and_one(checkpoint):
    scan = np.random.default_rng(0).random((30, 20, 40)).astype(np.float32)
    found = attention_map(read_encoder(checkpoint), scan, 0.0, CPU)
    assert found.shape == scan.shape and found.dtype == np.float32
    assert found.min() == 0.0 and found.max() == 1.0 and 0 < (found == 1).mean() < 0.02
