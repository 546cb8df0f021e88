"""Protocols by name: which subjects teach and which judge, and the preparation that published numbers were made with.

A number compares with another only under one protocol. Each one here fixes what its source fixes (`settings`, dotted
keys of a fine-tuning run), splits by the dataset's own subject numbers, and says of itself what it fixes, where from,
and where this toolkit differs from the source all the same (`differs`). A part of the data is not the protocol: a
subject that is missing is an error that names it.

What no protocol fixes is the optimiser, the augmentation and the length of training: those are what is compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dagman.downstream.named_splits import (
    BTCV,
    BTCV_JUDGES,
    BTCV_TRAIN,
    MMWHS_CT,
    MMWHS_MR,
    amos_ct_split,
    btcv_folds,
    mmwhs_folds,
    msd_split,
    named_split,
    numbers,
)
from spade3d.configuration import NATIVE
from spade3d.faults import DataFault
from spade3d.volumes.split import Split, split_cases

Draw = Callable[[Sequence, int, int], Split]


@dataclass(frozen=True)
class Protocol:
    """One way to measure. `layouts`: of volumes/layouts.py, those that it is for, () for any; `split_rule`, `length`
    (of training, as published) and `differs` are words."""

    name: str
    summary: str
    source: str
    settings: Mapping[str, Any]
    layouts: tuple[str, ...]
    split_rule: str
    draw: Draw
    length: str = "not fixed"
    differs: tuple[str, ...] = ()

    def split(self, cases: Sequence, folds: int, fold: int) -> Split:
        """Indices of the cases that teach and that judge; `cases` have `name`, `subject`, `part` and `has_labels`.

        DataFault where its subjects are not all there with labels, or where the scans are another dataset's; UsageFault
        for a fold that it does not have.
        """
        return self.draw(cases, folds, fold)

    def check_layout(self, layout: str) -> None:
        """DataFault for scans that lie in another layout than the benchmark's."""
        if self.layouts and layout not in self.layouts:
            raise DataFault(
                f"protocol {self.name} is for {' or '.join(self.layouts)} as downloaded, these are {layout}; give that "
                "folder itself, or --protocol holdout"
            )

    def describe(self) -> dict[str, Any]:
        """What it fixes, in words and numbers."""
        fixed = self.settings
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "layouts": list(self.layouts) or "any",
            "orientation": "RAS",
            "spacing": _spacing(fixed),
            "intensity": _intensity(fixed),
            "crop": f"{_by(fixed['crop.shape'])} voxels" if "crop.shape" in fixed else "follows the data",
            "crops_per_step": fixed.get("crop.crops", "as set"),
            "crops_on_structures": fixed.get("crop.foreground", "as set"),
            "split": self.split_rule,
            "overlap": fixed.get("scoring.overlap", "as set"),
            "background": "counted" if fixed.get("scoring.background", False) else "left out",
            "grid": "the input's own" if fixed.get("scoring.grid", "input") == "input" else "the prepared one",
            "published_length": self.length,
            "differs_from_source": list(self.differs),
        }


def deviations(settings: Any, protocol: Protocol) -> list[str]:
    """Where a run leaves its protocol: "crop.shape 48x48x48 instead of 96x96x96". `settings`: a run's, all chosen."""
    left = []
    for key, fixed in protocol.settings.items():
        value = settings
        for part in key.split("."):
            value = getattr(value, part)
        if not _same(value, fixed):
            left.append(f"{key} {_said(key, value)} instead of {_said(key, fixed)}")
    return left


# --- words ---------------------------------------------------------------------------------------------------------


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _spacing(fixed: Mapping[str, Any]) -> str:
    spacing = fixed.get("data.spacing")
    if spacing is None:
        return "median of the set, unless given"
    return "each scan's own" if spacing == NATIVE else " x ".join(f"{mm:g}" for mm in spacing) + " mm"


def _intensity(fixed: Mapping[str, Any]) -> str:
    said = []
    if "data.window_hu" in fixed:
        low, high = fixed["data.window_hu"]
        said.append(f"CT {low:g}..{high:g} HU to 0..1")
    if fixed.get("data.mr") == "zscore":
        said.append("MR z-score of the foreground")
    return "; ".join(said) or "as set"


def _said(key: str, value: Any) -> str:
    if value is None:
        return "left open"
    if key == "data.spacing":
        return value if value == NATIVE else "x".join(f"{mm:g}" for mm in value) + " mm"
    if key == "data.window_hu":
        return f"{value[0]:g}..{value[1]:g}"
    return _by(value) if isinstance(value, tuple) else str(value)


