"""Several maps of one scan in one 4-D NIfTI, written one by one: a whole set need not lie in memory."""

import gzip
import math
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np

from spade3d.faults import Fault
from spade3d.volumes.geometry import check_affine
from spade3d.whole_file import whole_file

STEPS = np.iinfo(np.uint16).max
LEVEL = 1  # of gzip: a set of maps on a large CT is gigabytes, and higher levels gain little on smooth maps


def write_channels(path: Path, channels: Iterable[np.ndarray], count: int, highest: float, affine: np.ndarray) -> None:
    """Write `count` maps (i, j, k) of one shape, of values from 0 to `highest`, as a gzipped NIfTI-1 (i, j, k, count).

    Stored as uint16 in 65535 equal steps up to `highest`, which the header's slope undoes: half the size of float32.
    Whole or not at all; DataFault for an affine that places no scan.
    """
    check_affine(path, affine)
    if not (math.isfinite(highest) and highest >= 0):
        raise ValueError(f"{path}: highest value {highest}; a finite one of 0 or more is needed")
    slope, written, shape = (highest / STEPS or 1.0), 0, None
    try:
        with (
            whole_file(path) as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=LEVEL, mtime=0) as packed,
        ):
            for channel in channels:
                if shape is None:
                    shape = channel.shape
                    header = _header((*shape, count), slope, affine)
                    packed.write(header.binaryblock + bytes(header.single_vox_offset - len(header.binaryblock)))
                if channel.shape != shape:
                    raise ValueError(f"{path}: a map of {channel.shape} among maps of {shape}")
                for plane in channel.transpose():  # the file runs along i first, then j, then k
                    steps = np.clip(np.rint(plane / slope), 0, STEPS)
                    packed.write(np.ascontiguousarray(steps, dtype="<u2").tobytes())
                written += 1
            if written != count:
                raise ValueError(f"{path}: {written} maps given where {count} were promised")
    except OSError as error:
        raise Fault(
            f"{path}: could not be written ({error.strerror or error}); free space or choose another place"
        ) from error


def _header(shape: tuple[int, ...], slope: float, affine: np.ndarray) -> nib.Nifti1Header:
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint16)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = slope, 0.0
    header["magic"], header["vox_offset"] = b"n+1", header.single_vox_offset
    return header
