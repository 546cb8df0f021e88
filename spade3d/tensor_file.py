"""Tensors with metadata as the bytes of a safetensors file, the same bytes for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "__metadata__"


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """`safetensors.torch.save` with the entries of the metadata in the order of their names.

    The library writes them in an order of chance, and two equal runs would leave different files. A file begins with
    the length of its header (8 bytes, little-endian) and the header, JSON padded by blanks to a multiple of 8; where
    tensors lie is counted from its end. Only the header is written anew.
    """
    from safetensors.torch import save

    written = memoryview(save(dict(tensors), metadata=dict(metadata)))
    end = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(bytes(written[8:end]))
    header[METADATA] = dict(sorted(header[METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, written[end:]))
