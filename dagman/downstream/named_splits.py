"""Who teaches and who judges in a protocol: by the dataset's own subject numbers, or by nnU-Net's folds over them.

Nobody is missing: a subject of the protocol without a labelled scan is a DataFault that names it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.split import Split, split_cases

NNUNET_SEED = 12345
AMOS_CT = {"training": 200, "validation": 100}  # labelled CT scans in AMOS22 as published


@dataclass(frozen=True)
class Numbered:
    """How a dataset numbers its subjects: `pattern` finds the number at the end of a case's name."""

    dataset: str
    pattern: str

    def find(self, cases: Sequence, protocol: str) -> dict[str, int]:
        """Number -> index of the labelled case that has it. DataFault: another dataset's names, or a number twice."""
        found: dict[str, int] = {}
        for i, case in enumerate(cases):
            named = re.search(self.pattern, case.name)
            if named is None or not case.has_labels:
                continue
            if named[1] in found:
                raise DataFault(
                    f"{protocol}: {cases[found[named[1]]].name} and {case.name} are both number {named[1]} of "
                    f"{self.dataset}; each subject has one labelled scan: give the folder of one copy of the dataset"
                )
            found[named[1]] = i
        if not found:
            some = ", ".join(case.name for case in cases[:3]) or "none at all"
            raise DataFault(
                f"{protocol}: no labelled scan is named as {self.dataset} names them ({len(cases)} scans: {some}"
                f"{', ...' if len(cases) > 3 else ''}); give {self.dataset} as downloaded, or take --protocol holdout"
            )
        return found


BTCV = Numbered("BTCV", r"(?:^|_)img(\d{4})$")
MMWHS_CT = Numbered("MM-WHS CT", r"(?:^|_)ct_train_(\d{4})$")
MMWHS_MR = Numbered("MM-WHS MR", r"(?:^|_)mr_train_(\d{4})$")
AMOS = Numbered("AMOS22", r"(?:^|_)amos_(\d{4})$")


def numbers(*ranges: tuple[int, int]) -> tuple[str, ...]:
    """Subject numbers in four digits, both ends included: (1, 3), (21, 22) -> 0001, 0002, 0003, 0021, 0022."""
    return tuple(f"{number:04d}" for first, last in ranges for number in range(first, last + 1))


BTCV_TRAIN, BTCV_JUDGES = numbers((1, 10), (21, 34)), numbers((35, 40))
MMWHS_ALL = numbers((1001, 1020))


def named_split(
    protocol: str,
    of: Numbered,
    train: Sequence[str],
    judges: Sequence[str],
    cases: Sequence,
    folds: int,
    fold: int,
) -> Split:
    """These numbers teach, those judge, and nobody else does either."""
    del folds  # of other protocols
    _only_fold(protocol, fold)
    found = of.find(cases, protocol)
    _all_there(protocol, of, found, (*train, *judges))
    rule = f"{of.dataset} {_listed(train)} teach ({len(train)}), {_listed(judges)} judge ({len(judges)})"
    return Split(_indices(found, train), _indices(found, judges), rule)


def amos_ct_split(protocol: str, cases: Sequence, folds: int, fold: int) -> Split:
    """CT scans (ids up to 500) of the dataset's training part teach, those of its validation part judge.

    Which ids the parts hold is the dataset's to say, so what is missing is told by number only.
    """
    del folds
    _only_fold(protocol, fold)
    ct = {number: i for number, i in AMOS.find(cases, protocol).items() if int(number) <= 500}
    parts = {part: sorted(i for i in ct.values() if cases[i].part == part) for part in AMOS_CT}
    short = [
        f"{len(parts[part])} of {wanted} in the {part} part"
        for part, wanted in AMOS_CT.items()
        if len(parts[part]) != wanted
    ]
    if short:
        raise DataFault(
            f"{protocol}: labelled CT scans (ids up to 500): {', '.join(short)}; a part of AMOS22 is not the protocol "
            "(a scan that was left out is missing, too): complete it, or take --protocol holdout"
        )
    train, judges = parts["training"], parts["validation"]
    rule = f"AMOS22 CT (ids up to 500): training part teaches ({len(train)}), validation part judges ({len(judges)})"
    return Split(tuple(train), tuple(judges), rule)


