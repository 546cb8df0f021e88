"""A fine-tuned model on disk: weights, classes, and how scans are prepared for it; all that predicting needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dagman.downstream.flips import exchange_of, mean_over_flips
from dagman.downstream.inference import predict_classes
from dagman.downstream.labelled import Classes
from dagman.downstream.linear_decoder import LinearDecoder, with_linear_decoder
from spade3d.configuration import Network
from spade3d.model_file import ModelFile
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.training.precision import autocast_for
from spade3d.volumes.preprocessing import Prepared, Preprocessing
from spade3d.volumes.volume import Grid, Volume

Decoder = Literal["swin-unetr", "linear"]
SEGMENTATION = ModelFile("dagman-segmentation-1", "model.safetensors", "model", "dagman-finetune")


@dataclass(frozen=True, eq=False)
class SegmentationModel:
    """A network with what it was trained for.

    window      voxels of the prepared scan
    modalities  "CT", "MR", "PT" of the scans that it learned from; () where that is not known
    taught      the axes (R, A, S) along which the crops of training were flipped
    """

    network: SwinUNETR | LinearDecoder
    settings: Network
    classes: Classes
    preprocessing: Preprocessing
    window: tuple[int, int, int]
    overlap: float
    decoder: Decoder = "swin-unetr"
    modalities: tuple[str, ...] = ()
    taught: tuple[bool, bool, bool] = (False, False, False)

    def segment(self, volume: Volume, device: torch.device) -> np.ndarray:
        """Values of the label table, on the volume's own grid but in canonical axis order."""
        ready: Prepared = self.preprocessing.prepare(volume)
        intensities = ready.normalisation.intensity(ready.voxels)
        return self.segment_prepared(intensities, ready.affine, ready.source_grid, device, fill=ready.normalisation.low)

    def segment_prepared(
        self,
        intensities: np.ndarray,
        affine: np.ndarray,
        source: Grid,
        device: torch.device,
        *,
        fill: float,
        batch: int | None = None,
        flips: Sequence[int] = (),
        precision: str = "auto",
    ) -> np.ndarray:
        """The same for a scan that a store has already prepared.

        fill: the intensity outside the scan, its `normalisation.low`. batch: windows at once; None: as many as suit the
        device. flips: axes (0, 1, 2 for R, A, S) over which the answers are averaged; UsageFault where that cannot be.
        precision: as in `logits`.
        """
        self.network.to(device).eval()
        answer = partial(self.logits, precision=precision)
        found = predict_classes(
            mean_over_flips(answer, flips, exchange_of(self.classes, self.taught, flips)),
            intensities,
            affine,
            source,
            classes=len(self.classes),
            window=self.window,
            overlap=self.overlap,
            device=device,
            fill=fill,
            batch=batch,
        )
        return self.classes.written(found)

    def logits(self, images: Tensor, precision: str = "auto") -> Tensor:
        """Crops (b, 1, i, j, k) -> float32 (b, classes, i, j, k), computed in "auto" (bf16 on CUDA devices that have
        it, else fp32), "fp32" or "bf16" (UsageFault on a GPU that lacks it; a CPU that lacks it is slow)."""
        with autocast_for(precision, images.device, gradients=False)():
            return self.network.logits(self.network(images)).float()

    def save(self, path: Path) -> None:
        """safetensors with everything else as metadata; whole or not at all."""
        said = {
            "network": self.settings.model_dump(mode="json"),
            "classes": {"names": self.classes.names, "values": self.classes.values},
            "preprocessing": self.preprocessing.to_dict(),
            "window": self.window,
            "overlap": self.overlap,
            "decoder": self.decoder,
            "modalities": self.modalities,
            "taught": self.taught,
        }
        SEGMENTATION.write(path, self.network, said)


def with_decoder(network: SwinUNETR, decoder: Decoder, classes: int) -> SwinUNETR | LinearDecoder:
    """A Swin-UNETR as it is, or its encoder under a linear decoder, drawn from torch's generator."""
    return with_linear_decoder(network, classes) if decoder == "linear" else network


def load_model(path: Path) -> SegmentationModel:
    """Read what `save` wrote: model.safetensors itself, or the folder of a run that holds it."""
    from spade3d.recipes.recipe import build_network

    weights, said = SEGMENTATION.read(path)
    settings = Network(**said["network"])
    classes = Classes(tuple(said["classes"]["names"]), tuple(said["classes"]["values"]))
    decoder = said.get("decoder", "swin-unetr")
    network = with_decoder(build_network(settings, out_channels=len(classes)), decoder, len(classes))
    SEGMENTATION.fill(network, weights, path)
    how = Preprocessing.from_dict(said["preprocessing"])
    return SegmentationModel(
        network,
        settings,
        classes,
        how,
        tuple(said["window"]),
        said["overlap"],
        decoder,
        tuple(said.get("modalities", ())),  # files of before say neither this nor the next
        tuple(said.get("taught", (False, False, False))),
    )
