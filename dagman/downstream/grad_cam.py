"""Grad-CAM over the cells of a study (Selvaraju et al. 2017): maps for a head that has none of its own.

    w_fc = mean over valid k of  d logit_f / d x_ck
    map_fk = relu( sum_c  w_fc (x_ck - o_c) )

x are the tokens that the head reads. The paper has o = 0, for activations behind a ReLU; the tokens of a normalised
stage have no such zero, and their mean, which every study shares, would drown what differs. So o is the mean token that
the head was told (`whiten`), where it was told one: the maps of a linear probe then add up to its logit, but for
the bias, before the ReLU.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from dagman.downstream.study_heads import Places, StudyOutput, Tokens, Valid


def grad_cam(head: nn.Module, tokens: Tokens, places: Places, valid: Valid) -> Float[Tensor, "b f p q r"]:
    """The map of each finding of a head; 0 in cells that are not valid. The parameters get no gradient."""
    whitening = getattr(head, "whitening", None)
    origin = tokens.new_zeros(tokens.shape[1]) if whitening is None else whitening.mean
    # What a frozen encoder gave was made without gradients, which a copy can have.
    with torch.inference_mode(False), torch.enable_grad():
        given = tokens.clone().requires_grad_()
        logits = head(given, places.clone(), valid.clone()).logits
        slopes = [
            torch.autograd.grad(logits[:, finding].sum(), given, retain_graph=True)[0]
            for finding in range(logits.shape[1])
        ]
    shown = valid[:, None].to(tokens.dtype)
    cells = shown.sum(dim=(2, 3, 4)).clamp_min(1)
    weights = torch.stack([(slope * shown).sum(dim=(2, 3, 4)) / cells for slope in slopes], dim=1)
    evidence = einsum(weights, tokens - origin.view(1, -1, 1, 1, 1), "b f c, b c p q r -> b f p q r")
    return evidence.relu() * shown


class WithGradCam(nn.Module):
    """A head that says what another one says, with that one's Grad-CAM as its maps."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, tokens: Tokens, places: Places, valid: Valid) -> StudyOutput:
        said = self.head(tokens, places, valid)
        return StudyOutput(said.logits, grad_cam(self.head, tokens, places, valid), said.parts)
