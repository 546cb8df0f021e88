"""SegmentCAM: maps that padding and other crops of a bag cannot reach, and pooling by rank."""

import math

import pytest
import torch

from dagman.downstream.segment_cam import MaskedGroupNorm, SegmentCAM, ranked_pooling, refined

DIM, WIDTH, FINDINGS = 6, 8, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cam(convolved=True, **how):
    torch.manual_seed(0)
    return SegmentCAM(DIM, FINDINGS, width=WIDTH, convolved=convolved, **how)


def shares(maps, valid):
    """Cells that count wholly or not at all."""
    return valid[:, None].float().expand_as(maps)


def all_of(*grid):
    return torch.ones(*grid, dtype=torch.bool)


def test_maps_are_those_of_two_convolutions_group_norms_and_gelus():
    made, cells = cam(groups=[0, 1, 0]), normal(2, DIM, 4, 3, 5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = cells
    for layer in (made.first, made.second):
        x = torch.nn.functional.conv3d(x, layer.conv.weight, padding=1)
        x = torch.nn.functional.gelu(torch.nn.functional.group_norm(x, 8, layer.norm.weight, layer.norm.bias))
    found = made(cells, all_of(2, 4, 3, 5))
    torch.testing.assert_close(found["class_maps"], made.class_maps(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["foreground"], made.foreground(x)[:, [0, 1, 0]], rtol=1e-4, atol=1e-5)


def test_class_maps_are_linear_in_each_cell_unless_they_are_convolved():
    made, cells, valid = cam(convolved=False, groups=[0, 0, 1]), normal(2, DIM, 4, 3, 5), all_of(2, 4, 3, 5)
    found = made(cells, valid)
    by_hand = torch.einsum("bdpqr,fd->bfpqr", cells, made.class_maps.weight[:, :, 0, 0, 0])
    torch.testing.assert_close(found["class_maps"], by_hand + made.class_maps.bias[:, None, None, None])
    assert torch.equal(found["foreground"], cam(convolved=False, groups=[0, 0, 1])(cells, valid)["foreground"])
    assert cam(convolved=False).first is None  # nothing would read the convolutions


@pytest.mark.parametrize("convolved", [False, True])
def test_padding_changes_nothing_and_learns_nothing(convolved):
    made, cells = cam(convolved, groups=[0, None, 1]), normal(1, DIM, 3, 4, 2)
    small = made(cells, all_of(1, 3, 4, 2))
    padded = 100 * normal(1, DIM, 5, 6, 4, seed=1)
    padded[..., :3, :4, :2] = cells
    padded.requires_grad_()
    valid = torch.zeros(1, 5, 6, 4, dtype=torch.bool)
    valid[:, :3, :4, :2] = True
    large = made(padded, valid)
    for name in small:
        torch.testing.assert_close(large[name][..., :3, :4, :2], small[name], rtol=1e-4, atol=1e-5)
    ranked_pooling(large["class_maps"], shares(large["class_maps"], valid), 0.9).sum().backward()
    assert (padded.grad[:, :, ~valid[0]] == 0).all() and (padded.grad[:, :, valid[0]] != 0).any()


def test_findings_that_share_organs_share_a_foreground_and_one_of_no_organ_is_not_suppressed():
    made = cam(groups=[0, None, 0])
    foreground = made(normal(1, DIM, 3, 3, 3), all_of(1, 3, 3, 3))["foreground"]
    assert torch.equal(foreground[:, 0], foreground[:, 2])
    assert (foreground[:, 1].sigmoid() == 1).all() and (foreground[:, 0].sigmoid() < 1).all()
    assert made.foreground.out_channels == 1


@pytest.mark.parametrize("groups", [(), (None, None, None)])
def test_without_groups_there_is_no_foreground(groups):
    assert set(cam(groups=groups)(normal(1, DIM, 2, 2, 2), all_of(1, 2, 2, 2))) == {"class_maps"}


def test_no_convolution_reaches_from_one_crop_of_a_bag_into_the_next():
    together, apart = cam(crops=2), cam()
    together.load_state_dict(apart.state_dict())
    cells, valid = normal(1, DIM, 4, 3, 3), all_of(1, 4, 3, 3)
    for layer in (together.first, apart.first, together.second, apart.second):
        layer.norm = torch.nn.Identity()  # whose statistics are those of the whole study
        layer.norm.forward = lambda x, valid: x
    halves = [apart(half, valid[:, :2])["class_maps"] for half in cells.split(2, dim=2)]
    torch.testing.assert_close(together(cells, valid)["class_maps"], torch.cat(halves, dim=2))
    assert not torch.allclose(apart(cells, valid)["class_maps"], torch.cat(halves, dim=2))


def test_masked_group_norm_is_group_norm_of_the_valid_cells():
    norm, x = MaskedGroupNorm(2, 4), normal(1, 4, 3, 2, 2)
    valid = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(3)) > 0.4
    found = norm(x, valid)
    for group in (slice(0, 2), slice(2, 4)):
        held = x[0, group][:, valid[0]]
        expected = (held - held.mean()) / (held.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(found[0, group][:, valid[0]], expected)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.996, 1.0])
def test_pooling_by_rank_equals_its_definition(decay):
    maps, valid = normal(2, 3, 2, 3, 2), torch.rand(2, 2, 3, 2, generator=torch.Generator().manual_seed(1)) > 0.3
    found = ranked_pooling(maps, shares(maps, valid), decay)
    for b in range(2):
        for f in range(3):
            ranked = sorted(maps[b, f][valid[b]].tolist(), reverse=True)
            weights = [decay**r for r in range(len(ranked))]
            expected = sum(w * value for w, value in zip(weights, ranked, strict=True)) / sum(weights)
            assert found[b, f].item() == pytest.approx(expected, abs=1e-6)


def test_a_cell_that_counts_half_is_half_a_cell():
    """Three half cells of one value are pooled as one and a half; what lies below them has the rank of 1.5."""
    maps, share = torch.tensor([3.0, 3.0, 3.0, 1.0, 9.0]), torch.tensor([0.5, 0.5, 0.5, 1.0, 0.0])
    found = ranked_pooling(maps.view(1, 1, 5, 1, 1), share.view(1, 1, 5, 1, 1), 0.25).item()
    high = 0.5 * (1 + 0.25**0.5 + 0.25)
    assert found == pytest.approx((3 * high + 0.25**1.5) / (high + 0.25**1.5))


def test_pooling_a_study_without_a_cell_is_zero_and_gives_no_gradient():
    maps = normal(1, 2, 2, 2, 2).requires_grad_()
    pooled = ranked_pooling(maps, torch.zeros(1, 2, 2, 2, 2), 0.996)
    pooled.sum().backward()
    assert (pooled == 0).all() and (maps.grad == 0).all()


def test_the_refined_map_of_one_cell_by_hand():
    parts = {name: torch.full((1, 1, 1, 1, 1), value) for name, value in (("attention", 0.5), ("class_maps", 2.0))}
    assert refined({"attention": parts["attention"]}).item() == 0.5
    assert refined(parts).item() == pytest.approx((0.5 / (1 + math.exp(-2))) ** 0.5)
    assert refined(parts | {"foreground": torch.zeros(1, 1, 1, 1, 1)}).item() == pytest.approx(
        refined(parts).item() / 2
    )
    against = refined({**parts, "class_maps": -parts["class_maps"]}).item()  # less, and not nothing
    assert against == pytest.approx((0.5 / (1 + math.exp(2))) ** 0.5)
