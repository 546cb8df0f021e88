"""Spade: spatially debiased contrastive learning, globally invariant and locally equivariant.

"Spade-style, reconstructed from the abstract and the framework figure" (Zhang et al., BIBM 2022, arXiv 2211.08643):
two crops and their counterparts in other scans; a student and a teacher branch under separately drawn transforms; a
global contrast on the bottleneck, a local contrast on decoder features at the same place, and the restoration of the
student's view without intensity change. That the teacher is a moving average, and every number here, is our reading
(docs/concepts.md keeps the two apart).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spade3d.contrast.heads import BatchHead, CalibratedHead
from spade3d.contrast.memory import Memory, places_of_all
from spade3d.contrast.objectives import info_nce
from spade3d.contrast.teacher import Teacher
from spade3d.crops.pairs import PairBatch
from spade3d.crops.selection import Places, apart
from spade3d.faults import UsageFault
from spade3d.networks.features import CELLS, Features, read_at
from spade3d.networks.voxel_head import VoxelHead
from spade3d.training import ranks
from spade3d.training.copies import sent
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
    global_head: str = "calibrated"  # what takes out what all crops have in common: measured once, or in each "batch"
    local_dim: int = 64
    local_cell: int = 4  # voxels of the decoded cells that local features are read from
    spatial_negatives: bool = True  # else, in the controls, all that does not attract repels
    momentum: float = 0.996  # of the teacher at the start; 1 at the end
    global_weight: float = 1.0
    local_weight: float = 1.0
    restoration_weight: float = 1.0
    restoration_cell: int = 1  # voxels of the decoded cells that restore; 1: the decoder's own output, as in the figure


class Branch(nn.Module):
    """One branch of the figure: encoder f, decoder g, and the heads h_g and h_l."""

    def __init__(self, network: nn.Module, terms: SpadeTerms):
        super().__init__()
        self.network, self.cell = network, terms.local_cell
        bottleneck, decoded = network.bottleneck_channels, network.decoded_channels(terms.local_cell)
        head = BatchHead if terms.global_head == "batch" else CalibratedHead
        self.global_head = head(bottleneck, bottleneck, terms.global_dim)
        self.local_head = CalibratedHead(decoded, 4 * decoded, terms.local_dim)

    def forward(
        self, images: Tensor, crop: Tensor, voxel: Tensor, hidden: Tensor | None = None, finest: int | None = None
    ) -> tuple[Features, Tensor, Tensor]:
        """Features, decoded as far as `finest` or as the places need, and what the heads say of them (`vectors`)."""
        features = self.network(images, hidden, finest=self.finest(crop, finest))
        return features, *self.vectors(features, images, crop, voxel)

    def finest(self, crop: Tensor, asked: int | None) -> int | None:
        """The finest cell to decode: as asked for, or as places need; without places nothing is decoded for them."""
        needed = self.cell if len(crop) else asked
        return needed if asked is None else min(asked, needed)

    def vectors(self, features: Features, images: Tensor, crop: Tensor, voxel: Tensor) -> tuple[Tensor, Tensor]:
        """v_g (crop, global_dim) and v_l (place, local_dim), both on the unit sphere. `voxel` (place, 3) lies in the
        crop that `crop` (place,) names; without places v_l is empty."""
        v_g = self.global_head(features.stages[-1].mean(dim=(2, 3, 4)))
        if not len(crop):
            return v_g, v_g.new_zeros(0, self.local_head.last.out_features)
        return v_g, self.local_head(self.read(features, crop, voxel, images))

    def read(self, features: Features, crop: Tensor, voxel: Tensor, images: Tensor) -> Tensor:
        """The decoded features of places, before the head."""
        return read_at(features.decoded[CELLS.index(self.cell)], voxel, crop, tuple(images.shape[2:]))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[PairBatch], *, places: bool) -> None:
        """Let the calibrated heads measure what all features of some batches have in common; h_l where there are
        `places`."""
        of_crops, of_places = [], []
        for batch in batches:
            features = self.network(batch.student, finest=self.cell)
            of_crops.append(features.stages[-1].mean(dim=(2, 3, 4)))
            of_places.append(self.read(features, batch.query_crop, batch.query_voxel, batch.student))
        if isinstance(self.global_head, CalibratedHead):
            self.global_head.calibrate(torch.cat(of_crops))
        if places:
            if sum(map(len, of_places)) < 2:
                raise UsageFault("crops share no places to learn from; give a larger --crop.overlap or --crop.shape")
            self.local_head.calibrate(torch.cat(of_places))


class SpatialContrast(nn.Module):
    """The contrasts of the two scopes and their memories: what is learned from the vectors of two branches."""

    def __init__(self, terms: SpadeTerms):
        super().__init__()
        self.terms = terms
        self.global_memory = Memory(terms.global_memory, terms.global_dim, place_width=6)
        self.local_memory = Memory(terms.local_memory, terms.local_dim, place_width=3)
        self.unremembered: list[tuple[Tensor, Places, Tensor, Places]] = []

    def losses(self, batch: PairBatch, ours: Sequence[Tensor], its: Sequence[Tensor]) -> dict[str, Tensor]:
        """A term for each scope that has weight, from the student's (v_g, v_l) and the teacher's vectors.

        Keys are those of the whole batch, whichever rank's teacher saw them.
        """
        terms, losses, (v_g, v_l) = self.terms, {}, ours
        t_g, t_l = map(ranks.gathered, its)
        keyed = places_of_all(batch.places)
        self.unremembered.append((t_g, batch.key_boxes, t_l, keyed))
        if terms.global_weight:
            negative = self.repelled(batch.boxes, batch.key_boxes, self.global_memory, terms.far_mm)
            losses["global"] = terms.global_weight * contrast(
                v_g, t_g, self.global_memory, batch.alike, negative, terms.temperature
            )
        if terms.local_weight:
            before = ranks.rows_before(v_l)
            same = torch.zeros(len(v_l), len(t_l), dtype=torch.bool, device=v_l.device)
            same.diagonal(before)[: len(v_l)] = True
            negative = self.repelled(batch.places, keyed, self.local_memory, terms.far_local_mm)
            losses["local"] = terms.local_weight * contrast(
                v_l, t_l, self.local_memory, same, negative, terms.temperature
            )
        return losses

    def repelled(self, places: Places, keys: Places, memory: Memory, far_mm: float) -> Tensor:
        """Who may repel the vectors at some places: bool (place, keys of the batch and of the memory)."""
        keys = Places.joined([keys, memory.places])
        if not self.terms.spatial_negatives:
            return torch.ones(len(places), len(keys), dtype=torch.bool)
        return torch.from_numpy(apart(places, keys, far_mm))

    def remember(self) -> None:
        """After an update: the teacher's vectors of this step enter the memories."""
        for t_g, boxes, t_l, places in self.unremembered:
            self.global_memory.remember(t_g, boxes)
            self.local_memory.remember(t_l, places)
        self.unremembered.clear()

    def forget(self) -> None:
        """A step that was not finite leaves nothing behind."""
        self.unremembered.clear()


