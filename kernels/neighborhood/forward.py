# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""na2d_softmax_av forward: softmax and relative position bias inside, one number per pixel kept for the backward pass.

    p = softmax_k(logits[i,k] + rpb[(nbr(i,k) − i)/d + K − 1])     out[i] = Σ_k p[i,k] · value[nbr(i,k)]

Reads K² logits and D values and writes D per pixel and head; the unfused chain (+ rpb, softmax, aggregate) moves the
K² logits five times. log Σ_k exp is what the backward pass recovers p from. Where many outputs share a window, dense
matrix products do the work (``shared``). Here every output gathers its own window, blocks being [steps, channels,
pixels], with an online softmax over the steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.configs import GATHERS, Gather, gather_heuristic, gather_problem
from kernels.dtypes import accumulator_dtype, at_least_float32, precision
from kernels.launch import ceil_divide, launch
from kernels.layout import empty_like_layout
from kernels.neighborhood import eager, shared
from kernels.neighborhood.configs import shares_windows
from kernels.neighborhood.tiles import LOG2_E, features_view, kernel_view, load_logits, table_view
from kernels.tuning import tunable
from kernels.views import at, view
from kernels.windows import Window
from kernels.windows_triton import neighbour, split_program

__all__ = ["softmax_aggregate"]


@triton.jit
def _softmax_aggregate_kernel(
    logits,  # [B, G, H, W, K²]
    value,  # [B, G, C, H, W]
    rpb,  # [G, 2Kh-1, 2Kw-1]
    out,  # [B, G, C, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    groups, channels, height, width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, i_channel, i_group, i_batch = split_program(
        tl.cdiv(height * width, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS), groups
    )
    logits, value, out = at(logits, i_batch, i_group), at(value, i_batch, i_group), at(out, i_batch, i_group)
    statistics, rpb = at(statistics, i_batch, i_group), at(rpb, 0, i_group)
    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_channel = (i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
    m_pixel = o_pixel < height * width
    m_channel = o_channel < channels
    # Pixels past the map repeat its last one: their softmax stays finite, and they are not stored.
    o_inside = tl.minimum(o_pixel, height * width - 1)
    o_row, o_column = (o_inside // width)[None, :], (o_inside % width)[None, :]

    # [P], [P], [C, P]
    b_max = tl.full([BLOCK_PIXELS], float("-inf"), ACCUMULATOR)
    b_total = tl.zeros([BLOCK_PIXELS], ACCUMULATOR)
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATOR)
    for first_step in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        m_step = (o_step < KERNEL_H * KERNEL_W) & (o_row >= 0)
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        o_input_h, _m_row = neighbour(o_row, o_kernel_h, height, KERNEL_H, 1, 0, DILATION_H, True)
        o_input_w, _m_column = neighbour(o_column, o_kernel_w, width, KERNEL_W, 1, 0, DILATION_W, True)
        # [S, P]
        b_logits = load_logits(
            logits, rpb, o_kernel_h, o_kernel_w, o_row, o_column, o_input_h, o_input_w, m_step,
            KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, HAS_RPB, ACCUMULATOR, OFFSET,
        )  # fmt: skip
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=0))
        # −inf − (−inf) is NaN: while every logit seen is −inf, subtract 0 instead.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max) * LOG2_E
        b_weight = tl.exp2(b_logits * LOG2_E - b_shift[None, :])
        b_rescale = tl.exp2(b_max * LOG2_E - b_shift)
        b_total = b_total * b_rescale + tl.sum(b_weight, axis=0)
        b_max = b_new_max
        # [S, C, P]
        o_input = o_input_h.to(OFFSET) * value.h + o_input_w.to(OFFSET) * value.w
        b_value = tl.load(
            value.ptr + (o_channel * value.c)[None, :, None] + o_input[:, None, :],
            mask=m_step[:, None, :] & m_channel[None, :, None],
            other=0,
        ).to(ACCUMULATOR)
        b_sum = b_sum * b_rescale[None, :] + tl.sum(b_weight[:, None, :] * b_value, axis=0)

    o_out = o_row.to(OFFSET) * out.h + o_column.to(OFFSET) * out.w
    tl.store(
        out.ptr + (o_channel * out.c)[:, None] + o_out,
        (b_sum / b_total[None, :]).to(out.ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel[None, :],
    )
    if i_channel == 0:
        tl.store(statistics.ptr + o_inside, b_max + tl.log2(b_total) / LOG2_E, mask=m_pixel)


def _reference(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    logits, value, *table = at_least_float32(logits, value, *([] if rpb is None else [rpb]))
    return eager.softmax_aggregate(logits, value, table[0] if table else None, window)


@tunable(
    GATHERS,
    gather_heuristic,
    problem=lambda logits, value, _rpb, window: gather_problem(logits, value, value.shape[3:], window.kernel_size),
    reference=_reference,
    name="softmax_aggregate",
)
def gather(
    logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window, *, config: Gather
) -> tuple[Tensor, Tensor]:
    """``softmax_aggregate`` with every output's own window."""
    batch, groups, channels, height, width = value.shape
    out = empty_like_layout(value, value.shape)
    statistics = torch.empty((batch, groups, height, width), dtype=accumulator_dtype(value.dtype), device=value.device)
    # One program per (pixel tile, channel block, group, batch entry).
    pixel_blocks = ceil_divide(height * width, config.block_pixels)
    grid = (pixel_blocks * ceil_divide(channels, config.block_channels) * groups * batch,)
    arguments = {
        "logits": kernel_view(logits),
        "value": features_view(value),
        "rpb": table_view(rpb, value),
        "out": features_view(out),
        "statistics": view(statistics, "b g h w"),
        "groups": groups,
        "channels": channels,
        "height": height,
        "width": width,
        **config.clamped(window),
        "HAS_RPB": rpb is not None,
        **precision(logits, value, out),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_softmax_aggregate_kernel, grid, out.device, arguments, **options)
    return out, statistics


def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), [B,G,C,H,W] like value; log Σ_k exp, [B,G,H,W])."""
    if value.numel() == 0:
        dtype = accumulator_dtype(value.dtype)
        return empty_like_layout(value, value.shape), value.new_empty(value[:, :, 0].shape, dtype=dtype)
    if shares_windows(logits, window, value.shape[3], value.shape[4]):
        return shared.softmax_mix(logits, value, rpb, window)
    return gather(logits, value, rpb, window)
