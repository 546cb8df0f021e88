"""Regimes of fine-tuning: how much of the network learns, and how fast each of its layers does.

What was pretrained is easily lost: a fresh decoder sends noise back through the encoder for its first steps, and early
layers, which serve every task, are moved as far as late ones. Three ways to keep it, from no cure to the strongest:
learning rates that shrink with depth (ELECTRA, Clark et al. 2020; for Swin as in SimMIM, Xie et al. 2022), an encoder
that stands still while the decoder finds itself (linear probing before fine-tuning, Kumar et al. 2022, with our whole
decoder in place of the probe), and an encoder that never moves.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

BLOCK = re.compile(r"layers\d\.0\.blocks\.\d+")
STAGE = re.compile(r"layers(\d)(c?)\.")


@dataclass(frozen=True)
class Regime:
    """Of one run, as it acts.

    encoder         "full": it learns; "frozen": it does not; "linear": it does not, and the decoder is linear
    layer_decay     factor of the learning rate from each layer of the encoder to the one below it
    encoder_warmup  share of the run, from its beginning, in which an encoder that learns stands still
    """

    encoder: Literal["full", "frozen", "linear"] = "full"
    layer_decay: float = 1.0
    encoder_warmup: float = 0.0

    @property
    def frozen(self) -> bool:
        return self.encoder != "full"

    def stands_still(self, progress: float) -> bool:
        """Whether the encoder does, in the step that ends at `progress` (0 to 1) of the run."""
        return self.frozen or progress <= self.encoder_warmup


def keep_still(encoder: nn.Module, still: bool, training: bool) -> None:
    """Gradients are computed for an encoder that moves, and none for one that stands still: its weights stay what they
    are to the last bit (AdamW leaves alone, weight decay included, what has no gradient), no layer of it is dropped by
    chance, and the memory and time of its backward pass are saved."""
    encoder.requires_grad_(not still)
    encoder.train(training and not still)


def layer_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of every parameter of a Swin encoder, by name: decay^n, n the layers from it to the
    decoder, itself counted.

    Layers are the patch embedding (n = blocks + 1) and each block of each stage (the last: n = 1). A merging belongs to
    the last block of its stage (SimMIM), the convolution before a stage (`use_v2`) to the first.
    """
    blocks = [name for name, _ in encoder.named_modules() if BLOCK.fullmatch(name)]
    above = len(blocks) + 1
    return {name: decay ** (above - layer_of(name, blocks)) for name, _ in encoder.named_parameters()}


def layer_of(name: str, blocks: Sequence[str]) -> int:
    """The layer of a parameter: 0 for the patch embedding, then the blocks in their order from 1."""
    stage = STAGE.match(name)
    if stage is None:
        return 0
    if block := BLOCK.match(name):
        return blocks.index(block[0]) + 1
    of_stage = [n for n, block in enumerate(blocks, start=1) if block.startswith(f"layers{stage[1]}.")]
    return of_stage[0] if stage[2] else of_stage[-1]


def with_layer_decay(groups: Sequence[dict[str, Any]], encoder: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for AdamW, each divided by the factors of the learning rate ("lr_scale"); what is not of the
    encoder keeps the whole rate."""
    factors = layer_scales(encoder, decay)
    scale = {id(parameter): factors[name] for name, parameter in encoder.named_parameters()}
    divided = []
    for group in groups:
        for factor in sorted({scale.get(id(parameter), 1.0) for parameter in group["params"]}):
            chosen = [parameter for parameter in group["params"] if scale.get(id(parameter), 1.0) == factor]
            divided.append(group | {"params": chosen, "lr_scale": factor})
    return divided
