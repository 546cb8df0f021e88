"""What a network saw: its feature maps, and how to read them at places of the crop."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CELLS = (16, 8, 4, 2, 1)  # voxels along a cell of the decoded maps, in their order


@dataclass(frozen=True, eq=False)
class Features:
    """Feature maps of a batch of crops, channels first.

    stages   the patch embedding (cells of 2 voxels) and the four stages (4, 8, 16, 32 voxels)
    decoded  the decoder's maps, coarse to fine (CELLS), as far as they were asked for
    """

    stages: tuple[Float[Tensor, "b _ _ _ _"], ...]
    decoded: tuple[Float[Tensor, "b _ _ _ _"], ...] = ()


def read_at(
    feature_map: Float[Tensor, "b c _ _ _"],
    points: Float[Tensor, "n 3"],
    crop_index: Int[Tensor, " n"],
    input_shape: tuple[int, int, int],
) -> Float[Tensor, "n c"]:
    """The feature of each point of the crops, trilinear between the centres of cells, the border's value beyond them.

    points are in voxels of the input crop, voxel centres at integers; crop_index says which crop of the batch each is
    in. A cell of s voxels has its centre at s * cell + (s - 1) / 2, also where the crop is no multiple of s.
    The gradient is added up in a fixed order.
    """
    grid = tuple(feature_map.shape[2:])
    stride, last = _cells_along(grid, tuple(input_shape), points.device, points.dtype)
    place = ((points + 0.5) / stride - 0.5).clamp(min=torch.zeros_like(last), max=last)
    low = place.floor()
    high = torch.minimum(low + 1, last)
    far = place - low

    # The eight corners of each point: their rows in the map as a table of cells, and their weights.
    corner = torch.cartesian_prod(*[torch.arange(2, device=points.device)] * 3).bool()
    cell = torch.where(corner, high[:, None], low[:, None]).long()
    weight = torch.where(corner, far[:, None], 1 - far[:, None]).prod(dim=-1)
    row = ((crop_index.long()[:, None] * grid[0] + cell[..., 0]) * grid[1] + cell[..., 1]) * grid[2] + cell[..., 2]
    table = feature_map.permute(0, 2, 3, 4, 1).flatten(0, 3)
    return F.embedding_bag(row, table, per_sample_weights=weight.to(table.dtype), mode="sum")


@lru_cache(maxsize=64)
def _cells_along(
    grid: tuple[int, int, int], input_shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """Voxels of a cell and the last cell along each axis. Kept: a GPU is waited for when such numbers go there."""
    with torch.inference_mode(False):  # those of a validation step must serve a training step, too
        sizes = [cell_size(size, cells) for size, cells in zip(input_shape, grid, strict=True)]
        return tuple(torch.tensor(n, device=device, dtype=dtype) for n in (sizes, [cells - 1 for cells in grid]))


def cell_size(size: int, cells: int) -> int:
    """Voxels along one axis of a cell, from the voxels of the crop and the cells of a map that was halved upwards."""
    if cells == 1:  # whatever its size, its value holds everywhere
        return size
    stride = 1
    while -(-size // stride) > cells:
        stride *= 2
    if -(-size // stride) != cells:
        raise ValueError(f"{cells} cells are not {size} voxels halved some times; give the shape of the crop itself")
    return stride
