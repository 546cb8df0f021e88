"""A map of a whole scan from a network that sees blocks: overlapping blocks, blended by a Gaussian."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

BATCH = 2  # blocks at once


def over_scan(
    predict: Callable[[Tensor], Tensor],
    intensities: np.ndarray,
    block: tuple[int, int, int],
    device: torch.device,
    *,
    fill: float,
    overlap: float = 0.5,
) -> np.ndarray:
    """What `predict` (crops (b, 1, *block) -> (b, 1, *block), on `device`) gives for a scan (i, j, k), float32.

    fill: what lies around a scan that is smaller than a block.
    """
    from monai.inferers import sliding_window_inference

    scan = torch.from_numpy(np.ascontiguousarray(intensities, dtype=np.float32))[None, None]
    with torch.inference_mode():
        found = sliding_window_inference(
            scan, block, BATCH, predict, overlap, "gaussian", cval=fill, sw_device=device, device=torch.device("cpu")
        )
    return found[0, 0].float().numpy()
