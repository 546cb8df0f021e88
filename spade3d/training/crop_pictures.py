"""What the network was shown: two crops of one place with matched points, and any other volume by name."""

from collections.abc import Iterator, Mapping

import numpy as np

from spade3d.training.page import Html, tag
from spade3d.training.slices import display_shape, enlarge, grid, marked_picture, overlaid, picture, slice_of


def crop_pictures(pictures: Mapping[str, np.ndarray]) -> Iterator[Html]:
    """Keys as `pretraining_report` describes them."""
    spacing = tuple(float(s) for s in pictures.get("spacing", np.ones(3)))
    pair = {"a", "b", "points_a", "points_b"}
    matched = _matched(pictures, spacing) if pair <= pictures.keys() else []
    others = [name for name in pictures if name != "spacing" and not (matched and name in pair)]
    if matched:
        text = (
            "Two crops of one scan as the network saw them. Equal numbers mark the same place in the patient; "
            "a paler mark lies off the slice that is shown."
        )
        yield tag("p", text, class_="lead")
    shown = [picture(_middle(pictures[n], spacing), f"{n}, middle axial slice", f"{n}, middle slice") for n in others]
    yield grid([*matched, *shown], across=3)


def _matched(pictures: Mapping[str, np.ndarray], spacing: tuple[float, float, float], most: int = 8) -> list[Html]:
    """The axial slice of crop a that holds most matched points, and the slice of crop b nearest to their partners."""
    a, b = np.asarray(pictures["points_a"], float), np.asarray(pictures["points_b"], float)
    level = (
        int(np.bincount(np.clip(np.rint(a[:, 2]).astype(int), 0, pictures["a"].shape[2] - 1)).argmax()) if len(a) else 0
    )
    near = np.argsort(np.abs(a[:, 2] - level), kind="stable")[: 4 * most]
    near = near[np.lexsort((a[near, 0], a[near, 1]))][:: max(1, len(near) // most)][:most]  # spread over the slice
    levels = (level, int(np.clip(np.rint(np.median(b[near, 2])), 0, pictures["b"].shape[2] - 1)) if len(near) else 0)
    shown = []
    for name, points, k in zip("ab", (a[near], b[near]), levels):
        grey = _grey(slice_of(pictures[name], 2, k))
        shape = display_shape(grey.shape, (spacing[1], spacing[0]))
        rows, columns = ((n - 1 - points[:, axis] + 0.5) * m / n - 0.5 for axis, n, m in zip((1, 0), grey.shape, shape))
        fade = np.clip(1 - np.abs(points[:, 2] - k) / max(pictures[name].shape[2] / 2, 1), 0.25, 1)
        marks = {str(n): mark for n, mark in enumerate(zip(rows, columns, fade), start=1)}
        shown.append(
            marked_picture(
                overlaid(enlarge(grey, shape), None),
                marks,
                f"Crop {name} with matched points",
                f"Crop {name}, axial slice {k + 1}",
            )
        )
    return shown


def _middle(volume: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    grey = _grey(slice_of(volume, 2, volume.shape[2] // 2))
    return overlaid(enlarge(grey, display_shape(grey.shape, (spacing[1], spacing[0]))), None)


def _grey(values: np.ndarray) -> np.ndarray:
    """Values to 0..1 between their 1st and 99th percentile."""
    low, high = np.percentile(values, (1, 99))
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)
