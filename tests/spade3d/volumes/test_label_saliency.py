"""Saliency from labels: chosen structures, grown by millimetres, not by voxels."""

import numpy as np
import pytest

from spade3d.faults import UsageFault
from spade3d.volumes.label_saliency import label_map, label_values

LABELS = np.zeros((21, 21, 11), np.uint16)
LABELS[10, 10, 5], LABELS[2, 2, 2] = 3, 5
MM = (1.0, 2.0, 4.0)


def test_a_structure_grows_in_millimetres():
    grown = label_map(LABELS, [3], MM, dilate_mm=4.0, blur_mm=0.0)
    index = np.indices(LABELS.shape)
    distance = np.sqrt(sum(((i - c) * mm) ** 2 for i, c, mm in zip(index, (10, 10, 5), MM, strict=True)))
    assert grown.dtype == np.float32 and np.array_equal(grown > 0, distance <= 4.0)


def test_the_blur_is_a_gaussian_with_its_peak_at_one():
    blurred = label_map(LABELS, [3], MM, dilate_mm=0.0, blur_mm=3.0)
    assert blurred.max() == blurred[10, 10, 5] == 1.0
    assert blurred[13, 10, 5] == pytest.approx(np.exp(-0.5), rel=1e-3)  # 3 mm away
    assert blurred[10, 13, 5] == pytest.approx(np.exp(-2.0), rel=1e-2)  # 6 mm away


def test_an_absent_structure_is_an_empty_map():
    assert not label_map(LABELS, [4], MM, dilate_mm=5.0, blur_mm=5.0).any()
    assert np.count_nonzero(label_map(LABELS, [3, 5], MM, dilate_mm=0.0, blur_mm=0.0)) == 2


def test_structures_go_by_name():
    table = {1: "spleen", 14: "lesion"}
    assert label_values(["Lesion"], table) == (14,) and label_values([], table) == (1, 14)
    with pytest.raises(UsageFault, match="--names brain: not among the store's structures .spleen, lesion."):
        label_values(["lesion", "brain"], table)
