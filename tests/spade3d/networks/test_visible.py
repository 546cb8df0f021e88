"""What a mask leaves: rows, their neighbourhoods, their parents."""

import itertools

import torch

from spade3d.networks.swin import CORNERS
from spade3d.networks.visible import levels


def one_level(visible, window, shift=(0, 0, 0)):
    return levels(visible, [[(window, shift)]], CORNERS["v1"])[0]


def by_neighbourhood(packing):
    """The slots of each neighbourhood."""
    return [
        range(start, start + tile.n) for tile in packing.tiles for start in range(tile.start, tile.slots.stop, tile.n)
    ]


def test_a_window_with_nothing_visible_vanishes_and_others_shrink():
    visible = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    visible[0, :2, :2, :2] = True  # one whole window of eight
    visible[0, 2, 2, 2:] = True  # two cells of another
    packing = one_level(visible, (2, 2, 2)).packing((2, 2, 2), (0, 0, 0))
    assert [(tile.neighbourhoods, tile.n) for tile in packing.tiles] == [(1, 8), (1, 2)]
    assert packing.looks.tolist() == [*range(8), 0, 1]


def test_cells_meet_if_and_only_if_their_window_is_one_and_the_roll_did_not_bring_them_together():
    grid, window, shift = (5, 4, 7), (2, 4, 3), (1, 0, 1)
    visible = torch.rand(2, *grid, generator=torch.Generator().manual_seed(0)) < 0.5
    packing = one_level(visible, window, shift).packing(window, shift)
    of_slot = {slot: at for at, slots in enumerate(by_neighbourhood(packing)) for slot in slots}
    home = [of_slot[slot] for slot in packing.slots.tolist()]
    assert len(set(packing.slots.tolist())) == len(home) == int(visible.sum())

    def window_of(sample, *cell):  # unrolled: the first window along a shifted axis is `shift` long
        return sample, *((x - by) // side for x, by, side in zip(cell, shift, window))

    cells = visible.nonzero().tolist()
    for (a, cell), (b, other) in itertools.combinations(enumerate(cells), 2):
        assert (home[a] == home[b]) == (window_of(*cell) == window_of(*other))


def test_padding_is_one_slot_of_the_neighbourhoods_that_have_some():
    visible = torch.ones(1, 3, 2, 2, dtype=torch.bool)  # 3 cells are a window of 2, and one of 1 and padding
    packing = one_level(visible, (2, 2, 2)).packing((2, 2, 2), (0, 0, 0))
    assert [(tile.neighbourhoods, tile.n) for tile in packing.tiles] == [(1, 8), (1, 5)]
    assert packing.seen.tolist() == [*range(8), *range(4), 9]  # 8 would be an empty slot, 9 is the first kind
    assert packing.padding.tolist() == [[False] * 4 + [True] * 4]


def test_rows_laid_into_slots_come_back_and_so_do_their_gradients():
    visible = torch.rand(2, 6, 5, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    level = one_level(visible, (4, 4, 4), (2, 2, 2))
    packing = level.packing((4, 4, 4), (2, 2, 2))
    rows = torch.randn(len(level.cells), 3, dtype=torch.float64, requires_grad=True)
    slots = packing.lay(rows)
    assert torch.equal(packing.lift(slots), rows)
    assert not slots[packing.seen >= packing.padding.shape[1]].any()
    assert torch.autograd.gradcheck(lambda rows: packing.lift(packing.lay(rows).sin()), rows)


def test_what_is_picked_and_spread_is_the_grid_with_zeros_where_it_is_hidden():
    visible = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    grids = torch.randn(2, 4, 3, 5, 6)
    level = one_level(visible, (2, 2, 2))
    assert torch.equal(level.spread(level.pick(grids)), grids * visible[..., None])
    assert level.samples_of_rows().tolist() == visible.nonzero()[:, 0].tolist()


def test_a_block_with_a_visible_corner_merges_it_with_zeros_and_one_with_none_stays_hidden():
    visible = torch.zeros(1, 4, 2, 3, dtype=torch.bool)
    visible[0, 0, 1, 0] = visible[0, 1, 1, 0] = visible[0, 3, 0, 2] = True
    for merging, corners in CORNERS.items():
        fine, coarse = levels(visible, [[((2, 2, 2), (0, 0, 0))]], corners)
        merged = fine.merge(torch.tensor([[1.0], [2.0], [3.0]]))
        assert coarse.grid == (2, 1, 2)
        assert coarse.cells.tolist() == [0, 3]
        expected = torch.zeros(2, 8)
        expected[0, corners.index((0, 1, 0))] = 1
        expected[0, corners.index((1, 1, 0))] = 2
        expected[1, corners.index((1, 0, 0))] = 3  # the other corner along k is outside
        assert torch.equal(merged, expected), merging


def test_work_follows_the_visible_share_where_cells_hold_whole_windows():
    visible = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    cells, visible = int(visible.sum()), visible
    for axis in (1, 2, 3):
        visible = visible.repeat_interleave(4, axis)
    packing = one_level(visible, (4, 4, 4)).packing((4, 4, 4), (0, 0, 0))
    assert sum(tile.neighbourhoods * tile.n**2 for tile in packing.tiles) == cells * 64**2
