"""Labelled crops: image and classes of one place, every class equally often, a pure function of (seed, step)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dagman.downstream.labelled import REMEMBERED, Classes, LabelledSampling, LabelledStream, classes_of
from spade3d.configuration import Data
from spade3d.crops.crop import PLAIN, Views
from spade3d.faults import DataFault
from spade3d.scans import open_scans
from spade3d.volumes.geometry import spacing_of
from spade3d.volumes.preprocessing import Normalisation
from spade3d.volumes.volume import write_volume

CLASSES = Classes(("liver", "spleen"), (205, 500))
STILL = Views(
    flip=(False, False, False), rotation_deg=0.0, zoom=(1.0, 1.0), gamma=(1.0, 1.0), contrast=(1.0, 1.0),
    brightness=0.0, blur_chance=0.0, noise=0.0,
)  # fmt: skip
SAMPLING = LabelledSampling(shape=(8, 9, 10), spacing=(2.0, 2.0, 2.0), crops=3)
AS_STORED = Normalisation(0.0, 1.0, 0.0, 1000.0)


@pytest.fixture(scope="module")
def store(in_memory):
    """Two scans that show their own labels; a large liver, a small spleen in the first scan only."""
    first, second = np.zeros((2, 40, 36, 30), dtype=np.uint16)
    first[4:30, 4:30, 4:24] = 205
    first[33:36, 30:33, 25:27] = 500
    second[10:20, 10:20, 10:20] = 205
    return in_memory(
        [first, second],
        spacing=(1.5, 2.0, 2.5),
        labels=[first, second],
        label_names={205: "liver", 500: "spleen"},
        normalisation=AS_STORED,
    )


def stream_of(store, sampling=SAMPLING, seed=0, cases=(0, 1)):
    return LabelledStream(store, cases, classes_of(store), sampling, seed=seed)


def test_the_table_of_classes_goes_both_ways():
    labels = np.array([[[0, 205], [500, 205]]], dtype=np.uint16)
    classes = CLASSES.index(labels, "scan 7")
    assert classes.tolist() == [[[0, 1], [2, 1]]] and classes.dtype == np.uint8 and len(CLASSES) == 3
    np.testing.assert_array_equal(CLASSES.written(classes), labels)
    assert CLASSES.written(classes).dtype == np.uint16
    assert Classes(("a",), (7,)).written(np.array([0, 1])).dtype == np.uint8


def test_strange_values_are_refused_by_name():
    with pytest.raises(DataFault, match=r"scan 7: label values \[3, 65535\] are not among \[205, 500\]"):
        CLASSES.index(np.array([0, 205, 3, 65535, 3], dtype=np.uint16), "scan 7")


def test_classes_come_from_the_table_or_from_what_is_there(store, in_memory):
    assert classes_of(store) == CLASSES
    labels = [np.full((4, 4, 4), value, dtype=np.uint16) for value in (7, 3)]
    unnamed = in_memory(labels, labels=labels)
    assert classes_of(unnamed) == Classes(("label 3", "label 7"), (3, 7))
    with pytest.raises(DataFault, match="no scan has a labelled structure"):
        classes_of(in_memory(labels))
    many = np.arange(1, 301, dtype=np.uint16).reshape(3, 10, 10)
    with pytest.raises(DataFault, match="300 label values"):
        classes_of(in_memory([many], labels=[many]))


def test_a_stream_refuses_labels_outside_the_table_at_once(in_memory):
    labels = np.full((4, 4, 4), 9, dtype=np.uint16)
    store = in_memory([labels], labels=[labels])
    with pytest.raises(DataFault, match="scan 0: label values"):
        LabelledStream(store, [0], CLASSES, SAMPLING)
    with pytest.raises(ValueError, match="no labelled cases"):
        LabelledStream(store, [], CLASSES, SAMPLING)


def test_a_batch_is_a_pure_function_of_seed_and_step(store):
    batches = list(stream_of(store).stream(0, 4))
    (again,) = stream_of(store).stream(2, 3)
    assert torch.equal(again.images, batches[2].images) and torch.equal(again.classes, batches[2].classes)
    assert not torch.equal(again.images, batches[1].images)
    assert not torch.equal(stream_of(store, seed=1).batch(2).images, again.images)


def test_processes_share_a_batch_and_no_crop_is_lost(store):
    whole = stream_of(store).batch(1)
    parts = [LabelledStream(store, [0, 1], CLASSES, SAMPLING, share=(rank, 3)).batch(1) for rank in range(3)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert sum((part.scans for part in parts), ()) == whole.scans
    with pytest.raises(ValueError, match="3 crops cannot be shared evenly by 2 processes"):
        LabelledStream(store, [0, 1], CLASSES, SAMPLING, share=(0, 2))


def test_the_layout_of_a_batch(store):
    batch = stream_of(store).batch(0)
    assert batch.images.shape == batch.classes.shape == (3, 1, 8, 9, 10) and len(batch) == 3
    assert batch.images.dtype == torch.float32 and batch.classes.dtype == torch.int64
    assert batch.classes.min() >= 0 and batch.classes.max() < len(CLASSES)
    moved = batch.to(torch.device("meta"))
    assert moved.images.is_meta and moved.classes.is_meta


def test_image_and_classes_show_the_same_place(store):
    """The scan shows its labels, so that where no border is near, the image tells the class."""
    turned = replace(STILL, flip=(True, True, True), rotation_deg=40.0, zoom=(0.7, 1.4))
    stream, seen = stream_of(store, replace(SAMPLING, views=turned)), 0
    value = torch.tensor([0, 205, 500])
    for step in range(8):
        batch = stream.batch(step)
        shown, told = batch.images, value[batch.classes].float()
        pure = torch.isin(shown, value.float())  # interpolated between equal voxels
        assert torch.equal(shown[pure], told[pure])
        seen += (pure & (told > 0)).sum()
    assert seen > 1000


def test_a_crop_at_rest_is_the_scan_itself(store):
    sampling = replace(SAMPLING, shape=(40, 36, 30), spacing=(1.5, 2.0, 2.5), views=STILL, crops=1)
    batch = stream_of(store, sampling, cases=[0]).batch(0)
    np.testing.assert_array_equal(CLASSES.written(batch.classes[0, 0].numpy()), store.labelled[0])
    np.testing.assert_array_equal(batch.images[0, 0], store.images[0])


def test_each_class_is_the_centre_equally_often(store):
    """The spleen is 750 times smaller than the liver, and yet in half of the crops that look for a structure."""
    sampling = replace(SAMPLING, shape=(4, 4, 4), spacing=(1.0, 1.0, 1.0), views=STILL, foreground=1.0, crops=1)
    stream = stream_of(store, sampling, cases=[0])
    centres = {1: np.argwhere(store.labelled[0] == 205), 2: np.argwhere(store.labelled[0] == 500)}
    rng, near = np.random.default_rng(0), {1: 0, 2: 0}
    for _ in range(300):
        crop = stream.draw(rng)
        centre = (crop.to_mm @ [1.5, 1.5, 1.5, 1])[:3]
        for c, voxels in centres.items():
            # A voxel of the class lies within a quarter of the crop of its centre, on each axis.
            near[c] += (np.abs(voxels * [1.5, 2.0, 2.5] - centre) <= 1 + 1e-9).all(axis=1).any()
    assert sum(near.values()) == 300 and 120 < near[1] < 180


def test_without_foreground_crops_lie_anywhere(store):
    sampling = replace(SAMPLING, shape=(4, 4, 4), spacing=(1.0, 1.0, 1.0), views=STILL, foreground=0.0)
    stream, rng = stream_of(store, sampling, cases=[1]), np.random.default_rng(0)
    centres = np.array([(stream.draw(rng).to_mm @ [1.5, 1.5, 1.5, 1])[:3] for _ in range(300)])
    assert (centres.min(axis=0) < [6, 7, 8]).all() and (centres.max(axis=0) > [52, 64, 66]).all()


def test_a_scan_without_structures_is_cropped_anywhere(in_memory):
    empty = np.zeros((12, 12, 12), dtype=np.uint16)
    store = in_memory([empty], labels=[empty], label_names={205: "liver"})
    batch = LabelledStream(store, [0], classes_of(store), SAMPLING).batch(0)
    assert (batch.classes == 0).all()


def test_crops_stay_in_the_scan_where_they_fit(store):
    stream, rng = stream_of(store, replace(SAMPLING, views=STILL)), np.random.default_rng(1)
    for _ in range(100):
        crop = stream.draw(rng)
        first, last = (crop.to_mm @ [*corner, 1] for corner in ([-0.5] * 3, [7.5, 8.5, 9.5]))
        assert (first[:3] >= np.array([-0.75, -1, -1.25]) - 1e-9).all()
        assert (last[:3] <= np.array([59.25, 71, 73.75]) + 1e-9).all() and crop.intensity.gamma == PLAIN.gamma


def test_the_spots_of_a_class_are_few_and_all_of_it(store):
    liver, spleen = stream_of(store).spots[0]
    assert len(liver) <= REMEMBERED and len(spleen) == 3 * 3 * 2
    voxels = liver / [1.5, 2.0, 2.5]
    np.testing.assert_allclose(voxels, np.round(voxels))
    inside = tuple(np.round(voxels).astype(int).T)
    assert (store.labelled[0][inside] == 205).all()
    np.testing.assert_array_equal(np.round(voxels).astype(int).min(axis=0)[:1], [4])
    assert np.round(voxels).astype(int).max(axis=0)[0] == 29


def test_where_scans_keep_their_own_spacing_crops_have_that_of_their_scan(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "x" / folder).mkdir(parents=True)
    for number, spacing in enumerate([(1.0, 1.0, 2.0), (2.0, 2.0, 3.0)]):
        affine = np.diag([*spacing, 1.0])
        image = rng.integers(0, 900, (20, 20, 14)).astype(np.int16)
        write_volume(tmp_path / "x" / "images" / f"s{number}.nii.gz", image, affine)
        labels = rng.integers(0, 2, (20, 20, 14)).astype(np.uint8)
        write_volume(tmp_path / "x" / "labels" / f"s{number}.nii.gz", labels, affine)
    store = open_scans(tmp_path / "x", tmp_path / "store", Data(spacing="native"), labelled_only=True)
    stream = stream_of(store, replace(SAMPLING, spacing=None, views=STILL))
    rng = np.random.default_rng(1)
    crops = [stream.draw(rng) for _ in range(20)]
    assert {crop.case for crop in crops} == {0, 1}
    for crop in crops:
        assert spacing_of(crop.to_mm) == pytest.approx(store.cases[crop.case].spacing)
