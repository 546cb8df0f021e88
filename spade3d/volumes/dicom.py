"""A folder of DICOM slices: grouped by series, put in order by position, refused where a volume would be invented.

ITK stacks whatever it is given and only warns of a missing slice. Here the affine is worked out from the slices' own
positions, and a gap, a double position, colour or a tilted gantry is a fault. DICOM's world is LPS; ours is RAS.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from spade3d.faults import DataFault
from spade3d.volumes.geometry import check_affine
from spade3d.volumes.itk_files import LPS_TO_RAS, itk_reason
from spade3d.volumes.payload import check_file, first_bytes

GAP_TOLERANCE = 0.01  # of the slice distance
ORIENTATION_TOLERANCE = 1e-4  # between direction cosines of two slices
PREAMBLE = 128
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
# SOP classes that hold no scan: directory, waveforms, presentation states, raw data and segmentations, reports,
# encapsulated documents, radiotherapy.
STORAGE = "1.2.840.10008.5.1.4.1.1."
NO_SCAN = ("1.2.840.10008.1.3.10", *(STORAGE + branch for branch in ("9.", "11.", "66", "88.", "104.", "481.")))


@dataclass(frozen=True)
class Slice:
    """One file: where its first voxel lies (LPS, mm), how its rows and columns run, and how it is stored."""

    path: Path
    shape: tuple[int, int]  # columns (i), rows (j)
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]  # between rows (j), between columns (i)
    rescale: tuple[float, float]
    components: int
    frames: int


@dataclass(frozen=True)
class Series:
    """The slices of one SeriesInstanceUID, as they were found; `localiser` where it is only a scout view."""

    uid: str
    modality: str
    patient: str
    description: str
    localiser: bool
    slices: tuple[Slice, ...]


def is_dicom_folder(path: Path) -> bool:
    """Whether a folder directly holds a DICOM file."""
    return path.is_dir() and any(_is_dicom(file) for file in path.iterdir() if file.is_file())


def dicom_series(folder: Path) -> dict[str, Series]:
    """Every series of scans directly in a folder, by SeriesInstanceUID in sorted order; headers only.

    Reports, contours and segmentations are left out. DataFault for a DICOM file that should be a slice and cannot
    be read: a series without it would only seem whole.
    """
    found: dict[str, list[tuple[Slice, dict[str, str]]]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_file() and _is_dicom(path) and not _sop_class(path).startswith(NO_SCAN):
            one, tags = _read_slice(path)
            found[tags["0020|000e"]].append((one, tags))
    series = {}
    for uid, members in sorted(found.items()):
        tags = members[0][1]
        series[uid] = Series(
            uid=uid,
            modality={"CT": "CT", "MR": "MR", "PT": "PT"}.get(tags["0008|0060"], "unknown"),
            patient=tags["0010|0020"],
            description=tags["0008|103e"],
            localiser="LOCALIZER" in tags["0008|0008"].upper(),
            slices=tuple(one for one, _ in members),
        )
    return series


def choose_series(folder: Path, uid: str | None) -> Series:
    """The named series, or the only one that is more than a scout view; DataFault where there is no such one."""
    every = dicom_series(folder)
    if uid is not None:
        if uid not in every:
            raise DataFault(f"{folder}: holds no series {uid}; found: {', '.join(every) or 'none'}")
        return every[uid]
    scans = [one for one in every.values() if not one.localiser]
    if not scans:
        raise DataFault(f"{folder}: holds no DICOM series of a scan; a folder of CT, MR or PET slices is needed")
    if len(scans) > 1:
        listing = ", ".join(f"{one.uid} ({one.modality}, {len(one.slices)} slices)" for one in scans)
        raise DataFault(f"{folder}: holds {len(scans)} series; name one of them or move them apart: {listing}")
    return scans[0]


def series_grid(folder: Path, series: Series) -> tuple[tuple[int, int, int], np.ndarray, tuple[Slice, ...]]:
    """Shape, affine (RAS) and the slices in order; DataFault where they do not make one evenly spaced volume."""
    first = series.slices[0]
    _check_slices(folder, series)
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(row, column)
    heights = np.array([np.dot(normal, one.position) for one in series.slices])
    order = np.argsort(heights, kind="stable")
    slices = tuple(series.slices[index] for index in order)
    _check_gaps(folder, slices, np.diff(heights[order]))
    affine = np.eye(4)
    affine[:3, 0] = row * first.spacing[1]
    affine[:3, 1] = column * first.spacing[0]
    affine[:3, 2] = (np.array(slices[-1].position) - slices[0].position) / (len(slices) - 1)
    affine[:3, 3] = slices[0].position
    affine = LPS_TO_RAS @ affine
    check_affine(folder, affine)
    return (*first.shape, len(slices)), affine, slices


def read_series(folder: Path, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) scaled to HU or the like, and their affine; integers where the rescale is whole and common."""
    shape, affine, slices = series_grid(folder, series)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(one.path) for one in slices])
    rescales = {one.rescale for one in slices}
    if len(rescales) > 1 or not all(value.is_integer() for value in slices[0].rescale):
        # PET scales every slice by its own factor, but ITK takes the voxel type of the first slice for all.
        reader.SetOutputPixelType(sitk.sitkFloat32)
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # gaps and tilts were judged above, more strictly
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise DataFault(
            f"{folder}: a slice cannot be decoded ({itk_reason(error)}); export the series again"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    voxels = sitk.GetArrayFromImage(image).T
    if voxels.shape != shape:
        raise DataFault(f"{folder}: decodes to {voxels.shape}, its headers say {shape}; export the series again")
    return voxels, affine


def _is_dicom(path: Path) -> bool:
    """By its content; files without the preamble only by their name."""
    return first_bytes(path, PREAMBLE + 4)[PREAMBLE:] == b"DICM" or path.suffix.lower() in DICOM_SUFFIXES


def _sop_class(path: Path) -> str:
    """MediaStorageSOPClassUID (0002,0002), always explicit little endian; "" where the file has no such header."""
    head = first_bytes(path, 1024)
    at = head.find(b"\x02\x00\x02\x00UI")
    if at < 0:
        return ""
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    return head[at + 8 : at + 8 + length].decode("ascii", "replace").rstrip("\0 ")


def _read_slice(path: Path) -> tuple[Slice, dict[str, str]]:
    check_file(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataFault(f"{path}: is damaged or no DICOM image ({itk_reason(error)}); copy it again") from error
    tags: dict[str, str] = defaultdict(str)
    tags.update({key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()})
    slope, inter = _decimals(path, tags, "0028|1053", 1) or (1.0,), _decimals(path, tags, "0028|1052", 1) or (0.0,)
    columns, rows = reader.GetSize()[:2]
    return Slice(
        path=path,
        shape=(columns, rows),
        position=_decimals(path, tags, "0020|0032", 3),
        orientation=_decimals(path, tags, "0020|0037", 6),
        spacing=_decimals(path, tags, "0028|0030", 2),
        rescale=(slope[0], inter[0]),
        components=reader.GetNumberOfComponents(),
        frames=int((_decimals(path, tags, "0028|0008", 1) or (1.0,))[0]),
    ), tags


def _decimals(path: Path, tags: dict[str, str], key: str, count: int) -> tuple[float, ...]:
    """The numbers of a tag; () where it is absent or empty."""
    words = tags[key].split("\\") if tags[key] else []
    try:
        numbers = tuple(float(word) for word in words)
    except ValueError as error:
        raise DataFault(f"{path}: DICOM tag ({key.replace('|', ',')}) is {tags[key]!r}; numbers are needed") from error
    if numbers and len(numbers) != count:
        raise DataFault(f"{path}: DICOM tag ({key.replace('|', ',')}) holds {len(numbers)} numbers; {count} are needed")
    return numbers


def _check_slices(folder: Path, series: Series) -> None:
    """Every slice has one number a voxel, a place, and the shape, spacing and orientation of the first."""
    first = series.slices[0]
    for one in series.slices:
        if one.components != 1:
            raise DataFault(
                f"{folder}: {one.path.name} is RGB, {one.shape} of {one.components} components; a scan of one number a "
                "voxel is needed"
            )
        if one.frames != 1:
            raise DataFault(
                f"{folder}: {one.path.name} holds {one.frames} frames (enhanced DICOM); convert it to NIfTI"
            )
        if not (one.position and one.orientation and one.spacing):
            raise DataFault(f"{folder}: {one.path.name} has no position, orientation or spacing; it cannot be stacked")
        if (one.shape, one.spacing) != (first.shape, first.spacing):
            raise DataFault(
                f"{folder}: {one.path.name} is {one.shape} at {one.spacing} mm, {first.path.name} {first.shape} at "
                f"{first.spacing} mm; slices of one grid are needed"
            )
        if np.abs(np.subtract(one.orientation, first.orientation)).max() > ORIENTATION_TOLERANCE:
            raise DataFault(
                f"{folder}: {one.path.name} is turned against {first.path.name}; parallel slices are needed"
            )
    if len(series.slices) < 2:
        raise DataFault(f"{folder}: series {series.uid} has 1 slice, {first.shape}; a 3-D scan needs 2 at least")


def _check_gaps(folder: Path, slices: tuple[Slice, ...], gaps: np.ndarray) -> None:
    """`gaps` (slice - 1) in mm, in order of position."""
    usual = float(np.median(gaps))
    double = int(np.argmin(gaps))
    if gaps[double] <= GAP_TOLERANCE * max(usual, 1.0):
        raise DataFault(
            f"{folder}: {slices[double].path.name} and {slices[double + 1].path.name} lie at the same position; one "
            "volume has one slice a position; separate its time points or remove the copy"
        )
    worst = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[worst] - usual) > GAP_TOLERANCE * usual:
        raise DataFault(
            f"{folder}: slices are missing: {gaps[worst]:.4g} mm between {slices[worst].path.name} and "
            f"{slices[worst + 1].path.name} where {usual:.4g} mm is usual; add them or leave the series out"
        )
