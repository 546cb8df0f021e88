"""Recipes of pretraining: what is left open follows data and device, once and for all; a seed builds one run."""

import numpy as np
import pytest
import torch

from spade3d.configuration import Network, resolve, to_yaml, with_values
from spade3d.faults import DataFault, UsageFault
from spade3d.recipes import choosing
from spade3d.recipes.choosing import check_memory, crop_within, matched_grid, steps_for
from spade3d.recipes.instance import InstanceSettings
from spade3d.recipes.pair_crops import FRAMES, FocusSettings, check_saliency, frames_of, steered
from spade3d.recipes.recipe import find_recipe
from spade3d.recipes.spade import SpadeSettings, choose_spade, spade
from spade3d.scans import open_scans
from spade3d.training import ranks
from spade3d.volumes.body_frame import box_frames
from spade3d.volumes.channels import write_saliency
from spade3d.volumes.phantoms import write_dataset

BOX = with_values(SpadeSettings(), {"crop.frame": "box"})
SMALL = {
    "crop.frame": "box",
    "network.feature_size": 12,
    "crop.shape": (16, 16, 16),
    "steps": 2,
    "contrast.local_memory": 16,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearts")
    write_dataset("heart-mr", folder / "scans", patients=0, unlabelled=3, seed=2, shape=(40, 32, 24))
    return open_scans(folder / "scans", folder / "store", SpadeSettings().data)


def open_keys(values: dict, path: str = "") -> set[str]:
    """The dotted keys that still are None."""
    found = {path + key for key, value in values.items() if value is None}
    return found.union(*(open_keys(v, f"{path}{k}.") for k, v in values.items() if isinstance(v, dict)))


def test_recipes_are_found_by_name():
    assert find_recipe("spade") is spade
    with pytest.raises(UsageFault, match="recipe 'spode' is not known; one of: .*spade"):
        find_recipe("spode")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_left_open_and_choosing_again_changes_nothing(store, device, tmp_path):
    settings = SpadeSettings()
    assert open_keys(settings.model_dump()) >= {"steps", "crop.shape", "network.feature_size", "contrast.far_mm"}
    chosen = choose_spade(settings, store, (0, 1, 2), device)
    assert open_keys(chosen.model_dump()) == {"data.path", "hold_out", "loaders"}
    assert chosen.device == device and chosen.data.spacing == store.preprocessing.spacing
    (tmp_path / "config.yaml").write_text(to_yaml(chosen))
    again = resolve(SpadeSettings, [tmp_path / "config.yaml"], {}, environment={})
    assert again == chosen == choose_spade(again, store, (0, 1, 2), device)


def test_what_is_chosen_follows_data_and_device(store):
    on_cpu, on_gpu = (choose_spade(SpadeSettings(), store, (0, 1, 2), device) for device in ("cpu", "cuda"))
    assert on_cpu.crop.shape == on_gpu.crop.shape == (24, 24, 16)  # two thirds of 40 x 32 x 24, in steps of 8
    assert (on_cpu.network.feature_size, on_gpu.network.feature_size) == (24, 48)
    assert on_gpu.steps == 50_000 and 50 <= on_cpu.steps <= 2000
    edge_mm = np.prod(np.array((24, 24, 16)) * on_cpu.data.spacing) ** (1 / 3)
    assert on_cpu.contrast.far_mm == pytest.approx(edge_mm / 2, abs=0.06)
    assert on_cpu.contrast.far_local_mm == pytest.approx(edge_mm / 4, abs=0.06)


def test_what_was_given_stays(store):
    given = {"crop.shape": (8, 16, 8), "network.feature_size": 36, "contrast.far_mm": 7.0, "steps": 3, "save_every": 2}
    chosen = choose_spade(with_values(SpadeSettings(), given), store, (0, 1, 2), "cpu").model_dump()
    for dotted, value in given.items():
        place = chosen
        for key in dotted.split("."):
            place = place[key]
        assert place == value


def test_what_was_given_must_go_with_what_is_chosen(store):
    odd = SpadeSettings(network=Network(heads=(5, 10, 20, 40)))
    with pytest.raises(UsageFault, match="5 heads cannot share the 24 channels of stage 1 evenly"):
        choose_spade(odd, store, (0, 1, 2), "cpu")


def test_what_no_memory_can_hold_is_refused_on_a_cpu(monkeypatch):
    """The system killed such a run without a word."""
    monkeypatch.setattr(choosing, "usable_memory", lambda: 24 * 2**30)
    said = (
        "crops of 900 x 900 x 900 voxels, 4 at once, by a network of feature size 24 take more than 782 GiB, and .* 24;"
    )
    with pytest.raises(UsageFault, match=said):
        check_memory((900, 900, 900), 4, 24, "cpu")
    check_memory((900, 900, 900), 4, 24, "cuda")  # says so itself
    check_memory((128, 128, 128), 8, 48, "cpu")
    with pytest.raises(UsageFault, match="64 at once"):
        check_memory((128, 128, 128), 64, 48, "cpu")
    monkeypatch.setattr(ranks, "world", lambda: 8)
    check_memory((128, 128, 128), 64, 48, "cpu")


def test_crops_and_steps_by_hand():
    assert crop_within(np.array([100.0, 3.0, 36.5]), (1.0, 1.0, 1.0), side=96) == (96, 8, 40)  # all of it: it is small
    assert crop_within(np.array([512.0, 512.0, 300.0]), (1.0, 1.0, 1.0), side=96) == (96, 96, 96)
    assert crop_within(np.array([512.0, 512.0, 60.0]), (0.8, 0.8, 5.0), side=96) == (176, 176, 32)  # 141 mm, in eights
    assert crop_within(np.array([256.0, 256.0, 9.0]), (1.4, 1.4, 8.0), side=64) == (128, 128, 8)  # all slices
    assert steps_for(1e6, 24, "cpu", 600.0, on_gpu=7) == 100  # 6 s a million voxels
    assert steps_for(1e6, 48, "cpu", 2400.0, on_gpu=7) == 100  # four times as much at twice the width
    assert steps_for(1e9, 24, "cpu", 1.0, on_gpu=7) == 50 and steps_for(1.0, 24, "cpu", 600.0, on_gpu=7) == 2000
    assert steps_for(1e6, 24, "cuda", 1.0, on_gpu=7) == 7


def test_frames_put_the_middle_of_every_body_at_zero(store):
    frames = frames_of(BOX, store, (0, 2))
    assert frames.keys() == {0, 2}
    for i, frame in frames.items():
        middle = np.mean(store.cases[i].body_box_mm, axis=0)
        np.testing.assert_allclose(frame @ [*middle, 1.0], [0, 0, 0, 1], atol=1e-9)


def test_frames_are_found_once_and_kept_with_the_run(store, tmp_path, monkeypatch):
    found = frames_of(BOX, store, (0, 1, 2), tmp_path)
    monkeypatch.setattr("spade3d.recipes.placing.place_scans", None)
    again = frames_of(BOX, store, (0, 1, 2), tmp_path)
    assert all(np.array_equal(found[i], again[i]) for i in (0, 1, 2))
    with pytest.raises(DataFault, match="holds box frames.*of another kind than affine; remove it"):
        frames_of(SpadeSettings(), store, (0, 1, 2), tmp_path)
    assert (tmp_path / FRAMES).is_file()


def test_a_scan_that_cannot_be_placed_is_noted_and_learns_alone(store, monkeypatch, capsys):
    def lost(store, cases, method, **_):
        return {i: None if i == 1 else frame for i, frame in zip(cases, made, strict=True)}

    made = box_frames([case.body_box_mm for case in store.cases])
    monkeypatch.setattr("spade3d.recipes.placing.place_scans", lost)
    frames = frames_of(BOX, store, (0, 1, 2))
    assert frames[1] is None and frames[2] is not None
    assert f"1 of 3 scans could not be placed in the body ({store.cases[1].name})" in capsys.readouterr().err


def test_the_same_seed_builds_the_same_run(store):
    def built(seed):
        settings = choose_spade(with_values(SpadeSettings(), SMALL | {"seed": seed}), store, (0, 1, 2), "cpu")
        made = spade.build(settings, store, (0, 2))
        return made.task.student.state_dict(), made.batches.batch(1), made

    (weights, batch, made), (again, batch2, _), (other, batch3, _) = built(0), built(0), built(1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert torch.equal(batch.student, batch2.student) and not torch.equal(batch.student, batch3.student)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights.items())
    assert batch.student.shape == (8, 1, 16, 16, 16) and {"a", "b", "spacing"} <= made.pictures().keys()
    assert made.network is made.task.student.network
    losses = made.task.losses(batch, 0.5)
    assert losses.keys() == {"global", "local", "restoration"}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("shape", "spacing", "grid"),
    [((24, 32, 24), (1.0, 1.0, 1.0), (6, 8, 6)), ((96, 96, 8), (1.37, 1.37, 8.0), (13, 13, 6))],
)
def test_places_are_matched_in_cubes_of_mm(shape, spacing, grid):
    assert matched_grid(shape, spacing) == grid


