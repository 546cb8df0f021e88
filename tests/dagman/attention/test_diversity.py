"""Head diversity: entropy, distance and divergence by hand, against plain loops, and on an encoder that looks alike."""

import math

import pytest
import torch
from torch import nn

from dagman.attention import diversity
from dagman.attention.diversity import block_diversities, diversity_of, head_diversity
from spade3d.faults import UsageFault
from spade3d.networks.swin import AttentionMap, SwinTransformer

SHAPE = (22, 17, 9)  # 11 x 9 x 5 tokens: windows of 4 are padded, shifted and clipped
SPACING = (1.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def encoder() -> SwinTransformer:
    torch.manual_seed(0)
    encoder = SwinTransformer(1, 12, depths=(2, 2, 3, 2), heads=(3, 2, 4, 6), window=(4, 4, 4), drop_path=0.5)
    for name, parameter in encoder.named_parameters():
        if "qkv" in name or name.endswith("table"):
            nn.init.normal_(parameter, std=0.3)  # at the start of a training all look everywhere
    return encoder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))


def two_cells(*heads: tuple[tuple[float, ...], tuple[float, ...]]) -> AttentionMap:
    """Two cells side by side along i in one window, and the rows of each head."""
    weights = torch.tensor(heads)[None, None]
    padding = weights.shape[-1] - 2
    weights = torch.nn.functional.pad(weights, (0, 0, 0, padding))  # what padding asks does not matter
    return AttentionMap(weights, torch.tensor([[0, 1] + [-1] * padding]), (2, 1, 1))


def plain(found) -> tuple[list[float], list[float], float]:
    return found.entropy.tolist(), found.distance_mm.tolist(), found.divergence.item()


def test_a_head_that_looks_everywhere_alike_has_entropy_one_and_a_one_hot_head_none():
    even, itself, other = ((0.5, 0.5), (0.5, 0.5)), ((1.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 0.0))
    found = diversity_of(two_cells(even, itself, other), (2, 2, 2), (5.0, 7.0, 7.0))
    assert found.entropy.tolist() == pytest.approx([1, 0, 0]) and found.distance_mm.tolist() == [2.5, 0, 5]


def test_equal_heads_do_not_diverge_and_heads_that_share_no_cell_do_wholly():
    lean, itself, other = ((0.9, 0.1), (0.2, 0.8)), ((1.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 0.0))
    for heads, expected in (((lean, lean, lean), 0), ((itself, other), 1), ((itself, itself, other), 2 / 3)):
        found = diversity_of(two_cells(*heads), (2, 2, 2), (1.0, 1.0, 1.0))
        assert found.divergence.item() == pytest.approx(expected, abs=1e-6)


def test_what_falls_on_padding_is_left_out():
    padded = two_cells(((0.3, 0.3, 0.4), (0.1, 0.1, 0.8)), ((0.2, 0.0, 0.8), (0.0, 0.9, 0.1)))
    found = diversity_of(padded, (3, 1, 1), (4.0, 1.0, 1.0))
    assert plain(found) == plain(
        diversity_of(two_cells(((0.5, 0.5),) * 2, ((1.0, 0.0), (0.0, 1.0))), (3, 1, 1), (4.0, 1.0, 1.0))
    )
    assert found.entropy.tolist() == pytest.approx([1, 0])


def test_a_single_cell_has_no_entropy_and_a_single_head_no_divergence():
    alone = AttentionMap(torch.ones(1, 1, 1, 1, 1), torch.tensor([[0]]), (1, 1, 1))
    found = diversity_of(alone, (4, 4, 4), (1.0, 1.0, 1.0))
    assert found.entropy.isnan().all() and found.distance_mm.tolist() == [0] and found.divergence.isnan()


def slow(attention: AttentionMap, cell_mm) -> tuple[list[float], list[float], float]:
    """The formulas in plain loops; that a cell may not be seen is read from its weight, which is then 0 exactly."""
    weights, cells = attention.weights.double().tolist(), attention.cells.tolist()
    _, rows, columns = attention.grid
    samples, heads = len(weights), len(weights[0][0])
    entropy, distance, divergence = [[] for _ in range(heads)], [[] for _ in range(heads)], []
    for sample in range(samples):
        for w, window in enumerate(cells):
            for q, query in enumerate(window):
                if query < 0:
                    continue
                seen = [m for m, cell in enumerate(window) if cell >= 0 and weights[sample][w][0][q][m] > 0]
                rows_of = []
                for head in range(heads):
                    row = [weights[sample][w][head][q][m] for m in seen]
                    row = [value / sum(row) for value in row]
                    rows_of.append(row)
                    if len(seen) > 1:
                        entropy[head].append(information(row) / math.log(len(seen)))
                    distance[head].append(
                        sum(value * apart(query, window[m], rows, columns, cell_mm) for value, m in zip(row, seen))
                    )
                pairs = [(a, b) for a in range(heads) for b in range(a)]
                divergence += [jensen_shannon(rows_of[a], rows_of[b]) for a, b in pairs]
    return [mean(some) for some in entropy], [mean(some) for some in distance], mean(divergence)


