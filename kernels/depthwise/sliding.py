# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
"""3×3 depthwise convolutions of channels-last maps, trained: ``fused``'s kernel and the gradient of its weight.

    out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − 1 + k] (+ bias[c]) (+ x[b,c,i])
    gradient[c,k] = Σ_{b,i} grad[b,c,i] · x[b,c, i − 1 + k]

For the gradient a program slides down a strip of maps, with three rows of gradients and one of inputs in registers, and
adds up the nine sums of its channels. Both are ``triton_op``s, which compiled code launches by itself.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.utils.flop_counter import register_flop_formula

from kernels.depthwise.fused import BLOCK, COLUMNS, PROGRAMS, cut, fused_kernel, is_plain, launched, load_row, prepared
from kernels.launch import ceil_divide, launch
from kernels.registration import Operator
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated


@triton.jit
def _gradient_kernel(
    grad,  # [B, H, W, C], contiguous
    x,  # like grad
    parts,  # [chunks of images · bands · strips, C, 3, 3], contiguous
    batch, height, width, rows, half_channels, bands, strips, blocks, images,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (chunk of images, band of rows, strip of columns, block of channels), channels fastest.
    i_block = tl.program_id(0) % blocks
    i_part = tl.program_id(0) // blocks  # chunk, band and strip
    i_strip = i_part % strips
    i_chunk = i_part // strips // bands
    top = i_part // strips % bands * rows
    last_row = tl.minimum(top + rows, height)
    channels = half_channels * 2  # the compiler then knows that it is even
    o_channel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    first = i_strip * COLUMNS
    tops = (tl.zeros([BLOCK], tl.float32),) * 3  # sums of the kernel's rows
    middles = (tl.zeros([BLOCK], tl.float32),) * 3
    bottoms = (tl.zeros([BLOCK], tl.float32),) * 3
    for i_image in range(i_chunk * images, tl.minimum((i_chunk + 1) * images, batch)):
        o_first = tl.cast(i_image, tl.int64) * height * width * channels + ((top - 1) * width + first) * channels
        p_x, p_grad = x + o_first - channels + o_channel, grad + o_first + width * channels + o_channel
        # Gradients of the rows above the input row that is read, beside it and below; a band has those of its own.
        above = (tl.zeros([BLOCK], tl.float32),) * COLUMNS
        here = (tl.zeros([BLOCK], tl.float32),) * COLUMNS
        for i_row in range(top - 1, last_row + 1):
            values = load_row(p_x, (i_row >= 0) & (i_row < height), first - 1, width, channels, m_channel, COLUMNS + 2)
            below = load_row(p_grad, i_row + 1 < last_row, first, width, channels, m_channel, COLUMNS)
            for k in tl.static_range(3):
                b_top, b_middle, b_bottom = tops[k], middles[k], bottoms[k]
                for i in tl.static_range(COLUMNS):
                    b_top += below[i] * values[i + k]
                    b_middle += here[i] * values[i + k]
                    b_bottom += above[i] * values[i + k]
                tops = tops[:k] + (b_top,) + tops[k + 1 :]
                middles = middles[:k] + (b_middle,) + middles[k + 1 :]
                bottoms = bottoms[:k] + (b_bottom,) + bottoms[k + 1 :]
            above, here = here, below
            p_x += width * channels
            p_grad += width * channels
    sums = tops + middles + bottoms
    for k in tl.static_range(9):
        tl.store(parts + (i_part.to(tl.int64) * channels + o_channel) * 9 + k, sums[k], mask=m_channel)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool, residual: bool) -> Tensor:
    return launched(x, weight, bias, False, False, flipped, residual)[0]


@triton_op("dynamic_kernels::sliding_depthwise_conv2d", mutates_args=())
def _traced(x: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool, residual: bool) -> Tensor:
    if is_plain(x):
        return _convolve(x, weight, bias, flipped, residual)
    grid, arguments, out, _ = prepared(x, weight, bias, False, False, flipped, residual)
    wrap_triton(fused_kernel)[grid](**arguments, num_warps=1)
    return out


def _prepared_gradient(grad: Tensor, x: Tensor) -> tuple[tuple[int, ...], dict[str, Any], Tensor]:
    """The launch's grid and arguments; its sums, [parts, C · 9]."""
    batch, channels = x.shape[:2]
    sizes = cut(x)
    others = sizes["bands"] * sizes["strips"]
    images = max(1, batch * others * sizes["blocks"] // (2 * PROGRAMS))
    chunks = ceil_divide(batch, images)
    parts = x.new_empty((chunks * others, channels * 9), dtype=torch.float32)
    arguments = {
        "grad": grad.permute(0, 2, 3, 1),
        "x": x.permute(0, 2, 3, 1),
        "parts": parts,
        "batch": batch,
        **sizes,
        "images": images,
        "COLUMNS": COLUMNS,
        "BLOCK": BLOCK,
    }
    return (chunks * others * sizes["blocks"],), arguments, parts


@repeated
def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    grid, arguments, parts = _prepared_gradient(grad, x)
    launch(_gradient_kernel, grid, x.device, arguments, num_warps=1)
    return sum_rows(sum_rows(parts, 64, torch.float32), 1, x.dtype).view(x.shape[1], 1, 3, 3)


@triton_op("dynamic_kernels::sliding_depthwise_conv2d_weight_gradient", mutates_args=())
def _traced_gradient(grad: Tensor, x: Tensor) -> Tensor:
    if is_plain(x):
        return _weight_gradient(grad, x)
    grid, arguments, parts = _prepared_gradient(grad, x)
    wrap_triton(_gradient_kernel)[grid](**arguments, num_warps=1)
    return parts.sum(0).to(x.dtype).view(x.shape[1], 1, 3, 3)


convolve = Operator(_traced, _convolve)
"""x [B, C, H, W] that ``fused.fits``, weight [C, 1, 3, 3], bias [C] or None, whether to take weight[c, 8 − k], and
whether to add x -> out like x."""
weight_gradient = Operator(_traced_gradient, _weight_gradient)


def _last(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def _bias_gradient(grad: Tensor) -> Tensor:
    if not is_plain(grad):  # compiled code sums it with what else it sums
        return grad.sum((0, 2, 3))
    from kernels.depthwise.op import bias_gradient

    return bias_gradient(grad, "triton")


convolve.differentiable(
    lambda grad, _x, weight, _bias, flipped, residual: convolve(_last(grad), weight, None, not flipped, residual),
    # Flipped, output i meets weight k at i + 1 − k: input and output change places.
    lambda grad, x, _weight, _bias, flipped, _residual: weight_gradient(
        *((x, _last(grad)) if flipped else (_last(grad), x))
    ),
    lambda grad, *_: _bias_gradient(_last(grad)),
)
weight_gradient.differentiable(
    lambda grad_weight, _grad, x: convolve(x, grad_weight, None, False, False),
    lambda grad_weight, grad, _x: convolve(grad, grad_weight, None, True, False),
)


@register_flop_formula(
    [
        torch.ops.dynamic_kernels.sliding_depthwise_conv2d,
        torch.ops.dynamic_kernels.sliding_depthwise_conv2d_weight_gradient,
    ]
)
def _flops(first: Any, *_: Any, **__: Any) -> int:
    """Of either: nine multiply-adds for each element of the map that comes first."""
    batch, channels, height, width = first
    return 2 * 9 * batch * channels * height * width
