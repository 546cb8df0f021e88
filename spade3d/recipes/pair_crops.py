"""Settings of the crops that pretraining learns from, and the stream of batches that is built from them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from spade3d.configuration import PositiveRange, Settings, Share, ShareRange
from spade3d.faults import DataFault
from spade3d.recipes.changed_crops import ChangedCrops
from spade3d.recipes.choosing import HIDDEN_CELL, matched_grid

if TYPE_CHECKING:
    from spade3d.crops.crop import Crop
    from spade3d.crops.focus_rule import Focus
    from spade3d.crops.pairs import PairStream
    from spade3d.crops.selection import Selection
    from spade3d.volumes.store import VolumeStore


FRAMES = "body_frames.json"  # in the folder of a run
BLIND = ("ordinary", "random", "centre")  # views that read no saliency of the store


class CropSettings(ChangedCrops):
    """Two overlapping crops of an anchor scan and their counterparts; sizes in voxels of the prepared scans.

    flip    off: a network that may not know left from right, nor head from feet, cannot tell most places of the body
            apart, and global contrast then unlearns what untrained filters see (docs/log.md, 2026-11-21)
    colour  who makes the intensity changes, to rounding the same: the `loader` that cuts the crops, or the `device`
            that learns from them (on a CPU ten to twenty times as long); `auto`: the device where it is a GPU. Focused
            views are always the loader's
    """

    frame: Literal["box", "affine", "learned"] = "affine"
    """how places of two scans compare: box of the body, affine to an average body, or learned."""
    anchors: Annotated[int, Field(ge=1, le=4096)] = 2
    """scans of a batch that give two overlapping crops."""
    scans: Annotated[int, Field(ge=1, le=64)] = 2
    """scans for each anchor, itself and those that show a counterpart."""
    overlap: ShareRange = (0.2, 0.8)
    """range of the share of a crop's volume that its partner overlaps."""
    alike_iou: Share = 0.5
    """overlap in the body (IoU, 0 to 1) from which on crops of two scans attract."""
    places: Annotated[int, Field(ge=1)] = 64
    """matched places drawn for each crop."""
    hidden: Share = 0.0
    """share of the student's view that is hidden, in cells of about 8 x 8 x 8 voxels; 0 hides nothing."""
    colour: Literal["auto", "loader", "device"] = "auto"
    """who changes intensities: the loader, or the device; auto is the device where it is a GPU."""


class FocusSettings(Settings):
    """Views that spare what matters (FocusContrast); the store needs a saliency, which `spade-saliency` writes.

    views  `ordinary` views, which no other number here changes, or `focused` ones; the others are controls: `random`
           ones that know no saliency, such ones of focus's own zoom (`matched_zoom`), the saliency of another patient
           (`shuffled`), a `centre` blob
    zoom   of views that are not ordinary, instead of crop.zoom
    """

    views: Literal["ordinary", "focused", "random", "matched_zoom", "shuffled", "centre"] = "ordinary"
    """ordinary views, or focused ones that spare what is salient; the others are controls."""
    crop_chance: Share = 1.0
    """share of views that are moved to keep what is salient; 0 moves none."""
    crop_retention: Share = 0.8
    """share of its parent's saliency that a view keeps at least."""
    cutout_chance: Share = 0.5
    """share of views with a box cut out; 0 cuts none."""
    cutout_retention: Share = 0.9
    """share of a view's saliency that a cutout leaves at least."""
    cutout_side: ShareRange = (0.2, 0.5)
    """range of a cutout's sides, as shares of the view's."""
    mask_chance: Share = 0.5
    """share of pairs of which one view is masked; 0 masks none."""
    mask_kept: Share = 0.2
    """share of a view, the most salient one, that a mask shows."""
    mask_floor: Share = 0.1
    """share of the intensity that a mask leaves elsewhere; 0 leaves none."""
    mask_blur: Share = 0.04
    """softness of a mask's edge, a standard deviation in sides of the view."""
    zoom: PositiveRange = (1.0, 2.0)
    """range of the magnification of focused views, instead of --crop.zoom."""
    parent: Annotated[float, Field(ge=1, le=4)] = 1.5
    """sides of the part of the scan that both views come from, in sides of a crop."""
    salient_chance: Share = 0.5
    """share of parents that lie around a salient place; the others lie anywhere in the body."""
    least: Share = 0.05
    """share of a scan's highest saliency below which a voxel counts as not salient."""
    mode: Literal["mass", "area", "per_component"] = "mass"
    """what a view keeps: saliency, salient voxels, or some of every lesion."""


def pair_stream(
    settings,
    store: VolumeStore,
    cases: Sequence[int],
    selection: Selection,
    out: Path | None = None,
    *,
    focus: FocusSettings | None = None,
    one_parent: bool = False,
    one_geometry: bool = False,
    frames: Mapping[int, np.ndarray | None] | None = None,
    prior: Callable[[Crop], np.ndarray] | None = None,
) -> PairStream:
    """The batches of some settings that have crops in pairs; `selection` says which rules of place are in force.

    out           the run's folder, where the body frames are kept, so that a resumed run has the same
    focus         None for ordinary views
    one_parent    with focus, both crops of a pair are views of one parent (else of two that overlap)
    one_geometry  both views of a crop are turned and zoomed alike, so that their cells compare
    frames        of the cases; None: those of the settings (`frames_of`)
    prior         what is known beforehand of a crop
    """
    from spade3d.crops.pairs import PairStream, Sampling
    from spade3d.training import ranks

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
        views=crop.views(),
        selection=selection,
        focus=None if focus is None else focus_of(focus, store, cases),
        one_parent=one_parent,
        one_geometry=one_geometry,
    )
    frames = frames_of(settings, store, cases, out) if frames is None else frames
    share = (ranks.rank(), ranks.world())
    later = crop.colour == "device" or (crop.colour == "auto" and settings.device == "cuda")
    return PairStream(store, cases, frames, sampling, seed=settings.seed, prior=prior, share=share, colour_later=later)


