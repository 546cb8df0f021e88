"""Attention heads of a frozen encoder, stage by stage: how evenly they look, how far, how much they differ.

The measures are those that a training logs (dagman/attention/diversity.py); no label is asked for. They describe an
encoder and do not grade it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dagman.attention.diversity import STAGES, head_diversity
from dagman.evaluation.crop_features import Probing, Scores
from spade3d.crops.crop import Crop, cut
from spade3d.crops.pairs import as_images
from spade3d.networks.swin import SwinTransformer

HEADS = "heads"  # how the measures begin: heads.stage3.entropy
MEASURES = ("entropy", "entropy_spread", "distance_mm", "divergence")


def head_scores(encoder: SwinTransformer, store, crops: Sequence[Crop], how: Probing) -> Scores:
    """The measures of each stage in each crop, by the crop's subject; NaN where one has no meaning."""
    found: dict[str, dict[str, list[float]]] = {}
    for crop in crops:
        image = as_images([cut(store, crop)]).to(how.device)
        for name, value in head_diversity(encoder, image, how.spacing).items():
            found.setdefault(f"{HEADS}.{name}", {}).setdefault(store.cases[crop.case].subject, []).append(value)
    return found


def with_meaning(scores: Scores) -> tuple[Scores, tuple[str, ...]]:
    """What `head_scores` found, without what has no meaning, and a line for each that was left out.

    Both follow from the encoder and the size of the crops, so that they are the same in every crop.
    """
    kept, left_out = dict(scores), []
    for stage in STAGES:
        entropy, *others = (f"{HEADS}.stage{stage}.{measure}" for measure in MEASURES)
        if undefined(scores, entropy):
            left_out.append(f"heads of stage {stage} left out: in crops of this size its tokens see themselves alone")
            for measure in (entropy, *others):
                del kept[measure]
        elif undefined(scores, divergence := others[-1]):
            left_out.append(f"divergence of heads in stage {stage} left out: it has one head")
            del kept[divergence]
    return kept, tuple(left_out)


def undefined(scores: Scores, measure: str) -> bool:
    return any(math.isnan(value) for values in scores[measure].values() for value in values)
