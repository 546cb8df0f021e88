"""The labels of one case: read, brought onto its image's grid, merged, and checked against the dataset's table.

A value that the table does not have is never dropped in silence. In general its case is refused, because a table that
its owner wrote is as likely to be wrong as the file. BTCV, AMOS and MM-WHS have one published table and few cases, and
their files are known to hold stray values (421 beside 420 in MM-WHS is often told of): there voxels of stray values
become background, for training and for scoring, if they are at most 1 % of the labelled voxels of the file, and a note
says which value, how many voxels and what share. Above that the case is refused as elsewhere. 65535 is refused always:
it is -1, or no number, written into 16 bits without a sign, and tells of a file that was converted wrongly.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.geometry import canonical_flips, same_grid
from spade3d.volumes.layouts import Case, Dataset
from spade3d.volumes.volume import Volume, read_labels

PUBLISHED = ("BTCV", "AMOS", "MM-WHS")  # layouts of one published table
STRAY_SHARE = 0.01  # of the labelled voxels of a file
BAD_CAST = 65535


def label_table(dataset: Dataset) -> dict[int, str]:
    """Value -> name. Per-structure masks without a table are numbered from 1 in the order of their names."""
    if dataset.label_names:
        return dict(dataset.label_names)
    masks = {name for case in dataset.cases if isinstance(case.labels, Mapping) for name in case.labels}
    return dict(enumerate(sorted(masks), start=1))


def stray_share(dataset: Dataset) -> float:
    """How much of a file's labelled voxels may have values outside the table."""
    return STRAY_SHARE if dataset.layout in PUBLISHED else 0.0


def read_case_labels(
    case: Case, volume: Volume, names: Mapping[int, str], stray: float = 0.0
) -> tuple[np.ndarray | None, list[str]]:
    """The label values of a case on its image's grid and in its orientation, checked against the table; and notes.

    `stray`: the share of labelled voxels up to which values outside the table become background; above, a DataFault.
    """
    if case.labels is None:
        return None, []
    if not isinstance(case.labels, Mapping):
        return _without_strays(case.labels, _on_grid(case.labels, volume), names, stray)
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


def _without_strays(
    path: Path, labels: np.ndarray, names: Mapping[int, str], stray: float
) -> tuple[np.ndarray, list[str]]:
    """Labels in which values outside the table are 0, and a note on each of them; DataFault where they are too many."""
    values, counts = np.unique(labels, return_counts=True)
    outside = {v: n for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v != 0 and v not in names}
    if not names or not outside:
        return labels, []
    labelled = int(counts[values != 0].sum())
    if BAD_CAST in outside:
        raise DataFault(
            f"{path}: {outside[BAD_CAST]} voxels have the label value {BAD_CAST}: after a bad cast, -1 or no number "
            "written into 16 bits without a sign; take the original label file, or convert it again"
        )
    if sum(outside.values()) > stray * labelled:
        listed = ", ".join(f"{value} ({count} voxels)" for value, count in list(outside.items())[:10])
        more = f" and {len(outside) - 10} more" if len(outside) > 10 else ""
        raise DataFault(
            f"{path}: label values {listed}{more} are not in the table ({_table(names)}); correct one of them"
        )
    notes = [
        f"{path}: label value {value} is not in the table; its {count} voxels, {count / labelled:.3%} of the labelled "
        "ones, are taken as background"
        for value, count in outside.items()
    ]
    return np.where(np.isin(labels, list(outside)), 0, labels).astype(labels.dtype), notes


def _table(names: Mapping[int, str]) -> str:
    listed = [f"{value} {name}" for value, name in sorted(names.items())]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
