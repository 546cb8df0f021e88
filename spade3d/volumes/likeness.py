"""Likeness: a fingerprint of what a scan shows, so that a copy under another name and on another grid is recognised.

A scan is seen twice through a cube of SIDE^3 points: over its whole field of view, and over its body (the mean of
the foreground and REACH standard deviations to each side along R, A, S), which no margin of air moves. Its brightness
there is replaced by ranks (no gain, offset or type is left), what is common to wide surroundings is taken away, and
the signs of BITS fixed random projections are kept (Charikar, STOC 2002): two views whose correlation is cos(angle)
differ in about angle / pi of their bits. `unlikeness` is the smaller share of the two views: 0 for a copy, 1/2 for
strangers.

Measured on 69 scans (20 hippocampi and 14 hearts in MR, 11 torsos in CT, MR and PET, 24 phantoms) and their altered
copies, and on all pairs of patients within each of nine data sets (182 hippocampi, 60 hearts, 96 phantoms, torsos):

    copy: the header's axis order and flips    0.000             all found
          resampled (0.7 to 2 of the spacing)  0.02, most 0.07   all found
          8 bit, gamma 0.8, gain and offset    0.00, most 0.20   99 % found
          padded with air by 15 % a side       0.03, most 0.33   96 % found, 97 % suspected
          cut to the body's box                0.00, most 0.51   86 % found, 88 % suspected: the box cuts some hearts
          turned by 10 degrees, resampled      0.07, most 0.26   72 % found, 94 % suspected
          CT windowed to -175..250 HU          0.00, most 0.20   80 % found, 93 % suspected: fewest among phantoms
          cut, resampled, 8 bit, reoriented    0.03, most 0.41   90 % found, 91 % suspected
    another patient: hippocampus MR            0.35, least 0.19  16,408 pairs, none called or suspected
                     cine heart MR             0.35, least 0.15   1,740 pairs, none
                     other scans, phantoms     0.31, least 0.18     978 pairs, none
    same patient: two phases of a heart        0.05, most 0.14     30 pairs, 28 found, 30 suspected: rightly so
                  two hippocampi               0.27, least 0.19    63 pairs, none: subjects.csv must say it

A part of a scan (a slab of a torso: 0.30) is another scan to it, and so is a copy whose header lost the orientation.
LIKE keeps a third of the way from the nearest stranger, ALIKE stops short of it: what is suspected must be looked at.
"""

import hashlib
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from scipy.stats import rankdata

from spade3d.volumes.geometry import apply_affine, canonical_flips, inverse
from spade3d.volumes.volume import Volume

LIKE = 0.10  # unlikeness up to which two scans are called the same
ALIKE = 0.15  # and up to which they are suspected to be

SIDE = 16  # points along each axis of a view
BITS = 512  # of each of the two views
REACH = 1.6  # standard deviations of the body that a view reaches to each side: a box would end at 1.73
WIDE = 2.0  # points: what is common to a surrounding so wide (Gaussian) says "abdomen", not whose
CELLS = 48  # along each axis (up to twice as many), to which a scan is averaged first
AIR_HU = -1000.0  # below it lies only what scanners write outside their circle


def likeness(volume: Volume) -> str:
    """2 * BITS bits as hex: the view of the whole scan, then that of its body; "" for a scan that shows nothing.

    For voxels (i, j, k) in any order and of any type. About 10 ms, and half a second for 512 x 512 x 300 voxels.
    """
    cells, affine = _averaged(volume)
    low, high = (float(value) for value in np.percentile(cells, (0.5, 99.5)))
    if not high > low:
        return ""
    cells = (np.clip(cells, low, high) - low) / (high - low)
    whole = (_cube() + 1) / 2 * np.array(cells.shape) - 0.5
    centre, reach = _body(cells, affine)
    back = inverse(affine)
    body = apply_affine(back, centre + _cube() * reach)
    sizes = np.array(cells.shape) / SIDE, np.abs(back[:3, :3]) @ (2 * reach / SIDE)
    seen = [_seen(cells, points, size) for points, size in zip((whole, body), sizes, strict=True)]
    if not all(view.any() for view in seen):
        return ""
    return b"".join(np.packbits(_projections() @ view > 0).tobytes() for view in seen).hex()


