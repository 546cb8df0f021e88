"""Masking: exact counts, the right cells, boxes that are boxes, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dagman.distillation.masking import (
    RULES,
    check_masking,
    draw_boxes,
    drop_tokens,
    expand,
    hidden_count,
    lay,
)
from spade3d.faults import UsageFault

GRIDS = st.tuples(*[st.integers(1, 7)] * 3)
SHARES = st.integers(0, 100).map(lambda percent: percent / 100)


def looks(samples, grid, seed=0, levels=None):
    """Attention of some samples; with few `levels` many cells are equally attended."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.rand(samples, *grid, generator=generator)
    return torch.randint(levels, (samples, *grid), generator=generator).float() / levels


def ranked(sample):
    """Cells of the flattened grid, the most attended first; of equals the earlier first."""
    values = sample.flatten().tolist()
    return sorted(range(len(values)), key=lambda cell: (-values[cell], cell))


def hidden_cells(mask):
    return {cell for cell, hidden in enumerate(mask.flatten().tolist()) if hidden}


def exact_floor(share, cells):
    """floor(share * cells) in whole numbers, for shares in percent."""
    return round(share * 100) * cells // 100


def is_sensible(grid, ratio, hint):
    cells = math.prod(grid)
    return 0 <= hint < ratio and 0 < exact_floor(ratio, cells) - exact_floor(hint, cells) < cells


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=80, deadline=None)
@given(grid=GRIDS, ratio=SHARES, hint=SHARES, samples=st.integers(1, 3), levels=st.sampled_from([None, 1, 3]))
def test_every_rule_hides_exactly_what_is_promised(rule, grid, ratio, hint, samples, levels):
    assume(is_sensible(grid, ratio, hint))
    cells = math.prod(grid)
    hidden = RULES[rule](looks(samples, grid, levels=levels), ratio, hint)
    assert hidden.shape == (samples, *grid) and hidden.dtype == torch.bool
    promised = exact_floor(ratio, cells) - exact_floor(hint, cells)
    assert hidden.flatten(1).sum(dim=1).tolist() == [promised] * samples
    assert hidden_count(cells, ratio, hint) == promised


@pytest.mark.parametrize("rule", RULES)
def test_the_papers_grid_hides_307_of_512(rule):
    """128^3 voxels, stage 3: 358 selected, 51 hints."""
    assert hidden_count(512, 0.7, 0.1) == 307
    hidden = RULES[rule](looks(4, (8, 8, 8)), 0.7, 0.1)
    assert hidden.flatten(1).sum(dim=1).tolist() == [307] * 4


@pytest.mark.parametrize(("cells", "share", "expected"), [(100, 0.29, 29), (100, 0.57, 57), (10, 0.7, 7), (30, 0.1, 3)])
def test_a_share_that_is_a_whole_number_of_cells_is_that_number(cells, share, expected):
    """0.29 * 100 is 28.999999999999996 in binary."""
    assert hidden_count(cells, share, 0.0) == expected


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("grid", [(2, 3, 5), (4, 4, 4), (1, 6, 3)])
@pytest.mark.parametrize(("ratio", "hint"), [(0.7, 0.1), (0.5, 0.0), (1.0, 0.3)])
def test_attention_hides_the_most_attended_but_for_its_top(grid, ratio, hint, levels):
    attention = looks(3, grid, seed=1, levels=levels)
    cells = math.prod(grid)
    hints, selected = exact_floor(hint, cells), exact_floor(ratio, cells)
    for sample, mask in zip(attention, RULES["attention"](attention, ratio, hint)):
        assert hidden_cells(mask) == set(ranked(sample)[hints:selected])


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("grid", [(2, 3, 5), (4, 4, 4)])
def test_low_hides_the_least_attended(grid, levels):
    attention = looks(3, grid, seed=2, levels=levels)
    count = hidden_count(math.prod(grid), 0.7, 0.1)
    for sample, mask in zip(attention, RULES["low"](attention, 0.7, 0.1)):
        assert hidden_cells(mask) == set(ranked(sample)[-count:])


