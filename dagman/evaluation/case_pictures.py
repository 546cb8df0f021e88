"""Validation cases as pictures: scan, truth, prediction and where they differ, in three planes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spade3d.training.charts import key
from spade3d.training.page import Html, tag
from spade3d.training.slices import (
    PLANES,
    colour,
    css,
    display_shape,
    enlarge,
    enlarge_labels,
    fullest,
    grid,
    overlaid,
    picture,
    slice_of,
)

MISSED, ADDED = (240, 140, 40), (70, 150, 245)  # red, green, blue of the difference
HOW_TO_LOOK = (
    "The slices that hold most of the true structures, cropped around them, in true proportions. The patient's right "
    "is at the left; sagittal slices look to the left."
)
_MARGIN_MM = 15.0  # of the scan that is shown around the structures, at least


@dataclass(frozen=True, eq=False)
class CasePicture:
    """A validation case to be shown: image (i, j, k) in 0..1, truth and prediction label maps on its grid, spacing in
    mm; arrays are canonical (R, A, S). The caption says which case it is, such as "worst"."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float, float]
    caption: str

    def __post_init__(self) -> None:
        if not self.image.shape == self.truth.shape == self.prediction.shape:
            raise ValueError(
                f"{self.name}: image {self.image.shape}, truth {self.truth.shape} and prediction "
                f"{self.prediction.shape} must lie on one grid to be shown"
            )


def case_pictures(pictures: Sequence[CasePicture], names: Mapping[int, str]) -> Iterator[Html]:
    """Each case with its legend; `names` are those of the label values."""
    for case in pictures:
        seen = [int(v) for v in np.union1d(np.unique(case.truth), np.unique(case.prediction)) if v > 0]
        colours = [(names.get(v, f"class {v}"), css(colour(v))) for v in seen]
        legend = key([*colours, ("missed or confused", css(MISSED)), ("added", css(ADDED))])
        heading = tag("h3", case.name, tag("small", case.caption))
        yield tag("div", heading, legend, grid(list(_slices(case)), across=4), class_="case")


def _slices(case: CasePicture) -> Iterator[Html]:
    """Scan, truth, prediction and their difference: four pictures a plane."""
    region = _region(case)
    image, truth, prediction = (array[region] for array in (case.image, case.truth, case.prediction))
    asked = truth if (truth > 0).any() else prediction
    for plane, axis in reversed(PLANES.items()):
        index = fullest(asked, axis)
        down, across = [a for a in (2, 1, 0) if a != axis]
        grey, true, found = (slice_of(array, axis, index) for array in (image, truth, prediction))
        shape = display_shape(grey.shape, (case.spacing[down], case.spacing[across]))
        grey, true, found = enlarge(grey, shape), enlarge_labels(true, shape), enlarge_labels(found, shape)
        where = f"{plane} {index + region[axis].start + 1} of {case.image.shape[axis]}"
        yield picture(overlaid(grey, None), f"{case.name}, {where}", where)
        yield picture(overlaid(grey, true), f"{case.name}, {where}, truth outlined", "truth")
        yield picture(overlaid(grey, found), f"{case.name}, {where}, prediction outlined", "prediction")
        yield picture(_difference(grey, true, found), f"{case.name}, {where}, difference", "difference")


def _region(case: CasePicture) -> tuple[slice, slice, slice]:
    """The box around every labelled voxel, true or predicted, with a quarter of its size or _MARGIN_MM around it."""
    labelled = np.argwhere((case.truth > 0) | (case.prediction > 0))
    if not len(labelled):
        return tuple(slice(0, n) for n in case.image.shape)
    low, high = labelled.min(axis=0), labelled.max(axis=0) + 1
    margin = np.ceil(np.maximum((high - low) / 4, _MARGIN_MM / np.array(case.spacing))).astype(int)
    start, stop = np.maximum(low - margin, 0), np.minimum(high + margin, case.image.shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop))


def _difference(grey: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Grey (row, column) with what was missed or confused in orange and what was added in blue -> uint8 RGB."""
    rgb = np.repeat(np.clip(grey, 0, 1)[..., None] * 255, 3, axis=2) * 0.7
    rgb[(truth > 0) & (prediction != truth)] = MISSED
    rgb[(truth == 0) & (prediction > 0)] = ADDED
    return np.rint(rgb).astype(np.uint8)
