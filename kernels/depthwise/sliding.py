# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
"""3×3 depthwise convolutions of channels-last maps as operators: ``fused``'s kernel, and one for all its gradients.

    out[i] = Σ_k w[k] · y[i − 1 + k] (+ bias) (+ y[i]),  y = x or GELU(x),  squares = Σ_i out[i]²     per channel
    dout'[i] = dout[i] + 2·out[i]·dsquares
    dx[j] = y'[j] · (Σ_k w[k] · dout'[j + 1 − k] (+ dout'[j]))
    dw[k] = Σ_j y[j] · dout'[j + 1 − k]        dbias = Σ_i dout'[i]

A program slides down a strip of maps with three rows of gradients and one of inputs in registers. So every map is read
once, and what training would otherwise write between GELU, convolution and response norm is never stored. The
operators are ``triton_op``s: compiled code launches the kernels by itself, without the host's time for an operator.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.depthwise.fused import (
    BLOCK,
    COLUMNS,
    PROGRAMS,
    convolve_maps,
    cut,
    load_row,
    twice_gelu,
    twice_gelu_slope,
    twice_tail,
)
from kernels.launch import ceil_divide, is_plain, launch
from kernels.registration import traced_operator
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated


@triton.jit
def _gradient_row(
    p_grad, p_out, b_factor, m_row, first, width, stride, m_channel, GELU: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS + 2 gradients dout' [C] of a row, from column ``first`` on; 0 outside the map."""
    grads = load_row(p_grad, m_row, first, width, stride, m_channel, COLUMNS + 2)
    outputs = grads
    if GELU:
        outputs = load_row(p_out, m_row, first, width, stride, m_channel, COLUMNS + 2)
    row = ()
    for i in tl.static_range(COLUMNS + 2):
        b_grad = grads[i].to(tl.float32)
        row = row + (b_grad + b_factor * outputs[i].to(tl.float32) if GELU else b_grad,)
    return row


