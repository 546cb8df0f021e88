"""Do the heads of a Swin encoder differ, and how far do they look? Entropy, distance and divergence of their attention.

Masking that follows attention makes heads alike, and a noisy teacher keeps them apart (Jiang et al., "DAGMaN", MIDL
2025, fig. 4a; Park et al., "What do self-supervised vision transformers learn?", 2023). A query's attention is taken
over the cells that it may see: the real ones of its window, of its own side where the shift joined two ends of the
grid. What falls on padding is left out, and the rest sums to one again.

* entropy: of each query's attention over log(cells that it may see); 1 looks everywhere alike, 0 at one cell. DAGMaN's
  fig. 4 states no unit; normalised, windows of any size compare. Queries that see one cell only have none.
* distance_mm: the mean of |query - cell| over each query's attention, between the centres of cells.
* divergence: Jensen-Shannon, H((p + q) / 2) - (H(p) + H(q)) / 2 over log 2, of two heads' attention of one query, mean
  over pairs of heads; 0 where heads are alike, 1 where they share no cell. NaN for a block of one head.

Means are over queries and samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spade3d.faults import UsageFault
from spade3d.networks.swin import AttentionMap, SwinTransformer

STAGES = (1, 2, 3, 4)
QUERIES = 1024  # of a block and sample
SCORES = 2**23  # weights that are measured at once: 32 MiB, and some temporaries as large


@dataclass(frozen=True, eq=False)
class BlockDiversity:
    """What one block's attention came to."""

    entropy: Float[Tensor, " head"]  # 0..1
    distance_mm: Float[Tensor, " head"]
    divergence: Float[Tensor, ""]  # 0..1


def head_diversity(
    encoder: SwinTransformer,
    images: Float[Tensor, "b 1 i j k"],
    spacing_mm: Sequence[float],
    stages: Sequence[int] = STAGES,
    most_queries: int | None = QUERIES,
) -> dict[str, float]:
    """Means over the blocks and heads of each stage, as numbers for a log.

    spacing_mm    of the images' voxels along i, j, k
    most_queries  of each block and sample, a draw that is always the same; None measures all. The standard error of a
                  mean of 1024 numbers between 0 and 1 is 0.016 at worst
    Keys, for stage 3: "stage3.entropy", "stage3.entropy_spread" (the standard deviation over the heads of all blocks),
    "stage3.distance_mm", "stage3.divergence". Costs two to five passes of the encoder for each image on a CPU.
    """
    said: dict[str, float] = {}
    for stage, blocks in block_diversities(encoder, images, spacing_mm, stages, most_queries).items():
        entropy = torch.cat([block.entropy for block in blocks])
        said[f"stage{stage}.entropy"] = entropy.mean().item()
        said[f"stage{stage}.entropy_spread"] = entropy.std(correction=0).item()
        said[f"stage{stage}.distance_mm"] = torch.cat([block.distance_mm for block in blocks]).mean().item()
        said[f"stage{stage}.divergence"] = torch.stack([block.divergence for block in blocks]).mean().item()
    return said


