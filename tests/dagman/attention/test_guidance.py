"""Guidance: three losses against their formulas, what is switched off, and heads that come to follow their priors."""

import math

import pytest
import torch
from torch import nn

from dagman.attention.guidance import KINDS, GuidedHeads, guidance, windowed_guidance
from spade3d.faults import DataFault, UsageFault
from spade3d.networks.swin import AttentionMap, SwinTransformer

GRID = (2, 3, 2)


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def slow(m, p, kind):
    """The disagreement of one map with one prior, lists of numbers, by the formulas."""
    share = [x / sum(m) for x in m]
    if kind == "ce":
        return -sum(b / sum(p) * math.log(a) for a, b in zip(share, p, strict=True))
    if kind == "inside":
        return -math.log(sum(a * b for a, b in zip(share, p, strict=True)))
    m, p = ([(x - min(y)) / max(max(y) - min(y), 0.01 * max(y)) for x in y] for y in (m, p))
    return 1 - 2 * sum(a * b for a, b in zip(m, p, strict=True)) / (sum(a * a for a in m) + sum(b * b for b in p))


def test_losses_by_hand():
    by_head = torch.tensor([0.1, 0.3]).reshape(1, 1, 2, 1, 1)  # scaled to 1/4 and 3/4
    prior = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1, 1)
    assert guidance(by_head, prior, "ce")[0].item() == pytest.approx(math.log(4))
    assert guidance(by_head, prior, "inside")[0].item() == pytest.approx(math.log(4))
    assert guidance(by_head, prior.flip(2) / 2, "inside")[0].item() == pytest.approx(-math.log(3 / 8))
    assert guidance(by_head, prior, "dice")[0].item() == pytest.approx(1.0)
    assert guidance(by_head, prior.flip(2), "dice")[0].item() == pytest.approx(0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_equals_its_definition(kind):
    by_head, prior = drawn(3, 2, *GRID).requires_grad_(), drawn(3, 2, *GRID, seed=1)
    prior[0, 1] = 0.0  # absent from the crop
    loss, active = guidance(by_head, prior, kind)
    pairs = [(b, h) for b in range(3) for h in range(2) if (b, h) != (0, 1)]
    twin = [slow(by_head[b, h].flatten().tolist(), prior[b, h].flatten().tolist(), kind) for b, h in pairs]
    assert loss.item() == pytest.approx(sum(twin) / 5, abs=1e-5) and active.item() == pytest.approx(5 / 6)
    loss.backward()
    assert by_head.grad.isfinite().all() and not by_head.grad[0, 1].any() and by_head.grad[1, 1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_region_asks_for_nothing(kind):
    by_head = drawn(2, 1, *GRID).requires_grad_()
    loss, active = guidance(by_head, torch.full((2, 1, *GRID), 0.001), kind, least=0.002)
    assert loss.item() == 0 and active.item() == 0
    loss.backward()
    assert not by_head.grad.any()


def test_dice_leaves_out_a_prior_that_fills_the_crop():
    by_head, full = drawn(1, 1, *GRID), torch.ones(1, 1, *GRID)
    assert [guidance(by_head, full, kind)[1].item() for kind in KINDS] == [1, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("looks", ["at one cell", "evenly"])
def test_gradients_are_finite_for_the_hardest_maps(kind, looks):
    by_head = torch.zeros(1, 1, *GRID) if looks == "at one cell" else torch.full((1, 1, *GRID), 1 / 12)
    by_head[..., 0, 0, 0] = 1.0 if looks == "at one cell" else 1 / 12
    by_head.requires_grad_()
    prior = torch.zeros(1, 1, *GRID)
    prior[..., 1, 2, 1] = 1.0
    loss, _ = guidance(by_head, prior, kind)
    loss.backward()
    assert loss.isfinite() and by_head.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_in_full_precision_under_autocast(kind):
    by_head, prior = drawn(2, 2, *GRID), drawn(2, 2, *GRID, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, active = guidance(by_head, prior, kind)
    assert loss.dtype == active.dtype == torch.float32 and loss == guidance(by_head, prior, kind)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_guided_comes_to_look_inside(kind):
    prior = torch.zeros(1, 1, 4, 4, 4)
    prior[..., 1:3, 1:3, 2:] = 1.0
    logits = nn.Parameter(0.01 * drawn(1, 1, 64))
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        loss, _ = guidance(logits.softmax(dim=-1).unflatten(2, (4, 4, 4)), prior, kind)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    attention, inside = logits.softmax(dim=-1).detach(), prior.flatten(2) > 0
    assert attention[inside].sum() > (0.25 if kind == "dice" else 0.9)  # of dice the contrast alone counts
    assert attention[inside].min() > 1.5 * attention[~inside].max()
    if kind != "inside":  # which leaves open where inside
        assert attention[inside].max() < 1.1 * attention[inside].min()


def test_a_prior_on_another_grid_is_refused():
    with pytest.raises(UsageFault, match=r"\(1, 2, 3, 3, 3\) for attention \(1, 2, 2, 3, 2\).*on one grid"):
        guidance(drawn(1, 2, *GRID), drawn(1, 2, 3, 3, 3))
    with pytest.raises(UsageFault, match="'kl'.*ce, inside, dice"):
        guidance(drawn(1, 2, *GRID), drawn(1, 2, *GRID), "kl")


def windows_of(grid, window, shift, heads=2):
    """Attention maps of a block with random weights: padding and shifted windows as the encoder has them."""
    torch.manual_seed(0)
    encoder = SwinTransformer(1, 4, depths=(2, 1, 1, 1), heads=(heads, 1, 1, 1), window=window, patch=(2, 2, 2))
    images = drawn(2, 1, *(2 * size for size in grid), seed=3)
    return encoder.attention_maps(images, 1)[1 if shift else 0]


def slow_windows(attention, prior, kind):
    """The terms of each (sample, head), window by window and cell by cell."""
    terms = []
    for b in range(len(prior)):
        for h in range(prior.shape[1]):
            flat, total, mass = prior[b, h].flatten().tolist(), 0.0, 0.0
            for w, cells in enumerate(attention.cells.tolist()):
                real = [n for n, cell in enumerate(cells) if cell >= 0]
                p = [flat[cells[n]] for n in real]
                if sum(p) < 1e-3 * len(real) or (kind == "dice" and max(p) - min(p) <= 0.01 * max(p)):
                    continue
                m = [sum(attention.weights[b, w, h, look, n].item() for look in real) / len(real) for n in real]
                total, mass = total + sum(p) * slow(m, p, kind), mass + sum(p)
            terms.append(total / mass)
    return terms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "shift"), [((4, 4, 2), False), ((5, 4, 3), False), ((5, 4, 3), True)])
def test_windowed_guidance_equals_its_definition(kind, grid, shift):
    attention, prior = windows_of(grid, (2, 2, 2), shift), drawn(2, 2, *grid, seed=4)
    prior[:, :, :2, :2] = 0.0  # some windows are empty
    loss, active = windowed_guidance(attention, prior, kind)
    twin = slow_windows(attention, prior, kind)
    assert active.item() == 1.0 and loss.item() == pytest.approx(sum(twin) / len(twin), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_window_that_holds_the_grid_is_plain_guidance(kind):
    attention, prior = windows_of((3, 3, 3), (3, 3, 3), False), drawn(2, 2, 3, 3, 3, seed=5)
    loss, _ = windowed_guidance(attention, prior, kind)
    assert loss.item() == pytest.approx(guidance(attention.received(), prior, kind)[0].item(), abs=1e-6)


def test_windowed_guidance_reaches_the_weights_and_skips_the_absent():
    attention = windows_of((4, 4, 2), (2, 2, 2), False)
    weights = attention.weights.clone().requires_grad_()
    prior = drawn(2, 2, 4, 4, 2)
    prior[1] = 0.0
    loss, active = windowed_guidance(AttentionMap(weights, attention.cells, attention.grid), prior)
    assert active.item() == 0.5
    loss.backward()
    assert weights.grad.isfinite().all() and weights.grad[0].any() and not weights.grad[1].any()
    with pytest.raises(UsageFault, match=r"\(2, 4, 4, 4\).*windows of 2 heads on \(4, 4, 2\)"):
        windowed_guidance(attention, drawn(2, 2, 4, 4, 4))


def test_at_most_half_of_the_heads_are_guided():
    table = GuidedHeads(4, ("liver", "spleen"))
    by_head = drawn(2, 4, *GRID)
    assert torch.equal(table.of(by_head), by_head[:, :2])
    assert GuidedHeads.from_dict(table.to_dict()) == table
    with pytest.raises(UsageFault, match="3 of 4 heads would be guided .liver, spleen, aorta.*at most half"):
        GuidedHeads(4, ("liver", "spleen", "aorta"))
    with pytest.raises(UsageFault, match="no region"):
        GuidedHeads(4, ())
    with pytest.raises(UsageFault, match="3 heads.*table of heads for 4"):
        table.of(by_head[:, :3])
    with pytest.raises(DataFault, match="not a table of guided heads"):
        GuidedHeads.from_dict({"heads": 4})


def test_heads_find_the_priors_of_their_regions():
    table = GuidedHeads(8, ("spleen", "liver"))
    assert table.rows(("liver", "aorta", "spleen")) == [2, 0]
    with pytest.raises(UsageFault, match="no prior for spleen.*liver, aorta"):
        table.rows(("liver", "aorta"))
