"""Settings of spatial priors (SPAN), and the priors and the guidance that are built from them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from spade3d.configuration import Count, InputPath, Positive, Settings, Share, rule
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.organs import canonical_organ

if TYPE_CHECKING:
    from dagman.attention.spatial_prior import Priors
    from dagman.distillation.guided import Guidance
    from spade3d.crops.crop import Crop
    from spade3d.crops.pairs import PairStream
    from spade3d.volumes.store import VolumeStore

OF_LABELS = ("atlas", "one_label", "labels")
FIRST = 2  # batches in which some head should be guided
Frames = Mapping[int, np.ndarray | None]


class PriorSettings(Settings):
    """Where some heads shall look; `source` none leaves all heads free.

    source      `bands` of intensity, the `mean_image` of the set, an `atlas` of some labelled scans, `one_label`, the
                first labelled scan that has a place in the body, the `labels` that each scan has of its own, or `files`
                that somebody else made
    attachment  the [CLS] row of the `semantic` attention, the `native` attention of the last block of a Swin stage
                where one window holds the crop, or the same `windowed`, where windows are smaller
    """

    source: Literal["none", "bands", "mean_image", "atlas", "one_label", "labels", "files"] = "none"
    """where regions lie: intensity bands, the set's mean image, labels, or files; none guides no head."""
    folder: InputPath | None = None
    """of --prior.source files: FOLDER/<case>/<region>.nii.gz, values 0 to 1 in the space of the scan."""
    attachment: Literal["semantic", "native", "windowed"] = "semantic"
    """which attention is guided: the [CLS] row, or that of a stage, of whole crops or of their windows."""
    stage: Annotated[int, Field(ge=1, le=4)] = 4
    """of native and windowed attention; the [CLS] reads --distill.stage."""
    regions: tuple[str, ...] | None = None
    """a region whose heads are guided; may be given several times; left out, all of the source."""
    labelled: Count = 4
    """scans that make the atlas."""
    likelihood: Literal["location", "intensity", "both"] = "both"
    """what an atlas and one label go by: the place, this scan's brightness, or both."""
    sigma_mm: Positive | None = None
    """of the Gaussian over the places of labels, in mm; left out, it follows the size of the scans."""
    kind: Literal["ce", "inside", "dice"] = "ce"
    """of the loss: cross-entropy, attention inside the region, or Dice."""
    weight: Annotated[float, Field(ge=0)] = 0.1
    """of the loss; 0 guides no head."""
    warmup: Share = 0.1
    """share of the run in which the weight rises from 0."""
    least: Share = 0.002
    """mean of a prior in a crop below which its head is free."""
    wrong: Literal["no", "permuted", "shifted"] = "no"
    """a control: priors of the same make at the wrong place."""

    @rule
    def what_needs_a_source_has_one(self) -> PriorSettings:
        """Names alone say nowhere where to look, and without a prior none is wrong."""
        if self.source == "none" and self.regions:
            raise ValueError("regions are named but source is none; say where their priors come from")
        if self.source == "none" and self.wrong != "no":
            raise ValueError(
                f"wrong {self.wrong} is a control with a prior, and source is none; give a source, or leave wrong out"
            )
        if (self.source == "files") != (self.folder is not None):
            raise ValueError("folder is where the files of source files are; give both, or neither")
        return self

    @property
    def needs_frames(self) -> bool:
        """Whether places of scans must compare."""
        return self.source in ("mean_image", "atlas", "one_label")


def build_priors(
    settings: PriorSettings,
    store: VolumeStore,
    cases: Sequence[int],
    frames: Frames,
    *,
    says: str = "heads are guided by",
    option: str = "--prior.source",
) -> Priors | None:
    """The priors of some settings, from the cases of a run alone: no held-out label is looked at.

    DataFault where no case has the labels that are needed (`option` asked for them). What they were made from is said.
    """
    from dagman.attention import prior_sources
    from dagman.attention.spatial_prior import wrong_atlas

    if settings.source == "none":
        return None
    if settings.source == "bands":
        priors = prior_sources.bands(store, cases)
    elif settings.source == "mean_image":
        priors = prior_sources.mean_image(store, cases, frames)
    elif settings.source == "files":
        files = prior_files_in(settings.folder, store, cases, settings.regions)
        priors = prior_sources.from_files(store, files)
        note_partly_covered(store, files)
    else:
        labelled = labels_taken(settings, store, cases, frames)
        if not labelled:
            raise DataFault(
                f"{store.path}: none of the {len(cases)} scans of this run has labels, which {option} "
                f"{settings.source} needs; use bands or mean_image, or add a labelled scan"
            )
        how = {"regions": settings.regions, "likelihood": settings.likelihood, "sigma_mm": settings.sigma_mm}
        if settings.source == "atlas":
            priors = prior_sources.atlas(store, labelled, frames, **how)
        elif settings.source == "labels":
            priors = prior_sources.own_labels(store, labelled, settings.regions)
        else:
            priors = prior_sources.one_label(store, labelled[0], frames, **how)
    priors = priors if settings.wrong == "no" else wrong_atlas(priors, settings.wrong)
    print(f"note: {says} {priors.source}", file=sys.stderr)
    return priors


def labels_taken(settings: PriorSettings, store: VolumeStore, cases: Sequence[int], frames: Frames) -> list[int]:
    """The cases whose label maps the priors of some settings are made from; none of a source that takes no labels."""
    labelled = [i for i in cases if store.cases[i].has_labels]
    if settings.source == "labels":
        return labelled
    if settings.source == "atlas":
        return labelled[: settings.labelled]
    if settings.source == "one_label":
        return ([i for i in labelled if frames[i] is not None] or labelled)[:1]
    return []


