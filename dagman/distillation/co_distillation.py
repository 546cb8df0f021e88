"""DAGMaN: a student that sees a masked crop learns what its noisy teacher saw, and what the masked voxels are.

Jiang et al., "DAGMaN" (MIDL 2025, PMLR 301:679-694), section 3. Two overlapping crops u and v of a scan. Where the
teacher's semantic attention looks in u decides what the student is not shown of u (section 3.1). The teacher's targets
come from u and v with most of their patches dropped (section 3.2). Four losses: masked voxels (AMIP), masked tokens
(AMPD), the image token (AITD) and the pooled last stage (GITD), the last two across the views (section 3.3).

Where the paper is silent the numbers are those of the same lab's SMIT code (docs/concepts.md, table "DAGMaN").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dagman.attention.semantic import Attended, SemanticAttention
from dagman.distillation.guided import Guidance, guide, tap
from dagman.distillation.head_looks import LooksAtHeads
from dagman.distillation.heads import PrototypeHead
from dagman.distillation.losses import Centre, distil, masked_reconstruction
from dagman.distillation.masking import RULES, check_masking, drop_tokens, expand, hidden_count
from spade3d.contrast.teacher import Teacher
from spade3d.crops.pairs import PairBatch
from spade3d.networks.voxel_head import VoxelHead
from spade3d.training import ranks, schedules
from spade3d.training.loop import Task


@dataclass(frozen=True)
class DistillationTerms:
    """What is masked, what the teacher sees, and how much each loss weighs."""

    stage: int = 3  # whose tokens the semantic attention reads; its cells are masked
    masking: str = "attention"  # one of RULES, or "none"
    ratio: float = 0.7  # share of the cells that is selected
    hint: float = 0.1  # share of the cells that is shown all the same
    semantic: bool = True  # [CLS] attention; else the image token is the mean of the tokens, as in SMIT
    semantic_blocks: int = 2
    semantic_heads: int = 8
    patch_dropout: float = 0.7  # of the teacher's tokens; 0: a clean teacher
    dropped: Literal["token", "cell"] = "token"
    attention_from: Literal["clean", "noisy"] = "clean"  # which of the teacher's looks decides what is masked
    mask_token: bool = False  # hidden tokens show a learnt token instead of zeros
    drop_hidden: bool = False  # hidden tokens are left out of the computation instead
    symmetric: bool = True  # v is also masked and u is also its other view
    head_width: int = 2048
    bottleneck: int = 256
    prototypes: int = 8192
    standardise: bool = True  # what the heads read, over the batch; no paper's (heads.py)
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)  # at first, and after `temperature_warmup`
    temperature_warmup: float = 30 / 800  # share of the run
    centre_momentum: float = 0.9
    still: float = 1 / 800  # share of the run in which the last layers of the heads do not learn
    momentum: float = 0.996  # of the teacher at the start; 1 at the end
    voxel_weight: float = 1.0  # AMIP
    token_weight: float = 0.1  # AMPD
    image_weight: float = 0.1  # AITD
    global_weight: float = 0.1  # GITD

    @property
    def masks(self) -> bool:
        return self.masking != "none"

    @property
    def attends(self) -> bool:
        """Whether the mask follows an attention."""
        return self.masking not in ("none", "random", "block")


class Looks(nn.Module):
    """What sits on the stages of an encoder: semantic attention beside one of them, and the heads of the losses."""

    def __init__(self, feature_size: int, terms: DistillationTerms):
        super().__init__()
        self.stage = terms.stage
        width, last = feature_size * 2**terms.stage, feature_size * 16
        sizes = {
            "hidden": terms.head_width,
            "bottleneck": terms.bottleneck,
            "prototypes": terms.prototypes,
            "standardise": terms.standardise,
        }
        blocks, heads = terms.semantic_blocks, terms.semantic_heads
        self.semantic = SemanticAttention(width, heads=heads, blocks=blocks) if terms.semantic else None
        self.token_head = PrototypeHead(width, **sizes)
        self.image_head = PrototypeHead(width, **sizes)
        self.global_head = PrototypeHead(last, **sizes)

    def attend(self, stages: Stages) -> Attended:
        """Where [CLS] looks; without semantic attention, how much each token resembles the mean of all (cosine)."""
        tokens = stages[self.stage]
        if self.semantic is not None:
            return self.semantic(tokens)
        mean = tokens.mean(dim=(2, 3, 4))
        alike = F.cosine_similarity(tokens, mean[:, :, None, None, None], dim=1)
        return Attended(mean, alike[:, None].flatten(2).softmax(dim=2).unflatten(2, alike.shape[1:]))

    def forward(self, stages: Stages, cells: Int[Tensor, "b m"] | None, still: bool = False) -> Said:
        """What the heads say of the image, of the pooled last stage, and of some cells of each sample."""
        tokens = stages[self.stage]
        attended = None if self.semantic is None else self.semantic(tokens)
        summary = tokens.mean(dim=(2, 3, 4)) if attended is None else attended.summary
        return Said(
            image=self.image_head(summary, still),
            whole=self.global_head(stages[4].mean(dim=(2, 3, 4)), still),
            tokens=None if cells is None else self.token_head(picked(tokens, cells), still),
            attended=attended,
        )

    @torch.no_grad()
    def embedding(self, stages: Stages) -> Float[Tensor, "b bottleneck"]:
        """One unit vector a crop, for the signs of life."""
        return self.global_head.vectors(stages[4].mean(dim=(2, 3, 4)))


Stages = tuple[Tensor, ...]  # an encoder's five maps, each (b, c, p, q, r)


@dataclass(frozen=True, eq=False)
class Said:
    """Logits of the image token and of the pooled stage 4, (b, k), of the chosen cells, (b x m, k), and where [CLS]
    looked."""

    image: Tensor
    whole: Tensor
    tokens: Tensor | None
    attended: Attended | None = None


@dataclass(frozen=True, eq=False)
class Masked:
    """What the student is not shown of some crops: the same number of cells of each."""

    samples: Int[Tensor, " u"]  # which crops of the batch are a student's u
    others: Int[Tensor, " u"]  # the crop v of each
    hidden: Bool[Tensor, "u p q r"] | None  # of the stage that is attended to; None: nothing is hidden
    cells: Int[Tensor, "u m"] | None  # the same as places of the flattened grid
    attended: Attended | None  # the teacher's look that decided


class CoDistillation(nn.Module):
    """The losses of DAGMaN between a student's and a teacher's stages; it runs no encoder itself.

    A task asks, in this order: `noise` for the noisy teacher, `masked` with where the teacher looked, `targets` and
    `losses`. The centres are its only memory; the teacher's logits of a step wait for the update.
    """

    def __init__(self, feature_size: int, terms: DistillationTerms):
        super().__init__()
        self.terms = terms
        self.voxel_head = VoxelHead(feature_size * 16, cell=32)
        self.mask_token = nn.Parameter(torch.zeros(feature_size)) if terms.mask_token else None
        self.centres = nn.ModuleDict({name: Centre(terms.prototypes) for name in ("tokens", "image", "whole")})
        self.uncentred: dict[str, list[tuple[Tensor, int]]] = {}  # of each head: sums of logits, and of how many rows

    def pairs(self, crops: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which crops of a batch are u, and the v of each; crops come as a, b of one box, a, b of the next."""
        u = torch.arange(0, crops, 1 if self.terms.symmetric else 2, device=device)
        return u, u ^ 1

    def masked(self, attended: Attended | None, grid: tuple[int, int, int], crops: int, device: torch.device) -> Masked:
        """Choose the hidden cells of every u: (p, q, r) is the grid of the stage that is attended to."""
        u, v = self.pairs(crops, device)
        if not self.terms.masks:
            return Masked(u, v, None, None, attended)
        ratio, hint = self.terms.ratio, self.terms.hint
        check_masking(grid, ratio, hint)
        looks = torch.zeros(len(u), *grid, device=device) if attended is None else attended.mean.float()
        hidden = RULES[self.terms.masking](looks, ratio, hint)
        many = hidden_count(prod(grid), ratio, hint)
        # As many in every sample: a stable sort puts them first, and nobody has to wait for the device to count.
        cells = hidden.flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, :many]
        return Masked(u, v, hidden, cells, attended)

    def token_mask(self, masked: Masked, images: Tensor) -> Bool[Tensor, "u i j k"] | None:
        """The tokens (2^3 voxels) of the hidden cells."""
        return None if masked.hidden is None else expand(masked.hidden, grid_of(images, stage=0))

    def noise(self, images: Tensor) -> Bool[Tensor, "b i j k"] | None:
        """The tokens that are dropped from what the teacher sees; None: a clean teacher."""
        share = self.terms.patch_dropout
        if not share:
            return None
        stage = 0 if self.terms.dropped == "token" else self.terms.stage
        dropped = drop_tokens(len(images), grid_of(images, stage), share, images.device)
        return expand(dropped, grid_of(images, stage=0)) if stage else dropped

    def targets(self, teacher: Looks, its: Stages, masked: Masked) -> Said:
        """What the teacher says of all crops, and of the hidden cells of every u; without gradient."""
        with torch.no_grad():
            said = teacher(its, None)
            if masked.cells is None or not self.terms.token_weight:
                return said
            hidden = picked(its[self.terms.stage][masked.samples], masked.cells)
            return replace(said, tokens=teacher.token_head(hidden))

    def losses(
        self, student: Looks, ours: Stages, wanted: Said, masked: Masked, clean: Tensor, progress: float
    ) -> tuple[dict[str, Tensor], Said]:
        """The four losses, and what the student said. `ours` are its stages of every masked u, `wanted` the noisy
        teacher's targets, `clean` the images (b, 1, i, j, k) of all crops."""
        terms, found = self.terms, {}
        said = student(ours, None if wanted.tokens is None else masked.cells, still=progress < terms.still)
        for head, logits in (("tokens", wanted.tokens), ("image", wanted.image), ("whole", wanted.whole)):
            if logits is not None:
                self.uncentred.setdefault(head, []).append((logits.sum(dim=0), len(logits)))
        if terms.voxel_weight and masked.hidden is not None:
            target = clean[masked.samples]
            size = tuple(target.shape[2:])
            restored = self.voxel_head(ours[4], size)
            found["AMIP"] = terms.voxel_weight * masked_reconstruction(restored, target, expand(masked.hidden, size))
        if terms.token_weight and wanted.tokens is not None:
            found["AMPD"] = terms.token_weight * self.agreement("tokens", said.tokens, wanted.tokens, progress)
        if terms.image_weight:
            across = wanted.image[masked.others]
            found["AITD"] = terms.image_weight * self.agreement("image", said.image, across, progress)
        if terms.global_weight:
            across = wanted.whole[masked.others]
            found["GITD"] = terms.global_weight * self.agreement("whole", said.whole, across, progress)
        return found, said

    def agreement(self, head: str, student: Tensor, teacher: Tensor, progress: float) -> Float[Tensor, ""]:
        """`distil` with the centre and the temperatures of a head."""
        warm = teacher_temperature(progress, self.terms)
        return distil(student, teacher, self.centres[head].value, self.terms.student_temperature, warm)

    def after_step(self) -> None:
        """The centres follow what the teacher said in this step, to all ranks."""
        for head, parts in self.uncentred.items():
            total, rows = sum(total for total, _ in parts), sum(rows for _, rows in parts)
            mean = ranks.averaged(total) / rows  # as many rows in every rank
            self.centres[head].update(mean[None], self.terms.centre_momentum)
        self.uncentred.clear()

    def after_skip(self) -> None:
        """A step that was not finite leaves nothing behind."""
        self.uncentred.clear()


