"""Where spatial priors come from: data statistics, an atlas, one labelled scan, a scan's own labels, or files.

SPAN (Miao et al. 2022, arXiv 2209.03745, abstract) takes its priors from "data statistics" or "one labelled sample" and
does not say how; all of this is our reading. The kinds differ in what they know:

    source      labelled scans   knows this scan's image   needs body frames
    bands       none             yes                       no
    mean_image  none             no                        yes
    atlas       a few            with `likelihood`         yes
    one_label   one              by default                yes (not for `intensity` alone)
    labels      each its own     is its truth              no
    files       whoever made them says

A prior that does not read the image is a map of the body: attention that only copies it has learnt nothing.

`frames` is what `recipes.pair_crops.frames_of` gives: for each case the affine (4, 4) from its RAS+ mm to body-frame
mm, or None for a scan that could not be placed, of which nothing is known: its heads are free. A prior that reads the
image reads a scan whole when it is first asked for (0.1 to 1 s), and keeps those used last (`kept_mb`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dagman.attention import prior_kernels
from dagman.attention.frame_grid import FrameGrid, Frames, grid_over, labels_on, mean_image_on
from dagman.attention.intensity_bands import CT_HU, MR_PERCENTILES, Band, band_masks, check_bands, clusters
from dagman.attention.intensity_likelihood import likelihood_of, likelihoods
from dagman.attention.prior_files import check_files, volume_of_files
from dagman.attention.scan_blocks import ScanBlocks, body_mask, resolution_of, scan_blocks
from dagman.attention.spatial_prior import STEPS, Kept, Priors, PriorVolume, in_steps, mirror_by_name
from spade3d.crops.crop import scan_to_world
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.geometry import inverse
from spade3d.volumes.organs import canonical_organ
from spade3d.volumes.preprocessing import foreground_of

LIKELIHOODS = ("location", "intensity", "both")
SCAN_MM, FRAME_MM = 4.0, 6.0  # of blocks of a scan, of cells of the frame: two patients differ by more
ONE_LABEL_CELLS = 10 / 6  # how far another patient's organs lie from one patient's, in cells of the frame: 10 mm
KEPT_MB = 512
BRIGHTNESSES = 4  # of the mean image
LEAST_SEEN = 0.25  # of the scans that make a prior: what fewer show is not known


def bands(
    store,
    cases: Sequence[int],
    bands: Mapping[str, Band] | None = None,
    *,
    resolution_mm: float = SCAN_MM,
    kept_mb: float = KEPT_MB,
) -> Priors:
    """Intensity bands inside the body of each scan, their largest components (`intensity_bands.py`).

    bands  name -> Band, in HU for CT, else in percentiles of the body; those of the modality for None

    HU are those that the store holds, whatever window the network is shown: lung is told from air although both are
    black to the network. UsageFault for cases of CT and of others together, and for a band that is empty by its ends.
    """
    kind = _kind(store, cases)
    chosen = dict(bands if bands is not None else bands_of(store, cases))
    check_bands(chosen, kind)
    unit = "HU" if kind == "CT" else "percentiles"
    told = ", ".join(f"{name} {band.low:g}..{band.high:g}" for name, band in chosen.items())
    make = partial(_band_volume, store, tuple(chosen.values()), resolution_of(store, cases, resolution_mm))
    return _priors(store, chosen, f"intensity bands ({told} {unit})", Kept(make, int(kept_mb * 2**20)))


def bands_of(store, cases: Sequence[int]) -> Mapping[str, Band]:
    """The bands of the modality of some cases; UsageFault where they are of CT and of others together."""
    return CT_HU if _kind(store, cases) == "CT" else MR_PERCENTILES


def _kind(store, cases: Sequence[int]) -> str:
    kinds = _kinds(store, cases)
    if len(kinds) != 1:
        raise UsageFault(
            f"{len(cases)} scans of {' and '.join(kinds) or 'no modality'}; brightness in HU and in percentiles does "
            "not mix: give scans of one modality"
        )
    return kinds[0]


def _kinds(store, cases: Iterable[int]) -> list[str]:
    return sorted({_kind_of(store.cases[i]) for i in cases})


def _kind_of(case) -> str:
    """CT has a scale of its own; all else is told by percentiles."""
    return "CT" if case.modality == "CT" else "MR"


def brightnesses(regions: int = BRIGHTNESSES) -> tuple[str, ...]:
    """What the bands of the mean image are called, the darkest first."""
    return tuple(f"brightness {n + 1} of {regions}" for n in range(regions))


def mean_image(
    store,
    cases: Sequence[int],
    frames: Frames,
    *,
    regions: int = BRIGHTNESSES,
    by: str = "kmeans",
    resolution_mm: float = FRAME_MM,
) -> Priors:
    """The mean image of scans without labels in the body frame, its body split into bands of its own brightness.

    DataFault where none of the scans has a frame, UsageFault for cases of CT and of others together. Brightness is a
    share of what the network is shown of each scan.
    """
    _kind(store, cases)
    if by not in ("kmeans", "quantiles"):
        raise UsageFault(f"bands of the mean image by {by!r}: there is no such split; choose kmeans or quantiles")
    if regions < 1:
        raise UsageFault(f"{regions} bands of the mean image; at least one is needed")
    placed = _placed(store, cases, frames)
    grid = grid_over(store, placed, frames, resolution_of(store, placed, resolution_mm))
    mean, count = mean_image_on(grid, store, placed, frames)
    shown = mean[count > 0]
    if not shown.size:
        raise DataFault(f"{len(placed)} scans cover no whole cell of {grid.mm:g} mm; choose a finer resolution_mm")
    body = body_mask(mean, grid.to_frame, float(foreground_of(shown).min()))
    body &= count >= max(1, LEAST_SEEN * len(placed))
    values = np.zeros((*grid.shape, regions), dtype=np.uint8)
    if body.any():
        values[body, clusters(mean[body], regions, by)] = STEPS
    volume = partial(_in_frame, store, frames, values, inverse(grid.to_frame))
    return _priors(store, brightnesses(regions), f"mean image of {len(placed)} scans, {regions} bands by {by}", volume)


def atlas(
    store,
    labelled: Sequence[int],
    frames: Frames,
    *,
    regions: Sequence[str] | None = None,
    likelihood: str = "location",
    sigma_mm: float | None = None,
    resolution_mm: float = FRAME_MM,
    kept_mb: float = KEPT_MB,
) -> Priors:
    """How often a structure lies at a place of the body, over a few labelled scans laid into the body frame.

    regions     names from the store's label table, all that the scans hold for None
    likelihood  "location"   the frequency, of the scans that show a place, under a Gaussian of `sigma_mm` (one cell)
                "intensity"  what this scan's brightness says (`intensity_likelihood.py`); needs no frame
                "both"       their product

    What brightness says is learnt of each modality from its own labelled scans. In a modality where none of them holds
    a structure, location alone counts, and with "intensity" its head is free; `source` says so.

    UsageFault for a region that the label table does not know; DataFault for a scan without labels, a region that none
    of them holds, and where a location is asked for and no labelled scan has a frame.
    """
    names = ", ".join(store.cases[i].name for i in labelled)
    source = f"atlas of {len(labelled)} labelled scans, {names} ({likelihood})"
    return _of_labels(
        store, labelled, frames, regions, likelihood, sigma_mm, resolution_mm, int(kept_mb * 2**20), source
    )


def one_label(
    store,
    case: int,
    frames: Frames,
    *,
    regions: Sequence[str] | None = None,
    likelihood: str = "both",
    sigma_mm: float | None = None,
    resolution_mm: float = FRAME_MM,
    kept_mb: float = KEPT_MB,
) -> Priors:
    """The structures of ONE labelled scan: `atlas` of it alone, under a Gaussian that allows for another patient's
    anatomy, times the likelihood of this scan's brightness.

    sigma_mm  of that Gaussian; for None 10 mm, less where the whole scan is small (1.5 mm around a hippocampus)
    """
    if sigma_mm is None:
        sigma_mm = ONE_LABEL_CELLS * resolution_of(store, [case], FRAME_MM)
    source = f"one labelled scan, {store.cases[case].name} ({likelihood}, sigma {sigma_mm:.1f} mm)"
    return _of_labels(store, [case], frames, regions, likelihood, sigma_mm, resolution_mm, int(kept_mb * 2**20), source)


def own_labels(
    store,
    labelled: Sequence[int],
    regions: Sequence[str] | None = None,
    *,
    resolution_mm: float = SCAN_MM,
    kept_mb: float = KEPT_MB,
) -> Priors:
    """The labels that a scan has of its own, drawn by a reader or by another network; of other scans nothing is known.

    DataFault for a case without labels, or where no scan holds a region; UsageFault for one that the table lacks.
    """
    names, values = _structures(store, labelled, regions)
    make = partial(_label_volume, store, frozenset(labelled), values, resolution_of(store, labelled, resolution_mm))
    return _priors(store, names, f"the labels of {len(labelled)} scans", Kept(make, int(kept_mb * 2**20)))


def from_files(
    store,
    files: Mapping[str, Path] | Mapping[str, Mapping[str, Path]],
    frames: Frames | None = None,
    *,
    resolution_mm: float = SCAN_MM,
    kept_mb: float = KEPT_MB,
) -> Priors:
    """Priors that somebody else made: volumes of values 0..1 in any format that scans have, of any orientation.

    files   region -> file in the body frame (`frames` is needed), or
            case name -> (region -> file) in the patient space of that scan; of other scans nothing is known

    The files of one place lie on one grid. DataFault for one that does not, that covers less than half of the body in
    its scan, or that holds other values; UsageFault for scans with different regions, or a scan that the store does not
    hold.
    """
    regions = check_files(store, files, frames)
    if frames is not None:
        values, affine = volume_of_files({region: files[region] for region in regions}, resolution_mm)
        volume = partial(_in_frame, store, frames, values, inverse(affine))
        return _priors(store, regions, "files in the body frame", volume)
    make = partial(_file_volume, store, dict(files), regions, resolution_mm)
    return _priors(store, regions, f"files of {len(files)} scans", Kept(make, int(kept_mb * 2**20)))


def _priors(store, regions, source: str, volume) -> Priors:
    return Priors(tuple(regions), mirror_by_name(tuple(regions)), source, store, volume)


def _band_volume(store, bands: tuple[Band, ...], resolution_mm: float, case: int) -> PriorVolume:
    blocks = scan_blocks(store, case, resolution_mm)
    masks = band_masks(blocks, store.cases[case].modality, bands)
    return PriorVolume(in_steps(np.stack([blocks.mean(mask) for mask in masks], axis=-1)), blocks.from_scan)


def _label_volume(
    store, labelled: frozenset[int], values: Sequence[int], resolution_mm: float, case: int
) -> PriorVolume | None:
    if case not in labelled:
        return None
    blocks = scan_blocks(store, case, resolution_mm)
    labels = store.labels(case)[blocks.stored]
    return PriorVolume(in_steps(np.stack([blocks.mean(labels == v) for v in values], axis=-1)), blocks.from_scan)


def _of_labels(
    store,
    labelled: Sequence[int],
    frames: Frames,
    regions: Sequence[str] | None,
    likelihood: str,
    sigma_mm: float | None,
    resolution_mm: float,
    kept_bytes: int,
    source: str,
) -> Priors:
    if likelihood not in LIKELIHOODS:
        raise UsageFault(f"likelihood {likelihood!r}: there is none such; choose one of {', '.join(LIKELIHOODS)}")
    names, values = _structures(store, labelled, regions)
    scan_mm = min(SCAN_MM, resolution_of(store, labelled, resolution_mm))
    located = None
    if likelihood != "intensity":
        placed = _placed(store, labelled, frames)
        grid = grid_over(store, placed, frames, resolution_of(store, placed, resolution_mm))
        frequency = _frequency(grid, store, placed, frames, values, grid.mm if sigma_mm is None else sigma_mm)
        located = partial(_in_frame, store, frames, in_steps(frequency), inverse(grid.to_frame))
        if likelihood == "location":
            return _priors(store, names, source, located)
    of_kind = {kind: [i for i in labelled if _kind_of(store.cases[i]) == kind] for kind in _kinds(store, labelled)}
    tables = {kind: likelihoods(store, some, values, scan_mm) for kind, some in of_kind.items()}
    unread = _unread(tables, names, _kinds(store, frames or labelled))
    if unread:
        source += f"; {'by location alone' if located else 'not known'}: {', '.join(unread)} (no such scan is labelled)"
    make = partial(_likely_volume, store, tables, located, scan_mm)
    return _priors(store, names, source, Kept(make, kept_bytes))


def _unread(tables: Mapping[str, np.ndarray], names: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The structures whose brightness no labelled scan of a modality shows: "spleen in MR"."""
    found = []
    for kind in kinds:
        lacking = [name for n, name in enumerate(names) if kind not in tables or not tables[kind][:, n].any()]
        if lacking:
            found.append(f"{'everything' if lacking == list(names) else ' and '.join(lacking)} in {kind}")
    return found


