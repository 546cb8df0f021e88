"""Tensors with metadata in a file: whatever order the metadata come in, the bytes are the same."""

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from spade3d.tensor_file import safetensors_bytes

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2]), "empty": torch.zeros(0)}
ENTRIES = {f"entry {n}": f'"{n}" äß∞\n' for n in range(12)}


def test_equal_content_is_equal_bytes():
    backwards = dict(reversed(ENTRIES.items()))
    wanted = safetensors_bytes(TENSORS, ENTRIES)
    # The library's own order is one of chance: of 12 entries it is not the same eight times over.
    assert len({save(TENSORS, metadata=ENTRIES) for _ in range(8)}) > 1
    assert all(safetensors_bytes(TENSORS, entries) == wanted for entries in (ENTRIES, backwards) for _ in range(8))


def test_the_library_reads_what_was_written(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS, ENTRIES))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == ENTRIES
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype
    assert load(path.read_bytes()).keys() == TENSORS.keys()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # tensors lie where any machine reads them fast
