"""Depthwise convolution with large kernels from PyTorch's own convolution, steered to the kernels that are fast.

On a CPU PyTorch hands a float32 convolution to oneDNN, which has quick depthwise kernels for some cases and falls back
to one small matrix product per channel for the others, 10 to 100 times slower. Measured (oneDNN 3.12, AVX-512):

- Channels-first input has a quick forward kernel up to K = 13 only, channels-last input for every K. So from K = 15 on
  the input goes through channels-last.
- Channels-last with K = 11 or 13 runs an unrolled kernel two to nine times slower than the one for K = 15: zeros around
  the weight make it 15. Where these carry a NaN or infinity too far, the convolution is repeated without them;
  inference in compiled code cannot look, and there one reaches as far as K = 15 does.
- There is no quick weight gradient. But image by image it is a depthwise convolution too, of the input with the
  output's gradient as a kernel as large as the map, and that one is quick.
- float16 and bfloat16 have no quick kernels without hardware support, and sums in them would be rounded: they are
  computed in float32.

Every other device, dtype or build takes PyTorch's convolution as it is.
"""

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from kernels import reference
from kernels.layout import empty_like_layout
from kernels.parallel import alone, over_maps

HAS_ONEDNN = torch.backends.mkldnn.is_available()  # at import: Dynamo does not trace the question
# Smallest kernel for which channels-first has no quick kernel and channels-last has the good one.
BLOCKED_KERNEL = 15
# Smallest kernel whose weight gradient is worth the detour.
LARGE_KERNEL = 5
# Elements of x [channels, H, W] in one step of the weight gradient: with the gradient they stay in the L2 cache.
GRADIENT_ELEMENTS = 2**16
# Channels that oneDNN processes together, one per lane.
LANES = 16


def is_steered(x: Tensor, kernel_size: int) -> bool:
    """Whether PyTorch's convolution, or its gradient, would be slow or inexact if it were left to itself."""
    plain = x.dtype == torch.float64 or (x.dtype == torch.float32 and kernel_size < LARGE_KERNEL)
    return HAS_ONEDNN and x.device.type == "cpu" and not plain


def dense(weight: Tensor, dilation: int) -> Tensor:
    """The kernel of dilation 1 that computes the same: zeros stand between its weights."""
    if dilation == 1:
        return weight
    size = (weight.shape[-1] - 1) * dilation + 1
    spread = weight.new_zeros(*weight.shape[:-2], size, size)
    spread[..., ::dilation, ::dilation] = weight
    return spread


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, flipped: bool = False, dilation: int = 1) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c, i + (k − K//2)·dilation] (+ bias[c]), [B,C,H,W] in the memory order of x.

    ``flipped`` takes weight[c, K−1−k] instead.
    """
    weight = dense(weight.flip(2, 3) if flipped else weight, dilation)
    out = (steered if is_steered(x, weight.shape[-1]) else reference.depthwise_conv2d)(x, weight, bias)
    target = empty_like_layout(x)
    return out if out.stride() == target.stride() else target.copy_(out)


def steered(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution by the quickest route."""
    if x.dtype != torch.float32:
        return steered(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    kernel_size = weight.shape[-1]
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if channels_last and kernel_size in (11, 13):
        margins, compiling = ((BLOCKED_KERNEL - kernel_size) // 2,) * 4, torch.compiler.is_compiling()
        out = reference.depthwise_conv2d(x, (F.pad if compiling else alone(F.pad))(weight, margins), bias)
        if compiling or type(out) is not Tensor or math.isfinite(alone(out.sum)().item()):
            return out
    if not channels_last and kernel_size >= BLOCKED_KERNEL:
        x = x.contiguous(memory_format=torch.channels_last)
    return reference.depthwise_conv2d(x, weight, bias)


@alone
def weight_gradient(grad: Tensor, x: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """out[c,0,k] = Σ_{b,i} grad[b,c,i] · x[b,c, i + (k − K//2)·dilation]: grad, x [B,C,H,W] -> [C,1,K,K]."""
    if dilation > 1:
        return weight_gradient(grad, x, (kernel_size - 1) * dilation + 1)[..., ::dilation, ::dilation].contiguous()
    shape = (x.shape[1], 1, kernel_size, kernel_size)
    if not is_steered(x, kernel_size):
        return conv2d_weight(x, shape, grad, padding=kernel_size // 2, groups=x.shape[1])
    out = grad.new_zeros(shape, dtype=torch.float32)
    found = over_maps(lambda part: _image_by_image(grad[part], x[part], kernel_size), x, x.numel() * kernel_size**2)
    for part, sums in found:
        out[part.groups, 0] += sums
    return out.to(x.dtype)


def _image_by_image(grad: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    """[c, K, K], of some images and channels."""
    batch, channels, height, width = x.shape
    step = max(LANES, GRADIENT_ELEMENTS // (height * width) // LANES * LANES)
    sums = x.new_zeros((channels, kernel_size, kernel_size), dtype=torch.float32)
    for b, first in product(range(batch), range(0, channels, step)):
        some = slice(first, first + step)
        image = x[b : b + 1, some].to(torch.float32, memory_format=torch.channels_last)
        kernel = grad[b, some].unsqueeze(1).float()
        sums[some] += F.conv2d(image, kernel, padding=kernel_size // 2, groups=image.shape[1])[0]
    return sums
