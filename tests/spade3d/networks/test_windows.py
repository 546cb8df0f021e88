"""Windows: which cells meet, which bias they read, and attention against the slow way."""

import itertools
from math import prod

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spade3d.networks import attention_on_cpu, windows

CPU = torch.device("cpu")


def plan_of(grid, window, shift=(0, 0, 0), samples=1):
    return windows.window_plan(grid, *windows.clip_window(grid, window, shift), samples, CPU)


def offset_bias(table, window, pair):
    """The bias of (looks, is seen), read from the offset itself."""
    looks, seen = pair
    row = 0
    for side, a, b in zip(window, looks, seen):
        row = row * (2 * side - 1) + (a - b + side - 1)
    return table[row]


def slow_attention(q, k, v, table, grid, window, shift):
    """One sample, one head, cell by cell; q, k, v map a cell (or None, padding) to its vector."""
    clipped, shift = windows.clip_window(grid, window, shift)
    padded = [-(-size // side) * side for size, side in zip(grid, clipped)]
    cells = list(itertools.product(*map(range, padded)))
    rolled = {c: tuple((x - s) % p for x, s, p in zip(c, shift, padded)) for c in cells}
    home = {c: tuple(x // side for x, side in zip(rolled[c], clipped)) for c in cells}

    def vector(kind, c):
        return kind[c if all(x < size for x, size in zip(c, grid)) else None]

    out = {}
    for a in itertools.product(*map(range, grid)):
        # A window that the roll filled from both ends: only cells from the same end meet.
        meets = [b for b in cells if home[b] == home[a] and all(
            (x < s) == (y < s) for x, y, s in zip(a, b, shift)
        )]  # fmt: skip
        place = {c: tuple(x % side for x, side in zip(rolled[c], clipped)) for c in (a, *meets)}
        bias = torch.stack([offset_bias(table, window, (place[a], place[b])) for b in meets])
        scores = torch.stack([vector(q, a) @ vector(k, b) for b in meets]) / vector(q, a).shape[0] ** 0.5 + bias
        out[a] = scores.softmax(0) @ torch.stack([vector(v, b) for b in meets])
    return torch.stack([out[c] for c in itertools.product(*map(range, grid))])


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((4, 4, 4), (2, 2, 2), (0, 0, 0)),
        ((5, 3, 4), (2, 3, 3), (1, 1, 1)),
        ((5, 5, 3), (3, 3, 3), (1, 1, 1)),
        ((1, 2, 5), (3, 3, 3), (1, 1, 1)),
    ],
)
def test_attention_equals_the_slow_way(grid, window, shift):
    generator = torch.Generator().manual_seed(0)
    cells, heads, dim = grid[0] * grid[1] * grid[2], 2, 3
    qkv = torch.randn(2 * cells + 1, 3 * heads * dim, generator=generator, dtype=torch.float64)
    offsets = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
    table = torch.randn(offsets, heads, generator=generator, dtype=torch.float64)
    clipped, moved = windows.clip_window(grid, window, shift)
    out = windows.attend(qkv, windows.relative_bias(table, window, clipped, False), grid, clipped, moved)
    keys = list(itertools.product(*map(range, grid)))
    columns = qkv.view(-1, 3, heads, dim)
    for sample, head in itertools.product(range(2), range(heads)):
        q, k, v = (
            dict(
                zip(
                    [*keys, None],
                    [*columns[sample * cells : (sample + 1) * cells, part, head], columns[-1, part, head]],
                )
            )
            for part in range(3)
        )
        expected = slow_attention(q, k, v, table[:, head], grid, window, shift)
        got = out[sample * cells : (sample + 1) * cells].view(-1, heads, dim)[:, head]
        torch.testing.assert_close(got, expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Attention takes the way it takes there: torch's fused operation, which a CPU has, too."""
    monkeypatch.setattr(attention_on_cpu, "takes", lambda qkv: False)
    monkeypatch.setattr(windows, "fused", lambda qkv: True)


WHERE_FUSED = [
    ((8, 8, 8), 4, 0),
    ((8, 8, 8), 4, 2),  # masks
    ((9, 6, 11), 4, 2),  # and padding
    ((7, 7, 7), 7, 3),  # one window
    ((9, 8, 14), 7, 3),
    ((3, 9, 2), 7, 3),  # a window that the grid clips
]


@pytest.mark.parametrize("tile", [1, 2**15, 2**19])
@pytest.mark.parametrize(("grid", "window", "shift"), WHERE_FUSED)
def test_fused_attention_and_its_gradients_are_those_of_the_products(monkeypatch, request, grid, window, shift, tile):
    monkeypatch.setattr(windows, "TILE_SCORES_CPU", tile)
    where = grid, *windows.clip_window(grid, (window,) * 3, (shift,) * 3)
    cells = prod(where[1])
    chance = torch.Generator().manual_seed(0)
    qkv = torch.randn(2 * prod(grid) + 1, 3 * 2 * 8, generator=chance, requires_grad=True)
    bias = torch.randn(2, cells, cells, generator=chance, requires_grad=True)
    asked = torch.randn(2 * prod(grid), 16, generator=chance)

    def found(qkv, bias):
        out = windows.attend(qkv, bias, *where)
        return out, *torch.autograd.grad(out, (qkv, bias), asked.to(out.dtype))

    exact, kernels = found(qkv.double(), bias.double()), found(qkv, bias)
    request.getfixturevalue("as_on_a_gpu")
    fused, doubles = found(qkv, bias), found(qkv.double(), bias.double())
    for ours, twin, kernel, double in zip(fused, exact, kernels, doubles, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(double, twin)
        torch.testing.assert_close(ours, kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_keeps_the_precision_of_what_it_is_given(as_on_a_gpu, dtype):
    where = (5, 3, 4), (2, 3, 3), (1, 0, 1)
    chance = torch.Generator().manual_seed(0)
    exact, bias = torch.randn(61, 48, generator=chance), torch.randn(2, 18, 18, generator=chance)
    twin_qkv, twin_bias = exact.double().requires_grad_(), bias.double().requires_grad_()
    twin = windows.attend(twin_qkv, twin_bias, *where)
    qkv, bias = exact.to(dtype).requires_grad_(), bias.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = windows.attend(qkv, bias, *where)
    out.float().square().sum().backward()
    twin.square().sum().backward()
    assert out.dtype == qkv.grad.dtype == dtype and bias.grad.dtype == torch.float32
    off = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.double(), twin, rtol=0, atol=off)
    torch.testing.assert_close(qkv.grad.double(), twin_qkv.grad, rtol=0, atol=10 * off)
    torch.testing.assert_close(bias.grad.double(), twin_bias.grad, rtol=0.02, atol=10 * off)


def test_a_gpu_takes_the_fused_way_but_for_doubles():
    with FakeTensorMode():
        floats, doubles = (torch.empty(1, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float64))
        assert windows.fused(floats) and not windows.fused(doubles)
    assert not windows.fused(torch.empty(1))


def test_fused_attention_may_be_watched(as_on_a_gpu, torch_calls):
    """torch then calls an operation without autograd, which takes this one's backward."""
    qkv, bias = torch.randn(61, 12, requires_grad=True), torch.randn(2, 18, 18, requires_grad=True)
    where = (5, 3, 4), (2, 3, 3), (1, 0, 1)
    plain = torch.autograd.grad(windows.attend(qkv, bias, *where).square().sum(), (qkv, bias))
    with torch_calls() as watch:
        watched = torch.autograd.grad(windows.attend(qkv, bias, *where).square().sum(), (qkv, bias))
    assert watch.calls
    torch.testing.assert_close(watched, plain)


def test_fused_attention_is_one_operation_as_torch_wants_them(as_on_a_gpu):
    qkv, bias = torch.randn(61, 12, requires_grad=True), torch.randn(2, 18, 18, requires_grad=True)
    where = [5, 3, 4], [2, 3, 3], [1, 0, 1]
    said = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.spade3d.window_attention.default, (qkv, bias, *where), test_utils=said)


@pytest.mark.parametrize("tile", [1, 300, 2**19])
def test_the_backward_is_the_derivative(monkeypatch, tile):
    # Tiles of one head and one window, of some, and of everything.
    monkeypatch.setattr(windows, "TILE_SCORES_CPU", tile)
    where = (4, 3, 2), *windows.clip_window((4, 3, 2), (3, 2, 2), (1, 1, 1))
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(25, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5 * 3 * 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def attended(qkv, table):
        return windows.attend(qkv, windows.relative_bias(table, (3, 2, 2), (3, 2, 2), False), *where)

    assert torch.autograd.gradcheck(attended, (qkv, table), fast_mode=True)


def test_a_whole_window_reads_the_bias_through_the_stored_index():
    window = (3, 2, 4)
    table = torch.randn(5 * 3 * 7, 2)
    bias = windows.relative_bias(table, window, window, False)
    index = windows.relative_position_index(window)
    torch.testing.assert_close(bias, table[index].permute(2, 0, 1), rtol=0, atol=0)


def test_a_clipped_window_reads_each_pairs_own_offset_and_monais_reads_others():
    window, clipped = (7, 7, 7), (6, 6, 6)
    table = torch.arange(13**3, dtype=torch.float64)[:, None]
    correct = windows.relative_bias(table, window, clipped, False)[0]
    cells = list(itertools.product(range(6), repeat=3))
    slow = torch.tensor([[float(offset_bias(table, window, (a, b))) for b in cells] for a in cells])
    assert torch.equal(correct, slow.double())

    compatible = windows.relative_bias(table, window, clipped, True)[0]
    index = windows.relative_position_index(window)
    assert torch.equal(compatible, table[index[:216, :216], 0])
    assert (compatible == correct).double().mean() == pytest.approx(0.02, abs=0.002)  # performance.md: 2.0 %


def test_the_biass_gradient_does_not_depend_on_threads():
    def gradient():
        table = torch.linspace(-1, 1, 13**3 * 3).view(-1, 3).requires_grad_()
        bias = windows.relative_bias(table, (7, 7, 7), (7, 7, 7), False)
        (bias * torch.linspace(0, 1, bias.numel()).view_as(bias).sin()).sum().backward()
        return table.grad

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradient()
        torch.set_num_threads(2)
        assert all(torch.equal(gradient(), one) for _ in range(3))
    finally:
        torch.set_num_threads(before)


def test_a_plan_made_without_gradients_serves_a_training_step():
    windows.window_plan.cache_clear()
    qkv, table = torch.randn(28, 6), torch.randn(27, 1)

    def attended(qkv):
        bias = windows.relative_bias(table, (2, 2, 2), (2, 2, 2), False)
        return windows.attend(qkv, bias, (3, 3, 3), (2, 2, 2), (1, 1, 1))

    with torch.inference_mode():
        attended(qkv)
    qkv.requires_grad_()
    attended(qkv).sum().backward()
    assert qkv.grad.isfinite().all()


def test_every_cell_is_in_exactly_one_window():
    plan = plan_of((5, 9, 4), (3, 4, 4), (1, 2, 2), samples=3)
    real = plan.rows[plan.rows != plan.padding]
    assert torch.equal(real.sort().values, torch.arange(3 * 5 * 9 * 4))
    assert plan.padded
    assert plan.groups[0][0] == 0 and plan.groups[-1][1] == len(plan.rows)


@pytest.mark.parametrize("tile", [1, 300, 2**19])
def test_the_holes_of_a_tile_are_where_its_rows_are_padding(monkeypatch, tile):
    monkeypatch.setattr(windows, "TILE_SCORES_CPU", tile)
    plan = plan_of((5, 9, 4), (3, 4, 4), (1, 2, 2), samples=3)
    for some, _, _ in plan.tiles(heads=2):
        assert torch.equal(plan.holes_in(some), (plan.rows[some].flatten() == plan.padding).nonzero()[:, 0])
    assert sum(len(plan.holes_in(slice(n, n + 1))) for n in range(len(plan.rows))) == len(plan.holes) > 0


def test_no_tile_of_the_backward_asks_the_device_how_much_it_holds(torch_calls):
    """On a GPU each such question waits until all that was asked before is done."""
    plan = plan_of((5, 3, 4), (2, 3, 3), (1, 1, 1))
    qkv, bias = torch.randn(61, 12, dtype=torch.float64), torch.zeros(2, 18, 18, dtype=torch.float64)
    with torch_calls() as watch:
        out = windows._attended(qkv, bias, plan)
        windows._backward(torch.ones_like(out), qkv, bias, plan, out)
    assert plan.padded and watch.calls
    for asked, given in watch.calls:
        assert asked not in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        assert asked is not torch.ops.aten.index.Tensor or all(i is None or i.dtype != torch.bool for i in given[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_is_one_operation_as_torch_wants_them(dtype):
    """What torch.compile is told of it, shapes, precisions and gradients, is so: kernels of a CPU and products. What it
    makes of it is tried in compiled_encoder.py."""
    qkv = torch.randn(61, 12, dtype=dtype, requires_grad=True)
    bias = torch.randn(2, 18, 18, dtype=dtype, requires_grad=True)
    where = [5, 3, 4], [2, 3, 3], [1, 0, 1]
    said = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.spade3d.window_attention.default, (qkv, bias, *where), test_utils=said)


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_computed_in_the_precision_of_what_it_is_given(dtype, channels):
    """Whatever the autocast around it: in bf16 it is as near to the exact answer as bf16 can tell."""
    where = (5, 3, 4), (2, 3, 3), (1, 0, 1)
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(61, 6 * channels, generator=generator)
    bias = torch.randn(2, 18, 18, generator=generator)
    qkv = exact.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = windows.attend(qkv, bias, *where)
    assert out.dtype == dtype and torch.equal(out, windows.attend(qkv, bias, *where))
    off = 0 if dtype == exact.dtype else 2e-2
    torch.testing.assert_close(out.float(), windows.attend(exact, bias, *where), rtol=0, atol=off)
    out.float().square().sum().backward()
    assert qkv.grad.dtype == dtype and qkv.grad.isfinite().all()
