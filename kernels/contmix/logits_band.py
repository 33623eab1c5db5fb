"""Logits of the outputs of a tile in the columns of its inputs, as both passes of ContMix's bands compute them.

An output whose window begins x columns right of the tile's first multiplies the keys moved by x: the keys stand COLUMNS
times side by side, moved by 0, 1, ..., and the query is zeros but where its x is. Bias takes part as keys of a query of
ones, and rpb is what the sum begins with.
"""

import triton
import triton.language as tl

from kernels.contmix.bands import unpacked
from kernels.contmix.tiles import cut_off, halves, key_scale
from kernels.products import dot


@triton.jit
def moved_keys(
    keys, bias, i_row, ROWS: tl.constexpr, SEEN: tl.constexpr, COLUMNS: tl.constexpr, KERNEL: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows of a window ``halves`` of the keys [ROWS · SEEN, COLUMNS · Dq], moved by 0, 1, ... columns, and bias
    moved by 0 to 3 columns, and zeros [ROWS · SEEN, 16], less than any bias where there is no window position."""
    LOWEST: tl.constexpr = tl.constexpr(-3e6 if dtype == tl.float16 else -1e30)
    o_step, o_flat = tl.arange(0, ROWS * SEEN), tl.arange(0, COLUMNS * BLOCK)
    o_row, o_seen = (i_row + o_step // SEEN)[:, None], (o_step % SEEN)[:, None]
    o_channel, o_column = (o_flat % BLOCK).to(OFFSET), o_seen - (o_flat // BLOCK)[None, :]
    m_key = (o_row < KERNEL) & (o_column >= 0) & (o_column < KERNEL) & (o_channel < CHANNELS)[None, :]
    p_key = keys.ptr + (o_row * KERNEL + o_column).to(OFFSET) * keys.k + (o_channel * keys.c)[None, :]
    b_keys = halves(tl.load(p_key, mask=m_key, other=0), dtype)
    o_flat = tl.arange(0, 16)[None, :]
    o_column = o_seen - o_flat
    m_bias = (o_row < KERNEL) & (o_column >= 0) & (o_column < KERNEL)
    p_bias = bias.ptr + (o_row * KERNEL + o_column) * bias.k
    b_bias = tl.load(p_bias, mask=m_bias & (o_flat < 4), other=0).to(ACCUMULATOR)
    # An infinite bias would not vanish where the query of ones is 0.
    b_bias = tl.where(m_bias, tl.maximum(b_bias, LOWEST, propagate_nan=tl.PropagateNan.ALL), 1.2 * LOWEST)
    return b_keys + (cut_off(tl.where(o_flat < 4, b_bias, 0.0) * (1 / key_scale(dtype)), dtype),)


@triton.jit
def position_entries(rpb, i_group, o_entry, KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, dtype: tl.constexpr):
    """The bits of ``dtype`` of some entries of rpb in one row; of those that are not there 0."""
    SIDE: tl.constexpr = 2 * KERNEL - 1
    p_entry = rpb.ptr + i_group * rpb.g + o_entry // SIDE * rpb.h + o_entry % SIDE * rpb.w
    b_entry = tl.load(p_entry, mask=(o_entry >= 0) & (o_entry < SIDE * SIDE), other=0).to(ACCUMULATOR)
    return cut_off(b_entry * (1 / key_scale(dtype)), dtype).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def position_table(
    rpb, i_group, KERNEL: tl.constexpr, COLUMNS: tl.constexpr, TABLE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """rpb in one row [TABLE], which begins so early that it holds entries for inputs left of the first window, too;
    each of ``packed`` with the next."""
    b_even = position_entries(rpb, i_group, tl.arange(0, TABLE) - COLUMNS, KERNEL, ACCUMULATOR, dtype)
    b_odd = position_entries(rpb, i_group, tl.arange(0, TABLE) - COLUMNS + 1, KERNEL, ACCUMULATOR, dtype)
    return b_even | (b_odd << 16)


@triton.jit
def first_entry(outputs, right, KERNEL: tl.constexpr, COLUMNS: tl.constexpr):
    """[M]: where in the row of rpb the tile's first input is for an output."""
    o_row = (outputs.start_h - outputs.row + KERNEL - 1) * (2 * KERNEL - 1)
    o_first = o_row + (outputs.start_w - right - outputs.column + KERNEL - 1) + COLUMNS
    return tl.maximum(o_first, 0)  # it never is below; known to the compiler, no part of an address is


@triton.jit
def query_of_ones(right, dtype: tl.constexpr):
    """[M, 16], which bias is multiplied with."""
    return cut_off(tl.where(right[:, None] == tl.arange(0, 16)[None, :], 1.0, 0.0), dtype)


@triton.jit
def logits_of_rows(
    b_query, b_one, keys, b_table, o_base, ROW: tl.constexpr, ROWS: tl.constexpr, SEEN: tl.constexpr,
    KERNEL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits of ROWS rows of a window from ROW on, in units of ``key_scale``: [M, ROWS · SEEN]."""
    PAIRS: tl.constexpr = ROWS * SEEN // 2
    o_pair = tl.arange(0, PAIRS)
    o_entry = (ROW + o_pair // (SEEN // 2)) * (2 * KERNEL - 1) + o_pair % (SEEN // 2) * 2
    # A gather along the only axis goes by shared memory.
    o_entry = tl.reshape(o_base[:, None] + o_entry[None, :], [b_query.shape[0] * PAIRS])
    b_pairs = tl.reshape(tl.gather(b_table, o_entry, 0), [b_query.shape[0], PAIRS])
    b_logits = unpacked(b_pairs, b_query.dtype).to(tl.float32)
    b_logits = dot(b_one, tl.trans(keys[2]), b_logits, UPCAST)
    b_logits = dot(b_query, tl.trans(keys[0]), b_logits, UPCAST)
    return dot(b_query, tl.trans(keys[1]), b_logits, UPCAST)
