"""What a voxel's brightness says about the structure that it belongs to, learnt from labelled scans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from scipy import ndimage

from dagman.attention.scan_blocks import ScanBlocks, body_of, scan_blocks

BINS = 64
SMOOTH_BINS = 1.5
RARE = 1e-3  # of a histogram of 1: brightness that hardly any voxel has tells nothing


def likelihoods(
    store, cases: Sequence[int], values: Sequence[int], resolution_mm: float
) -> Float32[np.ndarray, "bin region"]:
    """For each brightness and structure  P(I | structure) / (P(I | structure) + P(I | body)),  0..1.

    It is what Bayes' rule gives where structure and any voxel of the body are equally likely beforehand: 1/2 where the
    brightness tells nothing. (With the true odds it would be near 0 everywhere for a small structure; where a
    structure is likely is for the location to say.) Histograms are means over the labelled scans that hold the
    structure, 0 throughout where none does; brightness is that of the store's normalisation, so that scans of one
    modality compare: give those of one.
    """
    of_structure, of_body = np.zeros((BINS, len(values))), np.zeros(BINS)
    for i in cases:
        blocks = scan_blocks(store, i, resolution_mm)
        normalisation = store.cases[i].normalisation
        of_body += _histogram(bins_of(blocks.voxels[body_of(blocks, store.cases[i].modality)], normalisation))
        labels, bins = store.labels(i), bins_of(store.image(i), normalisation)
        for n, value in enumerate(values):
            held = bins[labels == value]
            if held.size:
                of_structure[:, n] += _histogram(held)
    # One histogram again, of those scans that had the structure.
    of_structure /= np.maximum(of_structure.sum(axis=0), 1)
    of_body /= of_body.sum()
    return (of_structure / (of_structure + of_body[:, None] + RARE / BINS)).astype(np.float32)


def bins_of(stored: Int[np.ndarray, "*voxel"], normalisation) -> UInt8[np.ndarray, "*voxel"]:
    """The bin of each stored voxel; bins share the range of the normalisation evenly."""
    low, high = normalisation.low, normalisation.high
    share = (normalisation.intensity(stored) - low) / (high - low)
    return np.minimum(share * BINS, BINS - 1).astype(np.uint8)


def likelihood_of(
    blocks: ScanBlocks, normalisation, table: Float32[np.ndarray, "bin region"]
) -> Float32[np.ndarray, "p q r region"]:
    """The mean likelihood of the voxels of each block of a scan."""
    bins = bins_of(blocks.voxels, normalisation)
    return np.stack([blocks.mean(of_region[bins]) for of_region in table.T], axis=-1)


def _histogram(bins: UInt8[np.ndarray, " n"]) -> Float[np.ndarray, " bin"]:
    """Smoothed, of sum 1."""
    counts = np.bincount(bins, minlength=BINS) / bins.size
    return ndimage.gaussian_filter1d(counts, SMOOTH_BINS, mode="reflect")
