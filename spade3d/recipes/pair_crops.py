"""Settings of the crops that pretraining learns from, and the stream of batches that is built from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from spade3d.configuration import PositiveRange, Range, Settings, Share, ShareRange, Voxels
from spade3d.recipes.choosing import HIDDEN_CELL, matched_grid

if TYPE_CHECKING:
    from spade3d.crops.pairs import PairStream
    from spade3d.volumes.store import VolumeStore


class CropSettings(Settings):
    """Two overlapping crops of an anchor scan and their counterparts; sizes in voxels of the prepared scans.

    hidden  share of the student's view that is hidden from it, in cells of about 8 x 8 x 8 voxels
    """

    shape: Voxels | None = None
    anchors: Annotated[int, Field(ge=1, le=64)] = 2
    scans: Annotated[int, Field(ge=1, le=64)] = 2
    overlap: ShareRange = (0.2, 0.8)
    alike_iou: Share = 0.5
    places: Annotated[int, Field(ge=1)] = 64
    hidden: Share = 0.0
    flip: tuple[bool, bool, bool] = (True, True, True)
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 15.0
    zoom: PositiveRange = (0.8, 1.25)
    gamma: PositiveRange = (0.7, 1.5)
    contrast: PositiveRange = (0.8, 1.2)
    brightness: Annotated[float, Field(ge=0)] = 0.1
    blur: Range = (0.0, 1.0)
    blur_chance: Share = 0.3
    noise: Annotated[float, Field(ge=0)] = 0.05


def pair_stream(settings, store: VolumeStore, cases: Sequence[int], selection) -> PairStream:
    """The batches of some settings that have crops in pairs; `selection` says which rules of place are in force."""
    from spade3d.crops.crop import Views
    from spade3d.crops.pairs import PairStream, Sampling

    crop, spacing = settings.crop, settings.data.spacing
    sampling = Sampling(
        shape=crop.shape,
        spacing=spacing,
        anchors=crop.anchors,
        scans=crop.scans,
        overlap=crop.overlap,
        alike_iou=crop.alike_iou,
        grid=matched_grid(crop.shape, spacing),
        places=crop.places,
        hidden=crop.hidden,
        hidden_grid=matched_grid(crop.shape, spacing, HIDDEN_CELL),
        views=Views(**crop.model_dump(include=set(Views.__dataclass_fields__))),
        selection=selection,
    )
    return PairStream(store, cases, body_frames(store), sampling, seed=settings.seed)


def body_frames(store: VolumeStore) -> list[np.ndarray]:
    """For each case of a store, the affine (4, 4) from its RAS+ mm to body-frame mm."""
    from spade3d.volumes.body_frame import box_frames

    return [frame.to_frame for frame in box_frames([case.body_box_mm for case in store.cases])]


def far_share(store: VolumeStore, cases: Sequence[int], crop, spacing, far_mm: float) -> float:
    """The share of pairs of random crops, any two scans, that lie more than `far_mm` apart in the body frame."""
    from spade3d.crops.pairs import PairStream, Sampling
    from spade3d.crops.selection import apart

    places = PairStream(store, cases, body_frames(store), Sampling(crop, spacing)).places_of_crops(512)
    return float(apart(places, places, far_mm).mean())
