"""The convolution blocks of a Swin-UNETR, their parameters named as in MONAI's UnetResBlock and UnetrUpBlock."""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.01  # of the leaky ReLU


def channels_last(module: nn.Module) -> None:
    """Let the convolutions within a module keep their weights with channels last in memory, in place: names, shapes and
    files stay.

    What they give then lies so, too; on a GPU torch's group norm lays it back. Meant for GPUs; not measured on one.
    """
    for one in module.modules():
        if isinstance(one, nn.Conv3d | nn.ConvTranspose3d):
            one.to(memory_format=torch.channels_last_3d)


class Residual(nn.Module):
    """Two 3^3 convolutions beside a shortcut: leaky(norm(conv(leaky(norm(conv x)))) + x).

    Where the number of channels changes, the shortcut is a normed 1^3 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = _named("conv", nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False))
        self.conv2 = _named("conv", nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False))
        self.conv3 = None
        if in_channels != out_channels:
            self.conv3 = _named("conv", nn.Conv3d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: Float[Tensor, "b in i j k"]) -> Float[Tensor, "b out i j k"]:
        shortcut = x if self.conv3 is None else instance_norm(self.conv3(x))
        x = F.leaky_relu(instance_norm(self.conv1(x)), SLOPE, inplace=True)
        return F.leaky_relu(instance_norm(self.conv2(x)) + shortcut, SLOPE, inplace=True)


class Up(nn.Module):
    """Double the grid by a transposed convolution, join the skip connection, and mix by a residual block.

    A skip of odd size was halved upwards on its way down, so the doubled grid is cut back to it.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.transp_conv = _named("conv", nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=False))
        self.conv_block = Residual(2 * out_channels, out_channels)

    def forward(
        self, x: Float[Tensor, "b in _ _ _"], skip: Float[Tensor, "b out i j k"]
    ) -> Float[Tensor, "b out i j k"]:
        i, j, k = skip.shape[2:]
        return self.conv_block(torch.cat((self.transp_conv(x)[:, :, :i, :j, :k], skip), dim=1))


def residual_layer(in_channels: int, out_channels: int) -> nn.Sequential:
    """A residual block under the name `layer`, as MONAI's UnetrBasicBlock holds it."""
    return _named("layer", Residual(in_channels, out_channels))


def output_layer(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1^3 convolution under the name `conv.conv`, as MONAI's UnetOutBlock holds it."""
    return _named("conv", _named("conv", nn.Conv3d(in_channels, out_channels, 1)))


def instance_norm(x: Float[Tensor, "b c i j k"]) -> Float[Tensor, "b c i j k"]:
    """(x - mean) / sqrt(variance + 1e-5) of each channel of each sample; a grid of one cell becomes zero.

    A group norm of one channel a group: the numbers of nn.InstanceNorm3d, without refusing the single cell that a
    32^3 crop leaves at the bottleneck.
    """
    return torch.group_norm(x, x.shape[1], eps=1e-5)


def _named(name: str, module: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict({name: module}))
