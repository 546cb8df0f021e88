"""The recipes of DAGMaN: its ladder, its sizes, what is refused before a run begins, and what a run leaves behind."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dagman.attention.semantic_file import SEMANTIC, load_semantic
from dagman.attention_prediction import attention_of_run
from dagman.recipes.distillation import (
    GUIDED,
    VARIANTS,
    check_terms,
    chosen_distillation,
    cost_of,
    dagman,
    paper,
    small,
    stage_for,
    tiny,
)
from dagman.recipes.distillation_settings import DagmanSettings, DistillSettings, PaperSettings
from dagman.recipes.spade_dagman import SpadeDagmanSettings, spade_dagman
from spade3d.commands import ENCODER, pretrain
from spade3d.configuration import resolve, to_yaml, with_values
from spade3d.faults import DataFault, UsageFault
from spade3d.networks.foreign import describe_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.recipes import choosing
from spade3d.recipes.recipe import find_recipe
from spade3d.scans import open_scans
from spade3d.training.journal import read_log
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.volume import write_volume

SMALL = {
    "crop.frame": "box",
    "crop.shape": (32, 32, 32),
    "crop.anchors": 2,
    "network.feature_size": 12,
    "network.heads": (2, 2, 2, 2),
    "distill.stage": 2,
    "distill.semantic_heads": 4,
    "distill.head_width": 16,
    "steps": 2,
}
CASES = (0, 1, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearts")
    write_dataset("heart-mr", folder / "scans", patients=2, unlabelled=1, seed=2, shape=(48, 48, 40))
    return open_scans(folder / "scans", folder / "store", DagmanSettings().data)


def open_keys(values, path=""):
    found = {path + key for key, value in values.items() if value is None}
    return found.union(*(open_keys(v, f"{path}{k}.") for k, v in values.items() if isinstance(v, dict)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["dagman", "dagman-tiny", "dagman-small", "dagman-paper", "spade-dagman"])
def test_nothing_is_left_open_and_choosing_again_changes_nothing(store, device, name, tmp_path):
    recipe = find_recipe(name)
    chosen = recipe.choose(with_values(recipe.settings(), {"crop.shape": (48, 48, 40)}), store, CASES, device)
    unclipped = {"optim.clip_norm"} if name == "dagman-paper" else set()  # an answer: SMIT's code does not clip
    assert (
        open_keys(chosen.model_dump())
        == {"data.path", "hold_out", "loaders", "prior.folder", "prior.regions", "prior.sigma_mm"} | unclipped
    )
    assert chosen.device == device and chosen.recipe == name
    (tmp_path / "config.yaml").write_text(to_yaml(chosen))
    again = resolve(recipe.settings, [tmp_path / "config.yaml"], {}, environment={})
    assert again == chosen == recipe.choose(again, store, CASES, device)
    assert recipe.said(chosen)


def test_the_ladder_differs_in_what_its_arms_are_named_after():
    arms = {
        arm: chosen_distillation(DagmanSettings().distill.model_copy(update={"variant": arm}), (96,) * 3, "cpu")
        for arm in VARIANTS
    }
    said = {arm: (of.masking, of.semantic, of.patch_dropout) for arm, of in arms.items()}
    assert said["dagman"] == ("attention", True, 0.7)
    assert said["semantic"] == ("attention", True, 0.0)
    assert said["noisy"] == ("random", False, 0.7)
    assert said["smit"] == ("random", False, 0.0)
    assert said["ibot"] == ("block", False, 0.0)
    assert said["attmask"] == ("attmask", True, 0.0) and arms["attmask"].hint == pytest.approx(0.07)
    assert said["mst"] == ("low", True, 0.0)
    assert said["dino"] == ("none", True, 0.0)
    assert len(set(said.values())) == len(VARIANTS)
    rest = {arm: of.model_dump(exclude={"variant", "masking", "semantic", "patch_dropout"}) for arm, of in arms.items()}
    assert all(rest[arm] == rest["dagman"] for arm in ("semantic", "noisy", "smit", "ibot", "mst"))


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ({"masking": "attmask"}, 0.07),
        ({"variant": "attmask", "ratio": 0.4}, 0.04),
        ({"variant": "attmask", "hint": 0.02}, 0.02),
        ({"variant": "attmask", "masking": "attention"}, 0.1),
    ],
)
def test_attmask_shows_a_tenth_of_what_is_selected(said, hint):
    chosen = chosen_distillation(DistillSettings(**said), (96,) * 3, "cpu")
    assert chosen.hint == pytest.approx(hint)
    chosen_again = chosen_distillation(chosen, (96,) * 3, "cpu")
    assert chosen_again == chosen


def test_a_hint_that_nobody_gave_refuses_no_ratio():
    distill = chosen_distillation(DistillSettings(variant="attmask", ratio=0.07), (96,) * 3, "cpu")
    check_terms(distill, (96,) * 3, 24, pairs=2)


def test_what_is_said_beside_a_variant_stays():
    settings = resolve(
        DagmanSettings, [], {"distill": {"variant": "smit", "semantic": True, "hint": 0.0}}, environment={}
    )
    chosen = chosen_distillation(settings.distill, (96, 96, 96), "cuda")
    assert chosen.semantic and chosen.hint == 0 and chosen.masking == "random" and chosen.prototypes == 8192


@pytest.mark.parametrize(
    ("crop", "stage"),
    [((128,) * 3, 3), ((48,) * 3, 3), ((24, 32, 24), 2), ((128, 128, 8), 3), ((64, 64, 8), 2), ((16, 16, 16), 1)],
)
def test_small_crops_attend_at_an_earlier_stage(crop, stage):
    assert stage_for(crop) == stage


def test_the_papers_setting():
    settings = PaperSettings()
    network = settings.network
    assert settings.crop.shape == (128, 128, 128) and settings.data.spacing == (2.0, 2.0, 2.0)
    assert (network.window, network.depths, network.heads) == (4, (2, 2, 8, 2), (4, 4, 8, 16))
    assert settings.optim.lr == 8e-4 and settings.optim.warmup == 0.1 and settings.distill.ratio == 0.7


def test_the_published_parameter_counts():
    """64,698,114 with the decoder for two classes, 10,573,408 the encoder. SMIT's code (models/Trans.py) has a layer
    norm after the patch embedding and one with weights on the output of each stage; MONAI's and ours have neither. All
    else is equal."""
    norms = 2 * 48 + 2 * (48 + 96 + 192 + 384)
    network = SwinUNETR(out_channels=2, **PaperSettings().network.model_dump())
    counts = [sum(p.numel() for p in part.parameters()) for part in (network, network.swinViT)]
    assert counts == [64_698_114 - norms, 10_573_408 - norms]


def test_the_papers_run_is_as_many_epochs_whatever_the_number_of_scans(store, monkeypatch):
    chosen = paper.choose(PaperSettings(), store, CASES, "cuda")
    assert chosen.steps == 800  # 3 scans in batches of 32 are one step an epoch
    monkeypatch.setattr(choosing, "usable_memory", lambda: 64 * 2**30)
    with pytest.raises(UsageFault, match="crops of 128 x 128 x 128 voxels, 64 at once"):
        paper.choose(PaperSettings(), store, CASES, "cpu")
    monkeypatch.setattr(choosing, "usable_memory", lambda: 2**40)
    on_cpu = paper.choose(PaperSettings(), store, CASES, "cpu")
    assert on_cpu.steps == 800 and on_cpu.distill == chosen.distill
    said = chosen.distill
    assert (said.head_width, said.bottleneck, said.prototypes, said.momentum) == (2048, 256, 8192, 0.996)
    assert not said.standardise


def test_sizes_do_not_follow_the_device(store):
    for recipe, width, hidden in ((tiny, 24, 256), (small, 48, 2048)):
        for device in ("cpu", "cuda"):
            chosen = recipe.choose(with_values(DagmanSettings(), {"distill.stage": 2}), store, CASES, device)
            assert chosen.network.feature_size == width and chosen.distill.head_width == hidden


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"crop.shape": (16, 16, 16), "distill.stage": 3}, "has one token at stage 3, of which nothing can be masked"),
        (
            {"crop.shape": (16, 16, 16), "distill.stage": 3, "distill.variant": "dino"},
            "one token at stage 3, of which .CLS. cannot choose any to look at; give a --crop.shape above 16 voxels",
        ),
        ({"distill.stage": 4, "distill.variant": "dino"}, "32 x 32 x 32 voxels has one token at stage 4"),
        (
            {
                "crop.shape": (16, 16, 16),
                "distill.stage": 3,
                "distill.variant": "noisy",
                "distill.masking": "none",
                "distill.dropped": "cell",
            },
            "--distill.patch_dropout 0.7 of the cells of stage 3 in a crop, 1, drops none, and the noisy teacher would "
            "be clean; give",
        ),
        ({"distill.patch_dropout": 1e-4}, "of the tokens in a crop, 4096, drops none"),
        ({"distill.ratio": 0.01, "distill.hint": 0.0}, "hides 0 of 64 cells on the grid 4 x 4 x 4: nothing"),
        ({"distill.ratio": 1.0, "distill.hint": 0.0}, "hides 64 of 64 cells"),
        ({"distill.hint": 0.8}, "hints of 0.8 of the cells do not fit into a mask ratio of 0.7"),
        ({"distill.masking": "none", "distill.token_weight": 0.1}, "masking none hides nothing"),
        (
            {"distill.variant": "dino", "distill.image_weight": 0.0, "distill.global_weight": 0.0},
            "every weight is 0, so there is nothing to learn from",
        ),
        (
            {"distill.variant": "smit", "prior.source": "bands"},
            "--prior.attachment semantic guides the .CLS. row, and there is none",
        ),
        ({"distill.semantic_heads": 7}, "7 heads cannot share the 48 channels of stage 2"),
        ({"prior.source": "atlas"}, "7 regions .* would guide more than half of 4 heads"),
        ({"distill.drop_hidden": True, "network.use_v2": True}, "knows no convolutions"),
        (
            {"distill.drop_hidden": True, "prior.source": "bands", "prior.attachment": "native"},
            "--distill.drop_hidden leaves the hidden ones out",
        ),
        ({"compile": True, "prior.source": "bands", "prior.attachment": "windowed"}, "do without --compile"),
        ({"crop.anchors": 1}, "a batch of one pair of crops: .* give --crop.anchors of 2 or more"),
        (
            {"prior.source": "bands", "prior.attachment": "native", "prior.stage": 2},
            "stage 2 has 8 x 8 x 8 cells of a crop, and none looks beyond its window of 4; give --prior.attachment "
            "windowed, a later --prior.stage, or a --network.window of 8",
        ),
        (
            {"crop.shape": (16, 16, 16), "prior.source": "bands", "prior.attachment": "native", "prior.stage": 4},
            "a crop of 16x16x16 voxels is one cell of 16x16x16",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_run(store, given, message):
    with pytest.raises(UsageFault, match=message):
        dagman.choose(with_values(DagmanSettings(), SMALL | given), store, CASES, "cpu")


@pytest.mark.parametrize(
    "spared", [{"distill.standardise": False}, {"distill.image_weight": 0.0, "distill.global_weight": 0.0}]
)
def test_one_pair_is_enough_where_nothing_is_standardised_over_pairs(store, spared):
    assert dagman.choose(with_values(DagmanSettings(), SMALL | {"crop.anchors": 1} | spared), store, CASES, "cpu")


def test_the_scans_around_an_anchor_are_pairs_too(store):
    given = SMALL | {"crop.anchors": 1}
    assert spade_dagman.choose(with_values(SpadeDagmanSettings(), given | {"crop.scans": 2}), store, CASES, "cpu")
    for alone in ({"crop.scans": 1}, {"crop.scans": 2}):
        cases = CASES if alone["crop.scans"] == 1 else CASES[:1]
        with pytest.raises(UsageFault, match="a batch of one pair of crops"):
            spade_dagman.choose(with_values(SpadeDagmanSettings(), given | alone), store, cases, "cpu")


@pytest.mark.parametrize(("attachment", "stage"), [("native", 3), ("windowed", 2)])
def test_heads_of_a_stage_are_guided_where_a_window_holds_the_crop_or_window_by_window(store, attachment, stage):
    prior = {"prior.source": "bands", "prior.attachment": attachment, "prior.stage": stage}
    assert dagman.choose(with_values(DagmanSettings(), SMALL | prior), store, CASES, "cpu")


@pytest.mark.parametrize(
    ("tree", "given", "message"),
    [
        (DagmanSettings, {"distill": {"mask_token": True, "drop_hidden": True}}, "choose one"),
        (DagmanSettings, {"distill": {"token_weight": 0.1, "drop_hidden": True}}, "drop_hidden does not compute"),
        (SpadeDagmanSettings, {"distill": {"symmetric": False}}, "Spade needs a look at each"),
        (SpadeDagmanSettings, {"distill": {"drop_hidden": True}}, "Spade's decoder needs"),
        (SpadeDagmanSettings, {"crop": {"hidden": 0.5}}, "leave it at 0"),
        (SpadeDagmanSettings, {"distill": {"momentum": 0.9}}, "give that instead"),
        (DagmanSettings, {"crop": {"hidden": 0.5}}, "leave it at 0"),
        (DagmanSettings, {"distill": {"teacher_temperature": [0.07, 0.04]}}, "lower end"),
        (SpadeDagmanSettings, {"contrast": {"selection": "shuffled"}, "crop": {"anchors": 1}}, "2 or more are needed"),
        (SpadeDagmanSettings, {"contrast": {"selection": "restoration"}}, "give contrast.restoration_weight"),
        (DagmanSettings, {"prior": {"regions": ["liver"]}}, "say where their priors come from"),
        (
            DagmanSettings,
            {"prior": {"wrong": "permuted"}},
            "wrong permuted is a control with a prior, .* leave wrong out",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tree, given, message):
    with pytest.raises(UsageFault, match=message):
        resolve(tree, [], given, environment={})


def notes_of(capsys, about):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"note: {about}")]


@pytest.mark.parametrize(
    ("shape", "stages"), [((32, 32, 32), "stage 4"), ((16, 16, 16), "stages 3 and 4"), ((40, 32, 32), None)]
)
@pytest.mark.parametrize("recipe", [dagman, spade_dagman])
def test_later_stages_of_one_token_are_said(store, capsys, recipe, shape, stages):
    given = SMALL | {"crop.shape": shape, "distill.stage": 1}
    recipe.choose(with_values(recipe.settings(), given), store, CASES, "cpu")
    said = notes_of(capsys, "a crop of")
    assert len(said) == (stages is not None)
    assert stages is None or f"is one token at {stages}, where" in said[0] and "above 32 voxels" in said[0]


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        (
            {"prior.weight": 1.0, "prior.kind": "dice", "prior.attachment": "native"},
            "prior.attachment, prior.kind, prior.weight (prior.source is none)",
        ),
        (
            {
                "prior.source": "bands",
                "prior.likelihood": "location",
                "prior.sigma_mm": 5.0,
                "prior.labelled": 2,
                "prior.stage": 3,
            },
            "prior.likelihood, prior.sigma_mm (only prior.source atlas and one_label read it); prior.labelled (only "
            "prior.source atlas takes several labelled scans); prior.stage (prior.attachment semantic reads the stage "
            "of distill.stage)",
        ),
        (
            {"prior.source": "one_label", "prior.likelihood": "location", "prior.labelled": 2},
            "prior.labelled (only prior.source atlas takes several labelled scans)",
        ),
        (
            {"distill.variant": "dino", "distill.ratio": 0.5, "distill.hint": 0.2, "distill.mask_token": True},
            "distill.ratio, distill.hint, distill.mask_token (distill.masking is none)",
        ),
        ({"distill.variant": "dino", "distill.drop_hidden": True}, "distill.drop_hidden (distill.masking is none)"),
        (
            {
                "distill.variant": "smit",
                "distill.attention_from": "noisy",
                "distill.dropped": "cell",
                "distill.semantic_blocks": 1,
                "distill.semantic_heads": 4,
            },
            "distill.attention_from (no mask follows attention); distill.dropped (distill.patch_dropout is 0); "
            "distill.semantic_blocks, distill.semantic_heads (there is no semantic attention)",
        ),
        (
            {"distill.variant": "semantic", "distill.attention_from": "noisy"},
            "distill.attention_from (the teacher has one look, a clean one)",
        ),
    ],
)
def test_given_values_that_change_nothing_are_said_in_one_line(store, capsys, given, idle):
    regions = ("left ventricle",) if "one_label" in given.values() else None
    given = SMALL | {"distill.semantic_heads": 8, "prior.regions": regions} | given
    for recipe in (dagman,) if given.get("distill.drop_hidden") else (dagman, spade_dagman):  # which refuses it
        chosen = recipe.choose(with_values(recipe.settings(), given), store, CASES, "cpu")
        recipe.choose(chosen, store, CASES, "cpu")
        assert notes_of(capsys, "given,") == 2 * [f"note: given, but without effect in this run: {idle}"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"distill.mask_token": True, "distill.attention_from": "noisy", "distill.dropped": "cell"},
        {
            "prior.source": "atlas",
            "prior.likelihood": "location",
            "prior.sigma_mm": 5.0,
            "prior.labelled": 2,
            "prior.regions": ("left ventricle",),
            "prior.attachment": "windowed",
            "prior.stage": 3,
        },
    ],
)
def test_values_that_are_read_are_not_said(store, capsys, given):
    dagman.choose(with_values(DagmanSettings(), SMALL | given), store, CASES, "cpu")
    assert not notes_of(capsys, "given,")


@pytest.mark.parametrize("variant", ["smit", "dino"])
def test_arms_of_a_study_may_be_given_what_they_do_not_read(store, capsys, variant):
    given = {"prior.weight": 1.0, "prior.likelihood": "location", "distill.variant": variant}
    dagman.choose(with_values(DagmanSettings(), SMALL | given), store, CASES, "cpu")
    (said,) = notes_of(capsys, "given,")
    assert "prior.likelihood, prior.weight (prior.source is none)" in said


@pytest.mark.parametrize("recipe", [dagman, spade_dagman])
def test_a_prior_that_guides_no_head_of_the_first_batches_is_said(store, capsys, recipe):
    for least in (1.0, 0.002):
        given = SMALL | {"prior.source": "bands", "prior.regions": ("bright",), "prior.least": least}
        recipe.build(recipe.choose(with_values(recipe.settings(), given), store, CASES, "cpu"), store, CASES, None)
        said = notes_of(capsys, "no head is guided")
        assert len(said) == (least == 1)
        assert least < 1 or re.search(
            r"takes 0\.\d+ of a crop at most, and prior.least asks for 1; give a lower", said[0]
        )


def test_files_of_another_place_are_refused_before_the_run(store, tmp_path):
    case = store.cases[0]
    far = case.affine.copy()
    far[0, 3] += 1e3
    (tmp_path / case.name).mkdir()
    write_volume(tmp_path / case.name / "heart.nii.gz", np.ones((8, 8, 8), dtype=np.uint8), far)
    given = SMALL | {"prior.source": "files", "prior.folder": str(tmp_path)}
    with pytest.raises(DataFault, match="heart.nii.gz: lies from .* so that 0 % of the scan's body box is covered"):
        dagman.choose(with_values(DagmanSettings(), given), store, CASES, "cpu")


def test_files_of_other_values_are_refused_before_the_run(store, tmp_path):
    case = store.cases[0]
    (tmp_path / case.name).mkdir()
    given = SMALL | {"prior.source": "files", "prior.folder": str(tmp_path)}
    for value, said in ((np.nan, "voxels for heart are NaN or Inf"), (255, "values from 255 to 255 for heart")):
        write_volume(tmp_path / case.name / "heart.nii.gz", np.full(case.shape, value, dtype=np.float32), case.affine)
        with pytest.raises(DataFault, match=said):
            dagman.choose(with_values(DagmanSettings(), given), store, CASES, "cpu")


def test_a_student_of_what_is_visible_is_given_more_steps(store):
    """1.65 CPU s a step of the tiny recipe instead of 2.26; where nothing is hidden, nothing is spared."""
    dense, visible, whole = (
        chosen_distillation(DistillSettings(**said), (48,) * 3, "cpu")
        for said in ({}, {"drop_hidden": True}, {"variant": "dino"})
    )
    assert cost_of(10**6, visible) / cost_of(10**6, dense) == pytest.approx(1.65 / 2.26, abs=0.005)
    assert cost_of(10**6, whole.model_copy(update={"drop_hidden": True})) == cost_of(10**6, whole)
    large = {"crop.shape": (48, 48, 40), "distill.drop_hidden": True}
    steps = [
        tiny.choose(with_values(DagmanSettings(), given), store, CASES, "cpu").steps
        for given in (large | {"distill.drop_hidden": False}, large)
    ]
    assert steps[0] / steps[1] == pytest.approx(0.73, abs=0.02)


def test_spade_with_guidance_is_the_command_of_the_documents(store, tmp_path):
    page = (Path(__file__).resolve().parents[3] / "docs" / "concepts.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"with any of the three attachments:\s+`([^`]+)`", page)
    small = "--crop.shape 32 32 32 --network.feature-size 12 --crop.frame box --contrast.local-memory 16 --device cpu"
    words = [*command.split(), *small.split(), "--steps", "1", "--distill.head-width", "16"]
    with pytest.raises(SystemExit) as end:
        pretrain([str(store.path), "--out", str(tmp_path / "run"), *words])
    assert end.value.code == 0
    (row,) = read_log(tmp_path / "run" / "log.jsonl")
    assert row["losses"].keys() == {"local", "restoration", "prior"}  # crops of a heart lie too near to be kept apart
    assert row["losses"]["prior"] > 0 and row["notes"]["prior.active"] > 0
    table = json.loads((tmp_path / "run" / GUIDED).read_text(encoding="utf-8"))
    assert table["attachment"] == "native" and describe_encoder(tmp_path / "run" / ENCODER)["guided_heads"] == table
    regions = attention_of_run(tmp_path / "run", table["stage"]).regions
    assert regions and list(regions) == table["regions"]
    (tmp_path / "run" / GUIDED).unlink()
    assert attention_of_run(tmp_path / "run", table["stage"]).regions == regions, "the encoder says it, too"


def test_a_run_leaves_its_semantic_attention_beside_the_encoder(store, tmp_path):
    chosen = dagman.choose(with_values(DagmanSettings(), SMALL), store, CASES, "cpu")
    built = dagman.build(chosen, store, CASES, None)
    built.finish(tmp_path)
    module, stage = load_semantic(tmp_path / SEMANTIC.name)
    assert stage == 2 and not (tmp_path / GUIDED).exists()
    for ours, its in zip(built.task.student.looks.semantic.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, its)
    pictures = built.pictures()
    assert pictures["[CLS] attention, mean of 4 heads"].shape == pictures["a"].shape == (32, 32, 32)


@pytest.mark.parametrize(
    ("prior", "said", "frame"),
    [
        ({"source": "none"}, None, "box"),
        ({"source": "bands"}, None, "box"),
        ({"source": "one_label"}, None, "affine"),
        ({"source": "mean_image"}, None, "affine"),
        ({"source": "mean_image"}, "box", "box"),
    ],
)
def test_a_prior_that_lies_in_the_body_frame_has_the_best_one(store, prior, said, frame):
    values = {f"prior.{key}": value for key, value in prior.items()} | {"prior.regions": None, "crop.frame": said}
    if prior["source"] == "one_label":
        values["prior.regions"] = ("left ventricle",)
    chosen = dagman.choose(with_values(DagmanSettings(), SMALL | values), store, CASES, "cpu")
    assert chosen.crop.frame == frame and f"frame: {frame}\n" in to_yaml(chosen)


@pytest.mark.parametrize("recipe", [dagman, spade_dagman])
def test_guided_heads_are_built_from_one_label_of_the_run(store, tmp_path, recipe, capsys):
    regions = ("Left Ventricle", "right ventricle")
    given = SMALL | {"prior.source": "one_label", "prior.regions": regions, "crop.frame": "box"}
    chosen = recipe.choose(with_values(recipe.settings(), given), store, CASES, "cpu")
    built = recipe.build(chosen, store, CASES, tmp_path)
    assert "heads are guided by one labelled scan" in capsys.readouterr().err
    labelled = [i for i in CASES if store.cases[i].has_labels]
    assert len(labelled) > 1 and built.labels == {labelled[0]: "labels, as a prior"}
    batch = built.batches.batch(0)
    assert batch.priors.shape[1:] == (2, 4, 4, 4) and batch.priors.any()
    losses = built.task.losses(batch, 1.0)
    assert losses["prior"].isfinite() and losses["prior"] > 0
    said = json.loads((tmp_path / GUIDED).read_text(encoding="utf-8"))
    assert said.pop("source").startswith("one labelled scan")
    assert said == {"attachment": "semantic", "stage": 2, "heads": 4, "regions": ["left ventricle", "right ventricle"]}


@pytest.mark.parametrize(
    ("source", "regions"),
    [("bands", ("dark", "bright")), ("mean_image", ("brightness 1 of 4",)), ("labels", ("left ventricle",))],
)
def test_processes_that_make_batches_can_be_sent_a_guided_stream(store, source, regions):
    given = {"prior.source": source, "prior.regions": regions}
    chosen = dagman.choose(with_values(DagmanSettings(), SMALL | given), store, CASES, "cpu")
    built = dagman.build(chosen, store, CASES, None)
    batches, labelled = built.batches, {i for i in CASES if store.cases[i].has_labels}
    assert set(built.labels) == (labelled if source == "labels" else set())
    sent = pickle.loads(pickle.dumps(batches))
    assert torch.equal(sent.batch(0).priors, batches.batch(0).priors)


@pytest.mark.parametrize("recipe", ["dagman", "spade-dagman"])
def test_regions_are_named_one_by_one(recipe, capsys):
    with pytest.raises(SystemExit):
        pretrain(["--recipe", recipe, "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "a region whose heads are guided; may be given several times" in said


def test_more_regions_than_half_of_the_heads_are_refused(store):
    given = SMALL | {"prior.source": "bands", "distill.semantic_heads": 2}
    chosen = dagman.choose(with_values(DagmanSettings(), given), store, CASES, "cpu")
    with pytest.raises(UsageFault, match="at most half of the heads"):
        dagman.build(chosen, store, CASES, None)


def test_a_prior_from_labels_needs_labels(store):
    given = SMALL | {"prior.source": "atlas", "prior.regions": ("left ventricle",)}
    chosen = dagman.choose(with_values(DagmanSettings(), given), store, CASES, "cpu")
    unlabelled = [i for i in CASES if not store.cases[i].has_labels]
    with pytest.raises(DataFault, match="none of the 1 scans of this run has labels"):
        dagman.build(chosen, store, unlabelled, None)