def _structures(store, labelled: Sequence[int], regions: Sequence[str] | None) -> tuple[list[str], list[int]]:
    """Names and values of the structures asked for, or of all that the labelled scans hold."""
    for i in labelled:
        if not store.cases[i].has_labels:
            raise DataFault(f"{store.cases[i].name}: has no labels to make a prior from; name labelled scans")
    present = sorted({value for i in labelled for value in store.cases[i].label_values})
    table = {int(value): name for value, name in store.label_names.items()} or {v: f"label {v}" for v in present}
    value_of = {canonical_organ(name): value for value, name in table.items()}
    if regions is None:
        values = [value for value in present if value in table]
    else:
        unknown = [name for name in regions if canonical_organ(name) not in value_of]
        if unknown:
            raise UsageFault(
                f"a prior for {', '.join(unknown)}: not in the label table, which holds {', '.join(table.values())}"
            )
        values = list(dict.fromkeys(value_of[canonical_organ(name)] for name in regions))
    missing = [table[value] for value in values if value not in present]
    if missing or not values:
        raise DataFault(
            f"none of the labelled scans ({_some(store, labelled)}) holds {', '.join(missing) or 'any structure'}; "
            "name scans that do, or leave it out"
        )
    return [table[value] for value in values], values


def _placed(store, cases: Sequence[int], frames: Frames) -> list[int]:
    """Those of the cases that have a frame; DataFault if none has."""
    placed = [i for i in cases if _frame(store, frames, i) is not None]
    if not placed:
        raise DataFault(
            f"none of the scans that the prior is made from ({_some(store, cases)}) could be placed in the body; "
            "choose other scans, another body frame, or a prior that needs none (bands)"
        )
    return placed


