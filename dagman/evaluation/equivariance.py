"""Equivariance: do the features of a crop and of its turned twin agree at the same places, and only there?"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dagman.evaluation.crop_features import (
    Encoder,
    NothingToAsk,
    Probing,
    Scores,
    best_of,
    grouped,
    plain_crop,
    stages_of,
    vectors_at,
)
from spade3d.crops.correspondences import voxels_at
from spade3d.crops.crop import (
    Box,
    Crop,
    Views,
    body_bounds,
    box_to_mm,
    draw_box,
    draw_partner,
    rotation,
    scan_bounds,
)

MEASURES = ("agreement", "features", "position", "chance")
Change = Literal["moved", "flipped", "turned", "scaled"]
CHANGES: tuple[Change, ...] = ("moved", "flipped", "turned", "scaled")
LIKE_TRAINING = Views()  # how far a twin is turned and scaled
OVERLAP = (0.2, 0.4)  # of a crop and its twin, before it is changed
FLIPS = np.array([(i, j, k) for i in (1, -1) for j in (1, -1) for k in (1, -1)][1:])


def twin_agreement(encoder: Encoder, store, cases: Sequence[int], how: Probing) -> tuple[Scores, int]:
    """How well points of a crop are found again in its twin, by features; and how many twins shared no two points.

    Every twin lies some way off, and has one change besides ("moved": none). Nothing is coloured. Points are read at
    their exact place in both. Measures by subject, one value a twin:

    agreement  mean cosine at matched points less the mean cosine at points that do not match: 0 after a collapse
    features   share of points whose nearest vector in the twin, by cosine, lies within `how.near_mm` of the truth
    position   the same for the point that lies most alike in its crop: what an encoder that knows only that would find
    chance     the same for a point of the twin that was drawn at random
    Raises NothingToAsk where no twin is left.
    """
    found: dict[str, list[tuple[str, dict[str, float]]]] = {change: [] for change in CHANGES}
    missed = 0
    for case in cases:
        rng, bounds = np.random.default_rng([how.seed, case]), body_bounds(store.cases[case])
        for _ in range(how.twins):
            box = draw_box(rng, how.size_mm, bounds)
            crop = plain_crop(case, box, how.shape)
            stages = stages_of(encoder, store, [crop], how.device)
            for change in CHANGES:
                twin = draw_twin(rng, case, draw_partner(rng, box, bounds, OVERLAP), how.shape, change)
                places = shared_places(rng, store.cases[case], crop, twin, how.points)
                if len(places) < 2:
                    missed += 1
                    continue
                here = vectors_at(stages, crop, places, how.stages)
                there = vectors_at(stages_of(encoder, store, [twin], how.device), twin, places, how.stages)
                cosines = (here @ there.T).double().cpu().numpy()
                inside = [voxels_at(one, places) * how.spacing for one in (crop, twin)]
                found[change].append((store.cases[case].subject, agreement(cosines, places, *inside, how.near_mm)))
    if not all(found.values()):
        raise NothingToAsk(
            f"{len(cases)} scans hold no crop of {how.size_mm} mm and a twin that share points; take smaller crops"
        )
    return {
        f"equivariance.{change}.{measure}": grouped(
            [subject for subject, _ in rows], np.array([values[measure] for _, values in rows])
        )
        for change, rows in found.items()
        for measure in MEASURES
    }, missed


def agreement(
    cosines: np.ndarray, places: np.ndarray, in_crop: np.ndarray, in_twin: np.ndarray, near_mm: float
) -> dict[str, float]:
    """The measures of one twin.

    cosines (n, n) of points in the crop (rows) and in the twin (columns), at the same places (n, 3) in mm of the scan;
    in_crop, in_twin (n, 3) are the same points in mm within the crop and within the twin.
    """
    same = np.eye(len(places), dtype=bool)
    near = distances(places, places) <= near_mm
    return {
        "agreement": float(cosines[same].mean() - cosines[~same].mean()),
        "features": float(best_of(cosines, near).mean()),
        "position": float(best_of(-distances(in_crop, in_twin), near).mean()),
        "chance": float(near.mean()),
    }


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between each two points (n, 3), (m, 3): (n, m)."""
    return np.linalg.norm(a[:, None] - b[None, :], axis=-1)


def draw_twin(rng: np.random.Generator, case: int, box: Box, shape: tuple[int, int, int], change: Change) -> Crop:
    """A box of a scan with one spatial change about its centre, within what the views of training do."""
    match change:
        case "moved":
            linear = np.eye(3)
        case "flipped":
            linear = np.diag(FLIPS[rng.integers(len(FLIPS))]).astype(float)
        case "turned":
            limit = LIKE_TRAINING.rotation_deg
            linear = rotation(np.radians(rng.uniform(-limit, limit, 3)))
        case "scaled":
            linear = np.eye(3) / np.exp(rng.uniform(*np.log(LIKE_TRAINING.zoom)))
    return Crop(case, shape, box_to_mm(box, shape, linear))


def shared_places(rng: np.random.Generator, case, crop: Crop, twin: Crop, most: int) -> np.ndarray:
    """At most `most` places (n, 3), in mm, drawn evenly where crop, twin and scan overlap."""
    inside = rng.uniform(0, np.asarray(crop.shape) - 1, (32 * most, 3))
    places = inside @ crop.to_mm[:3, :3].T + crop.to_mm[:3, 3]
    there, (low, high) = voxels_at(twin, places), scan_bounds(case)
    shared = ((there >= 0) & (there <= np.asarray(twin.shape) - 1) & (places >= low) & (places <= high)).all(axis=1)
    return places[shared][:most]
