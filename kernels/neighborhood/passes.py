"""na2d_softmax_av on Triton kernels.

The weights p are never stored: the backward pass computes them again from one number per pixel and head, log Σ_k exp.
"""

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout, empty_softmax_outputs
from kernels.neighborhood.configs import Weights
from kernels.neighborhood.launchers import mix, softmax_backward
from kernels.neighborhood.tables import Sums, fold
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated
from kernels.windows import Window


def grad_rpb(grad: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """Σ over (b, i, k) of the gradient of logits [B,G,Kh,Kw,H,W] at each relative position, [G,2Kh-1,2Kw-1]. The former
    is dense, the batch outermost."""
    (batch, groups, kernel_h, kernel_w, height, _), elements = grad.shape, grad[0].numel()
    rpb = grad.new_empty((groups, 2 * kernel_h - 1, 2 * kernel_w - 1), dtype=dtype)
    sums = sum_rows(grad.as_strided((batch, elements), (elements, 1)), 4, accumulator_dtype(grad.dtype))
    sums = sums.as_strided((sums.shape[0], *grad.shape[1:]), (elements, *grad.stride()[1:]))
    sums = sums.permute(0, 1, 4, 5, 2, 3).flatten(4)
    fold(Sums(sums, None, kernel_w, kernel_w, 1, height, dilation=window.dilation), None, rpb)
    return rpb


@repeated
def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), [B,G,C,H,W] like value; log Σ_k exp, [B,G,H,W])."""
    out, statistics = empty_softmax_outputs(value)
    return mix(value, Weights(logits, rpb, out, statistics), window) if value.numel() > 0 else (out, statistics)


def softmax_aggregate_backward(
    grad: Tensor, logits: Tensor, value: Tensor, rpb: Tensor | None, out: Tensor, statistics: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of logits, value and rpb (None without one), each in the memory order of its tensor."""
    of_logits = empty_like_layout(logits, logits.shape)
    if value.numel() == 0:
        return of_logits, empty_like_layout(value, value.shape), None if rpb is None else torch.zeros_like(rpb)
    weights = Weights(logits, rpb, out, statistics)
    of_logits, of_value = softmax_backward(grad, value, weights, of_logits, window)
    return of_logits, of_value, None if rpb is None else grad_rpb(of_logits, window, rpb.dtype)
