"""Regimes: what is frozen keeps its bits, what lies deeper learns more slowly, and a linear decoder is linear."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dagman.downstream.labelled import Classes, LabelledBatch
from dagman.downstream.linear_decoder import LinearDecoder, doubled, with_linear_decoder
from dagman.downstream.model import SegmentationModel, load_model, with_decoder
from dagman.downstream.regimes import Regime, layer_scales
from dagman.downstream.segmentation import Segmentation
from dagman.recipes.finetuning import FinetuneSettings, regime_of
from spade3d.configuration import Network, with_values
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.recipes.recipe import build_network
from spade3d.training.journal import read_log
from spade3d.training.loop import Optimiser, train
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.volume import Grid

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SETTINGS = Network(feature_size=12, window=3, depths=(1, 2, 1, 1), drop_path=0.5)
STEPS = 5


class Balls:
    """Batches of one crop, in which what is bright is class 1."""

    def stream(self, start, stop):
        for step in range(start, stop):
            image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(step))
            yield LabelledBatch(image, (image > 0.5).long(), ("a",))


def network(decoder="swin-unetr", classes=2):
    torch.manual_seed(0)
    return with_decoder(build_network(SETTINGS, out_channels=classes), decoder, classes)


def tuned(out: Path, regime: Regime, *, steps=STEPS, batches=None, **more) -> Segmentation:
    task = Segmentation(network("linear" if regime.encoder == "linear" else "swin-unetr"), regime)
    how = {"optimiser": Optimiser(lr=1e-2, weight_decay=0.1), "device": CPU, "save_every": 1}
    train(task, batches or Balls(), steps=steps, out=out, **how, **more)
    return task


def moved(task: Segmentation) -> dict[str, bool]:
    """Which parameters are no longer what they were drawn as."""
    begun = network("linear" if isinstance(task.network, LinearDecoder) else "swin-unetr").state_dict()
    return {name: not torch.equal(weights, begun[name]) for name, weights in task.network.named_parameters()}


def of_encoder(changed: dict[str, bool]) -> set[bool]:
    return {value for name, value in changed.items() if name.startswith("swinViT.")}


@pytest.mark.parametrize("encoder", ["frozen", "linear"])
def test_a_frozen_encoder_keeps_every_bit_and_drops_nothing(encoder, tmp_path):
    task = tuned(tmp_path, Regime(encoder))
    changed = moved(task)
    assert of_encoder(changed) == {False}
    assert all(value for name, value in changed.items() if not name.startswith("swinViT."))
    # Half of the blocks would be dropped by chance if the encoder were training: twice the same, then none is.
    batch = next(Balls().stream(0, 1))
    task.train()
    once, again = (task.losses(batch, 0.5)["dice_ce"] for _ in range(2))
    assert torch.equal(once, again) and task.network.training and not task.network.swinViT.training
    assert not task.network(batch.images).stages[-1].requires_grad
    assert {p.requires_grad for p in task.network.swinViT.parameters()} == {False}


def test_a_full_fine_tuning_moves_all_and_drops_by_chance(tmp_path):
    task = tuned(tmp_path, Regime())
    # Of a crop of 16^3 some offsets between cells never occur: their biases get decay, and no gradient of their own.
    assert {value for name, value in moved(task).items() if not name.endswith("table")} == {True}
    batch = next(Balls().stream(0, 1))
    task.train()
    torch.manual_seed(0)
    assert len({task.losses(batch, 0.5)["dice_ce"].item() for _ in range(4)}) > 1


def test_the_scale_of_each_layer_is_decay_to_its_distance_from_the_decoder():
    encoder = network().swinViT
    scales = layer_scales(encoder, 0.5)
    by_hand = {  # five blocks: the last is 1 layer from the decoder, the patch embedding 6
        "patch_embed.proj.weight": 2**-6,
        "layers1.0.blocks.0.attn.qkv.weight": 2**-5,
        "layers1.0.downsample.reduction.weight": 2**-5,
        "layers2.0.blocks.0.norm1.bias": 2**-4,
        "layers2.0.blocks.1.mlp.linear2.bias": 2**-3,
        "layers2.0.downsample.norm.weight": 2**-3,
        "layers3.0.blocks.0.attn.relative_position_bias_table": 2**-2,
        "layers4.0.blocks.0.norm2.weight": 2**-1,
        "layers4.0.downsample.reduction.weight": 2**-1,
    }
    assert {name: scales[name] for name in by_hand} == by_hand
    assert scales.keys() == {name for name, _ in encoder.named_parameters()}
    v2 = layer_scales(SwinUNETR(1, 1, feature_size=12, window=3, depths=(1, 2, 1, 1), use_v2=True).swinViT, 0.5)
    assert v2["layers2c.0.layer.conv1.conv.weight"] == 2**-4  # with the first block of its stage


def test_layer_decay_divides_the_groups_and_changes_nothing_else():
    task = Segmentation(network(), Regime(layer_decay=0.5))
    plain, divided = Segmentation(network()).parameter_groups(0.3), task.parameter_groups(0.3)
    assert all("lr_scale" not in group for group in plain)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    scales = layer_scales(task.network.swinViT, 0.5)
    seen = []
    for group in divided:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == scales.get(name.removeprefix("network.swinViT."), 1.0)
            seen.append((name, group["weight_decay"]))
    names = {id(parameter): name for name, parameter in Segmentation(network()).named_parameters()}
    expected = [(name, 0.0 if p.ndim < 2 or name.endswith(("bias", "table")) else 0.3)
                for name, p in task.named_parameters()]  # fmt: skip
    assert sorted(seen) == sorted(expected)


def test_a_first_step_moves_each_layer_by_its_own_rate(tmp_path):
    """AdamW's first step has the length of the learning rate, whatever the gradient."""
    settings = SETTINGS.model_copy(update={"drop_path": 0.0})  # or some layers had no gradient at all
    torch.manual_seed(0)
    task = Segmentation(build_network(settings, out_channels=2), Regime(layer_decay=0.5))
    optimiser = Optimiser(lr=1e-3, weight_decay=0.0, warmup=0.0, floor=1.0, clip_norm=None)
    train(task, Balls(), steps=1, out=tmp_path, optimiser=optimiser, device=CPU, save_every=1)
    begun = network().state_dict()
    for name, scale in {"swinViT.patch_embed.proj.bias": 2**-6, "swinViT.layers2.0.blocks.0.norm1.bias": 2**-4}.items():
        step = (task.network.state_dict()[name] - begun[name]).abs().median().item()
        assert step == pytest.approx(1e-3 * scale, rel=0.02)
    assert (task.network.out.conv.conv.bias - begun["out.conv.conv.bias"]).abs().max().item() == pytest.approx(1e-3)


