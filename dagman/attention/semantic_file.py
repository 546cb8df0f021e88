"""A semantic attention on disk, beside the encoder whose tokens it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dagman.attention.semantic import SemanticAttention
from spade3d.faults import DataFault
from spade3d.tensor_file import safetensors_bytes
from spade3d.whole_file import whole_file

FORMAT = "dagman-semantic-1"


def save_semantic(path: Path, module: SemanticAttention, stage: int) -> None:
    """Weights as safetensors, with what is needed to read them (`stage`, dim, heads, blocks, mlp_ratio) as metadata;
    whole or not at all."""
    said = {"stage": stage, **_settings(module)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with whole_file(path) as file:
        file.write(safetensors_bytes(weights, {"format": FORMAT, "settings": json.dumps(said)}))


def load_semantic(path: Path) -> tuple[SemanticAttention, int]:
    """What `save_semantic` wrote, in evaluation mode, and the stage of the encoder that it reads.

    DataFault for a file that is missing, damaged, of another kind, or holds values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataFault(
            f"{path}: no semantic attention there; a run of the recipe dagman leaves one beside its encoder"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except SafetensorError as error:
        raise DataFault(f"{path}: not readable as safetensors ({error}); copy it again, or pretrain again") from error
    if metadata.get("format") != FORMAT:
        raise DataFault(f"{path}: format {metadata.get('format')!r}; a {FORMAT} of the recipe dagman is needed")
    said = json.loads(metadata["settings"])
    stage, dim = said.pop("stage"), said.pop("dim")
    module = SemanticAttention(dim, **said)
    module.load_state_dict(weights)
    if wild := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
        raise DataFault(f"{path}: {wild} holds values that are not finite; take a run from before it diverged")
    return module.eval(), stage


def _settings(module: SemanticAttention) -> dict[str, Any]:
    """What it was built with."""
    dim, block = module.class_token.numel(), module.blocks[0]
    ratio = block.mlp[0].out_features / dim
    return {"dim": dim, "heads": block.heads, "blocks": len(module.blocks), "mlp_ratio": ratio}
