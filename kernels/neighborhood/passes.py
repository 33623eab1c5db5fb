"""What neighbourhood operators launch where windows are clamped: the form that suits a problem, and na2d_softmax_av.

    mix         Σ_k w[i,k] · value[nbr(i,k)]          w a softmax of logits + rpb where ``softmax_mix`` is asked for
    transpose   Σ_{(i,k) reaching j} w[i,k] · g[i]
    correlate   Σ_c g[i,c] · value[nbr(i,k),c]        with p · (· − δ) on top: the gradient of logits

The softmax's weights p are never stored: the backward pass computes them again from one number per pixel, log Σ_k exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout
from kernels.neighborhood import own_correlate, own_mix, shared
from kernels.neighborhood.configs import shares_windows
from kernels.neighborhood.grad_rpb import grad_rpb
from kernels.neighborhood.references import Softmax
from kernels.windows import Window

__all__ = ["form_of", "softmax_aggregate", "softmax_aggregate_backward"]


class Form(NamedTuple):
    """Launchers that take and give the same, however they compute it."""

    mix: Callable[..., Tensor]
    softmax_mix: Callable[..., tuple[Tensor, Tensor]]
    transpose: Callable[..., Tensor]
    correlate: Callable[..., Any]


OWN = Form(own_mix.mix, own_mix.softmax_mix, own_mix.transpose, own_correlate.correlate)
SHARED = Form(shared.mix, shared.softmax_mix, shared.transpose, shared.correlate)


def form_of(kernel: Tensor, window: Window, features: Tensor) -> Form:
    """Dense matrix products where many outputs share a window, else rows of outputs with windows of their own."""
    return SHARED if shares_windows(kernel, window, features.shape[3], features.shape[4]) else OWN


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
