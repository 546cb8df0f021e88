"""Encoder weights in and out of files: our own `encoder.safetensors`, and other people's checkpoints.

No checkpoint is half-loaded in silence: every learned tensor of the encoder is found, in its shape, or it is an error
that names what was found and what is needed. Files are read as tensors only; nothing in them is executed.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spade3d.faults import DataFault
from spade3d.networks.swin import SwinTransformer
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.tensor_file import safetensors_bytes
from spade3d.whole_file import whole_file

FORMAT = "spade3d-encoder-1"
ENCODER = "swinViT."

# What training code of others puts before a parameter's name, outermost first or in any other order.
WRAPPERS = re.compile(r"^(?:(?:module|model|network|backbone|encoder|swin_?vit)\.)+", re.IGNORECASE)

# Their names for ours: the original Swin's MLP; the doubled index of Disruptive Autoencoders (MONAI filter_swinunetr).
RENAMED = ((re.compile(r"\.mlp\.fc([12])\."), r".mlp.linear\1."), (re.compile(r"^(layers[1-4])\.0\.0\."), r"\1.0."))

SETTINGS = ("in_channels", "feature_size", "depths", "heads", "window", "use_v2", "merging", "monai_compatible")

NESTS = ("state_dict", "model", "network_weights", "model_state_dict", "net")


@dataclass(frozen=True)
class Coverage:
    """How much of the encoder a checkpoint filled, counted in learned tensors.

    missing     our names that the file does not hold
    mismatched  "name: (shape in the file) instead of (shape here)"
    """

    loaded: int
    total: int
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        return f"{self.loaded} of {self.total} encoder tensors from {self.source}"


def save_encoder(path: Path, network: SwinUNETR, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the encoder under MONAI's names (`swinViT.*`), with its settings; the file appears whole or not at all.

    metadata: further entries (preprocessing, provenance, ...), kept as JSON.
    """
    path = Path(path)
    entries = {"format": FORMAT}
    for key, value in {**network.encoder_settings, **(metadata or {})}.items():
        entries[key] = json.dumps(value)
    tensors = {ENCODER + name: tensor.contiguous() for name, tensor in network.swinViT.state_dict().items()}
    with whole_file(path) as file:
        file.write(safetensors_bytes(tensors, entries))


def describe_encoder(path: Path) -> dict[str, Any]:
    """The settings of an encoder, whoever wrote it: what our file says, or what the shapes of another's tensors tell.

    From shapes come feature_size, in_channels, depths, heads, window (a cube) and use_v2. What shapes cannot tell is
    assumed as MONAI has it: `merging` "v1", and clipped windows read as MONAI reads them (`monai_compatible`).
    `format` is there where the file states one.
    """
    path = Path(path)
    tensors, entries = _safetensors(path) if path.suffix == ".safetensors" else (_pickled(path), {})
    _check_format(path, entries)
    if entries.get("format") == FORMAT:
        return {key: value if key == "format" else json.loads(value) for key, value in entries.items()}
    found = _encoder_names(path, tensors)
    table = "layers{}.0.blocks.{}.attn.relative_position_bias_table"
    firsts = [found.get(table.format(stage, 0)) for stage in (1, 2, 3, 4)]
    embedding = found.get("patch_embed.proj.weight")
    if embedding is None or any(first is None for first in firsts):
        some = ", ".join(sorted(tensors)[:3])
        raise DataFault(f"{path}: no Swin encoder among its {len(tensors)} tensors ({some}, ...); give a Swin-UNETR's")
    side = (round(firsts[0].shape[0] ** (1 / 3)) + 1) // 2
    stated = {"format": entries["format"]} if "format" in entries else {}
    return stated | {
        "in_channels": embedding.shape[1],
        "feature_size": embedding.shape[0],
        "depths": [sum(table.format(stage, n) in found for n in range(64)) for stage in (1, 2, 3, 4)],
        "heads": [first.shape[1] for first in firsts],
        "window": [side, side, side],
        "use_v2": any(name.startswith("layers1c.") for name in found),
        "merging": "v1",
        "monai_compatible": True,
    }


def load_encoder(network: SwinUNETR, path: Path, *, allow_partial: bool = False) -> Coverage:
    """Fill the network's encoder from a checkpoint of ours, of MONAI or of its relatives.

    path  .safetensors, or a torch file (.pt, .pth, ...) that holds a state dict, maybe nested and under a prefix
    allow_partial  accept less than the whole encoder, as long as something fits; what is left keeps its values
    Raises DataFault for a file that cannot be read as tensors, does not cover the encoder, is of another size or holds
    values that are not finite.
    """
    path = Path(path)
    tensors, entries = _safetensors(path) if path.suffix == ".safetensors" else (_pickled(path), {})
    _check_settings(path, network, entries)
    found = _encoder_names(path, tensors)
    own = network.swinViT.state_dict()
    learned = {name for name, _ in network.swinViT.named_parameters()}
    missing = sorted(learned - found.keys())
    mismatched = [
        f"{name}: {tuple(found[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(learned & found.keys())
        if found[name].shape != own[name].shape
    ]
    fitting = {name: found[name] for name in learned & found.keys() if found[name].shape == own[name].shape}
    coverage = Coverage(len(fitting), len(learned), tuple(missing), tuple(mismatched), str(path))
    if not fitting or (not allow_partial and len(fitting) < len(learned)):
        raise DataFault(_explain(path, network, found, coverage))
    for name, tensor in fitting.items():
        if not tensor.isfinite().all():
            raise DataFault(
                f"{path}: {name} holds values that are not finite; give a checkpoint from before it diverged"
            )
    for name, buffer in network.swinViT.named_buffers():
        if name in found and found[name].shape == buffer.shape and not torch.equal(found[name].to(buffer), buffer):
            raise DataFault(
                f"{path}: {name} orders the biases differently; convert the checkpoint to MONAI's order first"
            )
    network.swinViT.load_state_dict({**own, **fitting})
    return coverage


