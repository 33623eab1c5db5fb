"""na2d_softmax_av on Triton kernels: its passes, and the gradient of its relative position bias.

The weights p are never stored: the backward pass computes them again from one number per pixel and head, log Σ_k exp.
The bias' gradient is the gradient of logits, summed over parts of the batch by one kernel, then along the outputs that
meet an entry of the table: a partial table per chunk of pixels, summed in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.dtypes import accumulator_dtype, precision
from kernels.launch import ceil_divide, launch
from kernels.layout import empty_like_layout
from kernels.neighborhood.configs import Weights
from kernels.neighborhood.launchers import along_window, mix, softmax_backward
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated
from kernels.windows import Window
from kernels.windows_triton import split_program, window_start

# Tile of the bias gradient; in the interpreter, where every operation costs the same, one that holds a whole small map.
RPB_BLOCK_PIXELS, RPB_BLOCK_RELATIVE = (256, 1024) if interpreting() else (32, 32)
BATCH_PARTS = 1 if interpreting() else 4
RPB_CHUNKS = 64  # partial tables per head: enough programs to fill a GPU, few enough to sum in one small reduction


@triton.jit
def _grad_rpb_kernel(
    grad,  # [parts, G, H, W, K²]: the gradient of logits, summed over each part of the batch
    partial_ptr,  # [chunks, G, (2Kh-1)·(2Kw-1)], contiguous
    parts, groups, height, width, chunks,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_RELATIVE: tl.constexpr,
):  # fmt: skip
    RELATIVE_W: tl.constexpr = 2 * KERNEL_W - 1
    RELATIVE: tl.constexpr = (2 * KERNEL_H - 1) * RELATIVE_W
    i_relative, i_chunk, i_group, _i_batch = split_program(tl.cdiv(RELATIVE, BLOCK_RELATIVE), chunks, groups)
    o_relative = (i_relative * BLOCK_RELATIVE + tl.arange(0, BLOCK_RELATIVE))[:, None]
    o_relative_h, o_relative_w = o_relative // RELATIVE_W, o_relative % RELATIVE_W

    p_grad = grad.ptr + i_group * grad.g

    # [R]
    b_sum = tl.zeros([BLOCK_RELATIVE], ACCUMULATOR)
    for i_block in range(i_chunk, tl.cdiv(height * width, BLOCK_PIXELS), chunks):
        o_pixel = i_block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        o_row = (o_pixel // width)[None, :]
        o_column = (o_pixel % width)[None, :]
        # The window position at this distance from this pixel.
        o_start_h = window_start(o_row, height, KERNEL_H, DILATION_H)
        o_start_w = window_start(o_column, width, KERNEL_W, DILATION_W)
        o_kernel_h = o_relative_h - (KERNEL_H - 1) + (o_row - o_start_h) // DILATION_H
        o_kernel_w = o_relative_w - (KERNEL_W - 1) + (o_column - o_start_w) // DILATION_W
        m_row = (o_kernel_h >= 0) & (o_kernel_h < KERNEL_H)
        m_column = (o_kernel_w >= 0) & (o_kernel_w < KERNEL_W)
        # [R, P]
        o_grad = (o_kernel_h * KERNEL_W + o_kernel_w) * grad.k + (
            o_row.to(OFFSET) * grad.h + o_column.to(OFFSET) * grad.w
        )
        m_grad = m_row & m_column & (o_relative < RELATIVE) & (o_pixel < height * width)[None, :]
        p_part = p_grad + o_grad
        for _ in range(parts):
            b_sum += tl.sum(tl.load(p_part, mask=m_grad, other=0), axis=1)
            p_part += grad.b
    o_relative = i_relative * BLOCK_RELATIVE + tl.arange(0, BLOCK_RELATIVE)
    tl.store(
        partial_ptr + (i_chunk.to(tl.int64) * groups + i_group) * RELATIVE + o_relative, b_sum, o_relative < RELATIVE
    )


def _batch_parts(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over a few parts of the batch, in the memory order of a tensor that is dense, the batch outermost."""
    elements = tensor[0].numel()
    sums = sum_rows(tensor.as_strided((tensor.shape[0], elements), (elements, 1)), BATCH_PARTS, dtype)
    return sums.as_strided((sums.shape[0], *tensor.shape[1:]), (elements, *tensor.stride()[1:]))


def grad_rpb(gradient_of_logits: Tensor, window: Window) -> Tensor:
    """Σ over (b, i, k) of the gradient of logits [B,G,Kh,Kw,H,W] at each relative position, [G,2Kh-1,2Kw-1], as wide as
    an accumulator."""
    _, groups, kernel_h, kernel_w, height, width = gradient_of_logits.shape
    dtype = accumulator_dtype(gradient_of_logits.dtype)
    parts = _batch_parts(gradient_of_logits, dtype)
    chunks = min(RPB_CHUNKS, ceil_divide(height * width, RPB_BLOCK_PIXELS))
    partial = parts.new_empty((chunks, groups, 2 * kernel_h - 1, 2 * kernel_w - 1))
    # One program per (block of relative positions, chunk of pixels, group); each walks its chunk in order.
    relative = (2 * kernel_h - 1) * (2 * kernel_w - 1)
    grid = (ceil_divide(relative, RPB_BLOCK_RELATIVE) * chunks * groups,)
    arguments = {
        "grad": along_window(parts), "partial_ptr": partial, "parts": parts.shape[0], "groups": groups,
        "height": height, "width": width, "chunks": chunks,
        "KERNEL_H": kernel_h, "KERNEL_W": kernel_w, "DILATION_H": window.dilation[0], "DILATION_W": window.dilation[1],
        **precision(parts), "BLOCK_PIXELS": RPB_BLOCK_PIXELS, "BLOCK_RELATIVE": RPB_BLOCK_RELATIVE,
    }  # fmt: skip
    launch(_grad_rpb_kernel, grid, parts.device, arguments, num_warps=4, num_stages=2)
    return partial.sum(0)


@repeated
def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), [B,G,C,H,W] like value; log Σ_k exp, [B,G,H,W])."""
    statistics = value.new_empty((*value.shape[:2], *value.shape[3:]), dtype=accumulator_dtype(value.dtype))
    out = empty_like_layout(value, value.shape)
    return mix(value, Weights(logits, rpb, out, statistics), window) if value.numel() > 0 else (out, statistics)


def softmax_aggregate_backward(
    grad: Tensor, logits: Tensor, value: Tensor, rpb: Tensor | None, out: Tensor, statistics: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of logits, value and rpb (None without one), each in the memory order of its tensor."""
    of_logits = empty_like_layout(logits, logits.shape)
    if value.numel() == 0:
        return of_logits, empty_like_layout(value, value.shape), None if rpb is None else torch.zeros_like(rpb)
    weights = Weights(logits, rpb, out, statistics)
    of_logits, of_value = softmax_backward(grad, value, weights, of_logits, window)
    return of_logits, of_value, None if rpb is None else grad_rpb(of_logits, window).to(rpb.dtype)
