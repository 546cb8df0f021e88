"""What a mask leaves visible of a batch of token grids: which cells, which of them look at each other, which merge.

Rows: the visible cells of a batch lie in one matrix, sample after sample. Each level of the encoder (a grid of cells,
half as fine as the one before) has its own; a cell is visible where any of its tokens is.

Neighbourhoods: the cells that look at each other, that is a window, or one side of a window that the roll of a shifted
grid filled from both ends (see spade3d.networks.windows): within one nothing is left to be masked. Those with no
visible cell vanish; the others are sorted by how many they have, so that nearly equal ones are computed as one batch.

What it gains is said in spade3d.networks.packed, which computes by it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from spade3d.faults import UsageFault
from spade3d.networks.windows import Cells, clip_window
from spade3d.training.copies import sent


@dataclass(frozen=True)
class Cutting:
    """Which neighbourhoods are computed together.

    scores        scores (neighbourhoods x n x n) of a tile at most, if it has more than one neighbourhood
    least_filled  and its smallest neighbourhood has at least this share of the slots of its largest
    """

    scores: int
    least_filled: float


# The kernels take neighbourhoods one by one: only empty slots cost there.
CPU = Cutting(scores=2**17, least_filled=0.9)
# Wants few large launches instead.
ACCELERATOR = Cutting(scores=2**24, least_filled=0.5)


def cutting(device: torch.device) -> Cutting:
    return CPU if device.type == "cpu" else ACCELERATOR


@dataclass(frozen=True)
class Tile:
    """Slots that are computed together: `neighbourhoods` of `n` slots each, from slot `start` on."""

    start: int
    neighbourhoods: int
    n: int

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + self.neighbourhoods * self.n)


@dataclass(frozen=True, eq=False)
class Packing:
    """How the visible rows of one level fall into neighbourhoods, for one window and shift.

    A slot is a place in a neighbourhood: its visible cells, then the padding (one slot for all of it) if it has any,
    then empty ones up to the largest neighbourhood of its tile.

    window   as clipped
    tiles    the largest neighbourhoods first; together they hold every slot
    slots    the slot of each row
    looks    the place of each slot in its window, as one that looks; 0 where it holds no row
    seen     and as one that is seen: n (the places of a window) where it is empty, n + 1 + kind where it is padding
    padding  the places that are padding, for each kind of neighbourhood that has some
    padded   the places that are padding in any
    """

    window: Cells
    tiles: tuple[Tile, ...]
    slots: Int[Tensor, " row"]
    looks: Int[Tensor, " slot"]
    seen: Int[Tensor, " slot"]
    padding: Bool[Tensor, "kind n"]
    padded: Int[Tensor, " padded"]

    def lay(self, rows: Float[Tensor, "row c"]) -> Float[Tensor, "slot c"]:
        """Rows into their slots, zeros (which is what padding is) into the others."""
        return rows.new_zeros(len(self.looks), rows.shape[1]).index_copy(0, self.slots, rows)

    def lift(self, slots: Float[Tensor, "slot c"]) -> Float[Tensor, "row c"]:
        """The opposite of `lay`."""
        return _Lift.apply(slots, self.slots)


@dataclass(frozen=True, eq=False)
class Level:
    """The visible cells of one grid, for every sample of a batch.

    grid, samples  cells along i, j, k; grids
    cells          the cell of each row, counted through all grids of the batch
    parents        where each row goes when merged: 8 x its parent's row in the next level + its place among the corners
    parent_rows    rows of the next level; 0 where there is none
    packings       for a window and shift, as `clip_window` gives them
    """

    grid: Cells
    samples: int
    cells: Int[Tensor, " row"]
    parents: Int[Tensor, " row"] | None
    parent_rows: int
    packings: dict[tuple[Cells, Cells], Packing]

    def packing(self, window: Cells, shift: Cells) -> Packing:
        return self.packings[clip_window(self.grid, window, shift)]

    def samples_of_rows(self) -> Int[Tensor, " row"]:
        return self.cells // prod(self.grid)

    def pick(self, grids: Float[Tensor, "b i j k c"]) -> Float[Tensor, "row c"]:
        """The visible cells' vectors."""
        return grids.flatten(0, 3).index_select(0, self.cells)

    def spread(self, rows: Float[Tensor, "row c"]) -> Float[Tensor, "b i j k c"]:
        """Back on the grids, zero where nothing is visible."""
        empty = rows.new_zeros(self.samples * prod(self.grid), rows.shape[1])
        return empty.index_copy(0, self.cells, rows).view(self.samples, *self.grid, -1)

    def merge(self, rows: Float[Tensor, "row c"]) -> Float[Tensor, "parent 8*c"]:
        """Side by side, the corners of each 2^3 block that has a visible one; zeros for those hidden or outside."""
        empty = rows.new_zeros(8 * self.parent_rows, rows.shape[1])
        return empty.index_copy(0, self.parents, rows).view(self.parent_rows, -1)


