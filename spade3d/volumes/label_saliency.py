"""Labels -> saliency: chosen structures, grown and blurred by millimetres. It is not gaze, and the store says so."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy import ndimage

from spade3d.faults import UsageFault
from spade3d.volumes.organs import canonical_organ


def label_map(
    labels: np.ndarray, values: Collection[int], spacing: Sequence[float], *, dilate_mm: float, blur_mm: float
) -> np.ndarray:
    """Saliency float32 0..1 on the grid of `labels` (i, j, k): the structures and all within `dilate_mm` of them,
    under a Gaussian of standard deviation `blur_mm`, its peak at 1; zeros where none of them is there."""
    mask = np.isin(labels, list(values))
    if not mask.any():
        return np.zeros(labels.shape, dtype=np.float32)
    if dilate_mm > 0:
        mask = ndimage.distance_transform_edt(~mask, sampling=spacing) <= dilate_mm
    saliency = mask.astype(np.float32)
    if blur_mm > 0:
        saliency = ndimage.gaussian_filter(saliency, blur_mm / np.asarray(spacing), mode="nearest")
    return saliency / saliency.max()


def label_values(names: Sequence[str], table: Mapping[int, str]) -> tuple[int, ...]:
    """The values of some structures, all of them for no names; UsageFault for a name that the table does not have."""
    value_of = {canonical_organ(name): value for value, name in table.items()}
    unknown = [name for name in names if canonical_organ(name) not in value_of]
    if unknown:
        raise UsageFault(
            f"--names {', '.join(unknown)}: not among the store's structures ({', '.join(table.values())})"
        )
    return tuple(value_of[canonical_organ(name)] for name in names) or tuple(table)