def test_the_controls_are_values_of_one_setting(store):
    weights, others = {}, []
    for control in ("restoration", "instance", "positives", "negatives", "both", "shuffled"):
        asked = with_values(SpadeSettings(), SMALL | {"contrast.selection": control})
        chosen = choose_spade(asked, store, (0, 1, 2), "cpu")
        contrast = chosen.contrast.model_dump()
        weights[control] = [contrast[f"{scope}_weight"] for scope in ("global", "local", "restoration")]
        made = spade.build(chosen, store, (0, 1, 2))
        terms = list(made.task.losses(made.batches.batch(0), 0.0))
        assert terms == [name for name in ("global", "local", "restoration") if contrast[f"{name}_weight"]]
        others.append(chosen.model_dump(exclude={"contrast": {"selection", "global_weight", "local_weight"}}))
    assert all(other == others[0] for other in others)
    assert weights.pop("restoration") == [0, 0, 1]
    assert all(weight == weights["both"] for weight in weights.values())


def test_restoration_alone_takes_no_weight_for_a_contrast():
    with pytest.raises(UsageFault, match="selection restoration has no contrast"):
        resolve(SpadeSettings, [], {"contrast": {"selection": "restoration", "local_weight": 1.0}}, environment={})


@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_instance_baselines_differ_from_spade_in_their_task_only(store, method):
    recipe = find_recipe(method)
    chosen = recipe.choose(with_values(recipe.settings(), {"network.feature_size": 12}), store, (0, 1, 2), "cpu")
    assert open_keys(chosen.model_dump()) == {"data.path", "hold_out", "loaders"} and chosen.recipe == method
    of_spade = choose_spade(with_values(SpadeSettings(), {"network.feature_size": 12}), store, (0, 1, 2), "cpu")
    assert chosen.crop.shape == of_spade.crop.shape and chosen.optim == of_spade.optim
    made = recipe.build(chosen, store, (0, 1, 2))
    batch = made.batches.batch(0)
    spades = spade.build(of_spade, store, (0, 1, 2)).batches.batch(0)
    assert batch.student.shape == spades.student.shape  # four pairs of crops: as many as two anchors in two scans
    assert list(made.task.losses(batch, 0.0)) == [method]
    assert made.network is made.task.student.network


