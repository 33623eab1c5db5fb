# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""na2d_softmax_av backward: p is computed again from the logits and log Σ_k exp, nothing else of size K² is read.

    grad_value   reads K² logits and D gradients, writes D        a gather over the outputs that reach each input
    grad_logits  reads K² logits and 3·D, writes K²               p · (dp − δ), δ = Σ_c grad · out in the kernel
    grad_rpb     the gradient of logits, summed over parts of the batch, then along the outputs that meet an entry: a
                 partial table per chunk of pixels, summed in a fixed order, without atomics

Where outputs share windows, ``shared`` does the first two with dense matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.configs import (
    GATHERS,
    Gather,
    GatherProblem,
    gather_heuristic,
    gather_problem,
    wide_gather_heuristic,
)
from kernels.backend import interpreting
from kernels.dtypes import accumulator, accumulator_dtype, at_least_float32, precision
from kernels.launch import ceil_divide, launch
from kernels.layout import empty_like_layout
from kernels.neighborhood import eager, shared
from kernels.neighborhood.configs import shares_windows
from kernels.neighborhood.tiles import LOG2_E, features_view, kernel_view, load_logits, table_view
from kernels.tuning import tunable
from kernels.views import at, view
from kernels.windows import Pair, Window
from kernels.windows_triton import inverse_neighbour, inverse_steps, neighbour, split_program, window_start

__all__ = ["grad_rpb", "softmax_aggregate_backward"]

# Tile of the bias gradient; in the interpreter, where every operation costs the same, one that holds a whole small map.
RPB_BLOCK_PIXELS, RPB_BLOCK_RELATIVE = (256, 1024) if interpreting() else (32, 32)
BATCH_PARTS, BATCH_BLOCK = (1, 2**16) if interpreting() else (4, 1024)
RPB_CHUNKS = 64  # partial tables per head: enough programs to fill a GPU, few enough to sum in one small reduction


class Saved(NamedTuple):
    """What both kernels read: the output's gradient, the inputs, and what the forward pass left."""

    grad: Tensor  # [B, G, C, H, W]
    logits: Tensor  # [B, G, Kh, Kw, H, W]
    value: Tensor  # [B, G, C, H, W]
    rpb: Tensor | None  # [G, 2Kh-1, 2Kw-1]
    out: Tensor  # [B, G, C, H, W]
    statistics: Tensor  # [B, G, H, W], contiguous: log Σ_k exp


