"""What class tokens and their maps learn from: labels of whole studies, anatomical priors, and a teacher.

Reconstructed from the abstract of CLARiTy (arXiv 2512.16700), which names an orthogonal class-token loss, anatomical
priors and distillation and gives no formula. `outside` is AxialNet's mask loss (Draelos and Carin 2021, its code).
All terms leave out padding, labels that are not said (NaN) and pieces that a head does not have; none waits for the
device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from dagman.downstream.class_tokens import LOGITS
from dagman.downstream.segment_cam import says_where
from dagman.downstream.studies import StudyBatch
from dagman.downstream.study_heads import StudyOutput
from spade3d.faults import UsageFault

ORTHOGONAL = ("cosine", "contrast")


@dataclass(frozen=True)
class ClarityWeights:
    """Of each term; 0 leaves it out. `temperature` softens the teacher, `orthogonal_by` says which rule parts tokens.

    classification 1; AxialNet's runs have outside 0.33, on a constructed set 1 was better; no weight is CLARiTy's.
    """

    orthogonal: float = 0.1
    orthogonal_by: str = "cosine"
    foreground: float = 1.0
    outside: float = 1.0
    teacher: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        if self.orthogonal_by not in ORTHOGONAL:
            raise UsageFault(f"class tokens parted by {self.orthogonal_by!r}: choose one of {', '.join(ORTHOGONAL)}")


def clarity_losses(output: StudyOutput, batch: StudyBatch, weights: ClarityWeights) -> dict[str, Tensor]:
    """The weighted terms by name: classification, and of orthogonal, foreground, outside and teacher those that have a
    weight and what they read (a prior, class maps, a foreground branch, a teacher's logits)."""
    parts, labels, allowed, valid = output.parts, batch.labels, batch.allowed, batch.valid
    branches = [label_loss(parts[name], labels) for name in LOGITS if name in parts]
    terms = {"classification": torch.stack(branches).mean()}
    if weights.orthogonal:
        tokens = parts["class_tokens"]
        apart = orthogonal(tokens) if weights.orthogonal_by == "cosine" else token_contrast(tokens, labels)
        terms["orthogonal"] = weights.orthogonal * apart
    if weights.foreground and allowed is not None and "foreground" in parts:
        terms["foreground"] = weights.foreground * foreground_loss(parts["foreground"], allowed, valid)
    if weights.outside and allowed is not None and "class_maps" in parts:
        terms["outside"] = weights.outside * outside(parts["class_maps"], allowed, labels, valid)
    if weights.teacher and batch.teacher is not None:
        terms["teacher"] = weights.teacher * label_loss(output.logits, (batch.teacher / weights.temperature).sigmoid())
    return terms


def label_loss(logits: Float[Tensor, "b f"], labels: Float[Tensor, "b f"]) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over the labels that are known (not NaN); they may be soft. 0 where none is known."""
    known = ~labels.isnan()
    found = F.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(0.0), reduction="none")
    return _mean(found, known)


def orthogonal(tokens: Float[Tensor, "b f d"]) -> Float[Tensor, ""]:
    """Mean over studies and over i != j of cos^2(t_i, t_j): 0 where all class tokens are orthogonal, 1 where all are
    parallel; 0 for one finding."""
    others = 1 - torch.eye(tokens.shape[1], device=tokens.device)
    return _mean(_cosines(tokens).square(), others.expand(len(tokens), -1, -1))


def token_contrast(tokens: Float[Tensor, "b f d"], labels: Float[Tensor, "b f"]) -> Float[Tensor, ""]:
    """Each class token is to match itself among the tokens of its study, mean over findings that are present
    (MCTformer+, there over the last layers, here of the last):  - log softmax_j cos(t_i, t_j) at j = i."""
    own = -_cosines(tokens).log_softmax(dim=-1).diagonal(dim1=1, dim2=2)
    return _mean(own, labels == 1)


def foreground_loss(
    logits: Float[Tensor, "b f p q r"], allowed: Float[Tensor, "b f p q r"], valid: Bool[Tensor, "b p q r"]
) -> Float[Tensor, ""]:
    """Cross-entropy + (1 - Dice) of sigmoid(F) against the share of each cell where the finding may be; mean over the
    pairs of study and finding whose region leaves some valid cell out (one of all cells says nothing of a place)."""
    shown = valid[:, None].float().expand_as(allowed)
    told = says_where(allowed, valid).flatten(1)
    cells = shown.sum(dim=SPACE).clamp_min(1)
    entropy = F.binary_cross_entropy_with_logits(logits.float(), allowed, reduction="none")
    found = logits.float().sigmoid() * shown
    both = (found * allowed).sum(dim=SPACE)
    dice = (2 * both + 1) / (found.sum(dim=SPACE) + (allowed * shown).sum(dim=SPACE) + 1)
    return _mean((entropy * shown).sum(dim=SPACE) / cells + 1 - dice, told)


def outside(
    maps: Float[Tensor, "b f p q r"],
    allowed: Float[Tensor, "b f p q r"],
    labels: Float[Tensor, "b f"],
    valid: Bool[Tensor, "b p q r"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the class maps to 0, log(1 + e^M): mean over the valid cells of all studies and findings, by the
    share of each that lies where the finding may not be. A finding that is absent may be nowhere (AxialNet)."""
    forbidden = torch.where((labels == 0)[..., None, None, None], 1.0, 1 - allowed) * valid[:, None]
    return _mean(F.softplus(maps.float()), forbidden)


SPACE = (2, 3, 4)


def _cosines(tokens: Float[Tensor, "b f d"]) -> Float[Tensor, "b f f"]:
    unit = F.normalize(tokens.float(), dim=-1)
    return einsum(unit, unit, "b i d, b j d -> b i j")


def _mean(values: Float[Tensor, "*any"], weights: Tensor) -> Float[Tensor, ""]:
    """Weighted mean; 0 where nothing has a weight. What has none may not be NaN or infinite."""
    weights = weights.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1e-12)
