"""Checkpoints: ours in a circle, other people's under their names, and every refusal in words."""

import os
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from spade3d.faults import DataFault
from spade3d.networks.foreign import describe_encoder, load_encoder, save_encoder
from spade3d.networks.swin_unetr import SwinUNETR

SMALL = {"feature_size": 12, "window": 3}


def small(seed: int, **settings) -> SwinUNETR:
    torch.manual_seed(seed)
    return SwinUNETR(1, 2, **{**SMALL, **settings})


def same_encoder(a: SwinUNETR, b: SwinUNETR) -> bool:
    theirs = b.swinViT.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.swinViT.state_dict().items())


@pytest.fixture(scope="module")
def source() -> SwinUNETR:
    return small(0)


def test_our_file_comes_back_with_its_settings(tmp_path, source):
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, source, {"preprocessing": {"spacing": [1.5, 1.5, 2.0]}, "provenance": {"seed": 3}})
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.safetensors"]
    assert all(name.startswith("swinViT.") for name in load_file(path))
    metadata = describe_encoder(path)
    assert metadata["format"] == "spade3d-encoder-1"
    assert metadata["feature_size"] == 12 and metadata["heads"] == [3, 6, 12, 24] and metadata["use_v2"] is False
    assert metadata["preprocessing"] == {"spacing": [1.5, 1.5, 2.0]} and metadata["provenance"] == {"seed": 3}
    target = small(1)
    coverage = load_encoder(target, path)
    assert same_encoder(target, source)
    assert coverage.loaded == coverage.total == len(list(source.swinViT.parameters()))
    assert not coverage.missing and not coverage.mismatched
    assert str(coverage) == f"{coverage.total} of {coverage.total} encoder tensors from {path}"


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "swin_vit.", "swinViT.", "module.swinViT.", "encoder."])
def test_other_peoples_names(tmp_path, source, prefix, nest):
    state = {
        prefix + name.replace(".mlp.linear", ".mlp.fc"): tensor for name, tensor in source.swinViT.state_dict().items()
    }
    state["module.rotation_head.weight"] = torch.zeros(4, 8)
    path = tmp_path / "model.pt"
    torch.save({nest: state, "epoch": 7} if nest else state, path)
    target = small(1)
    assert load_encoder(target, path).loaded == len(list(source.swinViT.parameters()))
    assert same_encoder(target, source)