def test_a_teacher_without_momentum_is_what_was_asked_for(store):
    asked = with_values(SpadeSettings(), SMALL | {"contrast.momentum": 0.0})
    assert choose_spade(asked, store, (0, 1, 2), "cpu").contrast.momentum == 0.0


def test_one_instance_a_batch_is_refused_at_once():
    with pytest.raises(UsageFault, match=r"one instance tells nothing apart; crop\.anchors of 2 or more"):
        resolve(InstanceSettings, [], {"crop": {"anchors": 1}}, environment={})


def test_where_the_saliency_comes_from_is_said(tmp_path, capsys):
    write_dataset("heart-mr", tmp_path / "scans", patients=0, unlabelled=3, seed=2, shape=(40, 32, 24))
    store = open_scans(tmp_path / "scans", tmp_path / "store", SpadeSettings().data)
    looked = np.zeros(store.cases[0].shape)
    looked[20, 16, 12] = 1.0
    store = write_saliency(tmp_path / "store", {store.cases[0].name: looked}, "gaze")
    capsys.readouterr()
    check_saliency(FocusSettings(views="focused"), store, (0, 1, 2))
    steers = {
        views: steered(SpadeSettings(focus={"views": views}), store, (0, 1, 2)) for views in ("focused", "random")
    }
    assert steers == {"focused": {0: "gaze"}, "random": {}}
    said = capsys.readouterr().err
    assert "focused views; saliency from gaze (1 scans)" in said and "nothing is salient in 2 of 3 scans" in said
    with pytest.raises(DataFault, match="shuffled needs the saliency of two patients"):
        check_saliency(FocusSettings(views="shuffled"), store, (0, 1, 2))


