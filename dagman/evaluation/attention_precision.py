"""Attention as segmentation: the voxel average precision, for each organ, of where heads look in held-out scans.

SPAN (Miao et al. 2022, arXiv 2209.03745, abstract) reports the mAP of attention masks and does not say how it was
computed: ours is `average_precision` of a map that is enlarged to voxels. Whatever else gives a value for each cell of
a crop is judged by the same rule: the prior alone, which a guided head must beat or it has only copied it, and the
truth itself on the same cells, which no map of these cells can be much better than.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from dagman.attention.maps import Looker, enlarged, relative_maps
from dagman.attention.spatial_prior import Priors
from dagman.evaluation.average_precision import average_precision
from dagman.evaluation.crop_features import Probing, Scores
from dagman.evaluation.retrieval import draw_crops
from spade3d.crops.crop import Crop, cut, cut_labels
from spade3d.crops.pairs import as_images
from spade3d.faults import DataFault

BATCH = 8  # crops at once

MapsOf = Callable[[Sequence[Crop]], Float[np.ndarray, "crop map i j k"]]  # higher where a map sees more of its organ


@dataclass(frozen=True)
class Precisions:
    """organ -> subject -> the average precision of each map, over the crops of the subject that show the organ.

    pooled  of all voxels of these crops together: also that a map is higher in a crop that shows more of the organ
    within  the mean over these crops of the precision in each: only that a map finds the organ within a crop
    """

    pooled: Scores
    within: Scores


def attention_precision(
    maps_of: MapsOf, store, cases: Sequence[int], how: Probing, organs: Mapping[str, int], least: float = 0.0
) -> Precisions:
    """How well maps find the voxels of `organs` (name -> value of the labels) in `how.crops` crops of each case.

    least  share of a crop that an organ must take at least for the crop to count; a crop without a voxel never does

    The crops are those of `draw_crops`, the same for all maps that are compared. A subject of whom no crop shows the
    organ is left out of it. DataFault for a case without labels, and for an organ that no crop shows.
    """
    by_subject: dict[str, list[Crop]] = {}
    for case in cases:
        if not store.cases[case].has_labels:
            raise DataFault(f"{store.cases[case].name}: has no labels to judge attention by; give labelled scans")
        by_subject.setdefault(store.cases[case].subject, []).extend(draw_crops(store, case, how))
    pooled: dict[str, dict[str, list[float]]] = {organ: {} for organ in organs}
    within: dict[str, dict[str, list[float]]] = {organ: {} for organ in organs}
    for subject, crops in by_subject.items():
        maps = np.concatenate([maps_of(crops[n : n + BATCH]) for n in range(0, len(crops), BATCH)])
        labels = np.stack([cut_labels(store, crop) for crop in crops])
        for organ, value in organs.items():
            share = (labels == value).mean(axis=(1, 2, 3))
            shown = (share > 0) & (share >= least)
            if shown.any():
                truth, of_map = labels[shown] == value, np.moveaxis(maps[shown], 1, 0)
                pooled[organ][subject] = [average_precision(one, truth) for one in of_map]
                within[organ][subject] = [
                    float(np.mean([average_precision(*crop) for crop in zip(one, truth)])) for one in of_map
                ]
    if hidden := [organ for organ, of in pooled.items() if not of]:
        raise DataFault(
            f"no crop of {len(cases)} scans shows {', '.join(hidden)}; draw more or larger crops, or leave it out"
        )
    return Precisions(pooled, within)


def heads_of(looker: Looker, store) -> MapsOf:
    """The mean over all heads, then each head, of networks that are ready to look."""
    device = next(looker.encoder.parameters()).device

    def maps_of(crops: Sequence[Crop]) -> np.ndarray:
        images = as_images([cut(store, crop) for crop in crops])
        return relative_maps(looker, images.to(device)).cpu().numpy()

    return maps_of


def prior_alone(priors: Priors, cell: tuple[int, int, int]) -> MapsOf:
    """Each region's prior on the cells that heads have, used as if it were the prediction."""
    return lambda crops: _at_voxels(priors.of_crops(crops, cell), cell, crops)


def truth_on_cells(store, organs: Mapping[str, int], cell: tuple[int, int, int]) -> MapsOf:
    """The share of each cell that each organ truly takes: what cells of this size allow."""

    def maps_of(crops: Sequence[Crop]) -> np.ndarray:
        labels = np.stack([cut_labels(store, crop) for crop in crops])
        true = torch.from_numpy(np.stack([labels == value for value in organs.values()], axis=1)).float()
        return _at_voxels(F.avg_pool3d(true, cell, ceil_mode=True).numpy(), cell, crops)

    return maps_of


def _at_voxels(cells: np.ndarray, cell: tuple[int, int, int], crops: Sequence[Crop]) -> np.ndarray:
    """As the attention of heads is enlarged."""
    return enlarged(torch.from_numpy(cells), cell, crops[0].shape).numpy()