def test_attmask_draws_its_hints_among_the_top_tenth():
    """1000 cells, half selected, 5 % hints: 50 of the top 100 are shown, others each time; ranks 100 to 499 never."""
    attention = looks(1, (10, 10, 10), seed=3).expand(60, -1, -1, -1)
    order, shown = ranked(attention[0]), []
    torch.manual_seed(0)
    for mask in RULES["attmask"](attention, 0.5, 0.05):
        hidden = hidden_cells(mask)
        assert set(order[100:500]) <= hidden <= set(order[:500])
        shown.append(set(order[:100]) - hidden)
    assert {len(hints) for hints in shown} == {50}
    assert len({frozenset(hints) for hints in shown}) == 60
    times = [sum(cell in hints for hints in shown) for cell in order[:100]]
    assert min(times) > 12 and max(times) < 48  # 30 expected, spread 3.9: each cell of the tenth has the same chance


def test_attmask_with_hints_of_a_tenth_has_nothing_to_choose():
    attention = looks(3, (5, 5, 4), seed=4)
    assert torch.equal(RULES["attmask"](attention, 0.7, 0.1), RULES["attention"](attention, 0.7, 0.1))


def test_random_and_block_do_not_look_at_the_attention():
    for rule in ("random", "block"):
        torch.manual_seed(5)
        one = RULES[rule](looks(3, (4, 5, 6), seed=0), 0.6, 0.0)
        torch.manual_seed(5)
        assert torch.equal(one, RULES[rule](looks(3, (4, 5, 6), seed=1), 0.6, 0.0))


