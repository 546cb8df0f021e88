"""Class tokens against a ViT in plain loops, the laws that a set of findings and of cells obeys, and a set to learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from dagman.downstream.clarity_losses import ClarityWeights, clarity_losses
from dagman.downstream.class_tokens import FAINT, ClassTokens
from dagman.downstream.segment_cam import ranked_pooling
from dagman.downstream.studies import StudyBatch
from dagman.downstream.study_heads import place_codes
from spade3d.faults import UsageFault

CHANNELS, FINDINGS, DIM, HEADS = 7, 3, 12, 3
GRID = (2, 3, 2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(**how):
    """Far from its start, where every map is nearly even and a mistake would not show."""
    torch.manual_seed(0)
    made = ClassTokens(CHANNELS, FINDINGS, **{"dim": DIM, "heads": HEADS, "width": 8, **how})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    made.whitening.mean.copy_(normal(CHANNELS, seed=8))
    made.whitening.root.copy_(normal(CHANNELS, CHANNELS, seed=9))
    return made.eval()


def study(grid=GRID, seed=0, batch=2):
    chance = torch.Generator().manual_seed(seed + 1)
    tokens, places = normal(batch, CHANNELS, *grid, seed=seed), torch.rand(batch, 3, *grid, generator=chance)
    valid = torch.rand(batch, *grid, generator=chance) > 0.25
    return tokens, places, valid


def slow_vit(made, tokens, places, joint, foreground=None):
    """One study of valid cells (cells, c) in plain loops: tokens after the blocks, the mean attention, the cells.
    `foreground` (findings, cells): what a cell's weight is multiplied by when a token looks."""
    cells = (tokens - made.whitening.mean) @ made.whitening.root @ made.embed.weight.T + made.embed.bias
    cells = cells + place_codes(places) @ made.place.weight.T
    x, maps = made.class_token, []
    for n, block in enumerate(made.blocks):
        everything = torch.cat([x, cells])
        seen = F.layer_norm(everything, (DIM,), block.norm1.weight, block.norm1.bias)
        q, k, v = block.q(seen), seen @ block.k.weight.T, block.v(seen)
        read, width = [], DIM // HEADS
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            powers = (q[:, part] @ k[:, part].T / math.sqrt(width)).exp()
            if foreground is not None:
                powers = powers.clone()
                powers[:FINDINGS, len(x) :] *= foreground
            weights = powers / powers.sum(dim=1, keepdim=True)
            read.append(weights @ v[:, part])
            maps.append(weights[:FINDINGS, len(x) :])
        everything = everything + block.proj(torch.cat(read, dim=1))
        everything = everything + block.mlp(F.layer_norm(everything, (DIM,), block.norm2.weight, block.norm2.bias))
        x, after = everything[: len(x)], everything[len(x) :]
        cells = after if joint and n < len(made.blocks) - 1 else cells
    return made.norm(x[:FINDINGS]), sum(maps) / len(maps), made.norm_cells(cells)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("blocks", "registers"), [(1, 0), (2, 1), (3, 2)])
def test_tokens_maps_and_logits_are_those_of_a_vit_over_the_valid_cells(joint, blocks, registers):
    made = head(joint=joint, blocks=blocks, registers=registers, segment_cam=False)
    tokens, places, valid = study()
    output = made(tokens, places, valid)
    for b in range(2):
        found, maps, cells = slow_vit(made, tokens[b][:, valid[b]].T, places[b][:, valid[b]].T, joint)
        attention = output.parts["attention"][b]
        torch.testing.assert_close(output.parts["class_tokens"][b], found, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attention[:, valid[b]], maps, rtol=1e-4, atol=1e-6)
        assert (attention[:, ~valid[b]] == 0).all() and (attention.sum(dim=(1, 2, 3)) < 1).all()
        for f in range(FINDINGS):
            token = found[f] @ made.of_token.weight[f] + made.of_token.bias[f]
            pooled = (maps[f] @ cells) @ made.of_pooled.weight[f] + made.of_pooled.bias[f]
            assert output.logits[b, f].item() == pytest.approx((token + pooled).item() / 2, abs=1e-4)
    assert torch.equal(output.maps, output.parts["attention"])


def test_where_there_is_a_foreground_tokens_look_less_beyond_it():
    made, (tokens, places, valid) = head(groups=[0, None, 1], registers=1), study()
    output = made(tokens, places, valid)
    for b in range(2):
        inside = output.parts["foreground"][b][:, valid[b]].sigmoid()
        found, maps, _ = slow_vit(made, tokens[b][:, valid[b]].T, places[b][:, valid[b]].T, False, inside)
        torch.testing.assert_close(output.parts["class_tokens"][b], found, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.parts["attention"][b][:, valid[b]], maps, rtol=1e-4, atol=1e-6)