@triton.jit
def gradients_kernel(
    grad,  # [B, H, W, C], contiguous
    x,  # like grad
    weight,  # [C, 3, 3], contiguous
    out,  # like grad, not read without GELU
    grad_squares,  # [B, C], contiguous, not read without GELU
    grad_x,  # like grad
    sums,  # [chunks of images · bands · strips, C·9 + C], contiguous: of the weight, then of the bias
    batch, height, width, rows, bands, strips, blocks, images,
    CHANNELS: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (chunk of images, band of rows, strip of columns, block of channels), channels fastest. A constant
    # CHANNELS makes a row's addresses constant, too: without it they take a third of the registers.
    i_block = tl.program_id(0) % blocks
    i_part = tl.program_id(0) // blocks  # chunk, band and strip
    i_strip = i_part % strips
    i_chunk = i_part // strips // bands
    top = i_part // strips % bands * rows
    last_row = tl.minimum(top + rows, height)
    o_channel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < CHANNELS
    first = i_strip * COLUMNS
    pitch = width * CHANNELS
    w = ()
    for k in tl.static_range(9):
        b_weight = tl.load(weight + o_channel * 9 + (8 - k), mask=m_channel, other=0).to(tl.float32)
        if RESIDUAL and k == 4:
            b_weight += 1
        w = w + (b_weight * 0.5 if GELU else b_weight,)
    weights = (tl.zeros([BLOCK], tl.float32),) * 9
    b_bias = tl.zeros([BLOCK], tl.float32)
    for i_image in range(i_chunk * images, tl.minimum((i_chunk + 1) * images, batch)):
        o_first = tl.cast(i_image, tl.int64) * height * pitch + top * pitch + first * CHANNELS + o_channel
        p_grad, p_out = grad + o_first - pitch - CHANNELS, out + o_first - pitch - CHANNELS
        p_x, p_grad_x = x + o_first, grad_x + o_first
        b_factor = tl.zeros([BLOCK], tl.float32)
        if GELU:
            b_factor = 2 * tl.load(grad_squares + i_image * CHANNELS + o_channel, mask=m_channel, other=0)
        # Gradients of the rows above the input row, beside it and below.
        above = _gradient_row(p_grad, p_out, b_factor, top > 0, first - 1, width, CHANNELS, m_channel, GELU, COLUMNS)
        p_grad, p_out = p_grad + pitch, p_out + pitch
        here = _gradient_row(p_grad, p_out, b_factor, height > 0, first - 1, width, CHANNELS, m_channel, GELU, COLUMNS)
        values = load_row(p_x, height > 0, first, width, CHANNELS, m_channel, COLUMNS)
        for i_row in range(top, last_row):
            p_grad, p_out, p_x = p_grad + pitch, p_out + pitch, p_x + pitch
            following = load_row(p_x, i_row + 1 < last_row, first, width, CHANNELS, m_channel, COLUMNS)
            below = _gradient_row(
                p_grad, p_out, b_factor, i_row + 1 < height, first - 1, width, CHANNELS, m_channel, GELU, COLUMNS
            )
            for i in tl.static_range(COLUMNS):
                b_grad = w[0] * above[i] + w[1] * above[i + 1] + w[2] * above[i + 2]
                b_grad += w[3] * here[i] + w[4] * here[i + 1] + w[5] * here[i + 2]
                b_grad += w[6] * below[i] + w[7] * below[i + 1] + w[8] * below[i + 2]
                b_x = values[i].to(tl.float32)
                if GELU:
                    b_tail = twice_tail(b_x)
                    b_grad *= twice_gelu_slope(b_x, b_tail)
                    b_x = twice_gelu(b_x, b_tail)
                m_column = m_channel & (first + i < width)
                tl.store(p_grad_x + i * CHANNELS, b_grad.to(grad_x.dtype.element_ty), mask=m_column)
                b_bias += here[i + 1]
                added = ()
                for k in tl.static_range(3):
                    added = added + (weights[k] + b_x * below[i + 2 - k],)
                for k in tl.static_range(3):
                    added = added + (weights[3 + k] + b_x * here[i + 2 - k],)
                for k in tl.static_range(3):
                    added = added + (weights[6 + k] + b_x * above[i + 2 - k],)
                weights = added
            above, here, values = here, below, following
            p_grad_x += pitch
    p_sums = sums + i_part.to(tl.int64) * (CHANNELS * 10)
    for k in tl.static_range(9):
        tl.store(p_sums + o_channel * 9 + k, weights[k] * (0.5 if GELU else 1.0), mask=m_channel)
    tl.store(p_sums + CHANNELS * 9 + o_channel, b_bias, mask=m_channel)


@repeated
def _differentiated(
    grad: Tensor, x: Tensor, weight: Tensor, residual: bool, out: Tensor | None, grad_squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight and bias in a row of C·9 + C; traced, in rows to be summed."""
    batch, channels = x.shape[:2]
    sizes = cut(x)
    del sizes["half_channels"]
    others = sizes["bands"] * sizes["strips"]
    images = max(1, batch * others * sizes["blocks"] // (2 * PROGRAMS))
    chunks = ceil_divide(batch, images)
    parts, grad_x = x.new_empty((chunks * others, channels * 10), dtype=torch.float32), torch.empty_like(x)
    arguments = {
        "grad": grad.permute(0, 2, 3, 1),
        "x": x.permute(0, 2, 3, 1),
        "weight": weight.contiguous(),
        "out": (grad if out is None else out).permute(0, 2, 3, 1),
        "grad_squares": parts if grad_squares is None else grad_squares.contiguous(),
        "grad_x": grad_x.permute(0, 2, 3, 1),
        "sums": parts,
        "batch": batch,
        **sizes,
        "images": images,
        "CHANNELS": channels,
        "RESIDUAL": residual,
        "GELU": out is not None,
        "COLUMNS": COLUMNS,
        "BLOCK": BLOCK,
    }
    grid = (chunks * others * sizes["blocks"],)
    if is_plain(x):
        launch(gradients_kernel, grid, x.device, arguments, num_warps=1)
        return grad_x, sum_rows(sum_rows(parts, 64, torch.float32), 1, x.dtype)
    wrap_triton(gradients_kernel)[grid](**arguments, num_warps=1)
    return grad_x, parts


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, residual: bool, out: Tensor | None = None,
    grad_squares: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x, sums = _differentiated(grad, x, weight, residual, out, grad_squares)
    sums, channels = sums.sum(0).to(x.dtype) if len(sums) > 1 else sums[0].to(x.dtype), x.shape[1]
    return grad_x, sums[: channels * 9].view(channels, 1, 3, 3), sums[channels * 9 :].clone()


@traced_operator("sliding_depthwise_conv2d", flops=lambda x, *_: 2 * 9 * math.prod(x))
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """x [B, C, H, W] that ``fused.fits``, weight [C, 1, 3, 3], bias [C] or None, whether to add x -> out like x."""
    return convolve_maps(x, weight, bias, residual, False)[0]


@traced_operator("sliding_depthwise_conv2d_backward", flops=lambda grad, *_: 4 * 9 * math.prod(grad))
def gradients(grad: Tensor, x: Tensor, weight: Tensor, residual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``convolve``'s output, its x, weight and whether x is added -> those of x, weight and bias."""
    return _gradients(grad, x, weight, residual)


@traced_operator("gelu_depthwise_conv2d", flops=lambda x, *_: 2 * 9 * math.prod(x))
def gelu_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> tuple[Tensor, Tensor]:
    """``convolve`` of GELU(x), which is also what is added -> out, and its sums of squares [B, C] in float32. GELU and
    squares are not counted among its operations."""
    out, parts = convolve_maps(x, weight, bias, residual, True)
    return out, parts.sum(1)


@traced_operator("gelu_depthwise_conv2d_backward", flops=lambda _grad, _squares, x, *_: 4 * 9 * math.prod(x))
def _gelu_backward(
    grad: Tensor, grad_squares: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool,
    out: Tensor, squares: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(_last(grad), x, weight, residual, out, grad_squares)


def _last(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def _twice(grads: Any, grad: Tensor, x: Tensor, weight: Tensor, residual: bool) -> list[Tensor | None]:
    """Given those of ``gradients``'s outputs, which are linear in grad, in x and in weight."""
    of_x, of_weight, of_bias = grads
    found: list[Tensor | None] = [None, None, None]
    if of_x is not None:
        of_x = _last(of_x)
        found[0], found[2] = convolve(of_x, weight, None, residual), gradients(grad, of_x, weight, False)[1]
    if of_weight is not None or of_bias is not None:
        of_weight = torch.zeros_like(weight) if of_weight is None else of_weight
        through = convolve(x, of_weight, of_bias, False)
        found[0] = through if found[0] is None else found[0] + through
        found[1] = gradients(grad, x, of_weight, False)[0]
    return found


convolve.differentiable_together(
    lambda grads, x, weight, bias, residual: gradients(_last(grads[0]), x, weight, residual)[: 2 if bias is None else 3]
)
gradients.differentiable_together(_twice)
gelu_convolve.differentiable_once(_gelu_backward, "a depthwise convolution of GELU", derivatives=2)