def test_random_gives_every_cell_the_same_chance():
    torch.manual_seed(0)
    often = RULES["random"](torch.zeros(4000, 2, 2, 3), 0.5, 0.0).float().mean(dim=0)
    torch.testing.assert_close(often, torch.full((2, 2, 3), 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize("rule", ["random", "block", "attmask"])
def test_the_same_chance_gives_the_same_mask_and_samples_differ(rule):
    attention = looks(1, (6, 6, 6)).expand(4, -1, -1, -1)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(RULES[rule](attention, 0.7, 0.05))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert len({tuple(mask.flatten().tolist()) for mask in masks[0]}) == 4


@settings(max_examples=150, deadline=None)
@given(grid=GRIDS, share=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
def test_block_covers_boxes_wholly_but_for_the_end_of_the_last(grid, share, seed):
    count = max(1, int(share * math.prod(grid)))
    boxes = draw_boxes(grid, count, np.random.default_rng(seed))
    hidden, before = lay(grid, boxes, count), np.zeros(grid, dtype=bool)
    for box in boxes:
        assert all(0 <= side.start < side.stop <= size for side, size in zip(box, grid))
        assert not before[box].all(), "each box covers a cell that was visible"
        if box is not boxes[-1]:
            assert hidden[box].all()
            before[box] = True
    added, in_last = hidden & ~before, np.zeros(grid, dtype=bool)
    in_last[boxes[-1]] = True
    assert hidden.sum() == count and before.sum() < count
    assert not (added & ~in_last).any(), "nothing is hidden beside the boxes"
    end = np.flatnonzero(added[boxes[-1]].ravel()).max()
    assert hidden[boxes[-1]].ravel()[: end + 1].all(), "the last is whole up to where it is cut off"


@pytest.mark.parametrize("seed", range(20))
def test_block_hides_a_few_connected_pieces(seed):
    """Chance alone would leave many cells by themselves."""
    torch.manual_seed(seed)
    block, random = (RULES[rule](torch.zeros(1, 8, 8, 8), 0.3, 0.0)[0].numpy() for rule in ("block", "random"))
    assert ndimage.label(block)[1] <= 8 < ndimage.label(random)[1]
    assert pairs_of_neighbours(block) > 1.5 * pairs_of_neighbours(random)


def pairs_of_neighbours(hidden):
    """Hidden cells that share a face."""
    return sum(int((np.delete(hidden, 0, axis) & np.delete(hidden, -1, axis)).sum()) for axis in range(3))


def test_lay_worked_out_by_hand():
    """The second box has cells 1 2 and 4 5 of the 2 x 3 grid; 1 is covered already, of the others two are still due."""
    boxes = [(slice(0, 1), slice(0, 1), slice(0, 2)), (slice(0, 1), slice(0, 2), slice(1, 3))]
    assert lay((1, 2, 3), boxes, 4).ravel().tolist() == [True, True, True, False, True, False]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("grid", "ratio", "hint", "said"),
    [
        ((1, 1, 1), 0.7, 0.1, "0.7 with hints of 0.1 hides 0 of 1 cells on the grid 1 x 1 x 1: nothing"),
        ((2, 1, 1), 0.3, 0.0, "0.3 with hints of 0.0 hides 0 of 2 cells on the grid 2 x 1 x 1: nothing"),
        ((2, 3, 5), 1.0, 0.0, "1.0 with hints of 0.0 hides 30 of 30 cells on the grid 2 x 3 x 5: everything"),
        ((2, 2, 2), 0.3, 0.3, "hints of 0.3 of the cells do not fit into a mask ratio of 0.3"),
        ((2, 2, 2), 0.3, -0.1, "hints of -0.1 .* give 0 or more"),
        ((2, 2, 2), 0.3, math.nan, "hints of nan"),
        ((2, 2, 2), 0.0, 0.0, "mask ratio of 0.0 is no share"),
        ((2, 2, 2), 1.1, 0.0, "mask ratio of 1.1 is no share"),
        ((2, 2, 2), math.nan, 0.0, "mask ratio of nan is no share"),
    ],
)
def test_what_hides_nothing_or_everything_is_refused(rule, grid, ratio, hint, said):
    with pytest.raises(UsageFault, match=said):
        check_masking(grid, ratio, hint)
    with pytest.raises(UsageFault, match=said):
        RULES[rule](torch.zeros(1, *grid), ratio, hint)


@settings(max_examples=200, deadline=None)
@given(grid=GRIDS, ratio=SHARES, hint=SHARES)
def test_a_masking_is_refused_exactly_where_it_is_not_sensible(grid, ratio, hint):
    if is_sensible(grid, ratio, hint):
        check_masking(grid, ratio, hint)
    else:
        with pytest.raises(UsageFault):
            check_masking(grid, ratio, hint)


@pytest.mark.parametrize(
    ("grid", "tokens", "cell"),
    [
        ((2, 3, 5), (16, 24, 40), (8, 8, 8)),
        ((2, 3, 5), (15, 17, 33), (8, 8, 8)),  # clipped at the far ends
        ((1, 2, 4), (5, 9, 25), (5, 8, 8)),  # one cell is the whole axis
        ((3, 3, 3), (3, 5, 6), (1, 2, 2)),
    ],
)
def test_a_token_is_hidden_where_its_cell_is(grid, tokens, cell):
    hidden = looks(2, grid, seed=6) < 0.5
    expanded = expand(hidden, tokens)
    assert expanded.shape == (2, *tokens)
    for b, i, j, k in np.ndindex(2, *tokens):
        assert expanded[b, i, j, k] == hidden[b, i // cell[0], j // cell[1], k // cell[2]]


def test_cells_of_another_crop_are_refused():
    with pytest.raises(ValueError, match="3 cells are not 16 voxels halved"):
        expand(torch.zeros(1, 3, 2, 2, dtype=torch.bool), (16, 16, 16))


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 3), grid=st.tuples(*[st.integers(1, 9)] * 3), share=SHARES.filter(lambda share: share < 1)
)
def test_patch_dropout_drops_exactly_its_share_of_each_sample(samples, grid, share):
    dropped = drop_tokens(samples, grid, share, "cpu")
    assert dropped.shape == (samples, *grid) and dropped.dtype == torch.bool
    assert dropped.flatten(1).sum(dim=1).tolist() == [exact_floor(share, math.prod(grid))] * samples


def test_patch_dropout_is_exact_where_equal_random_numbers_are_certain():
    """A crop of 128^3 has 262144 tokens, and float32 chance has 2^24 values."""
    torch.manual_seed(0)
    dropped = drop_tokens(2, (64, 64, 64), 0.7, "cpu")
    assert dropped.flatten(1).sum(dim=1).tolist() == [183500] * 2
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
def test_a_dropout_that_leaves_nothing_is_refused(share):
    with pytest.raises(UsageFault, match=f"patch dropout of {share} leaves the teacher nothing to see"):
        drop_tokens(1, (2, 2, 2), share, "cpu")
