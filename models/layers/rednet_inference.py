"""What inference makes of RedNet: blocks whose end is one kernel on a GPU, and a stem that pools before its ReLU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.basic import LayerScale, affine
from models.layers.fusion import CONVOLUTIONS, as_built, convolves, move_bias
from models.layers.pointwise import HALVES, PaddedConv2d, PointwiseConv2d, infers, runs_triton


class FoldedBottleneck(nn.Module):
    """ReLU(last(ReLU(norm(first(x)))) + shortcut(x)), the end of it in one kernel on a GPU in 16 bits.

    ``first`` ends in the involution, after which ``norm`` stays as a scale and a shift; ``last`` is a 1×1 convolution,
    and so is ``shortcut`` unless it is the identity. What was replaced, wrapped or hooked stands there as it was.
    """

    def __init__(self, first: nn.Sequential, norm: nn.Module, last: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.shortcut = first, norm, last, shortcut

    def folded(self) -> nn.Module:
        """Makes the norm a ``LayerScale`` and adds up both last biases."""
        scale_and_shift = affine(self.norm)
        if scale_and_shift is not None:
            scale, shift = scale_and_shift
            self.norm = LayerScale(len(shift))
            self.norm.weight = nn.Parameter(scale.view(-1, 1, 1, 1), requires_grad=False)
            self.norm.bias = nn.Parameter(shift, requires_grad=False)
        move_bias(_only_product(self.shortcut), _only_product(self.last))
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        joined = self._joined(out, x)
        return F.relu(self.last(F.relu(self.norm(out))) + self.shortcut(x)) if joined is None else joined

    def _joined(self, x: Tensor, skipped: Tensor) -> Tensor | None:
        """What follows ``first`` by one kernel.

        None where it does not run: with gradients, beyond 16 bits and GPUs, and where a layer is not as built.
        """
        # Not where torch.fx records what is called.
        if not isinstance(x, Tensor) or x.dtype not in HALVES or not runs_triton(x):
            return None
        norm: Any = self.norm
        conv = _only_product(self.last, x.device)
        if not as_built(norm, LayerScale, x.device) or norm.bias is None:
            return None
        if not isinstance(conv, PointwiseConv2d) or conv.bias is None:
            return None
        second, stride = None, 1
        if not as_built(self.shortcut, nn.Identity):
            beside = _only_product(self.shortcut, x.device)
            if beside is None or beside.bias is not None:
                return None
            second, stride = beside.weight.flatten(1), beside.stride[0]
        from kernels.pointwise import fits, residual_pointwise_conv2d

        channels = conv.out_channels if second is None else second.shape[1]
        if (x.shape[1], len(norm.bias), skipped.shape[1]) != (conv.in_channels, conv.in_channels, channels):
            return None
        tensors = x, norm.weight.flatten(), norm.bias, conv.weight.flatten(1), conv.bias, skipped, second
        return residual_pointwise_conv2d(*tensors, stride) if infers(*tensors) and fits(x, skipped) else None


def _only_product(layers: nn.Module, device: torch.device | None = None) -> nn.Conv2d | None:
    """The 1×1 convolution that is all of ``layers`` apart from identities; None for every other module."""
    if not as_built(layers, nn.Sequential):
        return None
    convs: list[Any] = [layer for layer in layers.children() if not as_built(layer, nn.Identity)]
    if len(convs) != 1 or not as_built(convs[0], CONVOLUTIONS):  # a pool's stride, for example, may be a number
        return None
    return convs[0] if convolves(convs[0], 1, device, stride=convs[0].stride[0]) else None


class PoolThenReLU(nn.Module):
    """ReLU(maxpool(x) + bias), which is maxpool(ReLU(x + bias)): both keep the order of numbers.

    It computes on the channels-last view, whose order compiled code keeps for the output.
    """

    def __init__(self, pool: nn.Module, bias: nn.Parameter) -> None:
        super().__init__()
        self.pool = pool
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pool(x).permute(0, 2, 3, 1) + self.bias).permute(0, 3, 1, 2)


def pool_first(layers: nn.Module, pool: nn.Module) -> nn.Module:
    """What takes the place of ``pool`` where the last bias and ReLU of ``layers`` before it can wait for a quarter of
    the pixels: they become a part of it. Nobody else may see what ``layers`` give."""
    conv: Any = layers
    while as_built(conv, nn.Sequential):
        conv = next((layer for layer in reversed([*conv]) if not as_built(layer, nn.Identity)), None)
    if not as_built(conv, PaddedConv2d) or not conv.relu or conv.bias is None or not as_built(pool, nn.MaxPool2d):
        return pool
    pooled = PoolThenReLU(pool, conv.bias)
    conv.relu, conv.bias = False, None
    return pooled