def check_shared(settings) -> None:
    """Whether the processes of a run can share its batches; UsageFault before anything is prepared."""
    from spade3d.training import ranks

    ranks.share(settings.crop.anchors, "--crop.anchors")


def check_saliency(settings: FocusSettings, store: VolumeStore, cases: Sequence[int]) -> None:
    """Whether the views that are asked for find the saliency that they need; before a run begins.

    DataFault where no scan has any, or where only one patient has a salient voxel, whose saliency cannot be another's.
    What the saliency comes from is said, and which scans have no salient voxel: their views are ordinary, those of the
    whole run where no scan has one.
    """
    from spade3d.crops.salient import is_salient

    if settings.views == "ordinary":
        usual = FocusSettings()
        unused = [f"focus.{name}" for name, value in settings if value != getattr(usual, name)]
        if unused:
            print(
                f"note: views are ordinary, so {', '.join(unused)} changes nothing; give --focus.views focused",
                file=sys.stderr,
            )
    if settings.views in BLIND:
        return
    if all(store.cases[i].saliency is None for i in cases):
        raise DataFault(
            f"{store.path}: none of the {len(cases)} scans has a saliency, which --focus.views {settings.views} "
            "needs; write it with spade-saliency, or leave --focus.views out"
        )
    salient = [i for i in cases if is_salient(store, i)]
    if not salient:
        print(
            f"note: the saliency of the {len(cases)} scans is empty; --focus.views {settings.views} falls back to "
            "ordinary views",
            file=sys.stderr,
        )
        return
    sources = Counter(store.cases[i].saliency_source for i in salient)
    named = ", ".join(f"{source} ({count} scans)" for source, count in sorted(sources.items()))
    print(f"note: {settings.views} views; saliency from {named}", file=sys.stderr)
    if settings.views == "shuffled":
        if len({store.cases[i].subject for i in salient}) < 2:
            raise DataFault(
                f"{store.path}: --focus.views shuffled needs the saliency of two patients, and only "
                f"{store.cases[salient[0]].subject} has some; write more with spade-saliency"
            )
    elif len(salient) < len(cases):
        without = [store.cases[i].name for i in sorted({*cases} - {*salient})]
        some = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        print(
            f"note: nothing is salient in {len(without)} of {len(cases)} scans ({some}): their views are ordinary",
            file=sys.stderr,
        )


def steered(settings, store: VolumeStore, cases: Sequence[int]) -> dict[int, str]:
    """Case -> source of the saliency that steers views; of settings that have a `focus`. None where views read no
    saliency, or it is empty."""
    from spade3d.crops.salient import is_salient

    if settings.focus.views in BLIND:
        return {}
    return {i: store.cases[i].saliency_source for i in cases if is_salient(store, i)}


def focus_of(settings: FocusSettings, store: VolumeStore, cases: Sequence[int]) -> Focus | None:
    """The focus of some settings; None for ordinary views, which those of an empty saliency are."""
    from spade3d.crops.focus_rule import Focus
    from spade3d.crops.salient import is_salient

    if settings.views == "ordinary":
        return None
    if settings.views not in BLIND and not any(is_salient(store, i) for i in cases):
        return None
    control = "none" if settings.views == "focused" else settings.views
    return Focus(**settings.model_dump(exclude={"views"}), control=control)


def frames_of(
    settings, store: VolumeStore, cases: Sequence[int], out: Path | None = None
) -> dict[int, np.ndarray | None]:
    """For each case the affine (4, 4) from its RAS+ mm to body-frame mm; None for a scan that could not be placed.

    Found by the first rank (`placing.py`) and kept in the folder of the run. Scans that could not be placed are noted:
    they learn from their own places only.
    """
    from spade3d.training import ranks

    return ranks.once(lambda: _found_frames(settings, store, cases, out))


def _found_frames(settings, store: VolumeStore, cases: Sequence[int], out: Path | None) -> dict[int, np.ndarray | None]:
    from spade3d.recipes.placing import note_lost, placed
    from spade3d.volumes.body_frame import load_frames, save_frames

    alone, method = "they learn from their own places only", settings.crop.frame
    kept = None if out is None else out / FRAMES
    if kept is not None and kept.exists():
        named, kind = load_frames(kept)
        missing = [store.cases[i].name for i in cases if store.cases[i].name not in named]
        if missing or kind != method:
            raise DataFault(
                f"{kept}: holds {kind} frames, of other scans ({len(missing)} of {len(cases)} missing) or of another "
                f"kind than {method}; remove it, and the frames are found again"
            )
        found = {i: named[store.cases[i].name] for i in cases}
        note_lost(store, found, alone)
    else:
        found = placed(store, cases, method, seed=settings.seed, alone=alone)
        if kept is not None:
            save_frames(kept, {store.cases[i].name: frame for i, frame in found.items()}, method)
    return {i: None if frame is None else frame.to_frame for i, frame in found.items()}


def far_share(store: VolumeStore, cases: Sequence[int], crop, spacing, far_mm: float) -> float:
    """The share of pairs of random crops, any two scans, that lie more than `far_mm` apart in the box frame,
    which costs nothing and is exact enough for a share."""
    from spade3d.crops.pairs import PairStream, Sampling
    from spade3d.crops.selection import apart
    from spade3d.volumes.frame_methods import place_scans

    frames = {i: frame.to_frame for i, frame in place_scans(store, cases, "box").items()}
    places = PairStream(store, cases, frames, Sampling(crop, spacing)).places_of_crops(512)
    return float(apart(places, places, far_mm).mean())
