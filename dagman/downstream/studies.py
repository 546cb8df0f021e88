"""Studies: scans with findings that are known for the whole scan and for no place in it, as a CSV gives them.

    subject,effusion,nodule          1 present, 0 absent, empty or -1 not said; instead of `subject` a column `case`
    patient-07,1,0                   names one scan. A study is one scan: a subject's row holds for each of its scans.
    patient-08,0,

A label belongs to all cells of its study together (`StudyBatch`): nothing here can give it to a single crop.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade3d.faults import DataFault

MOST_FINDINGS = 254
UNKNOWN, ABSENT, PRESENT = frozenset({"", "-1", "-1.0"}), frozenset({"0", "0.0"}), frozenset({"1", "1.0"})


@dataclass(frozen=True)
class Study:
    """One scan of a store and what is known of it: 1 present, 0 absent, NaN not said, in the order of the findings.

    `subject`, `part` and `has_labels` are what a split goes by.
    """

    name: str
    subject: str
    part: str
    labels: tuple[float, ...]

    @property
    def has_labels(self) -> bool:
        """Whether any finding is said."""
        return not all(map(math.isnan, self.labels))


@dataclass(frozen=True)
class Findings:
    """The findings of a CSV, and a study for each case of the store, in its order; `notes` are for the user."""

    names: tuple[str, ...]
    studies: tuple[Study, ...]
    notes: tuple[str, ...]

    def table(self, cases: Sequence[int]) -> Float[Tensor, "b f"]:
        """The labels of some cases."""
        return torch.tensor([self.studies[i].labels for i in cases], dtype=torch.float32).view(-1, len(self.names))

    def counts(self, cases: Sequence[int]) -> dict[str, dict[str, int]]:
        """Of each finding: in how many of these studies it is present, absent, not said."""
        table = self.table(cases)
        present, absent = (table == 1).sum(0).tolist(), (table == 0).sum(0).tolist()
        return {
            name: {"present": p, "absent": a, "unknown": len(cases) - p - a}
            for name, p, a in zip(self.names, present, absent, strict=True)
        }


@dataclass(frozen=True, eq=False)
class StudyBatch:
    """Some studies, each with all its cells, or the images that these are made from.

    tokens   of the frozen encoder (stage 3 and upsampled stage 4, one behind the other); None where it is trained
    images   k crops of each study (a bag), or the whole body at low resolution (k = 1), for an encoder that is trained
    places   R, A, S of the cells' centres, 0 to 1 over the body's box; beyond it where a cell is
    valid    cells in the body's box; padding is False. A bag is one grid of cells, its crops one behind the other along
             p, so that neighbours there need not be neighbours in the body
    labels   1 present, 0 absent, NaN not said
    allowed  share of each cell that lies where the finding may be; None without a prior
    teacher  logits of a teacher for the study; None without one
    scans    names of the studies
    """

    tokens: Float[Tensor, "b c p q r"] | None
    images: Float[Tensor, "b k 1 i j k2"] | None
    places: Float[Tensor, "b 3 p q r"]
    valid: Bool[Tensor, "b p q r"]
    labels: Float[Tensor, "b f"]
    allowed: Float[Tensor, "b f p q r"] | None
    teacher: Float[Tensor, "b f"] | None
    scans: tuple[str, ...]

    def to(self, device: torch.device) -> StudyBatch:
        """The same batch there."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> StudyBatch:
        """In memory from which a GPU copies while it computes."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> StudyBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "scans"}
        return replace(self, **{name: tensor if tensor is None else move(tensor) for name, tensor in tensors.items()})

    def __len__(self) -> int:
        return len(self.labels)


def read_findings(path: Path, cases: Sequence) -> Findings:
    """The findings of a CSV for the cases of a store (which have `name`, `subject` and `part`).

    Raises DataFault for a file that cannot be read, a wrong cell or a row that comes twice, by line; and where no row
    belongs to a scan. Rows without a scan, scans without a row and findings that are never (or always) present are
    notes.
    """
    key, names, rows = _read(path)
    of_row = {getattr(case, key if key == "subject" else "name") for case in cases}
    known = {who: labels for who, labels in rows.items() if who in of_row}
    if not known:
        some, there = ", ".join(list(rows)[:3]), ", ".join(sorted(of_row)[:3])
        raise DataFault(
            f"{path}: none of its {len(rows)} {key}s ({some}) is one of the scans ({there}); name them as the "
            "layout does"
        )
    unsaid = (math.nan,) * len(names)
    studies = tuple(
        Study(case.name, case.subject, case.part, known.get(case.subject if key == "subject" else case.name, unsaid))
        for case in cases
    )
    return Findings(names, studies, tuple(_notes(path, key, names, rows, known, studies)))


def _read(path: Path) -> tuple[str, tuple[str, ...], dict[str, tuple[float, ...]]]:
    """The column that says who, the findings, and each row's labels."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFault(
            f"{path}: not readable as CSV ({error}); give subject,finding_1,... with 0, 1 or empty"
        ) from None
    (_, head), *body = lines or [(1, [""])]
    key, *names = head
    if key not in ("subject", "case") or not names or not all(names) or len(set(names)) < len(names):
        raise DataFault(
            f"{path}: the columns are {', '.join(head) or 'none'}; subject (or case) and then one differently named "
            "column for each finding are needed"
        )
    if len(names) > MOST_FINDINGS:
        raise DataFault(f"{path}: {len(names)} findings; at most {MOST_FINDINGS} are supported: keep fewer columns")
    rows: dict[str, tuple[float, ...]] = {}
    for number, (who, *cells) in body:
        if len(cells) != len(names) or not who:
            raise DataFault(f"{path}: line {number} has {len(cells) + 1} cells; a {key} and {len(names)} are needed")
        if who in rows:
            raise DataFault(f"{path}: line {number}: {key} {who} comes twice; one row for each is needed")
        rows[who] = tuple(_value(path, number, name, cell) for name, cell in zip(names, cells, strict=True))
    return key, tuple(names), rows


def _value(path: Path, number: int, name: str, cell: str) -> float:
    if cell in UNKNOWN:
        return math.nan
    if cell in ABSENT | PRESENT:
        return float(cell in PRESENT)
    raise DataFault(f"{path}: line {number}, {name}: {cell!r}; 1 (present), 0 (absent) or nothing (not said) is needed")


def _notes(path, key: str, names, rows, known, studies: Sequence[Study]):
    """What the user should know of a CSV that can be used."""
    if strangers := sorted(rows.keys() - known.keys()):
        yield f"{path.name}: {len(strangers)} {key}s without a scan, not used: {_some(strangers)}"
    if silent := [study.name for study in studies if not study.has_labels]:
        yield f"{path.name}: {len(silent)} scans without findings, not used: {_some(silent)}"
    subjects = [study.subject for study in studies if study.has_labels]
    if key == "subject" and len(subjects) > len(set(subjects)):
        several = sorted({subject for subject in subjects if subjects.count(subject) > 1})
        yield f"{path.name}: a subject's row holds for each of its scans; several scans: {_some(several)}"
    for n, name in enumerate(names):
        said = {study.labels[n] for study in studies} & {0.0, 1.0}
        if len(said) < 2:
            kind = {(): "never said", (0.0,): "never present", (1.0,): "never absent"}[tuple(said)]
            yield f"{path.name}: {name} is {kind}: nothing can be learned of it, and its scores are undefined"


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
