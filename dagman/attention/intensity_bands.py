"""Intensity bands: regions of a scan that its brightness tells, without any label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import ndimage

from dagman.attention.scan_blocks import ScanBlocks, body_of, largest
from spade3d.faults import UsageFault

SPECK = 0.02  # of the largest component: smaller ones are not the region
INT16 = np.iinfo(np.int16)
ROUNDS = 100


@dataclass(frozen=True)
class Band:
    """A region of the body by its brightness, `low` to `high` inclusive, in HU or in percentiles of the body.

    components  how many of its largest components are the region; None: all but specks
    """

    low: float
    high: float
    components: int | None = None


CT_HU: Mapping[str, Band] = {
    "lung": Band(-950.0, -500.0, 2),
    "fat": Band(-150.0, -50.0),
    "soft tissue": Band(0.0, 80.0),
    "bone": Band(200.0, float(INT16.max)),
}
MR_PERCENTILES: Mapping[str, Band] = {
    "dark": Band(0.0, 20.0),
    "medium": Band(40.0, 60.0),
    "bright": Band(85.0, 100.0),
}


def check_bands(bands: Mapping[str, Band], modality: str) -> None:
    """UsageFault for bands that hold nothing in a scan of that modality."""
    low, high, unit = (INT16.min, INT16.max, "HU") if modality == "CT" else (0, 100, "percentiles of the body")
    if not bands:
        raise UsageFault("no intensity bands; give at least one, or leave them out for those of the modality")
    for name, band in bands.items():
        if not low <= band.low < band.high <= high:
            raise UsageFault(
                f"band {name}: {band.low:g} to {band.high:g}; in {modality} scans bands are in {unit}, from {low} to "
                f"{high}, the lower end first"
            )


def band_masks(blocks: ScanBlocks, modality: str, bands: Sequence[Band]) -> list[Bool[np.ndarray, "i j k"]]:
    """For each band the voxels of the body that are in it.

    MR is smoothed first: noise would scatter its narrow bands over all tissues. CT is
    not: HU between those of two tissues belong to neither, and fat or lung would come to line every organ and the skin.
    """
    body, values = body_of(blocks, modality), blocks.voxels
    ends = [(band.low, band.high) for band in bands]
    if modality != "CT":
        values = _smoothed(blocks, body)
        ends = np.percentile(values[body], ends).tolist()
    inside = [body & (values >= low) & (values <= high) for low, high in ends]
    return [largest(mask, band.components, SPECK) for mask, band in zip(inside, bands, strict=True)]


def _smoothed(blocks: ScanBlocks, body: Bool[np.ndarray, "i j k"]) -> Float32[np.ndarray, "i j k"]:
    """Under a Gaussian of half a block, or one voxel, within the body: what is outside does not darken its skin."""
    sigma_mm = max(min(blocks.spacing), min(np.multiply(blocks.block, blocks.spacing)) / 2)
    sigma = np.divide(sigma_mm, blocks.spacing)
    inside = ndimage.gaussian_filter(body.astype(np.float32), sigma, mode="nearest")
    values = ndimage.gaussian_filter(blocks.voxels * body.astype(np.float32), sigma, mode="nearest")
    return np.divide(values, inside, out=np.zeros_like(values), where=body)


def clusters(values: Float[np.ndarray, " n"], count: int, by: str) -> Int[np.ndarray, " n"]:
    """Which of `count` bands, the darkest 0, each value is in: "quantiles" of equal size, or "kmeans" from these.

    Lloyd's algorithm on a line; a band that becomes empty keeps its centre.
    """
    edges = np.quantile(values, np.arange(1, count) / count)
    band = np.searchsorted(edges, values, side="right")
    if by == "quantiles":
        return band
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    for _ in range(ROUNDS):
        sizes = np.bincount(band, minlength=count)
        sums = np.bincount(band, values, minlength=count)
        moved = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
        band = np.searchsorted((centres[1:] + centres[:-1]) / 2, values, side="right")
    return band
