"""na2d_softmax_av on Triton kernels. Its weights p are never stored: the backward pass computes them again from one
number per pixel and head, log Σ_k exp."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout
from kernels.neighborhood.grad_rpb import grad_rpb
from kernels.neighborhood.launchers import Softmax, form_of
from kernels.windows import Window

__all__ = ["softmax_aggregate", "softmax_aggregate_backward"]


def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), [B,G,C,H,W] like value; log Σ_k exp, [B,G,H,W])."""
    if value.numel() == 0:
        dtype = accumulator_dtype(value.dtype)
        return empty_like_layout(value, value.shape), value.new_empty(value[:, :, 0].shape, dtype=dtype)
    return form_of(logits, window, value).softmax_mix(logits, value, rpb, window)


def softmax_aggregate_backward(
    grad: Tensor,
    logits: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of logits, value and rpb (None without one), each in the memory order of its tensor."""
    of_logits = empty_like_layout(logits, logits.shape)
    if value.numel() == 0:
        return of_logits, empty_like_layout(value, value.shape), None if rpb is None else torch.zeros_like(rpb)
    form, softmax = form_of(logits, window, value), Softmax(logits, rpb, out, statistics)
    form.correlate(grad, value, of_logits, window, softmax)
    of_value = form.transpose(logits, grad, window, softmax)
    return of_logits, of_value, None if rpb is None else grad_rpb(of_logits, rpb, window)
