"""The labels of one case: read, brought onto its image's grid, merged, and checked against the dataset's table."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.geometry import canonical_flips, same_grid
from spade3d.volumes.layouts import Case, Dataset
from spade3d.volumes.volume import Volume, read_labels


def label_table(dataset: Dataset) -> dict[int, str]:
    """Value -> name. Per-structure masks without a table are numbered from 1 in the order of their names."""
    if dataset.label_names:
        return dict(dataset.label_names)
    masks = {name for case in dataset.cases if isinstance(case.labels, Mapping) for name in case.labels}
    return dict(enumerate(sorted(masks), start=1))


def read_case_labels(case: Case, volume: Volume, names: Mapping[int, str]) -> tuple[np.ndarray | None, list[str]]:
    """The label values of a case on its image's grid and in its orientation, checked against the table; and notes."""
    if case.labels is None:
        return None, []
    if not isinstance(case.labels, Mapping):
        labels = _on_grid(case.labels, volume)
        _check_values(case.labels, labels, names)
        return labels, []
    value_of = {name: value for value, name in names.items()}
    unknown = sorted(set(case.labels) - set(value_of))
    if unknown:
        raise DataFault(
            f"{case.image}: masks {unknown} are not in the label table ({_table(names)}); add them, or remove them"
        )
    merged, overlap = np.zeros(volume.voxels.shape, dtype=np.uint16), 0
    for name in sorted(case.labels, key=value_of.__getitem__):
        mask = _on_grid(case.labels[name], volume) != 0
        overlap += int(np.count_nonzero(merged[mask]))
        merged[mask] = value_of[name]
    note = f"{case.name}: {overlap} voxels lie in more than one mask; the one of the highest value was kept"
    return merged, [note] if overlap else []


def _on_grid(path: Path, volume: Volume) -> np.ndarray:
    """Label voxels in the image's orientation; a file that holds the same grid in another axis order is turned."""
    labels = read_labels(path)
    ours = canonical_flips(volume.affine, volume.shape)
    theirs = canonical_flips(labels.affine, labels.shape)
    difference = same_grid(
        ours.canonical_shape, ours.affine(volume.affine), theirs.canonical_shape, theirs.affine(labels.affine)
    )
    if difference:
        raise DataFault(
            f"{path}: lies on another grid than its image: {difference}; resample the labels onto the image's grid"
        )
    return ours.undo(theirs.apply(labels.voxels))


def _check_values(path: Path, labels: np.ndarray, names: Mapping[int, str]) -> None:
    if not names:
        return
    values, counts = np.unique(labels, return_counts=True)
    outside = [(v, n) for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v != 0 and v not in names]
    if outside:
        listed = ", ".join(f"{value} ({count} voxels)" for value, count in outside[:10])
        more = f" and {len(outside) - 10} more" if len(outside) > 10 else ""
        raise DataFault(
            f"{path}: label values {listed}{more} are not in the table ({_table(names)}); correct one of them"
        )


def _table(names: Mapping[int, str]) -> str:
    listed = [f"{value} {name}" for value, name in sorted(names.items())]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