def btcv_folds(protocol: str, cases: Sequence, folds: int, fold: int) -> Split:
    """nnU-Net's folds over the thirty labelled subjects."""
    found = BTCV.find(cases, protocol)
    everyone = (*BTCV_TRAIN, *BTCV_JUDGES)
    _all_there(protocol, BTCV, found, everyone)
    return _numbered_fold(protocol, BTCV, found, everyone, folds, fold)


def mmwhs_folds(protocol: str, modality: Numbered | None, cases: Sequence, folds: int, fold: int) -> Split:
    """nnU-Net's folds over the twenty labelled subjects of one modality; None: of the one that is there."""
    there = [of for of in (MMWHS_CT, MMWHS_MR) if any(re.search(of.pattern, case.name) for case in cases)]
    if modality is None and len(there) == 2:
        raise DataFault(
            f"{protocol}: CT and MR are both there, and are two benchmarks of 20 subjects each; say {protocol}-ct or "
            f"{protocol}-mr"
        )
    of = modality or (there[0] if there else MMWHS_CT)
    found = of.find(cases, protocol)
    _all_there(protocol, of, found, MMWHS_ALL)
    return _numbered_fold(protocol, of, found, MMWHS_ALL, folds, fold)


def msd_split(cases: Sequence, folds: int, fold: int) -> Split:
    """The dataset's own validation part where it has labels; else nnU-Net's folds over the labelled subjects."""
    own = split_cases(cases, folds, fold)
    if not own.validation or any(cases[i].part in ("validation", "test") for i in own.validation):
        return own
    subjects = sorted({case.subject for case in cases if case.has_labels})
    count = min(folds, len(subjects))
    judges = nnunet_fold(subjects, count, fold)
    train = tuple(i for i, case in enumerate(cases) if case.has_labels and case.subject not in judges)
    validation = tuple(i for i, case in enumerate(cases) if case.has_labels and case.subject in judges)
    rule = (
        f"no labelled validation part: fold {fold} of {count} as nnU-Net draws them, "
        f"{len(judges)} of {len(subjects)} labelled subjects judge"
    )
    return Split(train, validation, rule)


def nnunet_fold(names: Sequence[str], folds: int, fold: int) -> frozenset[str]:
    """Who judges in a fold as nnU-Net v2 draws them: KFold(shuffle, seed 12345) of scikit-learn over sorted names."""
    order = np.random.RandomState(NNUNET_SEED).permutation(len(names))
    ordered = sorted(names)
    return frozenset(ordered[i] for i in np.array_split(order, folds)[fold])


def _numbered_fold(
    protocol: str, of: Numbered, found: Mapping[str, int], everyone: Sequence[str], folds: int, fold: int
) -> Split:
    if fold >= folds or folds > len(everyone):
        raise UsageFault(
            f"{protocol}: fold {fold} of {folds} over {len(everyone)} subjects asked for; folds are counted from 0, "
            "and each has somebody: lower --fold or --folds"
        )
    judges = nnunet_fold(everyone, folds, fold)
    train = [number for number in everyone if number not in judges]
    who = ", ".join(sorted(judges))
    rule = f"{of.dataset}, fold {fold} of {folds} as nnU-Net draws them: {who} judge, the other {len(train)} teach"
    return Split(_indices(found, train), _indices(found, sorted(judges)), rule)


def _only_fold(protocol: str, fold: int) -> None:
    if fold:
        raise UsageFault(f"{protocol}: has one split, and no fold {fold}; leave out --fold")


def _all_there(protocol: str, of: Numbered, found: Mapping[str, int], wanted: Sequence[str]) -> None:
    missing = [number for number in wanted if number not in found]
    if missing:
        raise DataFault(
            f"{protocol}: no labelled scan of {of.dataset} {_listed(missing)} ({len(wanted) - len(missing)} of "
            f"{len(wanted)} subjects are there); a part of the data is not the protocol (a scan that was left out is "
            "missing, too): add them, or take --protocol holdout"
        )


def _indices(found: Mapping[str, int], wanted: Iterable[str]) -> tuple[int, ...]:
    return tuple(sorted(found[number] for number in wanted))


def _listed(wanted: Sequence[str]) -> str:
    """Numbers as ranges: 0001-0010, 0021-0034."""
    runs: list[list[str]] = []
    for number in sorted(wanted):
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
