"""3×3 depthwise convolutions of channels-last maps as operators, with the kernel of ``fused``.

They are ``triton_op``s: compiled code launches the kernel by itself, without the host's time for an operator.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.depthwise.fused import slid
from kernels.registration import traced_operator


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, residual: bool, out: Tensor | None = None,
    grad_squares: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x, sums = slid(grad, weight, None, residual, out is not None, x, out, grad_squares)
    sums, channels = sums.sum(0).to(x.dtype) if len(sums) > 1 else sums[0].to(x.dtype), x.shape[1]
    return grad_x, sums[: channels * 9].view(channels, 1, 3, 3), sums[channels * 9 :].clone()


@traced_operator("sliding_depthwise_conv2d", flops=lambda x, *_: 2 * 9 * math.prod(x))
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """x [B, C, H, W] that ``fused.fits``, weight [C, 1, 3, 3], bias [C] or None, whether to add x -> out like x."""
    return slid(x, weight, bias, residual, False)[0]


@traced_operator("sliding_depthwise_conv2d_backward", flops=lambda grad, *_: 4 * 9 * math.prod(grad))
def gradients(grad: Tensor, x: Tensor, weight: Tensor, residual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``convolve``'s output, its x, weight and whether x is added -> those of x, weight and bias."""
    return _gradients(grad, x, weight, residual)


@traced_operator("gelu_depthwise_conv2d", flops=lambda x, *_: 2 * 9 * math.prod(x))
def gelu_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> tuple[Tensor, Tensor]:
    """``convolve`` of GELU(x), which is also what is added -> out, and its sums of squares [B, C] in float32. GELU and
    squares are not counted among its operations."""
    out, squares = slid(x, weight, bias, residual, True)
    return out, squares.unflatten(0, (x.shape[0], -1)).sum(1)


@traced_operator("gelu_depthwise_conv2d_backward", flops=lambda _grad, _squares, x, *_: 4 * 9 * math.prod(x))
def _gelu_backward(
    grad: Tensor, grad_squares: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool,
    out: Tensor, squares: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(_last(grad), x, weight, residual, out, grad_squares)


def _last(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def _twice(grads: Any, grad: Tensor, x: Tensor, weight: Tensor, residual: bool) -> list[Tensor | None]:
    """Given those of ``gradients``'s outputs, which are linear in grad, in x and in weight."""
    of_x, of_weight, of_bias = grads
    found: list[Tensor | None] = [None, None, None]
    if of_x is not None:
        of_x = _last(of_x)
        found[0], found[2] = convolve(of_x, weight, None, residual), gradients(grad, of_x, weight, False)[1]
    if of_weight is not None or of_bias is not None:
        of_weight = torch.zeros_like(weight) if of_weight is None else of_weight
        through = convolve(x, of_weight, of_bias, False)
        found[0] = through if found[0] is None else found[0] + through
        found[1] = gradients(grad, x, of_weight, False)[0]
    return found


convolve.differentiable_together(
    lambda grads, x, weight, bias, residual: gradients(_last(grads[0]), x, weight, residual)[: 2 if bias is None else 3]
)
gradients.differentiable_together(_twice)
gelu_convolve.differentiable_once(_gelu_backward, "a depthwise convolution of GELU", derivatives=2)
