"""Involution through its kernels, a few megabytes of them at a time: the eager forward pass, and every backward pass.

kernel[b, :, i] = weight @ features[b, :, i] + bias is a matrix product of one image, [G·K², R] by [R, N]. A step
computes the kernels of a few images, uses them and forgets them; the backward pass computes them again.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout
from kernels.windows import Window

# Bytes of kernels a step may hold: a share of a CPU's last-level cache. On a GPU more than its L2 holds: a step's five
# launches take the host longer than the memory takes for what passes L2 by (measured on an H200 with steps of 24 MiB).
STEP_BYTES = {"cpu": 8 * 2**20}
STEP_BYTES_ELSEWHERE = 96 * 2**20


def steps(features: Tensor, rows: int, budget: int | None = None) -> Iterator[slice]:
    """Images taken together so that a step's kernels fit, at least one; one step without images if there are none."""
    batch, _, height, width = features.shape
    budget = budget or STEP_BYTES.get(features.device.type, STEP_BYTES_ELSEWHERE)
    images = max(1, budget // (rows * height * width * features.element_size()))
    for first in range(0, max(1, batch), images):
        yield slice(first, first + images)


def _product_dtype(x: Tensor) -> torch.dtype:
    """A CPU multiplies 16-bit numbers slowly, unless it has instructions for them."""
    return accumulator_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


def kernels_of(features: Tensor, weight: Tensor, bias: Tensor | None, groups: int, window: Window) -> Tensor:
    """[b, G, Kh, Kw, H', W'] of a step, in the memory order of the features."""
    kernels = torch.nn.functional.conv2d(features, weight[:, :, None, None], bias)
    return kernels.unflatten(1, (groups, *window.kernel_size))


def forward(
    x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window, algebra: ModuleType
) -> Tensor:
    """[B, G, C, H', W'] in the memory order of x [B, G, C, H, W]; ``algebra`` holds aggregate."""
    out = empty_like_layout(x, (*x.shape[:3], *features.shape[2:]))
    wide = _product_dtype(x)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    for images in steps(features, weight.shape[0]):
        kernels = kernels_of(features[images].to(wide), weight, bias, x.shape[1], window)
        out[images] = algebra.aggregate(kernels, x[images].to(wide), window)
    return out


def backward(
    grad: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window, algebra: ModuleType
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, features, weight and bias (always computed); sums over images run step by step, in order."""
    accumulator, wide = accumulator_dtype(weight.dtype), _product_dtype(x)
    dtype, weight, bias = weight.dtype, weight.to(wide), None if bias is None else bias.to(wide)
    grad_x = empty_like_layout(x)
    grad_features = empty_like_layout(features)
    grad_weight = torch.zeros(weight.shape, dtype=accumulator, device=weight.device)
    grad_bias = torch.zeros(weight.shape[0], dtype=accumulator, device=weight.device)
    for images in steps(features, weight.shape[0]):
        part, pixels, grads = (tensor[images].to(wide) for tensor in (features, x, grad))
        kernels = kernels_of(part, weight, bias, x.shape[1], window)
        grad_x[images] = algebra.transpose(kernels, grads, x.shape[3:], window)
        grad_kernels = algebra.correlate(grads, pixels, window).flatten(1, 3).flatten(2)
        grad_features[images] = (weight.t() @ grad_kernels).unflatten(2, features.shape[2:])
        grad_weight += (grad_kernels @ part.flatten(2).transpose(1, 2)).sum(0, dtype=accumulator)
        grad_bias += grad_kernels.sum((0, 2), dtype=accumulator)
    return grad_x, grad_features, grad_weight.to(dtype), grad_bias.to(dtype)
