"""The algebra for clamped windows, and na2d_softmax_av, on Triton kernels: each in the form that suits its windows.

The weights p of a softmax are never stored: the backward pass computes them again from one number per pixel and head,
log Σ_k exp.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_kernel_layout, empty_like_layout, empty_softmax_outputs
from kernels.neighborhood.configs import Weights, shares_windows
from kernels.neighborhood.launchers import own_correlate, own_sum, shared_backward, shared_mix
from kernels.neighborhood.tables import fold
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated
from kernels.windows import Pair, Window


def mix(value: Tensor, weights: Weights, window: Window) -> Any:
    """Σ_k w[i,k] · value[nbr(i,k)], like value; (out, statistics) of a softmax."""
    return (shared_mix if shares_windows(weights.kernel, window, value) else own_sum)(value, weights, window)


def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]; [B,G,C,H,W] in the memory order of x."""
    return mix(x, Weights(weight), window) if x.numel() > 0 else empty_like_layout(x)


def transpose(weight: Tensor, g: Tensor, _input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]; [B,G,C,H,W] in the memory order of g."""
    if g.numel() == 0:
        return empty_like_layout(g)
    if shares_windows(weight, window, g):
        return shared_backward(g, None, Weights(weight), None, window)
    return own_sum(g, Weights(weight), window, transposed=True)


def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H,W] in the memory order of g."""
    out = empty_kernel_layout(g, window.kernel_size)
    run = shared_backward if shares_windows(out, window, x) else own_correlate
    return run(g, x, None, out, window) if g.numel() > 0 else out


def softmax_backward(
    grad: Tensor, value: Tensor, weights: Weights, target: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """Fills ``target`` with the gradient of logits; that and the gradient of value, in the memory order of out."""
    if shares_windows(weights.kernel, window, value):
        return shared_backward(grad, value, weights, target, window)
    return own_correlate(grad, value, weights, target, window), own_sum(grad, weights, window, transposed=True)


def grad_rpb(grad: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """Σ over (b, i, k) of the gradient of logits [B,G,Kh,Kw,H,W] at each relative position, [G,2Kh-1,2Kw-1]. The former
    is dense, the batch outermost."""
    (batch, groups, kernel_h, kernel_w, height, _), elements = grad.shape, grad[0].numel()
    rpb = grad.new_empty((groups, 2 * kernel_h - 1, 2 * kernel_w - 1), dtype=dtype)
    sums = sum_rows(grad.as_strided((batch, elements), (elements, 1)), 4, accumulator_dtype(grad.dtype))
    sums = sums.as_strided((sums.shape[0], *grad.shape[1:]), (elements, *grad.stride()[1:]))
    fold(sums.permute(0, 1, 4, 5, 2, 3).flatten(4), rpb, seen=kernel_w, height=height, dilation=window.dilation)
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
    of_logits = empty_like_layout(logits)
    if value.numel() == 0:
        return of_logits, empty_like_layout(value), None if rpb is None else torch.zeros_like(rpb)
    weights = Weights(logits, rpb, out, statistics)
    of_logits, of_value = softmax_backward(grad, value, weights, of_logits, window)
    return of_logits, of_value, None if rpb is None else grad_rpb(of_logits, window, rpb.dtype)
