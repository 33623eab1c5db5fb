# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""na2d_softmax_av as Triton kernels: softmax and relative position bias inside, nothing of size K² kept for backward.

Forward reads K² logits and D values and writes D per pixel and head; the unfused chain (+ rpb, softmax, aggregate)
moves the K² logits five times. The softmax runs online over blocks of window positions, and leaves one number per
pixel, log Σ exp, from which both backward kernels compute the weights again:

    grad_value   reads K² logits and D gradients, writes D        a gather over the outputs that reach each input
    grad_logits  reads K² logits and 3·D, writes K²               (p · (dp − δ), δ = Σ_c grad·out in the kernel)
    grad_rpb     reads K² gradients, writes one partial table per chunk of images, summed in a fixed order: no atomics

Blocks are [steps, channels, pixels] as in ``aggregation.triton_kernels``, and so are the configs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.triton_kernels import (
    CONFIGS,
    Config,
    Problem,
    block_arguments,
    heuristic,
    problem_of,
    stride_arguments,
    window_arguments,
)
from kernels.backend import interpreting
from kernels.dtypes import accumulator_dtype, at_least_float32, precision
from kernels.launch import ceil_divide, launch
from kernels.layout import empty_like_layout
from kernels.neighborhood import eager
from kernels.tuning import tunable
from kernels.windows import Pair, Window
from kernels.windows_triton import (
    inverse_neighbour,
    inverse_steps,
    neighbour,
    relative_position,
    split_program,
    window_start,
)

__all__ = ["softmax_aggregate", "softmax_aggregate_backward"]

# Tile of the bias gradient; in the interpreter, where every operation costs the same, one that holds a whole small map.
RPB_BLOCK_PIXELS, RPB_BLOCK_RELATIVE = (256, 1024) if interpreting() else (64, 32)
RPB_CHUNKS = 64  # partial tables per head: enough programs to fill a GPU, few enough to sum in one small reduction


def grad_logits_heuristic(problem: Problem) -> Config:
    """The algebra's, on twice the threads: out, gradient, logits and values live at once, and 4 warps spill them."""
    return replace(heuristic(problem), num_warps=8)


