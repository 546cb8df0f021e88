"""Retrieval: does a crop's nearest neighbour in another subject's scan show the same anatomy?"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dagman.evaluation.crop_features import (
    Encoder,
    NothingToAsk,
    Probing,
    Scores,
    best_of,
    grouped,
    place_in_body,
    plain_crop,
    stages_of,
)
from spade3d.crops.crop import Crop, body_bounds, cut_labels, draw_box

BATCH = 8  # crops through the encoder at once


def retrieve(encoder: Encoder, store, cases: Sequence[int], how: Probing) -> tuple[Scores, int]:
    """Organ overlap at rank 1 of random crops of labelled scans, and how many crops were left out.

    A crop is the mean of the last stage over its cells; its neighbour is the nearest crop, by cosine, of any other
    subject. Measures, each in [0, 1], by the subject of the crop that asks:

    features  the overlap of the two crops' organs (`organ_overlap`)
    position  the same where the neighbour is the nearest in the body's box, which needs no network
    chance    the mean overlap over all crops that could have been chosen
    ceiling   the largest
    Crops without any organ voxel are left out: nothing could be right about them. Raises NothingToAsk where fewer than
    two subjects remain.
    """
    drawn = [crop for case in cases for crop in draw_crops(store, case, how)]
    counts = organ_counts([cut_labels(store, crop) for crop in drawn])
    shows = counts.any(axis=1)
    crops, overlap = [crop for crop, some in zip(drawn, shows) if some], organ_overlap(counts[shows])
    subjects = np.array([store.cases[crop.case].subject for crop in crops])
    if len(np.unique(subjects)) < 2:
        raise NothingToAsk(
            f"{len(cases)} scans to retrieve from, of which {len(np.unique(subjects))} subjects show an organ; "
            "2 subjects are needed: give more labelled scans"
        )
    other = subjects[:, None] != subjects[None, :]
    vectors = mean_of_last(encoder, store, crops, how.device)
    places = np.stack([place_in_body(store.cases[crop.case], middle_of(crop)) for crop in crops])
    apart = np.linalg.norm(places[:, None] - places[None, :], axis=-1)
    found = {
        "features": best_of(np.where(other, (vectors @ vectors.T).cpu().numpy(), -np.inf), overlap),
        "position": best_of(np.where(other, -apart, -np.inf), overlap),
        "chance": (overlap * other).sum(axis=1) / other.sum(axis=1),
        "ceiling": (overlap * other).max(axis=1),
    }
    scores = {f"retrieval.{measure}": grouped(subjects.tolist(), values) for measure, values in found.items()}
    return scores, len(drawn) - len(crops)


def draw_crops(store, case: int, how: Probing) -> list[Crop]:
    """Crops anywhere in the body of a scan; those of a scan do not depend on which other scans are asked for."""
    rng, bounds = np.random.default_rng([how.seed, case]), body_bounds(store.cases[case])
    return [plain_crop(case, draw_box(rng, how.size_mm, bounds), how.shape) for _ in range(how.crops)]


def mean_of_last(encoder: Encoder, store, crops: Sequence[Crop], device: str) -> Float[Tensor, "crop c"]:
    """Unit vectors: the mean of the last stage over its cells."""
    parts = [stages_of(encoder, store, crops[n : n + BATCH], device)[-1] for n in range(0, len(crops), BATCH)]
    return F.normalize(torch.cat(parts).mean(dim=(2, 3, 4)), dim=1)


def organ_counts(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Voxels of each organ in each crop, (crop, organ): every label value that occurs, background left out."""
    found = [np.unique(one[one > 0], return_counts=True) for one in labels]
    values = np.unique(np.concatenate([present for present, _ in found]))
    counts = np.zeros((len(labels), len(values)), dtype=np.int64)
    for row, (present, count) in zip(counts, found, strict=True):
        row[np.searchsorted(values, present)] = count
    return counts


def organ_overlap(counts: np.ndarray) -> np.ndarray:
    """Generalised Jaccard (Ruzicka) of the organs of each two crops:  sum_o min(p_o, q_o) / sum_o max(p_o, q_o).

    counts (crop, organ), in crops of one size, so that they stand for shares of a crop; no crop is empty. 1 means the
    same organs at the same share of the crop, 0 no organ in common.
    """
    # sum max = sum p + sum q - sum min, and sum min organ by organ keeps (crop, crop, organ) out of memory.
    both = np.zeros((len(counts), len(counts)))
    for organ in counts.T:
        both += np.minimum(organ[:, None], organ[None, :])
    total = counts.sum(axis=1)
    return both / (total[:, None] + total[None, :] - both)


def middle_of(crop: Crop) -> np.ndarray:
    """The middle of a crop (3,) in mm of its scan."""
    return crop.to_mm[:3, :3] @ ((np.asarray(crop.shape) - 1) / 2) + crop.to_mm[:3, 3]
