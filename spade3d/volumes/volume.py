"""A scan in memory, and the way from and to its file: NIfTI, NRRD, MetaImage, or a folder of DICOM slices.

Whatever is read is whole and has one number a voxel on a rectangular 3-D grid; anything else is a DataFault that
begins with the path. What is read keeps the order of its file until `Volume.canonical` is asked for.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.dicom import choose_series, is_dicom_folder, read_series, series_grid
from spade3d.volumes.geometry import canonical_flips, spacing_of
from spade3d.volumes.itk_files import read_itk, read_itk_header
from spade3d.volumes.itk_writing import write_itk
from spade3d.volumes.nifti import read_nifti, read_nifti_header, write_volume

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd")
LABEL_ROUNDING = 1e-3  # a label stored as a float may be off by so much from the integer that it means
LABEL_LIMIT = 2**16 - 1
AIR_HU = -500.0  # below this a CT voxel is air or lung

__all__ = [
    "SCAN_SUFFIXES",
    "Grid",
    "Volume",
    "guess_modality",
    "is_dicom_folder",
    "read_grid",
    "read_labels",
    "read_volume",
    "scan_stem",
    "voxel_fingerprint",
    "write_on_grid",
    "write_volume",
]


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels (i, j, k), the affine (4, 4) that places them in the world (RAS, mm), and whose they are."""

    voxels: np.ndarray
    affine: np.ndarray
    modality: str = "unknown"  # "CT", "MR", "PT" or "unknown"
    subject: str = ""
    path: Path | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        i, j, k = self.voxels.shape
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """In mm along i, j, k."""
        return spacing_of(self.affine)

    def canonical(self) -> "Volume":
        """The same scan with its axes nearest to R, A, S, by exact flips and a permutation; contiguous."""
        turn = canonical_flips(self.affine, self.shape)
        return replace(self, voxels=np.ascontiguousarray(turn.apply(self.voxels)), affine=turn.affine(self.affine))


@dataclass(frozen=True, eq=False)
class Grid:
    """The shape and affine of a scan as its file stores them."""

    shape: tuple[int, int, int]
    affine: np.ndarray


def read_volume(path: Path, *, modality: str = "unknown", subject: str = "", series: str | None = None) -> Volume:
    """One scan, in the order of its file, scaled, in native byte order.

    `path` is a file with one of SCAN_SUFFIXES or a folder of DICOM slices; `series` picks a SeriesInstanceUID where
    the folder holds several. DICOM's own modality and patient are taken; those given fill what it leaves open.
    """
    if path.is_dir():
        chosen = choose_series(path, series)
        voxels, affine = read_series(path, chosen)
        modality = chosen.modality if chosen.modality != "unknown" else modality
        subject = subject or chosen.patient
    else:
        voxels, affine = (read_nifti if _is_nifti(path) else read_itk)(path)
    return Volume(voxels, affine, modality, subject, path)


def read_grid(path: Path, *, series: str | None = None) -> Grid:
    """Shape and affine from the headers alone; the voxels are not looked at."""
    if path.is_dir():
        shape, affine, _ = series_grid(path, choose_series(path, series))
    elif _is_nifti(path):
        header = read_nifti_header(path)
        shape, affine = header.shape, header.affine
    else:
        shape, affine = read_itk_header(path)
    return Grid(shape, affine)


def read_labels(path: Path) -> Volume:
    """A label map as uint16; DataFault where a value is no whole number from 0 to 65535 (up to LABEL_ROUNDING)."""
    volume = read_volume(path)
    voxels = volume.voxels
    if voxels.dtype.kind == "f":
        whole = np.round(voxels)
        wrong = ~(np.abs(voxels - whole) <= LABEL_ROUNDING)  # so that NaN is wrong, too
        if wrong.any():
            raise DataFault(
                f"{path}: {int(wrong.sum())} label voxels hold no whole number (the first is {voxels[wrong][0]:g}); "
                "integer labels are needed; was an image given as labels, or were labels interpolated?"
            )
        voxels = whole
    low, high = voxels.min(), voxels.max()
    if low < 0 or high > LABEL_LIMIT:
        raise DataFault(f"{path}: label values run from {low:g} to {high:g}; 0 to {LABEL_LIMIT} are possible")
    return replace(volume, voxels=voxels.astype(np.uint16))


def write_on_grid(path: Path, labels_canonical: np.ndarray, grid: Grid) -> None:
    """Write an array that lies on the canonical (RAS) order of `grid` in the order and with the affine of `grid`: as
    NIfTI, NRRD or MetaImage by the end of the name."""
    write = write_volume if path.name.lower().endswith(NIFTI_SUFFIXES) else write_itk
    write(path, canonical_flips(grid.affine, grid.shape).undo(labels_canonical), grid.affine)


def scan_stem(path: Path) -> str:
    """The name without the suffix of a scan: "a.b.nii.gz" is "a.b"."""
    for suffix in SCAN_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def guess_modality(voxels: np.ndarray) -> str:
    """ "CT" where the values are whole numbers and one voxel in a thousand is air in HU (<= -500), else "MR".

    A plain file does not say. MR can go below zero, too, but by interpolation and only here and there.
    """
    air = np.count_nonzero(voxels <= AIR_HU)
    is_ct = air > voxels.size / 1000 and (voxels.dtype.kind != "f" or bool((np.round(voxels) == voxels).all()))
    return "CT" if is_ct else "MR"


def voxel_fingerprint(volume: Volume) -> str:
    """SHA-256 of the canonical voxels as float32: the same for one scan under other names, orders, types, headers."""
    voxels = canonical_flips(volume.affine, volume.shape).apply(volume.voxels)
    digest = hashlib.sha256(repr(voxels.shape).encode())
    for plane in voxels:
        digest.update(np.ascontiguousarray(plane, dtype="<f4") + np.float32(0))  # + 0 makes -0 and 0 the same
    return digest.hexdigest()


def _is_nifti(path: Path) -> bool:
    """DataFault for a name that no scan has."""
    name = path.name.lower()
    if name.endswith(SCAN_SUFFIXES) or not path.exists():
        return not name.endswith(SCAN_SUFFIXES[len(NIFTI_SUFFIXES) :])
    hint = "give the folder of its series" if name.endswith((".dcm", ".ima")) else "convert it"
    raise DataFault(
        f"{path}: is no 3-D scan file; one of {', '.join(SCAN_SUFFIXES)} or a DICOM folder is needed; {hint}"
    )
