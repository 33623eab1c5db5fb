# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Clamped windows that many outputs share: aggregate, transpose and correlate as dense matrix products.

Along an axis of length L clamped windows have L − K + 1 starts only: on a 14x14 map with K = 13 four windows serve 196
outputs, on a 7x7 map with K = 7 one serves all. With w the weights [outputs, positions] of one window:

    mix         w @ values                    aggregate; softmax inside where logits are given
    transpose   wᵀ @ g                        one part per window, which a small kernel sums where windows overlap
    correlate   g @ valuesᵀ                   with p · (· − δ) on top: the gradient of logits

Transpose and correlate are one kernel, which does either, or both for a softmax, whose weights are then made once.
Each entry of a dynamic kernel is read or written exactly once per kernel, along the window positions, which are
adjacent in memory.
"""

import triton
import triton.language as tl

from kernels.products import LOG2_E, dot
from kernels.views import aligned, at, multiple
from kernels.windows_triton import (
    load_pixels,
    offsets,
    pixels_of_window,
    rpb_base,
    split_program,
    store_pixels,
)


@triton.jit
def _weights_at(weight, tile, o_step, KERNEL_W: tl.constexpr, OFFSET: tl.constexpr):
    """[P, S]: where a tile's weights at window positions are, which have one stride."""
    o_position = o_step.to(OFFSET) * (weight.k if KERNEL_W > 1 else weight.c)
    return (weight.ptr + offsets(weight, tile, OFFSET))[:, None] + o_position[None, :]