def _frame(store, frames: Frames, case: int) -> np.ndarray | None:
    if case not in frames:
        raise UsageFault(f"{store.cases[case].name}: no body frame was looked for; place it together with the others")
    return frames[case]


def _frequency(
    grid: FrameGrid, store, cases: Sequence[int], frames: Frames, values: Sequence[int], sigma_mm: float
) -> Float[np.ndarray, "i j k region"]:
    """The mean share that structures take of a cell, over the scans that show it, both under one Gaussian; 0 where
    hardly any scan looks."""
    held = np.zeros((*grid.shape, len(values)), dtype=np.float32)
    seen = np.zeros(grid.shape, dtype=np.float32)
    for i in cases:
        shares, shown = labels_on(grid, store, i, frames[i], values)
        held += shares
        seen += shown
    held, seen = grid.blurred(held, sigma_mm), grid.blurred(seen, sigma_mm)
    known = seen >= LEAST_SEEN * len(cases)
    return np.where(known[..., None], held / np.maximum(seen, LEAST_SEEN)[..., None], 0.0)


def _in_frame(
    store, frames: Frames, values: UInt8[np.ndarray, "i j k region"], to_grid: np.ndarray, case: int
) -> PriorVolume | None:
    """One volume in the body frame, as a scan sees it."""
    frame = _frame(store, frames, case)
    return None if frame is None else PriorVolume(values, to_grid @ frame @ scan_to_world(store.cases[case]))


