"""Files that describe a dataset (dataset.json, datalists, labels.json, subjects.csv), read as if by a stranger."""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spade3d.faults import DataFault
from spade3d.volumes.naming import part_of, words

Json = dict[str, Any] | list[Any]


def read_json(path: Path) -> Json:
    """Strict JSON: an object or a list, UTF-8, no key twice, no NaN. DataFault says what is wrong and where."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in items:
            if key in table:
                raise DataFault(f"{path}: the key {key!r} is there twice; keep the one that is meant")
            table[key] = value
        return table

    def no_number(text: str) -> float:
        raise DataFault(f"{path}: {text} is no JSON number; remove it")

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique, parse_constant=no_number)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataFault(f"{path}: not valid JSON ({reason}); mend it or remove it") from error
    except OSError as error:
        raise DataFault(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not isinstance(content, dict | list):
        raise DataFault(f"{path}: holds a single {type(content).__name__}; an object or a list of scans is needed")
    return content


def resolve_inside(root: Path, text: str, source: Path, allow_outside: bool) -> Path:
    """The file that `source` means by `text`, relative to `root`; DataFault if it lies elsewhere, links followed.

    A description comes with a download: it must not choose files of this machine.
    """
    if not text.strip() or "\0" in text:
        raise DataFault(f"{source}: {text!r} is no path; name a file relative to {root}")
    path = Path(os.path.normpath(root / text))
    # Both are asked: what the text says, and where the links on its way lead.
    inside = Path(os.path.realpath(root / text)).is_relative_to(os.path.realpath(root))
    if not (inside or allow_outside):
        raise DataFault(
            f"{source}: {text!r} lies outside {root}; put the files there, or read the list with allow_outside "
            "if you trust who wrote it"
        )
    return path


def read_label_names(table: Any, source: Path) -> dict[int, str]:
    """Value -> name from either spelling, {"1": "liver"} (MSD) or {"liver": 1} (nnU-Net v2), without background."""
    if not isinstance(table, Mapping):
        raise DataFault(f'{source}: labels must be an object such as {{"1": "liver"}}, not {type(table).__name__}')
    names: dict[int, str] = {}
    for key, value in table.items():
        number, name = (key, value) if isinstance(value, str) and key.strip().isdecimal() else (value, key)
        if isinstance(number, str) and number.strip().isdecimal():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise DataFault(
                f"{source}: label {key!r}: {value!r} is neither a value with a name nor a name with a value "
                "(regions of several values are not supported)"
            )
        if name.strip().lower() == "ignore":
            raise DataFault(f"{source}: the label 'ignore' ({number}) is not supported; set those voxels to 0")
        if number == 0:
            continue
        if number in names:
            raise DataFault(f"{source}: the label value {number} is both {names[number]!r} and {name!r}")
        names[number] = name
    return dict(sorted(names.items()))


@dataclass(frozen=True)
class Entry:
    """One scan of a list, as written there: paths are still text."""

    part: str
    image: str
    labels: str | None


def read_entries(content: Json, source: Path) -> tuple[list[Entry], set[str]]:
    """The scans that a list names, and the parts it speaks of.

    Known: {"training": [{"image": .., "label": ..}], "validation": [..], "test": ["x.nii.gz"]} (MSD, MONAI; a key may
    go on, as in SMIT's "training_tcia_pancreas_82"), a plain list of either (3DINO), and the tree of nnssl
    (pretrain_data.json).
    """
    if isinstance(content, list):
        return [_entry("", item, source) for item in content], {""}
    if isinstance(content.get("datasets"), dict):
        return [Entry("", _image_of_nnssl(image, source), None) for image in _images_of_nnssl(content)], {""}
    entries: list[Entry] = []
    parts: set[str] = set()
    for key, items in content.items():
        part = part_of(next(iter(words(key)), ""))
        if part and isinstance(items, list):
            parts |= {part} if items else set()
            entries += [_entry(part, item, source) for item in items]
    return entries, parts


def _entry(part: str, item: Any, source: Path) -> Entry:
    if isinstance(item, str):
        return Entry(part, item, None)
    image = item.get("image") if isinstance(item, dict) else None
    if isinstance(image, list):
        if len(image) != 1:
            raise DataFault(f"{source}: one channel is read for now, but a case has {len(image)}: {image}; list one")
        image = image[0]
    if not isinstance(image, str):
        raise DataFault(f'{source}: {json.dumps(item)[:120]} names no scan; needed is {{"image": "path"}} or "path"')
    labels = item.get("label")
    return Entry(part, image, labels if isinstance(labels, str) else None)  # a number is a class, no label map


def _images_of_nnssl(content: dict[str, Any]) -> list[Any]:
    """datasets -> subjects -> sessions -> images: what nnssl writes for OpenMind."""
    level: list[Any] = [content]
    for key in ("datasets", "subjects", "sessions", "images"):
        found = [node.get(key, {}) for node in level if isinstance(node, dict)]
        level = [item for node in found for item in (node.values() if isinstance(node, dict) else node)]
    return level


def _image_of_nnssl(image: Any, source: Path) -> str:
    path = image.get("image_path") if isinstance(image, dict) else None
    if not isinstance(path, str):
        raise DataFault(f"{source}: an image without image_path: {json.dumps(image)[:120]}")
    return path.removeprefix("$nnssl_raw").lstrip("/") if path.startswith("$nnssl_raw") else path


def read_subjects(path: Path) -> dict[str, str]:
    """File (as written: a name, or a path below the folder) -> subject, from a table with columns file,subject."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFault(f"{path}: cannot be read as a table ({error}); needed are the columns file,subject") from error
    subjects: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        file, subject = row.get("file"), row.get("subject")
        if not file or not subject:
            raise DataFault(f"{path}: line {number} lacks a file or a subject; needed are the columns file,subject")
        if subjects.setdefault(file, subject) != subject:
            raise DataFault(f"{path}: line {number}: {file!r} is both {subjects[file]!r}'s and {subject!r}'s")
    return subjects
