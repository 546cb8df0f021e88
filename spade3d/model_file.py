"""Models on disk: weights, and all that is needed to use them, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spade3d.faults import DataFault
from spade3d.tensor_file import safetensors_bytes
from spade3d.whole_file import whole_file

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ModelFile:
    """One kind of model on disk.

    format  what the file states, with its version
    name    of the file in the folder of a run
    what    it is, and `maker`, by what it is made: for messages
    entry   of the metadata, where JSON tells all but the weights
    """

    format: str
    name: str
    what: str
    maker: str
    entry: str = "model"

    def write(self, path: Path, module: nn.Module, said: Mapping[str, Any]) -> None:
        """The weights of a module and what is said of it; whole or not at all."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        with whole_file(path) as file:
            file.write(safetensors_bytes(weights, {"format": self.format, self.entry: json.dumps(said)}))

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights in a file, or in the folder of a run that holds it, and what is said of them.

        DataFault for a file that is missing, damaged, of another format, or holds values that are not finite.
        """
        from safetensors import SafetensorError, safe_open

        file = path / self.name if path.is_dir() else path
        if not file.is_file():
            below = next(iter(sorted(path.glob(f"*/{self.name}"))), None)
            such = f", such as {below.parent}" if below else ""
            raise DataFault(
                f"{path}: no {self.what} there; give a finished run of {self.maker}{such}, or its {self.name}"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                weights = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        except SafetensorError as error:
            raise DataFault(f"{file}: not readable as safetensors ({error}); {self._again}") from error
        if metadata.get("format") != self.format:
            raise DataFault(
                f"{file}: format {metadata.get('format')!r}; a {self.format} of {self.maker} is needed, made by this "
                "version"
            )
        if wild := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
            raise DataFault(f"{file}: {wild} holds values that are not finite; take a run from before it diverged")
        return weights, json.loads(metadata[self.entry])

    def fill(self, module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
        """Give a module the weights that were read from `path`; DataFault where they are not of such a module."""
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise DataFault(f"{path}: its weights are not those of its network ({error}); {self._again}") from error

    @property
    def _again(self) -> str:
        return f"copy it again, or make it anew by {self.maker}"


def format_of(path: Path) -> str:
    """What a safetensors file states as its format; "" where it states none, or is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return (opened.metadata() or {}).get("format", "")
    except SafetensorError:
        return ""
