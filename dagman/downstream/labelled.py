"""Labelled crops, balanced over classes: the batches of fine-tuning, each a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spade3d.crops.crop import Box, Crop, Views, cut, cut_labels, draw_box, draw_view, keep_inside, scan_bounds
from spade3d.crops.pairs import as_images
from spade3d.faults import DataFault

REMEMBERED = 4096  # voxels kept of each class of a scan, to centre crops on


@dataclass(frozen=True)
class Classes:
    """The foreground classes of a dataset: class c + 1 is `names[c]`, written as `values[c]` in its files."""

    names: tuple[str, ...]
    values: tuple[int, ...]

    def __len__(self) -> int:
        """Background included: the channels of a network."""
        return len(self.names) + 1

    def index(self, labels: np.ndarray, case: str) -> np.ndarray:
        """Values of the files (uint16) -> classes 0..n (uint8). DataFault, naming the case, for any other value."""
        table = np.full(1 << 16, 255, dtype=np.uint8)
        table[[0, *self.values]] = np.arange(len(self))
        classes = table[labels]
        if (classes == 255).any():
            strange = np.unique(labels[classes == 255])
            raise DataFault(
                f"{case}: label values {strange.tolist()} are not among {list(self.values)}; correct the labels, or "
                "give them names in the dataset's table"
            )
        return classes

    def written(self, classes: np.ndarray) -> np.ndarray:
        """Classes 0..n -> values of the files, uint8 where they fit."""
        table = np.array([0, *self.values], dtype=np.uint8 if max(self.values) < 256 else np.uint16)
        return table[classes]


def classes_of(store) -> Classes:
    """The classes of a store: its table of names, or `label 1`, `label 2`, ... for the values that occur."""
    present = sorted({value for case in store.cases for value in case.label_values})
    values = sorted(store.label_names) or present
    if not values:
        raise DataFault("no scan has a labelled structure; fine-tuning needs labels: see the known layouts in the docs")
    if len(values) > 254:
        raise DataFault(f"{len(values)} label values; at most 254 classes are supported: are these labels?")
    return Classes(tuple(store.label_names.get(value, f"label {value}") for value in values), tuple(values))


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Crops and their classes."""

    images: Tensor  # float32 (n, 1, i, j, k)
    classes: Tensor  # int64 (n, 1, i, j, k)
    scans: tuple[str, ...]  # n: their names

    def to(self, device: torch.device) -> LabelledBatch:
        images, classes = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.classes))
        return LabelledBatch(images, classes, self.scans)

    def pin_memory(self) -> LabelledBatch:
        """In memory from which a GPU copies while it computes."""
        return LabelledBatch(self.images.pin_memory(), self.classes.pin_memory(), self.scans)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class LabelledSampling:
    """Crop in voxels and mm; a share `foreground` of the crops is centred on a structure, each class equally often.

    `spacing` None is that of the scan that a crop is cut from, where scans were prepared with their own.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    crops: int = 2
    foreground: float = 0.67
    views: Views = Views()


class LabelledStream:
    """Batches of labelled crops from a store, without end and without state.

    share  (rank, world): of each batch the part that this one of so many processes learns from. All of them draw the
           whole batch, and cut their own crops.
    """

    def __init__(
        self,
        store,
        cases: Sequence[int],
        classes: Classes,
        sampling: LabelledSampling,
        *,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        if not cases:
            raise ValueError("no labelled cases to draw from")
        self.store, self.cases, self.classes, self.sampling, self.seed = store, list(cases), classes, sampling, seed
        part, rest = divmod(sampling.crops, share[1])
        if rest:
            raise ValueError(f"{sampling.crops} crops cannot be shared evenly by {share[1]} processes")
        self.own = slice(share[0] * part, (share[0] + 1) * part)
        self.spots = {case: self.find_spots(case) for case in self.cases}

    def find_spots(self, case: int) -> list[np.ndarray]:
        """For each class present: some of its voxels (n, 3) in mm of the scan, evenly spread over all of them."""
        labels = self.classes.index(self.store.labels(case), self.store.cases[case].name)
        spacing = np.asarray(self.store.cases[case].spacing)
        found = []
        for c in range(1, len(self.classes)):
            voxels = np.argwhere(labels == c)
            if len(voxels):
                found.append(voxels[:: -(-len(voxels) // REMEMBERED)] * spacing)
        return found

    def stream(self, start: int, stop: int) -> Iterator[LabelledBatch]:
        return (self.batch(step) for step in range(start, stop))

    def batch(self, step: int) -> LabelledBatch:
        rng = np.random.default_rng([self.seed, step])
        crops = [self.draw(rng) for _ in range(self.sampling.crops)][self.own]
        classes = [
            self.classes.index(cut_labels(self.store, crop), self.store.cases[crop.case].name).astype(np.int64)
            for crop in crops
        ]
        names = tuple(self.store.cases[crop.case].name for crop in crops)
        return LabelledBatch(as_images([cut(self.store, crop) for crop in crops]), as_images(classes), names)

    def draw(self, rng: np.random.Generator) -> Crop:
        """A view somewhere in a scan; near a voxel of a class drawn evenly among those present, in a share of cases."""
        sampling = self.sampling
        case = self.cases[rng.integers(len(self.cases))]
        size = np.asarray(sampling.shape) * (sampling.spacing or self.store.cases[case].spacing)
        spots, bounds = self.spots[case], scan_bounds(self.store.cases[case])
        box = draw_box(rng, tuple(size), bounds)
        if spots and rng.random() < sampling.foreground:
            of_class = spots[rng.integers(len(spots))]
            centre = of_class[rng.integers(len(of_class))] + (rng.random(3) - 0.5) * size / 2
            box = Box(tuple(keep_inside(centre, size, bounds)), tuple(size))
        return draw_view(rng, case, box, sampling.shape, sampling.views)
