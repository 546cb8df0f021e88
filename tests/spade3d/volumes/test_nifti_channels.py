"""Maps written one by one: any reader finds them where they belong, and half a set leaves nothing."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from spade3d.volumes.nifti_channels import write_channels

AFFINE = np.array([[0, -1.2, 0, 5.0], [0.8, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]])


@pytest.fixture
def maps() -> np.ndarray:
    return np.random.default_rng(0).random((3, 5, 4, 6)).astype(np.float32) * 40


def test_any_reader_finds_them_where_they_belong(tmp_path, maps):
    path = tmp_path / "maps.nii.gz"
    write_channels(path, iter(maps), 3, float(maps.max()), AFFINE)
    read = nib.load(path)
    assert read.shape == (5, 4, 6, 3) and read.get_data_dtype() == np.uint16
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(read.get_qform(), AFFINE, atol=1e-5)
    np.testing.assert_allclose(read.header.get_zooms()[:3], (0.8, 1.2, 3.0), atol=1e-6)
    np.testing.assert_allclose(np.moveaxis(read.get_fdata(), 3, 0), maps, atol=maps.max() / 65535)
    other = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))  # (channel, k, j, i)
    np.testing.assert_allclose(other.transpose(0, 3, 2, 1), maps, atol=maps.max() / 65535)


def test_views_in_any_order_are_written_as_they_show(tmp_path, maps):
    path = tmp_path / "maps.nii.gz"
    write_channels(path, (one.transpose(2, 0, 1)[::-1] for one in maps), 3, 40.0, AFFINE)
    read = np.moveaxis(nib.load(path).get_fdata(), 3, 0)
    np.testing.assert_allclose(read, maps.transpose(0, 3, 1, 2)[:, ::-1], atol=40 / 65535)


def test_maps_of_nothing_are_zeros(tmp_path):
    write_channels(tmp_path / "maps.nii.gz", [np.zeros((2, 3, 4))], 1, 0.0, AFFINE)
    assert not nib.load(tmp_path / "maps.nii.gz").get_fdata().any()


@pytest.mark.parametrize(
    ("count", "cut", "highest", "message"),
    [
        (4, 4, 1.0, "3 maps given where 4"),
        (2, 4, 1.0, "3 maps given where 2"),
        (3, 3, 1.0, "among maps of"),
        (3, 4, np.nan, "finite"),
    ],
)
def test_half_a_set_leaves_nothing(tmp_path, maps, count, cut, highest, message):
    with pytest.raises(ValueError, match=message):
        write_channels(tmp_path / "maps.nii.gz", [maps[0], maps[1], maps[2][:, :cut]], count, highest, AFFINE)
    assert not list(tmp_path.iterdir())
