# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""Rows that slide over registers: what the kernels for zero-padded windows share.

A program owns ROWS rows of COLUMNS columns of a few groups. The columns of all images lie on one axis, so that no width
wastes lanes. It walks the columns of the window; a step loads every source row once, [P, G·C] with 16 bytes per lane
where channels are adjacent, converts it once, and uses it in each of the up to Kh output rows whose windows hold it.

The window's rows of a step are one block "taps", [Q·P, G·S]: Q slots (ROWS, padded to a power of two) times columns by
groups times window rows S (Kh, padded). Taken apart it is one [P, G] per slot and window row. A slot is an output row;
*transposed*, where source row o weighs output row r with window row k = (r − o·stride) / dilation, it is
(r − k·dilation) mod Q, so that a slot's window rows belong to few source rows: to adjacent addresses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["Tile", "first_source", "last_source", "load_rows", "place", "pitch", "slide", "stack", "tap_of", "unstack"]


class Tile(NamedTuple):
    """What a program owns: its first row, columns [P], channels [G·C] (within a group where G is 1), first group."""

    row: Any
    batch: Any
    column: Any
    m_column: Any
    group: Any
    channel: Any
    m_channel: Any


@triton.constexpr_function
def pitch(number):
    """The power of two that holds ``number``."""
    return 1 << (number - 1).bit_length()


@triton.constexpr_function
def tap_of(source, row, window, slots, transposed):
    """Which of the blocks of ``unstack`` weighs source row ``source`` in row ``row``, both of the tile; −1: none."""
    stride, dilation = window.stride[0], window.dilation[0]
    step, rest = divmod(row - source * stride if transposed else source - row * stride, dilation)
    if rest or not 0 <= step < window.kernel_size[0]:
        return -1
    return step * slots + ((row - step * dilation) % slots if transposed else row)


@triton.constexpr_function
def first_source(window, transposed):
    """The first source row that a tile's windows hold, counted from the one where row 0 has window row 0."""
    return -((window.kernel_size[0] - 1) * window.dilation[0] // window.stride[0]) if transposed else 0


@triton.constexpr_function
def last_source(window, rows, transposed):
    if transposed:
        return (rows - 1) // window.stride[0]
    return (rows - 1) * window.stride[0] + (window.kernel_size[0] - 1) * window.dilation[0]


@triton.jit
def place(
    batch, groups, channels, width, row_tiles, channel_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The program's tile: channel and group blocks fastest, so that a pixel's are at work together; then rows."""
    i_program = tl.program_id(0)
    blocks = tl.cdiv(groups, GROUPS) * channel_blocks
    i_block, i_rest = i_program % blocks, i_program // blocks
    o_column = i_rest // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o_column < batch * width
    o_column = tl.minimum(o_column, batch * width - 1)
    i_group = i_block // channel_blocks * GROUPS
    o_channel = i_block % channel_blocks * CHANNELS + tl.arange(0, GROUPS * CHANNELS)
    return Tile(
        i_rest % row_tiles * ROWS,
        (o_column // width).to(tl.int64),
        o_column % width,
        m_column,
        i_group,
        o_channel,
        o_channel < (channels if GROUPS == 1 else (groups - i_group) * channels),
    )


@triton.jit
def load_rows(p_row, stride_h, first, height, m_row, FIRST: tl.constexpr, END: tl.constexpr):
    """Rows first + FIRST … first + END − 1 of a tensor, [P, G·C] each; 0 outside of it."""
    rows = ()
    for o in tl.static_range(FIRST, END):
        inside = (first + o >= 0) & (first + o < height)
        rows = rows + (tl.load(p_row + (first + o).to(tl.int64) * stride_h, mask=m_row & inside, other=0),)
    return rows


@triton.jit
def slide(
    sums, rows, taps, SOURCE: tl.constexpr, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add source rows SOURCE … to the sums [P, G, C] of the output rows whose windows hold them, weighed by taps."""
    SLOTS: tl.constexpr = pitch(len(sums))
    for i in tl.static_range(len(rows)):
        b_row = tl.reshape(rows[i], [rows[i].shape[0], GROUPS, CHANNELS]).to(sums[0].dtype)
        for r in tl.static_range(len(sums)):
            if tap_of(SOURCE + i, r, WINDOW, SLOTS, TRANSPOSED) >= 0:
                b_tap = taps[tap_of(SOURCE + i, r, WINDOW, SLOTS, TRANSPOSED)].to(sums[0].dtype)
                sums = sums[:r] + (sums[r] + b_tap[:, :, None] * b_row,) + sums[r + 1 :]
    return sums


@triton.constexpr_function
def _halves(shape):
    return [*shape[:-1], *[2] * (shape[-1].bit_length() - 1)]


@triton.jit
def unstack(b_taps, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr):
    """Taps [Q·P, G·S] as S·Q blocks [P, G], slots fastest."""
    SLOTS: tl.constexpr = b_taps.shape[0] // COLUMNS
    b_taps = tl.permute(tl.reshape(b_taps, [SLOTS, COLUMNS, GROUPS, STEPS]), [1, 2, 3, 0])
    parts = (tl.reshape(b_taps, _halves([COLUMNS, GROUPS, STEPS * SLOTS])),)
    for _ in tl.static_range(len(_halves([COLUMNS, GROUPS, STEPS * SLOTS])) - 2):
        evens = ()
        odds = ()
        for i in tl.static_range(len(parts)):
            b_even, b_odd = tl.split(parts[i])
            evens = evens + (b_even,)
            odds = odds + (b_odd,)
        parts = evens + odds
    return parts


@triton.jit
def stack(parts, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr):
    """The inverse of ``unstack``: S·Q blocks [P, G] as taps [Q·P, G·S]."""
    SLOTS: tl.constexpr = len(parts) // STEPS
    for _ in tl.static_range(len(_halves([COLUMNS, GROUPS, STEPS * SLOTS])) - 2):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    b_taps = tl.permute(tl.reshape(parts[0], [COLUMNS, GROUPS, STEPS, SLOTS]), [3, 0, 1, 2])
    return tl.reshape(b_taps, [SLOTS * COLUMNS, GROUPS * STEPS])
