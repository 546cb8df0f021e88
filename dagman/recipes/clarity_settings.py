"""Settings of CLARiTy's class tokens, and the head, losses, priors and teacher that are built from them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from dagman.recipes.priors import OF_LABELS, PriorSettings, build_priors
from spade3d.configuration import Count, InputPath, Positive, Settings, Share, Voxels, rule, with_values
from spade3d.faults import DataFault, UsageFault

if TYPE_CHECKING:
    import torch

    from dagman.attention.spatial_prior import Priors
    from dagman.downstream.allowed import Where
    from dagman.downstream.clarity_losses import ClarityWeights
    from dagman.downstream.studies import Findings
    from dagman.downstream.study_streams import Prior, Teacher
    from spade3d.volumes.store import VolumeStore

Weight = Annotated[float, Field(ge=0)]
LEAST_TEACHER = 0.6  # AUROC of a teacher that is worth listening to
FEWEST_VOXELS = 32  # along a side of what a teacher sees: it halves its images five times


class InOrgans(Settings):
    """Where a finding may be: in which organs (a name without a side is both), and how many mm from them."""

    organs: tuple[str, ...]
    """where the finding NAME may be, such as liver,spleen; a name without a side is both."""
    margin_mm: Weight = 0.0
    """how many mm from these organs; 0: in them only."""

    @field_validator("organs", mode="before")
    @classmethod
    def one_word_is_a_list(cls, organs: Any) -> Any:
        """A flag in a table is one word: liver,spleen."""
        return [organ.strip() for organ in organs.split(",") if organ.strip()] if isinstance(organs, str) else organs


class FindingPrior(Settings):
    """Where findings may be; `source` none says nothing.

    source   `bands` of intensity, the `mean_image` of the set, an `atlas` of some labelled training scans, `one_label`
             of them, the `labels` that a scan has of its own, or `files` that somebody else made
    table    finding -> its organs, by the names that the source has; a finding that is not named may be anywhere
    least    left open, 0.9 where the prior is the organ itself (labels, files), 0.25 where it is a guess
    """

    source: Literal["none", "bands", "mean_image", "atlas", "one_label", "labels", "files"] = "none"
    """where organs lie: intensity bands, the set's mean image, labels, or files; none says nothing."""
    table: dict[str, InOrgans] = {}
    """of findings, by name."""
    least: Annotated[float, Field(gt=0, le=1)] | None = None
    """share of the prior in an organ's best cell from which on a cell is of the organ; left out, 0.9 or 0.25."""
    frame: Literal["box", "affine", "learned"] = "affine"
    """how places of two scans compare, for mean_image, atlas and one_label."""
    labelled: Count = 4
    """scans that make the atlas."""
    likelihood: Literal["location", "intensity", "both"] = "location"
    """what an atlas and one label go by: the place, this scan's brightness, or both."""
    sigma_mm: Positive | None = None
    """of the Gaussian over the places of labels, in mm; left out, it follows the size of the scans."""
    folder: InputPath | None = None
    """of source files: FOLDER/<case>/<region>.nii.gz, values 0 to 1 in the space of the scan."""
    wrong: Literal["no", "permuted", "shifted"] = "no"
    """a control: priors of the same make at the wrong place."""

    @rule
    def source_and_table_belong_together(self) -> FindingPrior:
        """Either without the other says nowhere."""
        if (self.source == "none") != (not self.table):
            raise ValueError("a prior needs a source and a table of findings and organs; give both, or neither")
        if (self.source == "files") != (self.folder is not None):
            raise ValueError("folder is where the files of source files are; give both, or neither")
        return self


class TeacherSettings(Settings):
    """The 3D CNN that class tokens learn from, and the `shape` voxels of `mm` around the middle of each body that it
    sees; left open, they hold the largest body in about as many voxels as a cube of 96 (48 on a CPU)."""

    folds: Count = 3
    """teachers, each asked about subjects that it has not seen; 1: one that has seen all."""
    steps: Count | None = None
    """updates of a teacher; left out, 2,000 on a GPU and 200 on a CPU."""
    batch: Count = 4
    """studies of a batch."""
    growth: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """of the DenseNet121, a multiple of 8; left out, 32 on a GPU and 8 on a CPU."""
    lr: Positive = 3e-4
    """learning rate, at its peak."""
    shape: Voxels | None = None
    """voxels that a teacher sees, each side 32 or more; left out, what holds the largest body."""
    mm: Positive | None = None
    """of these voxels; left out, what holds the largest body."""
    temperature: Positive = 1.0
    """of the teacher's opinion; higher is softer."""

    @field_validator("shape")
    @classmethod
    def sides_can_be_halved_five_times(cls, shape: Voxels | None) -> Voxels | None:
        """A DenseNet does."""
        if shape is not None and min(shape) < FEWEST_VOXELS:
            raise ValueError(f"a teacher halves its images five times; each side has {FEWEST_VOXELS} voxels or more")
        return shape