def _same(value: Any, fixed: Any) -> bool:
    if isinstance(value, str) or isinstance(fixed, str) or value is None:
        return value == fixed
    return np.shape(value) == np.shape(fixed) and bool(np.allclose(value, fixed, rtol=0, atol=1e-6))


# --- the protocols -------------------------------------------------------------------------------------------------

ABDOMEN_HU = (-175.0, 250.0)
LSM = "Large-Scale-Medical (the successor of VoCo)"
RC = "MONAI research-contributions, SwinUNETR/BTCV"
CLASS_EVEN = "a crop is centred on each structure equally often (MONAI: on each labelled voxel)"
MIXED_STEP = "the crops of a step are of several scans (there: of one)"
WHOLE_BODY = "no crop to the voxels above 0 after windowing (CropForeground)"

_SCORES: Mapping[str, Any] = {"scoring.grid": "input", "scoring.background": False}
_BTCV_PREPARATION: Mapping[str, Any] = {
    "data.spacing": (1.5, 1.5, 2.0),
    "data.window_hu": ABDOMEN_HU,
    "crop.shape": (96, 96, 96),
    "crop.crops": 4,
    "crop.foreground": 0.5,
    "scoring.overlap": 0.5,
    "scoring.grid": "input",
    "scoring.background": False,
}
_LSM_CT: Mapping[str, Any] = {
    "data.spacing": (1.5, 1.5, 1.5),
    "crop.crops": 4,
    "crop.foreground": 0.9,
    "scoring.overlap": 0.75,
    "scoring.grid": "prepared",
    "scoring.background": False,
}
_MMWHS_CT_PREPARATION = _LSM_CT | {"data.window_hu": (0.0, 1700.0), "crop.shape": (64, 64, 64)}

_MMWHS_FOLDS_DIFFER = ("the published folds and preparation are not known", CLASS_EVEN)

