"""The end of a residual block, which inference runs in one kernel on a GPU."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import under_autocast
from models.layers.basic import LayerScale
from models.layers.fusion import CONVOLUTIONS, as_built, runs_triton
from models.layers.pointwise import HALVES, PointwiseConv2d


def shortcut_convolution(shortcut: nn.Module, device: torch.device | None = None) -> nn.Conv2d | None:
    """The 1×1 convolution that is all of ``shortcut`` apart from identities; None for every other module."""
    if not as_built(shortcut, nn.Sequential):
        return None
    layers: list[Any] = [layer for layer in shortcut.children() if not as_built(layer, nn.Identity)]
    if len(layers) != 1 or not as_built(layers[0], CONVOLUTIONS, device):
        return None
    (conv,) = layers
    plain = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return conv if plain and conv.stride[0] == conv.stride[1] else None


def normed_product_and_shortcut(norm: Any, conv: Any, shortcut: nn.Module, x: Tensor, skipped: Tensor) -> Tensor | None:
    """ReLU(conv(ReLU(norm(x))) + shortcut(skipped)) by one kernel, for a ``LayerScale`` and a ``PointwiseConv2d``.

    None where it does not run: with gradients, beyond 16 bits and GPUs, and where a layer is not as built.
    """
    if not isinstance(x, Tensor):  # torch.fx records what is called
        return None
    if x.dtype not in HALVES or under_autocast(x) or not runs_triton(x):
        return None
    if not (as_built(norm, LayerScale, x.device) and as_built(conv, PointwiseConv2d, x.device)):
        return None
    if norm.bias is None or conv.bias is None or conv.relu or x.dtype != conv.weight.dtype:
        return None
    second, stride = None, 1
    if not as_built(shortcut, nn.Identity):
        beside = shortcut_convolution(shortcut, x.device)
        if beside is None or beside.bias is not None:
            return None
        second, stride = beside.weight.flatten(1), beside.stride[0]
    from kernels.pointwise import fits, residual_pointwise_conv2d

    channels = conv.out_channels if second is None else second.shape[1]
    if (x.shape[1], len(norm.bias), skipped.shape[1]) != (conv.in_channels, conv.in_channels, channels):
        return None
    tensors = x, norm.weight.flatten(), norm.bias, conv.weight.flatten(1), conv.bias, skipped, second
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return None
    return residual_pointwise_conv2d(*tensors, stride) if fits(x, skipped) else None
