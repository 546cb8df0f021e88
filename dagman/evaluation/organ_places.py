"""Places in organs: where the kNN and the linear probe ask which organ is shown, and what is known of each place.

Chance draws the places once, from labels and a seed, before any encoder is asked: all that are compared, and the
controls without a network, answer for the same places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dagman.evaluation.crop_features import (
    Encoder,
    NothingToAsk,
    Probing,
    place_in_body,
    plain_crop,
    stages_of,
    vectors_at,
)
from spade3d.crops.correspondences import voxels_at
from spade3d.crops.crop import Box, Crop, body_bounds, cut, cut_labels, keep_inside

ELSEWHERE = 0  # the class of places in the body's box that bear no label
PER_ORGAN = 16  # places of each organ, and elsewhere, in each scan
PATCH_STEPS = (1, 4)  # voxels between the 5 x 5 x 5 intensities of a patch: what is near, and what is around


@dataclass(frozen=True, eq=False)
class OrganPlaces:
    """Places in crops around organs: where each is, in mm of its scan, which organ it shows, and whose it is."""

    crops: tuple[Crop, ...]
    crop: Int[np.ndarray, " n"]  # which of the crops a place is read from
    mm: Float[np.ndarray, "n 3"]
    organ: Int[np.ndarray, " n"]  # label value, or ELSEWHERE
    subject: np.ndarray  # (n,) of str


def draw_places(store, cases: Sequence[int], how: Probing) -> OrganPlaces:
    """PER_ORGAN places of each organ and elsewhere in each labelled scan, in crops around its organs taken in turn.

    A crop lies so that a voxel of its organ is somewhere in its middle half, where the body is large enough: where in
    its crop a place is tells little. Raises NothingToAsk where fewer than two subjects show organs.
    """
    crops: list[Crop] = []
    rows: list[tuple[int, np.ndarray, int, str]] = []
    for case in cases:
        of_case = crops_around_organs(store, case, how)
        for n, place, organ in places_within(store, of_case, np.random.default_rng([how.seed, case, 4])):
            rows.append((len(crops) + n, place, organ, store.cases[case].subject))
        crops += of_case
    subjects = {subject for *_, subject in rows}
    if len(subjects) < 2:
        raise NothingToAsk(
            f"{len(cases)} scans to learn organs from, of which {len(subjects)} subjects show one; a probe learns from "
            "one subject and is judged on another: give more labelled scans"
        )
    crop, mm, organ, subject = zip(*rows, strict=True)
    return OrganPlaces(tuple(crops), np.array(crop), np.stack(mm), np.array(organ), np.array(subject))


def crops_around_organs(store, case: int, how: Probing) -> list[Crop]:
    """At least `how.crops` crops of a scan, at least one around each of its organs; none where it shows none."""
    rng, bounds = np.random.default_rng([how.seed, case, 3]), body_bounds(store.cases[case])
    values, labels = store.cases[case].label_values, store.labels(case)
    voxels = {value: np.flatnonzero(labels == value) for value in values}
    size, crops = np.asarray(how.size_mm), []
    for n in range(max(how.crops, len(values)) if values else 0):
        chosen = np.unravel_index(rng.choice(voxels[values[n % len(values)]]), labels.shape)
        place = np.array(chosen) * np.asarray(store.cases[case].spacing)
        i, j, k = keep_inside(place + rng.uniform(-0.25, 0.25, 3) * size, size, bounds).tolist()
        crops.append(plain_crop(case, Box((i, j, k), how.size_mm), how.shape))
    return crops


def places_within(store, crops: Sequence[Crop], rng: np.random.Generator) -> list[tuple[int, np.ndarray, int]]:
    """(crop, place in mm (3,), organ) of the crops of one scan; each organ's spread evenly over those that show it."""
    found: dict[int, list[tuple[int, float, int, np.ndarray]]] = {}  # organ -> (turn, lot, crop, place)
    for n, crop in enumerate(crops):
        labels, (low, high) = cut_labels(store, crop), body_bounds(store.cases[crop.case])
        for organ in np.union1d(np.unique(labels), ELSEWHERE).tolist():
            places = np.argwhere(labels == organ) @ crop.to_mm[:3, :3].T + crop.to_mm[:3, 3]
            places = places[((places >= low) & (places <= high)).all(axis=1)]  # outside the scan all is unlabelled
            drawn = rng.permutation(len(places))[:PER_ORGAN]
            found.setdefault(organ, []).extend((turn, rng.random(), n, places[p]) for turn, p in enumerate(drawn))
    kept = {organ: sorted(candidates, key=by_turn)[:PER_ORGAN] for organ, candidates in sorted(found.items())}
    return [(n, place, organ) for organ, candidates in kept.items() for _, _, n, place in candidates]


def by_turn(candidate: tuple[int, float, int, np.ndarray]) -> tuple[int, float]:
    """First one place of every crop, the crops in the order of their lots, then a second."""
    turn, lot, _, _ = candidate
    return turn, lot


def vectors_of_places(
    encoder: Encoder, store, places: OrganPlaces, how: Probing
) -> dict[int, Float[np.ndarray, "n _"]]:
    """What an encoder (standardised) says of each place: for each stage of `how.stages` unit vectors, float32."""
    found: dict[int, list[np.ndarray]] = {stage: [] for stage in how.stages}
    order = []
    for n in np.unique(places.crop):
        held = np.flatnonzero(places.crop == n)
        order.append(held)
        stages = stages_of(encoder, store, [places.crops[n]], how.device)
        for stage, vectors in found.items():
            vectors.append(vectors_at(stages, places.crops[n], places.mm[held], [stage]).cpu().numpy())
    back = np.argsort(np.concatenate(order))
    return {stage: np.concatenate(vectors)[back] for stage, vectors in found.items()}


def places_in_body(store, places: OrganPlaces) -> Float[np.ndarray, "n 3"]:
    """Each place in the box of its body, from 0 to 1 along each axis: what is known without any voxel."""
    cases = [store.cases[places.crops[n].case] for n in places.crop]
    return np.stack([place_in_body(case, place) for case, place in zip(cases, places.mm, strict=True)])


def patches_of(store, places: OrganPlaces) -> Float[np.ndarray, "n 250"]:
    """The intensities around each place as its crop shows them, the border's value beyond it, each brought to mean 0
    and variance 1 over all places as features are: what is known without any network."""
    offsets = np.concatenate([step * (np.argwhere(np.ones((5, 5, 5))) - 2) for step in PATCH_STEPS])
    found = np.empty((len(places.crop), len(offsets)), dtype=np.float32)
    for n in np.unique(places.crop):
        image, held = cut(store, places.crops[n]), np.flatnonzero(places.crop == n)
        middle = np.rint(voxels_at(places.crops[n], places.mm[held])).astype(int)
        i, j, k = np.moveaxis(np.clip(middle[:, None] + offsets, 0, np.array(image.shape) - 1), 2, 0)
        found[held] = image[i, j, k]
    return (found - found.mean(axis=0)) / np.maximum(found.std(axis=0), 1e-6)
