"""Layers: every block and stage by name, read where the same place lies in each, and the encoder left as it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dagman.evaluation.crop_features import Probing, stages_of
from dagman.evaluation.layers import BATCHES, all_layers, layer_vectors
from dagman.evaluation.retrieval import draw_crops
from spade3d.networks.swin import SwinTransformer
from spade3d.volumes.preprocessing import Normalisation

HOW = Probing((16, 16, 16), (1.0, 1.0, 1.0), crops=3)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return SwinTransformer(1, 12, depths=(2, 1, 1, 1), heads=(1, 2, 4, 8), window=(2, 2, 2)).eval()


@pytest.fixture(scope="module")
def store(in_memory):
    rng = np.random.default_rng(0)
    images = [1000 * rng.standard_normal((24, 24, 24)) for _ in range(2)]
    return in_memory(images, normalisation=Normalisation(0.0, 0.001, -10.0, 10.0))


def test_layers_come_in_the_order_in_which_an_image_passes(encoder):
    images = torch.randn(2, 1, 16, 16, 16)
    found = all_layers(encoder, images)
    assert list(found) == ["embedding", "1.1", "1.2", "stage 1", "2.1", "stage 2", "3.1", "stage 3", "4.1", "stage 4"]
    for name, stage in zip(("embedding", "stage 1", "stage 2", "stage 3", "stage 4"), encoder(images), strict=True):
        assert torch.equal(found[name], stage)
    tokens = encoder.patch_embed(images)
    first = encoder.get_submodule("layers1.0").blocks[0](tokens)
    assert torch.allclose(found["1.1"], F.layer_norm(first, (12,)).permute(0, 4, 1, 2, 3), atol=1e-6)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_each_layer_is_read_at_the_same_places_of_each_crop(encoder, store):
    crops = [crop for case in (0, 1) for crop in draw_crops(store, case, HOW)]
    found = layer_vectors(encoder, store, crops, HOW)
    assert {name: of.shape for name, of in found.items()}["2.1"] == (BATCHES, 6, 24)
    # The last stage has one cell, the same at every place of a crop; the crops differ.
    last = found["stage 4"]
    assert last == pytest.approx(np.broadcast_to(last[:1], last.shape))
    assert last[0, 2] == pytest.approx(stages_of(encoder, store, crops[2:3], "cpu")[-1].flatten().numpy(), abs=1e-5)
    assert np.ptp(found["embedding"], axis=0).min() > 0
    again = layer_vectors(encoder, store, crops, HOW)
    assert all(np.array_equal(found[name], again[name]) for name in found)
