"""The intensity change of a whole batch where it lies: `crop.coloured` crop by crop, as torch operations.

A GPU colours a batch in little time that the processor's kernels then do not spend. Noise is the kernels' own, to the
bit before it is scaled: the same hash of voxel and seed. What is done otherwise:

- The blur and gamma act on x as a share of [low, high]. The kernels blur x itself; as the weights of a blur sum to one
  only nearly, a voxel among others at `low` then has a share of 1e-7, and gamma 0.7 makes 1e-5 of it (0.4: 2e-3; not
  where low is 0). Here what is at `low` stays there.
- Zero has no power; in the kernels it counts as 2^-127.
- The result of contrast, brightness and noise comes from shares: it is off by roundings of `high - low`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spade3d.crops.crop import Intensity


@dataclass(frozen=True, eq=False)
class Looks:
    """How each crop of a batch is coloured: `crop.Intensity` of n crops, and the range of each one's scan."""

    gamma: Float[Tensor, "n"]
    contrast: Float[Tensor, "n"]
    brightness: Float[Tensor, "n"]
    noise: Float[Tensor, "n"]  # standard deviation; 0: none
    seed: Int64[Tensor, "n"]
    low: Float[Tensor, "n"]
    high: Float[Tensor, "n"]
    blurred: Int64[Tensor, "m"]  # the crops that have a blur
    weights: Float[Tensor, "m width"]  # of their blurs, zero beyond each one's own radius; width = 2 x the largest + 1

    @classmethod
    def of(cls, looks: Sequence[Intensity], normalisations: Sequence) -> Looks:
        """One entry a crop, in main memory; of the normalisations `low` and `high` are read."""
        if len(looks) != len(normalisations):
            raise ValueError(
                f"{len(looks)} looks and {len(normalisations)} normalisations; "
                "each crop needs one of both: repeat the normalisation of a scan for each of its crops"
            )
        blurred = [n for n, look in enumerate(looks) if look.blur > 0]
        numbers = {
            name: torch.tensor([getattr(one, name) for one in given], dtype=torch.float32)
            for given, names in ((looks, ("gamma", "contrast", "brightness", "noise")), (normalisations, _RANGE))
            for name in names
        }
        return cls(
            **numbers,
            seed=torch.tensor([look.noise_seed for look in looks], dtype=torch.int64),
            blurred=torch.tensor(blurred, dtype=torch.int64),
            weights=gaussians([looks[n].blur for n in blurred]),
        )

    def to(self, device: torch.device) -> Looks:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Looks:
        """In memory from which a GPU copies while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Looks:
        return Looks(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def __len__(self) -> int:
        """The number of crops."""
        return len(self.seed)


_RANGE = ("low", "high")


@torch.no_grad()
def coloured(clean: Float[Tensor, "n 1 i j k"], looks: Looks) -> Float[Tensor, "n 1 i j k"]:
    """The crops of `clean`, each within its [low, high], as `looks` wants them seen: new, float32 and contiguous.

    The device is asked for no value, so the host never waits for it. Beyond what is given and returned, this takes the
    memory of about two more such batches (on a CPU, where bytes are cast before they add up, of three): the hashes of
    all voxels, and those shifted; or blurred crops, and those padded.
    """
    if len(looks) != len(clean):
        raise ValueError(f"{len(looks)} looks for {len(clean)} crops; give Looks.of one Intensity a crop")
    with torch.autocast(clean.device.type, enabled=False):
        low, high, noise = looks.low[:, None], looks.high[:, None], looks.noise[:, None]
        span, contrast, unit = high - low, looks.contrast[:, None], noise * _UNIT
        voxels = clean.float().flatten(1).contiguous().sub(low).mul_(1 / span)  # as shares of [low, high]
        if len(looks.blurred):
            crops = voxels.view(len(clean), *clean.shape[2:])
            crops.index_copy_(0, looks.blurred, _blur(crops.index_select(0, looks.blurred), looks.weights))
        voxels.clamp_(0, 1).pow_(looks.gamma[:, None])
        base = looks.brightness[:, None] + contrast * low - unit * _MEAN
        voxels.mul_(contrast * span).add_(base).addcmul_(_drawn(looks.seed, voxels.shape[1]), unit)
        return voxels.clamp_(low, high).view(clean.shape)


def gaussians(sigmas: Sequence[float]) -> Float[Tensor, "m width"]:
    """The weights of blurs of `sigmas` voxels: truncated at 3 sigma, each row sums to one, as wide as the widest is."""
    radii = [math.ceil(3 * sigma) for sigma in sigmas]
    steps = np.abs(np.arange(-max(radii, default=0), max(radii, default=0) + 1))
    sigma, radius = np.array(sigmas, dtype=float)[:, None], np.array(radii, dtype=int)[:, None]
    weights = np.exp(-0.5 * (steps / sigma) ** 2) * (steps <= radius)
    return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def _blur(crops: Float[Tensor, "m i j k"], weights: Float[Tensor, "m width"]) -> Float[Tensor, "m i j k"]:
    """Blur crops along each axis, edges repeated; in place.

    A sum of shifted crops, not a convolution: cuDNN's would round to the ten bits of TF32, and torch pads by repeated
    edges only up to a limit. Places beyond the edges are read by index, so that a crop may be smaller than the radius.
    """
    radius = weights.shape[1] // 2
    for axis in (1, 2, 3):
        count = crops.shape[axis]
        places = torch.arange(-radius, count + radius, device=crops.device).clamp_(0, count - 1)
        padded = crops.index_select(axis, places)
        crops.zero_()
        for shift, weight in enumerate(weights.unbind(1)):
            crops.addcmul_(padded.narrow(axis, shift, count), weight[:, None, None, None])
        del padded  # before the next one is made
    return crops


_MEAN, _UNIT = 510.0, 21845**-0.5  # of a sum of four bytes: 4 x 255 / 2, and 1 / sqrt(4 (256^2 - 1) / 12)


def _signed(bits: int) -> int:
    """What 64 bits mean as an int64: torch multiplies no unsigned numbers on a GPU, and the product's bits are those
    of either."""
    return bits - (bits >> 63 << 64)


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _drawn(seed: Int64[Tensor, "n"], count: int) -> Float[Tensor, "n {count}"]:
    """The sum of four random bytes for each voxel of crops of `count` voxels, 0 to 1020: `kernels._sums`.

    One hash of 64 bits serves two voxels. Its bytes lie in memory from the lowest on (as on every GPU), the lower four
    for the first of them.
    """
    pair = torch.arange(1, (count + 1) // 2 + 1, device=seed.device)
    bits = _mix(seed[:, None] + pair.mul_(_STEP))
    several = bits.view(torch.uint8).unflatten(1, (-1, 4)).unbind(2)
    drawn = several[0].float()
    for some in several[1:]:
        drawn.add_(some)
    return drawn[:, :count]


def _mix(bits: Int64[Tensor, "n pair"]) -> Int64[Tensor, "n pair"]:
    """The finaliser of splitmix64, as `kernels._mix`; in place."""
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(_FIRST)
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(_SECOND)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Int64[Tensor, "n pair"], by: int) -> Int64[Tensor, "n pair"]:
    """64 bits moved down, with zeros above; int64 alone would repeat its sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)
