"""Numba kernels of the surface metrics: count and box every class, find its surface, measure to the other surface.

Label maps are C-contiguous uint16 arrays (i, j, k); k runs fastest, so a *row* is all k of one (i, j).
A surface keeps its voxels row by row, which lets the search skip whole rows; no volume of distances is ever made.
Both directions of a ragged structure that fills 30 % of 128 x 128 x 80 voxels: 49 ms on one core, by scipy's erosion
and distance transform 606 ms. There `search` takes 0.42 of the time of `planes`, of two balls far apart six times as
long.
"""

from typing import NamedTuple

import numpy as np

from spade3d.kernel_cache import compiled


class Surface(NamedTuple):
    """The surface voxels of one class: those with one of the 6 neighbours, or the edge of the image, outside it."""

    points: np.ndarray  # (n, 3) int64 voxel indices in raster order
    rows: np.ndarray  # (box_i * box_j + 1) int64: where each row of the box begins in `points`
    box: np.ndarray  # (3, 2) int64: first voxel and one past the last, along i, j, k


@compiled(nogil=True)
def census(truth, prediction, index_of, classes):
    """One pass over two label maps: per class, voxels (true, predicted, both) and tight boxes (map, class, axis, 2).

    `index_of` (65536) gives the class index of a label value, -1 for a value that is not asked for.
    """
    counts = np.zeros((classes, 3), np.int64)
    boxes = np.zeros((2, classes, 3, 2), np.int64)
    boxes[..., 0] = np.iinfo(np.int64).max
    size_i, size_j, size_k = truth.shape
    for i in range(size_i):
        for j in range(size_j):
            true_row, predicted_row = truth[i, j], prediction[i, j]
            k = 0
            while k < size_k:  # run by run of equal pairs: a table look-up per run, not per voxel
                true, predicted, start = true_row[k], predicted_row[k], k
                while k < size_k and true_row[k] == true and predicted_row[k] == predicted:
                    k += 1
                for side, label in ((0, index_of[true]), (1, index_of[predicted])):
                    if label >= 0:
                        counts[label, side] += k - start
                        _grow(boxes[side, label], i, j, start, k)
                if true == predicted and index_of[true] >= 0:
                    counts[index_of[true], 2] += k - start
    return counts, boxes


@compiled(nogil=True)
def _grow(box, i, j, start, stop):
    """Grow a box to hold the run from `start` to `stop` of row (i, j)."""
    box[0, 0], box[0, 1] = min(box[0, 0], i), max(box[0, 1], i + 1)
    box[1, 0], box[1, 1] = min(box[1, 0], j), max(box[1, 1], j + 1)
    box[2, 0], box[2, 1] = min(box[2, 0], start), max(box[2, 1], stop)


@compiled(nogil=True)
def surface_voxels(labels, value, box, count):
    """`points` and `rows` of the surface of `value`, of which `count` voxels lie inside `box`."""
    size_i, size_j, size_k = labels.shape
    points = np.empty((count, 3), np.int64)
    rows = np.zeros((box[0, 1] - box[0, 0]) * (box[1, 1] - box[1, 0]) + 1, np.int64)
    found, row = 0, 0
    for i in range(box[0, 0], box[0, 1]):
        for j in range(box[1, 0], box[1, 1]):
            rim = i == 0 or j == 0 or i == size_i - 1 or j == size_j - 1
            for k in range(box[2, 0], box[2, 1]):
                if labels[i, j, k] == value and (
                    rim
                    or k == 0
                    or k == size_k - 1
                    or labels[i, j, k - 1] != value
                    or labels[i, j, k + 1] != value
                    or labels[i, j - 1, k] != value
                    or labels[i, j + 1, k] != value
                    or labels[i - 1, j, k] != value
                    or labels[i + 1, j, k] != value
                ):
                    points[found, 0], points[found, 1], points[found, 2] = i, j, k
                    found += 1
            row += 1
            rows[row] = found
    return points[:found].copy(), rows


