"""Layers: what every block and every stage of a frozen encoder says of the same places; no label is asked for."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dagman.evaluation.crop_features import Probing
from spade3d.crops.crop import Crop, cut
from spade3d.crops.pairs import as_images
from spade3d.networks.features import read_at
from spade3d.networks.swin import SwinTransformer

BATCHES = 16  # places read from each crop; place b of every crop is a row of batch b

Layers = dict[str, Float[np.ndarray, "batch crop _"]]


def stage_name(stage: int) -> str:
    """How a stage is called; stage 0 is the patch embedding."""
    return f"stage {stage}" if stage else "embedding"


@torch.inference_mode()
def layer_vectors(encoder: SwinTransformer, store, crops: Sequence[Crop], how: Probing) -> Layers:
    """Each layer at BATCHES places of each crop, drawn from the seed and read at their exact place, in the order in
    which an image passes: embedding, the blocks of stage 1 (1.1, 1.2, ...), stage 1, ...

    The rows of a batch come from different crops: places of one crop are too alike to stand for places anywhere.
    """
    found: dict[str, list[np.ndarray]] = {}
    for n, crop in enumerate(crops):
        drawn = np.random.default_rng([how.seed, n]).uniform(0, np.array(crop.shape) - 1, (BATCHES, 3))
        points = torch.from_numpy(drawn.astype(np.float32)).to(how.device)
        of_crop = torch.zeros(BATCHES, dtype=torch.long, device=how.device)
        for name, map_ in all_layers(encoder, as_images([cut(store, crop)]).to(how.device)).items():
            found.setdefault(name, []).append(read_at(map_, points, of_crop, crop.shape).cpu().numpy())
    return {name: np.stack(vectors, axis=1) for name, vectors in found.items()}


def all_layers(encoder: SwinTransformer, images: Float[Tensor, "b c i j k"]) -> dict[str, Float[Tensor, "b _ _ _ _"]]:
    """The maps of all layers, float32, channels first, each layer-normed over its channels as the stages are."""
    blocks: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=f"{stage}.{n}": blocks.update({name: out}))
        for stage in (1, 2, 3, 4)
        for n, block in enumerate(encoder.get_submodule(f"layers{stage}.0").blocks, start=1)
    ]
    try:
        stages = encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = {stage_name(0): stages[0].float()}
    for stage in (1, 2, 3, 4):
        for name in (name for name in blocks if name.startswith(f"{stage}.")):
            found[name] = F.layer_norm(blocks[name].float(), blocks[name].shape[-1:]).movedim(-1, 1)
        found[stage_name(stage)] = stages[stage].float()
    return found
