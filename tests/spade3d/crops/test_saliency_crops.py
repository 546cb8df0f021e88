"""Crops for the saliency predictor: image and saliency of the same places, more often where something is salient."""

import tracemalloc

import numpy as np
import pytest
import torch

from spade3d.crops.crop import Views
from spade3d.crops.saliency_crops import SaliencyStream, SalientSampling
from spade3d.volumes.preprocessing import Normalisation

SHAPE = (40, 36, 30)


@pytest.fixture(scope="module")
def store(in_memory):
    """Two scans whose image is their saliency (0..255), in other units; the second has none."""
    spot = np.zeros(SHAPE)
    spot[30:34, 8:12, 20:24] = np.random.default_rng(0).integers(1, 256, (4, 4, 4))
    made = in_memory(
        [spot, np.zeros(SHAPE)], spacing=(1.0, 1.0, 2.0), normalisation=Normalisation(0.0, 1.0, 0.0, 255.0)
    )
    made.saliency = lambda i, box=None: made.image(i, box).astype(np.uint8)
    return made


def sampling(**given):
    return SalientSampling((16, 16, 16), (1.0, 1.0, 2.0), **given)


def test_image_and_saliency_show_the_same_places(store):
    views = Views(gamma=(1.0, 1.0), contrast=(1.0, 1.0), brightness=0.0, blur=(0.0, 0.0), noise=0.0)
    stream = SaliencyStream(store, [0, 1], sampling(crops=4, salient=1.0, views=views))
    batch = stream.batch(3)
    assert batch.images.shape == batch.saliency.shape == (4, 1, 16, 16, 16) and len(batch) == 4
    assert np.allclose(batch.images / 255, batch.saliency, atol=1e-6)
    assert batch.saliency.max() > 0.1


def test_a_batch_is_a_function_of_seed_and_step(store):
    stream, again = (SaliencyStream(store, [0], sampling(), seed=4) for _ in range(2))
    (batch,) = again.stream(7, 8)
    assert np.array_equal(stream.batch(7).saliency, batch.saliency)
    assert not np.array_equal(stream.batch(8).images, batch.images)


def test_a_batch_is_pinned_whole(store, monkeypatch):
    """Into memory of another kind, which a machine without a GPU does not have."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    batch = SaliencyStream(store, [0], sampling()).batch(0)
    other = batch.pin_memory()
    assert [tensor is ours for tensor, ours in zip(pinned, (batch.images, batch.saliency), strict=True)] == [True] * 2
    assert other.images.equal(batch.images) and other.saliency.equal(batch.saliency) and other.scans == batch.scans


def test_crops_gather_around_what_is_salient(store):
    everywhere, salient = (SaliencyStream(store, [0], sampling(crops=24, salient=share)) for share in (0.0, 1.0))
    hits = [float((one.batch(0).saliency.amax((1, 2, 3, 4)) > 0).float().mean()) for one in (everywhere, salient)]
    assert hits[0] < 0.7 < hits[1]


def test_spots_of_a_large_scan_take_little_memory_beside_its_map(in_memory):
    large = in_memory([np.zeros((64, 128, 96))])
    values = np.random.default_rng(0).integers(0, 256, (64, 128, 96), dtype=np.uint8)
    large.saliency = lambda i, box=None: values
    tracemalloc.start()
    spots = SaliencyStream(large, [0], sampling()).spots[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(spots) and peak < values.nbytes  # the map as float64 would be eight times that


def test_spots_are_drawn_in_proportion_to_saliency(store):
    spots = (SaliencyStream(store, [0], sampling()).spots[0] / [1.0, 1.0, 2.0]).astype(int)
    drawn = np.zeros(SHAPE)
    np.add.at(drawn, tuple(spots.T), 1 / len(spots))
    share = store.saliency(0) / store.saliency(0).sum(dtype=float)
    assert (drawn[share == 0] == 0).all() and np.abs(drawn - share).max() < 0.01
    weights = store.saliency(0).ravel().astype(np.float64)  # a slow twin, of the whole map at once
    rest = np.random.default_rng([0, 0]).random(len(spots)) * weights.sum()
    at_once = np.searchsorted(weights.cumsum(), rest, side="right")
    assert np.array_equal(spots, np.stack(np.unravel_index(at_once, SHAPE), axis=1))
    assert len(SaliencyStream(store, [1], sampling()).spots[1]) == 0
    with pytest.raises(ValueError, match="no cases"):
        SaliencyStream(store, [], sampling())
