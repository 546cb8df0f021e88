"""A network is shown, where it judges and predicts, what its training showed it: also outside a scan."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dagman import judging, prediction
from dagman.downstream.labelled import Classes
from dagman.downstream.model import SegmentationModel
from dagman.recipes.finetuning import FinetuneSettings
from spade3d.configuration import Network
from spade3d.crops.crop import Crop, cut
from spade3d.recipes.recipe import build_network
from spade3d.training.loop import Task
from spade3d.volumes.geometry import stretch
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.split import Split
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import Grid, read_volume, write_volume

CPU = torch.device("cpu")
SHAPE, WINDOW, SPACING = (30, 40, 29), (48, 48, 48), 1.5
Z_SCORED = Preprocessing(mr="zscore")


def watched() -> tuple[SegmentationModel, list[np.ndarray]]:
    """A model, and what it will be shown."""
    settings, shown = Network(feature_size=12, window=3), []
    network = build_network(settings, out_channels=2)
    of_network = network.forward

    def watching(images):
        shown.append(images[0, 0].numpy().copy())
        return of_network(images)

    network.forward = watching
    return SegmentationModel(network, settings, Classes(("organ",), (1,)), Z_SCORED, WINDOW, 0.5), shown


@pytest.fixture(scope="module")
def shorter(tmp_path_factory) -> VolumeStore:
    """One MR scan that is shorter than the window along every axis, z-scored: its air is not 0."""
    folder = tmp_path_factory.mktemp("shorter")
    rng, (scans, labels) = np.random.default_rng(0), (folder / "imagesTr", folder / "labelsTr")
    scans.mkdir(), labels.mkdir()
    voxels = np.where(np.indices(SHAPE).sum(axis=0) > 40, rng.integers(300, 900, SHAPE), 5).astype(np.int16)
    write_volume(scans / "one.nii.gz", voxels, np.diag([SPACING] * 3 + [1.0]))
    write_volume(labels / "one.nii.gz", (voxels > 600).astype(np.uint8), np.diag([SPACING] * 3 + [1.0]))
    (folder / "dataset.json").write_text(
        '{"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, '
        '"training": [{"image": "./imagesTr/one.nii.gz", "label": "./labelsTr/one.nii.gz"}]}',
        encoding="utf-8",
    )
    return prepare(read_layout(folder), folder / "store", Z_SCORED)


def shown_in_training(store: VolumeStore) -> np.ndarray:
    """The crop of the window's size around the middle of the scan."""
    before = [(whole - size) // 2 for whole, size in zip(WINDOW, SHAPE)]
    return cut(store, Crop(0, WINDOW, stretch(np.full(3, SPACING), -np.array(before) * SPACING)))


@pytest.mark.parametrize("way", ["a look while training", "the judge", "segment", "dagman-predict"])
def test_around_a_short_scan_lies_what_lay_there_in_training(shorter, way):
    (model, shown), case = watched(), shorter.cases[0]
    path = shorter.path.parent / "imagesTr" / "one.nii.gz"
    if way == "a look while training":
        settings = SimpleNamespace(scoring=SimpleNamespace(look_cases=1))
        judging.look(Mock(spec=Task), model, shorter, Split((), (0,), ""), settings, CPU)
    elif way == "the judge":
        judging.segmented(model, shorter, 0, Grid(case.shape, case.affine), FinetuneSettings(), CPU)
    elif way == "segment":
        model.segment(read_volume(path, modality="MR"), CPU)
    else:
        ready = Z_SCORED.prepare(read_volume(path, modality="MR"))
        intensities = ready.normalisation.intensity(ready.voxels)
        prediction.segment(model, intensities, ready, CPU, FinetuneSettings().scoring.segmenting(), frozenset())
    expected = shown_in_training(shorter)
    assert case.normalisation.low < -1 and expected[0, 0, 0] == np.float32(case.normalisation.low)
    assert len(shown) == 1
    np.testing.assert_allclose(shown[0], expected, atol=1e-5)
