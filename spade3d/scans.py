"""DATA of a command, whatever it is, opened as a store: one that exists, or a new one made from scans."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spade3d.configuration import NATIVE, Data
from spade3d.console import existing, progress_of
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.layouts import Dataset, read_layout
from spade3d.volumes.preprocessing import Preprocessing, choose_spacing
from spade3d.volumes.store import VolumeStore, is_store
from spade3d.volumes.volume import Grid, read_grid

if TYPE_CHECKING:
    from spade3d.volumes.prepare import Rejection


def open_scans(
    path: Path,
    beside: Path,
    settings: Data,
    *,
    workers: int = 0,
    strict: bool = False,
    labelled_only: bool = False,
    dataset: Dataset | None = None,
    only: Collection[str] | None = None,
) -> VolumeStore:
    """The store at `path`, or a store made at `beside` from the scans at `path`, from those with labels, or from those
    of some names alone; `dataset`: what was read there already. How scans are prepared follows from all of them.

    Spacing left to the data is the median of the set, axis by axis; "native" keeps each scan's own. Raises DataFault
    for what cannot be read, and UsageFault where the settings ask for another preparation than an existing store has.
    """
    from spade3d.volumes.prepare import prepare

    existing(path, "a folder of scans, a dataset or a store")
    if is_store(path):
        return check_settings(VolumeStore.open(path), settings)
    dataset = dataset or read_layout(path)
    how = preparation(dataset, settings)
    with progress_of(f"preparing {dataset.name}") as progress:
        return prepare(
            dataset,
            beside,
            how,
            workers=workers,
            strict=strict,
            labelled_only=labelled_only,
            only=only,
            progress=progress,
        )


def prepare_share(path: Path, store: Path, settings: Data, part: int, of: int, *, workers: int = 0) -> list[Rejection]:
    """Prepare a share of the scans at `path` into `store`, beside other machines (`prepare.prepare_part`)."""
    from spade3d.volumes.prepare import prepare_part

    dataset = read_layout(existing(path, "a folder of scans or a dataset"))
    with progress_of(f"preparing part {part} of {of} of {dataset.name}") as progress:
        return prepare_part(
            dataset, store, preparation(dataset, settings), part, of, workers=workers, progress=progress
        )


def preparation(dataset: Dataset, settings: Data) -> Preprocessing:
    """How a dataset's scans are prepared; it depends on all of them, whatever part of them is."""
    native = settings.spacing == NATIVE
    spacing = None if native else settings.spacing or choose_spacing(list(readable_grids(dataset)))
    return Preprocessing(spacing=spacing, window_hu=settings.window_hu, mr=settings.mr)


def readable_grids(dataset: Dataset) -> Iterator[Grid]:
    """The grids of a dataset's images, from their headers; `prepare` will name the images that cannot be read."""
    faults = []
    for case in dataset.cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `prepare` will note what is odd
                grid = read_grid(case.image, series=case.series)
            yield grid
        except DataFault as fault:
            faults.append(fault)
    if len(faults) == len(dataset.cases):
        raise faults[0]


def check_settings(store: VolumeStore, settings: Data) -> VolumeStore:
    """A store was prepared once and for all: settings that were given must be the ones it was prepared with.

    Of a store that keeps each scan's own spacing crops of any spacing are cut: there it may be given in mm.
    """
    for key in sorted(settings.model_fields_set & {"spacing", "window_hu", "mr"}):
        asked, has = getattr(settings, key), getattr(store.preprocessing, key)
        if asked is not None and has is not None and not _same(asked, has):
            raise UsageFault(
                f"data.{key} {asked} asked for, the store has {has}; leave it out, or prepare another store"
            )
    return store


def _same(a, b) -> bool:
    return a == b if isinstance(a, str) else np.allclose(a, b)


def typical_grid(store: VolumeStore, cases: Sequence[int]) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Median shape (3,) in voxels of some cases of a store, and the spacing in mm that it was prepared to, to the last
    digit (else the same configuration would not prepare the same scans again); their median, where it was to none."""
    chosen = [store.cases[i] for i in cases]
    r, a, s = store.preprocessing.spacing or np.median([case.spacing for case in chosen], axis=0).tolist()
    return np.median([case.shape for case in chosen], axis=0), (r, a, s)
