"""What is left open of a run of studies follows its scans: window, low resolution, network, steps, head."""

from pathlib import Path

import numpy as np
import pytest

from dagman.recipes.studies import StudySettings, choose, head_settings, trained_crop, windows_of
from spade3d.configuration import read_yaml, resolve, to_yaml
from spade3d.crops.crop import body_bounds
from spade3d.faults import UsageFault
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.store import VolumeStore


@pytest.fixture
def store(in_memory):
    """Thirty scans of 60 x 50 x 40 voxels of 3 mm, the last one larger."""
    shapes = [(60, 50, 40)] * 29 + [(70, 50, 40)]
    made = object.__new__(VolumeStore)  # its cases are all that is asked for
    made.cases = in_memory([np.zeros(shape) for shape in shapes], spacing=(3.0, 3.0, 3.0)).cases
    made.preprocessing = Preprocessing(spacing=(3.0, 3.0, 3.0))
    return made


def test_cached_windows_and_steps(store):
    chosen = choose(StudySettings(), store, range(30), "cpu")
    assert chosen.crop.shape == (64, 48, 32)  # the typical scan, to the nearest multiples of 16
    assert (chosen.head, chosen.studies, chosen.low_mm) == ("attention", 8, None)
    assert chosen.steps == round(60 * 30 / 8) == 225
    assert choose(StudySettings(), store, range(5), "cuda").steps == 200
    assert choose(StudySettings(task="localisation"), store, range(5), "cpu").head == "clarity"
    windows = windows_of(chosen)
    assert (windows.shape, windows.spacing, windows.overlap) == ((64, 48, 32), (3.0, 3.0, 3.0), 0.5)


@pytest.mark.parametrize("mm", [None, 5.0])
def test_the_largest_body_fits_in_a_whole_one(store, mm):
    chosen = choose(StudySettings(arrangement="whole", tuning="full", low_mm=mm), store, range(30), "cpu")
    body = np.diff(body_bounds(store.cases[29]), axis=0)[0]
    shown = np.array(chosen.crop.shape) * chosen.low_mm
    assert (shown >= body - 1e-6).all() and (shown < body + 16 * chosen.low_mm).all()
    assert chosen.low_mm == (mm or 3.0)  # never finer than the scan
    assert windows_of(chosen).spacing == (chosen.low_mm,) * 3


def test_a_whole_body_fits_in_the_crop_that_is_given(store):
    chosen = choose(StudySettings(arrangement="whole", crop={"shape": (32, 32, 48)}), store, range(30), "cpu")
    body = np.diff(body_bounds(store.cases[29]), axis=0)[0]
    assert chosen.low_mm == pytest.approx((body / (32, 32, 48)).max(), abs=1e-3)
    assert (np.array(chosen.crop.shape) * chosen.low_mm >= body - 1e-6).all()
    assert choose(chosen, store, range(30), "cpu") == chosen
    with pytest.raises(UsageFault, match="does not hold the largest body"):
        choose(StudySettings(arrangement="whole", low_mm=4, crop={"shape": (32, 32, 48)}), store, range(30), "cpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clarity": {"dim": 24}}, "the head is attention; --head clarity has it"),
        ({"task": "localisation", "attention": {"dim": 24}}, "the head is clarity; --head attention has it"),
        ({"crop": {"rotation_deg": 5}}, "cached tokens are of scans as they are"),
        ({"arrangement": "whole", "crop": {"crops": 2}}, "crop.crops are of --arrangement bag"),
        ({"encoder_lr": 0.5}, "encoder_lr is of an encoder that learns"),
    ],
)
def test_options_that_would_do_nothing_are_refused(given, said):
    with pytest.raises(UsageFault, match=said):
        resolve(StudySettings, [], given, environment={})


def test_a_chosen_run_says_all_and_can_be_read_back(store, tmp_path):
    chosen = choose(StudySettings(arrangement="bag"), store, range(30), "cpu")
    (tmp_path / "config.yaml").write_text(to_yaml(chosen))
    assert resolve(StudySettings, [tmp_path / "config.yaml"], {}, environment={}) == chosen
    assert choose(chosen, store, range(30), "cpu") == chosen
    assert {"crop", "steps", "studies", "head", "save_every"} <= read_yaml(tmp_path / "config.yaml").keys()


def test_scans_of_their_own_spacing_are_refused(store):
    store.preprocessing = Preprocessing()
    with pytest.raises(UsageFault, match="cells are as large in every study; prepare another"):
        choose(StudySettings(), store, range(30), "cpu")


def test_only_a_bag_that_trains_is_made_of_crops():
    names = ("lump", "cyst")
    for arrangement, judging, crops in (("bag", False, 4), ("bag", True, 1), ("cached", False, 1)):
        how = head_settings(StudySettings(head="clarity", arrangement=arrangement), names, judging=judging)
        assert how["crops"] == crops
    assert head_settings(StudySettings(head="linear"), names, judging=True) == {}


def test_the_window_is_the_crop_that_an_encoder_was_trained_with(tmp_path: Path):
    encoder = tmp_path / "encoder.safetensors"
    assert trained_crop(None) is None and trained_crop(str(encoder)) is None
    (tmp_path / "config.yaml").write_text("crop: {shape: [96, 90, 12]}\n")
    assert trained_crop(str(encoder)) == (96, 96, 16)