class ClaritySettings(Settings):
    """Class tokens; every piece can be left out."""

    dim: Count = 192
    """channels of a class token; the heads share them evenly."""
    blocks: Count = 2
    """of attention from class tokens to cells."""
    heads: Count = 6
    """attention heads of these blocks."""
    registers: Annotated[int, Field(ge=0)] = 1
    """further tokens that stand for no finding; 0 has none."""
    joint: bool = False
    """cells attend as well, at a cost that grows with the square of their number."""
    attention_pooling: bool = True
    """a second logit, from what each token's attention gathers."""
    segment_cam: bool = True
    """class maps, and with a prior a foreground beyond which tokens look less."""
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """channels of the foreground's convolutions, a multiple of 8."""
    convolved: bool = False
    """read class maps, too, from these convolutions."""
    prior_forcing: bool = True
    """while learning, cells count by the prior itself, not by the foreground learned so far."""
    rank_decay: Share = 0.5
    """of class maps, the r-th highest cell weighs rank_decay^r in the third logit; 0: the highest alone."""
    orthogonal_weight: Weight = 0.1
    """of the term that parts class tokens; 0 leaves it out."""
    orthogonal_by: Literal["cosine", "contrast"] = "cosine"
    """how they are parted: cosine, or MCTformer+'s contrast."""
    foreground_weight: Weight = 1.0
    """of the foreground's likeness to the prior; 0 leaves it out."""
    outside_weight: Weight = 1.0
    """of class maps outside the prior, and anywhere for absent findings; 0 leaves it out."""
    teacher_weight: Weight = 0.0
    """of a 3D CNN's opinion, which is trained first; 0 has none, 0.5 is a neutral start."""
    prior: FindingPrior = FindingPrior()
    teacher: TeacherSettings = TeacherSettings()

    @rule
    def heads_share_the_width(self) -> ClaritySettings:
        """Each head has as many channels."""
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads cannot share {self.dim} channels evenly")
        return self

    def head(self, findings: Sequence[str]) -> dict[str, Any]:
        """What ClassTokens is built with besides channels, findings and the crops of a bag."""
        from dagman.downstream.allowed import groups_of

        pieces = {"dim", "blocks", "heads", "registers", "joint", "attention_pooling", "segment_cam", "width"}
        pieces |= {"convolved", "rank_decay", "prior_forcing"}
        # Where no term teaches the foreground there is none, rather than one that suppresses at random.
        told = self.segment_cam and self.prior.source != "none" and self.foreground_weight > 0
        groups = groups_of(where_of(self.prior, findings)) if told else ()
        return self.model_dump(include=pieces) | {"groups": groups}

    def weights(self) -> ClarityWeights:
        """The weights of the losses."""
        from dagman.downstream.clarity_losses import ClarityWeights

        return ClarityWeights(
            orthogonal=self.orthogonal_weight,
            orthogonal_by=self.orthogonal_by,
            foreground=self.foreground_weight,
            outside=self.outside_weight,
            teacher=self.teacher_weight,
            temperature=self.teacher.temperature,
        )


def where_of(settings: FindingPrior, findings: Sequence[str]) -> list[Where]:
    """The table in the order of the findings; UsageFault for a finding in it that there is not."""
    from dagman.downstream.allowed import Where

    if strangers := sorted(settings.table.keys() - set(findings)):
        raise UsageFault(
            f"clarity.prior.table: {', '.join(strangers)}: no such finding; there are {', '.join(findings)}"
        )
    named = {name: Where(place.organs, place.margin_mm) for name, place in settings.table.items()}
    return [named.get(finding, Where()) for finding in findings]


def check_clarity(settings: ClaritySettings, store: VolumeStore, findings: Findings, taught: Sequence[int]) -> None:
    """Refuse, while nothing is written, a table of findings or organs that there are not, and a teacher of more folds
    than subjects."""
    organs = [organ for place in where_of(settings.prior, findings.names) for organ in place.organs]
    if organs:
        _check_organs(settings.prior, store, organs, taught)
    if settings.teacher_weight > 0:
        from dagman.downstream.cnn_teacher import subjects_in_folds

        subjects_in_folds(findings, taught, settings.teacher.folds)


