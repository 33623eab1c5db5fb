# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""Clamped windows of which nearly every output has its own: sums and products in rows of outputs.

    mix         Σ_k w[i,k] · value[nbr(i,k)]          softmax inside where logits are given
    transpose   Σ_{(i,k) reaching j} w[i,k] · g[i]    the same kernel: its sources are the outputs that see an input
    correlate   Σ_c g[i,c] · value[nbr(i,k),c]        with p · (· − δ) on top: the gradient of logits

See ``own_tiles`` for how a program cuts the map. A warp issues C·K²/32 multiply-adds per output, and converts each
source once for all rows of a tile.
"""

import triton
import triton.language as tl

from kernels.neighborhood.own_tiles import columns_of, image_of, load_taps, rows_of, taps_of, window_row
from kernels.products import LOG2_E
from kernels.registers import stack, unstack
from kernels.views import aligned, multiple
from kernels.windows_triton import window_start


@triton.jit
def _log_sum_exp(
    taps, weight, rpb, WINDOW: tl.constexpr, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """The largest logit m and log2 Σ_k exp(logits − m), [R, P, 1] each; logits of small windows are held in registers,
    those of large ones read twice. Apart, since their sum is rounded: to 0.001 where logits are 10000."""
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
        b_total += tl.exp2((held[kh] - b_max) * LOG2_E)
    for kh in range(HELD, KERNEL_H):
        b_total += tl.exp2((_logits(taps, weight, rpb, kh, HAS_RPB, ACCUMULATOR, OFFSET) - b_max) * LOG2_E)
    return b_max, tl.log2(tl.sum(b_total, axis=2, keep_dims=True))


@triton.jit
def _logits(taps, weight, rpb, kh, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr):
    """logits + rpb [R, P, S] of own rows at window row ``kh``; −inf where there are none."""
    o_kernel = kh - taps.row
    p_weight = taps.p_weight + o_kernel.to(OFFSET) * weight.c
    b_logits = tl.load(p_weight, mask=taps.mask, other=float("-inf")).to(ACCUMULATOR)
    if HAS_RPB:
        b_logits += tl.load(rpb.ptr + taps.o_rpb + o_kernel * rpb.h, mask=taps.mask, other=0).to(ACCUMULATOR)
    return b_logits


@triton.jit
def _taps_apart(b_taps):
    """Taps [R, P, S] as S·R blocks [P, 1], rows fastest. They move in their own type: converted ones take twice the
    room on the way, and those of a softmax would be converted one by one if they moved in pairs."""
    return unstack(tl.reshape(tl.permute(b_taps, [1, 2, 0]), [b_taps.shape[1], b_taps.shape[2] * b_taps.shape[0]]))


@triton.jit
def sum_kernel(
    weight,  # [B, G, Kh, Kw, H, W], Kh under ``c``, Kw under ``k``: weights, or logits with SOFTMAX
    source,  # [B, G, C, H, W]: values; the gradient of the output if TRANSPOSED
    rpb,  # [G, 2Kh-1, 2Kw-1]
    statistics,  # [B, G, H, W]: log Σ_k exp, with SOFTMAX: written, or read if TRANSPOSED
    out,  # [B, G, C, H, W]
    sizes, row_tiles, channel_blocks, ALIGNED: tl.constexpr,
    WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr, SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    batch, groups, channels, height, width = sizes
    source, out = aligned(source, ALIGNED), aligned(out, ALIGNED)
    i_program = tl.program_id(0)
    i_block, i_rest = i_program % channel_blocks, i_program // channel_blocks
    i_column = i_rest // row_tiles * COLUMNS
    rows = rows_of(i_rest % row_tiles, height, ROWS, WINDOW, TRANSPOSED)
    columns = columns_of(i_column + tl.arange(0, COLUMNS), batch, groups, width, WINDOW, TRANSPOSED)
    o_channel = i_block * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = (o_channel < multiple(channels, ALIGNED))[None, :]
    o_first = (columns.first * WINDOW.dilation[1] + columns.residue).to(OFFSET)
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
            b_max, b_log_total = _log_sum_exp(taps, weight, rpb, WINDOW, HAS_RPB, ACCUMULATOR, OFFSET)
            if i_block == 0:
                tl.store(taps.p_statistics, b_max + b_log_total / LOG2_E, mask=taps.own)
        for i_source in range(rows.begin, rows.end):
            o_source = tl.cast(i_source * WINDOW.dilation[0] + rows.residue, OFFSET)
            seen = ()
            for i in tl.static_range(KERNEL_W):
                m_seen = m_channel
                if TRANSPOSED:
                    m_seen = m_channel & (columns.first + first_step + i <= columns.last)[:, None]
                p_seen = p_source + (
                    o_source * source.h + tl.cast((first_step + i) * WINDOW.dilation[1], OFFSET) * source.w
                )
                seen = seen + (tl.load(p_seen, mask=m_seen, other=0),)
            b_taps = load_taps(
                taps, weight, rpb, rows, i_source, WINDOW, TRANSPOSED, SOFTMAX, HAS_RPB, ACCUMULATOR, OFFSET
            )
            if SOFTMAX:
                if TRANSPOSED:
                    p_statistics = taps.p_statistics + o_source * statistics.h
                    b_exponent = (b_taps - tl.load(p_statistics, mask=taps.mask, other=0)) * LOG2_E
                else:
                    b_exponent = (b_taps - b_max) * LOG2_E - b_log_total
                b_taps = tl.exp2(b_exponent).to(source.ptr.dtype.element_ty)
            steps = _taps_apart(b_taps)
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
                        b_sum += steps[i * ROWS + r].to(ACCUMULATOR) * wide[i]
                new = new + (b_sum,)
            sums = new

    p_out = image_of(out, columns)[:, None] + (
        columns.column.to(OFFSET)[:, None] * out.w + o_channel.to(OFFSET)[None, :] * out.c
    )
    for r in tl.static_range(ROWS):
        o_row = tl.cast((rows.first + r) * WINDOW.dilation[0] + rows.residue, OFFSET)
        m_out = columns.mask[:, None] & m_channel & (rows.first + r < rows.members)
        tl.store(p_out + o_row * out.h, sums[r].to(out.ptr.dtype.element_ty), mask=m_out)


@triton.jit
def correlate_kernel(
    grad,  # [B, G, C, H, W]
    value,  # [B, G, C, H, W]
    logits,  # [B, G, Kh, Kw, H, W], with SOFTMAX, as the next three
    rpb,  # [G, 2Kh-1, 2Kw-1]
    statistics,  # [B, G, H, W]: log Σ_k exp
    out,  # [B, G, C, H, W]
    target,  # [B, G, Kh, Kw, H, W], Kh under ``c``, Kw under ``k``, as those of logits
    sizes, row_tiles, ALIGNED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    batch, groups, channels, height, width = sizes
    grad, value, out = aligned(grad, ALIGNED), aligned(value, ALIGNED), aligned(out, ALIGNED)
    i_program = tl.program_id(0)
    i_column = i_program // row_tiles * COLUMNS
    rows = rows_of(i_program % row_tiles, height, ROWS, WINDOW, False)
    columns = columns_of(i_column + tl.arange(0, COLUMNS), batch, groups, width, WINDOW, False)
    targets = taps_of(target, rpb, statistics, rows, columns, 0, WINDOW, False, OFFSET, ROWS, STEPS)
    if SOFTMAX:
        taps = taps_of(logits, rpb, statistics, rows, columns, 0, WINDOW, False, OFFSET, ROWS, STEPS)
        b_statistics = tl.load(taps.p_statistics)
    o_channel = tl.arange(0, CHANNELS)
    m_channel = (o_channel < multiple(channels, ALIGNED))[None, :]
    o_first = (columns.first * WINDOW.dilation[1] + columns.residue).to(OFFSET)
    p_value = image_of(value, columns)[:, None] + (o_first[:, None] * value.w + o_channel.to(OFFSET)[None, :] * value.c)
    o_column = columns.column.to(OFFSET)[:, None]
    p_grad = image_of(grad, columns)[:, None] + (o_column * grad.w + o_channel.to(OFFSET)[None, :] * grad.c)
    p_out = image_of(out, columns)[:, None] + (o_column * out.w + o_channel.to(OFFSET)[None, :] * out.c)
    grads, deltas = (), ()
    for r in tl.static_range(ROWS):
        o_row = tl.minimum(rows.first + r, rows.members - 1) * WINDOW.dilation[0] + rows.residue
        b_grad = tl.load(p_grad + tl.cast(o_row, OFFSET) * grad.h, mask=m_channel, other=0).to(ACCUMULATOR)
        grads = grads + (b_grad,)
        b_delta = tl.zeros([COLUMNS], ACCUMULATOR)
        if SOFTMAX:  # δ = Σ_c grad · out, which equals Σ_k p · dp
            b_out = tl.load(p_out + tl.cast(o_row, OFFSET) * out.h, mask=m_channel, other=0).to(ACCUMULATOR)
            b_delta = tl.sum(b_grad * b_out, axis=1)
        deltas = deltas + (b_delta,)
    for i_source in range(rows.begin, rows.end):
        o_source = tl.cast(i_source * WINDOW.dilation[0] + rows.residue, OFFSET)
        seen = ()
        for i in tl.static_range(KERNEL_W):
            p_seen = p_value + (o_source * value.h + i * WINDOW.dilation[1] * value.w)
            seen = seen + (tl.load(p_seen, mask=m_channel, other=0),)
        if SOFTMAX:
            b_logits = load_taps(taps, logits, rpb, rows, i_source, WINDOW, False, True, HAS_RPB, ACCUMULATOR, OFFSET)
            b_weight = tl.exp2((b_logits - b_statistics) * LOG2_E)
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
        for r in tl.static_range(ROWS):
            slots = slots + products[r]
        b_target = tl.permute(tl.reshape(stack(slots), [COLUMNS, ROWS, STEPS]), [1, 0, 2])
        if SOFTMAX:
            b_target *= b_weight
        m_target = targets.own & targets.mask & (targets.row + i_source >= 0) & (targets.row + i_source < KERNEL_H)
        p_target = targets.p_weight + tl.cast(i_source, OFFSET) * target.c
        tl.store(p_target, b_target.to(target.ptr.dtype.element_ty), mask=m_target)
