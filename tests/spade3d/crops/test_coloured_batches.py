"""Crops coloured together are those that the kernels colour one by one."""

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spade3d.crops import crop, kernels
from spade3d.crops.coloured_batches import Looks, coloured, gaussians
from spade3d.crops.crop import PLAIN, Intensity, Views, draw_intensity

PERCENTILES, Z_SCORES = SimpleNamespace(low=0.0, high=1.0), SimpleNamespace(low=-4.0, high=5.0)
sides = st.integers(1, 14)


def batch_of(looks, ranges, shape, rng):
    """Crops of any brightness within their ranges, some voxels at the very ends of them."""
    crops = []
    for look, norm in zip(looks, ranges, strict=True):
        least = 0.001 if look.blur > 0 else -0.1  # a test of its own: what a blur of the kernels does at the low end
        share = np.clip(rng.uniform(least, 1.1, shape), 0, 1)
        crops.append((norm.low + (norm.high - norm.low) * share).astype(np.float32))
    return torch.from_numpy(np.stack(crops)[:, None])


def check(clean, looks, ranges):
    """Together they are what each is alone; answers what was seen."""
    before, seen = clean.clone(), coloured(clean, Looks.of(looks, ranges))
    assert torch.equal(clean, before) and seen.dtype == torch.float32 and seen.is_contiguous()
    for one, alone, look, norm in zip(seen, clean, looks, ranges, strict=True):
        twin = crop.coloured(alone[0].numpy(), look, norm)
        np.testing.assert_allclose(one[0].numpy(), twin, rtol=0, atol=2e-6 * (norm.high - norm.low))
        assert norm.low <= one.min() and one.max() <= norm.high
    return seen


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 5),
    shape=st.tuples(sides, sides, sides),
    chance=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_batch_is_coloured_as_each_of_its_crops(seed, count, shape, chance):
    """Crops of odd and even counts of voxels, some narrower than the blur reaches (6 voxels)."""
    rng = np.random.default_rng(seed)
    views = Views(blur=(0.05, 2.0), blur_chance=chance, noise=[0.0, 0.05, 0.5][seed % 3])
    looks = [draw_intensity(rng, views) for _ in range(count)]
    ranges = [(PERCENTILES, Z_SCORES)[n] for n in rng.integers(0, 2, count)]
    check(batch_of(looks, ranges, shape, rng), looks, ranges)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (2, 9, 1), (5, 4, 3), (3, 5, 7)])
@pytest.mark.parametrize("norm", [PERCENTILES, Z_SCORES])
def test_a_crop_may_be_smaller_than_its_blur_reaches(shape, norm):
    """Blurs of 0, 1 and 9 voxels to each side share one table of weights."""
    looks = [Intensity(blur=3.0), PLAIN, Intensity(blur=0.3, gamma=1.4), Intensity(gamma=0.7, contrast=1.2)]
    check(batch_of(looks, [norm] * 4, shape, np.random.default_rng(0)), looks, [norm] * 4)


@pytest.mark.parametrize("norm", [PERCENTILES, Z_SCORES])
def test_a_crop_without_changes_stays_as_it_is(norm):
    clean = batch_of([PLAIN] * 2, [norm] * 2, (4, 5, 6), np.random.default_rng(0))
    seen = check(clean, [PLAIN, Intensity(noise_seed=5)], [norm] * 2)
    torch.testing.assert_close(seen, clean, rtol=0, atol=3e-7 * (norm.high - norm.low))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**62 + 12345, 2**63 - 1])
