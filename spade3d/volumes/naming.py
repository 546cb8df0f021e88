"""What a path says about a scan: image or labels, whose, of which modality, and which labels belong to which image."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spade3d.volumes.volume import scan_stem

IMAGE_WORDS = frozenset({"image", "images", "img", "imgs", "scan", "volume"})
LABEL_WORDS = frozenset({
    "label", "labels", "labelmap", "seg", "segs", "segmentation", "segmentations", "mask", "masks", "gt",
    "groundtruth", "dseg", "annotation",
})  # fmt: skip
_MR_WORDS = (
    "mr", "mri", "mra", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "flair", "adc", "dwi", "lge", "cine", "pd",
    "pdw", "swi",
)  # fmt: skip
MODALITY_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("ct", "cect", "cta", "cbct", "hu"), "CT"),
    **dict.fromkeys(_MR_WORDS, "MR"),
    **dict.fromkeys(("pet", "suv", "fdg"), "PT"),
}
# One patient's scans under one name: ends of a file name that tell the scan, not the patient.
_SCAN_WORDS = frozenset({
    "ed", "es", "systole", "diastole", "arterial", "venous", "portal", "native", "delayed", "pre", "post",
    "contrast", "baseline", "followup", "0000",
})  # fmt: skip

_ROLE_FOLDER = re.compile(
    r"(?P<role>images?|imgs?|scans?|volumes?|labels?|masks?|segmentations?|segs?|annotations?|gt)"
    r"(?P<part>[_-]?(tr|train|training|va|val|validation|ts|test|testing))?",
    re.IGNORECASE,
)
_PARTS: Mapping[str, str] = {
    **dict.fromkeys(("tr", "train", "training"), "training"),
    **dict.fromkeys(("va", "val", "valid", "validation"), "validation"),
    **dict.fromkeys(("ts", "test", "testing"), "test"),
}


def words(text: str) -> tuple[str, ...]:
    """The words of a name, in lower case: "CT_Image-07" -> ("ct", "image", "07"), "img0001" -> ("img", "0001")."""
    found: list[str] = []
    for word in re.findall(r"[^\W_]+", text.lower()):
        numbered = re.fullmatch(r"([a-z]+)(\d+)", word)
        split = numbered is not None and numbered[1] in IMAGE_WORDS | LABEL_WORDS
        found += numbered.groups() if split else [word]
    return tuple(found)


def part_of(word: str) -> str:
    """ "training", "validation", "test" or "" for the name of a folder or of a list: "Tr", "val", "Testing"."""
    return _PARTS.get(word.lower(), "")


def modality_of(*names: str) -> str:
    """ "CT", "MR" or "PT" from the first name that speaks of one; "unknown" where none does or one speaks of two."""
    for name in names:
        found = {MODALITY_WORDS[word] for word in words(name) if word in MODALITY_WORDS}
        if found:
            return found.pop() if len(found) == 1 else "unknown"
    return "unknown"


def case_name(stem: str) -> str:
    """A file's stem without the end that only says its role: "CT_image" -> "CT", "liver_3_0000" -> "liver_3"."""
    return re.sub(r"(?i)(?<=.)[_\-. ](image|img|0000)$", "", stem)


def patient_of(stem: str) -> str:
    """Who is in a scan, as far as its name tells: "P7_ED" -> "P7", "P7_abdomen_t2" -> "P7_abdomen", "MR_T1" -> ""."""
    kinds = MODALITY_WORDS.keys() | _SCAN_WORDS | IMAGE_WORDS
    while (last := re.search(r"(?:^|[_\-. ]+)([^\W_]+)$", stem)) and last[1].lower() in kinds:
        stem = stem[: last.start()]
    return stem


@dataclass(frozen=True)
class Name:
    """What the path of one scan file, relative to its dataset, says.

    `folders`: those that do not merely say a role; `words`: the stem's without role words;
    `labels`: labels rather than an image; `part`: "training", "validation", "test" or "".
    """

    folders: tuple[str, ...]
    words: tuple[str, ...]
    labels: bool
    part: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.part, *self.folders, "/", *self.words)

    @property
    def key_without_channel(self) -> tuple[str, ...]:
        """nnU-Net: the image CASE_0000 has the labels CASE."""
        return self.key[:-1] if self.words and self.words[-1] == "0000" else self.key

    @property
    def key_without_modality(self) -> tuple[str, ...]:
        """ct_slab has the labels seg_slab."""
        return (self.part, *self.folders, "/", *(word for word in self.words if word not in MODALITY_WORDS))


def read_name(path: Path) -> Name:
    """Read one path relative to its dataset; role words count in the stem and in the names of its folders."""
    stem_words = words(scan_stem(path))
    labels = bool(LABEL_WORDS & set(stem_words))
    folders, part = [], ""
    for folder in path.parts[:-1]:
        role = _ROLE_FOLDER.fullmatch(folder)
        part = part_of(role["part"].lstrip("_-") if role and role["part"] else folder) or part
        if role is None:
            folders.append(folder)
        elif role["role"].lower() in LABEL_WORDS:
            labels = True
    kept = tuple(word for word in stem_words if word not in IMAGE_WORDS | LABEL_WORDS)
    return Name(tuple(folders), kept, labels, part)


@dataclass(frozen=True)
class Pairing:
    """Each image with its labels (or None), and each label file that belongs to no image with the reason."""

    images: Mapping[Path, Path | None]
    left: Mapping[Path, str]


def pair(paths: Iterable[Path]) -> Pairing:
    """Give label files to images by name: equal words, then without the channel number, then without the modality.

    Nothing is guessed: where a name fits two images, or two label files fit one, none is given away.
    Every path is in the answer exactly once; an image is never another's labels.
    """
    names = {path: read_name(path) for path in sorted(set(paths))}
    images: dict[Path, Path | None] = {path: None for path, name in names.items() if not name.labels}
    left = {path: "no image has this name" for path, name in names.items() if name.labels}
    for key in ("key", "key_without_channel", "key_without_modality"):
        groups: dict[tuple[str, ...], tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
        for path, labels in images.items():
            if labels is None:
                groups[getattr(names[path], key)][0].append(path)
        for path in left:
            groups[names[path].key][1].append(path)
        for candidates, labels_here in groups.values():
            if len(candidates) == len(labels_here) == 1:
                images[candidates[0]] = labels_here[0]
                del left[labels_here[0]]
            elif candidates and labels_here:
                reason = f"{len(labels_here)} label files fit {len(candidates)} images"
                left.update(dict.fromkeys(labels_here, reason))
    return Pairing(images, left)