def levels(
    visible: Bool[Tensor, "b i j k"], attention: Sequence[Sequence[tuple[Cells, Cells]]], corners: Sequence[Cells]
) -> list[Level]:
    """The grid of `visible` and those that merging makes of it; one more than there are stages of attention.

    attention  for each level but the last, the windows and shifts that its blocks use
    corners    of a 2^3 block, (i, j, k), in the order in which a merging joins them

    Any mask will do. Its sizes are read back from an accelerator once, for all levels together.
    """
    device, masks = visible.device, [visible]
    for _ in attention:
        masks.append(_halved(masks[-1]))
    keys = [
        (level, *setting)
        for level, settings in enumerate(attention)
        for setting in sorted({clip_window(tuple(masks[level].shape[1:]), *setting) for setting in settings})
    ]
    layouts = [_layout(tuple(masks[level].shape[1:]), window, shift, device) for level, window, shift in keys]
    filled = [_filled(masks[level], layout) for (level, *_), layout in zip(keys, layouts, strict=True)]
    counts = [mask.sum()[None] for mask in masks] + [slots for slots, _ in filled]
    rows, slots = _read_back(counts, len(masks))
    if rows[0] == 0:
        raise UsageFault("every token of every sample is hidden: nothing is left to look at; hide fewer")

    row_of = [mask.flatten().cumsum(0) - 1 for mask in masks]
    cells = [torch.nonzero_static(mask.flatten(), size=count)[:, 0] for mask, count in zip(masks, rows, strict=True)]
    packings = [{} for _ in masks]
    for (level, *setting), layout, known, (_, largest) in zip(keys, layouts, slots, filled, strict=True):
        packings[level][tuple(setting)] = _pack(masks[level], row_of[level], rows[level], layout, known, largest)
    place = _corner_places(tuple(corners), device)
    parents = [
        _parents(cells[level], mask, masks[level + 1], row_of[level + 1], place)
        for level, mask in enumerate(masks[:-1])
    ]
    return [
        Level(tuple(mask.shape[1:]), len(mask), *of)
        for mask, *of in zip(masks, cells, [*parents, None], [*rows[1:], 0], packings, strict=True)
    ]


def _read_back(counts: list[Tensor], masks: int) -> tuple[list[int], list[list[int]]]:
    """The rows of each mask and the slots of each neighbourhood of each layout, in one transfer."""
    lengths = [len(count) for count in counts]
    flat = iter(torch.cat(counts).tolist())
    read = [[next(flat) for _ in range(length)] for length in lengths]
    return [count for (count,) in read[:masks]], read[masks:]


