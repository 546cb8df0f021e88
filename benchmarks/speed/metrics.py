"""Dice, HD95 and NSD (2 mm) of 14 structures: ours against MONAI and DeepMind's surface-distance.

    python benchmarks/speed/metrics.py

256 x 256 x 160 voxels of 1.5 x 1.5 x 2 mm, as an abdominal CT is judged. Two predictions: one with clean borders, and a
poor one with 2,000 stray voxels. Stray voxels are what untrained networks say, and what cropping to boxes (MONAI,
surface-distance) fails at: the box becomes the volume. Poor borders are what ours takes longest for: with stray voxels
alone it is twice as fast, the others as slow.

MONAI is given one structure after another: all at once they take fourteen times the memory. Its numbers are ours (to 4
decimals, or 5 digits: its percentile of 96 mm is float32), checked before anything is timed. surface-distance measures
surfaces of another kind (between voxels), so its numbers are others (dagman/evaluation/metrics.py says by how much, and
has them with `surface="elements"`, which is not timed); what is compared is the time for what it is for. Cost against
size: the same in an eighth of the voxels.
"""

import math
from collections.abc import Mapping

import numpy as np
import surface_distance
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from rounds import ROUNDS, machine, tabled, timed, written
from scipy.ndimage import gaussian_filter, zoom

from dagman.evaluation.metrics import case_metrics

SHAPE, SPACING, TOLERANCE_MM = (256, 256, 160), (1.5, 1.5, 2.0), 2.0
SHAPES = ((128, 128, 80), SHAPE)
STRUCTURES, STRAY = range(1, 15), 2000
PREDICTIONS = (
    ("clean borders", 1.0, 0),
    ("poor borders, stray voxels", 6.0, STRAY),
)


def case(shape: tuple[int, int, int], border_voxels: float, stray: int) -> tuple[np.ndarray, np.ndarray]:
    """Lumpy ellipsoids, and a prediction whose borders wander by about so many voxels; `stray` of the whole size."""
    rng = np.random.default_rng(0)
    places = np.meshgrid(*(np.arange(size, dtype=np.float32) for size in shape), indexing="ij", sparse=True)
    lumps, errors = (smooth_noise(rng, shape, cells) for cells in (8, 4))
    truth, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for structure in STRUCTURES:
        middle, axes = rng.uniform(0.2, 0.8, 3) * shape, rng.uniform(0.7, 1.3, 3)
        far = sum(((place - at) * axis) ** 2 for place, at, axis in zip(places, middle, axes, strict=True))
        far = np.sqrt(far) + 3 * lumps
        radius = rng.uniform(8, 45) * shape[0] / SHAPE[0]
        truth[far < radius] = structure
        prediction[far + border_voxels * errors < radius] = structure
    stray = stray * math.prod(shape) // math.prod(SHAPE)
    at = tuple(rng.integers(0, size, stray) for size in shape)
    prediction[at] = rng.integers(1, len(STRUCTURES) + 1, stray)
    return truth, prediction


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], cells: int) -> np.ndarray:
    """Of mean 0 and standard deviation 1, on cells of so many voxels."""
    noise = zoom(rng.normal(size=[size // cells for size in shape]).astype(np.float32), cells, order=1)
    noise = gaussian_filter(noise, 0.4 * cells)
    return noise / noise.std()


def ours(truth: np.ndarray, prediction: np.ndarray) -> list[tuple[float, float, float]]:
    rows = case_metrics(truth, prediction, SPACING, STRUCTURES, TOLERANCE_MM)
    return [(row["dice"], row["hd95_mm"], row["nsd"]) for row in rows]


def monai(truth: np.ndarray, prediction: np.ndarray) -> list[tuple[float, float, float]]:
    scores = []
    for structure in STRUCTURES:
        t, p = (torch.from_numpy(labels == structure)[None, None].float() for labels in (truth, prediction))
        found = (
            compute_dice(p, t),
            compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=SPACING),
            compute_surface_dice(p, t, [TOLERANCE_MM], include_background=True, spacing=SPACING),
        )
        scores.append(tuple(float(score) for score in found))
    return scores


def deepmind(truth: np.ndarray, prediction: np.ndarray) -> list[tuple[float, float, float]]:
    scores = []
    for structure in STRUCTURES:
        t, p = truth == structure, prediction == structure
        distances = surface_distance.compute_surface_distances(t, p, SPACING)
        scores.append(
            (
                surface_distance.compute_dice_coefficient(t, p),
                surface_distance.compute_robust_hausdorff(distances, 95),
                surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM),
            )
        )
    return scores


def measured(shape: tuple[int, int, int], name: str, border: float, stray: int, of: dict) -> dict:
    """One table."""
    pair = case(shape, border, stray)
    found = {}

    def agree(answers: Mapping[str, list]) -> None:
        found.update({who: np.array(scores) for who, scores in answers.items()})
        same = np.allclose(found["ours"], found["MONAI"], rtol=1e-5, atol=1e-4)
        assert np.isfinite(found["ours"]).all() and same, f"MONAI differs: {name}"

    contenders = {
        "ours": lambda _: ours(*pair),
        "MONAI": lambda _: monai(*pair),
        "surface-distance": lambda _: deepmind(*pair),
    }
    timings = timed(contenders, ROUNDS, agree)
    rows = tabled(f"{name}, {' x '.join(map(str, shape))}", timings, 2 * math.prod(shape), of)
    means = dict(zip(("dice", "hd95_mm", "nsd"), found["ours"].mean(axis=0).round(4).tolist(), strict=True))
    apart = float(np.abs(found["ours"] - found["surface-distance"])[:, 1].max().round(3))
    said = {"prediction": name, "shape": shape, "means": means, "surface_distance_hd95_apart_mm": apart}
    return said | {"rows": rows}


def main() -> None:
    of = machine(("spade3d", "monai", "surface-distance", "torch", "numpy", "scipy", "numba"))
    tables = [measured(shape, *named, of) for shape in SHAPES for named in PREDICTIONS]
    goal = "30 x MONAI and 15 x surface-distance"
    setting = {"spacing_mm": SPACING, "structures": len(STRUCTURES), "stray_voxels": STRAY}
    written("speed_metrics", {"goal": goal, "setting": setting, "machine": of, "tables": tables})


if __name__ == "__main__":
    main()