def test_an_encoder_stands_still_for_its_share_of_the_run_and_then_moves(tmp_path):
    seen = []

    class Watched(Segmentation):
        def after_step(self, progress):
            seen.append((progress, of_encoder(moved(self)) - {False}))

    task = Watched(network(), Regime(encoder_warmup=0.4))
    how = {"optimiser": Optimiser(lr=1e-2, weight_decay=0.1), "device": CPU, "save_every": 5}
    train(task, Balls(), steps=STEPS, out=tmp_path, **how)
    assert seen == [(0.2, set()), (0.4, set()), (0.6, {True}), (0.8, {True}), (1.0, {True})]


SLOWLY = Regime(layer_decay=0.7, encoder_warmup=0.4)


@pytest.mark.parametrize(("regime", "stop"), [(SLOWLY, 1), (SLOWLY, 3), (Regime("linear"), 2)])
def test_a_run_that_was_cut_ends_with_the_same_bits(regime, stop, tmp_path):
    class Cut(Balls):
        def stream(self, start, stop_at):
            for index, batch in enumerate(super().stream(start, stop_at), start=start):
                if index == stop:
                    raise KeyboardInterrupt
                yield batch

    whole = tuned(tmp_path / "whole", regime)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "cut", regime, batches=Cut())
    again = tuned(tmp_path / "cut", regime, resume=True)
    assert [r["losses"] for r in read_log(tmp_path / "cut" / "log.jsonl")] == [
        r["losses"] for r in read_log(tmp_path / "whole" / "log.jsonl")
    ]
    theirs = whole.state_dict()
    assert all(torch.equal(weights, theirs[name]) for name, weights in again.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (5, 1, 2)])
