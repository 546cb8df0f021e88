"""Token grids on disk: the encoder runs once over a scan, and every later step, look and run reads what it said.

FOLDER/<case>-<key>.npy   float16 (c, p, q, r); the key is made of the encoder's weights, the scan's voxels and how
                          the one was shown to the other, so that a file is right wherever it is found
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16

from dagman.downstream.one_scan import one_scan
from dagman.downstream.token_grids import STAGES, Windows, body_crop, cells_of, channels_of, frozen, token_grid
from spade3d.crops.crop import Crop
from spade3d.faults import DataFault
from spade3d.networks.swin import SwinTransformer
from spade3d.volumes.body_frame import Progress
from spade3d.volumes.store import case_key
from spade3d.whole_file import whole_file

VERSION = 1  # of the code that makes tokens: raised when the same encoder and scan come to give others


@dataclass(frozen=True, eq=False)
class TokenCache:
    """The token grids of a store's scans by one encoder, of which its `mark` and `channels` are enough to find them."""

    store: Any
    windows: Windows
    folder: Path
    mark: str
    channels: int

    def tokens(self, case: int) -> Float16[np.ndarray, "c p q r"]:
        """The tokens of a case that was filled in; DataFault for a file that is not what it should be."""
        path = self.path(case)
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataFault(f"{path}: not readable ({error}); remove it, and it is computed again") from error
        expected = (self.channels, *self.cells(case).shape)
        if tokens.dtype != np.float16 or tokens.shape != expected:
            raise DataFault(
                f"{path}: holds {tokens.dtype} {tokens.shape}, float16 {expected} is needed; remove it, and it is "
                "computed again"
            )
        return tokens

    def cells(self, case: int) -> Crop:
        """Where the cells of a case lie."""
        return cells_of(body_crop(case, self.store.cases[case], self.windows.spacing))

    def path(self, case: int) -> Path:
        """The file of a case."""
        stored = self.store.cases[case]
        seen = {
            "version": VERSION,
            "stages": STAGES,
            "encoder": self.mark,
            "voxels": stored.fingerprint,
            "preprocessing": self.store.preprocessing.fingerprint(),
            "affine": np.asarray(stored.affine).tolist(),
            "shape": list(stored.shape),
            "normalisation": asdict(stored.normalisation),
            "body": stored.body_box_mm,
            "windows": asdict(self.windows),
        }
        key = hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{case_key(stored.name)}-{key}.npy"


def filled(
    encoder: SwinTransformer,
    store: Any,
    cases: Sequence[int],
    windows: Windows,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> TokenCache:
    """The cache of some cases, in which what was missing is computed now."""
    cache = TokenCache(store, windows, folder, mark_of(encoder), channels_of(encoder))
    missing = [case for case in cases if not cache.path(case).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    ask = frozen(encoder, device)
    for done, case in enumerate(missing):
        progress(done, len(missing), store.cases[case].name)
        tokens, _ = token_grid(ask, one_scan(store, case), 0, windows, device)
        with whole_file(cache.path(case)) as file:
            np.save(file, tokens.astype(np.float16), allow_pickle=False)
    if missing:
        progress(len(missing), len(missing), store.cases[missing[-1]].name)
    return cache


def mark_of(encoder: SwinTransformer) -> str:
    """A fingerprint of an encoder's weights, by name, and of the settings that no weight shows."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    blocks = [encoder.get_submodule(f"layers{stage}.0.blocks")[0].attn for stage in (1, 2, 3, 4)]
    heads = [block.relative_position_bias_table.shape[1] for block in blocks]
    shown = [[block.window, block.monai_compatible] for block in blocks]
    corners = encoder.get_submodule("layers1.0.downsample").corners
    digest.update(json.dumps([shown, heads, corners]).encode())
    return digest.hexdigest()
