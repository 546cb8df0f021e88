"""Instance discrimination: SimCLR, MoCo and BYOL, what Spade is held against, on the same encoder, crops and loop.

Each pair of overlapping crops is one instance, shown in four views: crops a and b, as the student's and as the
teacher's transforms drew them. The papers' two random resized crops of a picture are two overlapping crops of a scan
here (with focus four views of one parent, so that all keep what matters in it); every ordered pair of different views
of an instance is a positive, so all three losses are symmetrised. Places in the body select nothing, and no part of a
view is hidden: `batch.alike` and `batch.hidden` are left alone.

* simclr (Chen et al. 2020): NT-Xent; a view against all views of the other instances of the batch, one network.
* moco (He et al. 2020; the two-layer head of v2, Chen et al. 2020): keys of the teacher; against the queue. Of v3
  (Chen et al. 2021) come the symmetrised loss, heads that are standardised over the batch, the other instances of the
  batch as further negatives, and the teacher's momentum that rises; not its predictor, nor its frozen patches. A queue
  with such heads is no paper's; a calibrated head (heads.py) collapsed in a small test (docs/log.md).
* byol (Grill et al. 2020): a predictor on the student alone, towards the teacher's vectors; no negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spade3d.contrast.heads import BatchHead
from spade3d.contrast.memory import Memory, places_of_all
from spade3d.contrast.objectives import info_nce, regression
from spade3d.contrast.teacher import Teacher
from spade3d.crops.pairs import PairBatch
from spade3d.crops.selection import Places
from spade3d.faults import UsageFault
from spade3d.training import ranks
from spade3d.training.loop import Task

METHODS = ("simclr", "moco", "byol")


@dataclass(frozen=True)
class InstanceTerms:
    """Which of the three, and its numbers; what a method does not have is not used by it."""

    method: str  # one of METHODS
    dim: int = 128
    temperature: float = 0.1  # SimCLR's on ImageNet; MoCo v2 takes 0.2; BYOL has none
    memory: int = 4096  # MoCo's queue, in vectors
    momentum: float = 0.996  # of the teacher of MoCo and BYOL at the start; 1 at the end

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not known; one of: {', '.join(METHODS)}")


class Embedder(nn.Module):
    """The encoder f without its decoder, and the projection g: views (view, 1, i, j, k) -> unit vectors (view, dim)."""

    def __init__(self, network: nn.Module, dim: int):
        super().__init__()
        self.network = network
        bottleneck = network.bottleneck_channels
        self.head = BatchHead(bottleneck, bottleneck, dim)

    def forward(self, views: Float[Tensor, "view 1 i j k"]) -> Float[Tensor, "view dim"]:
        return self.head(self.network(views, finest=None).stages[-1].mean(dim=(2, 3, 4)))


class Instance(Task):
    """SimCLR, MoCo or BYOL on the encoder of a Swin-UNETR."""

    def __init__(self, network: nn.Module, terms: InstanceTerms):
        super().__init__()
        self.terms = terms
        self.student = Embedder(network, terms.dim)
        width = network.bottleneck_channels
        self.teacher = Teacher(self.student) if terms.method != "simclr" else None
        self.memory = Memory(terms.memory, terms.dim, place_width=6) if terms.method == "moco" else None
        self.predictor = BatchHead(terms.dim, width, terms.dim) if terms.method == "byol" else None
        self.unremembered: list[tuple[Tensor, Places]] = []

    def losses(self, batch: PairBatch, progress: float) -> dict[str, Tensor]:
        terms, crops = self.terms, len(batch.student)
        self.notes = batch.realised
        positive, negative = instances(crops, batch.student.device)
        views = torch.cat([batch.student, batch.teacher])
        vectors = self.student(views)
        keys = vectors if self.teacher is None else self.teacher(views)
        predicted = vectors if self.predictor is None else self.predictor(vectors)
        # Of each view, the same crop under the other transform.
        self.embedding, self.paired = vectors.detach(), keys.detach().roll(crops, dims=0)
        keys = ranks.gathered_with_gradient(keys)
        if self.memory is not None:
            self.unremembered.append((keys, places_of_all(Places.joined([batch.boxes, batch.boxes]))))
            keys = torch.cat([keys, self.memory.vectors])
            negative = F.pad(negative, (0, len(self.memory)), value=True)
        with torch.autocast(views.device.type, enabled=False):  # a logit of 10 in bf16 is off by up to 0.03
            if terms.method == "byol":
                return {"byol": regression(predicted, keys, positive)}
            return {terms.method: info_nce(predicted, keys, positive, negative, terms.temperature)}

    def after_step(self, progress: float) -> None:
        """The teacher follows the student; its vectors of this step enter MoCo's queue."""
        if self.teacher is not None:
            self.teacher.follow(self.student, progress, start=self.terms.momentum)
        for keys, boxes in self.unremembered:
            self.memory.remember(keys, boxes)
        self.unremembered.clear()

    def after_skip(self) -> None:
        """A step that was not finite leaves nothing behind."""
        self.unremembered.clear()


def instances(crops: int, device: torch.device) -> tuple[Bool[Tensor, "view key"], Bool[Tensor, "view key"]]:
    """Positives, the other views of a view's instance, and negatives, all views of the other instances.

    Views are the crops a, b, a, b, ... of some pairs under one transform, then again under the other; keys are the
    views of all ranks, one rank after another. Raises UsageFault where there is only one pair, which no batch
    statistics and no negatives tell from anything.
    """
    if crops * ranks.world() < 4:
        raise UsageFault(
            f"a batch of {crops} crops shows one place of one scan, and instance discrimination needs two or more; "
            "raise --crop.anchors to 2 or more"
        )
    pair = (torch.arange(crops * ranks.world(), device=device) // 2).unflatten(0, (ranks.world(), crops))
    instance = torch.cat([pair, pair], dim=1)
    same = instance[ranks.rank()][:, None] == instance.flatten()[None, :]
    itself = torch.zeros_like(same)
    itself.diagonal(2 * crops * ranks.rank())[:] = True
    return same & ~itself, ~same
