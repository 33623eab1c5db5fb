"""Depthwise convolution with large kernels from PyTorch's own convolution, steered to the kernels that are fast.

On a CPU PyTorch hands a float32 convolution to oneDNN, which has quick depthwise kernels for some cases and falls back
to one small matrix product per channel for the others, 10 to 100 times slower. Measured (oneDNN 3.12, AVX-512):

- Channels-first input has a quick forward kernel up to K = 13 only, channels-last input for every K. So from K = 15 on
  the input goes through channels-last.
- Channels-last with K = 11 or 13 runs an unrolled kernel two to nine times slower than the one for K = 15: zeros around
  the weight make it 15. Where these carry a NaN or infinity too far, the convolution is repeated without them; compiled
  code cannot look, and there one reaches as far as K = 15 does.
- There is no quick weight gradient. But image by image it is a depthwise convolution too, of the input with the
  output's gradient as a kernel as large as the map, and that one is quick.
- float16 and bfloat16 have no quick kernels without hardware support, and sums in them would be rounded: they are
  computed in float32, under autocast too.

Every other device, dtype or build takes ``torch.nn.functional.conv2d`` as it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.parallel import Work, alone, over_maps
from kernels.registration import operator, without_autocast

HAS_ONEDNN = torch.backends.mkldnn.is_available()
# Smallest kernel for which channels-first has no quick kernel and channels-last has the good one.
BLOCKED_KERNEL = 15
# Smallest kernel whose weight gradient is worth the detour.
LARGE_KERNEL = 5
# Elements of x [channels, H, W] in one step of the weight gradient: with the gradient they stay in the L2 cache.
GRADIENT_ELEMENTS = 2**16
# Channels that oneDNN processes together, one per lane.
LANES = 16


@without_autocast
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution by the quickest route, in the memory format of x."""
    if x.dtype != torch.float32:
        wide_bias = None if bias is None else bias.float()
        return _convolve(x.float(), weight.float(), wide_bias).to(x.dtype)
    kernel_size = weight.shape[-1]
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    padding, groups = kernel_size // 2, x.shape[1]
    if channels_last and kernel_size in (11, 13):
        margin = (BLOCKED_KERNEL - kernel_size) // 2
        compiling = torch.compiler.is_compiling()
        wider = (F.pad if compiling else alone(F.pad))(weight, (margin, margin, margin, margin))
        out = F.conv2d(x, wider, bias, padding=BLOCKED_KERNEL // 2, groups=groups)
        if compiling or type(out) is not Tensor or math.isfinite(alone(out.sum)().item()):
            return out
    if channels_last or kernel_size < BLOCKED_KERNEL:
        return F.conv2d(x, weight, bias, padding=padding, groups=groups)
    out = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=padding, groups=groups)
    return out.contiguous()


@operator("depthwise_weight_gradient", "(Tensor grad, Tensor x, int kernel_size) -> Tensor")
@alone
def _weight_gradient(grad, x, kernel_size):
    """out[c,0,k] = Σ_{b,i} grad[b,c,i] · x[b,c,i − K//2 + k]: grad, x [B,C,H,W] -> [C,1,K,K].

    An operator of its own, so that torch.compile does not unroll its loops.
    """
    out = grad.new_zeros((x.shape[1], 1, kernel_size, kernel_size), dtype=torch.float32)
    found = over_maps(lambda part: _image_by_image(grad[part], x[part], kernel_size), x, x.numel() * kernel_size**2)
    for part, sums in found:
        out[part.groups, 0] += sums
    return out.to(x.dtype)


def _image_by_image(grad: Tensor, x: Tensor, kernel_size: int) -> Work[Tensor]:
    """[c, K, K], of some images and channels."""
    batch, channels, height, width = x.shape
    step = max(LANES, GRADIENT_ELEMENTS // (height * width) // LANES * LANES)
    sums = x.new_zeros((channels, kernel_size, kernel_size), dtype=torch.float32)
    steps = [
        (sums[first : first + step], x[b : b + 1, first : first + step], grad[b, first : first + step].unsqueeze(1))
        for b in range(batch)
        for first in range(0, channels, step)
    ]
    yield
    for total, image, kernel in steps:
        image = image.to(torch.float32, memory_format=torch.channels_last)
        total += F.conv2d(image, kernel.float(), padding=kernel_size // 2, groups=image.shape[1])[0]
    return sums


@_weight_gradient.register_fake
def _(grad, x, kernel_size):
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size))


def _save(ctx, inputs, output):
    grad, x, _kernel_size = inputs
    ctx.save_for_backward(grad, x)


def _weight_gradient_backward(ctx, grad_weight):
    grad, x = ctx.saved_tensors
    return depthwise_conv2d(x, grad_weight, None), depthwise_conv2d(grad, grad_weight.flip(-1, -2), None), None


_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save)


@register_flop_formula(torch.ops.dynamic_kernels.depthwise_weight_gradient)
def _(grad_shape, x_shape, kernel_size, *_, **__) -> int:
    batch, channels, height, width = x_shape
    return 2 * batch * channels * height * width * kernel_size**2


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _bias = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = depthwise_conv2d(grad, weight.flip(-1, -2), None) if wants_x else None
        grad_weight = _weight_gradient(grad, x, weight.shape[-1]) if wants_weight else None
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype) if wants_bias else None
        return grad_x, grad_weight, grad_bias


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c,i − K//2 + k] + bias[c]: x [B,C,H,W], weight [C,1,K,K], K odd -> [B,C,H,W].

    Differentiable any number of times.
    """
    kernel_size = weight.shape[-1]
    plain = x.dtype == torch.float64 or (x.dtype == torch.float32 and kernel_size < LARGE_KERNEL)
    if plain or not HAS_ONEDNN or x.device.type != "cpu":
        return F.conv2d(x, weight, bias, padding=kernel_size // 2, groups=x.shape[1])
    arguments = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments):
        return _DepthwiseConv2d.apply(x, weight, bias)
    return _convolve(x, weight, bias)
