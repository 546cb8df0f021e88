"""Fine-tuning: settings that follow the data alike for both twins, and anybody's checkpoint as a beginning."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import dagman.commands
from dagman.downstream.labelled import Classes, classes_of
from dagman.downstream.protocols import PROTOCOLS
from dagman.finetuning import fresh_network
from dagman.judging import scored_classes
from dagman.recipes.finetuning import (
    FinetuneCommand,
    FinetuneSettings,
    build_stream,
    choose,
    network_of,
    resolve_finetuning,
)
from dagman.recipes.studies import StudySettings
from spade3d.configuration import Network, resolve, to_yaml
from spade3d.faults import DataFault, UsageFault
from spade3d.networks.foreign import save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.scans import open_scans, typical_grid
from spade3d.volumes.phantoms import write_dataset

OURS = {"feature_size": 12, "window": 4, "depths": (1, 2, 1, 1), "heads": (2, 3, 6, 12), "merging": "v2"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearts")
    size = {"shape": (36, 36, 28), "spacing": (6.0, 6.0, 6.0)}
    write_dataset("heart-mr", folder / "scans", patients=3, seed=5, **size)
    return open_scans(folder / "scans", folder / "store", FinetuneSettings().data)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(1)
    save_encoder(path, SwinUNETR(1, 1, **OURS))
    return path


@pytest.fixture(scope="module")
def monais(tmp_path_factory) -> Path:
    """A whole MONAI Swin-UNETR as people save them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = pytest.importorskip("monai.networks.nets")
    path = tmp_path_factory.mktemp("monai") / "model.pt"
    torch.manual_seed(2)
    network = nets.SwinUNETR(1, 5, feature_size=12, use_v2=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_twins_are_told_the_same_and_nothing_is_left_open(store, encoder, device, tmp_path):
    scratch = choose(FinetuneSettings(network=Network(**OURS)), store, (0, 1), device)
    begun = choose(FinetuneSettings(init=str(encoder)), store, (0, 1), device)
    one, other = scratch.model_dump(), begun.model_dump()
    assert (one.pop("init"), other.pop("init")) == (None, str(encoder))
    assert one == other
    parts = [one, *(part for part in one.values() if isinstance(part, dict))]
    assert {key for part in parts for key, value in part.items() if value is None} == {
        "path",
        "labels",
        "loaders",
        "flips",
    }
    shape, _ = typical_grid(store, (0, 1))
    assert all(side % 8 == 0 and abs(side - whole) <= 4 for side, whole in zip(begun.crop.shape, shape))
    (tmp_path / "config.yaml").write_text(to_yaml(begun))
    again = resolve(FinetuneSettings, [tmp_path / "config.yaml"], {}, environment={})
    assert again == begun == choose(again, store, (0, 1), device)


def test_twins_begin_with_the_same_decoder_and_see_the_same_crops(store, encoder):
    classes = classes_of(store)
    begun, scratch = (
        choose(FinetuneSettings(network=Network(**OURS), init=init, seed=4), store, (0, 1), "cpu")
        for init in (str(encoder), None)
    )
    (ours, coverage), (theirs, none) = (fresh_network(settings, classes) for settings in (begun, scratch))
    assert none is None and coverage.loaded == coverage.total
    reference = theirs.state_dict()
    learned = dict(ours.named_parameters())
    for name, tensor in learned.items():
        if not name.startswith("swinViT."):
            assert torch.equal(tensor, reference[name]), name
    assert not torch.equal(learned["swinViT.patch_embed.proj.weight"], reference["swinViT.patch_embed.proj.weight"])
    batches = [build_stream(settings, store, (0, 1), classes).batch(3) for settings in (begun, scratch)]
    assert torch.equal(batches[0].images, batches[1].images) and torch.equal(batches[0].classes, batches[1].classes)
    assert batches[0].images.shape == (2, 1, *begun.crop.shape)


def test_a_checkpoint_says_its_network_and_what_is_asked_for_stays(encoder, monais, tmp_path):
    assert network_of(encoder, Network()) == Network(**OURS)
    assert network_of(encoder, Network(drop_path=0.1)) == Network(**OURS, drop_path=0.1)
    assert network_of(encoder, Network(feature_size=24)).feature_size == 24  # and load_encoder will refuse it
    said = network_of(monais, Network())
    assert (said.feature_size, said.window, said.use_v2, said.monai_compatible) == (12, 7, True, True)
    torch.save(SwinUNETR(1, 1, feature_size=20, heads=(2, 4, 5, 8)).swinViT.state_dict(), tmp_path / "twenty.pt")
    with pytest.raises(DataFault, match="twenty.pt: no network can be built for it .*multiple of 12"):
        network_of(tmp_path / "twenty.pt", Network())


def test_monais_checkpoint_is_fine_tuned(store, monais, tmp_path):
    tokens = [store.path, "--init", monais, "--out", tmp_path, "--steps", 1, "--crop.shape", 16, 16, 16]
    tokens += ["--scoring.looks", 0, "--scoring.overlap", 0, "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([*map(str, tokens)])
    assert end.value.code == 0
    network = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["network"]
    assert (network["feature_size"], network["use_v2"], network["monai_compatible"]) == (12, True, True)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["coverage"]["loaded"] == summary["coverage"]["total"] > 118  # use_v2 has four blocks more
    assert summary["leakage"]["pretraining"] == "unknown" and np.isfinite(summary["mean_dice"])


def test_a_protocol_lies_above_the_defaults_and_below_what_is_said(tmp_path):
    """The same key, from the protocol up: file, environment, flag."""
    (tmp_path / "mine.yaml").write_text("protocol: btcv-24-6\ncrop: {crops: 3}\n")
    files, environment = [tmp_path / "mine.yaml"], {"SPADE_SCORING__OVERLAP": "0.1"}
    plain = resolve_finetuning([], {"protocol": "btcv-24-6"}, {})
    assert (plain.crop.shape, plain.crop.crops, plain.scoring.overlap) == ((96, 96, 96), 4, 0.5)
    assert plain.data.spacing == (1.5, 1.5, 2.0) and plain.crop.noise == FinetuneSettings().crop.noise
    said = resolve_finetuning(files, {"data": {"spacing": (3.0, 3.0, 3.0)}}, environment)
    assert (said.crop.shape, said.crop.crops, said.scoring.overlap) == ((96, 96, 96), 3, 0.1)
    assert said.data.spacing == (3.0, 3.0, 3.0) and said.protocol == "btcv-24-6"
    assert resolve_finetuning(files, {"protocol": "holdout"}, environment).crop.shape is None
    assert resolve_finetuning([], {}, {"SPADE_PROTOCOL": "mmwhs-mr-lsm"}).data.mr == "zscore"
    with pytest.raises(UsageFault, match="protocol: 'btcv' given"):
        resolve_finetuning([], {"protocol": "btcv"}, {})


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_a_run_wrote_says_the_same_when_it_is_read_back(name, tmp_path):
    asked = resolve_finetuning([], {"protocol": name, "labels": 4, "scoring": {"overlap": 0.25}}, {})
    (tmp_path / "config.yaml").write_text(to_yaml(asked))
    assert resolve_finetuning([tmp_path / "config.yaml"], {}, {}) == asked


@pytest.mark.parametrize(
    ("asked", "pairs"),
    [
        ({}, [(0, 0)]),
        ({"seed": 3}, [(3, 3)]),  # a seed has its own subjects,
        ({"seed": 3, "draw": 1}, [(3, 1)]),
        ({"seeds": 2, "seed": 5}, [(5, 5), (6, 6)]),
        ({"seeds": 2, "draw": 4}, [(0, 4), (1, 4)]),
        ({"seeds": 2, "draws": 2}, [(0, 0), (0, 1), (1, 0), (1, 1)]),  # but draws are shared by all seeds
        ({"draws": 2, "draw": 3, "seed": 1}, [(1, 3), (1, 4)]),
    ],
)
def test_runs_are_seeds_by_draws(asked, pairs):
    runs = FinetuneCommand(labels=2.0, **asked).runs()
    assert [(run.seed, run.draw) for run in runs.values()] == pairs
    assert list(runs) == [f"scratch-seed{seed}-draw{draw}" for seed, draw in pairs]
    twins = FinetuneCommand(labels=2.0, init="e.safetensors", from_scratch_twin=True, **asked).runs()
    assert [(run.seed, run.draw, run.init) for run in twins.values()] == [
        (*pair, init) for pair in pairs for init in ("e.safetensors", None)
    ]
    for name, run in twins.items():
        assert type(run) is FinetuneSettings and name.startswith("scratch" if run.init is None else "pretrained")
        rest = {"seed", "draw", "init"}
        assert run.model_dump(exclude=rest) == next(iter(runs.values())).model_dump(exclude=rest)


@pytest.mark.parametrize("written", ["1", "4", "4.0", "0.25", "null"])
def test_a_count_of_subjects_and_a_share_stay_what_they_are(written, tmp_path):
    """From YAML, environment and flags, through config.yaml and back."""
    meant = {"1": 1, "4": 4, "4.0": 4, "0.25": 0.25, "null": None}[written]
    config = tmp_path / "config.yaml"
    config.write_text(f"labels: {written}\n")
    flags = {} if written == "null" else FinetuneCommand(labels=written).model_dump(exclude_unset=True)
    for asked in (
        resolve_finetuning([config], {}, {}),
        resolve_finetuning([], {}, {"SPADE_LABELS": written}),
        resolve_finetuning([], flags, {}),
    ):
        (only,) = asked.runs().values()
        for one in (asked, only):
            config.write_text(to_yaml(one))
            again = resolve(type(one), [config], {}, {})
            assert again == one and again.labels == meant and type(again.labels) is type(meant)


@pytest.mark.parametrize("tree", [FinetuneCommand, StudySettings])
def test_one_point_nothing_of_the_subjects_is_refused_for_it_may_be_one_or_all(tree, tmp_path):
    (tmp_path / "config.yaml").write_text("labels: 1.0\n")
    for files, environment, flags in (
        ([tmp_path / "config.yaml"], {}, {}),
        ([], {"SPADE_LABELS": "1.0"}, {}),
        ([], {}, {"labels": "1.0"}),
    ):
        with pytest.raises(UsageFault, match="one subject or all of them: write 1 for one, and leave labels out for"):
            resolve(tree, files, flags, environment)
    with pytest.raises(UsageFault, match="a whole number of subjects, or a share between 0 and 1, is needed"):
        resolve(tree, [], {"labels": "2.5"}, {})


@pytest.mark.parametrize("written", ["left-atrium", "left_atrium", "Left Atrium", "atrium_left"])
def test_a_tolerance_finds_its_structure_however_it_is_written(written, tmp_path):
    settings = FinetuneSettings(scoring={"tolerance_mm": 3.0, "tolerances_mm": {written: 1.5}})
    classes = Classes(("aorta", "left_atrium"), (6, 7))
    assert scored_classes(settings, classes) == ({6: "aorta", 7: "left_atrium"}, [3.0, 1.5])
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    assert resolve(FinetuneSettings, [tmp_path / "config.yaml"], {}, {}) == settings
    assert settings == FinetuneSettings(scoring={"tolerance_mm": 3.0, "tolerances_mm": {"left atrium": 1.5}})
    with pytest.raises(UsageFault, match="a tolerance for left atrium; the classes are aorta"):
        scored_classes(settings, Classes(("aorta",), (6,)))
    with pytest.raises(UsageFault, match="left atrium is given twice, with different tolerances; keep one"):
        resolve(FinetuneSettings, [], {"scoring": {"tolerances_mm": {"atrium left": 2, written: 1.5}}}, {})


def test_several_runs_that_would_be_the_same_are_refused():
    with pytest.raises(UsageFault, match="--draws 2 of all labelled subjects are the same"):
        resolve_finetuning([], {"draws": 2}, {})
    with pytest.raises(UsageFault, match="--from-scratch-twin: .* give that run an --init"):
        resolve_finetuning([], {"from_scratch_twin": True}, {})


def test_a_store_keeps_how_it_was_prepared(store):
    """What was left to the store is written down as it is, or the configuration would not repeat the run."""
    chosen = choose(FinetuneSettings(), store, (0, 1), "cpu")
    made = store.preprocessing
    assert (chosen.data.spacing, chosen.data.window_hu, chosen.data.mr) == (made.spacing, made.window_hu, made.mr)


@pytest.mark.parametrize(("encoder", "asked", "rate"), [("full", None, 5e-4), ("linear", None, 1e-2), ("linear", 1, 1)])
def test_a_linear_decoder_learns_faster_unless_told_otherwise(store, encoder, asked, rate):
    settings = FinetuneSettings(tuning={"encoder": encoder}, optim={"lr": asked})
    chosen = choose(settings, store, (0, 1), "cpu").optim
    assert chosen.lr == rate and chosen.weight_decay == 0.01