def test_what_is_allowed_stands_for_the_foreground_where_it_says_a_place():
    made = head(groups=[0, 1, 1])
    tokens, places, valid = study()
    allowed = (normal(2, FINDINGS, *GRID, seed=3) > 0).float()
    allowed[:, 2] = 1.0  # anywhere: no place is said, and the branch is asked
    guessed, output = made(tokens, places, valid), made(tokens, places, valid, allowed)
    for b in range(2):
        shown = valid[b]
        inside = output.parts["foreground"][b][:, shown].sigmoid()
        inside[:2] = allowed[b, :2][:, shown].clamp_min(FAINT)
        found, maps, _ = slow_vit(made, tokens[b][:, shown].T, places[b][:, shown].T, False, inside)
        torch.testing.assert_close(output.parts["class_tokens"][b], found, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.parts["attention"][b][:, shown], maps, rtol=1e-4, atol=1e-6)
    counted = torch.where(torch.tensor([True, True, False])[:, None, None, None], allowed, 1.0)
    counted[:, 2] = output.parts["foreground"][:, 2].sigmoid()
    pooled = ranked_pooling(output.parts["class_maps"], counted * valid[:, None], made.rank_decay)
    torch.testing.assert_close(output.parts["patch_logits"], pooled)
    torch.testing.assert_close(output.parts["foreground"], guessed.parts["foreground"])
    assert (output.parts["patch_logits"][:, :2] != guessed.parts["patch_logits"][:, :2]).all()
    assert (head(groups=[0, 1, 1], prior_forcing=False)(tokens, places, valid, allowed).logits == guessed.logits).all()


def test_where_nothing_of_the_organ_is_shown_the_foreground_is_the_branchs_own():
    made, (tokens, places, valid) = head(groups=[0, 1, 1]), study()
    allowed = torch.zeros(2, FINDINGS, *GRID)
    torch.testing.assert_close(made(tokens, places, valid, allowed).logits, made(tokens, places, valid).logits)


def test_labels_do_not_bend_the_foreground():
    made = head(groups=[0, 1, 1])
    output = made(*study())
    output.logits.sum().backward()
    assert made.cam.foreground.weight.grad is None and made.cam.class_maps.weight.grad.any()


@pytest.mark.parametrize("joint", [False, True])
def test_what_padding_holds_and_how_much_there_is_changes_nothing(joint):
    made = head(joint=joint, groups=[0, 1, None])
    tokens, places, valid = study()
    plain = made(tokens, places, valid)
    nothing = torch.full((2, 1), float("nan"))
    tokens = torch.where(valid[:, None], tokens, nothing[..., None, None, None])
    places = torch.where(valid[:, None], places, nothing[..., None, None, None])
    more = (0, 2, 0, 1, 0, 3)
    padded = made(F.pad(tokens, more, value=math.inf), F.pad(places, more, value=math.inf), F.pad(valid, more))
    torch.testing.assert_close(padded.logits, plain.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.maps[..., :2, :3, :2], plain.maps, rtol=1e-3, atol=1e-5)
    assert (padded.maps.flatten(2)[:, :, ~F.pad(valid, more).flatten(1).any(0)] == 0).all()


def test_gradients_reach_every_weight_and_no_invalid_cell():
    made = head(groups=[0, 1, 1], joint=True)
    tokens, places, valid = study()
    tokens.requires_grad_()
    output, batch = made(tokens, places, valid), batch_of(tokens, places, valid)
    sum(clarity_losses(output, batch, ClarityWeights()).values()).backward()
    hidden = ~valid[:, None].expand_as(tokens)
    assert (tokens.grad[hidden] == 0).all() and (tokens.grad[~hidden] != 0).all()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not output.maps.requires_grad


def batch_of(tokens, places, valid):
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, math.nan]])
    allowed = (normal(2, FINDINGS, *GRID, seed=3) > 0).float()
    return StudyBatch(tokens.detach(), None, places, valid, labels, allowed, None, ("a study", "another"))


