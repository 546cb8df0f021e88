"""Our Swin-UNETR and MONAI's: the same names, the same numbers, the same gradients, in both directions."""

import warnings

import pytest
import torch

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


@pytest.mark.parametrize("use_v2", [False, True])
@pytest.mark.parametrize("merging", ["v1", "v2"])
def test_stages_and_logits_equal_monais(monai_nets, use_v2, merging):
    ours, theirs = twins(monai_nets, 0, use_v2=use_v2, merging=merging)
    x = torch.randn(2, 1, 64, 32, 64)
    with torch.no_grad():
        features = ours(x)
        for ours_, theirs_ in zip(features.stages, theirs.swinViT(x), strict=True):
            torch.testing.assert_close(ours_, theirs_, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.logits(features), theirs(x), atol=1e-4, rtol=0)


def test_clipped_and_padded_windows_equal_monais_at_96(monai_nets):
    # Grids of 48, 24, 12 and 6 cells: the first three padded to multiples of 7, the last clipped to 6.
    ours, theirs = twins(monai_nets, 1)
    x = torch.randn(1, 1, 96, 96, 96)
    with torch.no_grad():
        for ours_, theirs_ in zip(ours(x, decode=False).stages, theirs.swinViT(x), strict=True):
            torch.testing.assert_close(ours_, theirs_, atol=1e-4, rtol=0)


def test_only_a_clipped_window_tells_the_correct_index_from_monais(monai_nets):
    x = torch.randn(1, 1, 64, 64, 64)
    for window, equal in ((4, True), (7, False)):  # 64^3 gives 4^3 cells at stage 4
        compatible, _ = twins(monai_nets, 2, window=window)
        correct = SwinUNETR(1, 3, feature_size=12, window=window)
        correct.load_state_dict(compatible.state_dict())
        with torch.no_grad():
            a, b = compatible(x, decode=False).stages[-1], correct(x, decode=False).stages[-1]
        assert torch.equal(a, b) == equal


@pytest.mark.parametrize("settings", [{}, {"use_v2": True, "merging": "v2"}], ids=["v1", "v2"])
def test_every_gradient_equals_monais(monai_nets, settings):
    # In double precision: a convolution before a norm has gradients that nearly cancel in single.
    ours, theirs = (network.double() for network in twins(monai_nets, 3, **settings))
    x = torch.randn(1, 1, 32, 64, 32, dtype=torch.float64)
    towards = torch.randn(1, 3, 32, 64, 32, dtype=torch.float64)
    (ours.logits(ours(x)) * towards).sum().backward()
    (theirs(x) * towards).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-8, rtol=1e-6, msg=name)


def test_single_precision_encoder_gradients_equal_monais(monai_nets):
    ours, theirs = twins(monai_nets, 4)
    x = torch.randn(1, 1, 48, 48, 48)  # MONAI's encoder alone takes it; its decoder would not
    for network in (ours, theirs):
        sum(stage.square().mean() * (1 + n) for n, stage in enumerate(network.swinViT(x, normalize=False))).backward()
    expected = dict(theirs.swinViT.named_parameters())
    for name, parameter in ours.swinViT.named_parameters():
        wanted = expected[name].grad
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0, msg=name)