def test_an_empty_saliency_falls_back_to_ordinary_views_and_says_so_once(tmp_path, capsys):
    write_dataset("heart-mr", tmp_path / "scans", patients=0, unlabelled=3, seed=2, shape=(40, 32, 24))
    store = open_scans(tmp_path / "scans", tmp_path / "store", SpadeSettings().data)
    empty = {case.name: np.zeros(case.shape, dtype=np.float32) for case in store.cases[:2]}
    store = write_saliency(tmp_path / "store", empty, "gaze")
    batches = []
    for views in ("focused", "ordinary"):
        asked = with_values(SpadeSettings(), SMALL | {"focus.views": views})
        capsys.readouterr()
        chosen = choose_spade(asked, store, (0, 1, 2), "cpu")
        batches.append(spade.build(chosen, store, (0, 1, 2)).batches.batch(1))
        said = capsys.readouterr().err
        assert said.count("is empty; --focus.views focused falls back to ordinary views") == (views == "focused")
    assert torch.equal(batches[0].student, batches[1].student) and batches[0].realised == {}


@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_focus_plugs_into_instance_discrimination(tmp_path, method):
    """It changes the views: they keep what their parent shows, and all four of an instance have one parent."""
    write_dataset("heart-mr", tmp_path / "scans", patients=0, unlabelled=3, seed=2, shape=(40, 32, 24))
    store = open_scans(tmp_path / "scans", tmp_path / "store", SpadeSettings().data)
    looked = {case.name: np.zeros(case.shape, dtype=np.float32) for case in store.cases}
    for marks in looked.values():
        marks[18:22, 14:18, 10:14] = 1.0
    store, recipe = write_saliency(tmp_path / "store", looked, "gaze"), find_recipe(method)
    small, batches = {key: value for key, value in SMALL.items() if not key.startswith("contrast")}, {}
    for views in ("ordinary", "focused"):
        asked = with_values(recipe.settings(), small | {"focus.views": views, "focus.salient_chance": 1.0})
        built = recipe.build(recipe.choose(asked, store, (0, 1, 2), "cpu"), store, (0, 1, 2))
        batches[views] = built.batches
    assert batches["ordinary"].batch(0).realised == {} and batches["focused"].sampling.one_parent
    for step in range(3):
        batch = batches["focused"].batch(step)
        assert batch.realised["least_retention"] >= 0.8 and batch.realised["from_gaze"] > 0
        assert not torch.equal(batch.student, batches["ordinary"].batch(step).student)
        assert built.task.losses(batch, 0.0)[method].isfinite()


def test_numbers_of_focus_without_focus_are_said_to_change_nothing(store, capsys):
    check_saliency(FocusSettings(zoom=(1.0, 3.0)), store, (0, 1, 2))
    assert "views are ordinary, so focus.zoom changes nothing; give --focus.views focused" in capsys.readouterr().err
    check_saliency(FocusSettings(), store, (0, 1, 2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("crop", "said"),
    [
        ({"hidden": 0.5}, "crop.hidden hides nothing in simclr"),
        ({"frame": "affine"}, "places select nothing in simclr"),
    ],
)
def test_instance_discrimination_refuses_what_it_does_not_read(crop, said):
    with pytest.raises(ValueError, match=said):
        find_recipe("simclr").settings(crop=crop)


def test_focused_views_need_a_saliency(store):
    asked = with_values(SpadeSettings(), SMALL | {"focus.views": "focused"})
    with pytest.raises(DataFault, match="none of the 3 scans has a saliency.*spade-saliency"):
        choose_spade(asked, store, (0, 1, 2), "cpu")
    chosen = choose_spade(with_values(asked, {"focus.views": "centre"}), store, (0, 1, 2), "cpu")
    centred = spade.build(chosen, store, (0, 1, 2)).batches.batch(0)
    assert 1 <= centred.realised["zoom"] <= 2 and centred.realised["least_retention"] >= 0.8
    assert spade.build(with_values(chosen, {"focus.views": "ordinary"}), store, (0,)).batches.batch(0).realised == {}
