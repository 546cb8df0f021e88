"""Classes of a scan on the grid it was given on: every voxel right on any grid, and never all logits in memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dagman.downstream import inference
from dagman.downstream.inference import predict_classes
from spade3d.faults import Fault
from spade3d.networks.sliding import sliding_window
from spade3d.volumes.geometry import canonical_flips, resample
from spade3d.volumes.phantoms import ramp
from spade3d.volumes.volume import Grid

CPU = torch.device("cpu")
PREPARED = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, 5], [0, 0, 2.5, 40], [0, 0, 0, 1]])
SHAPE = (20, 12, 16)
PLACES = {"R": (0, 11.3), "A": (1, 20.5), "S": (2, 57.0)}  # axis, and the mm beyond which there is class 1

SOURCES = {
    "the prepared grid": Grid(SHAPE, PREPARED),
    "finer": Grid((60, 50, 52), np.array([[0.6, 0, 0, -9.7], [0, 0.65, 0, 5.2], [0, 0, 0.7, 40.1], [0, 0, 0, 1]])),
    "coarser and turned": Grid(  # axes P, S, L
        (7, 8, 9), np.array([[0, 0, -4.0, 27], [-4.5, 0, 0, 37], [0, 4.7, 0, 41], [0, 0, 0, 1]])
    ),
    "finer, coarser and wider": Grid(
        (70, 9, 24), np.array([[0.7, 0, 0, -13.1], [0, 5.0, 0, 4.0], [0, 0, 2.5, 30.0], [0, 0, 0, 1]])
    ),
}


def found_on(source: Grid, logits, image, *, classes=2, window=(12, 8, 16), overlap=0.5, batch=None, affine=PREPARED):
    return predict_classes(
        logits,
        image,
        affine,
        source,
        classes=classes,
        window=window,
        overlap=overlap,
        device=CPU,
        fill=0.0,
        batch=batch,
    )


@pytest.mark.parametrize("grid", list(SOURCES)[:3])
@pytest.mark.parametrize("axis", PLACES)
def test_a_plane_is_found_where_it_is_on_every_grid(axis, grid):
    """Logits that are linear in mm are carried over exactly, so every voxel is right, not nearly all."""
    (which, border_mm), source = PLACES[axis], SOURCES[grid]
    image = ramp(SHAPE, PREPARED, np.float32)[..., which]
    found = found_on(source, lambda x: torch.cat([border_mm - x, x - border_mm], dim=1), image)
    turned = canonical_flips(source.affine, source.shape)
    place_mm = ramp(turned.canonical_shape, turned.affine(source.affine))[..., which]
    assert found.dtype == np.uint8 and found.shape == turned.canonical_shape
    np.testing.assert_array_equal(found, place_mm > border_mm)
    assert 0 < found.mean() < 1


def test_what_was_not_prepared_is_background():
    wider = Grid((30, 12, 16), PREPARED + [[0, 0, 0, -10], [0] * 4, [0] * 4, [0] * 4])  # 5 voxels more on each side
    found = found_on(wider, lambda x: torch.cat([x * 0 - 1, x * 0 + 1], dim=1), np.zeros(SHAPE, np.float32))
    assert not found[:5].any() and not found[-5:].any() and found[5:-5].all()


def carried_whole(logits, image, source, classes, window, overlap):
    """The slow twin: every map held, carried over by scipy, and compared."""
    blended = sliding_window(logits, image, window, overlap, classes=classes)
    turn = canonical_flips(source.affine, source.shape)
    there = turn.affine(source.affine)
    maps = [
        resample(one.numpy(), PREPARED, there, turn.canonical_shape, 1, -np.inf if c else 0.0)
        for c, one in enumerate(blended)
    ]
    return np.argmax(maps, axis=0), np.sort(maps, axis=0)


@pytest.fixture(params=["by the kernel", "by torch"])
def way(request, monkeypatch):
    """What decides on a CPU, and what decides on a GPU, a few rows at a time."""
    if request.param == "by torch":
        monkeypatch.setattr(inference, "_by_kernel", inference._by_torch)
        monkeypatch.setattr(inference, "ROOM", 2**12)


@pytest.mark.parametrize("grid", SOURCES)
@pytest.mark.parametrize(
    ("window", "overlap", "batch"),
    [((8, 12, 16), 0.5, 1), ((20, 4, 16), 0.5, 3), ((20, 12, 5), 0.7, 2), ((6, 5, 4), 0.0, 4), ((24, 24, 24), 0.5, 1)],
)
def test_slab_by_slab_gives_what_carrying_all_maps_over_gives(way, grid, window, overlap, batch):
    """Slabs along each of the three axes, layers that touch and layers that reach over several others."""
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 5, 3, padding=1)
    image = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    source = SOURCES[grid]
    found = found_on(source, network, image, classes=5, window=window, overlap=overlap, batch=batch)
    whole, sorted_maps = carried_whole(network, image, source, 5, window, overlap)
    clear = sorted_maps[-1] - sorted_maps[-2] > 1e-5  # elsewhere rounding decides
    np.testing.assert_array_equal(found[clear], whole[clear])
    assert clear.mean() > 0.999 and len(np.unique(found)) == 5


def test_grids_that_are_not_parallel_and_answers_that_are_no_numbers_are_refused(way):
    turned = PREPARED.copy()
    turned[:3, :3] = turned[:3, :3] @ np.array([[0.99, -0.14107, 0], [0.14107, 0.99, 0], [0, 0, 1.0]])
    image = np.zeros(SHAPE, np.float32)
    with pytest.raises(ValueError, match="not parallel"):
        found_on(Grid(SHAPE, turned), lambda x: torch.cat([x, x], dim=1), image)
    with pytest.raises(Fault, match="the network answers NaN or Inf"):
        found_on(Grid(SHAPE, PREPARED), lambda x: torch.cat([x, x / 0 * 0], dim=1), image)


SCRIPT = """
import sys
import numpy as np
import torch
from dagman.downstream import inference
from dagman.downstream.inference import predict_classes
from spade3d.volumes.volume import Grid

def answer(crops):
    return crops.expand(-1, 14, -1, -1, -1) * torch.arange(14.0)[:, None, None, None]

def peak_of(length):
    shape, fine = (24, 24, length), np.diag([0.5, 0.5, 0.5, 1.0])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here
    before = resident("VmRSS")
    source = Grid((48, 48, 2 * length), fine)
    found = predict_classes(answer, np.zeros(shape, np.float32), np.eye(4), source, classes=14, window=(16, 16, 16),
                            overlap=0.5, device=torch.device("cpu"), fill=0.0)
    return resident("VmHWM") - before - found.nbytes

def resident(what):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))

peak_of(64)
print(peak_of(200), peak_of(3200))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_longer_scan_takes_no_more_memory():
    """All 14 maps of the longer scan take 103 MB as prepared, and 826 MB on the grid of the source."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is gone
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, encoding="utf-8", env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    short, long = (int(peak) for peak in done.stdout.split())
    scan = 24 * 24 * 3200 * 4  # bytes: what goes in, which is counted, too
    assert long < short + 2 * scan, (short, long)
