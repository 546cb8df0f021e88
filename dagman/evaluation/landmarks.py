"""Landmarks: how far from the truth is a point of one scan when it is found in another subject's scan by its features?

Landmarks come from the labels: the centroid of each organ, and where it reaches farthest to the right, left, front,
back, head and feet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dagman.evaluation.crop_features import (
    Encoder,
    NothingToAsk,
    Probing,
    Scores,
    grouped,
    place_in_body,
    plain_crop,
    stages_of,
    vectors_at,
    vectors_over_scan,
)
from spade3d.crops.crop import Box, body_bounds, keep_inside, scan_to_world

CENTROID = "centroid"
SIDES = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
MEASURES = ("features", "position", "random", "floor")

Mark = tuple[int, str]  # label value, and CENTROID or one of SIDES


@dataclass(frozen=True, eq=False)
class Marked:
    """The landmarks of one scan: where each is (3,), in mm of the scan, and its vector as the encoder sees it."""

    places: Mapping[Mark, np.ndarray]
    vectors: Mapping[Mark, Float[Tensor, " c"]]


def landmark_errors(encoder: Encoder, store, cases: Sequence[int], how: Probing) -> tuple[Scores, int]:
    """Errors in mm of landmarks of each scan that were looked for in every other subject's; and organs left out.

    Measures, for centroids and for surface points, by the subject whose landmark is looked for:

    features  the place whose vector is nearest, by cosine, to the landmark's own; places lie `how.step` voxels apart
    position  the same relative place in the body's box, which needs no network
    random    anywhere in the body's box
    floor     the nearest of the places, so what no features could go below
    An organ that touches the edge of a scan may be cut off, so it has no landmarks there. Raises NothingToAsk where no
    two subjects share a landmark.
    """
    cut_off, marked, rows = 0, {}, []
    for case in cases:
        places, left_out = landmarks_of(store, case)
        marked[case] = Marked(places, vectors_of(encoder, store, case, places, how))
        cut_off += left_out
    for case in cases:
        asked = [
            (other, mark)
            for other in cases
            if store.cases[other].subject != store.cases[case].subject
            for mark in marked[other].places
            if mark in marked[case].places
        ]
        if asked:
            errors = errors_within(encoder, store, case, marked, asked, how)
            kinds = [CENTROID if side == CENTROID else "surface" for _, (_, side) in asked]
            rows += zip(kinds, [store.cases[other].subject for other, _ in asked], errors, strict=True)
    if not rows:
        raise NothingToAsk(
            f"{len(cases)} scans to find landmarks in, but no two subjects share an organ that is shown whole; "
            "give more labelled scans"
        )
    scores = {}
    for kind in sorted({kind for kind, _, _ in rows}):
        subjects = [subject for its, subject, _ in rows if its == kind]
        errors = np.stack([error for its, _, error in rows if its == kind])
        for measure, values in zip(MEASURES, errors.T, strict=True):
            scores[f"landmarks.{kind}.{measure}_mm"] = grouped(subjects, values)
    return scores, cut_off


def errors_within(
    encoder: Encoder,
    store,
    case: int,
    marked: Mapping[int, Marked],
    asked: Sequence[tuple[int, Mark]],
    how: Probing,
) -> np.ndarray:
    """Errors in mm, (landmark, measure), of landmarks of other scans that are looked for in this one."""
    rng, (low, high) = np.random.default_rng([how.seed, case]), body_bounds(store.cases[case])
    truth = np.stack([marked[case].places[mark] for _, mark in asked])
    queries = torch.stack([marked[other].vectors[mark] for other, mark in asked])
    relative = np.stack([place_in_body(store.cases[other], marked[other].places[mark]) for other, mark in asked])
    places = places_in(low, high, how.step * np.asarray(how.spacing))
    found = (
        places[nearest_place(encoder, store, case, places, queries, how)],
        low + relative * (high - low),
        rng.uniform(low, high, truth.shape),
        places[[np.linalg.norm(places - one, axis=1).argmin() for one in truth]],
    )
    return np.stack([np.linalg.norm(one - truth, axis=1) for one in found], axis=1)


def landmarks_of(store, case: int) -> tuple[dict[Mark, np.ndarray], int]:
    """The landmarks of a scan, (3,) in its mm, and how many organs were left out since they touch its edge.

    A side is the mean of the voxels whose centres are at most half a voxel from the organ's farthest.
    """
    labels, spacing = store.labels(case), np.asarray(store.cases[case].spacing)
    from_world = scan_to_world(store.cases[case])[:3, :3].T  # a rotation: mm stay mm
    found: dict[Mark, np.ndarray] = {}
    cut_off = 0
    for value in store.cases[case].label_values:
        voxels = np.argwhere(labels == value)
        if (voxels == 0).any() or (voxels == np.array(labels.shape) - 1).any():
            cut_off += 1
            continue
        places = voxels * spacing
        found[value, CENTROID] = places.mean(axis=0)
        for side, towards in SIDES.items():
            direction = from_world @ towards
            reach = places @ direction
            found[value, side] = places[reach >= reach.max() - np.abs(direction) @ spacing / 2].mean(axis=0)
    return found, cut_off


def vectors_of(
    encoder: Encoder, store, case: int, places: Mapping[Mark, np.ndarray], how: Probing
) -> dict[Mark, Float[Tensor, " c"]]:
    """The vector of each landmark of a scan, each read from a crop of its own, somewhere in whose middle half it lies
    where the body is large enough.

    Were they read from crops that lie alike in all scans, where in its crop a place is would tell where in the body.
    """
    rng, found = np.random.default_rng([how.seed, case]), {}
    size, bounds = np.asarray(how.size_mm), body_bounds(store.cases[case])
    for mark, place in places.items():
        i, j, k = keep_inside(place + rng.uniform(-0.25, 0.25, 3) * size, size, bounds).tolist()
        crop = plain_crop(case, Box((i, j, k), how.size_mm), how.shape)
        stages = stages_of(encoder, store, [crop], how.device)
        found[mark] = vectors_at(stages, crop, place[None], how.stages)[0]
    return found


def nearest_place(
    encoder: Encoder, store, case: int, places: np.ndarray, queries: Float[Tensor, "query c"], how: Probing
) -> np.ndarray:
    """Which of the places (n, 3) of a scan has the vector nearest to each query; int64 (query,).

    Crop by crop, so that the vectors of a whole scan are never held at once. Among equals, to a millionth, one is
    drawn: a collapsed encoder must not profit from the order of places.
    """
    rng = np.random.default_rng([how.seed, case, 1])
    best, nearest = np.full(len(queries), -np.inf), np.zeros(len(queries), dtype=np.int64)
    for held, vectors in vectors_over_scan(encoder, store, case, places, how):
        similarity = (queries @ vectors.T).double().cpu().numpy() + 1e-6 * rng.random(len(held))
        column = similarity.argmax(axis=1)
        value = similarity[np.arange(len(queries)), column]
        nearest = np.where(value > best, held[column], nearest)
        best = np.maximum(best, value)
    return nearest


def places_in(low: np.ndarray, high: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Places (n, 3) at most `step` apart along each axis, evenly spread over a box: the middles of its cells."""
    axes = []
    for a, b, width in zip(low, high, step, strict=True):
        cells = max(1, int(np.ceil((b - a) / width - 1e-9)))
        axes.append(a + (np.arange(cells) + 0.5) * (b - a) / cells)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