def _likely_volume(
    store, tables: Mapping[str, Float32[np.ndarray, "bin region"]], located, resolution_mm: float, case: int
) -> PriorVolume | None:
    """The likelihood of a scan's own brightness in its modality, times the location where there is one."""
    location = None if located is None else located(case)
    if located is not None and location is None:
        return None
    table = tables.get(_kind_of(store.cases[case]))
    if table is None:
        return location
    blocks = scan_blocks(store, case, resolution_mm)
    likely = likelihood_of(blocks, store.cases[case].normalisation, table)
    if location is not None:
        likely[..., ~table.any(axis=0)] = 1.0  # structures of which location alone is known
        likely *= _at_blocks(location, blocks, likely.shape)
    return PriorVolume(in_steps(likely), blocks.from_scan)


def _at_blocks(location: PriorVolume, blocks: ScanBlocks, shape: tuple) -> Float32[np.ndarray, "i j k region"]:
    """A volume's values at the centres of a scan's blocks."""
    out = np.empty(shape, dtype=np.float32)
    centres = [np.arange(side, dtype=np.float64)[:, None] for side in shape[:3]]
    prior_kernels.pool(location.values, location.from_scan @ inverse(blocks.from_scan), *centres, out)
    return out / STEPS


def _file_volume(
    store, files: Mapping[str, Mapping[str, Path]], regions: Sequence[str], resolution_mm: float, case: int
) -> PriorVolume | None:
    of_scan = files.get(store.cases[case].name)
    if of_scan is None:
        return None
    values, affine = volume_of_files({region: of_scan[region] for region in regions}, resolution_mm)
    return PriorVolume(values, inverse(affine) @ scan_to_world(store.cases[case]))


def _some(store, cases: Sequence[int]) -> str:
    names = [store.cases[i].name for i in cases]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