def finding_prior(
    settings: FindingPrior,
    store: VolumeStore,
    findings: Sequence[str],
    taught: Sequence[int],
    cases: Sequence[int],
    *,
    seed: int = 0,
) -> Prior | None:
    """Where each finding may be, on any grid of cells of any of `cases`; None without a prior.

    taught  the cases that teach: no other's labels are looked at
    The same settings, store, cases and seed give the same prior. UsageFault for an organ that the source does not have.
    """
    if settings.source == "none":
        return None
    from dagman.downstream.allowed import allowed_in

    where = where_of(settings, findings)
    organs = list(dict.fromkeys(organ for place in where for organ in place.organs))
    priors = _priors(settings, store, organs, taught, cases, seed)
    anywhere = [name for name, place in zip(findings, where, strict=True) if not place.organs]
    if anywhere:
        print(f"note: may be anywhere, for the prior does not name them: {', '.join(anywhere)}", file=sys.stderr)
    return allowed_in(priors, where, least=settings.least or (0.9 if settings.source in ("labels", "files") else 0.25))


def _priors(settings: FindingPrior, store, organs: Sequence[str], taught, cases, seed: int) -> Priors:
    chosen = {"source", "labelled", "likelihood", "sigma_mm", "wrong", "folder"}
    asked = PriorSettings(**settings.model_dump(include=chosen))
    of_labels = settings.source in OF_LABELS
    wanted = _structures(store, organs) if of_labels else {}  # refused here, before scans are placed
    frames = _frames(asked, settings, store, cases, seed)
    if of_labels:
        taught, regions = _labelled(settings, store, wanted, taught, frames)
        asked = with_values(asked, {"regions": regions})
    elif settings.source == "files":
        asked = with_values(asked, {"regions": _named(settings.folder, store, organs, cases)})
    says, option = "findings are sought by", "--clarity.prior.source"
    return build_priors(asked, store, taught, frames, says=says, option=option)


def _check_organs(settings: FindingPrior, store, organs: Sequence[str], taught: Sequence[int]) -> None:
    """UsageFault for an organ that a source does not have, DataFault for a source without what it needs, as far as that
    is known before a scan is read."""
    from dagman.attention import prior_sources
    from dagman.attention.prior_files import check_files, check_values
    from dagman.downstream.allowed import matching
    from dagman.recipes.priors import prior_files_in

    if settings.source in OF_LABELS:
        _structures(store, organs)
        if not any(store.cases[i].has_labels for i in taught):
            raise DataFault(
                f"{store.path}: none of the {len(taught)} scans that teach has labels, which --clarity.prior.source "
                f"{settings.source} needs; use bands, mean_image or files, or label one"
            )
    elif settings.source == "files":
        named = _named(settings.folder, store, organs, taught)
        files = prior_files_in(settings.folder, store, taught, named)
        check_files(store, files, None)
        check_values(files)
    else:
        bands = settings.source == "bands"
        regions = tuple(prior_sources.bands_of(store, taught) if bands else prior_sources.brightnesses())
        for organ in organs:
            matching(organ, regions)


def _structures(store, organs: Sequence[str]) -> dict[int, str]:
    """The labels that are some organs, value -> name."""
    from dagman.downstream.allowed import matching

    if not store.label_names:
        raise DataFault(
            f"{store.path}: its labels have no names, so that no organ can be told; give the dataset a label table"
        )
    table = list(store.label_names.items())
    return dict(table[n] for organ in organs for n in matching(organ, [name for _, name in table]))


def _labelled(
    settings: FindingPrior, store, wanted: Mapping[int, str], taught: Sequence[int], frames
) -> tuple[list[int], tuple[str, ...]]:
    """The cases that make the prior, those that can be placed and hold most of the structures, and which they hold."""
    held = {i: wanted.keys() & store.cases[i].label_values if store.cases[i].has_labels else set() for i in taught}
    best = sorted(taught, key=lambda i: (frames.get(i) is None, -len(held[i])))
    most = {"one_label": 1, "labels": len(best)}.get(settings.source, settings.labelled)
    makers = [i for i in best if held[i]][:most]
    there = set().union(*(held[i] for i in makers)) or wanted.keys()
    return makers or list(taught), tuple(name for value, name in wanted.items() if value in there)