def _halved(visible: Bool[Tensor, "b i j k"]) -> Bool[Tensor, "b p q r"]:
    """Whether any of 2^3 cells is visible."""
    i, j, k = (size % 2 for size in visible.shape[1:])
    blocks = F.pad(visible, (0, k, 0, j, 0, i)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return blocks.any(dim=6).any(dim=4).any(dim=2)


def _parents(cells: Tensor, mask: Tensor, coarse: Tensor, row_of: Tensor, place: Tensor) -> Int[Tensor, " row"]:
    """See Level; `place` as `_corner_places` gives it."""
    _, rows, columns, layers = mask.shape
    k, j, i = cells % layers, cells // layers % columns, cells // (layers * columns) % rows
    sample = cells // (rows * columns * layers)
    p, q, r = coarse.shape[1:]
    parent = ((sample * p + i // 2) * q + j // 2) * r + k // 2
    return row_of[parent] * 8 + place[i % 2 * 4 + j % 2 * 2 + k % 2]


@lru_cache(maxsize=64)
def _corner_places(corners: tuple[Cells, ...], device: torch.device) -> Int[Tensor, "8"]:
    """The place of corner 4 i + 2 j + k among some corners. Kept: a GPU is waited for when such numbers go there."""
    with torch.inference_mode(False):  # those of a validation step must serve a training step, too
        return torch.tensor([corners.index(corner) for corner in product((0, 1), repeat=3)], device=device)


@dataclass(frozen=True, eq=False)
class _Layout:
    """How one grid falls into neighbourhoods, whatever is visible.

    window   as clipped
    order    the cells, neighbourhood by neighbourhood
    place    for each of `order`, its place within the window
    home     for each cell of the grid, its neighbourhood
    kind     for each neighbourhood, its kind of padding; -1 where it has none
    padding  the places that are padding, for each kind
    padded   the places that are padding in any
    """

    window: Cells
    order: Int[Tensor, " cell"]
    place: Int[Tensor, " cell"]
    home: Int[Tensor, " cell"]
    kind: Int[Tensor, " neighbourhood"]
    padding: Bool[Tensor, "kind n"]
    padded: Int[Tensor, " padded"]


@lru_cache(maxsize=64)
def _layout(grid: Cells, window: Cells, shift: Cells, device: torch.device) -> _Layout:
    # A layout made first in a validation step must still serve the backward of a training step.
    with torch.inference_mode(False):
        cell, real, home, place = _places(grid, window, shift)
        padding = torch.zeros(int(home.max()) + 1, prod(window), dtype=torch.bool)
        padding[home[~real], place[~real]] = True
        kinds, kind = padding.unique(dim=0, return_inverse=True)
        none = int(not kinds[0].any())  # sorted: if any neighbourhood has no padding, that is the first kind
        cell, home, place = cell[real], home[real], place[real]
        order = home.argsort(stable=True)
        parts = (
            cell[order],
            place[order],
            torch.empty_like(cell).index_copy_(0, cell, home),
            kind - none,
            kinds[none:],
            padding.any(dim=0).nonzero()[:, 0],
        )
        return _Layout(window, *(part.to(device) for part in parts))


def _places(grid: Cells, window: Cells, shift: Cells) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each place of the padded and rolled grid: its cell, whether it is one, its neighbourhood, its place there."""
    axes = []
    for size, side, by in zip(grid, window, shift):
        whole = -(-size // side) * side
        at = torch.arange(whole)
        wrapped = at >= whole - by if by else torch.zeros_like(at, dtype=torch.bool)
        axes.append(((at + by) % whole, at // side * 2 + wrapped, at % side))
    cells, homes, places = (torch.meshgrid(*along, indexing="ij") for along in zip(*axes))
    real = torch.stack([cell < size for cell, size in zip(cells, grid)]).all(dim=0)
    _, home = torch.stack(homes).flatten(1).unique(dim=1, return_inverse=True)
    return _ravel(cells, grid), real.flatten(), home, _ravel(places, window)


def _ravel(indices: Sequence[Tensor], shape: Cells) -> Int[Tensor, " place"]:
    i, j, k = indices
    return ((i * shape[1] + j) * shape[2] + k).flatten()


def _filled(visible: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    """How many slots each neighbourhood of each sample fills, most first, and which neighbourhood that is."""
    slots = torch.zeros(len(visible), len(layout.kind), dtype=torch.long, device=visible.device)
    slots.index_add_(1, layout.home, visible.flatten(1).long())
    slots += (slots > 0) & (layout.kind >= 0)
    return slots.flatten().sort(descending=True, stable=True)


def _pack(visible: Tensor, row_of: Tensor, rows: int, layout: _Layout, filled: list[int], largest: Tensor) -> Packing:
    """`filled` and `largest` as `_filled` gives them; neighbourhoods are counted through all samples."""
    cells, homes, n, device = len(layout.home), len(layout.kind), layout.padding.shape[1], visible.device
    filled = [count for count in filled if count > 0]
    largest = largest[: len(filled)]
    tiles = tuple(_tiles(filled, cutting(device)))
    starts = [tile.start + at * tile.n for tile in tiles for at in range(tile.neighbourhoods)]
    starts, filled = sent(torch.tensor([starts, filled]), device)
    start_of = torch.zeros(homes * len(visible), dtype=torch.long, device=device).index_copy_(0, largest, starts)

    found = torch.nonzero_static(visible.flatten(1)[:, layout.order].flatten(), size=rows)[:, 0]
    sample, at = found // cells, found % cells
    cell, place = layout.order[at], layout.place[at]
    home = sample * homes + layout.home[cell]
    # Rows of one neighbourhood lie side by side in `found`, each one slot after the one before.
    begins = F.pad(home[1:] != home[:-1], (1, 0), value=True)
    step = torch.arange(rows, device=device)
    slot = start_of[home] + step - torch.where(begins, step, 0).cummax(dim=0).values

    looks = torch.zeros(tiles[-1].slots.stop, dtype=torch.long, device=device).index_copy_(0, slot, place)
    seen = torch.full_like(looks, n).index_copy_(0, slot, place)
    kind, last = layout.kind[largest % homes], starts + filled - 1
    seen.index_copy_(0, last, torch.where(kind >= 0, n + 1 + kind, seen[last]))
    slots = torch.empty_like(slot).index_copy_(0, row_of[sample * cells + cell], slot)
    return Packing(layout.window, tiles, slots, looks, seen, layout.padding, layout.padded)


def _tiles(filled: list[int], by: Cutting) -> Iterator[Tile]:
    """Cut neighbourhoods that fill so many slots, most first, into tiles."""
    first = start = 0
    while first < len(filled):
        n, after = filled[first], first + 1
        end = min(len(filled), first + by.scores // n**2)
        while after < end and filled[after] >= by.least_filled * n:
            after += 1
        yield Tile(start, after - first, n)
        start += (after - first) * n
        first = after


class _Lift(torch.autograd.Function):
    """`slots[index]`, of an index without repetitions: torch's own backward adds gradients up, this one copies them."""

    @staticmethod
    def forward(ctx, slots: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.slots = len(slots)
        return slots.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.slots, grad.shape[1]).index_copy_(0, index, grad), None
