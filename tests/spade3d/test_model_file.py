"""Models on disk: what is written comes back, from the file or from its folder, and what is none is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spade3d.faults import DataFault
from spade3d.model_file import ModelFile, format_of

KIND = ModelFile("toy-1", "toy.safetensors", "toy", "make-toys")


def test_weights_and_what_is_said_of_them_come_back(tmp_path):
    torch.manual_seed(0)
    module, again = nn.Conv3d(2, 3, 1), nn.Conv3d(2, 3, 1)
    KIND.write(tmp_path / KIND.name, module, {"width": 3, "axes": ("R", "A")})
    for path in (tmp_path, tmp_path / KIND.name):
        weights, said = KIND.read(path)
        assert said == {"width": 3, "axes": ["R", "A"]}
        KIND.fill(again, weights, path)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
        again.reset_parameters()
    assert format_of(tmp_path / KIND.name) == "toy-1"


def test_what_is_no_such_model_is_refused(tmp_path):
    file = tmp_path / KIND.name
    with pytest.raises(DataFault, match=r"no toy there; give a finished run of make-toys, or its toy\.safetensors"):
        KIND.read(tmp_path)
    (tmp_path / "b").mkdir()
    KIND.write(tmp_path / "b" / KIND.name, nn.Linear(2, 2), {})
    with pytest.raises(DataFault, match=f"a finished run of make-toys, such as {tmp_path / 'b'}, or its toy"):
        KIND.read(tmp_path)  # the folder of several runs
    KIND.write(file, nn.Linear(2, 2), {})
    content = file.read_bytes()
    for part in (0, 20, len(content) - 1):
        file.write_bytes(content[:part])
        with pytest.raises(
            DataFault, match="not readable as safetensors .*copy it again, or make it anew by make-toys"
        ):
            KIND.read(tmp_path)
        assert format_of(file) == ""
    for metadata, found in ((None, "None"), ({"format": "toy-2"}, "'toy-2'")):
        save_file({"a": torch.zeros(1)}, file, metadata)
        with pytest.raises(DataFault, match=f"format {found}; a toy-1 of make-toys is needed"):
            KIND.read(tmp_path)
        assert format_of(file) == (metadata or {"format": ""})["format"]


def test_weights_that_are_not_finite_or_of_another_network_are_refused(tmp_path):
    file, module = tmp_path / KIND.name, nn.Linear(2, 2)
    with torch.no_grad():
        module.bias[1] = torch.nan
    KIND.write(file, module, {})
    with pytest.raises(DataFault, match="bias holds values that are not finite"):
        KIND.read(file)
    for other in (nn.Linear(3, 2), nn.Linear(2, 2, bias=False)):
        with pytest.raises(DataFault, match="its weights are not those of its network"):
            KIND.fill(nn.Linear(2, 2), other.state_dict(), file)