def _frames(asked: PriorSettings, settings: FindingPrior, store, cases: Sequence[int], seed: int):
    if not asked.needs_frames:
        return {}
    from spade3d.recipes.placing import placed

    found = placed(store, cases, settings.frame, seed=seed, alone="no place is forbidden in them")
    return {i: None if frame is None else frame.to_frame for i, frame in found.items()}


def _named(folder: str, store, organs: Sequence[str], cases: Sequence[int]) -> tuple[str, ...]:
    """The regions among the files of a folder that are some organs."""
    from dagman.downstream.allowed import matching
    from dagman.recipes.priors import prior_files_in

    there = list(dict.fromkeys(region for of in prior_files_in(folder, store, cases).values() for region in of))
    return tuple(there[n] for n in dict.fromkeys(n for organ in organs for n in matching(organ, there)))


def taught_by_cnn(
    settings: ClaritySettings,
    store: VolumeStore,
    findings: Findings,
    cases: Sequence[int],
    *,
    out: Path,
    device: torch.device,
    seed: int,
    precision: str = "auto",
) -> Teacher | None:
    """The logits of the CNN teachers of some training studies, which are trained first (in OUT, resumed there); None
    where nothing is to be learned from them."""
    if settings.teacher_weight == 0:
        return None
    from dagman.downstream.cnn_teacher import Teaching, teach
    from dagman.downstream.coarse_scans import CoarseScans
    from dagman.downstream.study_streams import Whole
    from spade3d.crops.crop import Views

    told = chosen_teacher(settings.teacher, store, cases, device.type)
    scans = CoarseScans(store, told.mm)
    turned = Views(flip=(False, False, False), rotation_deg=10.0, zoom=(0.9, 1.1))
    still = Views((False, False, False), 0.0, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.0)
    out.mkdir(parents=True, exist_ok=True)
    return teach(
        Whole(scans, told.shape, told.mm, turned),
        Whole(scans, told.shape, told.mm, still),
        findings,
        cases,
        Teaching(**told.model_dump(include=set(Teaching.__dataclass_fields__))),
        out=out,
        device=device,
        seed=seed,
        precision=precision,
        mark=f"{told.shape} voxels of {told.mm} mm; {store.preprocessing.fingerprint()}",
    )


def note_of_teacher(settings: ClaritySettings, findings: Findings, cases: Sequence[int], taught: Teacher | None) -> str:
    """How well the teachers tell the studies that they have not seen; "" where there is none, or each has seen all.

    A teacher at chance passes its errors on: on phantoms one with an AUROC of 0.46 cost 0.15 of the pointing game. The
    answers of all folds are pooled, which puts one that knows nothing a little below 0.5: where fewer of a fold have a
    finding, more of those that taught it do.
    """
    import numpy as np

    from dagman.evaluation.classification import auroc

    if taught is None or settings.teacher.folds == 1:
        return ""
    labels = findings.table(cases).numpy()
    logits = np.array([taught[findings.studies[i].name] for i in cases])
    each = [auroc(labels[:, n], logits[:, n]) for n in range(len(findings.names))]
    told = [value for value in each if not math.isnan(value)]
    if not told:
        return ""
    mean = sum(told) / len(told)
    said = f"the CNN teachers tell findings of studies that they have not seen with an AUROC of {mean:.2f} (mean)"
    if mean >= LEAST_TEACHER:
        return said
    return (
        f"{said}, hardly above chance: what they teach may do harm; give them more --clarity.teacher.steps, or leave "
        "them out with --clarity.teacher_weight 0"
    )


def chosen_teacher(settings: TeacherSettings, store: VolumeStore, cases: Sequence[int], device: str) -> TeacherSettings:
    """What was left open, by data and device."""
    import numpy as np

    from spade3d.crops.crop import body_bounds

    on_cpu = device == "cpu"
    body = np.max([np.diff(body_bounds(store.cases[i]), axis=0)[0] for i in cases], axis=0)
    finest = max(min(store.cases[i].spacing) for i in cases)
    mm = settings.mm or round(max(float(body.prod() ** (1 / 3)) / (48 if on_cpu else 96), finest), 3)
    shape = settings.shape or tuple(max(FEWEST_VOXELS, int(side) * 8) for side in np.ceil(body / mm / 8 - 1e-6))
    growth, steps = settings.growth or (8 if on_cpu else 32), settings.steps or (200 if on_cpu else 2000)
    return with_values(settings, {"mm": mm, "shape": shape, "growth": growth, "steps": steps})
