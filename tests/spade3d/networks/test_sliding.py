"""A volume predicted window by window: MONAI's numbers, no seams, no gradients."""

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from spade3d.networks.sliding import importance, slab_axis, slabs, sliding_window, window_starts, windows_at_once


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return torch.nn.Conv3d(1, 3, 3, padding=1)


@pytest.mark.parametrize(
    ("shape", "window", "overlap", "batch"),
    [
        ((20, 33, 27), (16, 16, 16), 0.5, 2),
        ((40, 17, 16), (16, 17, 16), 0.25, 4),  # no multiple of the stride; windows that are not cubes
        ((41, 12, 15), (8, 12, 10), 0.7, 3),  # overlap above one half: layers that reach over several others
        ((15, 40, 12), (16, 8, 12), 0.0, 5),
        ((9, 33, 7), (16, 12, 10), 0.5, 3),  # smaller than the window on two axes, by odd and even differences
        ((5, 4, 3), (8, 8, 8), 0.5, 1),  # smaller on all three
        ((1, 9, 30), (4, 4, 8), 0.5, 2),
    ],
)
def test_agrees_with_monai(network, shape, window, overlap, batch):
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = sliding_window_inference(image[None, None], window, batch, network, overlap=overlap, mode="gaussian")
    ours = sliding_window(network, image, window, overlap, batch, classes=3)
    assert ours.dtype == torch.float32 and ours.shape == (3, *shape)
    torch.testing.assert_close(ours, theirs[0], atol=1e-4, rtol=0)


def test_a_voxelwise_network_leaves_no_seam():
    image = np.random.default_rng(0).normal(size=(23, 19, 30)).astype(np.float32)
    blended = sliding_window(lambda crops: torch.cat([crops, 2 * crops], dim=1), image, (8, 10, 12), classes=2)
    np.testing.assert_allclose(blended[0], image, atol=1e-5)
    np.testing.assert_allclose(blended[1], 2 * image, atol=1e-5)


def test_seams_are_weighted_by_the_gaussian():
    """Two windows of 4 on 6 voxels, the first saying 0 and the second 1: each voxel is the share of the second."""
    said = iter([0.0, 1.0])
    blended = sliding_window(
        lambda crops: torch.full_like(crops, next(said)), torch.zeros(6, 1, 1), (4, 1, 1), 0.5, 1, classes=1
    )
    one = np.maximum(np.exp(-((np.arange(4) - 1.5) ** 2) / (2 * 0.5**2)), 1e-3)
    expected = [0, 0, one[0] / (one[0] + one[2]), one[1] / (one[1] + one[3]), 1, 1]
    np.testing.assert_allclose(blended.flatten(), expected, atol=1e-6)


def test_batches_change_nothing_and_predict_sees_inference_mode(network):
    image = torch.randn(20, 20, 20, generator=torch.Generator().manual_seed(2))
    seen = []

    def predict(crops):
        seen.append(len(crops))
        assert torch.is_inference_mode_enabled()
        return network(crops)

    one = sliding_window(predict, image, (12, 12, 12), batch=1, classes=3)
    assert max(seen) == 1
    seen.clear()
    torch.testing.assert_close(one, sliding_window(predict, image, (12, 12, 12), batch=3, classes=3))
    assert max(seen) == 3
    seen.clear()
    sliding_window(predict, image, (12, 12, 12), batch=8, classes=3)  # nine windows a layer: not 8 and 1
    assert sorted(set(seen)) == [4, 5] and len(seen) == 6
    # What comes out is an ordinary tensor, not one that later code may not touch.
    assert not one.requires_grad and not one.is_inference()
    one += 1


def test_a_cpu_takes_small_windows_several_at_once(network):
    assert {side: windows_at_once((side,) * 3, "cpu") for side in (16, 24, 32, 48, 96)} == {
        16: 16,
        24: 4,
        32: 2,
        48: 1,
        96: 1,
    }
    assert windows_at_once((96, 96, 96), "cuda") == 4


@pytest.mark.parametrize(("shape", "axis"), [((40, 20, 20), 0), ((20, 41, 20), 1), ((20, 20, 39), 2), ((5, 4, 3), 0)])
def test_slabs_follow_each_other_where_the_scan_is_longest(network, shape, axis):
    image = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    whole, window, next_plane = sliding_window(network, image, (12, 12, 12), classes=3), (12, 12, 12), 0
    assert slab_axis(shape, window) == axis
    for start, slab in slabs(network, image, window, classes=3):
        assert start == next_plane
        thickness = slab.shape[1 + axis]
        torch.testing.assert_close(slab, whole.narrow(1 + axis, start, thickness), rtol=0, atol=0)
        next_plane += thickness
    assert next_plane == shape[axis]


def test_half_precision_logits_are_blended_in_float32(network):
    image = torch.randn(10, 10, 10, generator=torch.Generator().manual_seed(3))
    exact = sliding_window(network, image, (8, 8, 8), classes=3)
    rough = sliding_window(lambda crops: network(crops).bfloat16(), image, (8, 8, 8), classes=3)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0.02)


def test_padding_takes_the_fill():
    """A stub that answers the sum of its window sees 8 * 8 * 8 - 2 * 2 * 2 voxels of padding."""
    total = sliding_window(
        lambda crops: crops.sum(dim=(1, 2, 3, 4), keepdim=True).expand(-1, 1, 8, 8, 8),
        torch.zeros(2, 2, 2),
        (8, 8, 8),
        classes=1,
        fill=-1.0,
    )
    torch.testing.assert_close(total, torch.full((1, 2, 2, 2), 8.0 - 512.0))


@pytest.mark.parametrize(
    ("size", "window", "overlap", "starts"),
    [
        (10, 4, 0.5, [0, 2, 4, 6]),
        (11, 4, 0.5, [0, 2, 4, 6, 7]),
        (4, 4, 0.5, [0]),
        (3, 4, 0.5, [0]),
        (3, 1, 0.9, [0, 1, 2]),
    ],
)
def test_windows_start_every_stride_and_end_flush(size, window, overlap, starts):
    assert window_starts(size, window, overlap) == starts


def test_importance_is_the_floored_gaussian():
    weight = importance((5, 4, 3))
    assert weight.shape == (5, 4, 3)
    assert weight.min() == pytest.approx(1e-3)
    assert weight[2, 1, 1].item() == pytest.approx(np.exp(-(0.5**2) / (2 * 0.5**2)))
    assert importance((1, 1, 1)).item() == 1


def test_what_cannot_be_done_is_said(network):
    with pytest.raises(ValueError, match="overlap from 0 to below 1"):
        sliding_window(network, torch.zeros(4, 4, 4), (4, 4, 4), 1.0, classes=3)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4, 4\) is needed"):
        sliding_window(network, torch.zeros(4, 4, 4), (4, 4, 4), classes=2)
