"""Gradients of involution with generated kernels.

dx = transpose(kernel, dout), the kernel generated again in the launch;
dkernel = correlate(dout, x), at most 96 MB of it at a time: [pixels, Kw·G·S] with rows padded to S;
dfeatures = dkernel @ weight and [dweight, dbias] = dkernelᵀ @ [features, 1], two plain matrix products.
"""

import torch
from torch import Tensor

from kernels.aggregation.correlate import correlate
from kernels.dtypes import accumulator_dtype
from kernels.involution import generate
from kernels.involution.forward import involution_generate_transpose, whole_blocks
from kernels.launch import next_power_of_2
from kernels.layout import empty_like_layout
from kernels.reorder import in_channels_last, in_order_of
from kernels.windows import Window


def backward(
    grad: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, features, weight and bias (always computed); sums over images run chunk by chunk, in order."""
    (_, number, height, width), groups = features.shape, x.shape[1]
    kernel_h, kernel_w = window.kernel_size
    steps = next_power_of_2(kernel_h)
    # Where pixels are adjacent, a transposed product or a padded block of sums does not fit the registers: a copy is
    # the lesser cost.
    given, grad, pixels_last = features, in_channels_last(grad), in_channels_last(x)
    features = in_channels_last(features)
    grad_x = involution_generate_transpose(grad, pixels_last, *whole_blocks(features, weight), bias, window)
    grad_x = grad_x if pixels_last is x else in_order_of(x, grad_x)
    # [Kw·G·S, R], as the entries of a pixel's gradient lie in memory
    span = weight.reshape(groups, kernel_h, kernel_w, number).permute(2, 0, 1, 3)
    span = torch.nn.functional.pad(span, (0, 0, 0, steps - kernel_h)).flatten(0, 2)
    # [B·H'·W', R + 8]: the features and ones, at a pitch of whole vectors
    pixels = features.new_empty((features.shape[0] * height * width, number + 8))
    pixels[:, :number] = features.movedim(1, 3).flatten(0, 2)
    pixels[:, number:] = 1
    grad_features = empty_like_layout(features)
    by_pixel = grad_features.movedim(1, 3)
    grad_span = None
    for images in generate.steps(features, span.shape[0], generate.STEP_BYTES_ELSEWHERE):
        entries = correlate(grad[images], pixels_last[images], window, padded=True).permute(0, 4, 5, 3, 1, 2)
        entries = entries.flatten(3).flatten(0, 2)
        chunk = slice(images.start * height * width, images.start * height * width + entries.shape[0])
        torch.mm(entries, span, out=by_pixel[images].flatten(0, 2))
        part = entries.t() @ pixels[chunk]
        grad_span = part if grad_span is None else grad_span.to(accumulator_dtype(part.dtype)) + part
    assert grad_span is not None
    # [G, Kh, Kw, R + 8]
    grad_span = grad_span.view(kernel_w, groups, steps, -1)[:, :, :kernel_h].permute(1, 2, 0, 3)
    grad_weight, grad_bias = weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])
    grad_weight.view(grad_span[..., :number].shape).copy_(grad_span[..., :number])
    grad_bias.view(grad_span.shape[:3]).copy_(grad_span[..., number])
    return grad_x, grad_features if features is given else in_order_of(given, grad_features), grad_weight, grad_bias
