"""What an encoder sees at places of a scan: crops as it was trained on, and its stages read at exact places.

Every encoder that is judged sees the same crops, cut without any augmentation. Only the encoder is asked, since that is
what a pretraining hands on; a decoder that it was trained with is not part of its result.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spade3d.crops.correspondences import voxels_at
from spade3d.crops.crop import Box, Crop, Triple, body_bounds, box_to_mm, cut, draw_box
from spade3d.crops.pairs import as_images
from spade3d.faults import DataFault
from spade3d.networks.features import read_at

Encoder = Callable[[Tensor], Sequence[Tensor]]  # images (b, 1, i, j, k) -> feature maps (b, c, p, q, r), fine to coarse
Scores = Mapping[str, Mapping[str, Sequence[float]]]  # measure -> subject -> its values


class NothingToAsk(DataFault):
    """The scans, or their labels, are too few for one question; others may still be asked."""


@dataclass(frozen=True)
class Probing:
    """What the probes show to an encoder, the same for all that are compared; chance comes from the seed alone."""

    shape: tuple[int, int, int]  # voxels of a crop: best those of the pretraining
    spacing: Triple  # mm
    stages: tuple[int, ...] = (0, 1, 2, 3, 4)  # read at places: the patch embedding and the four stages
    crops: int = 12  # of each scan, for retrieval
    twins: int = 4  # of each scan and change, for equivariance
    points: int = 128  # matched places of each twin
    step: int = 2  # voxels between the places among which a landmark is looked for
    near: float = 4.0  # voxels; as near is the same place, for equivariance
    seed: int = 0
    device: str = "cpu"

    @property
    def size_mm(self) -> Triple:
        """Of a crop."""
        i, j, k = (n * mm for n, mm in zip(self.shape, self.spacing, strict=True))
        return i, j, k

    @property
    def near_mm(self) -> float:
        """`near` in mm; where voxels are no cubes, of the cube as large as one."""
        return self.near * math.prod(self.spacing) ** (1 / 3)


def plain_crop(case: int, box: Box, shape: tuple[int, int, int]) -> Crop:
    """A box of a scan as it is: not turned, not coloured."""
    return Crop(case, shape, box_to_mm(box, shape))


@torch.inference_mode()
def stages_of(encoder: Encoder, store, crops: Sequence[Crop], device: str) -> list[Float[Tensor, "b _ _ _ _"]]:
    """The feature maps of some crops, float32, all at once."""
    images = as_images([cut(store, crop) for crop in crops])
    return [stage.float() for stage in encoder(images.to(device))]


@torch.inference_mode()
def standardised(encoder: Encoder, store, cases: Sequence[int], how: Probing) -> Encoder:
    """The encoder with each channel of each stage at mean 0 and variance 1 over crops drawn anywhere in the cases.

    A network's features share a large common part, which makes every cosine nearly 1 and lets a few loud channels
    decide; training may move it anywhere at no cost, since whatever reads the features takes it out. So it is taken
    out for every encoder that is compared, an untrained one as well. No label is used.
    """
    crops = []
    for case in cases:
        rng, bounds = np.random.default_rng([how.seed, case, 2]), body_bounds(store.cases[case])
        crops += [plain_crop(case, draw_box(rng, how.size_mm, bounds), how.shape) for _ in range(how.crops)]
    sums: list[Float[Tensor, "3 c"]] = []  # of ones, values and squares over the cells of each stage
    for crop in crops:
        cells = [stage.flatten(2)[0].double() for stage in stages_of(encoder, store, [crop], how.device)]
        here = [torch.stack([torch.ones_like(one), one, one**2]).sum(dim=2) for one in cells]
        sums = here if not sums else [a + b for a, b in zip(sums, here, strict=True)]
    means = [(of[1] / of[0]).float().view(-1, 1, 1, 1) for of in sums]
    # A channel that never changes says nothing; dividing by a floor leaves it at 0.
    variances = [of[2] / of[0] - (of[1] / of[0]) ** 2 for of in sums]
    spreads = [one.clamp(min=1e-12).sqrt().float().view(-1, 1, 1, 1) for one in variances]

    def seen_evenly(images: Tensor) -> list[Tensor]:
        return [(s.float() - m) / d for s, m, d in zip(encoder(images), means, spreads, strict=True)]

    return seen_evenly


def vectors_at(
    stages: Sequence[Float[Tensor, "1 _ _ _ _"]], crop: Crop, places: np.ndarray, which: Sequence[int]
) -> Float[Tensor, "n c"]:
    """Unit vectors of places (n, 3), in mm of the scan, from the stages of one crop.

    The stages are read at the exact place, each is brought to unit length, then they are put one behind the other: a
    cosine of two vectors is the mean of their cosines stage by stage, and a wide stage weighs no more than a narrow.
    """
    points = torch.from_numpy(voxels_at(crop, places)).to(stages[0])
    of_crop = torch.zeros(len(points), dtype=torch.long, device=points.device)
    read = [F.normalize(read_at(stages[stage], points, of_crop, crop.shape), dim=1) for stage in which]
    return torch.cat(read, dim=1) / len(which) ** 0.5


def vectors_over_scan(
    encoder: Encoder, store, case: int, places: np.ndarray, how: Probing
) -> Iterator[tuple[np.ndarray, Float[Tensor, "n c"]]]:
    """The vectors of places (n, 3) anywhere in a scan, in mm, crop by crop: which places, and their vectors.

    Crops overlap by half or more and cover the body's box; each place is read from the crop in whose middle it lies
    most, where the encoder sees what is around it.
    """
    low, high = body_bounds(store.cases[case])
    axes = [tile_centres(*ends) for ends in zip(low, high, how.size_mm, strict=True)]
    tile = np.stack([np.abs(places[:, [axis]] - axes[axis]).argmin(axis=1) for axis in range(3)], axis=1)
    for one in np.unique(tile, axis=0):
        held = np.flatnonzero((tile == one).all(axis=1))
        i, j, k = (float(centres[n]) for centres, n in zip(axes, one, strict=True))
        crop = plain_crop(case, Box((i, j, k), how.size_mm), how.shape)
        yield held, vectors_at(stages_of(encoder, store, [crop], how.device), crop, places[held], how.stages)


def tile_centres(low: float, high: float, size: float) -> np.ndarray:
    """Centres in mm, along one axis, of boxes that cover [low, high], each overlapping the next by half or more."""
    room = high - low - size
    if room <= 0:
        return np.array([(low + high) / 2])
    return np.linspace(low + size / 2, high - size / 2, 1 + math.ceil(room / (size / 2) - 1e-9))


def place_in_body(case, place: np.ndarray) -> np.ndarray:
    """A place (3,) of a scan, in mm, as its place in the box of the body, from 0 to 1 along each axis."""
    low, high = body_bounds(case)
    return (place - low) / (high - low)


def best_of(similarity: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """What each query's nearest key is worth: similarity, worth (query, key) -> (query,).

    Keys that are equally near, to a millionth, share: an encoder that has collapsed gets what chance would, not what
    happens to stand first. Keys that may not be chosen have similarity -inf.
    """
    nearest = similarity >= similarity.max(axis=1, keepdims=True) - 1e-6
    return (worth * nearest).sum(axis=1) / nearest.sum(axis=1)


def grouped(subjects: Sequence[str], values: np.ndarray) -> dict[str, list[float]]:
    """subject -> its values, in order."""
    found: dict[str, list[float]] = {}
    for subject, value in zip(subjects, values.tolist(), strict=True):
        found.setdefault(subject, []).append(value)
    return found
