"""Depthwise convolution with a large static kernel: the sibling of involution whose weight is the same everywhere.

    convolve(x, w)[i]        = Σ_k w[k] · x[i − K//2 + k]   d/dw = weight_gradient(dy, x)   d/dx = convolve(dy, flip w)
    weight_gradient(g, x)[k] = Σ_i g[i] · x[i − K//2 + k]   d/dg = convolve(x, dv)         d/dx = convolve(g, flip dv)

The registered operators run the Triton kernels, or PyTorch's convolution where that is quicker or steered to what
is quick, and are closed under differentiation; where it needs no steering the eager path is PyTorch's operator itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import get_backend, resolve
from kernels.checks import check_shapes, check_tensors
from kernels.depthwise import eager
from kernels.layout import empty_like_layout
from kernels.registration import operator, without_autocast

LARGEST_KERNEL = 31


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − K//2 + k]  (+ bias[c])

    dx[b,c,j] = Σ_k weight[c,k] · dout[b,c, j + K//2 − k];  dweight[c,k] = Σ_{b,i} dout[b,c,i] · x[b,c, i − K//2 + k];
    dbias[c] = Σ_{b,i} dout[b,c,i].

    Args:
        x: features [B, C, H, W]; positions outside it read 0 ("same" padding).
        weight: one kernel per channel, [C, 1, K, K], K odd and at most 31.
        bias: [C], or None.

    Returns:
        [B, C, H, W] in the memory format of x; sums run in float32 (float64 for float64). Differentiable any number of
        times.

        A value of x that is not finite may reach any output of its own image and channel in Triton's products, and the
        weight's gradient anywhere in its channel; it never reaches another image or channel.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit together, or K is even or above 31.

    Source: the large kernels of arXiv 2502.20087 (OverLoCK), after arXiv 2203.06717.
    """
    x, weight, bias = _checked(x, weight, bias)
    backend, kernel_size = get_backend(), weight.shape[-1]
    on_eager = backend != "reference" and resolve(backend, x) == "eager"
    if backend == "reference" or (on_eager and not eager.is_steered(x, kernel_size)):
        return without_autocast(reference.depthwise_conv2d, x, weight, bias)
    differentiated = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if on_eager and not (differentiated and torch.is_grad_enabled()):  # exported, these are PyTorch's operators alone
        return without_autocast(eager.steered, x, weight, bias)
    if _is_sliding(x, kernel_size, backend):
        from kernels.depthwise.sliding import convolve

        return convolve(x, weight, bias, False)
    return _convolve(x, weight, bias, False, backend)


def residual_depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + depthwise_conv2d(x, weight, bias)"""
    x, weight, bias = _checked(x, weight, bias)
    if not _is_sliding(x, weight.shape[-1], get_backend()):
        return x + without_autocast(depthwise_conv2d, x, weight, bias)
    from kernels.depthwise.sliding import convolve

    return convolve(x, weight, bias, True)


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments with autocast applied; an error for those that do not fit together."""
    x, weight, bias = check_tensors(["bias"], x=x, weight=weight, bias=bias)
    kernel_size = check_shapes(x=(x, "B C H W"), weight=(weight, "C 1 K K"), bias=(bias, "C"))["K"]
    if kernel_size % 2 == 0:
        raise ValueError(f"weight must have an odd kernel size (the window needs a centre), got {list(weight.shape)}")
    if kernel_size > LARGEST_KERNEL:
        raise ValueError(f"weight must have a kernel size of at most {LARGEST_KERNEL}, got {list(weight.shape)}")
    return x, weight, bias


def _is_sliding(x: Tensor, kernel_size: int, backend: str) -> bool:
    """Whether the kernels for 3×3 windows of channels-last maps compute this."""
    if kernel_size != 3 or x.dtype == torch.float64 or backend == "reference" or resolve(backend, x) != "triton":
        return False
    from kernels.depthwise.fused import fits

    return fits(x)


@operator(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, bool flipped, str backend) -> Tensor",
    fake=lambda x, *_: empty_like_layout(x),
    flops=lambda x, weight, *_: 2 * math.prod(x) * weight[-1] ** 2,
)
def _convolve(x, weight, bias, flipped, backend):
    """``flipped`` convolves with weight[c, K−1−k]."""
    if resolve(backend, x) == "triton":
        from kernels.depthwise import forward, small

        return (small if small.fits(x, weight.shape[-1]) else forward).convolve(x, weight, bias, flipped)
    return eager.convolve(x, weight, bias, flipped)


@operator(
    "depthwise_conv2d_weight_gradient",
    "(Tensor grad, Tensor x, int kernel_size, str backend) -> Tensor",
    fake=lambda _grad, x, kernel_size, _backend: x.new_empty((x.shape[1], 1, kernel_size, kernel_size)),
    flops=lambda _grad, x, kernel_size, _backend: 2 * math.prod(x) * kernel_size**2,
)
def _weight_gradient(grad, x, kernel_size, backend):
    if resolve(backend, x) == "triton":
        from kernels.depthwise import backward, small

        fit = small.fits(x, kernel_size) and small.fits(grad, kernel_size)
        return (small if fit else backward).weight_gradient(grad, x, kernel_size)
    return eager.weight_gradient(grad, x, kernel_size)