class Spade(Task):
    """The Spade task on a Swin-UNETR whose one output channel restores the crop."""

    def __init__(self, network: nn.Module, terms: SpadeTerms):
        super().__init__()
        self.terms = terms
        self.student = Branch(network, terms)
        self.teacher = Teacher(self.student)
        self.contrast = SpatialContrast(terms)
        self.restorer = Restorer(network, terms.restoration_cell)

    def calibrate(self, batches: Iterable[PairBatch]) -> None:
        """Before training: fit the heads to the data, then let the teacher begin as the student once more."""
        self.student.calibrate(batches, places=self.terms.local_weight > 0)
        self.teacher.restart(self.student)

    def losses(self, batch: PairBatch, progress: float) -> dict[str, Tensor]:
        """A term for every weight that is not 0; what no term needs is not computed."""
        terms, losses = self.terms, {}
        self.notes = batch.realised
        if not terms.local_weight:
            batch = batch.without_places()
        finest = terms.restoration_cell if terms.restoration_weight else None
        features, *ours = self.student(batch.student, batch.query_crop, batch.query_voxel, batch.hidden, finest)
        if terms.global_weight or terms.local_weight:
            _, *its = self.teacher(batch.teacher, batch.key_crop, batch.key_voxel)
            losses |= self.contrast.losses(batch, ours, its)
            scope = int(terms.local_weight > 0)  # signs of life come from many places rather than from few crops
            self.embedding, self.paired = ours[scope].detach(), its[scope]
        if terms.restoration_weight:
            losses["restoration"] = terms.restoration_weight * self.restorer(
                self.student.network, features, batch.clean
            )
        return losses

    def after_step(self, progress: float) -> None:
        """The teacher follows the student; its vectors of this step enter the memories."""
        self.teacher.follow(self.student, progress, start=self.terms.momentum)
        self.contrast.remember()

    def after_skip(self) -> None:
        """A step that was not finite leaves nothing behind."""
        self.contrast.forget()


class Restorer(nn.Module):
    """What the student saw without intensity change, from decoded cells of `cell` voxels.

    From 1 voxel it is the decoder's output, as in the figure. From coarser cells a linear layer makes the voxels of
    each, and the decoder stops there: its last level is most of the work of a whole Swin-UNETR.
    """

    def __init__(self, network: nn.Module, cell: int):
        super().__init__()
        self.cell = cell
        self.head = None if cell == 1 else VoxelHead(network.decoded_channels(cell), cell=cell)

    def forward(self, network: nn.Module, features: Features, clean: Tensor) -> Float[Tensor, ""]:
        """Mean squared error to the clean view (b, 1, i, j, k)."""
        if self.head is None:
            restored = network.logits(features)
        else:
            restored = self.head(features.decoded[CELLS.index(self.cell)], tuple(clean.shape[2:]))
        return F.mse_loss(restored.float(), clean)


def contrast(
    queries: Float[Tensor, "n dim"],
    keys: Float[Tensor, "key dim"],
    memory: Memory,
    positive: Bool[Tensor, "n key"],
    negative: Bool[Tensor, "n all"],
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE of one scope: keys are those of this batch, then the memory; what attracts does not repel.

    In float32 whatever the precision of the networks: a logit of 10 in bf16 is off by up to 0.03.
    """
    negative = sent(negative, queries.device)
    negative[:, : positive.shape[1]] &= ~positive
    with torch.autocast(queries.device.type, enabled=False):
        return info_nce(queries.float(), torch.cat([keys.float(), memory.vectors]), positive, negative, temperature)