def test_a_whole_network_gives_its_encoder(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    target = small(1)
    load_encoder(target, tmp_path / "model.safetensors")
    assert same_encoder(target, source)
    assert not torch.equal(target.out[0][0].weight, source.out[0][0].weight)


def test_another_size_is_refused_with_both_sizes(tmp_path, source):
    torch.save(source.swinViT.state_dict(), tmp_path / "twelve.pt")
    with pytest.raises(DataFault, match="its feature_size is 12, here 24") as refusal:
        load_encoder(small(1, feature_size=24), tmp_path / "twelve.pt")
    assert str(refusal.value).startswith(f"{tmp_path / 'twelve.pt'}: fits") and "\n" not in str(refusal.value)
    with pytest.raises(DataFault, match=r"its window is 3 \(if a cube\), here \(4, 4, 4\)"):
        load_encoder(small(1, window=4), tmp_path / "twelve.pt")
    with pytest.raises(DataFault, match="no layers1c"):
        load_encoder(small(1, use_v2=True), tmp_path / "twelve.pt")


def test_settings_that_no_shape_tells_must_agree(tmp_path, source):
    save_encoder(tmp_path / "encoder.safetensors", source)
    with pytest.raises(DataFault, match=r"merging v1 \(here v2\), monai_compatible False \(here True\)"):
        load_encoder(small(1, merging="v2", monai_compatible=True), tmp_path / "encoder.safetensors")


def test_a_partial_encoder_only_when_asked_for(tmp_path, source):
    state = {name: tensor for name, tensor in source.swinViT.state_dict().items() if not name.startswith("layers4")}
    torch.save(state, tmp_path / "three.pt")
    target = small(1)
    before = {name: tensor.clone() for name, tensor in target.swinViT.state_dict().items()}
    with pytest.raises(DataFault, match="no layers4"):
        load_encoder(target, tmp_path / "three.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.swinViT.state_dict().items())
    coverage = load_encoder(target, tmp_path / "three.pt", allow_partial=True)
    assert 0 < coverage.loaded < coverage.total
    assert coverage.missing and all(name.startswith("layers4") for name in coverage.missing)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_file_that_would_run_code_is_not_opened(tmp_path, source):
    torch.save({"state_dict": source.swinViT.state_dict(), "args": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    with pytest.raises(DataFault, match=r"bomb.pt: holds more than tensors \(\w+.mkdir\) and was not opened"):
        load_encoder(small(1), tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_nobody_is_advised_to_read_a_file_in_the_way_that_runs_it(tmp_path, monkeypatch):
    """torch's own words about a file that it cannot read name that way, and are as long as a page."""
    torch.save({"args": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    (tmp_path / "notes.pt").write_bytes(b"steps: 3\noptim:\n  lr: fast\n")
    (tmp_path / "dots.pt").write_bytes(b".....")
    (tmp_path / "script.pt").touch()
    for file in ("bomb.pt", "notes.pt", "dots.pt", "script.pt"):
        if file == "script.pt":  # as it answers to TorchScript
            said = RuntimeError("Cannot use ``weights_only=True`` with TorchScript archives passed to ``torch.load``.")
            monkeypatch.setattr(torch, "load", Mock(side_effect=said))
        with pytest.raises(DataFault) as refused:
            load_encoder(small(1), tmp_path / file)
        said = str(refused.value)
        assert said.startswith(f"{tmp_path / file}: ") and "state dict" in said, said
        assert not any(word in said.lower() for word in ("weights_only", "weights only", "torch.load", "pytorch")), said


def test_unusable_files_are_named(tmp_path, source):
    with pytest.raises(DataFault, match="no such checkpoint file"):
        load_encoder(small(1), tmp_path / "absent.pt")

    save_encoder(tmp_path / "whole.safetensors", source)
    torch.save(source.swinViT.state_dict(), tmp_path / "whole.pt")
    for name in ("whole.safetensors", "whole.pt"):
        content = (tmp_path / name).read_bytes()
        for part in (0, 10, len(content) // 2):
            cut = tmp_path / f"cut{part}_{name}"
            cut.write_bytes(content[:part])
            with pytest.raises(DataFault, match="cut"):
                load_encoder(small(1), cut)

    for name, harm in {"notes.pt": b"steps: 3\noptim:\n  lr: fast\n  wd: 3\nsteps: 4\n", "dots.pt": b"....."}.items():
        (tmp_path / name).write_bytes(harm)
        with pytest.raises(DataFault, match=f"{name}: "):
            load_encoder(source, tmp_path / name)
    with pytest.raises(DataFault, match="is a folder; give the checkpoint in it"):
        load_encoder(source, tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataFault, match="holds no state dict"):
        load_encoder(small(1), tmp_path / "list.pt")

    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(DataFault, match="fits 0 of"):
        load_encoder(small(1), tmp_path / "other.pt", allow_partial=True)

    state = source.swinViT.state_dict()
    torch.save({**{f"module.{k}": v for k, v in state.items()}, **state}, tmp_path / "two.pt")
    with pytest.raises(DataFault, match="are both patch_embed"):
        load_encoder(small(1), tmp_path / "two.pt")

    torch.save({**state, "patch_embed.proj.bias": torch.full((12,), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(DataFault, match="not finite"):
        load_encoder(small(1), tmp_path / "nan.pt")

    index = "layers1.0.blocks.0.attn.relative_position_index"
    torch.save({**state, index: state[index].T}, tmp_path / "order.pt")
    with pytest.raises(DataFault, match="orders the biases differently"):
        load_encoder(small(1), tmp_path / "order.pt")

    save_file(state, tmp_path / "newer.safetensors", metadata={"format": "spade3d-encoder-9"})
    for read in (describe_encoder, lambda path: load_encoder(small(1), path)):
        with pytest.raises(DataFault, match="written as spade3d-encoder-9"):
            read(tmp_path / "newer.safetensors")

    save_file({"swinViT.a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(DataFault, match="no Swin encoder among its 1 tensors"):
        describe_encoder(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("settings", [{}, {"use_v2": True}, {"depths": (2, 1, 3, 1), "heads": (2, 2, 4, 4)}])
def test_shapes_tell_the_settings_of_other_peoples_encoders(tmp_path, settings):
    network = small(0, **settings)
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {"module." + k: v for k, v in network.swinViT.state_dict().items()}}, path)
    said = describe_encoder(path)
    assert said.pop("monai_compatible") is True
    ours = {key: list(value) if isinstance(value, tuple) else value for key, value in network.encoder_settings.items()}
    assert said == {key: ours[key] for key in said}
