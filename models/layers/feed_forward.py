"""OverLoCK's feed-forward part, whose hidden layers a GPU runs in two kernels: one each way, or in inference one."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import under_autocast
from models.layers.basic import GELU2d, GlobalResponseNorm
from models.layers.depthwise import DepthwiseConv2d, ResidualDepthwiseConv2d
from models.layers.fusion import CONVOLUTIONS, as_built, convolves
from models.layers.pointwise import HALVES, PointwiseConv2d, padded, runs_triton, wants_gradients


class FeedForwardSequential(nn.Sequential):
    """Layers in sequence. Where GELU, a 3×3 depthwise convolution, a response norm and a 1×1 convolution follow one
    another, they are computed together: in 16 bits on a GPU, if nobody replaced, wrapped or hooked them.

    A kernel takes GELU on its way in and the norm's sums of squares on its way out. Of the hidden maps training keeps
    two: what GELU takes, and what the norm takes. Without gradients, a kernel for large maps of few channels computes
    the 1×1 convolution before GELU as well, and the first of the two is never stored.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _runs_kernels(input):
            return super().forward(input)
        layers = list(self)
        while layers:
            halves, done = input.dtype in HALVES, 1
            if halves and _are_hidden(layers[1:5], input.device) and _expands(layers[0], layers[2], input):
                input, done = _projected(*_expanded(input, layers[0], layers[2]), *layers[3:5]), 5
            elif halves and _are_hidden(layers[:4], input.device) and _fits(layers[1], input):
                input, done = _projected(*_convolved(input, layers[1]), *layers[2:4]), 4
            else:
                input = layers[0](input)
            del layers[:done]
        return input


def feed_forward(channels: int, hidden: int) -> list[nn.Module]:
    """Channel MLP with a depthwise convolution and a response norm on its hidden units."""
    inside = [GELU2d(), ResidualDepthwiseConv2d(hidden), GlobalResponseNorm(hidden)]
    return [PointwiseConv2d(channels, hidden), *inside, PointwiseConv2d(hidden, channels)]


def _are_hidden(layers: list[Any], device: torch.device) -> bool:
    """Whether these are the four layers, as built, on ``device``."""
    if len(layers) < 4 or not as_built(layers[0], GELU2d) or layers[0].approximate != "none":
        return False
    _, conv, norm, project = layers
    channels = getattr(conv, "in_channels", 0)
    kinds = (*CONVOLUTIONS, DepthwiseConv2d, ResidualDepthwiseConv2d)
    depthwise = convolves(conv, 3, device, kinds=kinds, groups=channels) and conv.out_channels == channels
    return depthwise and as_built(norm, GlobalResponseNorm, device) and convolves(project, 1, device)


def _runs_kernels(x: Any) -> bool:
    """Whether Triton's kernels may compute in 16 bits what follows x; not where ``torch.fx`` records layers."""
    # Under autocast, layer norms return float32, and what follows them is in 16 bits again.
    return isinstance(x, Tensor) and (x.dtype in HALVES or under_autocast(x)) and runs_triton(x)


def _fits(conv: Any, x: Tensor) -> bool:
    """Whether the kernel computes ``conv`` of x."""
    from kernels.depthwise.fused import fits

    one_type = x.dtype == conv.weight.dtype or under_autocast(x)
    return one_type and x.ndim == 4 and x.shape[1] == conv.in_channels and fits(x)


def _expands(first: Any, conv: Any, x: Tensor) -> bool:
    """Whether one kernel computes conv(GELU(first(x))): no gradients, biases everywhere, shapes that it takes."""
    if not convolves(first, 1, x.device) or under_autocast(x):
        return False
    if first.bias is None or conv.bias is None:
        return False
    tensors = x, first.weight, first.bias, conv.weight, conv.bias
    if wants_gradients(*tensors):
        return False
    if x.ndim != 4 or x.shape[1] != first.in_channels or first.out_channels != conv.in_channels:
        return False
    from kernels.depthwise.expanded import takes

    return all(tensor.dtype == x.dtype for tensor in tensors) and takes(x, first.out_channels)


def _expanded(x: Tensor, first: Any, conv: Any) -> tuple[Tensor, Tensor]:
    """conv(GELU(first(x))) and its sums of squares."""
    from kernels.depthwise.expanded import expanded_convolve

    residual = isinstance(conv, ResidualDepthwiseConv2d)
    return expanded_convolve(x, first.weight.flatten(1), first.bias, conv.weight, conv.bias, residual)


def _convolved(x: Tensor, conv: Any) -> tuple[Tensor, Tensor]:
    """conv(GELU(x)) and its sums of squares."""
    from kernels.depthwise.sliding import gelu_convolve

    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return gelu_convolve(x, conv.weight.to(x.dtype), bias, isinstance(conv, ResidualDepthwiseConv2d))


def _projected(x: Tensor, squares: Tensor, norm: Any, project: Any) -> Tensor:
    """project(norm(x)), given x's sums of squares.

    Where an image has more pixels than the projection has outputs, the norm scales the projection's weights instead of
    the map, W·(s·x + β) = (W·s)·x + W·β, which saves a map and, in training, the sums for the norm's gradient.
    """
    # The bound keeps the gradient of a channel of zeros at zero.
    length = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()[:, :, None, None]
    if project.out_channels >= x.shape[2] * x.shape[3]:
        return project(norm.scaled(x, length))
    scale = norm.scale(length).flatten(2).transpose(1, 2)
    weight = (padded(project.weight.flatten(1), 0) * scale).to(x.dtype)  # [B, out, C]
    out = (x.permute(0, 2, 3, 1).flatten(1, 2) @ weight.transpose(1, 2))[..., : project.out_channels]
    shift = project.bias
    if norm.beta is not None:
        moved = project.weight.flatten(1) @ norm.beta.flatten()
        shift = moved if shift is None else shift + moved
    out = out if shift is None else out + shift.to(out.dtype)
    return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
