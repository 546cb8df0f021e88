"""The affine frame: each scan stretched and moved along R, A, S onto a scan of the set, then onto the mean of those.

A scan is judged by the normalised mutual information of what both see (CT and MR of one set compare), times the root of
the share that overlaps, less priors: no stretch beyond 3/4 to 4/3, and little of it; the fields of view do not lie far
apart without need. So a chest is moved off an abdomen, not stretched over it. There is no rotation: scanners agree on
the axes to a few degrees (whether turning would help was not tried).

The reference is, of the largest scans, the one that others fit best. Then the mean of those of its modality that fit
well takes its place, twice: what is peculiar to one patient is gone. A scan that fits the mean no better than the mean
turned upside down or back to front has found no anatomy in it: it is not placed. (Left to right the body is its own
mirror image, which would be no test.)

Reference and mean are made of SAMPLE_OF scans at most, which the seed draws, and which are held together; all others
are read once, laid on the mean and let go. So 100,000 scans take three fits each and no more memory than some.

Normalised mutual information is the established choice for CT with MR; no other similarity was tried.
"""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from spade3d.cores import on_all_cores
from spade3d.volumes.body_frame import BodyFrame, Progress, of_typical_size
from spade3d.volumes.coarse_scan import UNSEEN, CoarseScan, cell_mm, coarse_scan
from spade3d.volumes.geometry import compose, resample, stretch
from spade3d.volumes.registration_kernels import BINS, pattern_search, registration, scores_of_ways

APART_CELLS = 6.0  # two centres that lie farther apart must have a reason
STARTS = 4
READERS = 4  # scans that are held in full at once
SAMPLE_OF = 256  # scans that reference and mean are made of, at most: 0.2 GB
CANDIDATES, TRIES = 3, 8  # scans that may be the reference, and scans that try each
ROUNDS, KEPT = 2, 0.75  # of the mean, and the share of the sample that is in it: those that fit best
BETTER_THAN_CHANCE = 1.0  # times the better of the two turned means, each laid on as well as it can be


@dataclass(frozen=True, eq=False)
class Fit:
    """How one scan lies on another: the log scale (3,) and the way (3,) in cells from centre to centre."""

    value: float
    log_scale: np.ndarray
    way: np.ndarray

    def affine(self, moving: CoarseScan, fixed: CoarseScan) -> np.ndarray:
        """(4, 4): mm of the moving scan -> mm of the fixed one."""
        scale = np.exp(self.log_scale)
        return stretch(scale, fixed.centre_mm + fixed.cell_mm * self.way - scale * moving.centre_mm)


def affine_frames(store, cases: Sequence[int], *, seed: int = 0, progress: Progress) -> dict[int, BodyFrame | None]:
    """The frame of each case, None where it fits no better than by chance; the seed chooses who tries the references,
    and of many cases those that the mean is made of.

    A fit costs about 0.1 s of a core, a scan three of them, five in the sample. All cores lay scans at once; the frames
    are the same.
    """
    if not cases:
        return {}
    rng, steps = np.random.default_rng(seed), itertools.count(1)
    many = len(cases) > SAMPLE_OF
    sample = [cases[n] for n in sorted(rng.choice(len(cases), SAMPLE_OF, replace=False))] if many else cases

    def told(found: Iterator[Any]) -> Iterator[Any]:
        for one in found:
            progress(next(steps), (ROUNDS + 1) * len(sample) + len(cases), "affine frame")
            yield one

    mm, reading = cell_mm(store, cases), threading.Semaphore(READERS)

    def read(i: int) -> CoarseScan:
        with reading:
            return coarse_scan(store, i, mm)

    scans = list(told(on_all_cores(read, sample)))
    reference = _reference(scans, rng)
    target, modality = scans[reference], [store.cases[i].modality for i in sample]
    alike = [n for n in range(len(scans)) if modality[n] == modality[reference]]
    for _ in range(ROUNDS):
        fits = list(told(on_all_cores(partial(fit, fixed=target), scans)))
        best = sorted(alike, key=lambda n: -fits[n].value)[: math.ceil(KEPT * len(alike))]
        target = _mean([scans[n] for n in best], [fits[n].affine(scans[n], target) for n in best], target)
    turned = [CoarseScan(np.ascontiguousarray(np.flip(target.values, axis)), target.affine) for axis in (1, 2)]
    held = dict(zip(sample, scans, strict=True))
    place = partial(_placed, target=target, turned=turned)
    placed = told(on_all_cores(lambda i: place(held[i] if i in held else read(i)), cases))
    return of_typical_size(dict(zip(cases, placed, strict=True)))