def read_encoder(path: Path) -> SwinTransformer:
    """The encoder in a checkpoint, ours or another's; DataFault where it takes more than one channel."""
    said = describe_encoder(path)
    if said["in_channels"] != 1:
        raise DataFault(f"{path}: an encoder of {said['in_channels']} channels; one of 1 channel is needed")
    settings = {name: tuple(said[name]) if isinstance(said[name], list) else said[name] for name in SETTINGS}
    network = SwinUNETR(out_channels=1, **settings)
    load_encoder(network, path)
    return network.swinViT.eval()


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise DataFault(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch file, read without executing anything."""
    _check_file(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's own words: they advise to read the file in the way that runs what is in it.
        other = re.search(r"nsupported (?:global: )?GLOBAL ([\w.]*\w)", str(error))
        found = f"holds more than tensors ({other[1]})" if other else "holds more than tensors, or is damaged,"
        raise DataFault(
            f"{path}: {found} and was not opened; tensors and plain values alone are read, since anything else in a "
            "torch file may run code: save its state dict alone, best as safetensors, where the file is trusted, or "
            "copy or download it again"
        ) from error
    except Exception as error:  # torch runs the file as a small program: other bytes fail in any way there is
        raise DataFault(
            f"{path}: not a whole torch file that holds tensors ({type(error).__name__}); a state dict, saved by "
            "torch.save or as safetensors, is needed: give such a checkpoint, or copy or download it again"
        ) from error
    while isinstance(held, Mapping) and (
        nest := next((key for key in NESTS if isinstance(held.get(key), Mapping)), None)
    ):
        held = held[nest]
    tensors = (
        {key: value for key, value in held.items() if isinstance(value, Tensor)} if isinstance(held, Mapping) else {}
    )
    if not tensors:
        raise DataFault(
            f"{path}: holds no state dict ({type(held).__name__} found); give a mapping of names to tensors"
        )
    return tensors


def _check_format(path: Path, entries: Mapping[str, str]) -> None:
    """A file of ours from another version is not guessed at; a file of others says nothing here."""
    stated = entries.get("format", "")
    if stated.startswith("spade3d-encoder-") and stated != FORMAT:
        raise DataFault(f"{path}: written as {stated}, this version reads {FORMAT}; install the version that wrote it")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataFault(f"{path}: is a folder; give the checkpoint in it, such as {path / 'encoder.safetensors'}")
    if not path.is_file():
        raise DataFault(f"{path}: no such checkpoint file; give a .safetensors or a torch file")


def _encoder_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our encoder's names; two candidates for one name are an error."""
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = WRAPPERS.sub("", key)
        for pattern, ours in RENAMED:
            name = pattern.sub(ours, name)
        if name in origin:
            raise DataFault(
                f"{path}: {origin[name]} and {key} are both {name}; keep one of the two networks in the file"
            )
        found[name], origin[name] = tensor, key
    return found


def _check_settings(path: Path, network: SwinUNETR, entries: Mapping[str, str]) -> None:
    """Settings that no shape tells (order of corners, clipped windows) must agree where a file of ours states them."""
    _check_format(path, entries)
    if entries.get("format") != FORMAT:
        return
    differing = [
        f"{key} {json.loads(entries[key])} (here {value})"
        for key, value in json.loads(json.dumps(network.encoder_settings)).items()
        if key in entries and json.loads(entries[key]) != value
    ]
    if differing:
        raise DataFault(f"{path}: an encoder with {', '.join(differing)}; give the network the checkpoint's settings")


def _explain(path: Path, network: SwinUNETR, found: Mapping[str, Tensor], coverage: Coverage) -> str:
    """Why a checkpoint was refused, in the words of the settings that would have to change."""
    settings = network.encoder_settings
    embedding = found.get("patch_embed.proj.weight")
    sizes = []
    if embedding is not None and embedding.ndim == 5:
        theirs = {"feature_size": embedding.shape[0], "in_channels": embedding.shape[1]}
        sizes = [
            f"its {key} is {value}, here {settings[key]}" for key, value in theirs.items() if value != settings[key]
        ]
    table = found.get("layers1.0.blocks.0.attn.relative_position_bias_table")
    if table is not None and table.ndim == 2:
        i, j, k = settings["window"]
        if table.shape[1] != settings["heads"][0]:
            sizes.append(f"its first stage has {table.shape[1]} heads, here {settings['heads'][0]}")
        if table.shape[0] != (2 * i - 1) * (2 * j - 1) * (2 * k - 1):
            side = (round(table.shape[0] ** (1 / 3)) + 1) // 2
            sizes.append(f"its window is {side} (if a cube), here {(i, j, k)}")
    details = sizes or [*coverage.mismatched[:2], *(f"no {name}" for name in coverage.missing[:2])]
    return (
        f"{path}: fits {coverage.loaded} of {coverage.total} encoder tensors ({'; '.join(details)}); "
        "give a checkpoint of this size, set the network to the checkpoint's, or allow a partial encoder"
    )
