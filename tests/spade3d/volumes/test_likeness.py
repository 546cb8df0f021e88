"""Likeness: copies of a scan are known whatever was done to their grid and units, and patients are told apart."""

import hashlib
import itertools
from functools import cache

import numpy as np
import pytest

from spade3d.volumes import likeness as rules
from spade3d.volumes.geometry import apply_affine, resample
from spade3d.volumes.likeness import ALIKE, BITS, LIKE, likeness, unlikeness, unlikenesses
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.volume import Volume, read_volume


@cache
def scan(seed: int, kind: str = "abdomen-ct") -> Volume:
    drawn = phantom(kind, seed, shape=(48, 48, 32), spacing=(7.5, 7.5, 8.5))
    return Volume(drawn.voxels, drawn.affine)


@pytest.fixture(scope="module")
def one() -> Volume:
    return scan(0)


def on_grid(volume: Volume, factor: tuple[float, float, float]) -> Volume:
    """The same scan with a spacing `factor` as large."""
    scale = np.diag([*factor, 1.0])
    scale[:3, 3] = (np.array(factor) - 1) / 2
    shape = tuple(int(n / f) for n, f in zip(volume.shape, factor))
    affine = volume.affine @ scale
    return Volume(resample(volume.voxels.astype(np.float32), volume.affine, affine, shape, 1, -1000.0), affine)


def reordered(volume: Volume) -> Volume:
    """The same scan stored as (k, i, j), two axes backwards; its affine says so."""
    size_i, size_j, size_k = volume.shape
    back = np.array([[0, 1, 0, 0], [0, 0, -1, size_j - 1], [-1, 0, 0, size_k - 1], [0, 0, 0, 1.0]])
    return Volume(volume.voxels.transpose(2, 0, 1)[::-1, :, ::-1], volume.affine @ back)


def padded(volume: Volume) -> Volume:
    margin = (6, 4, 0)
    affine = volume.affine.copy()
    affine[:3, 3] = apply_affine(affine, -np.array(margin, float))
    return Volume(np.pad(volume.voxels, [(n, n) for n in margin], constant_values=-1000), affine)


def eight_bit(volume: Volume) -> Volume:
    return Volume((np.clip(volume.voxels, -1000, 1000) / 2000 * 255 + 128).astype(np.uint8), volume.affine)


COPIES = {
    "coarser": lambda v: on_grid(v, (1.5, 1.5, 1.2)),
    "finer": lambda v: on_grid(v, (0.7, 0.7, 0.7)),
    "anisotropic": lambda v: on_grid(v, (2.0, 1.3, 1.0)),
    "padded with air": padded,
    "8 bit": eight_bit,
    "all of it": lambda v: reordered(eight_bit(padded(on_grid(v, (1.3, 1.3, 1.2))))),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_copy_is_known(one, change):
    assert unlikeness(likeness(one), likeness(COPIES[change](one))) <= LIKE


def test_order_of_axes_gain_offset_and_type_change_next_to_nothing(one):
    mine = likeness(one)
    assert likeness(reordered(one)) == mine
    mr = scan(1, "heart-mr")
    for other in (mr.voxels * 3.7 + 11, mr.voxels.astype(">f8"), mr.voxels.astype(np.int32) * 100):
        assert unlikeness(likeness(mr), likeness(Volume(other, mr.affine))) < 0.01
    moved = one.affine + np.array([[0, 0, 0, 40.0], [0, 0, 0, -90.0], [0, 0, 0, 7.0], [0, 0, 0, 0]])
    assert unlikeness(mine, likeness(Volume(one.voxels, moved))) < 0.01


@pytest.mark.parametrize("kind", ["abdomen-ct", "heart-mr"])
def test_patients_are_told_apart(kind):
    known = [likeness(scan(seed, kind)) for seed in range(5)]
    apart = unlikenesses(known, known)
    assert min(apart[i, j] for i, j in itertools.combinations(range(5), 2)) > ALIKE
    assert not apart.diagonal().any()


def test_real_patients_are_told_apart_and_their_copies_known(shared_data):
    """Cropped hippocampi look alike to the eye; two phases of one heart are one patient, and are found to be."""
    files = sorted((shared_data / "hippocampus_mr" / "imagesTr").glob("*.nii.gz"))[:20:2]
    hippocampi = [read_volume(file) for file in files]
    known = [likeness(volume) for volume in hippocampi]
    apart = unlikenesses(known, known) + np.eye(len(known))
    assert apart.min() > ALIKE
    copies = [likeness(reordered(on_grid(volume, (1.4, 1.4, 1.0)))) for volume in hippocampi]
    assert unlikenesses(known, copies).diagonal().max() <= LIKE
    hearts = shared_data / "sunnybrook_heart_mr" / "images"
    first, later, other = (
        likeness(read_volume(hearts / f"{name}.nii.gz")) for name in ("SC-N-02_ED", "SC-N-02_ES", "SC-N-03_ED")
    )
    assert unlikeness(first, later) <= LIKE < ALIKE < unlikeness(first, other)


def test_unlikeness_is_the_smaller_share_of_differing_bits(one):
    a, b = likeness(one), likeness(scan(3))
    half = len(a) // 2
    shares = [(int(a[v], 16) ^ int(b[v], 16)).bit_count() / BITS for v in (slice(half), slice(half, None))]
    assert unlikeness(a, b) == min(shares) and unlikeness(a, a) == 0.0
    table = unlikenesses([a, "", b], [b, ""])
    assert table.shape == (3, 2) and table[0, 0] == min(shares) and table[2, 0] == 0.0
    assert (table[:, 1] == 1.0).all() and (table[1] == 1.0).all()
    assert unlikenesses([], [a]).shape == (0, 1)
    with pytest.raises(ValueError, match="4 hex digits; 256 are needed"):
        unlikeness(a, "0f0f")


def test_a_scan_that_shows_nothing_has_no_likeness_and_tiny_ones_have_one():
    assert likeness(Volume(np.full((20, 20, 20), 7, np.int16), np.eye(4))) == ""
    noise = np.random.default_rng(0).normal(size=(3, 5, 4))
    assert len(likeness(Volume(noise, np.eye(4)))) == 2 * BITS // 4


def test_projections_never_change():
    """They are part of every provenance.json that was written: another draw would make all of them strangers."""
    drawn = np.packbits(rules._projections() > 0)
    assert hashlib.sha256(drawn.tobytes()).hexdigest().startswith(PROJECTIONS)


PROJECTIONS = "62438ddbfc628757"