@pytest.mark.parametrize("odd", [0, 1])
def test_doubling_is_trilinear_interpolation(shape, odd):
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    cut = [2 * side - odd for side in shape]
    expected = F.interpolate(x, scale_factor=2, mode="trilinear")[:, :, : cut[0], : cut[1], : cut[2]]
    torch.testing.assert_close(doubled(x, tuple(cut)), expected)


def test_the_linear_decoder_is_linear_in_the_features_of_every_stage():
    """Slow twin: each stage alone through its own weights, brought to the voxels by torch, then summed."""
    decoder = network("linear", classes=3)
    images = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    decoder.eval()
    with torch.no_grad():
        features = decoder(images)
        summed = decoder.readouts[0].bias[None, :, None, None, None]
        for stage, (readout, cells) in enumerate(zip(decoder.readouts, features.stages, strict=True)):
            said = torch.einsum("oc,bcijk->boijk", readout.weight, cells)
            for _ in range(stage + 1):
                said = F.interpolate(said, scale_factor=2, mode="trilinear")
            summed = summed + said
        assert decoder.logits(features).shape == (1, 3, 32, 32, 32)
        torch.testing.assert_close(decoder.logits(features), summed, atol=1e-4, rtol=1e-4)


def test_the_linear_decoder_reads_whitened_stages():
    decoder = network("linear", classes=3).eval()
    crops = torch.rand(3, 2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    decoder.whiten(crops)
    with torch.no_grad():
        stages = [torch.cat(stage) for stage in zip(*map(decoder.swinViT, crops), strict=True)]
    for stage, whitening in zip(stages, decoder.whitening, strict=True):
        rows = whitening(stage.movedim(1, -1).flatten(0, -2))
        spreads = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0).double()).clamp_min(0).sqrt()
        assert 0.9 < spreads.max() < 1.01 and rows.mean(0).abs().max() < 1e-2  # RIDGE, and float32


def test_a_linear_decoder_answers_for_crops_of_any_size():
    decoder = network("linear").eval()
    with torch.no_grad():
        for shape in ((17, 24, 9), (8, 8, 8)):
            features = decoder(torch.zeros(1, 1, *shape))
            assert decoder.logits(features).shape == (1, 2, *shape)


def test_a_linear_model_is_saved_read_back_and_predicts_the_same(tmp_path):
    model = SegmentationModel(
        network("linear", classes=3), SETTINGS, Classes(("liver", "spleen"), (205, 500)),
        Preprocessing(spacing=(2.0, 2.0, 3.0), window_hu=(-100.0, 300.0)), (16, 16, 8), 0.25, decoder="linear",
    )  # fmt: skip
    model.save(tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert isinstance(again.network, LinearDecoder) and again.decoder == "linear"
    image = np.random.default_rng(0).standard_normal((20, 18, 12)).astype(np.float32)
    grid = Grid(image.shape, np.diag([2.0, 2.0, 3.0, 1.0]))
    found = [one.segment_prepared(image, grid.affine, grid, CPU, fill=0.0) for one in (model, again)]
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 1


def test_a_linear_decoder_takes_the_encoder_it_is_given():
    whole = SwinUNETR(1, 4, feature_size=12, window=3)
    assert with_linear_decoder(whole, 4).swinViT is whole.swinViT


@pytest.mark.parametrize(
    ("tuning", "init", "expected"),
    [
        ({}, "e.safetensors", Regime()),
        ({"layer_decay": 0.7, "encoder_warmup": 0.2}, "e.safetensors", Regime("full", 0.7, 0.2)),
        ({"layer_decay": 0.7, "encoder_warmup": 0.2}, None, Regime()),  # nothing to keep
        ({"encoder": "frozen", "encoder_warmup": 0.2}, "e.safetensors", Regime("frozen")),
        ({"encoder": "linear"}, None, Regime("linear")),
    ],
)
def test_what_keeps_a_checkpoint_acts_on_checkpoints_only(tuning, init, expected):
    asked = {f"tuning.{key}": value for key, value in tuning.items()}
    assert regime_of(with_values(FinetuneSettings(init=init), asked)) == expected
