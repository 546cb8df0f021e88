"""NIfTI-1 and -2, plain or gzipped (told apart by content, never by name): header checked, every byte accounted for.

Where neither sform nor qform is set (both codes 0) the scan has no place in the world. It is then read as nibabel,
and so MONAI, read it: i runs to the left (LAS), the world's origin lies at the middle, and a warning says so.
"""

import gzip
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from spade3d.faults import DataFault, Fault
from spade3d.volumes.geometry import check_affine
from spade3d.volumes.payload import (
    DEFLATE_LIMIT,
    GZIP_MAGIC,
    check_file,
    check_promise,
    first_bytes,
    inflate,
    inflate_pieces,
    three_dimensional,
)
from spade3d.whole_file import whole_file

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
WRITTEN_DTYPES = ("uint8", "int16", "uint16", "int32", "float32")


@dataclass(frozen=True, eq=False)
class NiftiHeader:
    """What is needed to find and scale the voxels: value = stored * slope + inter."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    dtype: np.dtype
    offset: int
    slope: float
    inter: float
    compressed: bool

    @property
    def voxel_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) in stored order, native byte order, scaled; and their affine. DataFault for any bad file.

    Integers stay as they are where the file does not scale them; scaled ones become float32 (float64 from 32-bit
    integers on, which float32 would round).
    """
    header = read_nifti_header(path)
    if header.compressed:
        content = np.empty(header.offset + header.voxel_bytes, dtype=np.uint8)
        filled = 0
        for piece in inflate(path, len(content)):
            content[filled : filled + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            filled += len(piece)
        stored = content[header.offset :].view(header.dtype)
    else:
        stored = np.fromfile(path, dtype=header.dtype, offset=header.offset)
    voxels = stored.reshape(header.shape, order="F").astype(header.dtype.newbyteorder("="), copy=False)
    if (header.slope, header.inter) != (1.0, 0.0):
        exact = np.float64 if voxels.dtype.itemsize > 2 and voxels.dtype != np.float32 else np.float32
        voxels = voxels.astype(exact) * exact(header.slope) + exact(header.inter)
    return voxels, header.affine


def read_nifti_header(path: Path) -> NiftiHeader:
    """The header alone, checked against the file's size; DataFault where it cannot be a single 3-D scan."""
    size = check_file(path)
    block = first_bytes(path, NIFTI2_BYTES)
    compressed = block.startswith(GZIP_MAGIC)
    if compressed:
        block = b""
        for piece in inflate_pieces(path):
            block += piece
            if len(block) >= NIFTI2_BYTES:
                break
    raw = _parse(path, block)
    shape = _three_sides(path, raw)
    try:
        dtype = raw.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise DataFault(
            f"{path}: the data type code {int(raw['datatype'])} is unknown; the header is damaged"
        ) from error
    if dtype.kind not in "iuf":
        kind = "RGB colour" if dtype.fields else str(dtype)
        raise DataFault(f"{path}: voxels {shape} hold {kind} values; a scan of one number a voxel is needed")
    slope, inter = _scaling(path, raw)
    first = raw.single_vox_offset
    start = float(raw["vox_offset"]) or float(first)
    if not (start >= first and start.is_integer()):
        raise DataFault(f"{path}: vox_offset {start:g} points into the header; the header is damaged")
    if start > size * DEFLATE_LIMIT:
        raise DataFault(f"{path}: is truncated: vox_offset {start:.0f} lies beyond its {size} bytes")
    header = NiftiHeader(shape, _affine(path, raw), dtype, int(start), slope, inter, compressed)
    check_promise(path, shape, header.offset + header.voxel_bytes, size, compressed)
    return header


def write_volume(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write voxels (i, j, k) as NIfTI-1, gzipped if `path` ends in .gz: whole or not at all, same input same bytes.

    sform and qform carry the affine with code 1. The dtype is kept: uint8, int16, uint16, int32 or float32.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: written as NIfTI, so its name must end in .nii or .nii.gz")
    if voxels.ndim != 3 or voxels.dtype.name not in WRITTEN_DTYPES:
        raise ValueError(f"{path}: {voxels.dtype} of {voxels.shape}; needed: 3-D of one of {', '.join(WRITTEN_DTYPES)}")
    check_affine(path, affine)
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    try:
        with whole_file(path) as file:
            if path.name.lower().endswith(".gz"):
                with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0) as packed:
                    image.to_stream(packed)
            else:
                image.to_stream(file)
    except OSError as error:
        raise Fault(
            f"{path}: could not be written ({error.strerror or error}); free space or choose another place"
        ) from error


def _parse(path: Path, block: bytes) -> nib.Nifti1Header:
    """The header as stored, of whichever version and byte order; nothing repaired."""
    sizes = {int.from_bytes(block[:4], order): order for order in ("little", "big")}
    if NIFTI1_BYTES in sizes and len(block) >= NIFTI1_BYTES:
        kind, length, order = nib.Nifti1Header, NIFTI1_BYTES, sizes[NIFTI1_BYTES]
    elif NIFTI2_BYTES in sizes and len(block) >= NIFTI2_BYTES:
        kind, length, order = nib.Nifti2Header, NIFTI2_BYTES, sizes[NIFTI2_BYTES]
    else:
        found = "truncated within the header" if {NIFTI1_BYTES, NIFTI2_BYTES} & sizes.keys() else "no NIfTI file"
        raise DataFault(f"{path}: is {found}; copy or download it again, or convert it to NIfTI")
    header = kind(block[:length], endianness="<" if order == "little" else ">", check=False)
    magic = bytes(header["magic"])[:3]
    if magic not in (b"n+1", b"n+2"):
        raise DataFault(f"{path}: wrong magic {magic!r}; a NIfTI of one file (n+1, n+2) is needed")
    if header["pixdim"][0] not in (-1.0, 1.0):  # qfac; the standard reads anything else as 1
        header["pixdim"][0] = 1.0
    return header


def _three_sides(path: Path, header: nib.Nifti1Header) -> tuple[int, int, int]:
    """The three sides of the grid; a fourth axis and more are dropped if they are 1 long."""
    axes = int(header["dim"][0])
    sides = [int(side) for side in header["dim"][1 : axes + 1]] if 1 <= axes <= 7 else []
    if not sides or min(sides) < 1:
        raise DataFault(f"{path}: the header declares {axes} axes with sides {tuple(sides)}; it is damaged")
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    return three_dimensional(path, tuple(sides))


def _scaling(path: Path, header: nib.Nifti1Header) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        return 1.0, 0.0  # the standard: 0 means that values are not scaled
    if not np.isfinite(slope):
        warnings.warn(f"{path}: scl_slope is {slope}; the values are taken as they are stored", stacklevel=2)
        return 1.0, 0.0
    if not np.isfinite(inter):
        raise DataFault(f"{path}: scl_inter is {inter} beside a slope of {slope:g}; the header is damaged")
    return slope, inter


def _affine(path: Path, header: nib.Nifti1Header) -> np.ndarray:
    """The sform if it is set, else the qform, else nibabel's convention with a warning; checked."""
    if int(header["sform_code"]) <= 0:
        pixdim = header["pixdim"][1:4].astype(float)
        if not (np.isfinite(pixdim) & (pixdim > 0)).all():
            raise DataFault(f"{path}: pixdim {pixdim.tolist()} gives no spacing in mm; repair the header")
        if int(header["qform_code"]) <= 0:
            warnings.warn(
                f"{path}: neither sform nor qform is set; read as LAS about its middle (nibabel)", stacklevel=2
            )
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise DataFault(f"{path}: the qform is damaged ({error}); repair the header") from error
    check_affine(path, affine)
    return affine