_ALL = (
    Protocol(
        name="holdout",
        summary="any labelled data: one fold of the subjects judges",
        source="this toolkit's own; compares with nothing published",
        settings=_SCORES,
        layouts=(),
        split_rule="the dataset's own labelled validation part, else one of --folds folds drawn by subject name",
        draw=split_cases,
    ),
    Protocol(
        name="few-shot",
        summary="few labelled subjects, drawn several times, the same judges throughout",
        source="this toolkit's own; the published few-shot numbers on BTCV (3, 5, 7, 12, 24 volumes, one seed) are "
        "under btcv-24-6 with --labels",
        settings=_SCORES,
        layouts=(),
        split_rule="as holdout; of those who may teach, --labels subjects drawn by seed, the smaller set inside the "
        "larger",
        draw=split_cases,
    ),
    Protocol(
        name="btcv-24-6",
        summary="BTCV, 13 organs, the split of MONAI, SwinUNETR, UNETR, SMIT and 3DINO",
        source=f"{RC}: main.py, utils/data_utils.py, dataset_0.json; scores as its test.py takes them. Large-Scale-"
        "Medical has the same split at 1.5 x 1.5 x 1.5 mm, overlap 0.75; 3DINO counts the background",
        settings=_BTCV_PREPARATION,
        layouts=("BTCV", "MSD", "JSON list"),
        split_rule="0001-0010 and 0021-0034 teach (24), 0035-0040 judge (6)",
        draw=partial(named_split, "btcv-24-6", BTCV, BTCV_TRAIN, BTCV_JUDGES),
        length="5000 epochs of 24 scans (SwinUNETR), 30,000 steps (the MONAI tutorial)",
        differs=(
            CLASS_EVEN,
            MIXED_STEP,
            WHOLE_BODY,
            "its trainer's own validation counts the background, on the resampled scan; its test.py and this do not",
        ),
    ),
    Protocol(
        name="btcv-5fold",
        summary="BTCV, 13 organs, five folds of 24 and 6 as nnU-Net draws them",
        source="nnU-Net v2, crossval_split.py: KFold(5, shuffle, seed 12345) over sorted names; the folds of "
        "CLIP-Driven (BTCV_folds.json) are others. The preparation is that of btcv-24-6, for nnU-Net plans its own",
        settings=_BTCV_PREPARATION | {"folds": 5},
        layouts=("BTCV", "MSD", "JSON list"),
        split_rule="fold --fold of five over the 30 labelled subjects: 24 teach, 6 judge",
        draw=partial(btcv_folds, "btcv-5fold"),
        length="1000 epochs of 250 steps (nnU-Net)",
        differs=("nnU-Net's plan (spacing, patch, intensities) is not taken over", CLASS_EVEN),
    ),
    Protocol(
        name="amos-ct",
        summary="AMOS22, 15 organs, CT alone, the dataset's own parts",
        source=f"{LSM}, Downstream/monai/Amos: main.py, utils/data_utils.py. nnU-Net merges both parts and CT with MR",
        settings=_LSM_CT | {"data.window_hu": ABDOMEN_HU, "crop.shape": (96, 96, 96)},
        layouts=("AMOS",),
        split_rule="CT (ids up to 500): the training part teaches (200), the validation part judges (100)",
        draw=partial(amos_ct_split, "amos-ct"),
        length="1000 epochs",
        differs=(CLASS_EVEN, MIXED_STEP, WHOLE_BODY),
    ),
    Protocol(
        name="mmwhs-ct-lsm",
        summary="MM-WHS CT, 7 structures, the split of Large-Scale-Medical",
        source=f"{LSM}, Downstream/monai/MM-WHS: main.py, utils/data_utils.py",
        settings=_MMWHS_CT_PREPARATION,
        layouts=("MM-WHS",),
        split_rule="1005-1020 teach (16), 1001-1004 judge (4)",
        draw=partial(named_split, "mmwhs-ct-lsm", MMWHS_CT, numbers((1005, 1020)), numbers((1001, 1004))),
        length="500 epochs",
        differs=(CLASS_EVEN, MIXED_STEP, WHOLE_BODY),
    ),
    Protocol(
        name="mmwhs-mr-lsm",
        summary="MM-WHS MR, 7 structures, the split of Large-Scale-Medical",
        source=f"{LSM}, Downstream/monai/MM-WHS-MRI: main.py, utils/data_utils.py, MM-WHS-MRI.json",
        settings={
            "data.spacing": NATIVE,
            "data.mr": "zscore",
            "crop.shape": (96, 96, 96),
            "crop.crops": 4,
            "crop.foreground": 0.5,
            "scoring.overlap": 0.75,
            "scoring.grid": "input",
            "scoring.background": False,
        },
        layouts=("MM-WHS",),
        split_rule="1001-1015 teach (15), 1016-1020 judge (5)",
        draw=partial(named_split, "mmwhs-mr-lsm", MMWHS_MR, numbers((1001, 1015)), numbers((1016, 1020))),
        length="300 epochs",
        differs=(
            CLASS_EVEN,
            MIXED_STEP,
            "mean and standard deviation are of the voxels above the background peak, and the result is cut at +-5 "
            "(there: of the voxels that are not 0, which alone are changed, and uncut)",
        ),
    ),
    Protocol(
        name="mmwhs-5fold",
        summary="MM-WHS, 7 structures, five folds over the 20 subjects of one modality",
        source="the author of VoCo (VoCo issue 19): 5 folds over the training set; how they were drawn and how the "
        "scans were prepared is not published. Folds here as nnU-Net draws them; CT as mmwhs-ct-lsm, MR z-scored",
        settings=_MMWHS_CT_PREPARATION | {"data.mr": "zscore", "folds": 5},
        layouts=("MM-WHS",),
        split_rule="fold --fold of five over the 20 labelled subjects of CT or of MR: 16 teach, 4 judge",
        draw=partial(mmwhs_folds, "mmwhs-5fold", None),
        differs=_MMWHS_FOLDS_DIFFER,
    ),
    *(
        Protocol(
            name=f"mmwhs-5fold-{kind.lower()}",
            summary=f"mmwhs-5fold of the {kind} scans, whatever else lies beside them",
            source="as mmwhs-5fold",
            settings=_MMWHS_CT_PREPARATION | {"data.mr": "zscore", "folds": 5},
            layouts=("MM-WHS",),
            split_rule=f"fold --fold of five over the 20 labelled subjects of {kind}: 16 teach, 4 judge",
            draw=partial(mmwhs_folds, f"mmwhs-5fold-{kind.lower()}", of),
            differs=_MMWHS_FOLDS_DIFFER,
        )
        for kind, of in (("CT", MMWHS_CT), ("MR", MMWHS_MR))
    ),
    Protocol(
        name="msd",
        summary="a dataset described by dataset.json, its own validation part",
        source="Medical Segmentation Decathlon; its tests have no labels, so five folds over the training part are "
        "what is reported (nnU-Net v2)",
        settings=_SCORES | {"scoring.overlap": 0.5, "folds": 5},
        layouts=("MSD", "nnU-Net v2"),
        split_rule="the dataset's own validation part where it has labels; else fold --fold of five as nnU-Net draws "
        "them",
        draw=msd_split,
        differs=("spacing, window and crop follow the data and this toolkit's defaults, not nnU-Net's plan",),
    ),
)

PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