def _placed(scan: CoarseScan, target: CoarseScan, turned: Sequence[CoarseScan]) -> tuple[np.ndarray, float] | None:
    """Its way into the frame and the confidence, None where it fits the target no better than the turned ones."""
    found = fit(scan, target)
    chance = max(fit(scan, other).value for other in turned)
    better = found.value / max(chance, 1e-9) if found.value > 0 else 0.0
    return (found.affine(scan, target), float(min(1.0, better - 1))) if better > BETTER_THAN_CHANCE else None


def fit(moving: CoarseScan, fixed: CoarseScan) -> Fit:
    """Lay one scan on another: every second cell of a grid of half the resolution is a start, the best are refined."""
    moving_half, fixed_half = _halved(moving.values), _halved(fixed.values)
    halves = registration(moving_half, fixed_half, APART_CELLS / 2)
    sides = np.array([moving_half.shape, fixed_half.shape])
    reach = sides.sum(axis=0) / 2 - sides.min(axis=0) / 2  # at least half of the smaller side is shared
    ways = np.stack(np.meshgrid(*(np.arange(-(r // 2) * 2, r + 1e-9, 2) for r in reach), indexing="ij"), axis=-1)
    ways = ways.reshape(-1, 3)
    order = np.argsort(-scores_of_ways(halves, ways), kind="stable")
    starts: list[np.ndarray] = []
    for way in ways[order]:
        if len(starts) < STARTS and all(np.abs(way - other).max() > 4 for other in starts):
            starts.append(way)
    found = [pattern_search(halves, np.concatenate([np.zeros(3), way]), 0.1, 0.3) for way in starts]
    _, best = max(found, key=lambda one: one[0])
    best[3:] *= 2
    wholes = registration(_binned(moving.values), _binned(fixed.values), APART_CELLS)
    value, best = pattern_search(wholes, best, 0.03, 0.2)
    return Fit(value, best[:3], best[3:])


def _reference(scans: Sequence[CoarseScan], rng: np.random.Generator) -> int:
    """Which scan the first fits are to."""
    largest = sorted(range(len(scans)), key=lambda n: -np.count_nonzero(scans[n].values >= 0))[:CANDIDATES]
    if len(largest) == 1:
        return largest[0]
    tries = rng.permutation(len(scans))[: TRIES + 1].tolist()
    pairs = [(n, candidate) for candidate in largest for n in tries if n != candidate]
    values = on_all_cores(lambda pair: fit(scans[pair[0]], scans[pair[1]]).value, pairs)
    by_candidate: dict[int, list[float]] = {candidate: [] for candidate in largest}
    for (_, candidate), value in zip(pairs, values, strict=True):
        by_candidate[candidate].append(value)
    return max(largest, key=lambda candidate: float(np.median(by_candidate[candidate])))


def _mean(scans: Sequence[CoarseScan], to_grid: Sequence[np.ndarray], grid: CoarseScan) -> CoarseScan:
    """The mean brightness of scans laid on one grid, over those that see a cell."""
    total, count = np.zeros(grid.values.shape), np.zeros(grid.values.shape)
    i, j, k = map(int, grid.values.shape)
    for scan, way in zip(scans, to_grid, strict=True):
        affine = compose(way, scan.affine)
        # An unseen cell must not be mixed into its neighbours: what is seen is resampled apart.
        seen = resample((scan.values >= 0).astype(np.float32), affine, grid.affine, (i, j, k), 1, 0.0) > 0.99
        values = resample(scan.values, affine, grid.affine, (i, j, k), 1, UNSEEN)
        total[seen] += values[seen]
        count += seen
    mean = np.where(count > 0, total / np.maximum(count, 1), UNSEEN).astype(np.float32)
    return CoarseScan(mean, grid.affine)


def _halved(values: np.ndarray) -> np.ndarray:
    """Means over 2 x 2 x 2 cells, binned; unseen where one of the eight is."""
    i, j, k = (max(side // 2, 1) for side in values.shape)
    values = np.pad(values, [(0, max(0, 2 - side)) for side in values.shape], mode="edge")
    blocks = values[: 2 * i, : 2 * j, : 2 * k].reshape(i, 2, j, 2, k, 2)
    return _binned(np.where(blocks.min(axis=(1, 3, 5)) < 0, UNSEEN, blocks.mean(axis=(1, 3, 5))))


def _binned(values: np.ndarray) -> np.ndarray:
    return np.where(values < 0, UNSEEN, np.minimum(values, 1) * (BINS - 1)).astype(np.float32)