def block_diversities(
    encoder: SwinTransformer,
    images: Float[Tensor, "b 1 i j k"],
    spacing_mm: Sequence[float],
    stages: Sequence[int] = STAGES,
    most_queries: int | None = QUERIES,
) -> dict[int, list[BlockDiversity]]:
    """The same head by head, for each block of some stages.

    One pass of the encoder for each sample, in evaluation mode and float32 whatever the training does; no chance is
    drawn, and the encoder's mode is left as it was. UsageFault for a stage that there is not.
    """
    if strange := sorted(set(stages) - set(STAGES)):
        raise UsageFault(f"stages {strange}: an encoder has stages 1 to 4; name some of them")
    found: dict[int, list[BlockDiversity]] = {stage: [] for stage in stages}

    def note(stage: int, block: nn.Module, tokens: Tensor) -> None:
        voxels = [side * 2 ** (stage - 1) for side in encoder.patch_embed.patch]
        cell_mm = [count * mm for count, mm in zip(voxels, spacing_mm, strict=True)]
        found[stage].append(diversity_of(block.attention_map(tokens), block.attn.window, cell_mm, most_queries))

    exact = torch.autocast(images.device.type, enabled=False)
    with torch.no_grad(), exact, watched(encoder, stages, note):
        for image in images.float().split(1):  # all weights of one sample at a time are enough to keep
            encoder.forward(image, normalize=False)  # a compiled encoder would pass by what is read below
    depths = {stage: len(some) // len(images) for stage, some in found.items()}
    return {stage: [_mean(some[n :: depths[stage]]) for n in range(depths[stage])] for stage, some in found.items()}


def diversity_of(
    attention: AttentionMap, window: Sequence[int], cell_mm: Sequence[float], most_queries: int | None = None
) -> BlockDiversity:
    """The measures of one block's attention over cells of `cell_mm` along i, j, k."""
    samples, _, heads, _, n = attention.weights.shape
    place = _places(attention)
    scale = place.new_tensor(cell_mm)
    measured = []
    for some in _queries(attention, most_queries).split(max(1, SCORES // (samples * heads * n))):
        w, q = some.unbind(dim=1)
        apart = place[w] - place[w, q][:, None]
        # A window that the shift filled from both ends of the grid holds cells that lie more than a window apart, and
        # those see each other not; all others of a window lie within it.
        seen = (apart.abs() < place.new_tensor(window)).all(dim=-1) & (attention.cells[w] >= 0)
        weights = attention.weights[:, w, :, q].float() * seen[:, None, None]  # (query, b, head, n)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        entropy = _entropy(weights)
        most = seen.sum(dim=-1)[:, None, None].float().log()
        distance_mm = (weights * (apart * scale).norm(dim=-1)[:, None, None]).sum(dim=-1)
        measured.append((torch.where(most > 0, entropy / most, torch.nan), distance_mm, _divergence(weights, entropy)))
    entropy, distance_mm, divergence = (torch.cat(values) for values in zip(*measured, strict=True))
    return BlockDiversity(entropy.nanmean(dim=(0, 1)), distance_mm.mean(dim=(0, 1)), divergence.mean())


@contextmanager
def watched(
    encoder: SwinTransformer, stages: Sequence[int], note: Callable[[int, nn.Module, Tensor], None]
) -> Iterator[None]:
    """While it lasts the encoder is in evaluation mode, and every block of the stages shows what enters it."""
    handles = [
        block.register_forward_pre_hook(lambda block, entering, stage=stage: note(stage, block, entering[0]))
        for stage in stages
        for block in encoder.get_submodule(f"layers{stage}.0.blocks").children()
    ]
    training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(training)
        for handle in handles:
            handle.remove()


def _places(attention: AttentionMap) -> Float[Tensor, "window n 3"]:
    """Where the cells of each window lie in the grid, in cells; padding, which counts nowhere, at the first cell."""
    _, rows, columns = attention.grid
    cell = attention.cells.clamp_min(0)
    return torch.stack((cell // (rows * columns), cell // columns % rows, cell % columns), dim=-1).float()


def _queries(attention: AttentionMap, most: int | None) -> Int[Tensor, "query 2"]:
    """The window of each real cell and its place there; of more than `most` a draw, always the same one (an even stride
    could fall on one place of every window)."""
    real = (attention.cells >= 0).nonzero()
    if most is None or len(real) <= most:
        return real
    drawn = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:most]
    return real[drawn.to(real.device)]


def _entropy(weights: Float[Tensor, "*query n"]) -> Float[Tensor, "*query"]:
    return torch.special.entr(weights).sum(dim=-1)


def _divergence(
    weights: Float[Tensor, "query b head n"], entropy: Float[Tensor, "query b head"]
) -> Float[Tensor, "query b"]:
    """Mean over pairs of heads, 0..1."""
    heads = weights.shape[2]
    total = torch.zeros_like(entropy[:, :, 0])
    for head in range(heads - 1):
        one, others = slice(head, head + 1), slice(head + 1, None)
        between = _entropy((weights[:, :, one] + weights[:, :, others]) / 2)
        total += (between - (entropy[:, :, one] + entropy[:, :, others]) / 2).sum(dim=2)
    pairs = heads * (heads - 1) / 2
    return (total / (pairs * math.log(2))).clamp_min(0) if pairs else total + torch.nan


def _mean(samples: Sequence[BlockDiversity]) -> BlockDiversity:
    """Of one block over samples, which all have as many queries."""
    columns = zip(*((one.entropy, one.distance_mm, one.divergence) for one in samples), strict=True)
    entropy, distance_mm, divergence = (torch.stack(values).mean(dim=0) for values in columns)
    return BlockDiversity(entropy, distance_mm, divergence)
