"""Learning what studies show: an encoder, or the tokens that one gave, a head, and the labels of whole studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dagman.downstream.clarity_losses import label_loss
from dagman.downstream.studies import StudyBatch
from dagman.downstream.study_heads import StudyOutput, mean_token
from dagman.downstream.token_grids import encode
from dagman.downstream.whitening import Moments, moments_of
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
        output = self.head(self.tokens(batch), batch.places, batch.valid, batch.allowed)
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


@torch.no_grad()
def moments(task: StudyTask, batches: Iterable[StudyBatch], device: torch.device) -> tuple[Moments, Moments]:
    """What the tokens of some batches look like before training: their cells, those where some finding may be, and the
    mean tokens of studies. All valid cells, where those are fewer than channels, whose covariance they would not tell.
    The task is moved to the device."""
    task.to(device)
    allowed, valid, means = moments_of(_cells_and_means(task, batch.to(device)) for batch in batches)
    return allowed if allowed.rows >= len(allowed.mean) else valid, means


def prepare_head(head: nn.Module, found: tuple[Moments, Moments], labels: Float[Tensor, "n f"]) -> None:
    """Tell a head what its studies look like, cells and means, and how often each finding is there."""
    head.whiten(*found)
    head.begin_at_prevalence(labels)


def _cells_and_means(
    task: StudyTask, batch: StudyBatch
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "m c"], Float[Tensor, "b c"]]:
    tokens, valid = task.tokens(batch).double(), batch.valid
    allowed = valid if batch.allowed is None else valid & batch.allowed.bool().any(dim=1)
    cells = rearrange(tokens, "b c p q r -> b p q r c")
    return cells[allowed], cells[valid], mean_token(tokens, valid)