@triton.jit
def _load_logits(
    p_logits, p_rpb, o_kernel_h, o_kernel_w, o_row, o_column, o_input_h, o_input_w, m_step,
    logits_stride_kh, logits_stride_kw, logits_stride_h, logits_stride_w, rpb_stride_h, rpb_stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """logits + rpb of a block [S, P], −inf where ``m_step`` is off."""
    b_logits = tl.load(
        p_logits
        + o_kernel_h.to(OFFSET) * logits_stride_kh
        + o_kernel_w.to(OFFSET) * logits_stride_kw
        + o_row.to(OFFSET) * logits_stride_h
        + o_column.to(OFFSET) * logits_stride_w,
        mask=m_step,
        other=float("-inf"),
    ).to(ACCUMULATOR)
    if HAS_RPB:
        o_relative_h = relative_position(o_row, o_input_h, KERNEL_H, DILATION_H)
        o_relative_w = relative_position(o_column, o_input_w, KERNEL_W, DILATION_W)
        b_logits += tl.load(p_rpb + o_relative_h * rpb_stride_h + o_relative_w * rpb_stride_w, mask=m_step, other=0).to(
            ACCUMULATOR
        )
    return b_logits


@triton.jit
def _softmax_aggregate_kernel(
    logits_ptr,  # [B, G, Kh, Kw, H, W]
    value_ptr,  # [B, G, C, H, W]
    rpb_ptr,  # [G, 2Kh-1, 2Kw-1], not read without HAS_RPB
    out_ptr,  # [B, G, C, H, W]
    statistics_ptr,  # [B, G, H, W], contiguous: log Σ_k exp
    logits_stride_b, logits_stride_g, logits_stride_kh, logits_stride_kw, logits_stride_h, logits_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    out_stride_b, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    groups, channels, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CLAMPED: tl.constexpr, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, i_channel, i_group, i_batch = split_program(
        tl.cdiv(height * width, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS), groups
    )
    p_logits = logits_ptr + i_batch * logits_stride_b + i_group * logits_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_statistics = statistics_ptr + (i_batch * groups + i_group) * height * width

    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_channel = (i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
    m_pixel = o_pixel < height * width
    m_channel = o_channel < channels
    # Pixels past the map repeat its last one: their softmax stays finite, and they are not stored.
    o_inside = tl.minimum(o_pixel, height * width - 1)
    o_row = (o_inside // width)[None, :]
    o_column = (o_inside % width)[None, :]

    # [P], [P], [C, P]
    b_max = tl.full([BLOCK_PIXELS], float("-inf"), ACCUMULATOR)
    b_total = tl.zeros([BLOCK_PIXELS], ACCUMULATOR)
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATOR)
    for first_step in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        m_step = (o_step < KERNEL_H * KERNEL_W) & (o_row >= 0)
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        o_input_h, _m_row = neighbour(o_row, o_kernel_h, height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, CLAMPED)
        o_input_w, _m_column = neighbour(
            o_column, o_kernel_w, width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, CLAMPED
        )
        # [S, P]
        b_logits = _load_logits(
            p_logits, p_rpb, o_kernel_h, o_kernel_w, o_row, o_column, o_input_h, o_input_w, m_step,
            logits_stride_kh, logits_stride_kw, logits_stride_h, logits_stride_w, rpb_stride_h, rpb_stride_w,
            KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, HAS_RPB, ACCUMULATOR, OFFSET,
        )  # fmt: skip
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=0))
        # −inf − (−inf) is NaN: while every logit seen is −inf, subtract 0 instead.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.exp(b_logits - b_shift[None, :])
        b_rescale = tl.exp(b_max - b_shift)
        b_total = b_total * b_rescale + tl.sum(b_weight, axis=0)
        b_max = b_new_max
        # [S, C, P]
        o_input = o_input_h.to(OFFSET) * value_stride_h + o_input_w.to(OFFSET) * value_stride_w
        b_value = tl.load(
            p_value + (o_channel * value_stride_c)[None, :, None] + o_input[:, None, :],
            mask=m_step[:, None, :] & m_channel[None, :, None],
            other=0,
        ).to(ACCUMULATOR)
        b_sum = b_sum * b_rescale[None, :] + tl.sum(b_weight[:, None, :] * b_value, axis=0)

    tl.store(
        p_out
        + (o_channel * out_stride_c)[:, None]
        + o_row.to(OFFSET) * out_stride_h
        + o_column.to(OFFSET) * out_stride_w,
        (b_sum / b_total[None, :]).to(out_ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel[None, :],
    )
    if i_channel == 0:
        tl.store(p_statistics + o_pixel, b_max + tl.log(b_total), mask=m_pixel)


@triton.jit
def _grad_value_kernel(
    logits_ptr,  # [B, G, Kh, Kw, H, W]
    rpb_ptr,  # [G, 2Kh-1, 2Kw-1], not read without HAS_RPB
    statistics_ptr,  # [B, G, H, W], contiguous
    grad_ptr,  # [B, G, C, H, W]
    target_ptr,  # [B, G, C, H, W]: the gradient of value
    logits_stride_b, logits_stride_g, logits_stride_kh, logits_stride_kw, logits_stride_h, logits_stride_w,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    target_stride_b, target_stride_g, target_stride_c, target_stride_h, target_stride_w,
    groups, channels, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CLAMPED: tl.constexpr, STEPS_H: tl.constexpr, STEPS_W: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, i_channel, i_group, i_batch = split_program(
        tl.cdiv(height * width, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS), groups
    )
    p_logits = logits_ptr + i_batch * logits_stride_b + i_group * logits_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_statistics = statistics_ptr + (i_batch * groups + i_group) * height * width
    p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g
    p_target = target_ptr + i_batch * target_stride_b + i_group * target_stride_g

    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_channel = (i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
    o_row = (o_pixel // width)[None, :]
    o_column = (o_pixel % width)[None, :]
    m_pixel = (o_pixel < height * width)[None, :]
    m_channel = o_channel < channels

    # [C, P]
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATOR)
    for first_step in range(0, STEPS_H * STEPS_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        o_output_h, o_kernel_h, m_row = inverse_neighbour(
            o_row, o_step // STEPS_W, height, height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, CLAMPED
        )
        o_output_w, o_kernel_w, m_column = inverse_neighbour(
            o_column, o_step % STEPS_W, width, width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, CLAMPED
        )
        m_step = m_pixel & (o_step < STEPS_H * STEPS_W) & m_row & m_column
        # [S, P]
        b_logits = _load_logits(
            p_logits, p_rpb, o_kernel_h, o_kernel_w, o_output_h, o_output_w, o_row, o_column, m_step,
            logits_stride_kh, logits_stride_kw, logits_stride_h, logits_stride_w, rpb_stride_h, rpb_stride_w,
            KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, HAS_RPB, ACCUMULATOR, OFFSET,
        )  # fmt: skip
        b_statistics = tl.load(p_statistics + o_output_h * width + o_output_w, mask=m_step, other=0)
        b_weight = tl.exp(b_logits - b_statistics)
        # [S, C, P]
        o_output = o_output_h.to(OFFSET) * grad_stride_h + o_output_w.to(OFFSET) * grad_stride_w
        b_grad = tl.load(
            p_grad + (o_channel * grad_stride_c)[None, :, None] + o_output[:, None, :],
            mask=m_step[:, None, :] & m_channel[None, :, None],
            other=0,
        ).to(ACCUMULATOR)
        b_sum += tl.sum(b_weight[:, None, :] * b_grad, axis=0)

    tl.store(
        p_target
        + (o_channel * target_stride_c)[:, None]
        + o_row.to(OFFSET) * target_stride_h
        + o_column.to(OFFSET) * target_stride_w,
        b_sum.to(target_ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel,
    )


@triton.jit
def _grad_logits_kernel(
    logits_ptr,  # [B, G, Kh, Kw, H, W]
    value_ptr,  # [B, G, C, H, W]
    rpb_ptr,  # [G, 2Kh-1, 2Kw-1], not read without HAS_RPB
    statistics_ptr,  # [B, G, H, W], contiguous
    out_ptr,  # [B, G, C, H, W]
    grad_ptr,  # [B, G, C, H, W]
    target_ptr,  # [B, G, Kh, Kw, H, W]: the gradient of logits
    logits_stride_b, logits_stride_g, logits_stride_kh, logits_stride_kw, logits_stride_h, logits_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    out_stride_b, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    target_stride_b, target_stride_g, target_stride_kh, target_stride_kw, target_stride_h, target_stride_w,
    groups, channels, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CLAMPED: tl.constexpr, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, _i_channel, i_group, i_batch = split_program(tl.cdiv(height * width, BLOCK_PIXELS), 1, groups)
    p_logits = logits_ptr + i_batch * logits_stride_b + i_group * logits_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_statistics = statistics_ptr + (i_batch * groups + i_group) * height * width
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g
    p_target = target_ptr + i_batch * target_stride_b + i_group * target_stride_g

    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_row = (o_pixel // width)[None, :]
    o_column = (o_pixel % width)[None, :]
    m_pixel = (o_pixel < height * width)[None, :]
    o_pixel_out = o_row.to(OFFSET) * out_stride_h + o_column.to(OFFSET) * out_stride_w
    o_pixel_grad = o_row.to(OFFSET) * grad_stride_h + o_column.to(OFFSET) * grad_stride_w
    b_statistics = tl.load(p_statistics + o_pixel[None, :], mask=m_pixel, other=0)

    # δ = Σ_c grad · out, which equals Σ_k p · dp, [P]
    b_delta = tl.zeros([BLOCK_PIXELS], ACCUMULATOR)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)[:, None]
        m_block = (o_channel < channels) & m_pixel
        b_out = tl.load(p_out + o_channel * out_stride_c + o_pixel_out, mask=m_block, other=0).to(ACCUMULATOR)
        b_grad = tl.load(p_grad + o_channel * grad_stride_c + o_pixel_grad, mask=m_block, other=0).to(ACCUMULATOR)
        b_delta += tl.sum(b_out * b_grad, axis=0)

    for first_step in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        m_step = m_pixel & (o_step < KERNEL_H * KERNEL_W)
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        o_input_h, _m_row = neighbour(o_row, o_kernel_h, height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, CLAMPED)
        o_input_w, _m_column = neighbour(
            o_column, o_kernel_w, width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, CLAMPED
        )
        # [S, P]
        b_logits = _load_logits(
            p_logits, p_rpb, o_kernel_h, o_kernel_w, o_row, o_column, o_input_h, o_input_w, m_step,
            logits_stride_kh, logits_stride_kw, logits_stride_h, logits_stride_w, rpb_stride_h, rpb_stride_w,
            KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, HAS_RPB, ACCUMULATOR, OFFSET,
        )  # fmt: skip
        b_weight = tl.exp(b_logits - b_statistics)
        o_input = o_input_h.to(OFFSET) * value_stride_h + o_input_w.to(OFFSET) * value_stride_w
        # [S, P]
        b_grad_weight = tl.zeros([BLOCK_STEPS, BLOCK_PIXELS], ACCUMULATOR)
        for first_channel in range(0, channels, BLOCK_CHANNELS):
            o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
            m_channel = o_channel < channels
            # [C, P]
            b_grad = tl.load(
                p_grad + (o_channel * grad_stride_c)[:, None] + o_pixel_grad, m_channel[:, None] & m_pixel, other=0
            )
            # [S, C, P]
            b_value = tl.load(
                p_value + (o_channel * value_stride_c)[None, :, None] + o_input[:, None, :],
                mask=m_step[:, None, :] & m_channel[None, :, None],
                other=0,
            )
            b_grad_weight += tl.sum(b_grad[None, :, :].to(ACCUMULATOR) * b_value.to(ACCUMULATOR), axis=1)
        tl.store(
            p_target
            + o_kernel_h.to(OFFSET) * target_stride_kh
            + o_kernel_w.to(OFFSET) * target_stride_kw
            + o_row.to(OFFSET) * target_stride_h
            + o_column.to(OFFSET) * target_stride_w,
            (b_weight * (b_grad_weight - b_delta[None, :])).to(target_ptr.dtype.element_ty),
            mask=m_step,
        )


@triton.jit
def _grad_rpb_kernel(
    grad_ptr,  # [B, G, Kh, Kw, H, W]: the gradient of logits
    partial_ptr,  # [chunks, G, 2Kh-1, 2Kw-1], contiguous
    grad_stride_b, grad_stride_g, grad_stride_kh, grad_stride_kw, grad_stride_h, grad_stride_w,
    batch, groups, height, width, chunks,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_RELATIVE: tl.constexpr,
):  # fmt: skip
    RELATIVE_W: tl.constexpr = 2 * KERNEL_W - 1
    RELATIVE: tl.constexpr = (2 * KERNEL_H - 1) * RELATIVE_W
    i_relative, i_chunk, i_group, _i_batch = split_program(tl.cdiv(RELATIVE, BLOCK_RELATIVE), chunks, groups)
    o_relative = (i_relative * BLOCK_RELATIVE + tl.arange(0, BLOCK_RELATIVE))[:, None]
    o_relative_h, o_relative_w = o_relative // RELATIVE_W, o_relative % RELATIVE_W
    pixel_blocks = tl.cdiv(height * width, BLOCK_PIXELS)

    # [R]
    b_sum = tl.zeros([BLOCK_RELATIVE], ACCUMULATOR)
    for i_block in range(i_chunk, batch * pixel_blocks, chunks):
        p_grad = grad_ptr + (i_block // pixel_blocks).to(tl.int64) * grad_stride_b + i_group * grad_stride_g
        o_pixel = i_block % pixel_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        o_row = (o_pixel // width)[None, :]
        o_column = (o_pixel % width)[None, :]
        # The window position at this distance from this pixel: the inverse of relative_position.
        o_start_h = window_start(o_row, height, KERNEL_H, DILATION_H)
        o_start_w = window_start(o_column, width, KERNEL_W, DILATION_W)
        o_kernel_h = o_relative_h - (KERNEL_H - 1) + (o_row - o_start_h) // DILATION_H
        o_kernel_w = o_relative_w - (KERNEL_W - 1) + (o_column - o_start_w) // DILATION_W
        m_row = (o_kernel_h >= 0) & (o_kernel_h < KERNEL_H)
        m_column = (o_kernel_w >= 0) & (o_kernel_w < KERNEL_W)
        # [R, P]
        b_grad = tl.load(
            p_grad
            + o_kernel_h.to(OFFSET) * grad_stride_kh
            + o_kernel_w.to(OFFSET) * grad_stride_kw
            + o_row.to(OFFSET) * grad_stride_h
            + o_column.to(OFFSET) * grad_stride_w,
            mask=m_row & m_column & (o_relative < RELATIVE) & (o_pixel < height * width)[None, :],
            other=0,
        )
        b_sum += tl.sum(b_grad.to(ACCUMULATOR), axis=1)
    o_relative = i_relative * BLOCK_RELATIVE + tl.arange(0, BLOCK_RELATIVE)
    tl.store(
        partial_ptr + (i_chunk.to(tl.int64) * groups + i_group) * RELATIVE + o_relative, b_sum, o_relative < RELATIVE
    )


def _rpb_arguments(rpb: Tensor | None, stand_in: Tensor) -> dict[str, Tensor | int | bool]:
    """The bias table, or any tensor in its place where there is none and the kernel never reads it."""
    if rpb is None:
        return {"rpb_ptr": stand_in, "rpb_stride_g": 0, "rpb_stride_h": 0, "rpb_stride_w": 0, "HAS_RPB": False}
    return {"rpb_ptr": rpb, **stride_arguments("rpb", rpb, "g h w"), "HAS_RPB": True}


def _size_arguments(value: Tensor) -> dict[str, int]:
    return {"groups": value.shape[1], "channels": value.shape[2], "height": value.shape[3], "width": value.shape[4]}


def _in_float32(logits: Tensor, value: Tensor, rpb: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    logits, value = at_least_float32(logits, value)
    return logits, value, None if rpb is None else at_least_float32(rpb)[0]


def _candidates(window: Window, value: Tensor) -> Pair:
    """Outputs to be tried per input along each axis."""
    return inverse_steps(window, value.shape[3], 0), inverse_steps(window, value.shape[4], 1)


def _problem(logits: Tensor, value: Tensor, steps: Pair) -> Problem:
    return problem_of(logits, value, value.shape[3:], steps[0] * steps[1])


def _reference_gradients(grad, logits, value, rpb, out, statistics, window):
    """The eager path's gradients, for the tuner."""
    grad, out = at_least_float32(grad, out)
    return eager.softmax_aggregate_backward(grad, *_in_float32(logits, value, rpb), out, statistics, window)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda logits, value, rpb, window: _problem(logits, value, window.kernel_size),
    reference=lambda logits, value, rpb, window: eager.softmax_aggregate(*_in_float32(logits, value, rpb), window),
)
def softmax_aggregate(
    logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window, *, config: Config
) -> tuple[Tensor, Tensor]:
    """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), [B,G,C,H,W] like value; log Σ_k exp, [B,G,H,W])."""
    batch, groups, channels, height, width = value.shape
    out = empty_like_layout(value, value.shape)
    statistics = torch.empty((batch, groups, height, width), dtype=accumulator_dtype(value.dtype), device=value.device)
    if value.numel() == 0:
        return out, statistics
    # One program per (pixel tile, channel block, group, batch entry).
    pixel_blocks = ceil_divide(height * width, config.block_pixels)
    grid = (pixel_blocks * ceil_divide(channels, config.block_channels) * groups * batch,)
    arguments = {
        "logits_ptr": logits,
        "value_ptr": value,
        "out_ptr": out,
        "statistics_ptr": statistics,
        **stride_arguments("logits", logits, "b g kh kw h w"),
        **stride_arguments("value", value, "b g c h w"),
        **stride_arguments("out", out, "b g c h w"),
        **_rpb_arguments(rpb, value),
        **_size_arguments(value),
        **window_arguments(window),
        **precision(logits, value, out),
        **block_arguments(config),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_softmax_aggregate_kernel, grid, out.device, arguments, **options)
    return out, statistics


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda _grad, logits, value, *rest: _problem(logits, value, _candidates(rest[-1], value)),
    reference=lambda *saved: _reference_gradients(*saved)[1],
    name="softmax_aggregate.grad_value",
)
def grad_value(
    grad: Tensor,
    logits: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    window: Window,
    *,
    config: Config,
) -> Tensor:
    """Σ_{(i,k) reaching j} p[i,k] · grad[i], [B,G,C,H,W] in the memory order of value."""
    batch, groups, channels, height, width = value.shape
    target = empty_like_layout(value, value.shape)
    steps = _candidates(window, value)
    # One program per (pixel tile, channel block, group, batch entry).
    pixel_blocks = ceil_divide(height * width, config.block_pixels)
    grid = (pixel_blocks * ceil_divide(channels, config.block_channels) * groups * batch,)
    arguments = {
        "logits_ptr": logits,
        "statistics_ptr": statistics,
        "grad_ptr": grad,
        "target_ptr": target,
        **stride_arguments("logits", logits, "b g kh kw h w"),
        **stride_arguments("grad", grad, "b g c h w"),
        **stride_arguments("target", target, "b g c h w"),
        **_rpb_arguments(rpb, value),
        **_size_arguments(value),
        **window_arguments(window),
        "STEPS_H": steps[0],
        "STEPS_W": steps[1],
        **precision(logits, grad, target),
        **block_arguments(config),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_value_kernel, grid, target.device, arguments, **options)
    return target


@tunable(
    CONFIGS,
    grad_logits_heuristic,
    problem=lambda _grad, logits, value, *rest: _problem(logits, value, rest[-1].kernel_size),
    reference=lambda *saved: _reference_gradients(*saved)[0],
    name="softmax_aggregate.grad_logits",
)
def grad_logits(
    grad: Tensor,
    logits: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    window: Window,
    *,
    config: Config,
) -> Tensor:
    """p[i,k] · (Σ_c grad[i,c] · value[nbr(i,k),c] − Σ_c grad[i,c] · out[i,c]), in the memory order of logits."""
    batch, groups, _, height, width = value.shape
    target = empty_like_layout(logits, logits.shape)
    # One program per (pixel tile, group, batch entry); it walks the whole window.
    grid = (ceil_divide(height * width, config.block_pixels) * groups * batch,)
    arguments = {
        "logits_ptr": logits,
        "value_ptr": value,
        "statistics_ptr": statistics,
        "out_ptr": out,
        "grad_ptr": grad,
        "target_ptr": target,
        **stride_arguments("logits", logits, "b g kh kw h w"),
        **stride_arguments("value", value, "b g c h w"),
        **stride_arguments("out", out, "b g c h w"),
        **stride_arguments("grad", grad, "b g c h w"),
        **stride_arguments("target", target, "b g kh kw h w"),
        **_rpb_arguments(rpb, value),
        **_size_arguments(value),
        **window_arguments(window),
        **precision(logits, value, out, grad, target),
        **block_arguments(config),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_logits_kernel, grid, target.device, arguments, **options)
    return target


def grad_rpb(gradient_of_logits: Tensor, rpb: Tensor, window: Window) -> Tensor:
    """Σ over (b, i, k) of the gradient of logits at each relative position: partial tables, then their sum."""
    batch, groups, kernel_h, kernel_w, height, width = gradient_of_logits.shape
    relative = (2 * kernel_h - 1) * (2 * kernel_w - 1)
    chunks = min(RPB_CHUNKS, batch * ceil_divide(height * width, RPB_BLOCK_PIXELS))
    partial = torch.empty((chunks, *rpb.shape), dtype=accumulator_dtype(rpb.dtype), device=rpb.device)
    # One program per (block of relative positions, chunk of images, group); each walks its chunk in order.
    grid = (ceil_divide(relative, RPB_BLOCK_RELATIVE) * chunks * groups,)
    arguments = {
        "grad_ptr": gradient_of_logits,
        "partial_ptr": partial,
        **stride_arguments("grad", gradient_of_logits, "b g kh kw h w"),
        "batch": batch,
        "groups": groups,
        "height": height,
        "width": width,
        "chunks": chunks,
        "KERNEL_H": kernel_h,
        "KERNEL_W": kernel_w,
        "DILATION_H": window.dilation[0],
        "DILATION_W": window.dilation[1],
        **precision(gradient_of_logits),
        "BLOCK_PIXELS": RPB_BLOCK_PIXELS,
        "BLOCK_RELATIVE": RPB_BLOCK_RELATIVE,
    }
    launch(_grad_rpb_kernel, grid, rpb.device, arguments, num_warps=4, num_stages=2)
    return partial.sum(0).to(rpb.dtype)


def softmax_aggregate_backward(
    grad: Tensor,
    logits: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of logits, value and rpb (None without one), each in the memory order of its tensor."""
    if value.numel() == 0:
        empty = empty_like_layout(logits, logits.shape), empty_like_layout(value, value.shape)
        return *empty, None if rpb is None else torch.zeros_like(rpb)
    gradient_of_logits = grad_logits(grad, logits, value, rpb, out, statistics, window)
    gradient_of_value = grad_value(grad, logits, value, rpb, out, statistics, window)
    return gradient_of_logits, gradient_of_value, None if rpb is None else grad_rpb(gradient_of_logits, rpb, window)
