"""A semantic attention on disk comes back whole, and what is none is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dagman.attention.semantic import SemanticAttention
from dagman.attention.semantic_file import SEMANTIC, load_semantic, save_semantic
from spade3d.faults import DataFault


@pytest.mark.parametrize("how", [{}, {"heads": 3, "blocks": 1, "mlp_ratio": 1.3}])
def test_what_is_saved_comes_back(tmp_path, how):
    torch.manual_seed(0)
    module, path = SemanticAttention(24, **how).train(), tmp_path / "semantic_attention.safetensors"
    save_semantic(path, module, 2)
    assert module.training and [file.name for file in tmp_path.iterdir()] == [path.name]
    again, stage = load_semantic(path)
    assert stage == 2 and not again.training
    tokens = torch.randn(2, 24, 3, 2, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = module.eval()(tokens), again(tokens)
    assert torch.equal(ours.by_head, theirs.by_head) and torch.equal(ours.summary, theirs.summary)
    with safe_open(path, framework="pt") as opened:
        said = json.loads(opened.metadata()[SEMANTIC.entry])
    assert (said["stage"], said["dim"], said["heads"], said["blocks"]) == (
        2,
        24,
        how.get("heads", 8),
        len(again.blocks),
    )


def test_what_is_no_semantic_attention_is_refused(tmp_path):
    path = tmp_path / "semantic_attention.safetensors"
    with pytest.raises(DataFault, match="no semantic attention there"):
        load_semantic(path)
    save_file({"a": torch.zeros(2)}, path, {"format": "spade3d-encoder-1"})
    with pytest.raises(DataFault, match=f"format 'spade3d-encoder-1'; a {SEMANTIC.format}"):
        load_semantic(path)
    module = SemanticAttention(16)
    save_semantic(path, module, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataFault, match="not readable as safetensors"):
        load_semantic(path)
    with torch.no_grad():
        module.class_token[3] = torch.nan
    save_semantic(path, module, 3)
    with pytest.raises(DataFault, match="class_token holds values that are not finite"):
        load_semantic(path)
