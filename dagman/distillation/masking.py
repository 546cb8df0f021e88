"""Masking: which cells the student is not shown, decided from the teacher's attention or by chance.

Every rule has one signature, (attention, ratio, hint) -> hidden, and hides `hidden_count` cells of every sample, so
that runs that differ in the rule differ in nothing else. Cells are those of the stage that the attention is from;
`expand` carries them to the tokens of the patch embedding, or to voxels. Of equally attended cells, the earlier one in
the flattened grid counts as more attended, on every device. Chance comes from torch's global generators; all ranks of a
run draw it for the whole batch and keep their own part, so that one process alone would have drawn the same.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade3d.faults import UsageFault
from spade3d.networks.features import cell_size
from spade3d.training import ranks
from spade3d.training.copies import sent

Grid = tuple[int, int, int]
Rule = Callable[[Float[Tensor, "b p q r"], float, float], Bool[Tensor, "b p q r"]]
Box = tuple[slice, slice, slice]

TOP = 0.1  # of all cells: AttMask draws its hints among these
LEAST_BOX = 8  # cells that a box of `block` has at least, while as many are still to be hidden
LONGEST = 1 / 0.3  # of the sides of such a box, one to another (iBOT's range of aspects)


def attention(attention: Float[Tensor, "b p q r"], ratio: float, hint: float) -> Bool[Tensor, "b p q r"]:
    """DAGMaN: the `ratio` of all cells that is most attended, but for the `hint` of all cells at its top (3.1)."""
    hints, selected = _bounds(attention, ratio, hint)
    return _hide(attention, _most_attended_first(attention)[:, hints:selected])


def attmask(attention: Float[Tensor, "b p q r"], ratio: float, hint: float) -> Bool[Tensor, "b p q r"]:
    """AttMask: as `attention`, with as many hints, drawn by chance among the most attended tenth of all cells.

    Kakogeorgiou et al. 2022 show a tenth of what is selected: hint = 0.1 * ratio. At a hint of a tenth of all cells or
    more there is nothing left to choose among, and the rule is `attention`.
    """
    hints, selected = _bounds(attention, ratio, hint)
    order = _most_attended_first(attention)
    pool = min(selected, max(hints, floor_share(TOP, order.shape[1])))
    not_shown = _any_order(len(order), pool, order.device)[:, hints:]
    return _hide(attention, torch.cat([order.gather(1, not_shown), order[:, pool:selected]], dim=1))


def low(attention: Float[Tensor, "b p q r"], ratio: float, hint: float) -> Bool[Tensor, "b p q r"]:
    """MST: the least attended are hidden, as many as by the other rules; there are no hints beyond that."""
    hints, selected = _bounds(attention, ratio, hint)
    order = _most_attended_first(attention)
    return _hide(attention, order[:, order.shape[1] - (selected - hints) :])


def block(attention: Float[Tensor, "b p q r"], ratio: float, hint: float) -> Bool[Tensor, "b p q r"]:
    """iBOT: boxes of chance size and place, one over another, until the count is reached; attention has no say.

    Each box covers a cell still visible; the last is cut off, in the order of the flattened grid, where it is too much.
    """
    hints, selected = _bounds(attention, ratio, hint)
    grid, count = tuple(attention.shape[1:]), selected - hints
    # On the CPU: nothing waits for the device.
    seeds = ranks.own(torch.randint(2**62, (len(attention) * ranks.world(),))).numpy()
    hidden = np.stack([lay(grid, draw_boxes(grid, count, np.random.default_rng(seed)), count) for seed in seeds])
    return sent(torch.from_numpy(hidden), attention.device)


def random(attention: Float[Tensor, "b p q r"], ratio: float, hint: float) -> Bool[Tensor, "b p q r"]:
    """SMIT: any cells; attention has no say."""
    hints, selected = _bounds(attention, ratio, hint)
    samples, cells = attention.flatten(1).shape
    return _hide(attention, _any_order(samples, cells, attention.device)[:, : selected - hints])


RULES: dict[str, Rule] = {"attention": attention, "attmask": attmask, "low": low, "block": block, "random": random}


def hidden_count(cells: int, ratio: float, hint: float) -> int:
    """How many of so many cells a rule hides: floor(ratio n) - floor(hint n)."""
    return floor_share(ratio, cells) - floor_share(hint, cells)


def check_masking(grid: Grid, ratio: float, hint: float) -> None:
    """UsageFault where the shares are none, or where nothing or everything would be hidden on this grid."""
    if not 0 < ratio <= 1:
        raise UsageFault(f"a mask ratio of {ratio} is no share of the cells; give more than 0 and 1 at most")
    if not 0 <= hint < ratio:
        raise UsageFault(
            f"hints of {hint} of the cells do not fit into a mask ratio of {ratio}; "
            "give 0 or more, and less than the ratio"
        )
    cells = math.prod(grid)
    count = hidden_count(cells, ratio, hint)
    if not 0 < count < cells:
        what = "everything, so that there is nothing to see" if count else "nothing, so that there is nothing to learn"
        remedy = "a lower ratio or more hints" if count else "a higher ratio or fewer hints"
        raise UsageFault(
            f"a mask ratio of {ratio} with hints of {hint} hides {count} of {cells} cells on the grid "
            f"{' x '.join(map(str, grid))}: {what}; give {remedy}, a larger crop, or an earlier stage"
        )


def expand(hidden: Bool[Tensor, "b p q r"], tokens: Grid) -> Bool[Tensor, "b i j k"]:
    """Cells to what they are made of: `tokens` of the patch embedding, or voxels, along i, j, k of the whole crop.

    A cell is 2^s of them along each axis; the last one is cut off where the crop ends. ValueError for other grids.
    """
    for axis, size in enumerate(tokens, start=1):
        cell = cell_size(size, hidden.shape[axis])
        hidden = hidden.repeat_interleave(cell, dim=axis).narrow(axis, 0, size)
    return hidden


def drop_tokens(samples: int, grid: Grid, share: float, device: torch.device | str) -> Bool[Tensor, "b i j k"]:
    """Patch dropout of the noisy teacher: in each sample floor(share n) other tokens are True, which is dropped.

    DAGMaN drops 0.7 at the level of patch tokens, drawn anew for each view (its literal reading). UsageFault for a
    share that is not in 0..1, or where every token would go.
    """
    cells = math.prod(grid)
    if not 0 <= share < 1:
        raise UsageFault(
            f"a patch dropout of {share} leaves the teacher nothing to see; give 0 or more, and less than 1"
        )
    dropped = _any_order(samples, cells, device)[:, : floor_share(share, cells)]
    return torch.zeros(samples, cells, dtype=torch.bool, device=device).scatter_(1, dropped, True).unflatten(1, grid)


def floor_share(share: float, cells: int) -> int:
    """floor(share n), where a share such as 0.29 of 100 is 29 although its product falls short of it in binary."""
    return math.floor(share * cells + 1e-9 * cells)


def draw_boxes(grid: Grid, count: int, rng: np.random.Generator) -> list[Box]:
    """Boxes that together cover `count` cells or more; without the last they cover less."""
    covered, boxes = np.zeros(grid, dtype=bool), []
    while (left := count - int(covered.sum())) > 0:
        boxes.append(_draw_box(covered, left, rng))
        covered[boxes[-1]] = True
    return boxes


def lay(grid: Grid, boxes: list[Box], count: int) -> np.ndarray:
    """What the boxes cover, bool of the grid: all of them wholly, but of the last only as far as `count` cells go."""
    hidden, last = np.zeros(grid, dtype=bool), np.zeros(grid, dtype=bool)
    for box in boxes[:-1]:
        hidden[box] = True
    last[boxes[-1]] = True
    added = (last & ~hidden).ravel()
    added &= added.cumsum() <= count - hidden.sum()
    return hidden | added.reshape(grid)


def _draw_box(covered: np.ndarray, left: int, rng: np.random.Generator) -> Box:
    """A box of about LEAST_BOX to `left` cells, anywhere over one that is not covered yet."""
    target = rng.uniform(min(LEAST_BOX, left), left)
    stretch = rng.uniform(0, math.log(LONGEST), 3)
    sides = np.rint(target ** (1 / 3) * np.exp(stretch - stretch.mean())).astype(int)
    sides = sides.clip(1, covered.shape)
    over = np.argwhere(~covered)[rng.integers(covered.size - covered.sum())]
    start = rng.integers(np.maximum(over - sides + 1, 0), np.minimum(over, covered.shape - sides) + 1)
    i, j, k = (slice(int(first), int(first + side)) for first, side in zip(start, sides))
    return i, j, k


def _bounds(attention: Float[Tensor, "b p q r"], ratio: float, hint: float) -> tuple[int, int]:
    """How many cells are hints, and how many are selected, these among them."""
    grid = tuple(attention.shape[1:])
    check_masking(grid, ratio, hint)
    return floor_share(hint, math.prod(grid)), floor_share(ratio, math.prod(grid))


def _most_attended_first(attention: Float[Tensor, "b p q r"]) -> Int[Tensor, "b cells"]:
    return attention.flatten(1).argsort(dim=1, descending=True, stable=True)


def _any_order(samples: int, cells: int, device: torch.device | str) -> Int[Tensor, "b cells"]:
    """Each row is a permutation of its own. (A threshold on the numbers would miss the count where two are equal.)"""
    return ranks.own(torch.rand(samples * ranks.world(), cells, device=device)).argsort(dim=1)


def _hide(attention: Float[Tensor, "b p q r"], cells: Int[Tensor, "b count"]) -> Bool[Tensor, "b p q r"]:
    hidden = torch.zeros_like(attention, dtype=torch.bool, memory_format=torch.contiguous_format).flatten(1)
    return hidden.scatter_(1, cells, True).unflatten(1, attention.shape[1:])