@compiled(nogil=True)
def search(queries, points, rows, box, spacing, squared, budget):
    """Fill `squared` (n) with the squared mm from each query voxel (n, 3) to the nearest of `points`, exactly.

    Rows are visited outwards from the query and the visit ends when a row lies farther than the best point so far;
    the first guess is the point nearest to the query before, which is seldom far in raster order. Returns how many
    queries are done: all, or those that `budget` row visits allowed. A surface far from the other needs many visits
    (about the area of a disc as wide as the distance), and `planes` serves it better.
    """
    step_i, step_j, step_k = spacing
    width_j = box[1, 1] - box[1, 0]
    guess, visits = 0, 0
    for query in range(len(queries)):
        if visits > budget:
            return query
        i, j, k = queries[query]
        best = (
            ((i - points[guess, 0]) * step_i) ** 2
            + ((j - points[guess, 1]) * step_j) ** 2
            + ((k - points[guess, 2]) * step_k) ** 2
        )
        first_i = max(0, box[0, 0] - i, i - box[0, 1] + 1)  # not 0 where the query lies outside the box
        first_j = max(0, box[1, 0] - j, j - box[1, 1] + 1)
        for away_i in range(first_i, max(i - box[0, 0], box[0, 1] - 1 - i) + 1):
            apart_i = (away_i * step_i) ** 2
            if apart_i >= best:
                break
            for row_i in (i - away_i, i + away_i) if away_i else (i, -1):
                if row_i < box[0, 0] or row_i >= box[0, 1]:
                    continue
                for away_j in range(first_j, max(j - box[1, 0], box[1, 1] - 1 - j) + 1):
                    apart = apart_i + (away_j * step_j) ** 2
                    if apart >= best:
                        break
                    for row_j in (j - away_j, j + away_j) if away_j else (j, -1):
                        if row_j < box[1, 0] or row_j >= box[1, 1]:
                            continue
                        visits += 1
                        row = (row_i - box[0, 0]) * width_j + row_j - box[1, 0]
                        low, high = rows[row], rows[row + 1]
                        end = high
                        while low < high:  # the first point of the row at or beyond k
                            middle = (low + high) // 2
                            if points[middle, 2] < k:
                                low = middle + 1
                            else:
                                high = middle
                        for point in (low - 1, low):
                            if rows[row] <= point < end:
                                distance = apart + ((points[point, 2] - k) * step_k) ** 2
                                if distance < best:
                                    best, guess = distance, point
        squared[query] = best
    return len(queries)


@compiled(nogil=True)
def planes(queries, order, points, rows, box, spacing, squared):
    """As `search`, for the queries that `order` lists sorted by (k, j): the exact distance transform of Felzenszwalb
    and Huttenlocher (2012), plane by plane of k, in the time of a pass over the two boxes whatever the distances are.
    """
    step_i, step_j, step_k = spacing
    size_i, size_j = box[0, 1] - box[0, 0], box[1, 1] - box[1, 0]
    low_i, high_i = queries[order, 0].min(), queries[order, 0].max()
    low_j, high_j = queries[order, 1].min(), queries[order, 1].max()
    nearest = rows[:-1].copy()  # of each row, the point nearest to the plane; moves only forward as k grows
    row_line, across = np.empty(size_j), np.empty(high_j - low_j + 1)
    turned = np.empty((high_j - low_j + 1, size_i))
    line = np.empty(high_i - low_i + 1)
    parabola, edge = np.empty(max(size_i, size_j), np.int64), np.empty(max(size_i, size_j))
    plane, column = -1, -1
    for query in order:
        i, j, k = queries[query]
        if k != plane:
            plane, column = k, -1
            for row_i in range(size_i):
                for row_j in range(size_j):
                    row = row_i * size_j + row_j
                    point, end = nearest[row], rows[row + 1]
                    if point == end:  # an empty row
                        row_line[row_j] = np.inf
                        continue
                    while point + 1 < end and abs(points[point + 1, 2] - k) <= abs(points[point, 2] - k):
                        point += 1
                    nearest[row] = point
                    row_line[row_j] = ((points[point, 2] - k) * step_k) ** 2
                _envelope(row_line, box[1, 0], across, low_j, step_j, parabola, edge)
                turned[:, row_i] = across
        if j != column:
            column = j
            _envelope(turned[j - low_j], box[0, 0], line, low_i, step_i, parabola, edge)
        squared[query] = line[i - low_i]


@compiled(nogil=True)
def _envelope(source, source_first, target, target_first, step, parabola, edge):
    """target[t] = min over s of source[s] + (place of t - place of s)^2, places being (first + index) * step in mm.

    `parabola` and `edge` are room for the lower envelope: which source rules, and from which place on.
    """
    top = -1
    for s in range(len(source)):
        if source[s] == np.inf:
            continue
        place, cross = (source_first + s) * step, -np.inf
        while top >= 0:
            under = (source_first + parabola[top]) * step
            cross = (source[s] + place**2 - source[parabola[top]] - under**2) / (2 * (place - under))
            if cross > edge[top]:
                break
            top -= 1
        top += 1
        parabola[top], edge[top] = s, cross if top else -np.inf
    at = 0
    for t in range(len(target)):
        place = (target_first + t) * step
        while at < top and edge[at + 1] < place:
            at += 1
        target[t] = np.inf if top < 0 else source[parabola[at]] + (place - (source_first + parabola[at]) * step) ** 2


def distances_mm(start: Surface, goal: Surface, spacing: tuple[float, float, float]) -> np.ndarray:
    """From each voxel of `start` the distance in mm to the nearest voxel of `goal`, exactly: (n,) float64."""
    squared = np.empty(len(start.points))
    goal_box = goal.box[:, 1] - goal.box[:, 0]
    start_box = start.box[:, 1] - start.box[:, 0]
    # What `planes` costs, in row visits of `search`: its two passes touch about this many cells.
    budget = int((goal_box[0] * goal_box[1] + goal_box[0] * start_box[1]) * start_box[2])
    done = search(start.points, goal.points, goal.rows, goal.box, spacing, squared, budget)
    if done < len(squared):
        rest = start.points[done:]
        order = done + np.lexsort((rest[:, 1], rest[:, 2]))
        planes(start.points, order, goal.points, goal.rows, goal.box, spacing, squared)
    return np.sqrt(squared)
