"""Saliency for the scans of a store, from one of four sources: gaze, a predictor trained on some, labels, an encoder.

Only gaze is where readers looked. The source is kept with every case, and said in the logs.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spade3d import console
from spade3d.faults import DataFault
from spade3d.networks.attention_saliency import STAGE, attention_map
from spade3d.networks.foreign import describe_encoder, read_encoder
from spade3d.networks.saliency_net import load_saliency_model
from spade3d.saliency_predictor import shown
from spade3d.volumes.body_box import boxed
from spade3d.volumes.channels import (
    ATTENTION,
    ATTENTION_OF_LABELS,
    ATTENTION_UNKNOWN,
    GAZE,
    OF_LABELS,
    OF_UNKNOWN,
    PREDICTED,
    PREDICTED_UNKNOWN,
    TAUGHT_BY_LABELS,
    write_saliency,
)
from spade3d.volumes.gaze import Blur, CountedOtherwise, count_in_slices, gaze_map, located
from spade3d.volumes.gaze_files import (
    LONG_S,
    Fixations,
    gaze_files,
    last_too_long,
    match_case,
    never_shorter,
    read_fixations,
)
from spade3d.volumes.label_saliency import label_map, label_values
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import Grid

FINETUNED = ("dagman-segmentation-", "dagman-study-")  # how the formats of fine-tuned models begin: labels taught them
Look = Callable[[np.ndarray, float, torch.device], np.ndarray]  # as `attention_map`, of one encoder


def from_gaze(
    path: Path, fixations: Path, first_slice: int | None, blur: Blur, *, replace_others: bool, strict: bool = False
) -> dict:
    """Write the saliency of every case that somebody looked at; returns what the command prints.

    Files, records and lines that cannot be read, and readers whose gaze cannot be of a case, are left out by name and
    counted; with `strict`, and where nothing is left, the first of them is a DataFault. Slices that are counted
    otherwise always are one.
    """
    store = VolumeStore.open(path)
    known = {case.name: case.source for case in store.cases}
    of_case: dict[str, list[Fixations]] = {}
    strangers: dict[str, int] = {}
    left_out = LeftOut(strict)
    counted_from: dict[str, int] = {}
    for file, one in left_out.readable(fixations, first_slice):
        counted_from[file.suffix.lower()] = one.first
        case = match_case(one.case, known)
        if case is None:
            strangers[one.case] = strangers.get(one.case, 0) + len(one.seconds)
        else:
            of_case.setdefault(case, []).append(one)
    left_out.say_doubts()
    if not of_case and not strangers:
        left_out.refuse()
    if not of_case:
        raise DataFault(
            f"{fixations}: gaze of {_some(sorted(strangers)) or 'no case'}, and none of these is in the store "
            f"({_some(list(known))}); name the cases as the store does"
        )
    if strangers:
        _say(f"gaze of cases that are not in the store is left aside: {_some(sorted(strangers))}")
    chosen = _open_cases(store, [store.index_of(name) for name in sorted(of_case)], replace_others)
    counts = dict.fromkeys(("used", "under_50_ms", "beside_the_image", "outside_the_body"), 0)

    def compute(i: int) -> np.ndarray | None:
        case = store.cases[i]
        fitting = [one for one in of_case[case.name] if left_out.keeps(one, case.source_grid)]
        if not fitting:
            return None
        found = gaze_map(case, store.image(i), fitting, blur=blur)
        values = (found.used, found.short, found.beside, found.outside)
        counts.update({name: counts[name] + value for name, value in zip(counts, values, strict=True)})
        return found.saliency

    result = _write(store, chosen, compute, GAZE)
    left_out.say_counts()
    if chosen and not result["written"]:
        left_out.refuse()
    readers = {one.reader for some in of_case.values() for one in some if one.reader}
    return result | {
        "readers": len(readers),
        "fixations": counts | {"left_out": left_out.fixations, "of_unknown_cases": sum(strangers.values())},
        "first_slice": _counted_from(counted_from, assumed=first_slice is None),
        "unknown_cases": len(strangers),
        "left_out": len(left_out.faults),
    }


DOUBTS = {
    f"half of the fixations last longer than {LONG_S:g} s; are these milliseconds? T and duration_s are in seconds, "
    "CURRENT_FIX_DURATION in ms: divide them by 1000, and write the saliency again with --replace": last_too_long,
    "durations never become shorter; are these times? give how long each fixation lasted, and write the saliency again "
    "with --replace": never_shorter,
}


@dataclass
class LeftOut:
    """Gaze that cannot be used: named as it is met, or with `strict` the end."""

    strict: bool
    faults: list[DataFault] = field(default_factory=list)
    fixations: int = 0
    doubted: dict[str, list[str]] = field(default_factory=dict)  # what may be wrong -> the files of which it may be
    counted: list[tuple[int, int, str]] = field(default_factory=list)  # hinted at, taken, file: of x and y

    def add(self, name: str, fault: DataFault, fixations: int) -> None:
        if self.strict:
            raise fault
        self.faults.append(fault)
        self.fixations += fixations
        print(f"left out {name}: {fault}", file=sys.stderr)

    def readable(self, fixations: Path, first_slice: int | None) -> Iterator[tuple[Path, Fixations]]:
        """The fixations of every file that can be read, and the file."""
        for file in gaze_files(fixations):
            part = partial(self.add, f"a part of {file.name}")
            try:
                found = read_fixations(file, first_slice=first_slice, leave_out=part)
            except DataFault as fault:
                self.add(file.name, fault, 0)
            else:
                for doubt, holds in DOUBTS.items():
                    if found and holds(found):
                        self.doubted.setdefault(doubt, []).append(str(file))
                yield from ((file, one) for one in found)

    def say_doubts(self) -> None:
        """What is used as it is, but may be meant otherwise."""
        for doubt, files in self.doubted.items():
            _say(f"{_some(files)}: {doubt}")

    def keeps(self, one: Fixations, grid: Grid) -> bool:
        """Whether the fixations can be of a scan on this grid; where its slices are counted otherwise, they end all:
        so are those of every file, and where it is not seen it shifts the map."""
        try:
            located(one, grid)
        except CountedOtherwise:
            raise
        except DataFault as fault:
            self.add(f"reader {one.reader} of {one.case}" if one.reader else one.case, fault, len(one.seconds))
            return False
        if (hinted := count_in_slices(one, grid.shape)) is not None:
            self.counted.append((hinted, one.first, one.source))
        return True

    def say_counts(self) -> None:
        """Where x and y look counted from another number, in all recordings that tell."""
        if not self.counted or any(hinted == taken for hinted, taken, _ in self.counted):
            return
        other, taken, _ = self.counted[0]
        reached = "the width or the height" if other == 1 else "0"
        _say(
            f"{_some(sorted({file for _, _, file in self.counted}))}: x or y reaches {reached}, as voxels counted from "
            f"{other} do, and {taken} was taken; if they are, give --first-slice {other}, and write the saliency again "
            "with --replace"
        )

    def refuse(self) -> None:
        """Where nothing is left, what was left out first says why."""
        if self.faults:
            raise self.faults[0]


def _counted_from(first: Mapping[str, int], *, assumed: bool) -> str:
    """The number that the first slice has in the files, by their ending, and who says so."""
    named = ", ".join(f"{number} in {ending}" for ending, number in sorted(first.items()))
    return f"{named} ({'assumed' if assumed else 'as given'})"


def from_labels(path: Path, names: Sequence[str], dilate_mm: float, blur_mm: float, *, replace_others: bool) -> dict:
    """Write the saliency of every labelled case: some structures, or all of them."""
    store = VolumeStore.open(path)
    labelled = [i for i, case in enumerate(store.cases) if case.has_labels]
    if not labelled:
        raise DataFault(f"{path}: none of {len(store)} cases has labels; take another source")
    values = label_values(names, store.label_names)

    def compute(i: int) -> np.ndarray:
        spacing = store.cases[i].spacing
        return label_map(store.labels(i), values, spacing, dilate_mm=dilate_mm, blur_mm=blur_mm)

    result = _write(store, _open_cases(store, labelled, replace_others), compute, "labels")
    return result | {"structures": [store.label_names[value] for value in values]}


def from_attention(path: Path, checkpoint: Path, device: str, *, replace_others: bool) -> dict:
    """Write where a trained encoder looks: by its own [CLS] where it has one. The source says whether labels taught
    it."""
    store, described = VolumeStore.open(path), describe_encoder(checkpoint)
    if prepared := described.get("preprocessing"):  # other toolkits' checkpoints do not say
        _check_preparation(store, checkpoint, prepared)
    source = attention_source(described)
    if source in TEACHING:
        _say(f"{checkpoint}: {TEACHING[source]}; the saliency is named {source}")
    (look, said), place = where_it_looks(checkpoint), torch.device(device)

    def compute(i: int) -> np.ndarray:
        return np.where(_in_body_box(store, i), look(*shown(store, i), place), 0)

    result = _write(store, _open_cases(store, range(len(store)), replace_others), compute, source)
    return result | {"shows": said}


TEACHING = {
    ATTENTION_OF_LABELS: "labels taught this encoder or steered its pretraining, so that whoever learns from where it "
    "looks has used them",
    ATTENTION_UNKNOWN: "the file does not say whether labels taught this encoder, or what steered it, so that nobody "
    "can tell whether whoever learns from where it looks has used some",
}


def attention_source(described: Mapping[str, Any]) -> str:
    """The source of an encoder's attention, by what its file says of its teaching (`describe_encoder`)."""
    steered = described.get("provenance", {}).get("saliency")  # source -> scans; absent where nobody wrote it down
    if described.get("format", "").startswith(FINETUNED) or set(OF_LABELS) & set(steered or ()):
        return ATTENTION_OF_LABELS
    return ATTENTION_UNKNOWN if steered is None or set(OF_UNKNOWN) & set(steered) else ATTENTION


