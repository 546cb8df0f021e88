"""Guidance as a term of a task: some heads of the student follow spatial priors while it learns (SPAN).

Which attention is guided is unknown of the paper; three are offered. `semantic`: the [CLS] row of the semantic
attention, which any crop size has and which enters the loss of the image token. `native`: what the cells of the last
block of a Swin stage receive, global where one window holds the crop. `windowed`: the same where windows are smaller
than the crop, each compared with its own part of the prior.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from dagman.attention.guidance import GuidedHeads, guidance, windowed_guidance
from dagman.attention.semantic import Attended
from spade3d.networks.swin import AttentionMap
from spade3d.training import schedules

Attachment = Literal["semantic", "native", "windowed"]


@dataclass(frozen=True)
class Guidance:
    """Which heads follow which regions of the batches' priors, and how strictly."""

    heads: GuidedHeads
    attachment: Attachment = "semantic"
    stage: int = 3  # of the encoder; of `semantic`, the stage that it reads
    kind: Literal["ce", "inside", "dice"] = "ce"
    weight: float = 0.1
    warmup: float = 0.1  # share of the run over which the weight rises from 0
    least: float = 0.002  # share of a crop below which a region counts as absent

    @property
    def cell(self) -> int:
        """Voxels of a cell of the attention that is guided."""
        return cell_of(self.attachment, self.stage)

    def at(self, progress: float) -> float:
        """The weight at some progress of the run."""
        return schedules.linear(progress, start=0.0, end=self.weight, until=self.warmup)


def cell_of(attachment: Attachment, stage: int) -> int:
    """Voxels of a cell: [CLS] looks at a stage's tokens after its merging, a stage's own heads at those before it."""
    return 2 ** (stage + 1) if attachment == "semantic" else 2**stage


@dataclass(eq=False)
class Tap:
    """Where the last block of a stage looked in the forward pass that ran meanwhile; None without one."""

    map: AttentionMap | None = None


@contextmanager
def tap(encoder: nn.Module, guidance: Guidance | None) -> Iterator[Tap]:
    """Catch a stage's own attention, with gradient, while the encoder runs once; nothing where it is not guided."""
    caught = Tap()
    if guidance is None or guidance.attachment == "semantic":
        yield caught
        return
    attention = encoder.get_submodule(f"layers{guidance.stage}.0.blocks")[-1].attn

    def catch(module: nn.Module, given: tuple) -> None:
        caught.map = module.map(*given)

    handle = attention.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def guide(
    how: Guidance | None,
    attended: Attended | None,
    native: Tap,
    priors: Float[Tensor, "b region p q r"] | None,
    samples: Int[Tensor, " u"],
    progress: float,
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """The loss of guidance, and for the log the share of (sample, head) terms that it is the mean of; both empty
    without guidance. `samples` says which crops of the batch the attention is of."""
    if how is None:
        return {}, {}
    prior = priors[samples]
    if how.attachment == "semantic":
        loss, active = guidance(how.heads.of(attended.by_head), prior, how.kind, how.least)
    elif how.attachment == "native":
        loss, active = guidance(how.heads.of(native.map.received()), prior, how.kind, how.least)
    else:
        weights = how.heads.of(native.map.weights.transpose(1, 2)).transpose(1, 2)
        loss, active = windowed_guidance(replace(native.map, weights=weights), prior, how.kind, how.least)
    return {"prior": how.at(progress) * loss}, {"prior.active": active.detach()}
