"""Our Swin-UNETR and MONAI's: the same names, the same numbers, the same gradients, in both directions."""

import importlib
import warnings

import pytest
import torch

from spade3d.networks.convolutions import Up, residual_layer
from spade3d.networks.swin_unetr import SwinUNETR

MERGINGS = {"v1": "merging", "v2": "mergingv2"}


@pytest.fixture(scope="module")
def monai_nets():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("monai.networks.nets")


def twins(monai_nets, seed: int, **settings) -> tuple[SwinUNETR, torch.nn.Module]:
    """Ours and MONAI's with the same weights, loaded strictly in both directions."""
    torch.manual_seed(seed)
    merging = settings.get("merging", "v1")
    ours = SwinUNETR(1, 3, feature_size=12, monai_compatible=True, **settings)
    theirs = monai_nets.SwinUNETR(
        1, 3, feature_size=12, use_v2=settings.get("use_v2", False), downsample=MERGINGS[merging],
        window_size=settings.get("window", 7),
    )  # fmt: skip
    theirs.swinViT.load_state_dict(ours.swinViT.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("settings", [{}, {"use_v2": True, "merging": "v2"}], ids=["v1", "v2"])
def test_stages_and_logits_equal_monais(monai_nets, settings):
    ours, theirs = twins(monai_nets, 0, **settings)
    x = torch.randn(2, 1, 32, 32, 64)
    with torch.no_grad():
        features = ours(x)
        for ours_, theirs_ in zip(features.stages, theirs.swinViT(x), strict=True):
            torch.testing.assert_close(ours_, theirs_, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.logits(features), theirs(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("merging", ["v1", "v2"])
def test_padded_and_clipped_windows_equal_monais_in_values_and_gradients(monai_nets, merging):
    # Grids of 24 and 12 cells are padded to multiples of 7, those of 6 and 3 clip the window.
    ours, theirs = twins(monai_nets, 1, merging=merging)
    x = torch.randn(1, 1, 48, 48, 48)  # MONAI's encoder takes it; its whole network would not
    stages = [network.swinViT(x) for network in (ours, theirs)]
    for ours_, theirs_ in zip(*stages, strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=1e-4, rtol=0)
    weights = [torch.randn_like(stage) for stage in stages[0]]
    for outputs in stages:
        sum((stage * weight).sum() for stage, weight in zip(outputs, weights, strict=True)).backward()
    expected = dict(theirs.swinViT.named_parameters())
    for name, parameter in ours.swinViT.named_parameters():
        wanted = expected[name].grad
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0, msg=name)


def test_only_a_clipped_window_tells_the_correct_index_from_monais(monai_nets):
    x = torch.randn(1, 1, 32, 32, 32)
    for window, equal in ((2, True), (3, False)):  # 32^3 gives 2^3 cells at stage 4
        compatible, _ = twins(monai_nets, 2, window=window)
        correct = SwinUNETR(1, 3, feature_size=12, window=window)
        correct.load_state_dict(compatible.state_dict())
        with torch.no_grad():
            a, b = compatible(x, finest=None).stages[-1], correct(x, finest=None).stages[-1]
        assert torch.equal(a, b) == equal


@pytest.mark.parametrize("settings", [{}, {"use_v2": True, "merging": "v2"}], ids=["v1", "v2"])
def test_every_encoder_gradient_equals_monais(monai_nets, settings):
    # In double precision: a convolution before a norm has gradients that nearly cancel in single.
    ours, theirs = (network.swinViT.double() for network in twins(monai_nets, 3, window=3, **settings))
    x = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        sum(stage.sin().sum() for stage in network(x)).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-8, rtol=1e-6, msg=name)


def test_the_decoders_blocks_equal_monais_in_values_and_gradients(monai_nets):
    blocks = importlib.import_module("monai.networks.blocks")
    settings = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}
    torch.manual_seed(4)
    x, skip = torch.randn(2, 6, 3, 2, 4, dtype=torch.float64), torch.randn(2, 5, 6, 4, 8, dtype=torch.float64)
    for ours, theirs, inputs in (
        (residual_layer(6, 6), blocks.UnetrBasicBlock(in_channels=6, out_channels=6, stride=1, **settings), (x,)),
        (residual_layer(6, 5), blocks.UnetrBasicBlock(in_channels=6, out_channels=5, stride=1, **settings), (x,)),
        (Up(6, 5), blocks.UnetrUpBlock(in_channels=6, out_channels=5, upsample_kernel_size=2, **settings), (x, skip)),
    ):
        theirs.load_state_dict(ours.state_dict(), strict=True)
        outputs = [block.double()(*inputs) for block in (ours, theirs)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.sin().sum().backward()
        expected = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