class Observer(nn.Module):
    """An encoder and what sits on it; the teacher is a moving average of all of it."""

    def __init__(self, encoder: nn.Module, feature_size: int, terms: DistillationTerms):
        super().__init__()
        self.encoder, self.looks = encoder, Looks(feature_size, terms)

    def forward(
        self,
        images: Tensor,
        token_mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        drop_hidden: bool = False,
    ) -> Stages:
        """The stages of images whose hidden tokens show zeros, `mask_token`, or are left out of the computation."""
        if drop_hidden and token_mask is not None:
            return tuple(self.encoder.forward_visible(images, token_mask))
        return tuple(self.encoder(images, token_mask, mask_token=mask_token))


class Dagman(Task):
    """The DAGMaN task on a Swin encoder (the `swinViT` of a SwinUNETR of `feature_size`).

    guidance   how some heads follow spatial priors, which the batches then must have
    diversity  how often the diversity of the encoder's heads is noted
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_size: int,
        terms: DistillationTerms,
        guidance: Guidance | None = None,
        diversity: LooksAtHeads | None = None,
    ):
        super().__init__()
        self.terms, self.guidance = terms, guidance
        self.student = Observer(encoder, feature_size, terms)
        self.teacher = Teacher(self.student)
        self.distillation = CoDistillation(feature_size, terms)
        self.diversity = diversity

    def losses(self, batch: PairBatch, progress: float) -> dict[str, Tensor]:
        """A term for every weight that is not 0."""
        of, teacher = self.distillation, self.teacher.copied.looks
        noise = of.noise(batch.teacher)
        its = self.teacher(batch.teacher, noise)
        attended = self.look(batch, its, clean=noise is None)
        masked = of.masked(attended, tuple(its[self.terms.stage].shape[2:]), len(batch.student), batch.student.device)
        shown = batch.student[masked.samples]
        with tap(self.student.encoder, self.guidance) as native:
            ours = self.student(shown, of.token_mask(masked, shown), of.mask_token, self.terms.drop_hidden)
        self.embedding = self.student.looks.embedding(ours)
        self.paired = teacher.embedding(tuple(stage[masked.others] for stage in its))
        wanted = of.targets(teacher, its, masked)
        losses, said = of.losses(self.student.looks, ours, wanted, masked, batch.clean, progress)
        guided, self.notes = guide(self.guidance, said.attended, native, batch.priors, masked.samples, progress)
        if self.diversity is not None:
            self.notes = {**self.notes, **self.diversity.notes(self.student.encoder, batch, progress)}
        return losses | guided

    def look(self, batch: PairBatch, its: Stages, clean: bool) -> Attended | None:
        """The teacher's attention over every u: of a look of its own at all of it, or of `its`, where
        nothing was dropped or the noisy look is asked for."""
        if not self.terms.attends:
            return None
        u, _ = self.distillation.pairs(len(batch.teacher), batch.teacher.device)
        with torch.no_grad():
            again = self.terms.attention_from == "clean" and not clean
            its = self.teacher(batch.teacher[u]) if again else tuple(stage[u] for stage in its)
            return self.teacher.copied.looks.attend(its)

    def after_step(self, progress: float) -> None:
        """The teacher follows the student, the centres follow the teacher."""
        self.teacher.follow(self.student, progress, start=self.terms.momentum)
        self.distillation.after_step()

    def after_skip(self) -> None:
        """A step that was not finite leaves nothing behind."""
        self.distillation.after_skip()


def teacher_temperature(progress: float, terms: DistillationTerms) -> float:
    """Rises from its first to its second value, linearly, over the warm-up."""
    first, then = terms.teacher_temperature
    return schedules.linear(progress, start=first, end=then, until=terms.temperature_warmup)


def picked(tokens: Float[Tensor, "b c p q r"], cells: Int[Tensor, "b m"]) -> Float[Tensor, "b*m c"]:
    """The tokens of some cells of each sample, sample after sample."""
    rows = tokens.flatten(2).transpose(1, 2)
    return rows.gather(1, cells[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)


def grid_of(images: Float[Tensor, "b c i j k"], stage: int) -> tuple[int, int, int]:
    """Cells along each axis of a stage (0: tokens) of some images."""
    i, j, k = (-(-size // 2 ** (stage + 1)) for size in images.shape[2:])
    return i, j, k
