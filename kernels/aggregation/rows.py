# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""aggregate, transpose and correlate for zero-padded windows: rows that slide over registers (see ``tiles``).

Weights are read from memory, or generated: the [Q·P, G·S] taps of a step are then one matrix product of the pixels'
features [Q·P, R] with the weights [R, G·S] of one column of the window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.aggregation.tiles import first_source, last_source, load_rows, pitch, place, slide, stack, tap_of, unstack


@triton.jit
def _load_taps(weight, o_batch, o_row, o_column, m_pixel, o_step, o_group, kw, K: tl.constexpr):
    """[Q·P, G·S] of one column of the windows."""
    p_taps = weight.ptr + (o_batch * weight.b + o_column.to(tl.int64) * weight.w)[:, None] + o_row.to(tl.int64) * weight.h
    p_taps += (o_group.to(tl.int64) * weight.g + o_step * weight.k + kw.to(tl.int64) * weight.l)[None, :]
    return tl.load(p_taps, mask=m_pixel & (o_step < K)[None, :], other=0)


@triton.jit
def _weighted_sum_kernel(
    x,  # [B, G, C, x_height, x_width]; the gradient of the output if TRANSPOSED
    weight,  # [B, G, Kh, Kw, H', W'], or the features [B, R, H', W'] if GENERATED
    span,  # [G·Kh·Kw, R], not read unless GENERATED
    bias,  # [G·Kh·Kw], not read without HAS_BIAS
    out,  # [B, G, C, height, width]
    batch, groups, channels, features, x_height, x_width, height, width, row_tiles, channel_blocks,
    WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr, GENERATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ADJACENT: tl.constexpr, UPCAST: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    STRIDE: tl.constexpr = WINDOW.stride[0]
    SLOTS: tl.constexpr = pitch(ROWS)
    STEPS: tl.constexpr = pitch(WINDOW.kernel_size[0])
    FIRST: tl.constexpr = first_source(WINDOW, TRANSPOSED)
    END: tl.constexpr = last_source(WINDOW, ROWS, TRANSPOSED) + 1
    tile = place(batch, groups, channels, width, row_tiles, channel_blocks, ROWS, COLUMNS, GROUPS, CHANNELS)
    if TRANSPOSED:
        first_row = tile.row - WINDOW.padding[0] % STRIDE
        first = (first_row + WINDOW.padding[0]) // STRIDE
    else:
        first_row = tile.row
        first = first_row * STRIDE - WINDOW.padding[0]

    # Where the taps [Q·P, G·S] are: their outputs' columns [Q·P], and rows, [Q·P, 1] or [Q·P, G·S] if TRANSPOSED.
    o_tap_column = tl.minimum(
        (tl.program_id(0) // (tl.cdiv(groups, GROUPS) * channel_blocks) // row_tiles * COLUMNS)
        + tl.arange(0, SLOTS * COLUMNS) % COLUMNS,
        batch * width - 1,
    )
    o_tap_batch, o_tap_column = (o_tap_column // width).to(tl.int64), o_tap_column % width
    o_slot = (tl.arange(0, SLOTS * COLUMNS) // COLUMNS)[:, None]
    o_step = tl.arange(0, GROUPS * STEPS) % STEPS
    o_tap_group = tl.minimum(tile.group + tl.arange(0, GROUPS * STEPS) // STEPS, groups - 1)
    if TRANSPOSED:
        o_turned = o_slot + o_step[None, :] * WINDOW.dilation[0]
        o_distance = o_turned % SLOTS - o_step[None, :] * WINDOW.dilation[0]
        o_tap_row = first + o_distance // STRIDE
        m_tap_row = (o_turned % SLOTS < ROWS) & (o_distance % STRIDE == 0) & (o_tap_row >= 0) & (o_tap_row < x_height)
    else:
        o_tap_row = first_row + o_slot
        m_tap_row = (o_slot < ROWS) & (o_tap_row < height)
    o_feature = tl.arange(0, FEATURES)
    p_features = weight.ptr + (o_feature.to(tl.int64) * weight.c)[None, :]
    m_feature = (o_feature < features)[None, :]
    if GENERATED and not TRANSPOSED:
        p_features += (o_tap_batch * weight.b + o_tap_column.to(tl.int64) * weight.w)[:, None] + o_tap_row.to(tl.int64) * weight.h
        b_features = tl.load(p_features, mask=m_tap_row & m_feature, other=0)

    p_x = x.ptr + tile.group.to(tl.int64) * x.g + (tile.channel.to(tl.int64) * x.c)[None, :]
    sums = (tl.zeros([COLUMNS, GROUPS, CHANNELS], ACCUMULATOR),) * ROWS
    for kw in range(KERNEL_W):
        if TRANSPOSED:
            o_scaled = tile.column + WINDOW.padding[1] - kw * WINDOW.dilation[1]
            o_x = o_scaled // WINDOW.stride[1]
            m_x = tile.m_column & (o_scaled >= 0) & (o_scaled % WINDOW.stride[1] == 0) & (o_x < x_width)
            o_scaled = o_tap_column + WINDOW.padding[1] - kw * WINDOW.dilation[1]
            o_pixel = o_scaled // WINDOW.stride[1]
            m_pixel = (o_scaled >= 0) & (o_scaled % WINDOW.stride[1] == 0) & (o_pixel < x_width)
            m_tap = m_tap_row & m_pixel[:, None]
        else:
            o_x = tile.column * WINDOW.stride[1] - WINDOW.padding[1] + kw * WINDOW.dilation[1]
            m_x = tile.m_column & (o_x >= 0) & (o_x < x_width)
            o_pixel = o_tap_column
            m_tap = m_tap_row
        o_source = tile.batch * x.b + o_x.to(tl.int64) * x.w
        if ADJACENT:
            o_source = tl.max_contiguous(o_source, 8)
        p_column = p_x + o_source[:, None]
        m_column = m_x[:, None] & tile.m_channel[None, :]
        rows = load_rows(p_column, x.h, first, x_height, m_column, FIRST, min(FIRST + LOADS, END))
        if GENERATED:
            o_span = (o_tap_group * WINDOW.kernel_size[0] + o_step) * KERNEL_W + kw
            b_span = tl.load(
                span.ptr + (o_span * span.k)[None, :] + (o_feature * span.c)[:, None],
                mask=(o_feature < features)[:, None] & (o_step < WINDOW.kernel_size[0])[None, :],
                other=0,
            )
            b_bias = tl.zeros([GROUPS * STEPS], ACCUMULATOR)
            if HAS_BIAS:
                b_bias = tl.load(bias.ptr + o_span * bias.k, mask=o_step < WINDOW.kernel_size[0], other=0).to(ACCUMULATOR)
            if TRANSPOSED:
                p_pixel = p_features + (o_tap_batch * weight.b + o_pixel.to(tl.int64) * weight.w)[:, None]
                b_taps = tl.zeros([SLOTS * COLUMNS, GROUPS * STEPS], ACCUMULATOR)
                for turn in tl.static_range((SLOTS - 1 + (WINDOW.kernel_size[0] - 1) * WINDOW.dilation[0]) // SLOTS + 1):
                    o_turn = o_slot - SLOTS * turn
                    o_row = first + o_turn // STRIDE
                    m_row = (o_turn % STRIDE == 0) & (o_row >= 0) & (o_row < x_height) & m_pixel[:, None]
                    b_features = tl.load(p_pixel + o_row.to(tl.int64) * weight.h, mask=m_row & m_feature, other=0)
                    b_turn = tl.dot(b_features, b_span, input_precision="ieee", out_dtype=ACCUMULATOR) + b_bias[None, :]
                    b_taps = tl.where(m_row & (o_turned // SLOTS == turn), b_turn, b_taps)
            else:
                b_taps = tl.dot(b_features, b_span, input_precision="ieee", out_dtype=ACCUMULATOR) + b_bias[None, :]
        else:
            o_tap = o_tap_batch * weight.b + o_pixel.to(tl.int64) * weight.w
            if ADJACENT:
                o_tap = tl.max_contiguous(o_tap, 8)
            p_taps = weight.ptr + o_tap[:, None] + o_tap_row.to(tl.int64) * weight.h
            p_taps += (o_tap_group.to(tl.int64) * weight.g + o_step * weight.k + kw * weight.l)[None, :]
            b_taps = tl.load(p_taps, mask=m_tap & (o_step < WINDOW.kernel_size[0])[None, :], other=0)
        taps = unstack(b_taps, COLUMNS, GROUPS, STEPS)
        sums = slide(sums, rows, taps, FIRST, WINDOW, TRANSPOSED, GROUPS, CHANNELS)
        for source in tl.static_range(FIRST + LOADS, END, LOADS):
            rows = load_rows(p_column, x.h, first, x_height, m_column, source, min(source + LOADS, END))
            sums = slide(sums, rows, taps, source, WINDOW, TRANSPOSED, GROUPS, CHANNELS)
    o_out = tile.batch * out.b + tile.column.to(tl.int64) * out.w
    if ADJACENT:
        o_out = tl.max_contiguous(o_out, 8)
    p_out = out.ptr + tile.group.to(tl.int64) * out.g + o_out[:, None] + (tile.channel.to(tl.int64) * out.c)[None, :]
    for r in tl.static_range(ROWS):
        tl.store(
            p_out + (first_row + r).to(tl.int64) * out.h,
            tl.reshape(sums[r].to(out.ptr.dtype.element_ty), [COLUMNS, GROUPS * CHANNELS]),
            mask=tile.m_column[:, None] & tile.m_channel[None, :] & (first_row + r >= 0) & (first_row + r < height),
        )


@triton.jit
def load_wide(p, stride_h, first, height, m, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    rows = load_rows(p, stride_h, first, height, m, 0, ROWS)
    wide = ()
    for r in tl.static_range(ROWS):
        wide = wide + (tl.reshape(rows[r], [COLUMNS, GROUPS, CHANNELS]).to(ACC),)
    return wide


@triton.jit
def _correlate_kernel(
    g,  # [B, G, C, height, width]
    x,  # [B, G, C, x_height, x_width]
    out,  # [B, G, Kh, Kw, height, width]
    batch, groups, channels, x_height, x_width, height, width, row_tiles, channel_blocks,
    WINDOW: tl.constexpr, PADDED: tl.constexpr, ADJACENT: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = pitch(ROWS)
    STEPS: tl.constexpr = pitch(WINDOW.kernel_size[0])
    END: tl.constexpr = last_source(WINDOW, ROWS, False) + 1
    tile = place(batch, groups, channels, width, row_tiles, 1, ROWS, COLUMNS, GROUPS, CHANNELS)
    p_g = g.ptr + tile.group.to(tl.int64) * g.g + (tile.channel.to(tl.int64) * g.c)[None, :]
    p_x = x.ptr + tile.group.to(tl.int64) * x.g + (tile.channel.to(tl.int64) * x.c)[None, :]
    o_g = tile.batch * g.b + tile.column.to(tl.int64) * g.w
    if ADJACENT:
        o_g = tl.max_contiguous(o_g, 8)
    p_g += o_g[:, None]
    first = tile.row * WINDOW.stride[0] - WINDOW.padding[0]

    o_tap_column = tl.program_id(0) // tl.cdiv(groups, GROUPS) // row_tiles * COLUMNS + tl.arange(0, SLOTS * COLUMNS) % COLUMNS
    m_out = o_tap_column < batch * width
    o_tap_column = tl.minimum(o_tap_column, batch * width - 1)
    o_slot = tl.arange(0, SLOTS * COLUMNS) // COLUMNS
    o_step = tl.arange(0, GROUPS * STEPS) % STEPS
    o_group = tile.group + tl.arange(0, GROUPS * STEPS) // STEPS
    m_out = (m_out & (o_slot < ROWS) & (tile.row + o_slot < height))[:, None] & ((o_step < (STEPS if PADDED else WINDOW.kernel_size[0])) & (o_group < groups))[None, :]
    o_out = (o_tap_column // width).to(tl.int64) * out.b + (tile.row + o_slot).to(tl.int64) * out.h + (o_tap_column % width).to(tl.int64) * out.w
    if ADJACENT:
        o_out = tl.max_contiguous(o_out, 8)
    # Groups of padded taps are adjacent: known when compiling, so that a store has 16 bytes.
    o_entry = tile.group.to(tl.int64) * out.g + tl.arange(0, GROUPS * STEPS) // STEPS * (STEPS if PADDED else out.g) + o_step * out.k
    p_out = out.ptr + o_out[:, None] + o_entry[None, :]
    if ONE:
        grads = load_wide(p_g, g.h, tile.row, height, tile.m_column[:, None] & tile.m_channel[None, :], COLUMNS, GROUPS, CHANNELS, ROWS, ACCUMULATOR)
    for kw in range(WINDOW.kernel_size[1]):
        o_x = tile.column * WINDOW.stride[1] - WINDOW.padding[1] + kw * WINDOW.dilation[1]
        m_x = (tile.m_column & (o_x >= 0) & (o_x < x_width))[:, None]
        o_source = tile.batch * x.b + o_x.to(tl.int64) * x.w
        if ADJACENT:
            o_source = tl.max_contiguous(o_source, 8)
        sums = (tl.zeros([COLUMNS, GROUPS], ACCUMULATOR),) * (SLOTS * STEPS)
        p_grad = p_g
        p_row = p_x + o_source[:, None]
        for i_channel in range(channel_blocks):
            m_channel = (tile.channel + i_channel * CHANNELS < (channels if GROUPS == 1 else (groups - tile.group) * channels))[None, :]
            if not ONE:
                grads = load_wide(p_grad, g.h, tile.row, height, tile.m_column[:, None] & m_channel, COLUMNS, GROUPS, CHANNELS, ROWS, ACCUMULATOR)
            for source in tl.static_range(0, END, LOADS):
                rows = load_rows(p_row, x.h, first, x_height, m_x & m_channel, source, min(source + LOADS, END))
                for o in tl.static_range(len(rows)):
                    b_row = tl.reshape(rows[o], [COLUMNS, GROUPS, CHANNELS]).to(ACCUMULATOR)
                    for r in tl.static_range(ROWS):
                        if tap_of(source + o, r, WINDOW, SLOTS, False) >= 0:
                            b_sum = sums[tap_of(source + o, r, WINDOW, SLOTS, False)] + tl.sum(grads[r] * b_row, axis=2)
                            sums = sums[:tap_of(source + o, r, WINDOW, SLOTS, False)] + (b_sum,) + sums[tap_of(source + o, r, WINDOW, SLOTS, False) + 1 :]
            p_grad += CHANNELS * g.c
            p_row += CHANNELS * x.c
        b_taps = stack(sums, COLUMNS, GROUPS, STEPS)
        tl.store(p_out + kw * out.l, b_taps.to(out.ptr.dtype.element_ty), mask=m_out)
