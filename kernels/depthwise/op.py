"""Depthwise convolution with a large static kernel: the sibling of involution whose weight is the same everywhere.

    convolve(x, w)[i]        = Σ_k w[k] · x[i − K//2 + k]   d/dw = weight_gradient(dy, x)   d/dx = convolve(dy, flip w)
    weight_gradient(g, x)[k] = Σ_i g[i] · x[i − K//2 + k]   d/dg = convolve(x, dv)         d/dx = convolve(g, flip dv)

The registered operators run the Triton kernels, or PyTorch's convolution where that is quicker or steered to what
is quick, and are closed under differentiation; where it needs no steering the eager path is PyTorch's operator itself.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import reference
from kernels.backend import get_backend, resolve
from kernels.checks import check_shape, check_tensors
from kernels.depthwise import eager
from kernels.layout import empty_like_map
from kernels.registration import gradients, operator, without_autocast

LARGEST_KERNEL = 31


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − K//2 + k]  (+ bias[c])

    dx[b,c,j] = Σ_k weight[c,k] · dout[b,c, j + K//2 − k];  dweight[c,k] = Σ_{b,i} dout[b,c,i] · x[b,c, i − K//2 + k];
    dbias[c] = Σ_{b,i} dout[b,c,i].

    Args:
        x: features [B, C, H, W]; positions outside it read 0 ("same" padding).
        weight: one kernel a channel, [C, 1, K, K], K odd and at most 31.
        bias: [C], or None.

    Returns:
        [B, C, H, W] in the memory format of x; sums run in float32 (float64 for float64). Differentiable any number of
        times.

        A value of x that is not finite may reach any output of its own image and channel in Triton's products, and the
        weight's gradient anywhere in its channel; it never reaches another image or channel.

    Raises:
        TypeError: an argument is no floating tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit together, or K is even or above 31.

    Source: the large kernels of arXiv 2502.20087 (OverLoCK), after arXiv 2203.06717.
    """
    x, weight, bias = check_tensors(["bias"], x=x, weight=weight, bias=bias)
    check_shape("x", x, "B C H W")
    check_shape("weight", weight, "C 1 K K", C=x.shape[1])
    kernel_size = weight.shape[-1]
    if kernel_size % 2 == 0:
        raise ValueError(f"weight must have an odd kernel size (the window needs a centre), got {list(weight.shape)}")
    if kernel_size > LARGEST_KERNEL:
        raise ValueError(f"weight must have a kernel size of at most {LARGEST_KERNEL}, got {list(weight.shape)}")
    if bias is not None:
        check_shape("bias", bias, "C", C=x.shape[1])
    backend = get_backend()
    on_eager = backend != "reference" and resolve(backend, x) == "eager"
    if backend == "reference" or (on_eager and not eager.is_steered(x, kernel_size)):
        return without_autocast(reference.depthwise_conv2d)(x, weight, bias)
    differentiated = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if on_eager and not (differentiated and torch.is_grad_enabled()):  # exported, these are PyTorch's operators alone
        return without_autocast(eager.steered)(x, weight, bias)
    return _convolve(x, weight, bias, False, backend)


@operator("depthwise_conv2d", "(Tensor x, Tensor weight, Tensor? bias, bool flipped, str backend) -> Tensor")
def _convolve(x, weight, bias, flipped, backend):
    """``flipped`` convolves with weight[c, K−1−k]."""
    if resolve(backend, x) == "triton":
        from kernels.depthwise.forward import convolve
    else:
        from kernels.depthwise.eager import convolve
    return convolve(x, weight, bias, flipped)


@_convolve.register_fake
def _(x, *_):
    return empty_like_map(x)


@operator("depthwise_conv2d_weight_gradient", "(Tensor grad, Tensor x, int kernel_size, str backend) -> Tensor")
def _weight_gradient(grad, x, kernel_size, backend):
    if resolve(backend, x) == "triton":
        from kernels.depthwise.backward import weight_gradient
    else:
        from kernels.depthwise.eager import weight_gradient
    return weight_gradient(grad, x, kernel_size)


@_weight_gradient.register_fake
def _(grad, x, kernel_size, backend):
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size))


@operator("depthwise_conv2d_bias_gradient", "(Tensor grad, str backend) -> Tensor")
def _bias_gradient(grad, backend):
    if resolve(backend, grad) == "triton":
        from kernels.depthwise.backward import bias_gradient

        return bias_gradient(grad)
    return grad.sum((0, 2, 3))


@_bias_gradient.register_fake
def _(grad, backend):
    return grad.new_empty(grad.shape[1])


def _save(ctx, inputs, output):
    """Both tensor arguments that a derivative needs come first, the backend last."""
    ctx.save_for_backward(*inputs[:2])
    (*_, ctx.option, ctx.backend), ctx.number = inputs, len(inputs)


def _convolution_backward(ctx, grad):
    (x, weight), flipped, backend = ctx.saved_tensors, ctx.option, ctx.backend
    # Flipped, output i meets weight k at i + K//2 − k: input and output change places.
    factors = (x, grad) if flipped else (grad, x)
    return gradients(
        ctx,
        lambda: _convolve(grad, weight, None, not flipped, backend),
        lambda: _weight_gradient(*factors, weight.shape[-1], backend),
        lambda: _bias_gradient(grad, backend),
    )


def _weight_gradient_backward(ctx, grad_weight):
    (grad, x), backend = ctx.saved_tensors, ctx.backend
    return gradients(
        ctx,
        lambda: _convolve(x, grad_weight, None, False, backend),
        lambda: _convolve(grad, grad_weight, None, True, backend),
    )


def _save_shape(ctx, inputs, output):
    ctx.shape = inputs[0].shape


def _bias_gradient_backward(ctx, grad_bias):
    return grad_bias[:, None, None].expand(ctx.shape), None


_convolve.register_autograd(_convolution_backward, setup_context=_save)
_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save)
_bias_gradient.register_autograd(_bias_gradient_backward, setup_context=_save_shape)


@register_flop_formula(torch.ops.dynamic_kernels.depthwise_conv2d)
def _(x_shape, weight_shape, *_, **__) -> int:
    """Two operations per multiply-add: every pixel of every channel meets K² weights."""
    return 2 * math.prod(x_shape) * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.dynamic_kernels.depthwise_conv2d_weight_gradient)
def _(grad_shape, x_shape, kernel_size, *_, **__) -> int:
    return 2 * math.prod(x_shape) * kernel_size**2
