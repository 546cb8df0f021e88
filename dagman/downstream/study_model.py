"""A model of studies on disk and at work: encoder, head, findings, and how scans are prepared for and shown to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import nn

from dagman.downstream.class_tokens import ClassTokens
from dagman.downstream.coarse_scans import CoarseScans
from dagman.downstream.one_scan import OneScan, one_scan, prepared_scan
from dagman.downstream.study_heads import AttentionPooling, LinearProbe
from dagman.downstream.token_grids import Windows, channels_of, frozen, places_of, to_world, token_grid
from spade3d.configuration import Network
from spade3d.crops.crop import Crop
from spade3d.model_file import ModelFile
from spade3d.networks.swin import SwinTransformer
from spade3d.volumes.geometry import canonical_flips, resample
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import Grid, Volume

STUDY = ModelFile(
    "dagman-study-2",
    "model.safetensors",
    "model",
    "dagman-finetune --task classification or localisation",
)
HEADS: Mapping[str, type[nn.Module]] = {
    "linear": LinearProbe,
    "attention": AttentionPooling,
    "clarity": ClassTokens,
}


@dataclass(frozen=True, eq=False)
class StudyFound:
    """What a model says of one scan.

    probabilities  of each finding; float32 would call all 1 from a logit of 17 on
    maps           evidence of each finding at each cell; None where the head has none
    affine         (4, 4): a cell to RAS+ mm of the patient
    """

    probabilities: Float64[np.ndarray, " f"]
    maps: Float32[np.ndarray, "f p q r"] | None
    affine: np.ndarray

    def on_grid(self, finding: int, grid: Grid) -> Float32[np.ndarray, "i j k"]:
        """The map of a finding on a scan's own grid and in its axis order: linear between the centres of cells, 0
        beyond the cells."""
        turn = canonical_flips(grid.affine, grid.shape)
        there = turn.affine(grid.affine)
        return turn.undo(resample(self.maps[finding], self.affine, there, turn.canonical_shape, 1, 0.0))


@dataclass(frozen=True, eq=False)
class StudyModel:
    """An encoder and a head with what they were trained for.

    head_kind, head_settings  one of HEADS, and what it was built with besides channels and findings
    low_resolution            the whole body was shown in voxels of `windows.spacing`, not as it is stored
    """

    encoder: SwinTransformer
    head: nn.Module
    network: Network
    head_kind: str
    head_settings: Mapping[str, Any]
    findings: tuple[str, ...]
    preprocessing: Preprocessing
    windows: Windows
    low_resolution: bool = False

    @property
    def has_maps(self) -> bool:
        """Whether it says where findings are; a linear probe reads the mean token alone."""
        return self.head_kind != "linear"

    def study(self, store, i: int, device: torch.device) -> StudyFound:
        """What it finds in a stored scan: every window of the body is encoded, and the head sees all cells together."""
        return self._of_scan(one_scan(store, i), device)

    def volume(self, volume: Volume, device: torch.device) -> StudyFound:
        """The same for a scan as it was read."""
        return self._of_scan(prepared_scan(self.preprocessing.prepare(volume)), device)

    def _of_scan(self, scan: OneScan, device: torch.device) -> StudyFound:
        shown = CoarseScans(scan, self.windows.spacing[0]) if self.low_resolution else scan
        tokens, cells = token_grid(frozen(self.encoder, device), shown, 0, self.windows, device)
        return self.of_tokens(tokens, shown.cases[0], cells, device)

    @torch.inference_mode()
    def of_tokens(
        self, tokens: Float32[np.ndarray, "c p q r"], stored, cells: Crop, device: torch.device
    ) -> StudyFound:
        """What the head finds in the tokens of a scan (`stored`: its record)."""
        self.head.to(device).eval()
        places, valid = places_of(stored, cells)
        given = [torch.from_numpy(array)[None].to(device) for array in (tokens, places, valid)]
        output = self.head(*given)
        maps = None if output.maps is None else output.maps[0].float().cpu().numpy()
        return StudyFound(output.logits[0].double().sigmoid().cpu().numpy(), maps, to_world(stored, cells))

    def save(self, path: Path) -> None:
        """safetensors with everything else as metadata; whole or not at all."""
        said = {
            "network": self.network.model_dump(mode="json"),
            "head": {"kind": self.head_kind, "settings": dict(self.head_settings)},
            "findings": self.findings,
            "preprocessing": self.preprocessing.to_dict(),
            "windows": asdict(self.windows),
            "low_resolution": self.low_resolution,
        }
        STUDY.write(path, nn.ModuleDict({"encoder": self.encoder, "head": self.head}), said)


def build_head(kind: str, channels: int, findings: int, settings: Mapping[str, Any]) -> nn.Module:
    """A head, freshly drawn from torch's generator."""
    return HEADS[kind](channels, findings, **settings)


def load_study_model(path: Path) -> StudyModel:
    """Read what `save` wrote: model.safetensors itself, or the folder of a run that holds it; in evaluation mode.

    DataFault for a file that is missing, damaged, of another kind, or does not fit its own settings.
    """
    from spade3d.recipes.recipe import build_network

    weights, said = STUDY.read(path)
    network, windows = Network(**said["network"]), said["windows"]
    encoder = build_network(network, out_channels=1).swinViT
    kind, settings, findings = said["head"]["kind"], said["head"]["settings"], tuple(said["findings"])
    head = build_head(kind, channels_of(encoder), len(findings), settings)
    STUDY.fill(nn.ModuleDict({"encoder": encoder, "head": head}), weights, path)
    return StudyModel(
        encoder.eval(),
        head.eval(),
        network,
        kind,
        settings,
        findings,
        Preprocessing.from_dict(said["preprocessing"]),
        Windows(tuple(windows["shape"]), tuple(windows["spacing"]), windows["overlap"]),
        said["low_resolution"],
    )
