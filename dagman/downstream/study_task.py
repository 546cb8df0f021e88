"""Learning what studies show: an encoder, or the tokens that one gave, a head, and the labels of whole studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dagman.downstream.clarity_losses import label_loss
from dagman.downstream.studies import StudyBatch
from dagman.downstream.study_heads import LinearProbe, StudyOutput, mean_token
from dagman.downstream.token_grids import encode
from spade3d.networks.swin import SwinTransformer
from spade3d.training.loop import Task

Criterion = Callable[[StudyOutput, StudyBatch], dict[str, Tensor]]


class StudyTask(Task):
    """A head over the cells of studies.

    criterion   named, weighted losses of what the head says
    encoder     makes the cells where a batch has images; None where batches have tokens
    tuned       whether the encoder learns, too, at `encoder_lr` times the head's rate; else it stays as it is
    """

    def __init__(
        self,
        head: nn.Module,
        criterion: Criterion,
        encoder: SwinTransformer | None = None,
        *,
        tuned: bool = False,
        encoder_lr: float = 1.0,
    ):
        super().__init__()
        self.head, self.criterion, self.encoder = head, criterion, encoder
        self.tuned, self.encoder_lr = tuned, encoder_lr
        if encoder is not None:
            encoder.requires_grad_(tuned)

    def losses(self, batch: StudyBatch, progress: float) -> dict[str, Tensor]:
        output = self.head(self.tokens(batch), batch.places, batch.valid)
        return self.criterion(output, batch)

    def tokens(self, batch: StudyBatch) -> Float[Tensor, "b c p q r"]:
        """The cells of a batch; those of a study's crops one behind the other along p."""
        if batch.tokens is not None:
            return batch.tokens.float()  # those on disk have half as many digits
        if not self.tuned:
            self.encoder.eval()  # no path of it is dropped
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            cells = encode(self.encoder, rearrange(batch.images, "b k c x y z -> (b k) c x y z"))
        return rearrange(cells, "(b k) c p q r -> b c (k p) q r", b=len(batch))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The encoder's apart, with their own rate."""
        of_encoder = set() if self.encoder is None else set(map(id, self.encoder.parameters()))
        groups = []
        for group in super().parameter_groups(weight_decay):
            for inside, scale in ((False, 1.0), (True, self.encoder_lr)):
                chosen = [p for p in group["params"] if (id(p) in of_encoder) == inside]
                groups += [{**group, "params": chosen, "lr_scale": scale}] if chosen else []
        return groups


def labels_alone(output: StudyOutput, batch: StudyBatch) -> dict[str, Tensor]:
    """The criterion of plain heads: cross-entropy over the labels that are said. A rare finding weighs as it comes:
    weights would move the bias and spoil the probabilities, and AUROC and AP ask for the order within a finding only;
    heads begin at the prevalence instead."""
    return {"classification": label_loss(output.logits, batch.labels)}


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and spread over studies, by channel: of their cells, and of their mean tokens."""

    cells: tuple[Float[Tensor, " c"], Float[Tensor, " c"]]
    means: tuple[Float[Tensor, " c"], Float[Tensor, " c"]]


@torch.no_grad()
def moments(task: StudyTask, batches: Iterable[StudyBatch], device: torch.device) -> Moments:
    """What the tokens of some batches look like before training; the task is moved to the device."""
    task.to(device)
    sums: Tensor | None = None  # (2, 3, c): of cells and of means: how many, values, squares
    for batch in batches:
        there = batch.to(device)
        tokens, valid = task.tokens(there).double(), there.valid
        cells = rearrange(tokens, "b c p q r -> b p q r c")[valid]
        found = torch.stack([_sums(rows) for rows in (cells, mean_token(tokens, valid))])
        sums = found if sums is None else sums + found
    if sums is None:
        raise ValueError("no studies to take moments of")
    means = sums[:, 1] / sums[:, 0]
    spreads = (sums[:, 2] / sums[:, 0] - means**2).clamp_min(0).sqrt()
    of_cells, of_means = ((m.float().cpu(), s.float().cpu()) for m, s in zip(means, spreads, strict=True))
    return Moments(of_cells, of_means)


def prepare_head(head: nn.Module, found: Moments, labels: Float[Tensor, "n f"]) -> None:
    """Tell a head what its studies look like and how often each finding is there. The mean tokens of few studies hardly
    differ (those of one not at all): a probe takes them to spread a tenth as far as cells, at least."""
    mean, spread = found.cells
    if isinstance(head, LinearProbe):
        mean, spread = found.means[0], torch.maximum(found.means[1], 0.1 * spread)
    head.standardise(mean, spread)
    head.begin_at_prevalence(labels)


def _sums(rows: Float[Tensor, "n c"]) -> Float[Tensor, "3 c"]:
    return torch.stack([torch.ones_like(rows).sum(0), rows.sum(0), (rows**2).sum(0)])
