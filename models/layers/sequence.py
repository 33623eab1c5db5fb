"""Layers in sequence of which kernels compute several at once: OverLoCK's hidden layers; a batch norm and GELU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.backend import exporting, under_autocast
from models.layers.basic import GELU2d, GlobalResponseNorm
from models.layers.depthwise import DepthwiseConv2d, ResidualDepthwiseConv2d
from models.layers.fusion import CONVOLUTIONS, as_built, convolves, trains
from models.layers.pointwise import HALVES, PointwiseConv2d, in_16_bits_on_gpu, infers, padded, runs_triton


class FusedSequential(nn.Sequential):
    """Layers in sequence. On a GPU in 16 bits some are computed together, if nobody replaced, wrapped or hooked them.

    GELU, a 3×3 depthwise convolution, a response norm and a 1×1 convolution: a kernel takes GELU on its way in and the
    norm's sums of squares on its way out. Of the hidden maps training keeps two: what GELU takes, and what the norm
    takes. Without gradients, a kernel for large maps of few channels computes the 1×1 convolution before GELU as well,
    and the first of the two is never stored.

    A batch norm and GELU, in compiled training: their backward pass has kernels. In Inductor's, the batch norm's output
    is written again, in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            joined = None
            if type(layers[0]) is GELU2d or (len(layers) > 1 and type(layers[1]) is GELU2d):
                joined = _hidden_layers(layers, input) or _normed_gelu(layers, input)
            input, done = joined or (layers[0](input), 1)
            del layers[:done]
        return input


def feed_forward(channels: int, hidden: int) -> list[nn.Module]:
    """Channel MLP with a depthwise convolution and a response norm on its hidden units."""
    inside = [GELU2d(), ResidualDepthwiseConv2d(hidden), GlobalResponseNorm(hidden)]
    return [PointwiseConv2d(channels, hidden), *inside, PointwiseConv2d(hidden, channels)]


# ---- hidden layers


def _hidden_layers(layers: list[Any], x: Tensor) -> tuple[Tensor, int] | None:
    """What the first five or four layers make of x, and their number, where kernels compute them; None elsewhere.

    ``torch.fx`` records the layers one by one. Under autocast, x is in 16 bits but for what layer norms return.
    """
    if not isinstance(x, Tensor) or x.dtype not in HALVES:
        return None
    for number, compute in ((5, _expanded), (4, _convolved)):
        hidden = layers[number - 4 : number]
        if _are_hidden(hidden, x.device) and runs_triton(x):
            _, conv, norm, project = hidden
            convolved = compute(x, layers[0], conv)
            if convolved is not None:
                return _projected(*convolved, norm, project), number
    return None


def _are_hidden(layers: list[Any], device: torch.device) -> bool:
    """Whether these are the four layers, as built, on ``device``."""
    if len(layers) < 4 or not _is_gelu(layers[0]):
        return False
    _, conv, norm, project = layers
    channels = getattr(conv, "in_channels", 0)
    kinds = (*CONVOLUTIONS, DepthwiseConv2d, ResidualDepthwiseConv2d)
    depthwise = convolves(conv, 3, device, kinds=kinds, groups=channels) and conv.out_channels == channels
    return depthwise and as_built(norm, GlobalResponseNorm, device) and convolves(project, 1, device)


def _is_gelu(layer: Any) -> bool:
    return as_built(layer, GELU2d) and layer.approximate == "none"


def _expanded(x: Tensor, expand: Any, conv: Any) -> tuple[Tensor, Tensor] | None:
    """conv(GELU(expand(x))) and its sums of squares by one kernel: no gradients, biases everywhere, shapes that it
    takes; else None."""
    if not convolves(expand, 1, x.device) or expand.bias is None or conv.bias is None:
        return None
    if x.ndim != 4 or x.shape[1] != expand.in_channels or expand.out_channels != conv.in_channels:
        return None
    from kernels.depthwise.expanded import expanded_convolve, takes

    if not takes(x, expand.out_channels) or not infers(x, expand.weight, expand.bias, conv.weight, conv.bias):
        return None
    residual = isinstance(conv, ResidualDepthwiseConv2d)
    return expanded_convolve(x, expand.weight.flatten(1), expand.bias, conv.weight, conv.bias, residual)


def _convolved(x: Tensor, _gelu: Any, conv: Any) -> tuple[Tensor, Tensor] | None:
    """conv(GELU(x)) and its sums of squares by one kernel, if that takes x; else None."""
    from kernels.depthwise.fused import fits

    one_type = x.dtype == conv.weight.dtype or under_autocast(x)
    if not one_type or x.ndim != 4 or x.shape[1] != conv.in_channels or not fits(x):
        return None
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


# ---- a batch norm before GELU


def _normed_gelu(layers: list[Any], x: Tensor) -> tuple[Tensor, int] | None:
    """GELU(norm(x)) of the first two layers, and their number; None but in compiled training on a GPU in 16 bits.

    The batch norm's running statistics are renewed.
    """
    if not torch.compiler.is_compiling() or exporting() or not in_16_bits_on_gpu(x) or x.dim() != 4:
        return None
    if len(layers) < 2 or not _is_gelu(layers[1]) or not runs_triton(x):
        return None
    norm = layers[0]
    if not trains(norm, x.device) or x.numel() <= x.shape[1]:
        return None
    number = x.numel() // x.shape[1]
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * (number / (number - 1)))):
            running.lerp_(batch.to(running.dtype), norm.momentum)
        norm.num_batches_tracked.add_(1)
        rstd = torch.rsqrt(variance + norm.eps)
    return _NormedGELU.apply(x, norm.weight, norm.bias, mean, rstd), 2


class _NormedGELU(torch.autograd.Function):
    """GELU(weight·(x − mean)·rstd + bias), where mean and rstd are those of x, and differentiated as such."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        scale = weight.to(rstd.dtype) * rstd
        shift = bias.to(rstd.dtype) - mean * scale
        ctx.save_for_backward(x, weight, scale, shift, mean, rstd)
        return F.gelu(x.to(rstd.dtype) * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from kernels.normed import normed_gelu_backward

        x, weight, scale, shift, mean, rstd = ctx.saved_tensors
        grad, x = (each.contiguous(memory_format=torch.channels_last) for each in (grads[0].to(x.dtype), x))
        return *normed_gelu_backward(grad, x, weight, scale, shift, mean, rstd), None, None
