"""aggregate, correlate, transpose: registered operators, each the derivative of another.

    aggregate(w, x)[i]    = Σ_k w[k, i] · x[nbr(i, k)]              d/dw = correlate(dy, x)  d/dx = transpose(w, dy)
    correlate(g, x)[k, i] = Σ_c g[c, i] · x[c, nbr(i, k)]           d/dg = aggregate(dy, x)  d/dx = transpose(dy, g)
    transpose(w, g)[j]    = Σ_{(i,k): nbr(i,k)=j} w[k, i] · g[i]    d/dw = correlate(g, dy)  d/dg = aggregate(w, dy)

Shapes: w [B, G, Kh, Kw, H', W'], x [B, G, C, H, W], g [B, G, C, H', W']; any strides. The three are closed under
differentiation, so every higher derivative exists and runs on the same kernels.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.aggregation import eager
from kernels.aggregation.configs import slides
from kernels.backend import resolve
from kernels.layout import empty_kernel_layout, empty_like_layout
from kernels.registration import WINDOW, fields_of, gradients, operator, window_of
from kernels.windows import Pair, Window


def algebra(backend: str, window: Window, *maps: Tensor) -> ModuleType:
    """The module that computes the three here; Triton is imported at the first use and not before."""
    if "eager" in [resolve(backend, each) for each in maps]:
        return eager
    if slides(window):
        from kernels.aggregation import rows

        return rows
    from kernels.aggregation import gather

    return gather


@operator("aggregate", f"(Tensor weight, Tensor x, {WINDOW}) -> Tensor")
def _aggregate(weight, x, stride, padding, dilation, clamped, backend):
    window = window_of(weight.shape[2:4], stride, padding, dilation, clamped)
    return algebra(backend, window, x, weight).aggregate(weight, x, window)


@_aggregate.register_fake
def _(weight, x, *_):
    return empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))


@operator("correlate", f"(Tensor g, Tensor x, int[] kernel_size, {WINDOW}) -> Tensor")
def _correlate(g, x, kernel_size, stride, padding, dilation, clamped, backend):
    window = window_of(kernel_size, stride, padding, dilation, clamped)
    return algebra(backend, window, x, g).correlate(g, x, window)


@_correlate.register_fake
def _(g, x, kernel_size, *_):
    return empty_kernel_layout(g, (kernel_size[0], kernel_size[1]))


@operator("transpose", f"(Tensor weight, Tensor g, SymInt[] input_size, {WINDOW}) -> Tensor")
def _transpose(weight, g, input_size, stride, padding, dilation, clamped, backend):
    window = window_of(weight.shape[2:4], stride, padding, dilation, clamped)
    return algebra(backend, window, g).transpose(weight, g, (input_size[0], input_size[1]), window)


@_transpose.register_fake
def _(weight, g, input_size, *_):
    return empty_like_layout(g, (*g.shape[:3], *input_size))


def _save(ctx, inputs, output):
    """Both tensor arguments come first, the window's fields and the backend last."""
    ctx.save_for_backward(*inputs[:2])
    ctx.fields, ctx.number = inputs[-5:], len(inputs)


def _aggregate_backward(ctx, grad):
    (weight, x), fields = ctx.saved_tensors, ctx.fields
    return gradients(
        ctx,
        lambda: _correlate(grad, x, list(weight.shape[2:4]), *fields),
        lambda: _transpose(weight, grad, list(x.shape[3:]), *fields),
    )


def _correlate_backward(ctx, grad):
    (g, x), fields = ctx.saved_tensors, ctx.fields
    return gradients(ctx, lambda: _aggregate(grad, x, *fields), lambda: _transpose(grad, g, list(x.shape[3:]), *fields))


def _transpose_backward(ctx, grad):
    (weight, g), fields = ctx.saved_tensors, ctx.fields
    return gradients(
        ctx, lambda: _correlate(g, grad, list(weight.shape[2:4]), *fields), lambda: _aggregate(weight, grad, *fields)
    )


_aggregate.register_autograd(_aggregate_backward, setup_context=_save)
_correlate.register_autograd(_correlate_backward, setup_context=_save)
_transpose.register_autograd(_transpose_backward, setup_context=_save)


def aggregate(weight: Tensor, x: Tensor, window: Window, backend: str) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)], [B, G, C, H', W'] in the memory order of x."""
    return _aggregate(weight, x, *fields_of(window), backend)


def correlate(g: Tensor, x: Tensor, window: Window, backend: str) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)], [B, G, Kh, Kw, H', W'] in the memory order of g."""
    return _correlate(g, x, list(window.kernel_size), *fields_of(window), backend)


def transpose(weight: Tensor, g: Tensor, input_size: Pair | torch.Size, window: Window, backend: str) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i], [B, G, C, H, W] in the memory order of g."""
    return _transpose(weight, g, list(input_size), *fields_of(window), backend)


def aggregation_flops(channels_shape: Sequence[int], kernel_shape: Sequence[int]) -> int:
    """Two operations per multiply-add: every entry [B, G, K², H', W'] of the kernel meets each channel of its group."""
    return 2 * channels_shape[2] * math.prod(kernel_shape)


@register_flop_formula(torch.ops.dynamic_kernels.aggregate)
def _(weight_shape, x_shape, *_, **__) -> int:
    return aggregation_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.dynamic_kernels.correlate)
def _(g_shape, x_shape, *_, out_shape=None, **__) -> int:
    return aggregation_flops(x_shape, out_shape)  # pyright: ignore[reportArgumentType]


@register_flop_formula(torch.ops.dynamic_kernels.transpose)
def _(weight_shape, g_shape, *_, **__) -> int:
    return aggregation_flops(g_shape, weight_shape)
