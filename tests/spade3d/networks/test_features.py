"""Reading a feature map at places of the crop: on a ramp, where every value is its own place."""

import pytest
import torch

from spade3d.networks.features import cell_size, read_at


def ramp(input_shape, size: int, crops: int = 1):
    """A map whose channels are the centre (i, j, k), in voxels of the crop, of each cell of `size` voxels."""
    axes = [torch.arange(-(-whole // size)) * float(size) + (size - 1) / 2 for whole in input_shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.stack([places + 1000 * crop for crop in range(crops)]), [(axis[0], axis[-1]) for axis in axes]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("input_shape", [(32, 32, 32), (35, 50, 36)])
def test_a_point_reads_its_own_place(input_shape, size):
    feature_map, ends = ramp(input_shape, size, crops=3)
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 3, generator=generator) * torch.tensor(input_shape) - 0.5
    crop = torch.randint(3, (200,), generator=generator)
    wanted = torch.stack([points[:, axis].clamp(*ends[axis]) for axis in range(3)], dim=1) + 1000 * crop[:, None]
    torch.testing.assert_close(read_at(feature_map, points, crop, input_shape), wanted, atol=1e-3, rtol=0)


def test_by_hand():
    # Cells of 4 voxels have centres at 1.5 and 5.5; voxel 2 lies an eighth of the way, voxel 0 beyond the first centre.
    feature_map = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1, 1)
    points = torch.tensor([[1.5, 0, 0], [5.5, 3, 3], [2.0, 1, 2], [0, 0, 0], [7, 0, 0]])
    read = read_at(feature_map, points, torch.zeros(5, dtype=torch.long), (8, 4, 4))
    torch.testing.assert_close(read[:, 0], torch.tensor([10.0, 20.0, 11.25, 10.0, 20.0]))


def test_equals_grid_sample_where_the_crop_is_a_multiple():
    generator = torch.Generator().manual_seed(1)
    feature_map = torch.randn(1, 5, 4, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    points = torch.rand(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([16, 24, 12]) - 0.5
    unit = 2 * (points + 0.5) / torch.tensor([16, 24, 12]) - 1
    sampled = torch.nn.functional.grid_sample(
        feature_map, unit.flip(-1)[None, :, None, None], padding_mode="border", align_corners=False
    )[0, :, :, 0, 0].T
    read = read_at(feature_map, points, torch.zeros(50, dtype=torch.long), (16, 24, 12))
    torch.testing.assert_close(read, sampled)
    weights = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad((sampled * weights).sum(), feature_map)
    (gradient,) = torch.autograd.grad((read * weights).sum(), feature_map)
    torch.testing.assert_close(gradient, expected)


def test_no_points_read_nothing():
    read = read_at(torch.zeros(1, 3, 2, 2, 2), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), (4, 4, 4))
    assert read.shape == (0, 3)


@pytest.mark.parametrize(("size", "cells", "wanted"), [(35, 18, 2), (35, 9, 4), (35, 5, 8), (35, 2, 32), (36, 36, 1)])
def test_cell_size(size, cells, wanted):
    assert cell_size(size, cells) == wanted


def test_a_map_of_another_crop_is_refused():
    with pytest.raises(ValueError, match="7 cells are not 32 voxels halved"):
        cell_size(32, 7)


def test_numbers_go_to_the_device_once(torch_calls):
    """A GPU is waited for each time; those of a look without gradients must serve a step with them."""
    feature_map = torch.randn(2, 3, 7, 5, 3, requires_grad=True)
    points, crop = torch.rand(9, 3) * 20, torch.zeros(9, dtype=torch.long)
    with torch.inference_mode():
        first = read_at(feature_map, points, crop, (28, 20, 12))
    with torch_calls() as watch:
        again = read_at(feature_map, points, crop, (28, 20, 12))
    again.sum().backward()
    assert watch.calls and not any(
        asked is torch.ops.aten.lift_fresh.default for asked, _ in watch.calls
    )  # from numbers of Python
    assert torch.equal(first, again.detach()) and feature_map.grad.isfinite().all()
