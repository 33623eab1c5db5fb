# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""Clamped windows that many outputs share: aggregate, transpose and correlate as dense matrix products.

Along an axis of length L clamped windows have L − K + 1 starts only: on a 14x14 map with K = 13 four windows serve 196
outputs, on a 7x7 map with K = 7 one serves all. With w the weights [outputs, positions] of one window:

    mix         w @ values                    aggregate; softmax inside where logits are given
    transpose   Σ over windows of wᵀ @ g      every block of inputs walks over the windows that hold it
    correlate   g @ valuesᵀ                   with p · (· − δ) on top: the gradient of logits

Each entry of a dynamic kernel is read or written exactly once per kernel, along the window positions, which are
adjacent in memory. A NaN in the gradient of an output may reach all inputs of its image and head in ``transpose``;
elsewhere a value reaches what the definition says.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dtypes import accumulator_dtype, precision, upcast
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.neighborhood.configs import (
    SHARED_CONFIGS,
    SharedConfig,
    SharedProblem,
    shared_gradient_heuristic,
    shared_heuristic,
    shared_transpose_heuristic,
    windows_and_most,
)
from kernels.neighborhood.references import (
    Softmax,
    reference_correlate,
    reference_mix,
    reference_softmax_mix,
    reference_transpose,
)
from kernels.neighborhood.tiles import LOG2_E, along_window, features_view, table_view
from kernels.tuning import tunable
from kernels.views import View, at, view
from kernels.windows import Window
from kernels.windows_triton import offsets, pixels_of_window, split_program

__all__ = ["correlate", "mix", "softmax_mix", "transpose"]

MOST_STEPS = 6  # held in registers at once


