"""Phantoms named, numbered and valued exactly as BTCV, AMOS22, MM-WHS and MSD are when they are downloaded.

BTCV    RawData/Training/img/img0001.nii.gz + label/label0001.nii.gz: 0001-0010 and 0021-0040 have labels;
        RawData/Testing/img/img0061.nii.gz on have none.
AMOS22  imagesTr, labelsTr, imagesVa, labelsVa, imagesTs and dataset.json; CT ids are at most 500, every third labelled
        one is of the validation part. Values are AMOS's by name: its order is not BTCV's, it has no portal veins, and
        its duodenum, bladder and prostate or uterus have no phantom.
MM-WHS  ct_train/ct_train_1001_image.nii.gz + _label.nii.gz on, ct_test/ct_test_2001_image.nii.gz on; the same for mr.
MSD     imagesTr, labelsTr, imagesTs and dataset.json; values from 1, in the order of the structures' own table.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade3d.faults import UsageFault
from spade3d.volumes.naming import part_of
from spade3d.volumes.organs import AMOS, BTCV, MM_WHS

AMOS_NAMES = {
    0: "background",
    **AMOS,
    4: "gall bladder",
    8: "arota",
    9: "postcava",
    15: "prostate/uterus",
}  # its file's


@dataclass(frozen=True)
class PhantomLayout:
    """How one data set lays out its scans. `most`: how many labelled and other scans it has numbers for; `place`: of
    the n-th labelled, or n-th other, scan from 0; `table`: the value that a phantom's structure gets, 0 if none;
    `about`: what dataset.json says besides its lists, None where there is none."""

    name: str
    kinds: tuple[str, ...]
    most: tuple[int, int]
    place: Callable[[str, int, bool], tuple[str, str]]
    table: Callable[[str], Mapping[int, int]]
    about: Callable[[str], Mapping[str, Any]] | None = None

    def check(self, kind: str, labelled: int, others: int) -> None:
        """UsageFault for a kind that it does not hold, and for more scans than it has numbers for."""
        if kind not in self.kinds:
            raise UsageFault(f"layout {self.name} holds {' or '.join(self.kinds)}, not {kind}; change --kind")
        if labelled > self.most[0] or others > self.most[1]:
            raise UsageFault(
                f"layout {self.name} has numbers for {self.most[0]} labelled and {self.most[1]} other scans, not for "
                f"{labelled} and {others}; ask for fewer"
            )

    def values(self, kind: str, labels: np.ndarray) -> np.ndarray:
        """The phantom's labels (i, j, k) in the values of this data set, uint16."""
        of = np.zeros(1 << 16, np.uint16)
        for ours, theirs in self.table(kind).items():
            of[ours] = theirs
        return of[labels]

    def write_description(self, root: Path, kind: str, cases: Mapping[Path, Path | None]) -> None:
        """dataset.json with the scans, image -> labels, where the data set has one."""
        if self.about is None:
            return
        lists: dict[str, list] = {"training": [], "validation": [], "test": []}
        for image, labels in cases.items():
            named = [f"./{path.relative_to(root).as_posix()}" for path in (image, labels) if path]
            part = lists[part_of(image.parent.name.removeprefix("images"))]
            part.append(dict(zip(("image", "label"), named, strict=True)) if labels else named[0])
        if not lists["validation"]:
            del lists["validation"]  # MSD has none
        content = {**self.about(kind), **{f"num{part.capitalize()}": len(of) for part, of in lists.items()}, **lists}
        (root / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _btcv(_: str, n: int, labelled: bool) -> tuple[str, str]:
    number = n + 61 if not labelled else n + 1 if n < 10 else n + 11
    folder = f"RawData/{'Training' if labelled else 'Testing'}"
    return f"{folder}/img/img{number:04d}.nii.gz", f"{folder}/label/label{number:04d}.nii.gz"


def _amos(_: str, n: int, labelled: bool) -> tuple[str, str]:
    part = "Ts" if not labelled else "Va" if n % 3 == 2 else "Tr"
    file = f"amos_{n + 1 if labelled else n + 301:04d}.nii.gz"
    return f"images{part}/{file}", f"labels{part}/{file}"


def _mmwhs(kind: str, n: int, labelled: bool) -> tuple[str, str]:
    folder = f"{kind[-2:]}_{'train' if labelled else 'test'}"
    stem = f"{folder}/{folder}_{(1001 if labelled else 2001) + n}"
    return f"{stem}_image.nii.gz", f"{stem}_label.nii.gz"


def _msd(kind: str, n: int, labelled: bool) -> tuple[str, str]:
    part, number = ("Tr", n + 1) if labelled else ("Ts", n + 501)
    file = f"{kind.split('-')[0]}_{number:03d}.nii.gz"
    return f"images{part}/{file}", f"labels{part}/{file}"


def _own(kind: str) -> Mapping[int, str]:
    return BTCV if kind == "abdomen-ct" else MM_WHS


def _same_values(kind: str) -> Mapping[int, int]:
    return {value: value for value in _own(kind)}


def _amos_values(kind: str) -> Mapping[int, int]:
    theirs = {name: value for value, name in AMOS.items()}
    return {value: theirs[name] for value, name in _own(kind).items() if name in theirs}


def _msd_values(kind: str) -> Mapping[int, int]:
    return {value: number for number, value in enumerate(_own(kind), start=1)}


def _amos_about(_: str) -> Mapping[str, Any]:
    labels = {str(value): name for value, name in sorted(AMOS_NAMES.items())}
    return {"name": "AMOS", "modality": {"0": "CT"}, "labels": labels}


def _msd_about(kind: str) -> Mapping[str, Any]:
    names = {str(number): _own(kind)[value] for value, number in _msd_values(kind).items()}
    return {
        "name": f"{kind} phantoms",
        "tensorImageSize": "3D",
        "modality": {"0": "MR" if kind == "heart-mr" else "CT"},
        "labels": {"0": "background", **names},
    }


_HEARTS = ("heart-ct", "heart-mr")
LAYOUTS: Mapping[str, PhantomLayout] = {
    layout.name: layout
    for layout in (
        PhantomLayout("btcv", ("abdomen-ct",), (30, 20), _btcv, _same_values),
        PhantomLayout("amos", ("abdomen-ct",), (300, 200), _amos, _amos_values, _amos_about),
        PhantomLayout("mmwhs", _HEARTS, (20, 40), _mmwhs, _same_values),
        PhantomLayout("msd", ("abdomen-ct", *_HEARTS), (500, 499), _msd, _msd_values, _msd_about),
    )
}
