"""What all crops that are learned from can be told: how large they are, and how chance may change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from spade3d.configuration import PositiveRange, Range, Settings, Share, Switches, Voxels

if TYPE_CHECKING:
    from spade3d.crops.crop import Views


class ChangedCrops(Settings):
    """A size, and changes of place and intensity; no flips by default, because a left kidney is not a right one."""

    shape: Voxels | None = None
    """voxels of a crop along i, j, k; left out, what suits the scans and the device."""
    flip: Switches = (False, False, False)
    """whether crops are mirrored by chance along right-left, front-back, foot-head."""
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 15.0
    """largest turn about each axis, in degrees; 0 turns nothing."""
    zoom: PositiveRange = (0.8, 1.25)
    """range of the magnification; 1 1 keeps the size."""
    gamma: PositiveRange = (0.7, 1.5)
    """range of the exponent of intensities; 1 1 keeps them."""
    contrast: PositiveRange = (0.8, 1.2)
    """range of the factor on intensities; 1 1 keeps them."""
    brightness: Annotated[float, Field(ge=0)] = 0.1
    """largest shift of intensities, where the window is 1 long; 0 shifts nothing."""
    blur: Range = (0.0, 1.0)
    """range of the standard deviation of a Gaussian, in voxels."""
    blur_chance: Share = 0.3
    """share of crops that are blurred; 0 blurs none."""
    noise: Annotated[float, Field(ge=0)] = 0.05
    """largest standard deviation of noise, where the window is 1 long; 0 adds none."""

    def views(self) -> Views:
        """What chance may do to a crop, as the crops know it."""
        from spade3d.crops.crop import Views

        return Views(**self.model_dump(include=set(Views.__dataclass_fields__)))


class MildlyChangedCrops(ChangedCrops):
    """Crops that labels teach: what is asked of them lies in their intensities and sizes, too."""

    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 10.0
    zoom: PositiveRange = (0.85, 1.18)
    gamma: PositiveRange = (0.8, 1.25)
    contrast: PositiveRange = (0.9, 1.1)
    brightness: Annotated[float, Field(ge=0)] = 0.05
    blur: Range = (0.0, 0.7)
    blur_chance: Share = 0.1
    noise: Annotated[float, Field(ge=0)] = 0.03
