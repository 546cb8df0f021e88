"""Spade: spatially debiased contrastive learning, globally invariant and locally equivariant.

"Spade-style, reconstructed from the abstract and the framework figure" (Zhang et al., BIBM 2022, arXiv 2211.08643):
two crops and their counterparts in other scans; a student and a teacher branch under separately drawn transforms; a
global contrast on the bottleneck, a local contrast on decoder features at the same place, and the restoration of the
student's view without intensity change. That the teacher is a moving average, and every number here, is our reading
(docs/concepts.md keeps the two apart).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade3d.contrast.heads import Head
from spade3d.contrast.memory import Memory
from spade3d.contrast.objectives import info_nce
from spade3d.crops.pairs import PairBatch
from spade3d.crops.selection import Places, apart
from spade3d.networks.features import Features, read_at
from spade3d.training import schedules
from spade3d.training.loop import Task


@dataclass(frozen=True)
class SpadeTerms:
    """Temperatures, memories and weights of Spade."""

    far_mm: float  # farther apart than this in the body frame: negatives of the global scope
    far_local_mm: float  # the same for the local scope
    temperature: float = 0.1
    global_memory: int = 4096
    local_memory: int = 8192
    global_dim: int = 128
    local_dim: int = 64
    momentum: float = 0.996  # of the teacher at the start; 1 at the end
    global_weight: float = 1.0
    local_weight: float = 1.0
    restoration_weight: float = 1.0


class Branch(nn.Module):
    """One branch of the figure: encoder f, decoder g, and the heads h_g and h_l."""

    def __init__(self, network: nn.Module, bottleneck: int, decoded: int, terms: SpadeTerms):
        super().__init__()
        self.network = network
        self.global_head = Head(bottleneck, bottleneck, terms.global_dim)
        self.local_head = Head(decoded, 4 * decoded, terms.local_dim)

    def forward(self, images: Tensor, crop: Tensor, voxel: Tensor) -> tuple[Features, Tensor, Tensor]:
        """Features, v_g (crop, global_dim) and v_l (place, local_dim), both on the unit sphere."""
        features = self.network(images)
        there = read_at(features.decoded, voxel, crop, tuple(images.shape[2:]))
        return features, self.global_head(features.stages[-1].mean(dim=(2, 3, 4))), self.local_head(there)


class Spade(Task):
    """The Spade task on a Swin-UNETR whose one output channel restores the crop."""

    def __init__(self, network: nn.Module, bottleneck: int, decoded: int, terms: SpadeTerms):
        super().__init__()
        self.terms = terms
        self.student = Branch(network, bottleneck, decoded, terms)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.global_memory = Memory(terms.global_memory, terms.global_dim, place_width=6)
        self.local_memory = Memory(terms.local_memory, terms.local_dim, place_width=3)
        self.unremembered: list[tuple[Tensor, Places, Tensor, Places]] = []

    def train(self, mode: bool = True) -> Spade:
        """Switch the student; the teacher never trains."""
        super().train(mode)
        self.teacher.eval()
        return self

    def losses(self, batch: PairBatch, progress: float) -> dict[str, Tensor]:
        terms = self.terms
        features, v_g, v_l = self.student(batch.student, batch.query_crop, batch.query_voxel)
        with torch.no_grad():
            _, t_g, t_l = self.teacher(batch.teacher, batch.key_crop, batch.key_voxel)
        self.unremembered.append((t_g, batch.boxes, t_l, batch.places))
        local = terms.local_weight > 0  # signs of life come from many places rather than from few crops
        self.embedding, self.paired = (v_l.detach(), t_l) if local else (v_g.detach(), t_g)
        same_place = torch.eye(len(v_l), dtype=torch.bool, device=v_l.device)
        return {
            "global": terms.global_weight
            * contrast(v_g, batch.boxes, t_g, self.global_memory, batch.alike, terms.far_mm, terms.temperature),
            "local": terms.local_weight
            * contrast(v_l, batch.places, t_l, self.local_memory, same_place, terms.far_local_mm, terms.temperature),
            "restoration": terms.restoration_weight
            * F.mse_loss(self.student.network.logits(features).float(), batch.clean),
        }

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The teacher follows the student; its vectors of this step enter the memories."""
        momentum = schedules.momentum(progress, start=self.terms.momentum)
        for ours, its in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            its.lerp_(ours, 1 - momentum)
        for t_g, boxes, t_l, places in self.unremembered:
            self.global_memory.remember(t_g, boxes)
            self.local_memory.remember(t_l, places)
        self.unremembered.clear()

    def after_skip(self) -> None:
        """A step that was not finite leaves nothing behind."""
        self.unremembered.clear()


def contrast(
    queries: Tensor,
    places: Places,
    keys: Tensor,
    memory: Memory,
    positive: Tensor,
    far_mm: float,
    temperature: float,
) -> Tensor:
    """InfoNCE of one scope: keys of this batch and the memory; what lies far away repels, the band between is silent.

    queries, keys (n, dim) lie at `places`, one by one; positive (n, n) tells who attracts within the batch. In float32
    whatever the precision of the networks: a logit of 10 in bf16 is off by up to 0.03.
    """
    far = torch.from_numpy(apart(places, Places.joined([places, memory.places]), far_mm)).to(queries.device)
    near = F.pad(positive, (0, len(memory)))
    with torch.autocast(queries.device.type, enabled=False):
        return info_nce(queries.float(), torch.cat([keys.float(), memory.vectors]), near, far & ~near, temperature)
