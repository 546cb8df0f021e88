"""A semantic attention on disk, beside the encoder whose tokens it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dagman.attention.semantic import SemanticAttention
from spade3d.model_file import ModelFile

SEMANTIC = ModelFile(
    "dagman-semantic-1",
    "semantic_attention.safetensors",
    "semantic attention",
    "the recipe dagman",
    entry="settings",
)


def save_semantic(path: Path, module: SemanticAttention, stage: int) -> None:
    """Weights as safetensors, with what is needed to read them (`stage`, dim, heads, blocks, mlp_ratio) as metadata;
    whole or not at all."""
    SEMANTIC.write(path, module, {"stage": stage, **_settings(module)})


def load_semantic(path: Path) -> tuple[SemanticAttention, int]:
    """What `save_semantic` wrote, in evaluation mode, and the stage of the encoder that it reads.

    DataFault for a file that is missing, damaged, of another kind, or holds values that are not finite.
    """
    weights, said = SEMANTIC.read(path)
    stage, dim = said.pop("stage"), said.pop("dim")
    module = SemanticAttention(dim, **said)
    SEMANTIC.fill(module, weights, path)
    return module.eval(), stage


def _settings(module: SemanticAttention) -> dict[str, Any]:
    """What it was built with."""
    dim, block = module.class_token.numel(), module.blocks[0]
    ratio = block.mlp[0].out_features / dim
    return {"dim": dim, "heads": block.heads, "blocks": len(module.blocks), "mlp_ratio": ratio}
