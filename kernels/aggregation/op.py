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

from torch import Tensor

from kernels.aggregation import eager
from kernels.aggregation.configs import slides
from kernels.backend import resolve
from kernels.layout import empty_kernel_layout, empty_like_layout
from kernels.registration import WINDOW, fields_of, operator, window_of
from kernels.windows import Window


def algebra(backend: str, window: Window, *maps: Tensor) -> ModuleType:
    """The module that computes the three here; Triton is imported at the first use and not before."""
    if "eager" in [resolve(backend, each) for each in maps]:
        return eager
    if window.clamped:
        from kernels.aggregation import clamped

        return clamped
    if slides(window):
        from kernels.aggregation import rows

        return rows
    return eager


@operator(
    "aggregate",
    f"(Tensor weight, Tensor x, {WINDOW}) -> Tensor",
    fake=lambda weight, x, *_: empty_like_layout(x, (*x.shape[:3], *weight.shape[4:])),
    flops=lambda weight, x, *_: aggregation_flops(x, weight),
)
def _aggregate(weight, x, *fields):
    window = window_of(weight.shape[2:4], fields)
    return algebra(fields[-1], window, x, weight).aggregate(weight, x, window)


@operator(
    "correlate",
    f"(Tensor g, Tensor x, int[] kernel_size, {WINDOW}) -> Tensor",
    fake=lambda g, _x, kernel_size, *_: empty_kernel_layout(g, tuple(kernel_size)),
    flops=lambda g, _x, kernel_size, *_: 2 * math.prod((*g, *kernel_size)),
)
def _correlate(g, x, kernel_size, *fields):
    window = window_of(kernel_size, fields)
    return algebra(fields[-1], window, x, g).correlate(g, x, window)


@operator(
    "transpose",
    f"(Tensor weight, Tensor g, SymInt[] input_size, {WINDOW}) -> Tensor",
    fake=lambda _weight, g, input_size, *_: empty_like_layout(g, (*g.shape[:3], *input_size)),
    flops=lambda weight, g, *_: aggregation_flops(g, weight),
)
def _transpose(weight, g, input_size, *fields):
    window = window_of(weight.shape[2:4], fields)
    return algebra(fields[-1], window, g).transpose(weight, g, tuple(input_size), window)


_aggregate.differentiable(
    lambda grad, weight, x, *fields: _correlate(grad, x, list(weight.shape[2:4]), *fields),
    lambda grad, weight, x, *fields: _transpose(weight, grad, list(x.shape[3:]), *fields),
)
_correlate.differentiable(
    lambda grad, _g, x, _kernel_size, *fields: _aggregate(grad, x, *fields),
    lambda grad, g, x, _kernel_size, *fields: _transpose(grad, g, list(x.shape[3:]), *fields),
)
_transpose.differentiable(
    lambda grad, weight, g, _input_size, *fields: _correlate(g, grad, list(weight.shape[2:4]), *fields),
    lambda grad, weight, _g, _input_size, *fields: _aggregate(weight, grad, *fields),
)


def aggregate(weight: Tensor, x: Tensor, window: Window, backend: str) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)], [B, G, C, H', W'] in the memory order of x."""
    return _aggregate(weight, x, *fields_of(window, backend))


def correlate(g: Tensor, x: Tensor, window: Window, backend: str) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)], [B, G, Kh, Kw, H', W'] in the memory order of g."""
    return _correlate(g, x, list(window.kernel_size), *fields_of(window, backend))


def aggregation_flops(channels_shape: Sequence[int], kernel_shape: Sequence[int]) -> int:
    """Two operations per multiply-add: every entry [B, G, K², H', W'] of the kernel meets each channel of its group."""
    return 2 * channels_shape[2] * math.prod(kernel_shape)