@triton.jit
def _grad_value_kernel(
    logits,  # [B, G, H, W, K²]
    rpb,  # [G, 2Kh-1, 2Kw-1]
    statistics,  # [B, G, H, W]
    grad,  # [B, G, C, H, W]
    target,  # [B, G, C, H, W]: the gradient of value
    groups, channels, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    STEPS_H: tl.constexpr, STEPS_W: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, i_channel, i_group, i_batch = split_program(
        tl.cdiv(height * width, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS), groups
    )
    logits, rpb, statistics = at(logits, i_batch, i_group), at(rpb, 0, i_group), at(statistics, i_batch, i_group)
    grad, target = at(grad, i_batch, i_group), at(target, i_batch, i_group)
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
            o_row, o_step // STEPS_W, height, height, KERNEL_H, 1, 0, DILATION_H, True
        )
        o_output_w, o_kernel_w, m_column = inverse_neighbour(
            o_column, o_step % STEPS_W, width, width, KERNEL_W, 1, 0, DILATION_W, True
        )
        m_step = m_pixel & (o_step < STEPS_H * STEPS_W) & m_row & m_column
        # [S, P]
        b_logits = load_logits(
            logits, rpb, o_kernel_h, o_kernel_w, o_output_h, o_output_w, o_row, o_column, m_step,
            KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, HAS_RPB, ACCUMULATOR, OFFSET,
        )  # fmt: skip
        b_statistics = tl.load(statistics.ptr + o_output_h * width + o_output_w, mask=m_step, other=0)
        b_weight = tl.exp2((b_logits - b_statistics) * LOG2_E)
        # [S, C, P]
        o_output = o_output_h.to(OFFSET) * grad.h + o_output_w.to(OFFSET) * grad.w
        b_grad = tl.load(
            grad.ptr + (o_channel * grad.c)[None, :, None] + o_output[:, None, :],
            mask=m_step[:, None, :] & m_channel[None, :, None],
            other=0,
        ).to(ACCUMULATOR)
        b_sum += tl.sum(b_weight[:, None, :] * b_grad, axis=0)

    tl.store(
        target.ptr + (o_channel * target.c)[:, None] + o_row.to(OFFSET) * target.h + o_column.to(OFFSET) * target.w,
        b_sum.to(target.ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel,
    )


@triton.jit
def _grad_logits_kernel(
    logits,  # [B, G, H, W, K²]
    value,  # [B, G, C, H, W]
    rpb,  # [G, 2Kh-1, 2Kw-1]
    statistics,  # [B, G, H, W]
    out,  # [B, G, C, H, W]
    grad,  # [B, G, C, H, W]
    target,  # [B, G, H, W, K²]: the gradient of logits
    groups, channels, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, _i_channel, i_group, i_batch = split_program(tl.cdiv(height * width, BLOCK_PIXELS), 1, groups)
    logits, rpb, statistics = at(logits, i_batch, i_group), at(rpb, 0, i_group), at(statistics, i_batch, i_group)
    value, out = at(value, i_batch, i_group), at(out, i_batch, i_group)
    grad, target = at(grad, i_batch, i_group), at(target, i_batch, i_group)
    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_row = (o_pixel // width)[None, :]
    o_column = (o_pixel % width)[None, :]
    m_pixel = (o_pixel < height * width)[None, :]
    o_pixel_out = o_row.to(OFFSET) * out.h + o_column.to(OFFSET) * out.w
    o_pixel_grad = o_row.to(OFFSET) * grad.h + o_column.to(OFFSET) * grad.w
    b_statistics = tl.load(statistics.ptr + o_pixel[None, :], mask=m_pixel, other=0)

    # δ = Σ_c grad · out, which equals Σ_k p · dp, [P]
    b_delta = tl.zeros([BLOCK_PIXELS], ACCUMULATOR)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)[:, None]
        m_block = (o_channel < channels) & m_pixel
        b_out = tl.load(out.ptr + o_channel * out.c + o_pixel_out, mask=m_block, other=0).to(ACCUMULATOR)
        b_grad = tl.load(grad.ptr + o_channel * grad.c + o_pixel_grad, mask=m_block, other=0).to(ACCUMULATOR)
        b_delta += tl.sum(b_out * b_grad, axis=0)

    for first_step in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        m_step = m_pixel & (o_step < KERNEL_H * KERNEL_W)
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        o_input_h, _m_row = neighbour(o_row, o_kernel_h, height, KERNEL_H, 1, 0, DILATION_H, True)
        o_input_w, _m_column = neighbour(o_column, o_kernel_w, width, KERNEL_W, 1, 0, DILATION_W, True)
        # [S, P]
        b_logits = load_logits(
            logits, rpb, o_kernel_h, o_kernel_w, o_row, o_column, o_input_h, o_input_w, m_step,
            KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, HAS_RPB, ACCUMULATOR, OFFSET,
        )  # fmt: skip
        b_weight = tl.exp2((b_logits - b_statistics) * LOG2_E)
        o_input = o_input_h.to(OFFSET) * value.h + o_input_w.to(OFFSET) * value.w
        # [S, P]
        b_grad_weight = tl.zeros([BLOCK_STEPS, BLOCK_PIXELS], ACCUMULATOR)
        for first_channel in range(0, channels, BLOCK_CHANNELS):
            o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
            m_channel = o_channel < channels
            # [C, P]
            b_grad = tl.load(
                grad.ptr + (o_channel * grad.c)[:, None] + o_pixel_grad, m_channel[:, None] & m_pixel, other=0
            )
            # [S, C, P]
            b_value = tl.load(
                value.ptr + (o_channel * value.c)[None, :, None] + o_input[:, None, :],
                mask=m_step[:, None, :] & m_channel[None, :, None],
                other=0,
            )
            b_grad_weight += tl.sum(b_grad[None, :, :].to(ACCUMULATOR) * b_value.to(ACCUMULATOR), axis=1)
        tl.store(
            target.ptr + o_step.to(OFFSET) * target.k + o_row.to(OFFSET) * target.h + o_column.to(OFFSET) * target.w,
            (b_weight * (b_grad_weight - b_delta[None, :])).to(target.ptr.dtype.element_ty),
            mask=m_step,
        )


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
        # The window position at this distance from this pixel: the inverse of relative_position.
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


@triton.jit
def _sum_batch_kernel(
    source_ptr,  # [batch, elements]
    target_ptr,  # [parts, elements]
    batch, elements, part_images,
    ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(elements, BLOCK)
    o_element = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_part = tl.program_id(0) // blocks
    m_element = o_element < elements
    b_sum = tl.zeros([BLOCK], ACCUMULATOR)
    p_source = source_ptr + (i_part * part_images).to(tl.int64) * elements + o_element
    for _ in range(tl.minimum(part_images, batch - i_part * part_images)):
        b_sum += tl.load(p_source, mask=m_element, other=0).to(ACCUMULATOR)
        p_source += elements
    tl.store(target_ptr + i_part.to(tl.int64) * elements + o_element, b_sum, mask=m_element)


def _reference(saved: Saved, window: Window) -> tuple[Tensor, Tensor, Tensor | None]:
    grad, logits, value, out = at_least_float32(saved.grad, saved.logits, saved.value, saved.out)
    rpb = None if saved.rpb is None else at_least_float32(saved.rpb)[0]
    return eager.softmax_aggregate_backward(grad, logits, value, rpb, out, saved.statistics, window)


def _problem(saved: Saved, steps: Pair) -> GatherProblem:
    return gather_problem(saved.logits, saved.value, saved.value.shape[3:], steps)


def _candidates(window: Window, value: Tensor) -> Pair:
    """Outputs to be tried per input along each axis."""
    return inverse_steps(window, value.shape[3], 0), inverse_steps(window, value.shape[4], 1)


@tunable(
    GATHERS,
    gather_heuristic,
    problem=lambda saved, window: _problem(saved, _candidates(window, saved.value)),
    reference=lambda saved, window: _reference(saved, window)[1],
    name="softmax_aggregate.grad_value",
)
def grad_value(saved: Saved, window: Window, *, config: Gather) -> Tensor:
    """Σ_{(i,k) reaching j} p[i,k] · grad[i], [B,G,C,H,W] in the memory order of value."""
    grad, logits, value, rpb, _out, statistics = saved
    batch, groups, channels, height, width = value.shape
    target, steps = empty_like_layout(value, value.shape), _candidates(window, value)
    # One program per (pixel tile, channel block, group, batch entry).
    pixel_blocks = ceil_divide(height * width, config.block_pixels)
    grid = (pixel_blocks * ceil_divide(channels, config.block_channels) * groups * batch,)
    arguments = {
        "logits": kernel_view(logits),
        "rpb": table_view(rpb, value),
        "statistics": view(statistics, "b g h w"),
        "grad": features_view(grad),
        "target": features_view(target),
        "groups": groups,
        "channels": channels,
        "height": height,
        "width": width,
        **config.clamped(window),
        "STEPS_H": steps[0],
        "STEPS_W": steps[1],
        "HAS_RPB": rpb is not None,
        **precision(logits, grad, target),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_value_kernel, grid, target.device, arguments, **options)
    return target


@tunable(
    GATHERS,
    wide_gather_heuristic,
    problem=lambda saved, window: _problem(saved, window.kernel_size),
    reference=lambda saved, window: _reference(saved, window)[0],
    name="softmax_aggregate.grad_logits",
)
def grad_logits(saved: Saved, window: Window, *, config: Gather) -> Tensor:
    """p[i,k] · (Σ_c grad[i,c] · value[nbr(i,k),c] − Σ_c grad[i,c] · out[i,c]), in the memory order of logits."""
    grad, logits, value, rpb, out, statistics = saved
    batch, groups, channels, height, width = value.shape
    target = empty_like_layout(logits, logits.shape)
    # One program per (pixel tile, group, batch entry); it walks the whole window.
    grid = (ceil_divide(height * width, config.block_pixels) * groups * batch,)
    arguments = {
        "logits": kernel_view(logits),
        "value": features_view(value),
        "rpb": table_view(rpb, value),
        "statistics": view(statistics, "b g h w"),
        "out": features_view(out),
        "grad": features_view(grad),
        "target": kernel_view(target),
        "groups": groups,
        "channels": channels,
        "height": height,
        "width": width,
        **config.clamped(window),
        "HAS_RPB": rpb is not None,
        **precision(logits, value, out, grad, target),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_logits_kernel, grid, target.device, arguments, **options)
    return target


def _batch_parts(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over a few parts of the batch, in the memory order of a tensor that is dense in memory, the batch outermost.

    PyTorch's sum over the outermost dimension reads at a seventh of an H200's bandwidth, measured at 128 x 265,000.
    """
    batch, elements = tensor.shape[0], tensor[0].numel()
    part_images = ceil_divide(batch, min(batch, BATCH_PARTS))
    parts = ceil_divide(batch, part_images)
    target = torch.empty_strided(
        (parts, *tensor.shape[1:]), (elements, *tensor.stride()[1:]), dtype=dtype, device=tensor.device
    )
    arguments = {
        "source_ptr": tensor,
        "target_ptr": target,
        "batch": batch,
        "elements": elements,
        "part_images": part_images,
        "ACCUMULATOR": accumulator(dtype),
        "BLOCK": BATCH_BLOCK,
    }
    grid = (ceil_divide(elements, BATCH_BLOCK) * parts,)
    launch(_sum_batch_kernel, grid, tensor.device, arguments, num_warps=4, num_stages=3)
    return target


def grad_rpb(gradient_of_logits: Tensor, rpb: Tensor, window: Window) -> Tensor:
    """Σ over (b, i, k) of the gradient of logits [B,G,Kh,Kw,H,W] at each relative position, like rpb."""
    _, groups, kernel_h, kernel_w, height, width = gradient_of_logits.shape
    dtype = accumulator_dtype(rpb.dtype)
    parts = _batch_parts(gradient_of_logits, dtype)
    chunks = min(RPB_CHUNKS, ceil_divide(height * width, RPB_BLOCK_PIXELS))
    partial = torch.empty((chunks, *rpb.shape), dtype=dtype, device=rpb.device)
    # One program per (block of relative positions, chunk of pixels, group); each walks its chunk in order.
    relative = (2 * kernel_h - 1) * (2 * kernel_w - 1)
    grid = (ceil_divide(relative, RPB_BLOCK_RELATIVE) * chunks * groups,)
    arguments = {
        "grad": kernel_view(parts),
        "partial_ptr": partial,
        "parts": parts.shape[0],
        "groups": groups,
        "height": height,
        "width": width,
        "chunks": chunks,
        "KERNEL_H": kernel_h,
        "KERNEL_W": kernel_w,
        "DILATION_H": window.dilation[0],
        "DILATION_W": window.dilation[1],
        **precision(parts),
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
    if shares_windows(logits, window, value.shape[3], value.shape[4]):
        softmax = shared.Softmax(logits, rpb, out, statistics)
        of_logits = shared.correlate(grad, value, empty_like_layout(logits, logits.shape), window, softmax)
        of_value = shared.transpose(logits, grad, window, softmax)
    else:
        saved = Saved(grad, logits, value, rpb, out, statistics)
        of_logits, of_value = grad_logits(saved, window), grad_value(saved, window)
    return of_logits, of_value, None if rpb is None else grad_rpb(of_logits, rpb, window)
