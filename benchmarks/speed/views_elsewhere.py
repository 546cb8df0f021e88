"""The same view by MONAI, TorchIO and batchgeneratorsv2, each in its fastest form that we found.

In all of them: one linear resampling straight to the view's size from a slice of the volume (a view of the array, not a
copy) around it; blur before colour; as little metadata as the toolkit allows; noise only where it is asked for.
"""

from dataclasses import dataclass

import monai.transforms as mt
import numpy as np
import torch
import torchio as tio
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform as Add
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform as Multiply
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from monai.data import set_track_meta
from monai.networks.layers import AffineTransform
from scipy.spatial.transform import Rotation

from spade3d.crops.crop import Crop, Intensity, mm_to_stored


@dataclass(frozen=True, eq=False)
class View:
    """A drawn crop in the words of the other toolkits. Its volume has cubic voxels."""

    crop: Crop
    region: torch.Tensor  # float32 (1, i, j, k): a slice of the volume with the same centre as the view
    region_to_mm: np.ndarray  # (4, 4)
    to_region: np.ndarray  # (4, 4): voxel of the view -> voxel of the region
    scales: np.ndarray  # along the three axes, negative where flipped
    angles: np.ndarray  # radians about the three axes, R = Rz Ry Rx


def told(crop: Crop, case, volume: torch.Tensor) -> View:
    """`volume` (i, j, k) is the whole scan; the crop's centre lies on a voxel or half-way between two."""
    to_stored = mm_to_stored(case) @ crop.to_mm
    linear, far = to_stored[:3, :3], (np.array(crop.shape) - 1) / 2
    centre = linear @ far + to_stored[:3, 3]
    start = np.ceil(centre - np.abs(linear) @ far - 1).astype(int)
    stop = np.rint(2 * centre).astype(int) - start + 1
    assert (start >= 0).all() and (stop <= volume.shape).all(), "the view leaves the volume"
    region = volume[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))][None]
    shift, scales = np.eye(4), np.linalg.norm(linear, axis=0) * np.sign(np.diag(linear))
    shift[:3, 3] = start
    angles, to_mm = Rotation.from_matrix(linear / scales).as_euler("xyz"), np.linalg.inv(mm_to_stored(case))
    return View(crop, region, to_mm @ shift, np.linalg.inv(shift) @ to_stored, scales, angles)


def monai(view: View) -> torch.Tensor:
    """The affine layer, which is faster than the transforms below."""
    resampled = AffineTransform(view.crop.shape)(view.region[None], torch.from_numpy(view.to_region).float())
    return _monai_coloured(resampled[0], view.crop.intensity)


def monai_transforms(view: View, lazy: bool = False) -> torch.Tensor:
    """`Affine` of a tensor, or as lazy resampling, which lives in the metadata. It turns about the centre."""
    set_track_meta(lazy)
    about_centre = np.eye(4)
    about_centre[:3, :3] = view.to_region[:3, :3]
    affine = mt.Affine(affine=about_centre, spatial_size=view.crop.shape, padding_mode="zeros", image_only=True)
    resampled = mt.Compose([affine], lazy=lazy)(view.region)
    set_track_meta(False)
    return _monai_coloured(torch.as_tensor(resampled).as_subclass(torch.Tensor), view.crop.intensity)


def _monai_coloured(x: torch.Tensor, look: Intensity) -> torch.Tensor:
    steps = [mt.GaussianSmooth(look.blur, approx="sampled")] if look.blur > 0 else []
    steps += [mt.AdjustContrast(look.gamma), mt.ScaleIntensity(minv=None, maxv=None, factor=look.contrast - 1)]
    steps += [mt.ShiftIntensity(look.brightness)]
    steps += [mt.RandGaussianNoise(prob=1, std=look.noise, sample_std=False)] if look.noise > 0 else []
    for step in steps:
        x = step(x)
    return x.clamp_(0, 1)


def torchio(view: View) -> torch.Tensor:
    """Resampled onto the view's own grid by SimpleITK; it has no contrast and brightness, so they are a Lambda."""
    look, subject = view.crop.intensity, tio.Subject(x=tio.ScalarImage(tensor=view.region, affine=view.region_to_mm))
    steps = [tio.Resample((view.crop.shape, view.crop.to_mm), copy=False)]
    if look.blur > 0:
        steps += [tio.Blur(tuple(look.blur * np.linalg.norm(view.crop.to_mm[:3, :3], axis=0)), copy=False)]
    steps += [tio.Gamma(look.gamma, copy=False)]
    steps += [tio.Lambda(lambda x: x.mul_(look.contrast).add_(look.brightness), copy=False)]
    steps += [tio.Noise(0.0, look.noise, look.noise_seed, copy=False)] if look.noise > 0 else []
    for step in steps:
        subject = step(subject)
    return subject.x.data.clamp_(0, 1)


class Batchgenerators:
    """Made once, because it keeps its base grid; what was drawn is given to it as functions without chance."""

    def __init__(self, side: int):
        self.view: View
        spatial = {"p_rotation": 1, "rotation": lambda dim, **_: self.view.angles[dim]}
        spatial |= {"p_scaling": 1, "scaling": lambda dim, **_: self.view.scales[dim]}
        self.spatial = SpatialTransform((side,) * 3, 0, random_crop=False, **spatial)

    def __call__(self, view: View) -> torch.Tensor:
        self.view, look = view, view.crop.intensity
        steps = [self.spatial, *([GaussianBlurTransform(look.blur)] if look.blur > 0 else [])]
        steps += [GammaTransform(look.gamma, 0, False, 1, 0), Multiply(look.contrast, False)]
        steps += [Add(look.brightness, 0.0, synchronize_channels=False)]
        steps += [GaussianNoiseTransform(look.noise)] if look.noise > 0 else []
        return ComposeTransforms(steps)(image=view.region)["image"].clamp_(0, 1)
