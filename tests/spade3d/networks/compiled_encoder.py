"""Compiled encoders beside those that are not: two shapes of crop, windows padded and clipped, hidden tokens, chance.

Graphs and gradients are torch.compile's; the arithmetic is torch's own (aot_eager), so that all must be equal to
rounding, and nothing waits for a C++ compiler. A graph that breaks raises. Attention goes as on a CPU, and then by the
fused operation of a GPU.
"""

from copy import deepcopy
from functools import partialmethod

import torch

from spade3d.networks import attention_on_cpu, windows
from spade3d.networks.swin import compile_encoders
from spade3d.networks.swin_unetr import SwinUNETR

torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
HIDDEN = torch.rand(2, 8, 10, 7, generator=torch.Generator().manual_seed(3)) < 0.5

torch.manual_seed(0)
plain = SwinUNETR(1, 2, feature_size=12, window=3, drop_path=0.5).train()
compiled = deepcopy(plain)
compile_encoders(compiled)
assert compiled.state_dict().keys() == plain.state_dict().keys()
for shape, token_mask in (((16, 20, 13), HIDDEN), ((24, 24, 24), None)):
    images, found = torch.randn(2, 1, *shape), []
    for network in (plain, compiled):
        network.zero_grad()
        torch.manual_seed(1)
        stages = network(images, token_mask, finest=None).stages
        sum(stage.square().mean() for stage in stages).backward()
        found.append([*stages, *(p.grad for p in network.swinViT.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 40
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its)
    print("equal", shape, flush=True)
    attention_on_cpu.takes, windows.fused = lambda qkv: False, lambda qkv: True
