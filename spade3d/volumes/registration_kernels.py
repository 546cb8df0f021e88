"""How well a coarse scan lies on another, and the search for where it lies best: numba and nothing else.

Each kernel has a slow twin in the tests.

Placing a scan asks some ten thousand times for the similarity of two scans, so the search runs compiled as well, and
without Python's lock: scans are placed on all cores at once.
"""

from typing import NamedTuple

import numpy as np

from spade3d.kernel_cache import compiled

BINS = 16
HIDDEN = np.float32(np.nan)  # in place of a cell of the fixed scan that is not seen: no mean with it is a brightness
LEAST_OVERLAP = 0.25  # of the smaller of the two
STRETCH_COST = 2.0  # what a squared log scale costs, in units of NMI - 1 (which is 0.05 to 0.4)
APART = 0.01  # what log(1 + (distance / apart_cells)^2) of the two centres costs
MOST_LOG_SCALE = np.log(4 / 3)


class Registration(NamedTuple):
    """A scan to be moved and one that stays, both on grids of one cell size, and the memory that judging them takes.

    moving       int8 (i, j, k): bins 0 to BINS - 1, -1 where nothing is seen
    fixed        float32 (i, j, k): bins, HIDDEN where nothing is seen; a single layer is there twice, to be between
    last         float64 (3,): the last index of the fixed scan along each axis
    seen         float64 (2,): cells of each that are seen
    apart_cells  how far apart the two centres may lie before it costs much
    n_log_n      float64: n log n of every number of cells that can be counted
    """

    moving: np.ndarray
    fixed: np.ndarray
    last: np.ndarray
    seen: np.ndarray
    apart_cells: float
    n_log_n: np.ndarray
    counts: np.ndarray  # uint32 (4, BINS * BINS + 1): four joint histograms; last the cells that only one scan sees
    row: np.ndarray  # float32: a row of the fixed scan between its neighbours
    cell: np.ndarray  # uint32, for each cell of a row of the moving scan: the cell of the fixed scan before it,
    part: np.ndarray  # float32: how far past that it lies,
    code: np.ndarray  # uint32: and in which pair of bins


def registration(moving: np.ndarray, fixed: np.ndarray, apart_cells: float) -> Registration:
    """From two grids of bin numbers, float (i, j, k), negative or NaN where nothing is seen."""
    seen = np.array([np.count_nonzero(values >= 0) for values in (moving, fixed)], np.float64)
    last, count = np.array(fixed.shape) - 1.0, np.arange(moving.size + 1.0)
    for axis in range(3):
        fixed = np.repeat(fixed, 2, axis) if fixed.shape[axis] == 1 else fixed
    length, width = moving.shape[2], fixed.shape[2]
    return Registration(
        np.where(moving >= 0, moving + 0.5, -1).astype(np.int8),
        np.where(fixed >= 0, fixed, HIDDEN).astype(np.float32),
        last,
        seen,
        float(apart_cells),
        count * np.log(np.maximum(count, 1)),
        np.empty((4, BINS * BINS + 1), np.uint32),
        np.empty(width, np.float32),
        np.empty(length, np.uint32),
        np.empty(length, np.float32),
        np.empty(length, np.uint32),
    )


