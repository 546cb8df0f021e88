"""The affine frame: each scan stretched and moved along R, A, S onto a scan of the set, then onto the mean of those.

A scan is judged by the normalised mutual information of what both see (CT and MR of one set compare), times the root of
the share that overlaps, less priors: no stretch beyond 3/4 to 4/3, and little of it; the fields of view do not lie far
apart without need. So a chest is moved off an abdomen, not stretched over it. There is no rotation: scanners agree on
the axes to a few degrees (whether turning would help was not tried).

The reference is, of the largest scans, the one that others fit best. Then the mean of those of its modality that fit
well takes its place, twice: what is peculiar to one patient is gone. A scan that fits the mean no better than the mean
turned upside down or back to front has found no anatomy in it: it is not placed. (Left to right the body is its own
mirror image, which would be no test.)

Normalised mutual information is the established choice for CT with MR; no other similarity was tried.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spade3d.volumes.body_frame import BodyFrame, Progress, of_typical_size, stretch
from spade3d.volumes.coarse_scan import UNSEEN, CoarseScan, cell_mm, coarse_scan
from spade3d.volumes.geometry import compose, resample
from spade3d.volumes.mutual_information import normalised_mutual_information

BINS = 16
STRETCH_COST = 2.0  # what a squared log scale costs, in units of NMI - 1 (which is 0.05 to 0.4)
APART, APART_CELLS = 0.01, 6.0  # what log(1 + (distance / APART_CELLS)^2) of the two centres costs
MOST_LOG_SCALE = np.log(4 / 3)
LEAST_OVERLAP = 0.25  # of the smaller of the two
STARTS = 4
CANDIDATES, SAMPLE = 3, 8  # scans that may be the reference, and scans that try each
ROUNDS, KEPT = 2, 0.75  # of the mean, and the share of the scans that are in it: those that fit best
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
    """The frame of each case, None where it fits no better than by chance; the seed chooses who tries the references.

    A fit costs about 0.2 s, a scan five of them.
    """
    if not cases:
        return {}
    mm = cell_mm(store, cases)
    scans = {i: coarse_scan(store, i, mm) for i in cases}
    reference = _reference(scans, np.random.default_rng(seed))
    target, fits = scans[reference], {}
    alike = [i for i in cases if store.cases[i].modality == store.cases[reference].modality]
    for turn in range(ROUNDS):
        for done, i in enumerate(cases, 1 + turn * len(cases)):
            fits[i] = fit(scans[i], target)
            progress(done, (ROUNDS + 1) * len(cases), "affine frame")
        best = sorted(alike, key=lambda i: -fits[i].value)[: math.ceil(KEPT * len(alike))]
        target = _mean([scans[i] for i in best], [fits[i].affine(scans[i], target) for i in best], target)
    turned = [CoarseScan(np.ascontiguousarray(np.flip(target.values, axis)), target.affine) for axis in (1, 2)]
    placed: dict[int, tuple[np.ndarray, float] | None] = {}
    for done, i in enumerate(cases, 1 + ROUNDS * len(cases)):
        found = fit(scans[i], target)
        chance = max(fit(scans[i], other).value for other in turned)
        better = found.value / max(chance, 1e-9) if found.value > 0 else 0.0
        clear = better > BETTER_THAN_CHANCE
        placed[i] = (found.affine(scans[i], target), float(min(1.0, better - 1))) if clear else None
        progress(done, (ROUNDS + 1) * len(cases), "affine frame")
    return of_typical_size(placed)


def fit(moving: CoarseScan, fixed: CoarseScan) -> Fit:
    """Lay one scan on another: every second cell of a grid of half the resolution is a start, the best are refined."""
    moving_half, fixed_half = _halved(moving.values), _halved(fixed.values)
    objective = _Objective(moving_half, fixed_half, APART_CELLS / 2)
    sides = np.array([moving_half.shape, fixed_half.shape])
    reach = sides.sum(axis=0) / 2 - sides.min(axis=0) / 2  # at least half of the smaller side is shared
    ways = np.stack(np.meshgrid(*(np.arange(-(r // 2) * 2, r + 1e-9, 2) for r in reach), indexing="ij"), axis=-1)
    ways = ways.reshape(-1, 3)
    order = np.argsort([-objective(np.concatenate([np.zeros(3), way])) for way in ways], kind="stable")
    starts: list[np.ndarray] = []
    for way in ways[order]:
        if len(starts) < STARTS and all(np.abs(way - other).max() > 4 for other in starts):
            starts.append(way)
    found = [_climb(objective, np.concatenate([np.zeros(3), way]), 0.1, 0.3) for way in starts]
    _, best = max(found, key=lambda one: one[0])
    best[3:] *= 2
    value, best = _climb(_Objective(_binned(moving.values), _binned(fixed.values), APART_CELLS), best, 0.03, 0.2)
    return Fit(value, best[:3], best[3:])


class _Objective:
    """What `fit` maximises, as a function of (log scale, way): six numbers."""

    def __init__(self, moving: np.ndarray, fixed: np.ndarray, apart_cells: float):
        self.moving, self.fixed, self.apart_cells = moving, fixed, apart_cells
        self.centres = [(np.array(values.shape) - 1) / 2 for values in (moving, fixed)]
        self.seen = [np.count_nonzero(values >= 0) for values in (moving, fixed)]
        self.joint = np.empty((BINS, BINS))

    def __call__(self, at: np.ndarray) -> float:
        scale = np.exp(at[:3])
        shift = self.centres[1] + at[3:] - scale * self.centres[0]
        value, count = normalised_mutual_information(self.moving, self.fixed, scale, shift, self.joint)
        volume = float(scale.prod())
        overlap = min(1.0, count * volume / min(self.seen[0] * volume, self.seen[1]))
        if overlap < LEAST_OVERLAP:
            return -1.0
        apart = APART * np.log1p((at[3:] @ at[3:]) / self.apart_cells**2)
        return value * overlap**0.5 - STRETCH_COST * float(at[:3] @ at[:3]) - apart


def _climb(objective: _Objective, at: np.ndarray, scale_step: float, least: float) -> tuple[float, np.ndarray]:
    """Pattern search (Hooke and Jeeves 1961): a step along each of the six in turn, halved when none helps."""
    at, value = at.copy(), objective(at)
    steps = np.array([scale_step] * 3 + [1.0] * 3)
    while steps[3] > least:
        before = value
        for d in range(6):
            for sign in (1, -1):
                there = at.copy()
                there[d] += sign * steps[d]
                if d < 3 and abs(there[d]) > MOST_LOG_SCALE:
                    continue
                better = objective(there)
                if better > value:
                    at, value = there, better
                    break
        if value == before:
            steps /= 2
    return value, at


def _reference(scans: Mapping[int, CoarseScan], rng: np.random.Generator) -> int:
    largest = sorted(scans, key=lambda i: (-np.count_nonzero(scans[i].values >= 0), i))[:CANDIDATES]
    if len(largest) == 1:
        return largest[0]
    sample = rng.permutation(list(scans))[: SAMPLE + 1].tolist()

    def how_others_fit(candidate: int) -> float:
        return float(np.median([fit(scans[i], scans[candidate]).value for i in sample if i != candidate]))

    return max(largest, key=how_others_fit)


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
