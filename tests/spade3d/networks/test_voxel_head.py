"""Cells become their own voxels, whatever the size of the crop."""

import numpy as np
import pytest
import torch

from spade3d.faults import UsageFault
from spade3d.networks.voxel_head import VoxelHead


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("cell", "size"), [(2, (4, 6, 2)), (4, (8, 4, 12)), (4, (7, 4, 9)), (8, (8, 5, 17))])
def test_each_voxel_comes_from_its_cell(cell, size, channels):
    torch.manual_seed(0)
    head = VoxelHead(3, cell=cell, channels=channels)
    features = normal(2, 3, *(-(-side // cell) for side in size))
    with torch.no_grad():
        voxels = head(features, size)
    assert voxels.shape == (2, channels, *size)
    for b, c, i, j, k in np.ndindex(*voxels.shape):
        row = ((c * cell + i % cell) * cell + j % cell) * cell + k % cell
        vector = features[b, :, i // cell, j // cell, k // cell]
        expected = (head.linear.weight[row] @ vector + head.linear.bias[row]).item()
        assert voxels[b, c, i, j, k].item() == pytest.approx(expected, abs=1e-5)


def test_a_cell_of_the_last_stage_becomes_32_voxels():
    head = VoxelHead(768, cell=32)
    assert head.linear.weight.shape == (32**3, 768)
    assert head(normal(1, 768, 1, 2, 1), (32, 40, 20)).shape == (1, 1, 32, 40, 20)


def test_the_gradient_of_the_voxels_is_finite():
    head, features = VoxelHead(3, cell=4), normal(1, 3, 2, 2, 2).requires_grad_()
    head(features, (7, 8, 5)).abs().mean().backward()
    assert features.grad.isfinite().all() and head.linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("size", [(16, 8, 8), (9, 8, 8), (4, 8, 8)])
def test_cells_of_another_stage_are_refused(size):
    with pytest.raises(UsageFault, match=r"cells \(2, 2, 2\) of 4 voxels do not make a crop of .* which needs"):
        VoxelHead(3, cell=4)(normal(1, 3, 2, 2, 2), size)
