"""Losses of a distillation: agreement of two prototype distributions, and restoring what was hidden.

Image-token, global-token and patch distillation (DAGMaN's AITD, GITD, AMPD) are one formula on other rows.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spade3d.training import ranks


def distil(
    student: Float[Tensor, "n k"],
    teacher: Float[Tensor, "n k"],
    centre: Float[Tensor, " k"],
    student_temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """The student's cross-entropy to the centred and sharpened teacher:

        mean over n of  - sum over k of  softmax((t - centre) / tau_t)_k  log softmax(s / tau_s)_k

    s and t are logits of k prototypes. The teacher takes no gradient. In float32 also under autocast. (DINO, equation
    1; DAGMaN, section 3.3. Its sum over "i = 1..N" for single vectors is read as the sum over prototypes.) Ranks that
    share a batch have as many rows each, so that the mean of theirs is that of the whole.
    """
    target = ((teacher.detach().float() - centre.detach()) / teacher_temperature).softmax(dim=-1)
    return F.cross_entropy(student.float() / student_temperature, target)


def masked_reconstruction(
    restored: Float[Tensor, "b c i j k"], target: Float[Tensor, "b c i j k"], hidden: Bool[Tensor, "b i j k"]
) -> Float[Tensor, ""]:
    """Mean of |restored - target| over the hidden voxels of all samples (DAGMaN's AMIP); float32 under autocast.

    The paper weights by its mask, which is 0 where a token is hidden; we read it as what is hidden (SMIT's code).
    """
    away = (restored.float() - target.float()).abs()
    return ranks.mean_of_whole((away * hidden.unsqueeze(1)).sum(), hidden.sum() * restored.shape[1])


class Centre(nn.Module):
    """The moving average of a teacher's logits, which `distil` takes away so that no prototype wins them all (DINO).

    `value` (k,) float32 is saved with the task. Update it once the step is known to be finite: it never forgets a NaN.
    """

    def __init__(self, prototypes: int):
        super().__init__()
        self.register_buffer("value", torch.zeros(prototypes))

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "n k"], momentum: float = 0.9) -> None:
        """value <- momentum * value + (1 - momentum) * mean of the rows."""
        self.value.lerp_(logits.float().mean(dim=0), 1 - momentum)
