"""What a focused view is: operators, thresholds, and the controls of focus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spade3d.crops.focus_kernels import Mode
from spade3d.faults import UsageFault

Control = Literal["none", "random", "matched_zoom", "shuffled", "centre"]


@dataclass(frozen=True)
class Focus:
    """What a focused view is. Operators and thresholds are the paper's; it prints no probabilities.

    mode     what is counted: "mass" (saliency, as the authors' code), "area" (voxels that are salient at all, as the
             paper's text), "per_component" (of every lesion that the view touches enough, and enough of one at least)
    control  "none": focus. "random": neither parents nor views know saliency. "matched_zoom": parents, and sizes of
             views and cutouts, as focus draws them, but places that know no saliency; neither of the two masks.
             "shuffled": the saliency of another patient. "centre": a blob in the middle of the body
    """

    crop_chance: float = 1.0
    crop_retention: float = 0.8  # share of the parent's saliency that a view keeps at least
    cutout_chance: float = 0.5
    cutout_retention: float = 0.9  # share of the view's saliency that a cutout leaves at least
    cutout_side: tuple[float, float] = (0.2, 0.5)  # shares of the view's sides; authors' code: from 48 of 224 pixels
    mask_chance: float = 0.5  # of a pair, one view of which is masked then
    mask_kept: float = 0.2  # share of the view, the most salient one, that a mask shows
    mask_floor: float = 0.1
    mask_blur: float = 0.04  # standard deviation in sides of the view; the authors' code: 30 of 800 pixels
    zoom: tuple[float, float] = (1.0, 2.0)  # of the parent, drawn as `draw_view` does: uniform in its logarithm
    parent: float = 1.5  # sides of the parent in sides of a crop
    salient_chance: float = 0.5  # of a parent around a salient place; else it lies anywhere in the body
    least: float = 0.05  # of the scan's highest saliency: what is below counts as none
    mode: Mode = "mass"
    control: Control = "none"
    cells: int = 32  # steps along each side of a view in which places and growth are counted

    def __post_init__(self):
        for name in ("crop_retention", "cutout_retention"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageFault(f"focus: {name} {getattr(self, name)}: a share between 0 and 1 is needed")

    @property
    def knows_saliency(self) -> bool:
        """Whether views keep to a saliency, be it a wrong one."""
        return self.control not in ("random", "matched_zoom")
