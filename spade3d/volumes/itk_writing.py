"""NRRD and MetaImage written: .nrrd and .mha, gzipped, of a scan or a label map whose world is RAS; ITK's is LPS.

Written here, not by SimpleITK, so that a file is whole or not there, and the same voxels give the same bytes.
"""

import zlib
from pathlib import Path

import numpy as np

from spade3d.faults import Fault
from spade3d.volumes.geometry import check_affine, spacing_of
from spade3d.volumes.itk_files import LPS_TO_RAS
from spade3d.whole_file import whole_file

ITK_TYPES = {  # by numpy's name: NRRD's and MetaImage's
    "uint8": ("uint8", "MET_UCHAR"),
    "int16": ("int16", "MET_SHORT"),
    "uint16": ("uint16", "MET_USHORT"),
    "int32": ("int32", "MET_INT"),
    "float32": ("float", "MET_FLOAT"),
}
GZIP = 31  # window bits with which zlib writes a gzip header, without a time


def write_itk(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write voxels (i, j, k) as NRRD or MetaImage, by the end of the name: whole or not at all, same input same bytes.

    The dtype is kept: uint8, int16, uint16, int32 or float32. DataFault for an affine that places no scan.
    """
    nrrd = path.name.lower().endswith(".nrrd")
    if not nrrd and not path.name.lower().endswith(".mha"):
        raise ValueError(f"{path}: written as NRRD or MetaImage, so its name must end in .nrrd or .mha")
    if voxels.ndim != 3 or voxels.dtype.name not in ITK_TYPES:
        raise ValueError(f"{path}: {voxels.dtype} of {voxels.shape}; needed: 3-D of one of {', '.join(ITK_TYPES)}")
    check_affine(path, affine)
    packer, pieces = zlib.compressobj(6, zlib.DEFLATED, GZIP if nrrd else zlib.MAX_WBITS), []
    for plane in voxels.transpose():  # the file runs along i first, then j, then k
        pieces.append(packer.compress(np.ascontiguousarray(plane, dtype=voxels.dtype.newbyteorder("<"))))
    pieces.append(packer.flush())
    header = (_nrrd if nrrd else _meta)(voxels, LPS_TO_RAS @ affine, sum(map(len, pieces)))
    try:
        with whole_file(path) as file:
            file.write(header.encode("ascii"))
            file.writelines(pieces)
    except OSError as error:
        raise Fault(
            f"{path}: could not be written ({error.strerror or error}); free space or choose another place"
        ) from error


def _nrrd(voxels: np.ndarray, affine: np.ndarray, packed_bytes: int) -> str:
    """http://teem.sourceforge.net/nrrd/format.html"""
    directions = " ".join(f"({_numbers(column, ',')})" for column in affine[:3, :3].T)
    lines = [
        "NRRD0004",
        f"type: {ITK_TYPES[voxels.dtype.name][0]}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {_numbers(voxels.shape)}",
        f"space directions: {directions}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: ({_numbers(affine[:3, 3], ',')})",
    ]
    return "\n".join(lines) + "\n\n"


def _meta(voxels: np.ndarray, affine: np.ndarray, packed_bytes: int) -> str:
    """https://itk.org/Wiki/ITK/MetaIO/Documentation"""
    spacing = spacing_of(affine)
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {packed_bytes}",
        f"TransformMatrix = {_numbers((affine[:3, :3] / spacing).T.ravel())}",
        f"Offset = {_numbers(affine[:3, 3])}",
        "CenterOfRotation = 0 0 0",
        f"ElementSpacing = {_numbers(spacing)}",
        f"DimSize = {_numbers(voxels.shape)}",
        f"ElementType = {ITK_TYPES[voxels.dtype.name][1]}",
        "ElementDataFile = LOCAL",
    ]
    return "\n".join(lines) + "\n"


def _numbers(values, between: str = " ") -> str:
    """Every digit that a double has."""
    return between.join(repr(value) for value in np.asarray(values).tolist())
