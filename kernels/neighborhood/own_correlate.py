# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""Clamped windows of which nearly every output has its own: correlate, Σ_c g[i,c] · value[nbr(i,k),c], in rows.

With p · (· − δ) on top it is the gradient of a softmax's logits. See ``own_tiles`` for how a program cuts the map.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.tiles import stack
from kernels.launch import launch, next_power_of_2
from kernels.neighborhood.configs import OWN_CONFIGS, OwnConfig, own_correlate_heuristic
from kernels.neighborhood.own_tiles import columns_of, image_of, load_taps, own_problem, own_sizes, rows_of, taps_of
from kernels.neighborhood.references import Softmax, reference_correlate
from kernels.neighborhood.tiles import LOG2_E, features_view, kernel_view, table_view
from kernels.tuning import tunable
from kernels.views import View, view
from kernels.windows import Window
from kernels.windows_triton import window_start

__all__ = ["correlate"]


@triton.jit
def _correlate_kernel(
    grad,  # [B, G, C, H, W]
    value,  # [B, G, C, H, W]
    logits,  # [B, G, Kh, Kw, H, W], with SOFTMAX, as the next three
    rpb,  # [G, 2Kh-1, 2Kw-1]
    statistics,  # [B, G, H, W]: log Σ_k exp
    out,  # [B, G, C, H, W]
    target,  # [B, G, Kh, Kw, H, W], Kh under ``c``, Kw under ``k``, as those of logits
    batch, groups, channels, height, width, row_tiles,
    WINDOW: tl.constexpr, SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    DILATION_H: tl.constexpr = WINDOW.dilation[0]
    DILATION_W: tl.constexpr = WINDOW.dilation[1]
    i_program = tl.program_id(0)
    i_column = i_program // row_tiles * COLUMNS
    rows = rows_of(i_program % row_tiles, height, ROWS, KERNEL_H, DILATION_H, False)
    columns = columns_of(i_column + tl.arange(0, COLUMNS), batch, groups, width, KERNEL_W, DILATION_W, False)
    targets = taps_of(target, rpb, statistics, rows, columns, 0, WINDOW, False, OFFSET, ROWS, STEPS)
    if SOFTMAX:
        taps = taps_of(logits, rpb, statistics, rows, columns, 0, WINDOW, False, OFFSET, ROWS, STEPS)
        b_statistics = tl.load(taps.p_statistics) * LOG2_E
    o_channel = tl.arange(0, CHANNELS)
    m_channel = (o_channel < channels)[None, :]
    o_first = (columns.first * DILATION_W + columns.residue).to(OFFSET)
    p_value = image_of(value, columns)[:, None] + (o_first[:, None] * value.w + o_channel.to(OFFSET)[None, :] * value.c)
    o_column = columns.column.to(OFFSET)[:, None]
    p_grad = image_of(grad, columns)[:, None] + (o_column * grad.w + o_channel.to(OFFSET)[None, :] * grad.c)
    p_out = image_of(out, columns)[:, None] + (o_column * out.w + o_channel.to(OFFSET)[None, :] * out.c)
    grads, deltas = (), ()
    for r in tl.static_range(ROWS):
        o_row = tl.minimum(rows.first + r, rows.members - 1) * DILATION_H + rows.residue
        b_grad = tl.load(p_grad + tl.cast(o_row, OFFSET) * grad.h, mask=m_channel, other=0).to(ACCUMULATOR)
        grads = grads + (b_grad,)
        b_delta = tl.zeros([COLUMNS], ACCUMULATOR)
        if SOFTMAX:  # δ = Σ_c grad · out, which equals Σ_k p · dp
            b_out = tl.load(p_out + tl.cast(o_row, OFFSET) * out.h, mask=m_channel, other=0).to(ACCUMULATOR)
            b_delta = tl.sum(b_grad * b_out, axis=1)
        deltas = deltas + (b_delta,)
    for i_source in range(rows.begin, rows.end):
        o_source = tl.cast(i_source * DILATION_H + rows.residue, OFFSET)
        seen = ()
        for i in tl.static_range(KERNEL_W):
            p_seen = p_value + (o_source * value.h + i * DILATION_W * value.w)
            seen = seen + (tl.load(p_seen, mask=m_channel, other=0),)
        if SOFTMAX:
            b_logits = load_taps(taps, logits, rpb, rows, i_source, WINDOW, False, True, HAS_RPB, ACCUMULATOR, OFFSET)
            b_weight = tl.exp2(b_logits - b_statistics)
        wide = ()
        for i in tl.static_range(KERNEL_W):
            wide = wide + (seen[i].to(ACCUMULATOR),)
        products = ()
        for r in tl.static_range(ROWS):
            own = (tl.zeros([COLUMNS, 1], ACCUMULATOR),) * STEPS
            kernel_h = i_source - window_start(tl.minimum(rows.first + r, rows.members - 1), rows.members, KERNEL_H, 1)
            if (kernel_h >= 0) & (kernel_h < KERNEL_H):
                for i in tl.static_range(KERNEL_W):
                    b_product = tl.sum(grads[r] * wide[i], axis=1) - deltas[r]
                    own = own[:i] + (tl.reshape(b_product, [COLUMNS, 1]),) + own[i + 1 :]
            products = products + (own,)
        slots = ()
        for i in tl.static_range(STEPS):
            for r in tl.static_range(ROWS):
                slots = slots + (products[r][i],)
        b_target = tl.reshape(stack(slots, COLUMNS, 1, STEPS), [ROWS, COLUMNS, STEPS])
        if SOFTMAX:
            b_target *= b_weight
        m_target = targets.own & targets.mask & (targets.row + i_source >= 0) & (targets.row + i_source < KERNEL_H)
        p_target = targets.p_weight + tl.cast(i_source, OFFSET) * target.c
        tl.store(p_target, b_target.to(target.ptr.dtype.element_ty), mask=m_target)


@tunable(
    OWN_CONFIGS,
    own_correlate_heuristic,
    problem=lambda _grad, value, _target, window, *_: own_problem(value, window),
    reference=reference_correlate,
    name="own_windows.correlate",
)
def correlate(
    grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax | None = None, *, config: OwnConfig
) -> Tensor:
    """Fills ``target`` [B,G,Kh,Kw,H,W] with Σ_c grad · value at nbr(i,k); or with the gradient of ``softmax``'s logits,
    p · (that − δ)."""
    spare = View(value)
    sizes, tiles = own_sizes(value, window, config, grad, target)
    arguments: dict[str, Any] = {
        "grad": features_view(grad),
        "value": features_view(value),
        "logits": spare if softmax is None else kernel_view(softmax.logits),
        "rpb": table_view(softmax and softmax.rpb, value),
        "statistics": spare if softmax is None else view(softmax.statistics, "b g h w"),
        "out": spare if softmax is None else features_view(softmax.out),
        "target": kernel_view(target),
        **sizes,
        "SOFTMAX": softmax is not None,
        "HAS_RPB": softmax is not None and softmax.rpb is not None,
        "STEPS": next_power_of_2(window.kernel_size[1]),
        "CHANNELS": next_power_of_2(value.shape[2]),
    }
    # One program per (tile of rows, columns of all images and heads), fastest first.
    launch(_correlate_kernel, (tiles,), value.device, arguments, num_warps=config.num_warps, num_stages=1)
    return target