@pytest.mark.parametrize("count", [6, 4097])
def test_noise_is_that_of_the_kernels(seed, count):
    """Every hash whole: one wrong bit of a byte moves a voxel by at least 0.0068 standard deviations."""
    wide = SimpleNamespace(low=-8.0, high=8.0)
    looks = [Intensity(noise=1.0, noise_seed=seed), Intensity(noise=1.0, noise_seed=seed // 3)]
    seen = coloured(torch.zeros(2, 1, 1, 1, count), Looks.of(looks, [wide] * 2)).flatten(1)
    for one, look in zip(seen, looks, strict=True):
        noise = np.zeros(count, np.float32)
        kernels.recolour(noise, np.array([1, 1, 0, 1], np.float32), look.noise_seed, 0, np.float32(-8), np.float32(8))
        np.testing.assert_allclose(one.numpy(), noise, rtol=0, atol=5e-6)
        assert count < 100 or noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("gamma", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("blur", [0.0, 0.3, 0.77, 1.5])
def test_air_stays_exactly_dark(gamma, blur):
    """Blurred too, where what the kernels round becomes visible: at 1.5 voxels and gamma 0.3 they leave 0.08."""
    air = torch.full((1, 1, 9, 8, 7), -4.0)
    assert torch.equal(coloured(air, Looks.of([Intensity(gamma=gamma, blur=blur)], [Z_SCORES])), air)


def test_weights_are_a_gaussian_as_far_as_each_one_reaches():
    near, far = gaussians([0.4, 0.9]).double().tolist()
    assert near == pytest.approx(bell(0.4, 2, 3), abs=1e-7) and far == pytest.approx(bell(0.9, 3, 3), abs=1e-7)
    assert near[0] == near[6] == 0 and math.fsum(near) == pytest.approx(1, abs=2e-7)
    assert gaussians([]).shape == (0, 1)


def bell(sigma, radius, widest):
    raw = [math.exp(-0.5 * (t / sigma) ** 2) if abs(t) <= radius else 0.0 for t in range(-widest, widest + 1)]
    return [one / sum(raw) for one in raw]


def drawn_looks(count, seed=0, **views):
    rng = np.random.default_rng(seed)
    return [draw_intensity(rng, Views(**views)) for _ in range(count)]


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_the_device_is_asked_for_no_value(torch_calls, chance):
    """A GPU is waited for each time; nor is it sent numbers of Python."""
    looks = Looks.of(drawn_looks(4, blur_chance=chance), [PERCENTILES] * 4)
    clean, aten = torch.rand(4, 1, 5, 6, 7), torch.ops.aten
    with torch_calls() as watch:
        coloured(clean, looks)
    waits = {aten.nonzero, aten._local_scalar_dense, aten.lift_fresh, aten.masked_select, aten.equal, aten.is_nonzero}
    assert len(watch.calls) > 20
    for asked, given_to in watch.calls:
        assert asked.overloadpacket not in waits
        assert asked.overloadpacket is not aten.index or all(i is None or i.dtype != torch.bool for i in given_to[1])


def test_as_many_calls_however_many_crops_there_are(torch_calls):
    calls = []
    for count in (2, 9):
        looks = Looks.of([Intensity(blur=0.8)] * count, [PERCENTILES] * count)
        with torch_calls() as watch:
            coloured(torch.rand(count, 1, 3, 4, 5), looks)
        calls.append([asked for asked, _ in watch.calls])
    assert calls[0] == calls[1]


def test_precision_is_that_of_float32_whatever_the_autocast_around_it():
    looks = Looks.of(drawn_looks(3, blur_chance=0.5), [Z_SCORES, PERCENTILES, Z_SCORES])
    clean = torch.rand(3, 1, 6, 5, 7)
    seen = coloured(clean, looks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = coloured(clean, looks)
    assert again.dtype == torch.float32 and torch.equal(again, seen)
    coarse = clean.bfloat16()
    assert torch.equal(coloured(coarse, looks), coloured(coarse.float(), looks))


def test_the_order_of_voxels_in_memory_does_not_show():
    """Noise goes by the place of a voxel in the crop; here the crops lie side by side, back to front."""
    looks = drawn_looks(3, blur_chance=0.5, noise=0.5)
    clean = torch.rand(7, 6, 5, 1, 3).permute(4, 3, 2, 1, 0)
    assert not clean.is_contiguous()
    check(clean, looks, [PERCENTILES] * 3)


def test_no_gradient_goes_through_it():
    clean = torch.rand(1, 1, 3, 4, 5, requires_grad=True)
    assert not coloured(clean, Looks.of([PLAIN], [PERCENTILES])).requires_grad


def test_looks_hold_what_was_drawn_for_each_crop():
    drawn = drawn_looks(5, blur_chance=0.5)
    drawn[1], drawn[3] = replace(drawn[1], blur=0.0), replace(drawn[3], blur=0.9, noise_seed=2**63 - 1)
    looks = Looks.of(drawn, [PERCENTILES, Z_SCORES] * 2 + [PERCENTILES])
    assert len(looks) == 5 and looks.low.tolist() == [0, -4, 0, -4, 0] and looks.high.tolist() == [1, 5, 1, 5, 1]
    for name in ("gamma", "contrast", "brightness", "noise"):
        assert getattr(looks, name).tolist() == [np.float32(getattr(one, name)) for one in drawn]
    assert looks.seed.tolist() == [one.noise_seed for one in drawn]
    assert looks.blurred.tolist() == [n for n, one in enumerate(drawn) if one.blur > 0]
    assert looks.weights.equal(gaussians([one.blur for one in drawn if one.blur > 0]))


def test_looks_move_whole():
    looks = Looks.of(drawn_looks(2, blur_chance=1.0), [PERCENTILES] * 2)
    moved = looks.to(torch.device("meta"))
    assert isinstance(moved, Looks) and moved is not looks
    for field in fields(Looks):
        ours, theirs = getattr(looks, field.name), getattr(moved, field.name)
        assert theirs.is_meta and not ours.is_meta and (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)


def test_looks_are_pinned_whole(monkeypatch):
    """Into memory of another kind, which a machine without a GPU does not have."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    looks = Looks.of(drawn_looks(2, blur_chance=1.0), [PERCENTILES] * 2)
    other = looks.pin_memory()
    names = [field.name for field in fields(Looks)]
    assert [tensor is getattr(looks, name) for tensor, name in zip(pinned, names, strict=True)] == [True] * 9
    assert all(getattr(other, name).equal(getattr(looks, name)) for name in names)


def test_no_crops_are_no_crops():
    assert coloured(torch.empty(0, 1, 3, 4, 5), Looks.of([], [])).shape == (0, 1, 3, 4, 5)


def test_looks_and_crops_must_be_as_many():
    with pytest.raises(ValueError, match="2 looks and 1 normalisations; each crop needs one of both"):
        Looks.of([PLAIN] * 2, [PERCENTILES])
    with pytest.raises(ValueError, match="1 looks for 3 crops; give Looks.of one Intensity a crop"):
        coloured(torch.rand(3, 1, 2, 2, 2), Looks.of([PLAIN], [PERCENTILES]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_colours_as_the_kernels_do():
    looks, ranges = drawn_looks(6, blur_chance=0.5), [PERCENTILES, Z_SCORES] * 3
    clean, there = batch_of(looks, ranges, (31, 33, 35), np.random.default_rng(0)), torch.device("cuda")
    seen = check(clean, looks, ranges)
    given_there, looks_there = clean.pin_memory().to(there), Looks.of(looks, ranges).pin_memory().to(there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            on_gpu = coloured(given_there, looks_there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(on_gpu.cpu(), seen, rtol=0, atol=2e-5)
