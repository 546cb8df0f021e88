"""Where a trained network looks in whole scans, written as NIfTI on each scan's own grid.

Two files a scan: OUT/<scan>_attention.nii.gz, the mean over heads, and OUT/<scan>_attention_heads.nii.gz, (i, j, k,
head); the first of the heads follow regions where the run guided some (SPAN), and are named in what is said. What the
values are stands in `dagman/attention/maps.py`: 1 is the average of a crop. Crops of the size that the
network was trained with overlap by half and are blended; 0 where a scan was not shown to the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dagman.attention.guidance import GuidedHeads
from dagman.attention.maps import STAGE, Looker, relative_maps
from dagman.attention.semantic_file import SEMANTIC, load_semantic
from dagman.downstream.model import SEGMENTATION, SegmentationModel
from dagman.recipes.distillation import GUIDED, IN_ENCODER
from spade3d.commands import CONFIG, ENCODER
from spade3d.configuration import read_yaml
from spade3d.faults import DataFault
from spade3d.model_file import format_of
from spade3d.networks.attention_saliency import peaked
from spade3d.networks.foreign import describe_encoder, read_encoder
from spade3d.networks.sliding import sliding_window
from spade3d.saliency import Look
from spade3d.volumes.geometry import canonical_flips, resample
from spade3d.volumes.nifti_channels import write_channels
from spade3d.volumes.preprocessing import Prepared, Preprocessing
from spade3d.volumes.volume import write_volume

MAP, HEADS = "_attention.nii.gz", "_attention_heads.nii.gz"  # after a scan's name
UNIT = "1 is the average of a crop"
CLASS_TOKEN_CELLS = 8  # along each axis of a crop, where nobody knows what it was trained with: the paper's 8^3


@dataclass(frozen=True, eq=False)
class AttentionModel:
    """What looks, how scans are prepared for it, the crop (voxels of the prepared scan) that it sees at once, and the
    regions that its first heads were guided to."""

    looker: Looker
    preprocessing: Preprocessing
    crop: tuple[int, int, int]
    regions: tuple[str, ...] = ()

    @property
    def said(self) -> dict[str, object]:
        """What is written, for people."""
        said = {"shows": self.looker.said, "heads": self.looker.heads, "crop": list(self.crop), "unit": UNIT}
        return said | ({"regions": list(self.regions)} if self.regions else {})

    @property
    def note(self) -> str:
        """The same in a line."""
        guided = ", ".join(f"{n}: {region}" for n, region in enumerate(self.regions))
        return f"{self.looker.said}; {UNIT}" + (f"; guided heads {guided}" if guided else "")

    def look(
        self, intensities: np.ndarray, device: torch.device, *, heads: bool = True
    ) -> Float[Tensor, "channel i j k"]:
        """The mean over heads, then with `heads` each head, over a prepared scan; float32 on the CPU.

        DataFault for a scan that lies within one cell along all axes, of which attention says nothing.
        """
        crop, cell = tuple(map(min, self.crop, intensities.shape)), self.looker.cell
        if self.is_one_cell(crop):
            raise DataFault(
                f"{_by(crop)} voxels at once are one cell of {_by(cell)} for the attention that is shown: there is "
                "nothing to compare; take a larger scan, or an earlier --attention-stage"
            )
        looker, channels = self.looker.to(device), 1 + self.looker.heads if heads else 1
        return sliding_window(
            lambda crops: relative_maps(looker, crops)[:, :channels], intensities, crop, classes=channels, device=device
        )

    def is_one_cell(self, shape: tuple[int, ...]) -> bool:
        """Whether a scan of so many voxels is one cell, which nothing can be compared with."""
        return all(map(int.__le__, map(min, self.crop, shape), self.looker.cell))

    def write(self, maps: Float[Tensor, "channel i j k"], ready: Prepared, out: Path, name: str) -> None:
        """Carry the maps of a prepared scan to the grid that it was given on, and write both files."""
        source = ready.source_grid
        carried = carry(maps, ready)
        write_volume(out / (name + MAP), next(carried), source.affine)
        write_channels(out / (name + HEADS), carried, len(maps) - 1, float(maps[1:].max()), source.affine)


def carry(maps: Float[Tensor, "channel i j k"], ready: Prepared) -> Iterator[np.ndarray]:
    """Maps of a prepared scan, one by one, float32 on the grid and in the axis order of its source."""
    source = ready.source_grid
    turn = canonical_flips(source.affine, source.shape)
    there = turn.affine(source.affine)
    for one in maps:
        yield turn.undo(resample(one.numpy(), ready.affine, there, turn.canonical_shape, 1, 0.0))


def attention_of_run(path: Path, stage: int | None) -> AttentionModel:
    """What looks in a pretraining run (its folder, or its encoder.safetensors): [CLS] where the run has a semantic
    attention and no `stage` is asked for, else the windowed attention of that stage.

    DataFault where the encoder does not say how scans were prepared, or the semantic attention is not of this encoder.
    """
    file = encoder_file(path)
    said = describe_encoder(file)
    if "preprocessing" not in said:
        raise DataFault(f"{file}: says not how scans are prepared for it; give the encoder of a run of spade-pretrain")
    semantic = None
    beside = file.with_name(SEMANTIC.name)
    if stage is None and beside.exists():
        semantic, stage = load_semantic(beside)
        gives, reads = said["feature_size"] * 2**stage, semantic.class_token.numel()
        if gives != reads:
            raise DataFault(
                f"{beside}: reads tokens of {reads} channels, and stage {stage} of {file.name} has {gives}; put files "
                "of one run beside each other"
            )
    looker = Looker(read_encoder(file), stage or STAGE, semantic)
    preprocessing = Preprocessing.from_dict(said["preprocessing"])
    return AttentionModel(looker, preprocessing, trained_crop(file, looker), guided_regions(file, looker))


def saliency_of_run(checkpoint: Path) -> tuple[Look, str] | None:
    """For `spade-saliency attention`: [CLS] of the run that an encoder lies in, mean over heads, as far as a place gets
    more than the average of its crop. None for an encoder that has no semantic attention beside it."""
    if not checkpoint.with_name(SEMANTIC.name).is_file():
        return None
    model = attention_of_run(checkpoint, None)

    def look(intensities: np.ndarray, _: float, device: torch.device) -> np.ndarray:
        if model.is_one_cell(intensities.shape):
            return np.zeros_like(intensities)  # nothing stands out: views of such a scan stay as they are
        return peaked(np.maximum(model.look(intensities, device, heads=False)[0].numpy() - 1, 0))

    return look, model.looker.said


def attention_of_model(model: SegmentationModel, stage: int | None) -> AttentionModel:
    """What looks in a fine-tuned model."""
    return AttentionModel(Looker(model.network.swinViT, stage or STAGE), model.preprocessing, model.window)


def is_finetuned(path: Path) -> bool:
    """Whether a model is one of dagman-finetune, which segments, too; else it may be an encoder."""
    return (path / SEGMENTATION.name).exists() if path.is_dir() else format_of(path) == SEGMENTATION.format


def encoder_file(path: Path) -> Path:
    """The encoder of a run, or the file itself."""
    file = path / ENCODER if path.is_dir() else path
    if not file.is_file():
        raise DataFault(f"{path}: no model there; give a finished run of spade-pretrain or of dagman-finetune")
    return file


def trained_crop(encoder: Path, looker: Looker) -> tuple[int, int, int]:
    """The crop of the run that an encoder lies in; where its settings are not beside it, what the attention was made
    for: one window of the blocks, or the paper's number of cells for [CLS]."""
    settings = encoder.with_name(CONFIG)
    shape = (read_yaml(settings).get("crop") or {}).get("shape") if settings.is_file() else None
    if shape is None:
        shape = looker.window if looker.semantic is None else [CLASS_TOKEN_CELLS * side for side in looker.cell]
    i, j, k = shape
    return i, j, k


def guided_regions(encoder: Path, looker: Looker) -> tuple[str, ...]:
    """The regions that the first heads of what looks were guided to, by the table beside an encoder or else the one in
    it; of other attention than the guided one nothing is said."""
    table = encoder.with_name(GUIDED)
    if table.is_file():
        said = json.loads(table.read_text(encoding="utf-8"))
    elif (said := describe_encoder(encoder).get(IN_ENCODER)) is None:
        return ()
    semantic = looker.semantic is not None
    if semantic != (said.get("attachment") == "semantic") or not (semantic or looker.stage == said.get("stage")):
        return ()
    return GuidedHeads.from_dict(said).regions


def _by(sides: tuple[int, int, int]) -> str:
    return " x ".join(map(str, sides))
