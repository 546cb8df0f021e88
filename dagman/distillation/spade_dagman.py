"""Spade and DAGMaN on one encoder in one step.

The two overlapping crops a and b of Spade's sampling are DAGMaN's u and v, also those of the counterparts in other
scans. The student looks once at every crop, masked as DAGMaN masks; both tasks learn from that look. The teacher is the
momentum branch of both: what it sees of the whole crop gives Spade its keys and the mask its attention, what it sees
through patch dropout gives DAGMaN its targets. Neither paper knows the other; how they are joined is ours.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dagman.distillation.co_distillation import CoDistillation, DistillationTerms, Looks, Masked
from dagman.distillation.guided import Guidance, guide, tap
from dagman.distillation.head_looks import LooksAtHeads
from spade3d.contrast.spade import Branch, Restorer, SpadeTerms, SpatialContrast
from spade3d.contrast.teacher import Teacher
from spade3d.crops.pairs import PairBatch
from spade3d.networks.features import Features
from spade3d.training.loop import Task


class JointObserver(nn.Module):
    """A Swin-UNETR with Spade's heads and DAGMaN's: the student and, as its moving average, the teacher of both."""

    def __init__(self, network: nn.Module, spade: SpadeTerms, distill: DistillationTerms):
        super().__init__()
        self.spade = Branch(network, spade)
        self.looks = Looks(network.encoder_settings["feature_size"], distill)

    def forward(
        self,
        images: Tensor,
        token_mask: Tensor | None = None,
        finest: int | None = None,
        mask_token: Tensor | None = None,
    ) -> Features:
        return self.spade.network(images, token_mask, finest=finest, mask_token=mask_token)


class SpadeDagman(Task):
    """Both tasks. Batches have one geometry: a cell of the student's view is the same cell of the teacher's."""

    def __init__(
        self,
        network: nn.Module,
        spade: SpadeTerms,
        distill: DistillationTerms,
        guidance: Guidance | None = None,
        diversity: LooksAtHeads | None = None,
    ):
        super().__init__()
        self.terms, self.guidance = spade, guidance
        self.student = JointObserver(network, spade, distill)
        self.teacher = Teacher(self.student)
        self.contrast = SpatialContrast(spade)
        self.restorer = Restorer(network, spade.restoration_cell)
        self.distillation = CoDistillation(network.encoder_settings["feature_size"], distill)
        self.diversity = diversity

    def calibrate(self, batches: Iterable[PairBatch]) -> None:
        """Before training: fit Spade's heads to the data, then let the teacher begin as the student once more."""
        self.student.spade.calibrate(batches, places=self.terms.local_weight > 0)
        self.teacher.restart(self.student)

    def losses(self, batch: PairBatch, progress: float) -> dict[str, Tensor]:
        """The terms of Spade and of DAGMaN that have weight."""
        terms, of, teacher = self.terms, self.distillation, self.teacher.copied
        if not terms.local_weight:
            batch = batch.without_places()
        whole = self.teacher(batch.teacher, finest=teacher.spade.finest(batch.key_crop, None))
        noise = of.noise(batch.teacher)
        noisy = whole.stages if noise is None else self.teacher(batch.teacher, noise).stages
        masked = self.mask(whole.stages if of.terms.attention_from == "clean" else noisy, len(batch.student))
        finest = self.student.spade.finest(
            batch.query_crop, terms.restoration_cell if terms.restoration_weight else None
        )
        encoder = self.student.spade.network.swinViT
        with tap(encoder, self.guidance) as native:
            features = self.student(batch.student, of.token_mask(masked, batch.student), finest, of.mask_token)
        ours = self.student.spade.vectors(features, batch.student, batch.query_crop, batch.query_voxel)
        with torch.no_grad():
            its = teacher.spade.vectors(whole, batch.teacher, batch.key_crop, batch.key_voxel)
        scope = int(terms.local_weight > 0)  # signs of life come from many places rather than from few crops
        self.embedding, self.paired = ours[scope].detach(), its[scope]
        losses = self.contrast.losses(batch, ours, its)
        if terms.restoration_weight:
            restored = self.restorer(self.student.spade.network, features, batch.clean)
            losses["restoration"] = terms.restoration_weight * restored
        wanted = of.targets(teacher.looks, noisy, masked)
        distilled, said = of.losses(self.student.looks, features.stages, wanted, masked, batch.clean, progress)
        guided, self.notes = guide(self.guidance, said.attended, native, batch.priors, masked.samples, progress)
        if self.diversity is not None:
            self.notes = {**self.notes, **self.diversity.notes(encoder, batch, progress)}
        return losses | distilled | guided

    def mask(self, stages: tuple[Tensor, ...], crops: int) -> Masked:
        """What is hidden from the student, by what the teacher attended to where the rule asks for it."""
        of = self.distillation
        grid = tuple(stages[of.terms.stage].shape[2:])
        with torch.no_grad():
            attended = self.teacher.copied.looks.attend(stages) if of.terms.attends else None
        return of.masked(attended, grid, crops, stages[0].device)

    def after_step(self, progress: float) -> None:
        """The teacher follows the student, centres and memories follow the teacher."""
        self.teacher.follow(self.student, progress, start=self.terms.momentum)
        self.contrast.remember()
        self.distillation.after_step()

    def after_skip(self) -> None:
        """A step that was not finite leaves nothing behind."""
        self.contrast.forget()
        self.distillation.after_skip()