@operator(
    "depthwise_conv2d_bias_gradient",
    "(Tensor grad, str backend) -> Tensor",
    fake=lambda grad, _backend: grad.new_empty(grad.shape[1]),
)
def bias_gradient(grad, backend):
    if resolve(backend, grad) == "triton":
        from kernels.depthwise import backward

        return backward.bias_gradient(grad)
    return grad.sum((0, 2, 3))


_convolve.differentiable(
    lambda grad, _x, weight, _bias, flipped, backend: _convolve(grad, weight, None, not flipped, backend),
    # Flipped, output i meets weight k at i + K//2 − k: input and output change places.
    lambda grad, x, weight, _bias, flipped, backend: _weight_gradient(
        *((x, grad) if flipped else (grad, x)), weight.shape[-1], backend
    ),
    lambda grad, _x, _weight, _bias, _flipped, backend: bias_gradient(grad, backend),
)
_weight_gradient.differentiable(
    lambda grad_weight, _grad, x, _kernel_size, backend: _convolve(x, grad_weight, None, False, backend),
    lambda grad_weight, grad, _x, _kernel_size, backend: _convolve(grad, grad_weight, None, True, backend),
)
bias_gradient.differentiable(lambda grad_bias, grad, _backend: grad_bias[:, None, None].expand(grad.shape))


def normed_branches(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], scale: Tensor, shift: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """out = Σ_n scale[n,c] · (u_n − mean u_n) / √(var u_n + ε) + shift[c],   u_n = w_n ∗ x: branches with batch norms

    Triton's kernels only; what calls it has made sure that ``resolve`` says so. Differentiable once.

    Args:
        x: [B, C, H, W], not empty.
        weights: N depthwise kernels [C, 1, K_n, K_n], K_n odd.
        dilations: that of each, under "same" zero padding.
        scale, shift: [N, C] and [C], in the type of x's sums.

    Returns:
        out like x, and mean and biased variance of every branch, [2, N, C], which have no gradient.
    """
    x, *kernels_of_branches = check_tensors(x=x, **{f"weights[{n}]": weight for n, weight in enumerate(weights)})
    return _normed_branches(x, kernels_of_branches, scale, shift, list(dilations), epsilon)[:2]


def _fake_branches(x, weights, scale, *_):
    from kernels.depthwise.rows import are_rows, new_rows

    rows = new_rows(x)
    u = x.new_empty((len(weights), *rows.shape))
    return empty_like_layout(x), scale.new_empty((2, *scale.shape)), x.new_empty(0) if are_rows(x) else rows, u


@operator(
    "normed_depthwise_branches",
    "(Tensor x, Tensor[] weights, Tensor scale, Tensor shift, int[] dilations, float epsilon)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_branches,
    flops=lambda x, weights, *_: 2 * math.prod(x) * sum(weight[-1] ** 2 for weight in weights),
)
def _normed_branches(x, weights, scale, shift, dilations, epsilon):
    """The output; statistics [2, N, C]; x in rows, empty where it lies in rows; what the norms take, in rows."""
    from kernels.depthwise import branches

    out, statistics, rows, u = branches.forward(x, weights, scale, shift, dilations, epsilon)
    return out, statistics, x.new_empty(0) if rows is None else rows, u


def _fake_branch_gradients(_grad, x, weights, scale, shift, *_):
    of_weights = [torch.empty_like(weight) for weight in weights]
    return empty_like_layout(x), of_weights, torch.empty_like(scale), torch.empty_like(shift)


@operator(
    "normed_depthwise_branches_backward",
    "(Tensor grad, Tensor x, Tensor[] weights, Tensor scale, Tensor shift, int[] dilations, float epsilon,"
    " Tensor out, Tensor statistics, Tensor rows, Tensor u) -> (Tensor, Tensor[], Tensor, Tensor)",
    fake=_fake_branch_gradients,
    flops=lambda _grad, x, weights, *_: 4 * math.prod(x) * sum(weight[-1] ** 2 for weight in weights),
)
def _normed_branches_backward(grad, x, weights, scale, _shift, dilations, epsilon, _out, statistics, rows, u):
    from kernels.depthwise import branches

    rows = x if rows.numel() == 0 else rows
    grad_x, sums, *grad_weights = branches.backward(grad, x, weights, scale, dilations, epsilon, statistics, rows, u)
    return grad_x, grad_weights, sums[:-1].clone(), sums[-1].clone()


_normed_branches.differentiable_once(_normed_branches_backward, "depthwise branches with batch norms")