@compiled(error_model="numpy", nogil=True)
def normalised_mutual_information(scans, scale, shift):
    """(NMI - 1, cells compared) of moving index i laid on fixed index  scale * i + shift  (3,); 0 where nothing varies.

    Studholme, Hill and Hawkes (1999):  (H(a) + H(b)) / H(a, b)  over the cells that both see. It asks only that equal
    brightness means equal tissue within each scan, so it compares CT with MR, and it does not reward a small overlap
    the way mutual information does.

    Rows in steps that vectorise (the fixed row between its neighbours, then the pairs of bins), and four histograms in
    turn, since neighbours fall into one bin and an increment waits for the last: 2.7 times as fast as cell by cell.
    """
    moving, fixed, counts, row, cell, part, code = (
        scans.moving,
        scans.fixed,
        scans.counts,
        scans.row,
        scans.cell,
        scans.part,
        scans.code,
    )
    counts[:] = 0
    first, stop = moving.shape[2], 0
    for k in range(moving.shape[2]):
        z = scale[2] * k + shift[2]
        if 0 <= z <= scans.last[2]:
            cell[k] = np.uint32(min(int(z), fixed.shape[2] - 2))
            part[k] = np.float32(z - cell[k])
            first, stop = min(first, k), k + 1
    if stop == 0:
        return 0.0, 0
    low, high = int(cell[first]), int(cell[stop - 1]) + 2
    one, half = np.float32(1), np.float32(0.5)
    for i in range(moving.shape[0]):
        x = scale[0] * i + shift[0]
        if not 0 <= x <= scans.last[0]:
            continue
        a = min(int(x), fixed.shape[0] - 2)
        u = np.float32(x - a)
        for j in range(moving.shape[1]):
            y = scale[1] * j + shift[1]
            if not 0 <= y <= scans.last[1]:
                continue
            b = min(int(y), fixed.shape[1] - 2)
            v = np.float32(y - b)
            p, q, r, s = (one - u) * (one - v), (one - u) * v, u * (one - v), u * v
            for c in range(low, high):
                near = fixed[a, b, c] * p + fixed[a, b + 1, c] * q
                row[c] = near + (fixed[a + 1, b, c] * r + fixed[a + 1, b + 1, c] * s)
            for k in range(first, stop):
                value = row[cell[k]] * (one - part[k]) + row[np.uint32(cell[k] + 1)] * part[k]
                m, n = np.int32(moving[i, j, k]), np.int32(value + half)
                code[k] = np.uint32(m * BINS + n) if (m >= 0 and value >= 0) else np.uint32(BINS * BINS)
            k = first
            while k + 3 < stop:
                counts[0, code[k]] += np.uint32(1)
                counts[1, code[k + 1]] += np.uint32(1)
                counts[2, code[k + 2]] += np.uint32(1)
                counts[3, code[k + 3]] += np.uint32(1)
                k += 4
            while k < stop:
                counts[0, code[k]] += np.uint32(1)
                k += 1
    compared = 0
    for n in range(BINS * BINS):
        counts[0, n] += counts[1, n] + counts[2, n] + counts[3, n]
        compared += int(counts[0, n])
    of_moving = of_fixed = of_both = 0.0  # sums of n log n
    for m in range(BINS):
        in_row = in_column = 0
        for n in range(BINS):
            in_row += int(counts[0, m * BINS + n])
            in_column += int(counts[0, n * BINS + m])
            of_both += scans.n_log_n[counts[0, m * BINS + n]]
        of_moving += scans.n_log_n[in_row]
        of_fixed += scans.n_log_n[in_column]
    whole = scans.n_log_n[compared]
    entropy = whole - of_both
    if entropy < 1e-9 * max(whole, 1.0):
        return 0.0, compared
    return (2 * whole - of_moving - of_fixed) / entropy - 1, compared


@compiled(error_model="numpy", nogil=True)
def score(scans, at):
    """How well the moving scan lies where `at` says, float64 (6,): log scale, and way in cells from centre to centre.

    The similarity times the root of the share that overlaps, less what the stretch and the distance cost.
    """
    scale, shift, volume = np.empty(3), np.empty(3), 1.0
    squared_stretch = squared_way = 0.0
    for d in range(3):
        scale[d] = np.exp(at[d])
        shift[d] = scans.last[d] / 2 + at[3 + d] - scale[d] * (scans.moving.shape[d] - 1) / 2
        volume *= scale[d]
        squared_stretch += at[d] * at[d]
        squared_way += at[3 + d] * at[3 + d]
    value, compared = normalised_mutual_information(scans, scale, shift)
    overlap = min(1.0, compared * volume / min(scans.seen[0] * volume, scans.seen[1]))
    if overlap < LEAST_OVERLAP:
        return -1.0
    apart = APART * np.log1p(squared_way / scans.apart_cells**2)
    return value * np.sqrt(overlap) - STRETCH_COST * squared_stretch - apart


@compiled(error_model="numpy", nogil=True)
def scores_of_ways(scans, ways):
    """`score` of many ways (n, 3) from centre to centre, without stretch: float64 (n,)."""
    at, values = np.zeros(6), np.empty(len(ways))
    for n in range(len(ways)):
        at[3:] = ways[n]
        values[n] = score(scans, at)
    return values


@compiled(error_model="numpy", nogil=True)
def pattern_search(scans, begin, scale_step, least):
    """(value, at (6,)) by pattern search (Hooke and Jeeves 1961): a step along each of the six in turn, of 1 cell or
    `scale_step` at first, all halved when none helps, until those of a cell are `least`."""
    at, value = begin.copy(), score(scans, begin)
    steps = np.array([scale_step, scale_step, scale_step, 1.0, 1.0, 1.0])
    while steps[3] > least:
        before = value
        for d in range(6):
            for sign in (1.0, -1.0):
                was = at[d]
                at[d] = was + sign * steps[d]
                better = -np.inf if d < 3 and abs(at[d]) > MOST_LOG_SCALE else score(scans, at)
                if better > value:
                    value = better
                    break
                at[d] = was
        if value == before:
            steps /= 2
    return value, at
