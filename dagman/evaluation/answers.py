"""Answers: what a frozen encoder says to every question that the scans allow, with labels and without.

Signs of life, attention heads, the layers that CKA compares and equivariance need no label. Retrieval, landmarks,
clusters and the organ probes are asked where two subjects have labels; what cannot be asked is said in one line.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dagman.evaluation.attention_heads import HEADS, head_scores, with_meaning
from dagman.evaluation.clustering import cluster_scores, kmeans_agreement, organ_vectors
from dagman.evaluation.crop_features import Encoder, NothingToAsk, Probing, Scores, standardised
from dagman.evaluation.equivariance import twin_agreement
from dagman.evaluation.landmarks import landmark_errors
from dagman.evaluation.layers import Layers, layer_vectors, stage_name
from dagman.evaluation.organ_places import (
    ELSEWHERE,
    OrganPlaces,
    draw_places,
    patches_of,
    places_in_body,
    vectors_of_places,
)
from dagman.evaluation.organ_probes import organ_controls, organ_probes
from dagman.evaluation.retrieval import draw_crops, retrieve
from dagman.evaluation.statistics import MeanInterval
from spade3d.crops.crop import Crop
from spade3d.networks.swin import SwinTransformer
from spade3d.training.health import FEWEST_ROWS, LOW_RANK, effective_rank, signs_of_life

LEAST_SPREAD = 1e-3  # in half precision nothing smaller is told apart
MOST_CROPS = 256  # for layers and signs: the memory of CKA grows with the square
OF_ENCODER = ("features", "agreement", "stage")  # how measures of an encoder end; the others are controls

Joint = Mapping[str, MeanInterval]  # measure -> what all subjects tell together
Signs = Mapping[str, Mapping[str, float | int]]  # stage -> signs of life


@dataclass(frozen=True, eq=False)
class Shown:
    """What all encoders are shown, drawn before any is asked."""

    store: object
    cases: tuple[int, ...]
    labelled: tuple[int, ...]  # those of the cases that show organs; none where fewer than two subjects do
    how: Probing
    crops: tuple[Crop, ...]  # anywhere in the bodies, for layers, signs and heads
    places: OrganPlaces | None  # None without `labelled`
    left_out: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Answers:
    """Of one encoder: measures by subject (controls that were asked in passing among them), measures of all subjects
    together, signs of life by stage, layers for CKA, and what could not be asked."""

    scores: Scores
    joint: Joint
    signs: Signs
    layers: Layers
    left_out: tuple[str, ...]


def show(store, cases: Sequence[int], how: Probing) -> Shown:
    """Draw what encoders will be shown of some scans."""
    labelled = tuple(case for case in cases if store.cases[case].label_values)
    crops = tuple(crop for case in cases for crop in draw_crops(store, case, how))
    crops = crops[:: math.ceil(len(crops) / MOST_CROPS)]
    subjects = {store.cases[case].subject for case in labelled}
    if len(subjects) < 2:
        said = f"{len(subjects)} of the probed subjects {'shows' if len(subjects) == 1 else 'show'} a labelled organ"
        line = f"organ probes, retrieval, landmarks and clusters left out: {said}, two are needed"
        return Shown(store, tuple(cases), (), how, crops, None, (line,))
    return Shown(store, tuple(cases), labelled, how, crops, draw_places(store, labelled, how), ())


def ask(encoder: SwinTransformer, shown: Shown) -> Answers:
    """Ask an encoder (in eval mode, on `how.device`) everything."""
    layers = layer_vectors(encoder, shown.store, shown.crops, shown.how)
    evenly = standardised(encoder, shown.store, shown.cases, shown.how)
    scores, joint, left_out = {}, {}, []
    for name, question in questions(evenly, shown).items():
        try:
            by_subject, of_all = question()
        except NothingToAsk as fault:
            left_out.append(f"{name} left out: {fault}")
            continue
        scores |= by_subject
        joint |= of_all
    heads, without = with_meaning(head_scores(encoder, shown.store, one_a_scan(shown.crops), shown.how))
    scores |= heads
    left_out += without
    return Answers(scores, joint, signs_of(layers), layers, tuple(left_out))


def one_a_scan(crops: Sequence[Crop]) -> list[Crop]:
    """The first crop of each scan: enough for heads, whose attention takes a few passes of the encoder to measure."""
    first: dict[int, Crop] = {}
    for crop in crops:
        first.setdefault(crop.case, crop)
    return list(first.values())


def ask_without(shown: Shown) -> tuple[Scores, Joint]:
    """What is found without any encoder at the places of the organ probes: by position, by intensities, by chance."""
    if shown.places is None:
        return {}, {}
    where, patches = places_in_body(shown.store, shown.places), patches_of(shown.store, shown.places)
    scores, joint = organ_controls(where, patches, shown.places), {}
    if len(np.unique(shown.places.organ[shown.places.organ != ELSEWHERE])) > 1:
        for name, rows in {"position": where, "patch": patches}.items():
            joint |= clusters_of_places(rows, shown, name)
    return scores, joint


def questions(encoder: Encoder, shown: Shown) -> dict[str, Callable[[], tuple[Scores, Joint]]]:
    """What can be asked of an encoder (standardised), by name."""
    store, how, labelled, places = shown.store, shown.how, shown.labelled, shown.places
    asked = {"equivariance": lambda: (twin_agreement(encoder, store, shown.cases, how)[0], {})}
    if places is not None:
        of_stages = vectors_of_places(encoder, store, places, how)
        rows = np.concatenate(list(of_stages.values()), axis=1)
        asked |= {
            "organ probes": lambda: (organ_probes(of_stages, places), {}),
            "k-means of places": lambda: ({}, clusters_of_places(rows, shown, "features")),
            "clusters of crops": lambda: clusters_of_crops(encoder, shown),
            "retrieval": lambda: (retrieve(encoder, store, labelled, how)[0], {}),
            "landmarks": lambda: (landmark_errors(encoder, store, labelled, how)[0], {}),
        }
    return asked


def clusters_of_places(rows: np.ndarray, shown: Shown, name: str) -> Joint:
    """k-means of the places in organs; NothingToAsk where one organ is labelled."""
    of = shown.places.organ != ELSEWHERE
    found = kmeans_agreement(rows[of], shown.places.organ[of], shown.places.subject[of], shown.how.seed)
    return {f"kmeans.places.{measure}.{name}": interval for measure, interval in found.items()}


def clusters_of_crops(encoder: Encoder, shown: Shown) -> tuple[Scores, Joint]:
    """Distances between and within organs, and k-means, of crops around whole organs."""
    vectors = organ_vectors(encoder, shown.store, shown.labelled, shown.how)
    scores, found = cluster_scores(*vectors), kmeans_agreement(*vectors, shown.how.seed)
    return scores, {f"kmeans.crops.{measure}.features": interval for measure, interval in found.items()}


def signs_of(layers: Layers) -> Signs:
    """Signs of life of each stage, at one place of each crop: `rank` (of `most`) once the mean is taken out, which all
    places share; `spread` and `uniformity` as the features are (spade3d/training/health.py)."""
    found = {}
    for stage in range(5):
        rows = torch.from_numpy(layers[stage_name(stage)][0])
        rank = effective_rank(rows - rows.mean(dim=0))
        signs = signs_of_life(rows) | {"rank": rank}
        found[stage_name(stage)] = signs | {"most": min(signs["rows"] - 1, signs["dims"])}
    return found


def collapse(signs: Mapping[str, float | int]) -> str | None:
    """What to say where the signs of a stage tell that it no longer tells places apart; None while it does.

    Not health.collapse, which judges an embedding by its spread alone: a part that all places share grows in a healthy
    encoder too (50 steps of Spade on hippocampi: spread of the last stage 0.147 to 0.027, organs apart as never
    before), and whatever reads the features takes it out.
    """
    if signs["rows"] < FEWEST_ROWS:
        return None
    if signs["spread"] < LEAST_SPREAD:
        return f"collapsed: places differ by less than rounding (spread {signs['spread']:.1e}, needed {LEAST_SPREAD:g})"
    if signs["rank"] < 1 + LOW_RANK * (signs["most"] - 1):
        return f"collapsed: places differ along few directions (effective rank {signs['rank']:.1f} of {signs['most']})"
    return None


def of_encoder(measure: str) -> bool:
    """Whether a measure is an encoder's own, not a control that is the same for all."""
    return measure.startswith(f"{HEADS}.") or measure.rsplit(".", 1)[-1].startswith(OF_ENCODER)
