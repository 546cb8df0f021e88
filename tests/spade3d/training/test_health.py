"""Signs of life against their definitions, written out slowly, and the alarm on what is alive and what is not."""

import math

import pytest
import torch

from spade3d.training.health import collapse, effective_rank, signs_of_life


def sphere(rows: int, dims: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(6)) == pytest.approx(6, rel=1e-5)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, rel=1e-3)
    assert effective_rank(torch.zeros(5, 3)) == 1.0
    p = torch.tensor([3.0, 1.0]) / 4  # singular values 3 and 1
    expected = math.exp(-sum(x * math.log(x) for x in p.tolist()))
    assert effective_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]])) == pytest.approx(expected, rel=1e-5)


def test_uniformity_and_alignment_equal_their_definitions():
    z, paired = sphere(7, 4), sphere(7, 4, seed=1)
    signs = signs_of_life(3 * z, 5 * paired)  # lengths do not count
    points, partners = z.tolist(), paired.tolist()
    pairs = [math.exp(-2 * math.dist(points[i], points[j]) ** 2) for i in range(7) for j in range(i)]
    assert signs["uniformity"] == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-5)
    aligned = sum(math.dist(a, b) ** 2 for a, b in zip(points, partners, strict=True)) / 7
    assert signs["alignment"] == pytest.approx(aligned, abs=1e-5)
    assert "alignment" not in signs_of_life(z)


def test_a_living_embedding_rings_no_alarm():
    signs = signs_of_life(sphere(256, 64))
    assert signs["spread"] == pytest.approx(1, abs=0.05)
    assert signs["rank"] > 50
    assert collapse(signs) is None


def test_few_rows_ring_no_alarm():
    assert collapse(signs_of_life(torch.ones(4, 16))) is None


@pytest.mark.parametrize("kind", ["one point", "one line", "not finite"])
def test_a_collapsed_embedding_rings(kind):
    z = {
        "one point": torch.ones(64, 32) + 1e-3 * sphere(64, 32),
        "one line": sphere(64, 1) * torch.ones(1, 32),  # two opposite points: spread is full, rank is not
        "not finite": torch.full((64, 32), math.nan),
    }[kind]
    message = collapse(signs_of_life(z))
    assert message is not None and "--optim.lr" in message


def test_large_sets_are_read_from_a_part():
    assert signs_of_life(sphere(5000, 8))["rows"] == 1667


def test_one_row_says_nothing():
    with pytest.raises(ValueError, match="2 rows"):
        signs_of_life(torch.ones(1, 4))