def unlikeness(one: str, other: str) -> float:
    """The share of bits in which two scans differ, in the view in which they differ less: 0 for a copy, about 1/2 for
    strangers; 1 where one of them shows nothing. ValueError for what `likeness` did not make.
    """
    return float(unlikenesses([one], [other])[0, 0])


def unlikenesses(some: list[str], others: list[str]) -> Float[np.ndarray, "some others"]:
    """`unlikeness` of every pair."""
    apart = np.ones((len(some), len(others)))
    rows, columns = (np.array([n for n, one in enumerate(of) if one], int) for of in (some, others))
    if len(rows) and len(columns):
        a, b = _bits([some[n] for n in rows]), _bits([others[n] for n in columns])
        for row, view in zip(rows, a, strict=True):  # one at a time: thousands against thousands stay small
            differing = np.bitwise_count(view ^ b).sum(axis=-1)
            apart[row, columns] = differing.min(axis=1) / BITS
    return apart


def _bits(hexes: list[str]) -> np.ndarray:
    """(scan, view, byte) uint8."""
    if wrong := [one for one in hexes if len(one) != 2 * BITS // 4]:
        raise ValueError(f"a likeness of {len(wrong[0])} hex digits; {2 * BITS // 4} are needed")
    return np.frombuffer(bytes.fromhex("".join(hexes)), np.uint8).reshape(len(hexes), 2, BITS // 8)


def _averaged(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Canonical cells (i, j, k) float32, each the mean of a block of voxels, and their affine."""
    turn = canonical_flips(volume.affine, volume.shape)
    voxels, affine = turn.apply(volume.voxels), turn.affine(volume.affine)
    block = np.maximum(1, np.array(voxels.shape) // CELLS)
    count = np.array(voxels.shape) // block
    cells = np.empty(count, np.float32)
    for i in range(count[0]):
        slab = voxels[i * block[0] : (i + 1) * block[0], : count[1] * block[1], : count[2] * block[2]]
        slab = np.maximum(slab.astype(np.float32), AIR_HU)
        cells[i] = slab.reshape(block[0], count[1], block[1], count[2], block[2]).mean(axis=(0, 2, 4))
    to_voxel = np.diag([*block.astype(float), 1.0])
    to_voxel[:3, 3] = (block - 1) / 2
    return cells, affine @ to_voxel


def _body(cells: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the foreground lies, in mm along R, A, S: its mean and REACH of its standard deviations.

    Foreground is what is brighter than 0.35 of the mean of the foreground: it settles in a few rounds, and more or
    less air around the body does not move it as it moves Otsu's threshold.
    """
    threshold = 0.2
    for _ in range(10):
        threshold = 0.35 * float(cells[cells > threshold].mean())
    places = apply_affine(affine, np.argwhere(cells > threshold).astype(float))
    return places.mean(axis=0), REACH * np.maximum(places.std(axis=0), 1e-3)


def _cube() -> np.ndarray:
    """Points (SIDE^3, 3) from -1 to 1, the centres of a cube's cells."""
    line = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    return np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1).reshape(-1, 3)


def _seen(cells: np.ndarray, points: np.ndarray, size: np.ndarray) -> np.ndarray:
    """What a view shows at its points (SIDE^3, 3), given in cells: ranks less those of their wide surroundings."""
    smooth = ndimage.gaussian_filter(cells, size / 2, mode="nearest")
    bright = ndimage.map_coordinates(smooth, points.T, order=1, mode="nearest")
    ranks = rankdata(bright.round(5)).reshape(SIDE, SIDE, SIDE) / SIDE**3  # rounded, or air is ranked by its last bit
    return (ranks - ndimage.gaussian_filter(ranks, WIDE, mode="nearest")).ravel()


@cache
def _projections() -> np.ndarray:
    """BITS directions of signs (BITS, SIDE^3), the same in every version of every library: a hash draws them."""
    drawn = hashlib.shake_256(b"spade3d likeness 1").digest(BITS * SIDE**3 // 8)
    return np.unpackbits(np.frombuffer(drawn, np.uint8)).reshape(BITS, SIDE**3).astype(np.float32) * 2 - 1
