"""An encoder is found in the file of a pretraining, of a fine-tuned model and of others, as that file means it."""

import pytest
import torch

from dagman.downstream.model import SEGMENTATION
from dagman.frozen_encoders import said_of, settings_of, trained, untrained
from spade3d.configuration import Network
from spade3d.networks.foreign import SETTINGS, save_encoder
from spade3d.networks.swin_unetr import SwinUNETR

TINY = Network(feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=4, merging="v2")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    said = TINY.model_dump() | {"window": (4, 4, 4)}
    return SwinUNETR(out_channels=3, **{name: said[name] for name in SETTINGS if name in said})


def test_a_fine_tuned_model_is_read_with_its_own_settings(network, tmp_path):
    """Shapes alone would have it clip windows as MONAI does and order corners the other way."""
    said = {"network": TINY.model_dump(mode="json"), "window": [32, 32, 16]}
    said |= {"preprocessing": {"spacing": [2.0, 2.0, 3.0]}}
    SEGMENTATION.write(tmp_path / "model.safetensors", network, said)
    save_encoder(tmp_path / "encoder.safetensors", network)
    model, alone = said_of(tmp_path / "model.safetensors"), said_of(tmp_path / "encoder.safetensors")
    assert settings_of(model) == settings_of(alone) and model["merging"] == "v2" and not model["monai_compatible"]
    assert model["run"]["crop"] == [32, 32, 16] and "provenance" not in model
    image = torch.randn(1, 1, 16, 16, 16)
    for one in ("model.safetensors", "encoder.safetensors"):
        with torch.no_grad():
            assert torch.equal(trained(tmp_path / one)(image)[-1], network.swinViT.eval()(image)[-1]), one


def test_an_untrained_twin_has_the_settings_and_the_weights_of_its_seed(network, tmp_path):
    save_encoder(tmp_path / "encoder.safetensors", network)
    said = said_of(tmp_path / "encoder.safetensors")
    first, again, other = (untrained(said, seed).state_dict() for seed in (0, 0, 1))
    assert first.keys() == network.swinViT.state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
