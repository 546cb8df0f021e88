"""Whitening: what is read has no loud direction, and what hardly varies is not made all noise."""

import pytest
import torch
from torch import nn

from dagman.downstream.whitening import RIDGE, Moments, Whitening, moments_of


def test_whitened_cells_are_as_wide_in_every_direction_and_the_ridge_spares_what_hardly_varies():
    draw = torch.Generator().manual_seed(0)
    stretched = torch.diag(torch.tensor([30.0, 3, 3, 1e-4, 0]).double())
    rows = torch.randn(4000, 5, generator=draw, dtype=torch.float64) @ stretched
    rows = rows @ torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64))[0] + 7
    whitening = Whitening(5).double()
    (found,) = moments_of((some,) for some in rows.split(1500))
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)
    whitening.fit(found)
    torch.testing.assert_close(whitening.root, whitening.root.T)
    spreads = torch.linalg.eigvalsh(torch.cov(whitening(rows).T, correction=0)).sqrt()
    level = RIDGE * (30**2 + 2 * 3**2) / 5
    expected = torch.tensor([0, 0, *[3 / (9 + level) ** 0.5] * 2, 30 / (900 + level) ** 0.5], dtype=torch.float64)
    torch.testing.assert_close(spreads, expected, atol=0.03, rtol=0)
    alike = Whitening(5)
    alike.fit(Moments(torch.ones(5), torch.zeros(5, 5)))
    torch.testing.assert_close(alike(torch.full((2, 5), 3.0)), torch.full((2, 5), 2.0))


def test_rows_that_are_all_the_same_are_left_as_large_as_they_are():
    """Whatever rounding makes of them."""
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    whitening = Whitening(32)
    (found,) = moments_of([(row.expand(1000, 32),)])
    assert torch.linalg.eigvalsh(found.covariance).max() > 0  # rounding
    whitening.fit(found)
    torch.testing.assert_close(whitening(row + 1e-3), torch.full((1, 32), 1e-3), rtol=1e-3, atol=1e-7)


def test_whitening_before_a_linear_layer_is_one_product_of_both():
    torch.manual_seed(0)
    whitening, layer, x = Whitening(6), nn.Linear(6, 3), torch.randn(4, 7, 6)
    whitening.fit(moments_of([(torch.randn(50, 6) @ torch.randn(6, 6) + 2,)])[0])
    torch.testing.assert_close(whitening(x, layer), layer(whitening(x)), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert whitening(x, layer).dtype == torch.float32


def test_moments_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        moments_of([])
