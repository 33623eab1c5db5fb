# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
"""3×3 depthwise convolutions of channels-last maps as operators: ``fused``'s kernel, and one for all its gradients.

    out[i] = Σ_k w[k] · y[i − 1 + k] (+ bias) (+ y[i]),  y = x or GELU(x),  squares = Σ_i out[i]²     per channel
    dout'[i] = dout[i] + 2·out[i]·dsquares
    dx[j] = y'[j] · (Σ_k w[k] · dout'[j + 1 − k] (+ dout'[j]))
    dw[k] = Σ_j y[j] · dout'[j + 1 − k]        dbias = Σ_i dout'[i]

A program slides down a strip of a map with three rows of gradients and one of inputs in registers. So every map is read
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

from kernels.depthwise.fused import BLOCK, COLUMNS, STAGES, convolve_maps, cut, load_row, twice_gelu_and_slope
from kernels.launch import is_plain, launch
from kernels.registration import traced_operator
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated


@triton.jit
def _kept(row):
    """The row itself, as computed values: Triton loads ahead only in loops that pass on nothing else."""
    kept = ()
    for i in tl.static_range(len(row)):
        kept = kept + (row[i].to(tl.int32, bitcast=True).to(tl.float32, bitcast=True),)
    return kept


@triton.jit
def _gradient_row(
    p_grad, p_out, b_factor, m_row, m_left, m_right, o_column, width,
    CHANNELS: tl.constexpr, GELU: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """COLUMNS + 2 gradients dout' [BLOCK] of a row, from the strip's left neighbour on; 0 outside the map."""
    grads = load_row(p_grad, m_row, m_left, m_right, o_column, width, CHANNELS, -1, COLUMNS, COLUMNS, WHOLE)
    outputs = grads
    if GELU:
        outputs = load_row(p_out, m_row, m_left, m_right, o_column, width, CHANNELS, -1, COLUMNS, COLUMNS, WHOLE)
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
    sums,  # [B · bands · strips, C·9 + C], contiguous: of the weight, then of the bias
    height, width, rows, bands, strips, blocks, CHANNELS: tl.constexpr,
    RESIDUAL: tl.constexpr, GELU: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (image, band of rows, BLOCK of its strips' channels), channels fastest.
    i_part = tl.program_id(0) // blocks  # image and band
    i_image = i_part // bands
    top = i_part % bands * rows
    last_row = tl.minimum(top + rows, height)
    o_lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_lane = o_lane < strips * CHANNELS
    o_column, o_channel = o_lane // CHANNELS * COLUMNS, o_lane % CHANNELS
    m_left, m_right = m_lane & (o_column > 0), m_lane & (o_column + COLUMNS < width)
    pitch = width * CHANNELS
    w = ()
    for k in tl.static_range(9):
        b_weight = tl.load(weight + o_channel * 9 + (8 - k), mask=m_lane, other=0).to(tl.float32)
        if RESIDUAL and k == 4:
            b_weight += 1
        w = w + (b_weight * 0.5 if GELU else b_weight,)
    weights = (tl.zeros([BLOCK], tl.float32),) * 9
    b_bias = tl.zeros([BLOCK], tl.float32)
    o_first = (i_image.to(tl.int64) * height + top) * pitch + (o_column * CHANNELS + o_channel)
    p_grad, p_out = grad + o_first - pitch, out + o_first - pitch
    p_x, p_grad_x = x + o_first, grad_x + o_first
    b_factor = tl.zeros([BLOCK], tl.float32)
    if GELU:
        b_factor = 2 * tl.load(grad_squares + i_image * CHANNELS + o_channel, mask=m_lane, other=0)
    # Gradients of the rows above the input row, beside it and below.
    above = _gradient_row(
        p_grad, p_out, b_factor, m_lane & (top > 0), m_left, m_right, o_column, width,
        CHANNELS, GELU, COLUMNS, WHOLE,
    )  # fmt: skip
    p_grad, p_out = p_grad + pitch, p_out + pitch
    here = _gradient_row(
        p_grad, p_out, b_factor, m_lane, m_left, m_right, o_column, width, CHANNELS, GELU, COLUMNS, WHOLE
    )
    p_grad, p_out = p_grad + pitch, p_out + pitch
    for i_row in tl.range(top, last_row, num_stages=STAGES):
        below = _gradient_row(
            p_grad, p_out, b_factor, m_lane & (i_row + 1 < height), m_left, m_right, o_column, width,
            CHANNELS, GELU, COLUMNS, WHOLE,
        )  # fmt: skip
        values = load_row(p_x, m_lane, m_left, m_right, o_column, width, CHANNELS, 0, COLUMNS - 1, COLUMNS, WHOLE)
        rows_of_grad = (above, here, below)
        for i in tl.static_range(COLUMNS):
            b_grad = w[0] * above[i]
            for k in tl.static_range(1, 9):
                b_grad += w[k] * rows_of_grad[k // 3][i + k % 3]
            b_x = values[i].to(tl.float32)
            if GELU:
                b_x, b_slope = twice_gelu_and_slope(b_x, x.dtype.element_ty.primitive_bitwidth == 16)
                b_grad *= b_slope
            m_column = m_lane if WHOLE else m_lane & (o_column + i < width)
            tl.store(p_grad_x + i * CHANNELS, b_grad.to(grad_x.dtype.element_ty), mask=m_column)
            b_bias += here[i + 1]
            added = ()
            for k in tl.static_range(9):
                added = added + (weights[k] + b_x * rows_of_grad[2 - k // 3][i + 2 - k % 3],)
            weights = added
        above, here = _kept(here), below
        p_grad, p_out = p_grad + pitch, p_out + pitch
        p_x, p_grad_x = p_x + pitch, p_grad_x + pitch
    p_sums = sums + (i_part.to(tl.int64) * strips + o_lane // CHANNELS) * (CHANNELS * 10)
    for k in tl.static_range(9):
        tl.store(p_sums + o_channel * 9 + k, weights[k] * (0.5 if GELU else 1.0), mask=m_lane)
    tl.store(p_sums + CHANNELS * 9 + o_channel, b_bias, mask=m_lane)


@repeated
def _differentiated(
    grad: Tensor, x: Tensor, weight: Tensor, residual: bool, out: Tensor | None, grad_squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight and bias in a row of C·9 + C; traced, in rows to be summed."""
    batch, channels = x.shape[:2]
    sizes = cut(x, COLUMNS)
    parts = x.new_empty((batch * sizes["bands"] * sizes["strips"], channels * 10), dtype=torch.float32)
    grad_x = torch.empty_like(x)
    arguments = {
        "grad": grad.permute(0, 2, 3, 1), "x": x.permute(0, 2, 3, 1), "weight": weight.contiguous(),
        "out": (grad if out is None else out).permute(0, 2, 3, 1),
        "grad_squares": parts if grad_squares is None else grad_squares.contiguous(),
        "grad_x": grad_x.permute(0, 2, 3, 1), "sums": parts, **sizes, "CHANNELS": channels, "RESIDUAL": residual,
        "GELU": out is not None, "COLUMNS": COLUMNS, "WHOLE": x.shape[3] % COLUMNS == 0, "STAGES": STAGES,
        "BLOCK": BLOCK,
    }  # fmt: skip
    grid = (batch * sizes["bands"] * sizes["blocks"],)
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