def prior_files_in(
    folder: str, store: VolumeStore, cases: Sequence[int], regions: Sequence[str] | None = None
) -> dict[str, dict[str, Path]]:
    """The files FOLDER/<case>/<region>.nii.gz of those of some cases that have files; of `regions` alone, where they
    are named, by canonical name. All that have files have the same regions: a lost spleen is a file of zeros. DataFault
    where no case has any."""
    asked = None if regions is None else {canonical_organ(region) for region in regions}
    found: dict[str, dict[str, Path]] = {}
    for i in cases:
        name = store.cases[i].name
        there = {
            path.name.removesuffix(".nii.gz").replace("_", " "): path
            for path in sorted((Path(folder) / name).glob("*.nii.gz"))
        }
        if chosen := {r: path for r, path in there.items() if asked is None or canonical_organ(r) in asked}:
            found[name] = chosen
    if not found:
        example = Path(folder) / store.cases[cases[0]].name / f"{(regions or ('liver',))[0].replace(' ', '_')}.nii.gz"
        raise DataFault(
            f"{folder}: no priors of these scans there; FOLDER/<case>/<region>.nii.gz is needed, such as {example}"
        )
    return found


def note_partly_covered(store: VolumeStore, files: Mapping[str, Mapping[str, Path]]) -> None:
    """Say on standard error which scans reach beyond their priors, outside of which no region is."""
    from dagman.attention.prior_files import partly_covered

    if shares := partly_covered(store, files):
        some = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(shares.items())[:3])
        print(
            f"note: prior files cover less than 90 % of the body in {len(shares)} of {len(files)} scans "
            f"({some}{', ...' if len(shares) > 3 else ''}); beyond them no head is guided",
            file=sys.stderr,
        )


def note_inactive(guidance: Guidance | None, batches: PairStream) -> None:
    """Say on standard error where no region takes enough of any crop of the FIRST batches to guide its head."""
    from spade3d.training import ranks

    if guidance is None or not ranks.first():
        return
    most = 0.0
    for step in range(FIRST):
        most = max(most, float(batches.batch(step).priors.mean(dim=(2, 3, 4)).max()))
        if most >= guidance.least:
            return
    print(
        f"note: no head is guided in the first {FIRST} batches: a region takes {most:.2g} of a crop at most, and "
        f"prior.least asks for {guidance.least:g}; give a lower --prior.least, or see where the priors lie",
        file=sys.stderr,
    )


def build_guidance(
    settings: PriorSettings, priors: Priors, heads: int, stage: int
) -> tuple[Guidance, Callable[[Crop], np.ndarray]]:
    """How `heads` heads of a stage follow the priors, and the prior of a crop, a row for each guided head."""
    from dagman.attention.guidance import GuidedHeads
    from dagman.distillation.guided import Guidance

    # By the priors' own names, in the order that was asked for.
    named = {canonical_organ(region): region for region in priors.regions}
    asked = [named.get(canonical_organ(region), region) for region in settings.regions or priors.regions]
    table = GuidedHeads(heads, tuple(asked))
    rows = table.rows(priors.regions)
    how = settings.model_dump(include={"attachment", "kind", "weight", "warmup", "least"})
    guidance = Guidance(table, stage=stage, **how)
    return guidance, partial(_rows_of_crop, priors, guidance.cell, rows)


def _rows_of_crop(priors: Priors, cell: int, rows: Sequence[int], crop: Crop) -> np.ndarray:
    """No closure, because processes that make batches are sent it."""
    return priors.of_crop(crop, cell)[rows]


def check_regions(settings: PriorSettings, heads: int, store: VolumeStore, cases: Sequence[int]) -> None:
    """UsageFault where more than half of the heads would be guided, as far as that is known before a run."""
    named = settings.regions
    if settings.source in OF_LABELS and named is None:
        values = {value for i in cases for value in store.cases[i].label_values}
        named = tuple(store.label_names.get(value, f"label {value}") for value in sorted(values))
    if settings.source != "none" and named and 2 * len(named) > heads:
        raise UsageFault(
            f"{len(named)} regions ({', '.join(named)}) would guide more than half of {heads} heads; name fewer with "
            "--prior.regions, or give more --distill.semantic_heads (native attention: --network.heads)"
        )


def check_attachment(settings: PriorSettings, semantic: bool, drop_hidden: bool, compiled: bool) -> None:
    """UsageFault where the attention that is to be guided is not there."""
    if settings.source == "none":
        return
    if settings.attachment == "semantic" and not semantic:
        raise UsageFault(
            "--prior.attachment semantic guides the [CLS] row, and there is none (--distill.no-semantic, "
            "or the variant); give native or windowed, or a variant with semantic attention"
        )
    if settings.attachment != "semantic" and drop_hidden:
        raise UsageFault(
            f"--prior.attachment {settings.attachment} guides the cells of a stage, and --distill.drop_hidden leaves "
            "the hidden ones out; give semantic, or do without drop_hidden"
        )
    if settings.attachment != "semantic" and compiled:
        raise UsageFault(
            f"--prior.attachment {settings.attachment} reads the attention of a stage while the encoder runs, and a "
            "compiled one is not read; give semantic, or do without --compile"
        )
