"""Selection against a memory of boxes: who attracts, who repels, who is left alone; ours against MONAI's box utilities.

    python benchmarks/speed/selection.py

Positives overlap by at least half (intersection over union), negatives have centres more than 100 mm apart, ignored is
the rest. Everybody gets float32 boxes. MONAI gets them as it keeps them, a box a row, and in columns, as we do, which
makes it faster; it compares no spaces, ours does. "torch by hand" is the same in plain torch, of columns. Cost against
size: four sizes of memory.
"""

import numpy as np
import torch
from monai.data.box_utils import box_iou, boxes_center_distance
from rounds import machine, tabled, timed, written

from spade3d.crops.selection import Places, alike, apart

SIZES = ((16, 4096), (64, 16384), (64, 65536), (64, 262144))
IOU, FAR_MM = 0.5, 100.0


def boxes(count: int, seed: int) -> Places:
    """Boxes of crops around 144 mm wide, all over a trunk."""
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform(0, (300, 200, 600), (count, 3)), rng.uniform(58, 86, (count, 3))
    return Places(np.concatenate([centre - half, centre + half], axis=1), np.zeros(count, dtype=np.int64))


def ours(queries: Places, keys: Places) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    positive, negative = alike(queries, keys, IOU), apart(queries, keys, FAR_MM)
    return positive, negative, ~(positive | negative)


def monai(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positive, negative = box_iou(queries, keys) >= IOU, boxes_center_distance(queries, keys)[0] > FAR_MM
    return positive, negative, ~(positive | negative)


def by_hand(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (low, high), (keys_low, keys_high) = ((boxes[:, None, :3], boxes[:, None, 3:]) for boxes in (queries, keys))
    shared = (torch.minimum(high, keys_high[:, 0]) - torch.maximum(low, keys_low[:, 0])).clamp_(min=0).prod(dim=-1)
    volume, keys_volume = (high - low).prod(dim=-1), (keys_high - keys_low).prod(dim=-1)[:, 0]
    positive = shared >= IOU * (volume + keys_volume - shared)
    negative = torch.cdist((low + high)[:, 0] / 2, (keys_low + keys_high)[:, 0] / 2) > FAR_MM
    return positive, negative, ~(positive | negative)


def main() -> None:
    of, curve = machine(("spade3d", "monai", "torch", "numpy", "numba")), []
    for n_queries, n_keys in SIZES:
        queries, keys = boxes(n_queries, 0), boxes(n_keys, 1)
        columns = [torch.from_numpy(places.mm) for places in (queries, keys)]
        rows = [tensor.contiguous() for tensor in columns]
        expected = ours(queries, keys)
        for theirs in (monai, by_hand):
            for mask, other in zip(expected, theirs(*columns), strict=True):
                assert (mask != other.numpy()).mean() < 1e-6, f"{theirs.__name__} selects otherwise"  # float32 ties
        contenders = {
            "ours": lambda _, places=(queries, keys): ours(*places),
            "MONAI box utilities": lambda _, rows=rows: monai(*rows),
            "MONAI, of columns": lambda _, columns=columns: monai(*columns),
            "torch by hand": lambda _, columns=columns: by_hand(*columns),
        }
        moved = n_queries * n_keys * 3 + n_keys * 7 * 4  # three masks, and what is known of each key
        table = tabled(f"{n_queries} queries, {n_keys} boxes", timed(contenders), moved, of)
        shares = dict(zip(("positive", "negative", "ignored"), (float(mask.mean()) for mask in expected), strict=True))
        curve.append({"queries": n_queries, "boxes": n_keys, "share": shares, "rows": table})
    written("speed_selection", {"goal": "30 x MONAI's box utilities at 64 x 65,536", "machine": of, "curve": curve})


if __name__ == "__main__":
    main()