@triton.jit
def _logits(
    logits, rpb, tile, o_position, o_kernel_h, o_kernel_w, m_weight, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """logits + rpb of a tile's outputs at window positions, [P, S]; −inf where ``m_weight`` is off."""
    o_position = o_position.to(OFFSET) * logits.k
    p_logits = (logits.ptr + offsets(logits, tile, OFFSET))[:, None] + o_position[None, :]
    b_logits = tl.load(p_logits, mask=m_weight, other=float("-inf")).to(ACCUMULATOR)
    if HAS_RPB:
        o_output = (tile.start_h - tile.row + KERNEL_H - 1) * rpb.h + (
            tile.start_w - tile.column + KERNEL_W - 1
        ) * rpb.w
        p_rpb = (rpb.ptr + o_output)[:, None] + (o_kernel_h * rpb.h + o_kernel_w * rpb.w)[None, :]
        b_logits += tl.load(p_rpb, mask=m_weight, other=0).to(ACCUMULATOR)
    return b_logits


@triton.jit
def _load_rows(tensor, o_pixel, m_pixel, channels, OFFSET: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """[N, C] of the pixels at offsets ``o_pixel``."""
    o_channel = tl.arange(0, BLOCK_CHANNELS)
    p_block = tensor.ptr + o_pixel[:, None] + (o_channel.to(OFFSET) * tensor.c)[None, :]
    return tl.load(p_block, mask=m_pixel[:, None] & (o_channel < channels)[None, :], other=0)


@triton.jit
def _load_weights(
    weight, rpb, tile, o_step, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A tile's weights, or logits with SOFTMAX, at window positions ``o_step``, [P, S]."""
    m_step = (o_step < KERNEL_H * KERNEL_W)[None, :]
    if SOFTMAX:
        b_weight = _logits(
            weight, rpb, tile, o_step, o_step // KERNEL_W, o_step % KERNEL_W, m_step,
            KERNEL_H, KERNEL_W, HAS_RPB, ACCUMULATOR, OFFSET,
        )  # fmt: skip
    else:
        p_weight = weight.ptr + (offsets(weight, tile, OFFSET)[:, None] + (o_step.to(OFFSET) * weight.k)[None, :])
        b_weight = tl.load(p_weight, mask=m_step, other=0)
    return b_weight


@triton.jit
def _load_positions(
    value, tile, o_step, channels, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """[S, C] of the inputs at window positions ``o_step``."""
    o_row, o_column = tile.start_h + o_step // KERNEL_W, tile.start_w + o_step % KERNEL_W
    o_input = o_row.to(OFFSET) * value.h + o_column.to(OFFSET) * value.w
    return _load_rows(value, o_input, o_step < KERNEL_H * KERNEL_W, channels, OFFSET, BLOCK_CHANNELS)


@triton.jit
def _dot(b_left, b_right, b_sum, UPCAST: tl.constexpr):
    if UPCAST:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee", out_dtype=b_sum.dtype)


@triton.jit
def _mix_kernel(
    weight,  # [B, G, H, W, K²]: weights, or logits with SOFTMAX
    value,  # [B, G, C, H, W]
    rpb,  # [G, 2Kh-1, 2Kw-1]
    out,  # [B, G, C, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp, with SOFTMAX
    groups, channels, height, width, tiles, windows,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    weight, value, out = at(weight, i_batch, i_group), at(value, i_batch, i_group), at(out, i_batch, i_group)
    statistics, rpb = at(statistics, i_batch, i_group), at(rpb, 0, i_group)
    tile = pixels_of_window(i_tile, i_window, height, width, KERNEL_H, KERNEL_W, BLOCK_OUTPUTS)
    # [P], [P], [P, C]
    b_max = tl.full([BLOCK_OUTPUTS], float("-inf"), ACCUMULATOR)
    b_total = tl.zeros([BLOCK_OUTPUTS], ACCUMULATOR)
    b_sum = tl.zeros([BLOCK_OUTPUTS, BLOCK_CHANNELS], ACCUMULATOR)
    # Logits of several steps are held at once: what a softmax exchanges between threads, it then exchanges once.
    for i_chunk in tl.range(CHUNKS, num_stages=1):
        b_weights = ()
        for i_step in tl.static_range(UNROLL):
            o_step = (i_chunk * UNROLL + i_step) * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS)
            b_weight = _load_weights(
                weight, rpb, tile, o_step, KERNEL_H, KERNEL_W, SOFTMAX, HAS_RPB, ACCUMULATOR, OFFSET
            )
            b_weights = b_weights + (b_weight,)
        if SOFTMAX:
            b_top = b_weights[0]
            for i_step in tl.static_range(1, UNROLL):
                b_top = tl.maximum(b_top, b_weights[i_step])
            b_new_max = tl.maximum(b_max, tl.max(b_top, axis=1))
            # −inf − (−inf) is NaN: while every logit seen is −inf, subtract 0 instead.
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max) * LOG2_E
            b_rescale = tl.exp2(b_max * LOG2_E - b_shift)
            b_sum *= b_rescale[:, None]
            b_max = b_new_max
            b_part = tl.zeros([BLOCK_OUTPUTS, BLOCK_STEPS], ACCUMULATOR)
        for i_step in tl.static_range(UNROLL):
            o_step = (i_chunk * UNROLL + i_step) * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS)
            b_value = _load_positions(value, tile, o_step, channels, KERNEL_H, KERNEL_W, OFFSET, BLOCK_CHANNELS)
            b_weight = b_weights[i_step]
            if SOFTMAX:
                b_weight = tl.exp2(b_weight * LOG2_E - b_shift[:, None])
                b_part += b_weight
            b_sum = _dot(b_weight.to(b_value.dtype), b_value, b_sum, UPCAST)
        if SOFTMAX:
            b_total = b_total * b_rescale + tl.sum(b_part, axis=1)
    if SOFTMAX:
        b_sum = b_sum / b_total[:, None]
        o_pixel = tile.row * statistics.h + tile.column * statistics.w
        tl.store(statistics.ptr + o_pixel, b_max + tl.log2(b_total) / LOG2_E, mask=tile.mask)
    o_channel = tl.arange(0, BLOCK_CHANNELS)
    tl.store(
        out.ptr + offsets(out, tile, OFFSET)[:, None] + (o_channel.to(OFFSET) * out.c)[None, :],
        b_sum.to(out.ptr.dtype.element_ty),
        mask=tile.mask[:, None] & (o_channel < channels)[None, :],
    )


@triton.jit
def _correlate_kernel(
    grad,  # [B, G, C, H, W]
    value,  # [B, G, C, H, W]
    logits,  # [B, G, H, W, K²], with SOFTMAX, as the next three
    rpb,  # [G, 2Kh-1, 2Kw-1]
    statistics,  # [B, G, H, W]
    out,  # [B, G, C, H, W]
    target,  # [B, G, H, W, K²]
    groups, channels, height, width, tiles, windows,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    grad, value, target = at(grad, i_batch, i_group), at(value, i_batch, i_group), at(target, i_batch, i_group)
    tile = pixels_of_window(i_tile, i_window, height, width, KERNEL_H, KERNEL_W, BLOCK_OUTPUTS)
    b_grad = _load_rows(grad, offsets(grad, tile, OFFSET), tile.mask, channels, OFFSET, BLOCK_CHANNELS)
    if SOFTMAX:
        logits, statistics, rpb = at(logits, i_batch, i_group), at(statistics, i_batch, i_group), at(rpb, 0, i_group)
        out = at(out, i_batch, i_group)
        b_out = _load_rows(out, offsets(out, tile, OFFSET), tile.mask, channels, OFFSET, BLOCK_CHANNELS)
        # δ = Σ_c grad · out, which equals Σ_k p · dp, [P]
        b_delta = tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), axis=1)
        b_statistics = tl.load(statistics.ptr + tile.row * statistics.h + tile.column * statistics.w) * LOG2_E
    for first in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = first + tl.arange(0, BLOCK_STEPS)
        o_kernel_h, o_kernel_w, m_step = o_step // KERNEL_W, o_step % KERNEL_W, o_step < KERNEL_H * KERNEL_W
        o_input = (tile.start_h + o_kernel_h).to(OFFSET) * value.h + (tile.start_w + o_kernel_w).to(OFFSET) * value.w
        b_value = _load_rows(value, o_input, m_step, channels, OFFSET, BLOCK_CHANNELS)
        # [P, S]
        b_product = _dot(b_grad, tl.trans(b_value), tl.zeros([BLOCK_OUTPUTS, BLOCK_STEPS], ACCUMULATOR), UPCAST)
        if SOFTMAX:
            b_logits = _logits(
                logits, rpb, tile, o_step, o_kernel_h, o_kernel_w, m_step[None, :],
                KERNEL_H, KERNEL_W, HAS_RPB, ACCUMULATOR, OFFSET,
            )  # fmt: skip
            b_product = tl.exp2(b_logits * LOG2_E - b_statistics[:, None]) * (b_product - b_delta[:, None])
        tl.store(
            target.ptr + offsets(target, tile, OFFSET)[:, None] + (o_step.to(OFFSET) * target.k)[None, :],
            b_product.to(target.ptr.dtype.element_ty),
            mask=tile.mask[:, None] & m_step[None, :],
        )


@triton.jit
def _transpose_kernel(
    weight,  # [B, G, H, W, K²]: weights, or logits with SOFTMAX
    grad,  # [B, G, C, H, W]
    rpb,  # [G, 2Kh-1, 2Kw-1], with SOFTMAX, as the next one
    statistics,  # [B, G, H, W]
    target,  # [B, G, C, H, W]
    groups, channels, height, width, input_blocks, tiles, windows,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A step here is an input; each program takes a block of them over all windows."""
    i_block, _, i_group, i_batch = split_program(input_blocks, 1, groups)
    weight, grad, target = at(weight, i_batch, i_group), at(grad, i_batch, i_group), at(target, i_batch, i_group)
    statistics, rpb = at(statistics, i_batch, i_group), at(rpb, 0, i_group)
    o_input = i_block * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS)
    m_input = o_input < height * width
    o_row, o_column = o_input // width, o_input % width
    # [J, C]
    b_sum = tl.zeros([BLOCK_STEPS, BLOCK_CHANNELS], ACCUMULATOR)
    for i_part in range(0, windows * tiles):
        tile = pixels_of_window(i_part % tiles, i_part // tiles, height, width, KERNEL_H, KERNEL_W, BLOCK_OUTPUTS)
        o_kernel_h, o_kernel_w = o_row - tile.start_h, o_column - tile.start_w
        m_held = m_input & (o_kernel_h >= 0) & (o_kernel_h < KERNEL_H) & (o_kernel_w >= 0) & (o_kernel_w < KERNEL_W)
        m_weight = tile.mask[:, None] & m_held[None, :]
        b_grad = _load_rows(grad, offsets(grad, tile, OFFSET), tile.mask, channels, OFFSET, BLOCK_CHANNELS)
        # [P, J]
        if SOFTMAX:
            b_logits = _logits(
                weight, rpb, tile, o_kernel_h * KERNEL_W + o_kernel_w, o_kernel_h, o_kernel_w, m_weight,
                KERNEL_H, KERNEL_W, HAS_RPB, ACCUMULATOR, OFFSET,
            )  # fmt: skip
            o_pixel = tile.row * statistics.h + tile.column * statistics.w
            b_weight = tl.exp2(b_logits * LOG2_E - (tl.load(statistics.ptr + o_pixel) * LOG2_E)[:, None])
            # An output whose logits are all −inf has NaN weights, but only where its window is.
            b_weight = tl.where(m_weight, b_weight, 0.0).to(b_grad.dtype)
        else:
            o_position = (o_kernel_h * KERNEL_W + o_kernel_w).to(OFFSET) * weight.k
            p_weight = weight.ptr + offsets(weight, tile, OFFSET)[:, None] + o_position[None, :]
            b_weight = tl.load(p_weight, mask=m_weight, other=0)
        b_sum = _dot(tl.trans(b_weight), b_grad, b_sum, UPCAST)
    o_channel = tl.arange(0, BLOCK_CHANNELS)
    o_target = o_row.to(OFFSET) * target.h + o_column.to(OFFSET) * target.w
    tl.store(
        target.ptr + o_target[:, None] + (o_channel.to(OFFSET) * target.c)[None, :],
        b_sum.to(target.ptr.dtype.element_ty),
        mask=m_input[:, None] & (o_channel < channels)[None, :],
    )


def _problem(kernel: Tensor, features: Tensor, window: Window) -> SharedProblem:
    channels, height, width = features.shape[2:]
    _, most = windows_and_most(window, height, width)
    positions = window.kernel_size[0] * window.kernel_size[1]
    return SharedProblem(channels, height * width, positions, most, kernel.dtype)


def _common(features: Tensor, window: Window, config: SharedConfig, *tensors: Tensor) -> dict[str, Any]:
    """Sizes, types and blocks, which the three kernels take alike."""
    _, groups, channels, height, width = features.shape
    windows, most = windows_and_most(window, height, width)
    return {
        "groups": groups,
        "channels": channels,
        "height": height,
        "width": width,
        "tiles": ceil_divide(most, config.block_outputs),
        "windows": windows,
        "KERNEL_H": window.kernel_size[0],
        "KERNEL_W": window.kernel_size[1],
        **precision(features, *tensors),
        "UPCAST": upcast(features.dtype),
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_STEPS": config.block_steps,
        "BLOCK_CHANNELS": max(16, next_power_of_2(channels)),
    }


def _steps(window: Window, config: SharedConfig) -> dict[str, int]:
    """How many steps of a window are held at once, and how often."""
    steps = ceil_divide(window.kernel_size[0] * window.kernel_size[1], config.block_steps)
    return {"CHUNKS": ceil_divide(steps, MOST_STEPS), "UNROLL": ceil_divide(steps, ceil_divide(steps, MOST_STEPS))}


@tunable(
    SHARED_CONFIGS,
    shared_heuristic,
    problem=lambda logits, value, _rpb, window: _problem(logits, value, window),
    reference=reference_softmax_mix,
    name="shared_windows.softmax_mix",
)
def softmax_mix(
    logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window, *, config: SharedConfig
) -> tuple[Tensor, Tensor]:
    """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), like value; log Σ_k exp [B,G,H,W])."""
    batch, groups, _, height, width = value.shape
    statistics = torch.empty((batch, groups, height, width), dtype=accumulator_dtype(value.dtype), device=value.device)
    return _mix(logits, value, rpb, statistics, window, config), statistics


@tunable(
    SHARED_CONFIGS,
    shared_heuristic,
    problem=_problem,
    reference=reference_mix,
    name="shared_windows.mix",
)
def mix(weight: Tensor, value: Tensor, window: Window, *, config: SharedConfig) -> Tensor:
    """Σ_k weight · value at nbr(i,k), like value."""
    return _mix(weight, value, None, None, window, config)


def _mix(
    weight: Tensor, value: Tensor, rpb: Tensor | None, statistics: Tensor | None, window: Window, config: SharedConfig
) -> Tensor:
    out = empty_like_layout(value, value.shape)
    common = _common(value, window, config, weight, out)
    arguments = {
        "weight": along_window(weight),
        "value": features_view(value),
        "rpb": table_view(rpb, value),
        "out": features_view(out),
        "statistics": View(out) if statistics is None else view(statistics, "b g h w"),
        **common,
        **_steps(window, config),
        "SOFTMAX": statistics is not None,
        "HAS_RPB": rpb is not None,
    }
    # One program per (tile of a window's outputs, window, group, batch entry).
    grid = (common["tiles"] * common["windows"] * value.shape[1] * value.shape[0],)
    launch(_mix_kernel, grid, value.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out


@tunable(
    SHARED_CONFIGS,
    shared_gradient_heuristic,
    problem=lambda grad, _value, target, window, *_: _problem(target, grad, window),
    reference=reference_correlate,
    name="shared_windows.correlate",
)
def correlate(
    grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax | None = None, *, config: SharedConfig
) -> Tensor:
    """Fills ``target`` [B,G,Kh,Kw,H,W] with Σ_c grad · value at nbr(i,k); or with the gradient of ``softmax``'s logits,
    p · (that − δ)."""
    common = _common(value, window, config, grad, target)
    features, spare = features_view(value), View(value)
    arguments = {
        "grad": features_view(grad),
        "value": features,
        "logits": spare if softmax is None else along_window(softmax.logits),
        "rpb": spare if softmax is None else table_view(softmax.rpb, value),
        "statistics": spare if softmax is None else view(softmax.statistics, "b g h w"),
        "out": spare if softmax is None else features_view(softmax.out),
        "target": along_window(target),
        **common,
        "SOFTMAX": softmax is not None,
        "HAS_RPB": softmax is not None and softmax.rpb is not None,
    }
    # One program per (tile of a window's outputs, window, group, batch entry).
    grid = (common["tiles"] * common["windows"] * value.shape[1] * value.shape[0],)
    launch(_correlate_kernel, grid, value.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return target


@tunable(
    SHARED_CONFIGS,
    shared_transpose_heuristic,
    problem=lambda weight, grad, window, *_: _problem(weight, grad, window),
    reference=reference_transpose,
    name="shared_windows.transpose",
)
def transpose(
    weight: Tensor, grad: Tensor, window: Window, softmax: Softmax | None = None, *, config: SharedConfig
) -> Tensor:
    """Σ_{(i,k): nbr(i,k)=j} w[i,k] · grad[i], like grad; w = softmax(weight + rpb) where ``softmax`` is given."""
    target = empty_like_layout(grad, grad.shape)
    common = _common(grad, window, config, weight, target)
    blocks = ceil_divide(grad.shape[3] * grad.shape[4], config.block_steps)
    arguments = {
        "weight": along_window(weight),
        "grad": features_view(grad),
        "rpb": View(grad) if softmax is None else table_view(softmax.rpb, grad),
        "statistics": View(grad) if softmax is None else view(softmax.statistics, "b g h w"),
        "target": features_view(target),
        "input_blocks": blocks,
        **common,
        "SOFTMAX": softmax is not None,
        "HAS_RPB": softmax is not None and softmax.rpb is not None,
    }
    # One program per (block of inputs, group, batch entry).
    grid = (blocks * grad.shape[1] * grad.shape[0],)
    launch(_transpose_kernel, grid, grad.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return target
