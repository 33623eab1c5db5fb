# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""Clamped windows of which nearly every output has its own: weighted sums, in rows of outputs.

    mix         Σ_k w[i,k] · value[nbr(i,k)]          softmax inside where logits are given
    transpose   Σ_{(i,k) reaching j} w[i,k] · g[i]    the same kernel: its sources are the outputs that see an input

See ``own_tiles`` for how a program cuts the map. A warp issues C·K²/32 multiply-adds per output, and a conversion for
each source that a tile of rows loads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.tiles import unstack
from kernels.dtypes import accumulator_dtype
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.neighborhood.configs import OWN_CONFIGS, OwnConfig, own_heuristic
from kernels.neighborhood.own_tiles import (
    columns_of,
    image_of,
    load_taps,
    own_problem,
    own_sizes,
    rows_of,
    taps_of,
    window_row,
)
from kernels.neighborhood.references import (
    Softmax,
    reference_mix,
    reference_softmax_mix,
    reference_transpose,
)
from kernels.neighborhood.tiles import LOG2_E, features_view, kernel_view, table_view
from kernels.tuning import tunable
from kernels.views import View, view
from kernels.windows import Window
from kernels.windows_triton import window_start

__all__ = ["mix", "softmax_mix", "transpose"]


@triton.jit
def _log_sum_exp(
    taps, weight, rpb, WINDOW: tl.constexpr, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """log2 Σ_k 2^logits [R, P, 1]; logits of small windows are held in registers, those of large ones read twice."""
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    HELD: tl.constexpr = KERNEL_H if KERNEL_H <= 8 else 0
    b_top = tl.full(taps.p_weight.shape, float("-inf"), ACCUMULATOR)
    held = ()
    for kh in tl.static_range(HELD):
        held = held + (_logits(taps, weight, rpb, kh, HAS_RPB, ACCUMULATOR, OFFSET),)
        b_top = tl.maximum(b_top, held[kh])
    for kh in range(HELD, KERNEL_H):
        b_top = tl.maximum(b_top, _logits(taps, weight, rpb, kh, HAS_RPB, ACCUMULATOR, OFFSET))
    b_max = tl.max(b_top, axis=2, keep_dims=True)
    # −inf − (−inf) is NaN: where every logit is −inf, subtract 0 instead.
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_total = tl.zeros(taps.p_weight.shape, ACCUMULATOR)
    for kh in tl.static_range(HELD):
        b_total += tl.exp2(held[kh] - b_max)
    for kh in range(HELD, KERNEL_H):
        b_total += tl.exp2(_logits(taps, weight, rpb, kh, HAS_RPB, ACCUMULATOR, OFFSET) - b_max)
    return b_max + tl.log2(tl.sum(b_total, axis=2, keep_dims=True))


@triton.jit
def _logits(taps, weight, rpb, kh, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr):
    """logits + rpb [R, P, S] of own rows at window row ``kh``, in units of log 2; −inf where there are none."""
    o_kernel = kh - taps.row
    p_weight = taps.p_weight + o_kernel.to(OFFSET) * weight.c
    b_logits = tl.load(p_weight, mask=taps.mask, other=float("-inf")).to(ACCUMULATOR)
    if HAS_RPB:
        b_logits += tl.load(rpb.ptr + taps.o_rpb + o_kernel * rpb.h, mask=taps.mask, other=0).to(ACCUMULATOR)
    return b_logits * LOG2_E


@triton.jit
def _sum_kernel(
    weight,  # [B, G, Kh, Kw, H, W], Kh under ``c``, Kw under ``k``: weights, or logits with SOFTMAX
    source,  # [B, G, C, H, W]: values; the gradient of the output if TRANSPOSED
    rpb,  # [G, 2Kh-1, 2Kw-1]
    statistics,  # [B, G, H, W]: log Σ_k exp, with SOFTMAX: written, or read if TRANSPOSED
    out,  # [B, G, C, H, W]
    batch, groups, channels, height, width, row_tiles, channel_blocks,
    WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr, SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    DILATION_H: tl.constexpr = WINDOW.dilation[0]
    DILATION_W: tl.constexpr = WINDOW.dilation[1]
    i_program = tl.program_id(0)
    i_block, i_rest = i_program % channel_blocks, i_program // channel_blocks
    i_column = i_rest // row_tiles * COLUMNS
    rows = rows_of(i_rest % row_tiles, height, ROWS, KERNEL_H, DILATION_H, TRANSPOSED)
    columns = columns_of(i_column + tl.arange(0, COLUMNS), batch, groups, width, KERNEL_W, DILATION_W, TRANSPOSED)
    o_channel = i_block * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = (o_channel < channels)[None, :]
    o_first = (columns.first * DILATION_W + columns.residue).to(OFFSET)
    p_source = image_of(source, columns)[:, None] + (
        o_first[:, None] * source.w + o_channel.to(OFFSET)[None, :] * source.c
    )
    # ROWS times [P, C]
    sums = (tl.zeros([COLUMNS, CHANNELS], ACCUMULATOR),) * ROWS
    # Kw columns of sources at a time; near a border an input is in the windows of more outputs than that.
    most = tl.max(columns.last - columns.first) + 1 if TRANSPOSED else KERNEL_W
    for first_step in range(0, most, KERNEL_W):
        taps = taps_of(weight, rpb, statistics, rows, columns, first_step, WINDOW, TRANSPOSED, OFFSET, ROWS, STEPS)
        if SOFTMAX and not TRANSPOSED:
            b_statistics = _log_sum_exp(taps, weight, rpb, WINDOW, HAS_RPB, ACCUMULATOR, OFFSET)
            if i_block == 0:
                tl.store(taps.p_statistics, b_statistics / LOG2_E, mask=taps.own)
        for i_source in range(rows.begin, rows.end):
            o_source = tl.cast(i_source * DILATION_H + rows.residue, OFFSET)
            seen = ()
            for i in tl.static_range(KERNEL_W):
                m_seen = m_channel
                if TRANSPOSED:
                    m_seen = m_channel & (columns.first + first_step + i <= columns.last)[:, None]
                p_seen = p_source + (o_source * source.h + tl.cast((first_step + i) * DILATION_W, OFFSET) * source.w)
                seen = seen + (tl.load(p_seen, mask=m_seen, other=0),)
            b_taps = load_taps(
                taps, weight, rpb, rows, i_source, WINDOW, TRANSPOSED, SOFTMAX, HAS_RPB, ACCUMULATOR, OFFSET
            )
            if SOFTMAX:
                if TRANSPOSED:
                    p_statistics = taps.p_statistics + o_source * statistics.h
                    b_statistics = tl.load(p_statistics, mask=taps.mask, other=0) * LOG2_E
                b_taps = tl.exp2(b_taps - b_statistics).to(source.ptr.dtype.element_ty)
            steps = unstack(tl.reshape(b_taps, [ROWS * COLUMNS, STEPS]), COLUMNS, 1, STEPS)
            wide = ()
            for i in tl.static_range(KERNEL_W):
                wide = wide + (seen[i].to(ACCUMULATOR),)
            new = ()
            for r in tl.static_range(ROWS):
                b_sum = sums[r]
                row = tl.minimum(rows.first + r, rows.members - 1)
                if not TRANSPOSED:
                    row = -window_start(row, rows.members, KERNEL_H, 1)
                kernel_h = row + window_row(rows, i_source, KERNEL_H, TRANSPOSED)
                if (kernel_h >= 0) & (kernel_h < KERNEL_H):
                    for i in tl.static_range(KERNEL_W):
                        b_sum += tl.reshape(steps[i * ROWS + r], [COLUMNS, 1]).to(ACCUMULATOR) * wide[i]
                new = new + (b_sum,)
            sums = new

    p_out = image_of(out, columns)[:, None] + (
        columns.column.to(OFFSET)[:, None] * out.w + o_channel.to(OFFSET)[None, :] * out.c
    )
    for r in tl.static_range(ROWS):
        o_row = tl.cast((rows.first + r) * DILATION_H + rows.residue, OFFSET)
        m_out = columns.mask[:, None] & m_channel & (rows.first + r < rows.members)
        tl.store(p_out + o_row * out.h, sums[r].to(out.ptr.dtype.element_ty), mask=m_out)


@tunable(
    OWN_CONFIGS,
    own_heuristic,
    problem=lambda logits, value, _rpb, window: own_problem(value, window),
    reference=reference_softmax_mix,
    name="own_windows.softmax_mix",
)
def softmax_mix(
    logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window, *, config: OwnConfig
) -> tuple[Tensor, Tensor]:
    """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), like value; log Σ_k exp [B,G,H,W])."""
    batch, groups, _, height, width = value.shape
    statistics = torch.empty((batch, groups, height, width), dtype=accumulator_dtype(value.dtype), device=value.device)
    return _sum(logits, value, window, Softmax(logits, rpb, value, statistics), False, config), statistics


@tunable(
    OWN_CONFIGS,
    own_heuristic,
    problem=lambda weight, value, window: own_problem(value, window),
    reference=reference_mix,
    name="own_windows.mix",
)
def mix(weight: Tensor, value: Tensor, window: Window, *, config: OwnConfig) -> Tensor:
    """Σ_k weight · value at nbr(i,k), like value."""
    return _sum(weight, value, window, None, False, config)


@tunable(
    OWN_CONFIGS,
    own_heuristic,
    problem=lambda weight, grad, window, *_: own_problem(grad, window),
    reference=reference_transpose,
    name="own_windows.transpose",
)
def transpose(
    weight: Tensor, grad: Tensor, window: Window, softmax: Softmax | None = None, *, config: OwnConfig
) -> Tensor:
    """Σ_{(i,k): nbr(i,k)=j} w[i,k] · grad[i], like grad; w = softmax(weight + rpb) where ``softmax`` is given."""
    return _sum(weight, grad, window, softmax, True, config)


def _sum(
    weight: Tensor, source: Tensor, window: Window, softmax: Softmax | None, transposed: bool, config: OwnConfig
) -> Tensor:
    out = empty_like_layout(source, source.shape)
    block = own_problem(source, window).block
    sizes, tiles = own_sizes(source, window, config, weight, out)
    channel_blocks = ceil_divide(source.shape[2], block)
    arguments: dict[str, Any] = {
        "weight": kernel_view(weight),
        "source": features_view(source),
        "rpb": table_view(softmax and softmax.rpb, source),
        "statistics": View(out) if softmax is None else view(softmax.statistics, "b g h w"),
        "out": features_view(out),
        "channel_blocks": channel_blocks,
        **sizes,
        "TRANSPOSED": transposed,
        "SOFTMAX": softmax is not None,
        "HAS_RPB": softmax is not None and softmax.rpb is not None,
        "STEPS": next_power_of_2(window.kernel_size[1]),
        "CHANNELS": block,
    }
    # One program per (channel block, tile of rows, columns of all images and heads), fastest first.
    launch(_sum_kernel, (channel_blocks * tiles,), out.device, arguments, num_warps=config.num_warps, num_stages=1)
    return out
