"""Largest-component clean-up: of each class only the largest connected piece stays, the rest becomes background."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), dtype=bool)  # 26 neighbours: faces, edges and corners


def keep_largest(labels: np.ndarray, values: Sequence[int]) -> dict[int, int]:
    """Clean a label map (i, j, k) in place; returns how many voxels of each value were taken away.

    Pieces are 26-connected; of pieces equally large the one that comes first along i, then j, then k, stays. Beside
    the map this takes 6 bytes for each voxel of the box around the largest class.
    """
    boxes = ndimage.find_objects(labels, max_label=max(values, default=1))
    return {value: _keep_largest(labels[boxes[value - 1]], value) for value in values if boxes[value - 1] is not None}


def _keep_largest(labels: np.ndarray, value: int) -> int:
    found = labels == value
    pieces, count = ndimage.label(found, TOUCHING)
    if count < 2:
        return 0
    sizes = ndimage.sum_labels(found, pieces, range(1, count + 1))
    rest = found & (pieces != 1 + int(np.argmax(sizes)))
    labels[rest] = 0
    return int(np.count_nonzero(rest))