def where_it_looks(checkpoint: Path) -> tuple[Look, str]:
    """What asks an encoder, and what is shown, in words. A run with a [CLS] of its own is asked by the package that
    trained it: entry points of `spade3d.attention`, functions (checkpoint) -> such a pair, or None for a run that is
    not theirs."""
    for point in entry_points(group="spade3d.attention"):
        if (found := point.load()(checkpoint)) is not None:
            return found
    return partial(attention_map, read_encoder(checkpoint)), f"attention that cells receive in stage {STAGE}"


def from_predictor(path: Path, model_path: Path, device: str, *, replace_others: bool) -> dict:
    """Write what a trained predictor says of the cases without saliency."""
    store, model = VolumeStore.open(path), load_saliency_model(model_path)
    _check_preparation(store, model_path, model.preprocessing.to_dict())
    place = torch.device(device)
    chosen = _open_cases(store, range(len(store)), replace_others)
    result = _write(store, chosen, lambda i: model.saliency(*shown(store, i), place), predicted_source(model.taught_by))
    return result | {"taught_by": ", ".join(model.taught_by)}


def predicted_source(taught_by: Collection[str]) -> str:
    """The source of what a predictor says, by the sources of what taught it."""
    if set(OF_LABELS) & set(taught_by):
        return TAUGHT_BY_LABELS
    return PREDICTED_UNKNOWN if set(OF_UNKNOWN) & set(taught_by) else PREDICTED