def test_permuted_findings_give_permuted_answers():
    made, order = head(groups=[0, 1, 2]), torch.tensor([2, 0, 1])
    before = made(*study())
    with torch.no_grad():
        made.class_token[:FINDINGS] = made.class_token[order]
        for branch in (made.of_token, made.of_pooled, made.cam.class_maps, made.cam.foreground):
            for parameter in branch.parameters():
                parameter.copy_(parameter[order])
    after = made(*study())
    torch.testing.assert_close(after.logits, before.logits[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.maps, before.maps[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_without_convolutions_cells_are_a_set(axis):
    made, (tokens, places, valid) = head(segment_cam=False), study()
    straight = made(tokens, places, valid)
    turned = made(tokens.flip(axis + 2), places.flip(axis + 2), valid.flip(axis + 1))
    torch.testing.assert_close(turned.logits, straight.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned.maps, straight.maps.flip(axis + 2), rtol=1e-4, atol=1e-6)


def test_each_piece_is_there_or_not():
    def parts(**how):
        return set(head(**how)(*study()).parts)

    tokens = {"token_logits", "class_tokens", "attention"}
    maps = {"class_maps", "patch_logits"}
    assert parts(attention_pooling=False, segment_cam=False) == tokens
    assert parts(segment_cam=False) == tokens | {"pooled_logits"}
    assert parts(attention_pooling=False) == tokens | maps
    assert parts(groups=[0, 0, 0]) == tokens | {"pooled_logits"} | maps | {"foreground"}


def test_the_logit_is_the_mean_of_the_branches_and_begins_at_the_prevalence():
    made = ClassTokens(CHANNELS, FINDINGS, dim=DIM, heads=HEADS, width=8)
    labels = torch.tensor([[1.0, 0.0, math.nan], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    made.begin_at_prevalence(labels)
    output = made(*study())
    branches = [output.parts[f"{name}_logits"] for name in ("token", "pooled", "patch")]
    torch.testing.assert_close(output.logits, sum(branches) / 3)
    odds = torch.tensor([3 / 2, 1 / 4, 2 / 2]).log()  # one more of each kind
    torch.testing.assert_close(output.logits, odds.expand(2, -1), rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("how", "said"), [({"heads": 5}, "5 heads"), ({"blocks": 0}, "0 blocks"), ({"findings": 0}, "0 findings")]
)
def test_sizes_that_no_head_can_have_are_refused(how, said):
    with pytest.raises(UsageFault, match=said):
        ClassTokens(CHANNELS, **{"findings": FINDINGS, "dim": DIM, "heads": HEADS, **how})


def test_a_finding_of_an_organ_and_a_texture_is_learned_and_the_map_points_at_the_lump():
    """Texture 0 in the one organ is finding 0, texture 1 in the other is finding 1, and either texture in the wrong
    organ is nothing: neither texture nor place tells alone. A lump is one of 60 cells."""
    organs = torch.ones(5, 4, 3, dtype=torch.long)
    organs[2:] = 2
    grid, looks = organs.shape, normal(2, 16, seed=3)
    places = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in grid), indexing="ij"))
    allowed = torch.stack([organs == 1, organs == 2]).float()

    def draw(count, seed):
        """Each study has one lump, of either texture in either organ: half of them have a finding."""
        chance, lumps, labels = torch.Generator().manual_seed(seed), [], torch.zeros(count, 2)
        tokens = torch.randn(count, 16, *grid, generator=chance)
        for n in range(count):
            texture, organ = n % 2, n // 2 % 2
            cells = (organs == organ + 1).nonzero()
            lumps.append(tuple(cells[torch.randint(len(cells), (1,), generator=chance)][0].tolist()))
            tokens[(n, slice(None), *lumps[n])] += 3 * looks[texture]
            labels[n, texture] = float(texture == organ)
        whole = torch.ones(count, *grid, dtype=torch.bool)
        every = (count, -1, -1, -1, -1)
        names = tuple(map(str, range(count)))
        return StudyBatch(tokens, None, places.expand(every), whole, labels, allowed.expand(every), None, names), lumps

    torch.manual_seed(0)
    made = ClassTokens(16, 2, dim=24, heads=2, blocks=1, width=8, groups=[0, 1])
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-2)
    taught, _ = draw(96, seed=1)
    for _ in range(60):
        optimiser.zero_grad()
        terms = clarity_losses(
            made(taught.tokens, taught.places, taught.valid, taught.allowed), taught, ClarityWeights()
        )
        sum(terms.values()).backward()
        optimiser.step()

    fresh, lumps = draw(48, seed=2)
    output = made.eval()(fresh.tokens, fresh.places, fresh.valid)
    assert ((output.logits > 0) == (fresh.labels == 1)).float().mean() > 0.9
    peaks = [(output.maps[n, f] == output.maps[n, f].max()).nonzero()[0].tolist() for n, f in fresh.labels.nonzero()]
    hits = [tuple(peak) == lumps[n] for peak, (n, f) in zip(peaks, fresh.labels.nonzero().tolist(), strict=True)]
    assert sum(hits) > 0.9 * len(hits)
