"""NRRD and MetaImage as we write them: SimpleITK and our own reader find every voxel where it was."""

import numpy as np
import pytest
import SimpleITK as sitk

from spade3d.crops.crop import rotation
from spade3d.faults import DataFault, Fault
from spade3d.volumes.geometry import apply_affine, canonical_flips
from spade3d.volumes.itk_files import read_itk
from spade3d.volumes.itk_writing import ITK_TYPES, write_itk
from spade3d.volumes.volume import Grid, read_volume, write_on_grid

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = rotation(np.radians([8.0, -11.0, 14.0])) @ np.diag([0.7, 1.1, -2.5])
OBLIQUE[:3, 3] = 1 / 3, -50.123456789, 12.0
ENDINGS = (".nrrd", ".mha")


def voxels(dtype="uint16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 850, (5, 6, 7)).astype(dtype)


@pytest.mark.parametrize("dtype", ITK_TYPES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read_back(tmp_path, ending, dtype):
    write_itk(tmp_path / f"a{ending}", voxels(dtype), OBLIQUE)
    found, affine = read_itk(tmp_path / f"a{ending}")
    assert found.dtype == dtype and [path.name for path in tmp_path.iterdir()] == [f"a{ending}"]
    np.testing.assert_array_equal(found, voxels(dtype))
    np.testing.assert_allclose(affine, OBLIQUE, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ending", ENDINGS)
def test_simpleitk_finds_each_voxel_where_it_is(tmp_path, ending):
    write_itk(tmp_path / f"a{ending}", voxels(), OBLIQUE)
    image = sitk.ReadImage(str(tmp_path / f"a{ending}"))
    for place in ((0, 0, 0), (4, 1, 6), (2, 5, 3)):
        assert image[place] == voxels()[place]
        x, y, z = image.TransformIndexToPhysicalPoint(place)
        np.testing.assert_allclose((-x, -y, z), apply_affine(OBLIQUE, np.array(place)), atol=1e-9)  # LPS to RAS


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_label_map_lies_on_the_grid_of_its_scan(tmp_path, ending):
    """As SimpleITK wrote the scan: turned, flipped, oblique; the geometry comes back to the last digits."""
    image = sitk.GetImageFromArray(voxels("int16").T)
    image.SetSpacing((0.3, 0.9, 5.0))
    image.SetOrigin((1 / 7, -200.1, 33.3))
    image.SetDirection((rotation(np.radians([80.0, 5.0, -170.0]))).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f"scan{ending}"))
    scan = read_volume(tmp_path / f"scan{ending}")
    turn = canonical_flips(scan.affine, scan.shape)
    assert turn.axes != (0, 1, 2) or any(turn.flips)
    write_on_grid(tmp_path / f"labels{ending}", turn.apply(scan.voxels), Grid(scan.shape, scan.affine))
    again = sitk.ReadImage(str(tmp_path / f"labels{ending}"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), voxels("int16").T)
    for what in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(again, what)(), getattr(image, what)(), rtol=0, atol=1e-12)


def test_the_same_voxels_give_the_same_bytes_in_any_memory_order(tmp_path):
    for ending in ENDINGS:
        for name, array in {"a": voxels(), "b": np.asfortranarray(voxels()), "c": voxels().astype(">u2")}.items():
            write_itk(tmp_path / (name + ending), array, OBLIQUE)
        assert len({path.read_bytes() for path in tmp_path.glob(f"*{ending}")}) == 1


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.nrrd or \.mha"):
        write_itk(tmp_path / "a.nii", voxels(), OBLIQUE)
    with pytest.raises(ValueError, match="float64 of"):
        write_itk(tmp_path / "a.mha", voxels("float64"), OBLIQUE)
    with pytest.raises(DataFault, match="singular"):
        write_itk(tmp_path / "a.mha", voxels(), np.diag([1.0, 1.0, 0.0, 1.0]))
    with pytest.raises(Fault, match="could not be written"):
        write_itk(tmp_path / "none" / "a.nrrd", voxels(), OBLIQUE)
    assert not list(tmp_path.iterdir())
