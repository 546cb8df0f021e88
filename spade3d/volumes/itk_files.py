"""NRRD and MetaImage (.nrrd, .nhdr, .mha, .mhd): read by SimpleITK once their data is known to be whole.

SimpleITK fills what is missing with zeros and reports nothing, so where the data lies, how long it must be and
whether it is compressed is read from the header here, and measured first. ITK's world is LPS; ours is RAS.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from spade3d.faults import DataFault
from spade3d.volumes.geometry import check_affine
from spade3d.volumes.payload import check_file, check_promise, inflate, three_dimensional

HEADER_LIMIT = 2**20  # bytes of text; longer is no header
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

NRRD_TYPES = {  # bytes a voxel: every name that the format gives a type
    1: "signed char, int8, int8_t, uchar, unsigned char, uint8, uint8_t",
    2: "short, short int, signed short, signed short int, int16, int16_t, "
    "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    4: "int, signed int, int32, int32_t, uint, unsigned int, uint32, uint32_t, float",
    8: "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t, "
    "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t, double",
}
NRRD_BYTES = {name: size for size, names in NRRD_TYPES.items() for name in names.split(", ")}
NRRD_SPELLINGS = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}
META_BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4,
    "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) in stored order and their affine; DataFault for a damaged file, RGB, 2-D or 4-D."""
    shape, affine = read_itk_header(path)
    data = _locate(path)
    if data.compressed:
        for _ in inflate(data.path, data.expected, data.start):
            pass  # to the end, for length and checksum
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise DataFault(f"{path}: cannot be decoded ({itk_reason(error)}); export it again") from error
    # GetArrayFromImage copies; a view would outlive its image. It is ordered k, j, i.
    return sitk.GetArrayFromImage(image).T.reshape(shape), affine


def read_itk_header(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine (RAS) from the header, whose promise is checked against the size of the file."""
    check_file(path)
    data = _locate(path)
    check_promise(data.path, data.sides, data.expected, data.stored, data.compressed)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataFault(f"{path}: cannot be decoded ({itk_reason(error)}); export it again") from error
    if reader.GetNumberOfComponents() != 1:
        raise DataFault(
            f"{path}: voxels {data.sides} hold {reader.GetNumberOfComponents()} components (RGB or a vector); "
            "a scan of one number a voxel is needed"
        )
    sides = list(reader.GetSize())
    axes = len(sides)
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    shape = three_dimensional(path, tuple(sides))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3] * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    affine = LPS_TO_RAS @ affine
    check_affine(path, affine)
    return shape, affine


def itk_reason(error: RuntimeError) -> str:
    """The last line of an ITK message, which holds the reason; the lines before name C++ source files."""
    return str(error).strip().splitlines()[-1].removeprefix("sitk::ERROR:").strip()


@dataclass(frozen=True)
class _Data:
    """Where the voxels lie: `stored` bytes of `path` from `start` on, which are `expected` ones once inflated."""

    path: Path
    start: int
    stored: int
    expected: int
    sides: tuple[int, ...]
    compressed: bool


def _locate(path: Path) -> _Data:
    return _locate_nrrd(path) if path.suffix.lower() in (".nrrd", ".nhdr") else _locate_meta(path)


def _locate_nrrd(path: Path) -> _Data:
    """http://teem.sourceforge.net/nrrd/format.html"""
    with open(path, "rb") as file:
        magic = file.readline(HEADER_LIMIT)
        if not magic.startswith(b"NRRD000"):
            raise DataFault(f"{path}: is no NRRD file (it begins with {magic[:8]!r}); convert or download it again")
        fields = {}
        while (line := file.readline(HEADER_LIMIT).decode("utf-8", "replace")).strip() and file.tell() < HEADER_LIMIT:
            key, colon, value = line.partition(": ")
            if colon and not line.startswith("#"):
                key = key.strip().lower()
                fields[NRRD_SPELLINGS.get(key, key)] = value.strip()
        start = file.tell()
    sides = _numbers(path, fields, "sizes")
    item = NRRD_BYTES.get(fields.get("type", "").lower())
    encoding = fields.get("encoding", "").lower()
    compressed = encoding in ("gzip", "gz")
    if item is None or not (compressed or encoding == "raw"):
        raise DataFault(
            f"{path}: type {fields.get('type')!r} in encoding {fields.get('encoding')!r}; a number type in raw or gzip "
            "encoding is needed; save it so"
        )
    skip = _whole(path, fields, "byte skip", 0)
    if _whole(path, fields, "line skip", 0) or (compressed and skip):
        raise DataFault(f"{path}: skips lines or compressed bytes before its data; save it without")
    return _data(path, fields.get("data file"), start, skip, sides, item, compressed)


def _locate_meta(path: Path) -> _Data:
    """https://itk.org/Wiki/ITK/MetaIO/Documentation"""
    fields = {}
    with open(path, "rb") as file:
        while "ElementDataFile" not in fields:
            key, equals, value = file.readline(HEADER_LIMIT).decode("utf-8", "replace").partition("=")
            if not equals or file.tell() > HEADER_LIMIT:
                raise DataFault(f"{path}: is no MetaImage file, or its header is cut off; download it again")
            fields[key.strip()] = value.strip()
        start = file.tell()
    sides = _numbers(path, fields, "DimSize")
    item = META_BYTES.get(fields.get("ElementType", "").removeprefix("MET_").removesuffix("_ARRAY"))
    if item is None or fields.get("BinaryData", "True").lower() != "true":
        raise DataFault(f"{path}: ElementType {fields.get('ElementType')!r}; binary numbers are needed; save it so")
    item *= _whole(path, fields, "ElementNumberOfChannels", 1)
    data_file = fields["ElementDataFile"]
    compressed = fields.get("CompressedData", "False").lower() == "true"
    skip = _whole(path, fields, "HeaderSize", 0)
    return _data(path, None if data_file.upper() == "LOCAL" else data_file, start, skip, sides, item, compressed)


def _data(path: Path, name: str | None, start: int, skip: int, sides: tuple, item: int, compressed: bool) -> _Data:
    """The data inside this file, or in the one that it names; skip -1 means that it ends where the file ends."""
    expected = item * math.prod(sides)
    if name is not None:
        if name.upper().startswith("LIST") or "%" in name:
            raise DataFault(f"{path}: its data is spread over several files; save it as one")
        if not name.isprintable():
            raise DataFault(f"{path}: names a data file {name!r}; the header is damaged")
        start = 0
    data_path = path if name is None else path.parent / name
    size = check_file(data_path)
    start = size - expected if skip == -1 and not compressed else start + skip
    return _Data(data_path, max(start, 0), size - max(start, 0), expected, sides, compressed)


def _numbers(path: Path, fields: dict[str, str], key: str) -> tuple[int, ...]:
    sides = tuple(int(word) if word.isdecimal() else 0 for word in fields.get(key, "").split())
    if not sides or min(sides) < 1:
        raise DataFault(
            f"{path}: {key} is {fields.get(key)!r}; positive whole numbers are needed; the header is damaged"
        )
    return sides


def _whole(path: Path, fields: dict[str, str], key: str, default: int) -> int:
    word = fields.get(key, str(default))
    if not word.removeprefix("-").isdecimal():
        raise DataFault(f"{path}: {key} is {word!r}; a whole number is needed; the header is damaged")
    return int(word)
