"""Every format in and out; every bad file named. The specimens of shared/data/odd each get the verdict listed here."""

import gzip
import os
import shutil
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from spade3d.faults import DataFault, Fault
from spade3d.volumes.dicom import dicom_series
from spade3d.volumes.geometry import apply_affine, axis_codes
from spade3d.volumes.volume import (
    Grid,
    Volume,
    guess_modality,
    is_dicom_folder,
    read_grid,
    read_labels,
    read_volume,
    scan_stem,
    voxel_fingerprint,
    write_on_grid,
    write_volume,
)

AFFINE = np.array([[-1.0, 0, 0, 40], [0, -1.5, 0, 60], [0, 0, 3.0, -100], [0, 0, 0, 1]])  # LPS


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)


@pytest.fixture
def scan(tmp_path, voxels) -> Path:
    path = tmp_path / "scan.nii.gz"
    write_volume(path, voxels, AFFINE)
    return path


# --- the real specimens ---------------------------------------------------------------------------------------------

READ = {  # path below odd/: shape, axes, modality
    "corrupt/constant.nii.gz": ((34, 52, 35), "RAS", "unknown"),
    "corrupt/nan_block.nii.gz": ((34, 52, 35), "RAS", "unknown"),
    "corrupt/orphan_image_118.nii.gz": ((37, 52, 33), "RAS", "unknown"),
    "corrupt/plain_named_gz.nii.gz": ((34, 52, 35), "RAS", "unknown"),
    "dicom/dcmqi_ct3": ((512, 512, 3), "LPS", "CT"),
    "dicom/generic_compressed_j2k_001": ((256, 256, 4), "PIR", "MR"),
    "dicom/generic_compressed_rle_001": ((256, 256, 4), "PIR", "MR"),
    "dicom/sts_002_pet_image": ((30, 27, 48), "LPS", "PT"),
    "mha/lung_ct_small.mha": ((57, 78, 64), "LPS", "unknown"),
    "nifti/anatomical.nii": ((33, 41, 25), "LAS", "unknown"),
    "nifti/oblique20_affine.nii.gz": ((117, 91, 20), "LPS", "unknown"),
    "nifti/resampled_anat_moved.nii": ((17, 21, 3), "LAS", "unknown"),
    "nrrd/brain1_image.nrrd": ((256, 256, 25), "LAS", "unknown"),
    "nrrd/breast1_image.nrrd": ((45, 120, 21), "LPS", "unknown"),
}
LABELS = {
    "corrupt/label_shifted_affine.nii.gz": {0, 1, 2},
    "corrupt/label_unknown_class.nii.gz": {0, 1, 7},
    "corrupt/label_wrong_shape.nii.gz": {0, 1, 2},
    "corrupt/orphan_label_010.nii.gz": {0, 1, 2},
    "dicom/dcmqi_ct3_heart_seg.nrrd": {0, 3},
    "dicom/dcmqi_ct3_liver_spine_seg.nrrd": {0, 1, 2},
    "mha/lung_mask_other_grid.mha": {0, 1},
    "nrrd/brain1_label.nrrd": {0, 1},
    "nrrd/breast1_label.nrrd": {0, 1},
}
REFUSED = {
    "corrupt/crc_error.nii.gz": "damaged .*incorrect data check",
    "corrupt/empty.nii.gz": "is empty",
    "corrupt/truncated.nii.gz": "is truncated",
    "dicom": "no DICOM series of a scan",
    "dicom/dcmqi_ct3_liver.dcm": "no 3-D scan file.*folder of its series",
    "dicom/failing_sliceincrement_001": "slices are missing: 10 mm .* where 5 mm",
    "dicom/generic_rgb_001": r"RGB, \(52, 77\) of 3 components",
    "dicom/sts_002_pet_mask": "no DICOM series of a scan",
    "nifti/example4d.nii.gz": r"4-D with shape \(128, 96, 24, 2\)",
    "nifti/mr_two_channels_4d.nii.gz": r"4-D with shape \(117, 91, 20, 2\)",
    "nifti/sheared_affine.nii.gz": "has a shear",
}


@pytest.mark.parametrize("name", READ)
def test_a_good_specimen_is_read(shared_data, name):
    path, (shape, axes, modality) = shared_data / "odd" / name, READ[name]
    volume, grid = read_volume(path), read_grid(path)
    assert (volume.shape, axis_codes(volume.affine), volume.modality) == (shape, axes, modality)
    assert volume.voxels.dtype.isnative
    assert grid.shape == shape and (grid.affine == volume.affine).all()