def _check_preparation(store: VolumeStore, model: Path, theirs: Mapping[str, object]) -> None:
    """DataFault unless the scans of a store are as those that a model was trained on."""
    ours = store.preprocessing.to_dict()
    differing = [f"{name} {ours[name]} here, {theirs[name]} there" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise DataFault(
            f"{model}: was trained on scans that were prepared otherwise than {store.path} ({'; '.join(differing)}); "
            "prepare the store as the model needs it, or train on this one"
        )


def _open_cases(store: VolumeStore, cases: Sequence[int], replace_others: bool) -> list[int]:
    """The cases that are to be written: those that have no saliency yet, all of them with `replace_others`."""
    open_cases = [i for i in cases if replace_others or store.cases[i].saliency is None]
    kept = len(cases) - len(open_cases)
    if kept:
        _say(f"{kept} cases have saliency already and keep it; --replace writes over it")
    return open_cases


def _write(store: VolumeStore, cases: Sequence[int], compute: Callable[[int], np.ndarray | None], source: str) -> dict:
    """Compute and write the maps one by one, but those that `compute` leaves out; what every command prints."""
    written = 0

    def maps() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal written
        with console.progress_of(f"saliency ({source})") as progress:
            for done, i in enumerate(cases, start=1):
                saliency = compute(i)
                if saliency is not None:
                    yield store.cases[i].name, saliency
                    written += 1
                progress(done, len(cases), store.cases[i].name)

    after = write_saliency(store.path, maps(), source, note=_say) if cases else store
    with_saliency = sum(case.saliency is not None for case in after.cases)
    return {"store": str(store.path), "source": source, "written": written, "with_saliency": with_saliency}


def _in_body_box(store: VolumeStore, i: int) -> np.ndarray:
    """bool (i, j, k): which stored voxels of a case lie in the box of the body."""
    case = store.cases[i]
    box, _ = boxed(case.shape, case.affine, case.body_box_mm, 0.0)
    inside = np.zeros(case.shape, dtype=bool)
    inside[box] = True
    return inside


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
