"""Frozen encoders: what a file says of its encoder, whoever wrote it, and the encoder itself, trained or not.

A model of dagman-finetune holds an encoder, too: to compare it with the one it began with says what fine-tuning reused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dagman.attention_prediction import is_finetuned
from dagman.downstream.model import SEGMENTATION
from spade3d.configuration import Network
from spade3d.networks.foreign import SETTINGS, describe_encoder, load_encoder, read_encoder
from spade3d.networks.swin import SwinTransformer
from spade3d.networks.swin_unetr import SwinUNETR


def said_of(path: Path) -> dict[str, Any]:
    """What `describe_encoder` says; of a fine-tuned model the same from its own settings, which no shape tells in full.

    A fine-tuned model does not say what its pretraining has seen: it has no "provenance".
    """
    if not is_finetuned(path):
        return describe_encoder(path)
    _, said = SEGMENTATION.read(path)
    network = Network(**said["network"]).model_dump()
    side = network["window"]
    settings = {"in_channels": 1} | {name: network[name] for name in SETTINGS if name in network}
    run = {"recipe": "fine-tuned", "crop": list(said["window"])}
    return settings | {"window": (side, side, side), "preprocessing": said["preprocessing"], "run": run}


def trained(path: Path) -> SwinTransformer:
    """The encoder in a file, ready to be asked."""
    if not is_finetuned(path):
        return read_encoder(path)
    network = SwinUNETR(out_channels=1, **settings_of(said_of(path)))
    load_encoder(network, path)
    return network.swinViT.eval()


def untrained(said: dict[str, Any], seed: int) -> SwinTransformer:
    """An encoder of the same settings with random weights: what a trained one must be better than."""
    torch.manual_seed(seed)
    return SwinUNETR(out_channels=1, **settings_of(said)).swinViT.eval()


def settings_of(said: dict[str, Any]) -> dict[str, Any]:
    """What a SwinUNETR is built with."""
    return {name: tuple(said[name]) if isinstance(said[name], list) else said[name] for name in SETTINGS}
