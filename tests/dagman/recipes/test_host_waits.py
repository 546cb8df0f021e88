"""No step of training waits for the device, but where this page says so.

No GPU is needed: what would wait on one is seen in what torch is asked for. That is reading a value (`item`, `tolist`,
`bool`, `cpu`), asking how many there are (`nonzero`, a choice by a mask, `unique`), and sending numbers there from
memory that is not pinned (`torch.tensor`, `to`; `copies.sent` pins them first). What torch's own kernels for a GPU wait
for is not seen.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dagman
import spade3d
from spade3d.configuration import with_values
from spade3d.networks import attention_on_cpu, windows
from spade3d.recipes.recipe import find_recipe
from spade3d.scans import open_scans
from spade3d.training.copies import Moved, sent
from spade3d.training.loop import Optimiser, _Engine
from spade3d.volumes.phantoms import write_dataset

CPU = torch.device("cpu")
PACKAGES = tuple(Path(package.__file__).parent for package in (spade3d, dagman))
OF_ALL = {
    "training/loop.py step",  # whether the update is finite, with what is logged, in one transfer
}
VISIBLE = {
    "networks/visible.py _read_back",  # how many tokens are visible: sizes are the host's to know
}
of = torch.Tensor
READS = {of.item, of.tolist, of.cpu, of.__bool__, of.__int__, of.__float__, of.__index__}
READS.add(torch.unravel_index)  # sends the shape that it is given
SENDS = {of.to, torch.tensor, torch.as_tensor}  # where a device is named
aten = torch.ops.aten
COUNTS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}


class Waits(TorchFunctionMode):
    """Within it, `found` gathers where in our code a host would wait for its device."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()
        self.below = Below(self.found)

    def __enter__(self):
        self.below.__enter__()
        return super().__enter__()

    def __exit__(self, *how):
        super().__exit__(*how)
        self.below.__exit__(*how)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = (*args, *(kwargs or {}).values())
        sends = func in SENDS and any(isinstance(one, torch.device) for one in given) and "copies.py" not in place()
        if func in READS or sends:
            self.found.add(place())
        return func(*args, **(kwargs or {}))


class Below(TorchDispatchMode):
    """The same of what torch asks of itself."""

    def __init__(self, found: set[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        chosen = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        by_mask = chosen and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        repeated = func is aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        if func.overloadpacket in COUNTS or by_mask or repeated:
            self.found.add(place())
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The file and the function of ours that asks."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for package in PACKAGES:
            if path.is_relative_to(package):
                return f"{path.relative_to(package).as_posix()} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: "more" if x[0] > 0 else "less",
        lambda x: float(x[0]),
        lambda x: range(x[0].long()),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1.0)[torch.where(x > 0)],
        lambda x: x.repeat_interleave(x.abs().long()),
        lambda x: x.unique(),
        lambda x: x.equal(x),
        lambda x: x.index_put_((x > 0,), x[:1]),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.ones(2).to(x.device, non_blocking=True),
        lambda x: torch.unravel_index(x.long(), (2, 2)),
    ],
)
def test_a_wait_is_seen(ask):
    x = torch.tensor([1.0, -1.0, 2.0])
    with Waits() as waits:
        ask(x)
    assert waits.found == {"torch"}


def test_what_no_one_waits_for_is_not():
    x = torch.tensor([1.0, -1.0, 2.0])
    with Waits() as waits:
        x.masked_fill(x > 0, 0.0)[torch.arange(2)].add(torch.tensor(1.0)).to(torch.float64)
        sent(torch.tensor([1, 2]), x.device)
    assert not waits.found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearts")
    write_dataset("heart-mr", folder / "scans", patients=2, unlabelled=1, seed=2, shape=(48, 48, 40))
    return open_scans(folder / "scans", folder / "store", find_recipe("dagman").settings().data)


SMALL = {
    "crop.frame": "box",
    "crop.shape": (32, 32, 32),
    "crop.anchors": 2,
    "crop.colour": "device",
    "network.feature_size": 12,
    "network.heads": (2, 2, 2, 2),
    "steps": 10,
}
DISTILL = {"distill.stage": 2, "distill.semantic_heads": 4, "distill.head_width": 16}


@pytest.mark.parametrize(
    ("recipe", "more", "allowed"),
    [
        ("spade", {}, set()),
        ("dagman", DISTILL, set()),
        ("dagman", {**DISTILL, "distill.variant": "ibot"}, set()),
        ("dagman", {**DISTILL, "distill.drop_hidden": True}, VISIBLE),
        ("spade-dagman", DISTILL, set()),
    ],
)
def test_a_step_waits_where_it_is_known_to(store, monkeypatch, tmp_path, recipe, more, allowed):
    monkeypatch.setattr(attention_on_cpu, "takes", lambda qkv: False)
    monkeypatch.setattr(windows, "fused", lambda qkv: True)
    recipe, cases = find_recipe(recipe), range(len(store))
    settings = recipe.choose(with_values(recipe.settings(), {**SMALL, **more}), store, cases, "cpu")
    built = recipe.build(settings, store, cases, tmp_path)
    engine = _Engine(built.task, Optimiser(**settings.optim.model_dump()), CPU, "fp32")
    stream = Moved(built.batches.stream(0, 2), CPU)
    engine.step(stream, 0.3)  # plans and numbers that are kept are made once, heads are looked at a few times a run
    stream._next = stream._fetched()  # as a GPU has it, while it computes
    with Waits() as waits:
        engine.step(stream, 0.3)
    assert waits.found == OF_ALL | allowed
