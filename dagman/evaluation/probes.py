"""Probes: what an encoder knows of anatomy before it is trained on any label. Four questions, the same for everybody.

* retrieval.py: does a crop's nearest neighbour in another subject's scan show the same organs?
* landmarks.py: how far from the truth, in mm, is a point found in another subject's scan by its features?
* equivariance.py: are the points of a crop found again in its moved, flipped, turned or scaled twin?
* clustering.py: do crops around one organ of different subjects lie together, and those of other organs apart?

Ask an untrained encoder, too (`untrained_like`): random filters answer better than chance, and only what is above them
was learned.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dagman.evaluation.clustering import organ_clusters
from dagman.evaluation.crop_features import Encoder, NothingToAsk, Probing, Scores, standardised
from dagman.evaluation.equivariance import twin_agreement
from dagman.evaluation.landmarks import landmark_errors
from dagman.evaluation.pairs import mean_of
from dagman.evaluation.retrieval import retrieve
from dagman.evaluation.statistics import mean_with_interval, signed_rank_p
from spade3d.networks.foreign import SETTINGS, describe_encoder
from spade3d.networks.swin import SwinTransformer
from spade3d.networks.swin_unetr import SwinUNETR

MM = "_mm"  # how the measures end that are errors in mm: less is better, and the median speaks for a subject


@dataclass(frozen=True)
class Probed:
    """Every measure of an encoder, by subject, what had to be left out, and which questions could not be asked."""

    scores: Scores
    left_out: Mapping[str, int]
    not_asked: tuple[str, ...]  # why


def probe(encoder: Encoder, store, cases: Sequence[int], how: Probing) -> Probed:
    """Ask all questions about an encoder (ready to judge: in eval mode, on `how.device`) of labelled cases; those that
    these cannot answer are left out, such as landmarks where every organ is cut off by the edge of its scan."""
    encoder = standardised(encoder, store, cases, how)
    scores, left_out, not_asked = {}, {}, []
    for question, without in (
        (retrieve, "crops without an organ"),
        (landmark_errors, "organs cut off"),
        (twin_agreement, "twins too far off"),
    ):
        try:
            found, left_out[without] = question(encoder, store, cases, how)
        except NothingToAsk as fault:
            not_asked.append(str(fault))
            continue
        scores |= found
    if organs_of(store, cases) > 1:
        scores |= organ_clusters(encoder, store, cases, how)
    return Probed(scores, left_out, tuple(not_asked))


def organs_of(store, cases: Sequence[int]) -> int:
    """How many organs are labelled in some cases: of one alone there are no clusters."""
    return len({value for case in cases for value in store.cases[case].label_values})


def held_out(cases: Sequence, validation: Sequence[int], most: int) -> tuple[int, ...]:
    """At most `most` of the validation cases: one of every subject, then a second, in the order of the store."""
    rank: dict[str, int] = {}
    turns = []
    for i in validation:
        rank[cases[i].subject] = rank.get(cases[i].subject, -1) + 1
        turns.append((rank[cases[i].subject], i))
    return tuple(sorted(i for _, i in sorted(turns)[:most]))


def untrained_like(checkpoint: Path, seed: int) -> SwinTransformer:
    """An encoder with the settings of a checkpoint and random weights: what that checkpoint must be better than."""
    said = describe_encoder(checkpoint)
    settings = {name: tuple(said[name]) if isinstance(said[name], list) else said[name] for name in SETTINGS}
    torch.manual_seed(seed)
    return SwinUNETR(out_channels=1, **settings).swinViT.eval()


def summary_of(*seeds: Scores) -> dict[str, dict[str, float]]:
    """Of each measure, over the seeds of an encoder: the mean of what is typical of a subject, with its 95 % interval
    over subjects; of errors also the median and the 90th percentile of all of them."""
    summary = {}
    for measure, of in seeds[0].items():
        interval = mean_with_interval(
            {subject: [typical(measure, scores[measure][subject]) for scores in seeds] for subject in of}
        )
        summary[measure] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        if measure.endswith(MM):
            errors = [error for scores in seeds for values in scores[measure].values() for error in values]
            summary[measure] |= {"median": float(np.median(errors)), "p90": float(np.percentile(errors, 90))}
    return summary


def gains(ours: Mapping[int, Scores], control: Mapping[int, Scores]) -> dict[str, dict[str, float]]:
    """Of each measure: ours less the control, paired by seed and subject, with the 95 % interval over subjects.

    Both are seed -> scores, with the same seeds. p is Wilcoxon's, on the subjects' means over seeds. The interval knows
    the chance of subjects, not that of seeds: `by_seed` shows how much these differ.
    """
    found = {}
    for measure in next(iter(control.values())):
        changes: dict[str, list[float]] = {}
        for seed, scores in ours.items():
            for subject, values in scores[measure].items():
                change = typical(measure, values) - typical(measure, control[seed][measure][subject])
                changes.setdefault(subject, []).append(change)
        interval = mean_with_interval(changes)
        found[measure] = {
            "difference": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "p": signed_rank_p(round(mean_of(values), 9) for values in changes.values()),
            "subjects": interval.subjects,
            "by_seed": [mean_of(values) for values in zip(*changes.values(), strict=True)],
        }
    return found


def typical(measure: str, values: Sequence[float]) -> float:
    """What stands for a subject: the median of errors in mm, whose tail is long, and the mean of all else."""
    return float(np.median(values) if measure.endswith(MM) else math.fsum(values) / len(values))
