"""The kernels of a CPU against the products of `windows`, which doubles and accelerators go by."""

import numpy as np
import pytest
import torch

from spade3d.networks import window_kernels, windows


def attended(grid, window, shift, heads=2, dim=4, samples=2, dtype=torch.float32, spread=1.0, seed=0):
    """Output and gradients, float64, of the same numbers in some precision."""
    clipped, shift = windows.clip_window(grid, window, shift)
    rows = samples * grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(seed)
    n = clipped[0] * clipped[1] * clipped[2]
    qkv = spread * torch.randn(rows + 1, 3 * heads * dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(heads, n, n, generator=generator, dtype=torch.float64)
    wanted = torch.randn(rows, heads * dim, generator=generator, dtype=torch.float64)
    qkv, bias = qkv.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
    out = windows.attend(qkv, bias, grid, clipped, shift)
    gradients = torch.autograd.grad((out * wanted.to(dtype)).sum(), (qkv, bias))
    return [tensor.double() for tensor in (out.detach(), *gradients)]


GRIDS = [
    ((4, 4, 4), (2, 2, 2), (0, 0, 0)),  # windows that fit
    ((5, 3, 4), (2, 3, 3), (1, 1, 1)),  # padding, and every kind of mask
    ((9, 5, 7), (4, 4, 4), (2, 2, 2)),
    ((1, 2, 5), (3, 3, 3), (1, 1, 1)),  # clipped along two axes
    ((7, 7, 6), (7, 7, 7), (0, 0, 0)),  # one window
]


@pytest.mark.parametrize(("grid", "window", "shift"), GRIDS)
@pytest.mark.parametrize("dim", [1, 3, 4, 6, 16])
def test_the_kernels_say_what_the_products_say(grid, window, shift, dim):
    exact = attended(grid, window, shift, dim=dim, dtype=torch.float64)
    for ours, its in zip(attended(grid, window, shift, dim=dim), exact, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5 * its.abs().max())


@pytest.mark.parametrize("heads", [1, 3, 20])
def test_any_number_of_threads_gives_the_same_bits(heads):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attended((9, 5, 7), (4, 4, 4), (2, 2, 2), heads=heads))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_no_call_between_kernels_is_left():
    """Left calls gave other last bits in the process that compiled them than in those that read the cache."""
    kernels = {name: one for name, one in vars(window_kernels).items() if hasattr(one, "targetoptions")}
    called = {name for name in kernels if name.startswith("_")}
    assert kernels.keys() - called == {"attend_parts", "backward_parts"} and len(called) > 5
    assert all(kernels[name].targetoptions["forceinline"] for name in called)


@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_scores_of_thousands_are_no_trouble(spread):
    exact = attended((5, 3, 4), (2, 3, 3), (1, 1, 1), spread=spread, dtype=torch.float64)
    for ours, its in zip(attended((5, 3, 4), (2, 3, 3), (1, 1, 1), spread=spread), exact, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-3 * its.abs().max())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(broken):
    """One broken token breaks every place that looks at it, and none of another window."""
    where = (4, 2, 2), (2, 2, 2), (0, 0, 0)
    for part in range(3):
        qkv = torch.randn(17, 6)
        qkv[3, 2 * part] = broken
        out = windows.attend(qkv, torch.zeros(1, 8, 8), *where)
        assert not out[:8].isfinite().all() and out[8:].isfinite().all()


def exp_in_place(x):
    totals = np.zeros(1, np.float32)
    window_kernels._exp_in_place(x[None], np.zeros(1, np.float32), totals)
    return totals[0]


def test_the_exponential_is_exact_enough_and_ends_at_zero():
    x = np.linspace(-100, 0, 100_001, dtype=np.float32)
    y = x.copy()
    total = exp_in_place(y)
    exact = np.where(x < -87.33, 0, np.exp(x.astype(np.float64)))
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1.2e-38)
    np.testing.assert_allclose(y[x > -4], exact[x > -4], rtol=5e-7)
    assert total == pytest.approx(y.sum(dtype=np.float64), rel=1e-5)
    hidden = np.array([-np.inf, 0.0], np.float32)
    assert exp_in_place(hidden) == 1 and hidden.tolist() == [0, 1]


def test_what_needs_no_gradient_gets_none():
    where = (4, 2, 2), (2, 2, 2), (0, 0, 0)
    with torch.inference_mode():
        out = windows.attend(torch.randn(17, 6), torch.zeros(1, 8, 8), *where)
    assert out.shape == (16, 2) and not out.requires_grad
