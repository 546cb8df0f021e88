"""From cells back to voxels: what restores an image from a coarse map."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from spade3d.faults import UsageFault


class VoxelHead(nn.Module):
    """A map of cells -> the voxels of each: one linear layer for every cell, shuffled into place.

    inputs    channels of the map
    cell      voxels along each axis of a cell
    channels  of the image
    """

    def __init__(self, inputs: int, *, cell: int, channels: int = 1):
        super().__init__()
        self.cell, self.channels = cell, channels
        self.linear = nn.Linear(inputs, channels * self.cell**3)

    def forward(
        self, cells: Float[Tensor, "b inputs p q r"], size: tuple[int, int, int]
    ) -> Float[Tensor, "b channels i j k"]:
        """The crop of `size` voxels; cells over its far end are cut off. UsageFault for the cells of another stage."""
        grid = tuple(cells.shape[2:])
        if grid != (needed := tuple(-(-side // self.cell) for side in size)):
            raise UsageFault(
                f"cells {grid} of {self.cell} voxels do not make a crop of {size}, which needs {needed}; "
                "give the map that the head was made for, and the size of its crop"
            )
        voxels = self.linear(rearrange(cells, "b c p q r -> b p q r c"))
        s = self.cell
        voxels = rearrange(voxels, "b p q r (c x y z) -> b c (p x) (q y) (r z)", x=s, y=s, z=s)
        i, j, k = size
        return voxels[:, :, :i, :j, :k]
