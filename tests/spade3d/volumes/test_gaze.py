"""Gaze: every fixation lands where the reader looked, whatever way the scan is stored, and none is lost uncounted."""

import numpy as np
import pytest

from spade3d.faults import DataFault
from spade3d.volumes.gaze import Blur, count_in_slices, gaze_map, located, splat
from spade3d.volumes.gaze_files import Fixations
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.layouts import Case, Dataset
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import Grid, write_volume

# Sagittal slices: the third axis of the file runs from right to left, the second from head to foot.
SAGITTAL = np.array([[0, 0, -4.0, 60], [1.5, 0, 0, -40], [0, -1.5, 0, 50], [0, 0, 0, 1]])
SHAPE = (60, 50, 20)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A body of 50 HU in air, stored resampled to 2 mm along R, A, S: the case and its voxels."""
    folder = tmp_path_factory.mktemp("gaze")
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[8:52, 8:42, 3:17] = 50
    voxels += np.random.default_rng(0).integers(0, 20, SHAPE).astype(np.int16)
    write_volume(folder / "a.nii.gz", voxels, SAGITTAL)
    data = Dataset("one", "one scan", folder, (Case("a", "S", folder / "a.nii.gz", None, "CT"),))
    store = prepare(data, folder / "store", Preprocessing(spacing=(2.0, 2.0, 2.0)))
    return store.cases[0], store.image(0)


@pytest.fixture
def case(scan):
    return scan[0]


@pytest.fixture
def voxels(scan):
    return scan[1]


def gaze(points, seconds=None, *, first=0, shares=False):
    points = np.array(points, float).reshape(-1, 3)
    seconds = np.full(len(points), 0.3) if seconds is None else np.array(seconds, float)
    return Fixations("a", "1", points, seconds, first, shares, "gaze.json")


def slow_saliency(case, voxels, seconds, within, across):
    """The formula, voxel by voxel in mm of the patient, along the axes of the source."""
    index = np.stack(np.meshgrid(*map(np.arange, case.shape), indexing="ij"), -1).reshape(-1, 3)
    world = apply_affine(case.affine, index)
    axes = case.source_grid.affine[:3, :3] / np.linalg.norm(case.source_grid.affine[:3, :3], axis=0)
    total = np.zeros(len(world))
    for voxel, weight in zip(voxels, seconds, strict=True):
        along = (world - apply_affine(case.source_grid.affine, voxel)) @ axes
        near = (np.abs(along) <= 4 * np.array([within, within, across]) + 1e-9).all(axis=1)
        square = (along[:, 0] ** 2 + along[:, 1] ** 2) / within**2 + along[:, 2] ** 2 / across**2
        total += near * weight * np.exp(-0.5 * square)
    return ((total - total.min()) / (total.max() - total.min())).reshape(case.shape)


def test_the_map_is_the_formula(case, voxels):
    rng = np.random.default_rng(1)
    looked = np.column_stack([rng.uniform(10, 50, 12), rng.uniform(10, 40, 12), rng.integers(4, 16, 12)])
    seconds = rng.uniform(0.05, 1.0, 12)
    found = gaze_map(
        case, voxels, [gaze(looked[:5], seconds[:5]), gaze(looked[5:] + 1, seconds[5:], first=1)], blur=Blur(3.3, 7.1)
    )
    assert found.used == 12 and found.saliency.dtype == np.float32
    assert np.allclose(found.saliency, slow_saliency(case, looked, seconds, 3.3, 7.1), atol=2e-6)


def test_a_fixation_peaks_where_it_was_and_blurs_as_far_as_the_scan_says(case, voxels):
    found = gaze_map(case, voxels, [gaze([[30, 20, 10]])]).saliency
    peak = apply_affine(case.affine, np.array(np.unravel_index(found.argmax(), found.shape), float))
    assert np.abs(peak - apply_affine(SAGITTAL, np.array([30, 20, 10]))).max() <= 1.0  # half a stored voxel
    within = 0.03 * 1.5 * np.sqrt(60 * 50)  # 2.46 mm
    assert Blur().of(case.source_grid) == pytest.approx((within, 8.0))  # two slices of 4 mm are more than half of it
    assert Blur().of(Grid((500, 500, 90), np.diag([0.8, 0.8, 1.0, 1]))) == pytest.approx((12.0, 6.0))


def test_what_is_dropped_is_counted(case, voxels):
    points = [[30, 20, 10], [30, 21, 10], [1, 1, 10], [-3, 20, 10], [30, 20, 0], [31, 20, 10], [70, 20, 10]]
    found = gaze_map(case, voxels, [gaze(points, [0.3, 0.049, 0.3, 0.3, 0.3, 0.05, 0.01])])
    assert (found.used, found.short, found.beside, found.outside) == (2, 2, 1, 2)
    alone = gaze_map(case, voxels, [gaze([[30, 20, 10], [31, 20, 10]], [0.3, 0.05])])
    assert np.array_equal(found.saliency, alone.saliency)
    nothing = gaze_map(case, voxels, [gaze([[30, 20, 10]], [0.01])])
    assert (nothing.used, nothing.short) == (0, 1) and not nothing.saliency.any()
    assert not gaze_map(case, voxels, []).saliency.any()


def test_air_beside_the_body_is_no_body_though_its_box_holds_it(case, voxels):
    """With a corner of the body cut away, a fixation in that corner is counted as beside it."""
    corner = [[11, 11, 10], [30, 20, 10]]
    assert gaze_map(case, voxels, [gaze(corner)]).outside == 0
    i, j, k = np.indices(voxels.shape)
    there = np.stack([i, j, k], -1) @ case.affine[:3, :3].T + case.affine[:3, 3]
    file = np.linalg.inv(SAGITTAL)
    of_file = there @ file[:3, :3].T + file[:3, 3]
    cut = np.where((of_file[..., 0] < 24) & (of_file[..., 1] < 22), -1000, voxels)
    found = gaze_map(case, cut, [gaze(corner)])
    assert (found.used, found.outside) == (1, 1)
    assert np.array_equal(found.saliency, gaze_map(case, cut, [gaze(corner[1:])]).saliency)


def test_shares_are_of_the_whole_slice(case):
    where = located(gaze([[0.0, 1.0, 3], [0.5, 0.5, 4]], first=1, shares=True), case.source_grid)
    assert where.tolist() == [[-0.5, 49.5, 2], [29.5, 24.5, 3]]


@pytest.mark.parametrize(
    ("points", "first", "said"),
    [
        (
            [[5, 5, 0], [5, 5, 19]],
            1,
            r"slices 0 to 19, .*counted from 1: 1 to 20.*fit slices counted from 0: give --first-slice 0",
        ),
        ([[5, 5, 3], [5, 5, 20]], 0, r"counted from 0: 0 to 19.*counted from 1: give --first-slice 1"),
        ([[5, 5, 0], [5, 5, 9], [5, 5, 999]], 1, "counted from 0: give --first-slice 0"),
        ([[5, 5, 0], [5, 5, 25], [5, 5, 3], [5, 5, 30], [5, 5, 40]], 0, "they fit no count of its slices"),
        ([[5, 5, 85]], 0, "slices 85 to 85, but case a has 20.*another axis"),
    ],
)
def test_slices_that_the_scan_does_not_have_are_refused(case, voxels, points, first, said):
    with pytest.raises(DataFault, match=said):
        gaze_map(case, voxels, [gaze(points, first=first)])


@pytest.mark.parametrize(
    ("points", "hint"),
    [
        ([[0, 5, 5], [9, 9, 9]], 0),
        ([[5, 0, 5], [9, 9, 9]], 0),
        ([[5, 50, 5], [9, 9, 9]], 1),
        ([[60, 5, 5], [9, 9, 9]], 1),
        ([[5, 5, 5], [59, 49, 9]], None),
        ([[0, 5.5, 5]], None),  # between voxels
        ([[0, 5, 5], [-3, 5, 5]], None),  # beside the image
        ([[0, 5, 5], [60, 5, 5]], None),  # kept to the image's edges
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_rows_and_columns_hint_at_their_count_and_end_nothing(case, points, hint, first):
    one = gaze([*points, [9, 9, 9], [8, 9, 9]], first=first)
    assert count_in_slices(one, case.source_grid.shape) == hint
    assert len(located(one, case.source_grid)) == len(one.points)
    assert count_in_slices(gaze([[0, 1, 5]], first=1, shares=True), case.source_grid.shape) is None


def test_a_few_slices_that_the_scan_does_not_have_are_slips(case, voxels):
    """Those fixations are beside the image, as others are, and the rest makes the map that it made alone."""
    found = gaze_map(case, voxels, [gaze([[30, 20, 10], [31, 20, 999], [30, 22, 9]])])
    assert (found.used, found.beside) == (2, 1)
    assert np.array_equal(found.saliency, gaze_map(case, voxels, [gaze([[30, 20, 10], [30, 22, 9]])]).saliency)


def test_gaze_of_another_grid_is_refused(case, voxels):
    with pytest.raises(DataFault, match="2 of 3 fixations lie beside case a .*voxels of its 60 x 50 slices"):
        gaze_map(case, voxels, [gaze([[30, 20, 10], [300, 20, 10], [30, 200, 10]])])
    with pytest.raises(DataFault, match="shares from 0 to 1"):
        gaze_map(case, voxels, [gaze([[30, 20, 10]], shares=True)])


def test_a_splat_at_the_edge_is_cut_off_and_one_beyond_its_reach_is_not_there():
    sigma = np.array([2.0, 1.0, 3.0])
    total = splat(np.array([[-0.4, 4, 4], [40.0, 4, 4]]), np.array([2.0, 1.0]), sigma, (9, 9, 9))
    assert total[0, 4, 4] == pytest.approx(2 * np.exp(-0.5 * 0.2**2)) and total[8].max() == 0  # 8.4 > 4 sigma