@pytest.mark.parametrize("name", LABELS)
def test_a_label_specimen_is_read(shared_data, name):
    volume = read_labels(shared_data / "odd" / name)
    assert volume.voxels.dtype == np.uint16
    assert set(np.unique(volume.voxels).tolist()) == LABELS[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_specimen_is_refused_by_name(shared_data, name):
    path = shared_data / "odd" / name
    with pytest.raises(DataFault, match=REFUSED[name]) as fault:
        read_volume(path)
    assert str(fault.value).startswith(f"{path}: ") and "\n" not in str(fault.value)


def test_every_specimen_has_a_verdict(shared_data):
    odd = shared_data / "odd"
    known = {odd / name for name in (*READ, *LABELS, *REFUSED)}
    told_below = {odd / "nifti/no_qform_no_sform.nii.gz", *(odd / "orient").iterdir()}
    files = {path for path in odd.rglob("*") if path.is_file()}
    assert {path for path in files if not {path, path.parent} & (known | told_below)} == set()


def test_every_other_real_scan_is_read_as_nibabel_reads_it(shared_data):
    for path in sorted(shared_data.rglob("*.nii.gz")):
        if "odd" not in path.parts:
            volume, reference = read_volume(path), nib.load(path)
            assert (volume.voxels == np.asarray(reference.dataobj)).all()
            assert (volume.affine == reference.affine).all()


@pytest.mark.parametrize("kind", ["img", "seg"])
def test_six_orders_of_one_scan_are_one_scan(shared_data, kind):
    first = read_volume(shared_data / "odd/orient" / f"RAS_{kind}.nii.gz")
    digest = voxel_fingerprint(first)
    assert (first.canonical().voxels == first.voxels).all()
    for order in ("AIL", "LAS", "LPS", "PIR", "SRP"):
        stored = read_volume(shared_data / "odd/orient" / f"{order}_{kind}.nii.gz")
        canonical = stored.canonical()
        assert axis_codes(stored.affine) == order and axis_codes(canonical.affine) == "RAS"
        assert (canonical.voxels == first.voxels).all() and canonical.voxels.flags.c_contiguous
        assert np.abs(canonical.affine - first.affine).max() < 1e-3
        assert voxel_fingerprint(stored) == digest


@pytest.mark.parametrize("order", ["AIL", "LAS", "LPS", "PIR", "RAS", "SRP"])
def test_canonical_labels_go_back_into_the_order_of_the_scan(shared_data, tmp_path, order):
    path = shared_data / "odd/orient" / f"{order}_seg.nii.gz"
    labels, out = read_labels(path), tmp_path / "prediction.nii.gz"
    write_on_grid(out, labels.canonical().voxels, read_grid(path))
    back = read_labels(out)
    assert (back.voxels == labels.voxels).all()
    assert np.abs(back.affine - labels.affine).max() < 1e-4


def test_no_qform_and_no_sform_is_read_as_nibabel_does_and_said(shared_data):
    path = shared_data / "odd/nifti/no_qform_no_sform.nii.gz"
    with pytest.warns(UserWarning, match="neither sform nor qform"):
        volume = read_volume(path)
    assert (volume.affine == nib.load(path).affine).all()


def test_big_endian_becomes_native_with_the_same_values(shared_data):
    path = shared_data / "odd/nifti/anatomical.nii"
    assert (read_volume(path).voxels == np.asarray(nib.load(path).dataobj)).all()


def test_a_dicom_pet_scales_each_slice_by_its_own_factor(shared_data):
    pydicom = pytest.importorskip("pydicom")
    folder = shared_data / "odd/dicom/sts_002_pet_image"
    volume = read_volume(folder)
    slices = sorted((pydicom.dcmread(file) for file in folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    assert len({float(one.RescaleSlope) for one in slices}) > 1
    for k, one in enumerate(slices):
        expected = one.pixel_array.T * float(one.RescaleSlope) + float(one.RescaleIntercept)
        assert np.allclose(volume.voxels[:, :, k], expected, rtol=1e-5)
        position = np.array(one.ImagePositionPatient, float) * [-1, -1, 1]
        assert apply_affine(volume.affine, np.array([0, 0, k])) == pytest.approx(position, abs=0.02)
    assert volume.subject == "STS_002"


def test_modality_is_guessed_from_air(shared_data):
    assert guess_modality(read_volume(shared_data / "ct_torso_totalseg/ct.nii.gz").voxels) == "CT"
    assert guess_modality(read_volume(shared_data / "sts_sarcoma/STS_002/CT_image.nii.gz").voxels) == "CT"
    assert guess_modality(read_volume(shared_data / "odd/nifti/anatomical.nii").voxels) == "MR"  # goes down to -610
    assert guess_modality(read_volume(shared_data / "mr_torso_totalseg/mr.nii.gz").voxels) == "MR"


# --- DICOM folders made wrong ---------------------------------------------------------------------------------------


@pytest.fixture
def ct_slices(shared_data, tmp_path) -> Path:
    folder = tmp_path / "ct"
    shutil.copytree(shared_data / "odd/dicom/dcmqi_ct3", folder)
    for file in folder.iterdir():
        file.chmod(0o600)
    return folder


def test_a_dicom_series_is_listed(ct_slices):
    assert is_dicom_folder(ct_slices) and not is_dicom_folder(ct_slices.parent)
    (series,) = dicom_series(ct_slices).values()
    assert (series.modality, series.patient, len(series.slices), series.localiser) == ("CT", "99000", 3, False)


def test_two_series_in_one_folder_must_be_told_apart(shared_data, ct_slices):
    for file in (shared_data / "odd/dicom/generic_compressed_rle_001").iterdir():
        shutil.copy(file, ct_slices)
    with pytest.raises(DataFault, match=r"holds 2 series.*\(MR, 4 slices\)"):
        read_volume(ct_slices)
    shapes = {
        series.modality: read_volume(ct_slices, series=uid).shape for uid, series in dicom_series(ct_slices).items()
    }
    assert shapes == {"CT": (512, 512, 3), "MR": (256, 256, 4)}
    with pytest.raises(DataFault, match="holds no series 1.2.3; found: "):
        read_volume(ct_slices, series="1.2.3")


def test_a_doubled_slice_is_refused(ct_slices):
    shutil.copy(ct_slices / "01.dcm", ct_slices / "copy.dcm")
    with pytest.raises(DataFault, match="same position"):
        read_volume(ct_slices)


def test_one_slice_is_no_volume(ct_slices):
    for name in ("02.dcm", "03.dcm"):
        (ct_slices / name).unlink()
    with pytest.raises(DataFault, match="has 1 slice"):
        read_volume(ct_slices)


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_a_truncated_slice_is_not_left_out_in_silence(ct_slices, part):
    whole = (ct_slices / "02.dcm").read_bytes()
    (ct_slices / "02.dcm").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(DataFault, match="02.dcm: is damaged"):
        read_volume(ct_slices)


# --- writing and reading back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_is_written_is_read_back(tmp_path, dtype, suffix):
    array = np.arange(120).reshape(6, 5, 4).astype(dtype)
    path = tmp_path / f"ünï cöde{suffix}"
    write_volume(path, array, AFFINE)
    volume, header = read_volume(path, modality="CT", subject="a"), nib.load(path).header
    assert volume.voxels.dtype == dtype and (volume.voxels == array).all()
    assert np.abs(volume.affine - AFFINE).max() < 1e-5
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert (volume.modality, volume.subject, volume.path) == ("CT", "a", path)
    assert volume.spacing == pytest.approx((1, 1.5, 3))
    assert os.listdir(tmp_path) == [path.name]


def test_the_same_voxels_give_the_same_bytes(tmp_path, voxels):
    write_volume(tmp_path / "a.nii.gz", voxels, AFFINE)
    write_volume(tmp_path / "b.nii.gz", voxels, AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(scan, voxels, monkeypatch):
    before = scan.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fault, match="could not be written .No space left"):
        write_volume(scan, voxels * 0, AFFINE)
    assert scan.read_bytes() == before and os.listdir(scan.parent) == [scan.name]


def test_writing_refuses_what_nifti_cannot_keep(tmp_path, voxels):
    with pytest.raises(ValueError, match="int64"):
        write_volume(tmp_path / "a.nii.gz", voxels.astype(np.int64), AFFINE)
    with pytest.raises(ValueError, match="must end in .nii"):
        write_volume(tmp_path / "a.mha", voxels, AFFINE)
    with pytest.raises(ValueError, match="canonical grid"):
        write_on_grid(tmp_path / "a.nii.gz", voxels, Grid((3, 3, 3), AFFINE))


@pytest.mark.parametrize("suffix, compressed", [(".nrrd", False), (".nrrd", True), (".nhdr", True), (".mha", True),
                                                (".mha", False), (".mhd", False), (".mhd", True)])  # fmt: skip
def test_itk_files_lie_where_the_nifti_lies(tmp_path, scan, voxels, suffix, compressed):
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(scan)), str(path), useCompression=compressed)
    volume, grid = read_volume(path), read_grid(path)
    assert (volume.voxels == voxels).all() and volume.voxels.dtype == np.int16
    assert np.abs(volume.affine - AFFINE).max() < 1e-5
    assert grid.shape == volume.shape and (grid.affine == volume.affine).all()


def test_nrrd_may_say_that_its_world_is_ras(tmp_path, scan, voxels):
    path = tmp_path / "scan.nrrd"
    sitk.WriteImage(sitk.ReadImage(str(scan)), str(path))
    path.write_bytes(path.read_bytes().replace(b"space: left-posterior-superior", b"space: right-anterior-superior"))
    assert np.allclose(read_volume(path).affine, np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_nan_and_inf_stay_what_they_are(tmp_path, suffix):
    """SimpleITK makes zeros of them in NIfTI; whoever counts them must see them."""
    path = tmp_path / f"scan{suffix}"
    array = np.zeros((4, 5, 6), np.float32)
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    assert np.array_equal(read_volume(path).voxels, array.T, equal_nan=True)


def test_scaled_values_and_a_fourth_axis_of_one(tmp_path):
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    image = nib.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "a.nii.gz")
    scaled = bytearray(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    struct.pack_into("<2f", scaled, 112, 0.5, -10)
    (tmp_path / "a.nii").write_bytes(scaled)
    volume = read_volume(tmp_path / "a.nii")
    assert volume.voxels.dtype == np.float32
    assert (volume.voxels == np.arange(24).reshape(2, 3, 4) * 0.5 - 10).all()


def test_scan_stem():
    assert [scan_stem(Path(name)) for name in ("a.b.nii.gz", "A.NII", "x/case_0000.nrrd", "s0001", "b.mha")] == [
        "a.b", "A", "case_0000", "s0001", "b"
    ]  # fmt: skip


def test_fingerprint_forgets_header_and_dtype_but_no_voxel(voxels):
    digest = voxel_fingerprint(Volume(voxels, AFFINE))
    moved = AFFINE.copy()
    moved[:3, 3] += 30
    assert voxel_fingerprint(Volume(voxels.astype(np.float64), moved, "CT", "other")) == digest
    other = voxels.copy()
    other[1, 2, 3] += 1
    assert voxel_fingerprint(Volume(other, AFFINE)) != digest


# --- labels ---------------------------------------------------------------------------------------------------------


def test_labels_that_are_nearly_whole_are_rounded(tmp_path):
    write_volume(tmp_path / "a.nii.gz", np.full((3, 3, 3), 2.0004, np.float32), AFFINE)
    assert (read_labels(tmp_path / "a.nii.gz").voxels == 2).all()


@pytest.mark.parametrize(
    "value, reason",
    [
        (1.4, "1 label voxels hold no whole number .the first is 1.4"),
        (np.nan, "no whole number"),
        (-1, "from -1 to 0"),
        (7e4, "to 70000"),
    ],
)
def test_values_that_are_no_labels_are_refused(tmp_path, value, reason):
    labels = np.zeros((3, 3, 3), np.float32)
    labels[1, 1, 1] = value
    write_volume(tmp_path / "a.nii.gz", labels, AFFINE)
    with pytest.raises(DataFault, match=reason):
        read_labels(tmp_path / "a.nii.gz")


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", "-plain.nrrd", "-plain.mha"])
def test_a_truncated_file_is_refused(tmp_path, suffix, part):
    path = tmp_path / f"scan{suffix}"
    array = np.random.default_rng(0).integers(0, 2000, (20, 20, 20)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path), useCompression="plain" not in suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(DataFault, match=r"^\S+scan\S+: "):
        read_volume(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_flipped_bit_is_found_or_harmless(data):
    """No bit of a gzipped scan can change a voxel unnoticed; a bit of gzip's own header may change nothing."""
    array = np.random.default_rng(0).integers(-9, 9, (5, 5, 5)).astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scan.nii.gz")
        write_volume(path, array, AFFINE)
        content = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            voxels = read_volume(path).voxels
        except DataFault:
            return
        assert (voxels == array).all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_header_byte_may_be_wrong_and_there_is_a_verdict(data):
    """Fuzz: whatever stands in the header, the answer is a volume of the right size or a DataFault, nothing else."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        path = Path(folder, "scan.nii")
        write_volume(path, np.ones((5, 4, 3), np.int16), AFFINE)
        content = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, 347), min_size=1, max_size=4)):
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            assert read_volume(path).voxels.nbytes > 0
        except DataFault as fault:
            assert str(fault).startswith(f"{path}: ")


def patched(scan: Path, form: str, at: int, *values) -> Path:
    """The scan, inflated, with other values in its header."""
    content = bytearray(gzip.decompress(scan.read_bytes()))
    struct.pack_into(form, content, at, *values)
    path = scan.with_name("patched.nii")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "form, at, values, reason",
    [
        ("<8h", 40, (3, 32767, 32767, 32767, 1, 1, 1, 1), r"declares \(32767, 32767, 32767\) voxels, more than"),
        ("<8h", 40, (3, 600, 600, 600, 1, 1, 1, 1), "truncated"),
        ("<8h", 40, (3, 6, 0, 4, 1, 1, 1, 1), r"sides \(6, 0, 4\)"),
        ("<8h", 40, (3, 6, -5, 4, 1, 1, 1, 1), "damaged"),
        ("<h", 40, (9,), "declares 9 axes"),
        ("<8h", 40, (2, 30, 4, 1, 1, 1, 1, 1), r"2-D with shape \(30, 4\)"),
        ("<8h", 40, (5, 6, 5, 1, 1, 4, 1, 1), r"5-D with shape \(6, 5, 1, 1, 4\)"),
        ("<h", 70, (128,), "RGB"),
        ("<h", 70, (32,), "complex64"),
        ("<h", 70, (4444,), "data type code 4444 is unknown"),
        ("<f", 108, (1e9,), "truncated"),
        ("<f", 108, (100.0,), "points into the header"),
        ("<f", 108, (np.nan,), "points into the header"),
        ("<f", 112, (np.inf,), None),
        ("<2f", 112, (2.0, np.nan), "scl_inter"),
        ("<4s", 344, (b"nope",), "wrong magic"),
        ("<4f", 280, (np.nan, 0, 0, 0), "NaN"),
        ("<12f", 280, (0.0,) * 12, "singular"),
        ("<h", 254, (0,), None),
        ("<i", 0, (12345,), "no NIfTI file"),
    ],
)
def test_a_wrong_header_is_refused_by_its_field(scan, form, at, values, reason):
    path = patched(scan, form, at, *values)
    if reason is None:  # slope Inf: taken as stored, with a warning; no sform: the qform says the same
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert read_volume(path).shape == (6, 5, 4)
        return
    with pytest.raises(DataFault, match=reason):
        read_volume(path)
    with pytest.raises(DataFault, match=reason):
        read_grid(path)


@pytest.mark.parametrize("pixdim", [0.0, np.nan, -1.0])
def test_a_pixdim_that_is_needed_must_be_a_spacing(scan, pixdim):
    content = bytearray(patched(scan, "<h", 254, 0).read_bytes())  # no sform: the qform needs pixdim
    struct.pack_into("<f", content, 84, pixdim)
    scan.write_bytes(content)
    with pytest.raises(DataFault, match="pixdim"):
        read_volume(scan)


def test_content_tells_gzip_and_not_the_name(scan, voxels):
    content = gzip.decompress(scan.read_bytes())
    scan.with_name("gzipped.nii").write_bytes(scan.read_bytes())
    scan.write_bytes(content)
    assert (read_volume(scan).voxels == voxels).all()
    assert (read_volume(scan.with_name("gzipped.nii")).voxels == voxels).all()


def test_block_gzip_and_padding_are_gzip(scan, voxels):
    content = gzip.decompress(scan.read_bytes())
    scan.write_bytes(gzip.compress(content[:200]) + gzip.compress(content[200:]) + b"\0" * 512)
    assert (read_volume(scan).voxels == voxels).all()


def test_a_bomb_is_not_inflated(scan):
    content = gzip.decompress(scan.read_bytes())
    huge = patched(scan, "<8h", 40, 3, 1200, 1200, 1200, 1, 1, 1, 1).read_bytes()
    packer = zlib.compressobj(wbits=31)
    tail = b"".join(packer.compress(piece) for piece in [content] + [bytes(2**20)] * 64) + packer.flush()
    for bomb, reason in ((tail, "holds more than"), (gzip.compress(huge), "compressed bytes can hold")):
        scan.write_bytes(bomb)
        with pytest.raises(DataFault, match=reason):
            read_volume(scan)


def test_what_is_no_scan_file_is_named(tmp_path):
    (tmp_path / "pointer.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "text.nrrd").write_text("hello\n")
    (tmp_path / "text.mha").write_text("hello\n")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    for name, reason in {
        "pointer.nii.gz": "git-lfs pointer",
        "text.nrrd": "no NRRD file",
        "text.mha": "no MetaImage",
        "photo.png": "no 3-D scan file",
        "folder.nii.gz": "no DICOM series",
        "loop.nii": "symbolic links",
        "pipe.nii": "a pipe",
        "missing.nii.gz": "No such file",
    }.items():
        with pytest.raises(DataFault, match=f"^{tmp_path / name}: .*{reason}"):
            read_volume(tmp_path / name)


def test_colour_two_and_four_axes_in_itk_files(tmp_path):
    vector = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    flat = sitk.GetImageFromArray(np.zeros((5, 6), np.int16))
    films = {last: sitk.GetImageFromArray(np.zeros((last, 4, 5, 6), np.int16), isVector=False) for last in (1, 2)}
    for suffix, image, reason in (
        (".nrrd", vector, r"\(3, 6, 5, 4\) hold 3 components"),
        (".mha", vector, r"\(6, 5, 4\) hold 3 components"),
        (".nrrd", flat, r"2-D with shape \(6, 5\)"),
        (".mha", flat, r"2-D with shape \(6, 5\)"),
        (".nrrd", films[2], r"4-D with shape \(6, 5, 4, 2\)"),
        (".mha", films[2], r"4-D with shape \(6, 5, 4, 2\)"),
    ):
        sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
        with pytest.raises(DataFault, match=reason):
            read_volume(tmp_path / f"a{suffix}")
    for suffix in (".nrrd", ".mha"):
        sitk.WriteImage(films[1], str(tmp_path / f"a{suffix}"))
        assert read_volume(tmp_path / f"a{suffix}").shape == (6, 5, 4)


@pytest.mark.parametrize("suffix, old, new, reason", [
    (".nrrd", b"encoding: raw", b"encoding: hex", "encoding 'hex'"),
    (".nrrd", b"sizes: 6 5 4", b"sizes: 6 5 9", "truncated"),
    (".nrrd", b"sizes: 6 5 4", b"sizes: 6 x 4", "sizes is '6 x 4'"),
    (".mha", b"BinaryData = True", b"BinaryData = False", "binary numbers are needed"),
    (".nrrd", b"(0,1.5,0)", b"(0.2,1.5,0)", "has a shear"),
    (".mha", b"ElementSpacing = 1 1.5 3", b"ElementSpacing = 1 0 3", "singular"),
    (".mha", b"DimSize = 6 5 4", b"DimSize = 6 5 3", "longer than its header says"),
    (".mhd", b"ElementDataFile = scan.raw", b"ElementDataFile = gone.raw", "gone.raw: cannot be read"),
    (".mhd", b"ElementDataFile = scan.raw", b"ElementDataFile = LIST", "spread over several files"),
    (".mhd", b"ElementDataFile = scan.raw", b"ElementDataFile = s\0an.raw", "names a data file"),
    (".mhd", b"NDims = 3", b"NDims = 3\nHeaderSize = many", "HeaderSize is 'many'"),
])  # fmt: skip
def test_a_wrong_itk_header_is_refused_by_its_field(tmp_path, scan, suffix, old, new, reason):
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(scan)), str(path), useCompression=False)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(DataFault, match=reason):
        read_volume(path)