@triton.jit
def _load_weights(
    weight, rpb, tile, o_step, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SOFTMAX: tl.constexpr,
    HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A tile's weights at window positions, [P, S], 0 where there is none; logits + rpb with SOFTMAX, −inf."""
    p_weight = _weights_at(weight, tile, o_step, KERNEL_W, OFFSET)
    m_weight = (o_step < KERNEL_H * KERNEL_W)[None, :]
    b_weight = tl.load(p_weight, mask=m_weight, other=float("-inf") if SOFTMAX else 0)
    if SOFTMAX:
        b_weight = b_weight.to(ACCUMULATOR)
        if HAS_RPB:
            o_relative = o_step // KERNEL_W * rpb.h + o_step % KERNEL_W * rpb.w
            p_rpb = (rpb.ptr + rpb_base(rpb, tile, KERNEL_H, KERNEL_W))[:, None] + o_relative[None, :]
            b_weight += tl.load(p_rpb, mask=m_weight, other=0).to(ACCUMULATOR)
    return b_weight


@triton.jit
def _load_positions(
    value, tile, o_step, channels, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """[S, C] of the inputs at window positions ``o_step``."""
    o_row, o_column = tile.start_h + o_step // KERNEL_W, tile.start_w + o_step % KERNEL_W
    o_input = o_row.to(OFFSET) * value.h + o_column.to(OFFSET) * value.w
    return load_pixels(value, o_input, o_step < KERNEL_H * KERNEL_W, channels, BLOCK_CHANNELS)


@triton.jit
def mix_kernel(
    weight,  # [B, G, Kh, Kw, H, W], Kh under ``c``, Kw under ``k``: weights, or logits with SOFTMAX
    source,  # [B, G, C, H, W]: values
    rpb,  # [G, 2Kh-1, 2Kw-1]
    out,  # [B, G, C, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp, with SOFTMAX
    sizes, tiles, windows, ALIGNED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    _batch, groups, channels, height, width = sizes
    channels, source, out = multiple(channels, ALIGNED), aligned(source, ALIGNED), aligned(out, ALIGNED)
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    weight, source, out = at(weight, i_batch, i_group), at(source, i_batch, i_group), at(out, i_batch, i_group)
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
            b_value = _load_positions(source, tile, o_step, channels, KERNEL_H, KERNEL_W, OFFSET, BLOCK_CHANNELS)
            b_weight = b_weights[i_step]
            if SOFTMAX:
                b_weight = tl.exp2(b_weight * LOG2_E - b_shift[:, None])
                b_part += b_weight
            b_sum = dot(b_weight.to(b_value.dtype), b_value, b_sum, UPCAST)
        if SOFTMAX:
            b_total = b_total * b_rescale + tl.sum(b_part, axis=1)
    if SOFTMAX:
        b_sum = b_sum / b_total[:, None]
        o_pixel = tile.row * statistics.h + tile.column * statistics.w
        tl.store(statistics.ptr + o_pixel, b_max + tl.log2(b_total) / LOG2_E, mask=tile.mask)
    store_pixels(out, offsets(out, tile, OFFSET), tile.mask, b_sum, channels)


@triton.jit
def backward_kernel(
    grad,  # [B, G, C, H, W]
    value,  # [B, G, C, H, W], with CORRELATE
    weight,  # [B, G, Kh, Kw, H, W], Kh under ``c``, Kw under ``k``: weights, with TRANSPOSE, or logits with SOFTMAX
    rpb,  # [G, 2Kh-1, 2Kw-1], with SOFTMAX, as the next two
    statistics,  # [B, G, H, W]: log Σ_k exp
    out,  # [B, G, C, H, W]
    target,  # [B, G, Kh, Kw, H, W], as weight: written, with CORRELATE
    parts,  # [B, G, C, tiles · windows, K²]: written, with TRANSPOSE; FILLED channels, where these are more
    sizes, tiles, windows, ALIGNED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    CORRELATE: tl.constexpr, TRANSPOSE: tl.constexpr, FILLED: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    _batch, groups, channels, height, width = sizes
    channels, grad, value = multiple(channels, ALIGNED), aligned(grad, ALIGNED), aligned(value, ALIGNED)
    out, parts = aligned(out, ALIGNED), aligned(parts, 8 if FILLED else ALIGNED)
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    grad, value, target = at(grad, i_batch, i_group), at(value, i_batch, i_group), at(target, i_batch, i_group)
    weight, rpb, parts = at(weight, i_batch, i_group), at(rpb, 0, i_group), at(parts, i_batch, i_group)
    tile = pixels_of_window(i_tile, i_window, height, width, KERNEL_H, KERNEL_W, BLOCK_OUTPUTS)
    # [P, C]; an output that is not there repeats one that is, but has no gradient
    b_grad = load_pixels(grad, offsets(grad, tile, OFFSET), tile.mask, channels, BLOCK_CHANNELS)
    if SOFTMAX:
        statistics, out = at(statistics, i_batch, i_group), at(out, i_batch, i_group)
        b_out = load_pixels(out, offsets(out, tile, OFFSET), tile.mask, channels, BLOCK_CHANNELS)
        # δ = Σ_c grad · out, which equals Σ_k p · dp, [P]
        b_delta = tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), axis=1)
        b_statistics = tl.load(statistics.ptr + tile.row * statistics.h + tile.column * statistics.w) * LOG2_E
    o_part = (i_window * tiles + i_tile).to(OFFSET) * parts.h
    for first in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = first + tl.arange(0, BLOCK_STEPS)
        m_step = o_step < KERNEL_H * KERNEL_W
        # [P, S]
        if SOFTMAX | TRANSPOSE:
            b_weight = _load_weights(
                weight, rpb, tile, o_step, KERNEL_H, KERNEL_W, SOFTMAX, HAS_RPB, ACCUMULATOR, OFFSET
            )
        if SOFTMAX:
            b_weight = tl.exp2(b_weight * LOG2_E - b_statistics[:, None])
        if TRANSPOSE:
            b_used = b_weight.to(b_grad.dtype) if SOFTMAX else tl.where(tile.mask[:, None], b_weight, 0)
            b_part = tl.zeros([BLOCK_STEPS, BLOCK_CHANNELS], ACCUMULATOR)
            b_part = dot(tl.trans(b_used), b_grad, b_part, UPCAST)
            store_pixels(parts, o_part + o_step.to(OFFSET) * parts.w, m_step, b_part, FILLED if FILLED else channels)
        if CORRELATE:
            b_value = _load_positions(value, tile, o_step, channels, KERNEL_H, KERNEL_W, OFFSET, BLOCK_CHANNELS)
            b_product = dot(b_grad, tl.trans(b_value), tl.zeros([BLOCK_OUTPUTS, BLOCK_STEPS], ACCUMULATOR), UPCAST)
            if SOFTMAX:
                b_product = b_weight * (b_product - b_delta[:, None])
            tl.store(
                _weights_at(target, tile, o_step, KERNEL_W, OFFSET),
                b_product.to(target.ptr.dtype.element_ty),
                mask=tile.mask[:, None] & m_step[None, :],
            )
