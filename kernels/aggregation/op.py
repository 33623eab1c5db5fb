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
from kernels.registration import WINDOW, operator, window_of
from kernels.windows import Window


def algebra(backend: str, window: Window, *maps: Tensor) -> ModuleType:
    """The module that computes the three here; Triton is imported at the first use and not before."""
    if "eager" in [resolve(backend, each) for each in maps]:
        return eager
    if window.clamped:
        from kernels.neighborhood import passes

        return passes
    if slides(window):
        from kernels.aggregation import rows

        return rows
    return eager


@operator(
    "aggregate",
    f"(Tensor weight, Tensor x, {WINDOW}, str backend) -> Tensor",
    fake=lambda weight, x, *_: empty_like_layout(x, (*x.shape[:3], *weight.shape[4:])),
    flops=lambda weight, x, *_: aggregation_flops(x, weight),
)
def aggregate(weight, x, window, backend):
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)], [B, G, C, H', W'] in the memory order of x."""
    window = window_of(window)
    return algebra(backend, window, x, weight).aggregate(weight, x, window)


@operator(
    "correlate",
    f"(Tensor g, Tensor x, {WINDOW}, str backend) -> Tensor",
    fake=lambda g, _x, window, _backend: empty_kernel_layout(g, window_of(window).kernel_size),
    flops=lambda g, _x, window, _backend: 2 * math.prod((*g, *window_of(window).kernel_size)),
)
def correlate(g, x, window, backend):
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)], [B, G, Kh, Kw, H', W'] in the memory order of g."""
    window = window_of(window)
    return algebra(backend, window, x, g).correlate(g, x, window)


@operator(
    "transpose",
    f"(Tensor weight, Tensor g, SymInt[] input_size, {WINDOW}, str backend) -> Tensor",
    fake=lambda _weight, g, input_size, *_: empty_like_layout(g, (*g.shape[:3], *input_size)),
    flops=lambda weight, g, *_: aggregation_flops(g, weight),
)
def transpose(weight, g, input_size, window, backend):
    window = window_of(window)
    return algebra(backend, window, g).transpose(weight, g, tuple(input_size), window)


# The arguments that are not named are the window and the backend.
aggregate.differentiable(
    lambda grad, weight, x, *rest: correlate(grad, x, *rest),
    lambda grad, weight, x, *rest: transpose(weight, grad, list(x.shape[3:]), *rest),
)
correlate.differentiable(
    lambda grad, _g, x, *rest: aggregate(grad, x, *rest),
    lambda grad, g, x, *rest: transpose(grad, g, list(x.shape[3:]), *rest),
)
transpose.differentiable(
    lambda grad, weight, g, _input_size, *rest: correlate(g, grad, *rest),
    lambda grad, weight, _g, _input_size, *rest: aggregate(weight, grad, *rest),
)


def aggregation_flops(channels_shape: Sequence[int], kernel_shape: Sequence[int]) -> int:
    """Two operations per multiply-add: every entry [B, G, K², H', W'] of the kernel meets each channel of its group."""
    return 2 * channels_shape[2] * math.prod(kernel_shape)