def apart(a: int, b: int, rows: int, columns: int, cell_mm) -> float:
    places = [(cell // (rows * columns), cell // columns % rows, cell % columns) for cell in (a, b)]
    return math.dist(*([at * mm for at, mm in zip(place, cell_mm)] for place in places))


def information(p: list[float]) -> float:
    return -sum(value * math.log(value) for value in p if value)


def jensen_shannon(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q)]
    return (information(middle) - (information(p) + information(q)) / 2) / math.log(2)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_an_encoder_is_measured_as_the_loops_measure_it(encoder, images, stage):
    encoder.eval()
    image = images[:, :, :13] if stage == 1 else images  # the loops take their time
    blocks = block_diversities(encoder, image, SPACING, (stage,), None)[stage]
    cell_mm = [2**stage * mm for mm in SPACING]
    maps = encoder.attention_maps(image, stage)
    assert len(blocks) == len(maps) > 1
    for found, attention in zip(blocks, maps, strict=True):
        entropy, distance_mm, divergence = slow(attention, cell_mm)
        assert found.entropy.tolist() == pytest.approx(entropy, abs=1e-5)
        assert found.distance_mm.tolist() == pytest.approx(distance_mm, rel=1e-5)
        assert found.divergence.item() == pytest.approx(divergence, abs=1e-5)


def test_a_compiled_encoder_is_measured_all_the_same(encoder, images, monkeypatch):
    """It is read block by block, which one graph does not allow."""
    plain = head_diversity(encoder, images, SPACING)
    monkeypatch.setattr(encoder, "_compiled_call_impl", lambda *_, **__: pytest.fail("one graph was asked"))
    assert head_diversity(encoder, images, SPACING) == plain


def test_piece_by_piece_is_all_at_once(encoder, images, monkeypatch):
    at_once = head_diversity(encoder, images, SPACING)
    monkeypatch.setattr(diversity, "SCORES", 1)
    assert head_diversity(encoder, images, SPACING) == pytest.approx(at_once, rel=1e-5)


def test_a_draw_of_queries_says_nearly_what_all_say(encoder, images):
    every, some = (head_diversity(encoder, images, SPACING, (1, 2), most) for most in (None, 100))
    assert some != every and some == pytest.approx(every, rel=0.1)
    assert head_diversity(encoder, images, SPACING, (1, 2), 100) == some


def test_the_numbers_of_a_stage_are_means_over_its_heads(encoder, images):
    said = head_diversity(encoder, images, SPACING, (3,))
    blocks = block_diversities(encoder, images, SPACING, (3,))[3]
    entropy = torch.stack([block.entropy for block in blocks])
    assert list(said) == ["stage3.entropy", "stage3.entropy_spread", "stage3.distance_mm", "stage3.divergence"]
    assert said["stage3.entropy"] == pytest.approx(entropy.mean().item()) and 0 < said["stage3.entropy"] < 1
    assert said["stage3.entropy_spread"] == pytest.approx(entropy.std(correction=0).item()) and entropy.std() > 0
    assert said["stage3.divergence"] == pytest.approx(sum(block.divergence.item() for block in blocks) / 3)


def test_heads_that_weigh_nothing_look_everywhere_alike_at_every_stage(images):
    even = SwinTransformer(1, 12, heads=(3, 2, 4, 6), window=(4, 4, 4))
    for name, parameter in even.named_parameters():
        if "qkv" in name or name.endswith("table"):
            nn.init.zeros_(parameter)
    said = head_diversity(even, images, SPACING)
    for stage in (1, 2, 3, 4):
        assert said[f"stage{stage}.entropy"] == pytest.approx(1, abs=1e-5)
        assert said[f"stage{stage}.entropy_spread"] == pytest.approx(0, abs=1e-5)
        assert said[f"stage{stage}.divergence"] == pytest.approx(0, abs=1e-5)
        assert said[f"stage{stage}.distance_mm"] > 0
    double = head_diversity(even, images, tuple(2 * mm for mm in SPACING))
    assert double["stage3.distance_mm"] == pytest.approx(2 * said["stage3.distance_mm"])


def test_measuring_leaves_a_training_as_it_was(encoder, images):
    encoder.train()
    chance = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_training = head_diversity(encoder, images.bfloat16().float(), SPACING)
    assert encoder.training and encoder.layers1[0].training and torch.equal(torch.get_rng_state(), chance)
    assert all(not block._forward_pre_hooks for block in encoder.layers1[0].blocks)
    assert head_diversity(encoder.eval(), images.bfloat16().float(), SPACING) == in_training
    assert not encoder.training


def test_a_stage_that_there_is_not_is_refused(encoder, images):
    with pytest.raises(UsageFault, match="stages 1 to 4"):
        head_diversity(encoder, images, SPACING, (0, 3))
