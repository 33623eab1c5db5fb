# pyright: reportGeneralTypeIssues=false
"""Rows that slide over registers: what the kernels for zero-padded windows share.

A program owns R rows of P columns, all channels of G groups. The columns of all images lie on one axis, so that no
width wastes lanes. It walks the columns of the window. A step loads every source row once, [P, G·C], 16 bytes per lane
where channels are adjacent, converts it once, and uses it for each of the up to Kh output rows whose windows hold it.

What weighs them in a step is one block of *taps* [Q·P, G·S]: slots (R, padded to a power of two) times columns, by
groups times window rows (Kh, padded). Taken apart it is Q·S blocks [P, G, 1]. Slot q holds the taps of output row q.
*Transposed*, where source row o weighs row r by window row k = (r − o) / dilation, it holds those of row
(q + k·dilation) mod Q: then its window rows come from two or three source rows only, and so from adjacent addresses.
A strided window is transposed phase by phase (``configs.phases``), each without a stride.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.configs import Config
from kernels.dtypes import accumulator
from kernels.launch import ceil_divide
from kernels.layout import channels_fastest
from kernels.windows import Window


class Tile(NamedTuple):
    """What a program owns."""

    row: Any  # its first row
    batch: Any  # [P], as the next two
    column: Any
    m_column: Any
    group: Any  # its first group
    first_channel: Any  # counted from that group's first; pairs of channels, where they come in pairs
    channels: Any  # that there are from there on
    channel: Any  # [G·C]
    m_channel: Any
    tap_batch: Any  # [Q·P], as the next two: batch entry, column and slot of each row of the taps
    tap_column: Any
    slot: Any
    tap_group: Any  # [G·S], as the next: group, counted from the first, and window row of each column of the taps
    step: Any


@triton.constexpr_function
def pitch(number):
    """The power of two that holds ``number``."""
    return 1 << (number - 1).bit_length()


@triton.constexpr_function
def sources(window, rows, transposed):
    """(first, end) of the source rows of a tile, counted from the one that window row 0 of row 0 holds."""
    kernel_size, stride, _, dilation, _ = window  # by place: Triton 3.6's interpreter hands over a plain tuple
    span = (kernel_size[0] - 1) * dilation[0]
    if transposed:
        return -span, rows
    return 0, (rows - 1) * stride[0] + span + 1


@triton.constexpr_function
def tap_of(source, row, window, slots, transposed):
    """Which of the blocks of ``unstack`` weighs source row ``source`` in row ``row``, both of the tile; −1: none."""
    kernel_size, stride, _, dilation, _ = window
    step, rest = divmod(row - source if transposed else source - row * stride[0], dilation[0])
    if rest or not 0 <= step < kernel_size[0]:
        return -1
    return ((row - step * dilation[0]) % slots if transposed else row) * pitch(kernel_size[0]) + step


@triton.jit
def wide(number):
    """A number, or a constant, in 64 bits: what a stride is multiplied with."""
    return tl.full([], number, tl.int64)


@triton.jit
def place(
    batch, groups, channels, width, row_tiles, channel_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The program's tile. Channels and groups are fastest, so that a pixel's are at work together; then rows."""
    i_program = tl.program_id(0)
    blocks = tl.cdiv(groups, GROUPS) * channel_blocks
    i_block, i_rest = i_program % blocks, i_program // blocks
    i_column = i_rest // row_tiles * COLUMNS
    i_group = i_block // channel_blocks * GROUPS
    o_column = i_column + tl.arange(0, COLUMNS)
    o_inside = tl.minimum(o_column, batch * width - 1)
    i_channel = i_block % channel_blocks * CHANNELS
    channels = channels if GROUPS == 1 else (groups - i_group) * channels
    o_channel = i_channel + tl.arange(0, GROUPS * CHANNELS)
    o_tap = tl.arange(0, pitch(ROWS) * COLUMNS)
    o_tap_column = tl.minimum(i_column + o_tap % COLUMNS, batch * width - 1)
    o_entry = tl.arange(0, GROUPS * STEPS)
    return Tile(
        i_rest % row_tiles * ROWS,
        (o_inside // width).to(tl.int64),
        o_inside % width,
        o_column < batch * width,
        i_group.to(tl.int64),
        i_channel,
        channels - i_channel,
        o_channel,
        o_channel < channels,
        (o_tap_column // width).to(tl.int64),
        o_tap_column % width,
        o_tap // COLUMNS,
        o_entry // STEPS,
        o_entry % STEPS,
    )


@triton.jit
def across(o_batch, o_column, tensor, LANES: tl.constexpr):
    """Offsets of columns. ``LANES``: neighbours lie across lanes, whatever Triton's version makes of a tie."""
    o_pixel = o_batch * tensor.b + o_column.to(tl.int64) * tensor.w
    if LANES:
        # Adjacent, it says, but never aligned: that decides the order of lanes and rules out vectors.
        o_pixel = tl.max_contiguous(tl.multiple_of(o_pixel, 1), 8)
    return o_pixel


@triton.jit
def load_rows(
    p_column, o_channel, stride_h, first, height, m_row, FIRST: tl.constexpr, END: tl.constexpr, PAIRS: tl.constexpr
):
    """Rows first + FIRST … first + END − 1 of a tensor's columns, [P, G·C] each; 0 outside of it."""
    rows = ()
    for o in tl.static_range(FIRST, END):
        m_inside = m_row & (first + o >= 0) & (first + o < height)
        p_row = pairs((p_column + (first + o).to(tl.int64) * stride_h)[:, None], PAIRS)
        rows = rows + (tl.load(p_row + o_channel, mask=m_inside, other=0),)
    return rows


@triton.jit
def pairs(pointer, PAIRS: tl.constexpr):
    """Pointers to channels; PAIRS: to two adjacent ones as one integer."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True) if PAIRS else pointer


@triton.jit
def apart(b_block, ACCUMULATOR: tl.constexpr):
    """A block in the type of the sums; of pairs in one integer two, of what comes first and of what comes second.

    A bfloat16 is a float32's upper half, so that each of a pair takes one instruction; to take it out first is another.
    """
    if b_block.dtype == tl.int32:
        parts = ((b_block << 16).to(ACCUMULATOR, bitcast=True), (b_block & -65536).to(ACCUMULATOR, bitcast=True))
    else:
        parts = (b_block.to(ACCUMULATOR),)
    return parts


@triton.jit
def all_apart(blocks, ACCUMULATOR: tl.constexpr):
    """The first parts of all blocks, then their second ones."""
    firsts = ()
    seconds = ()
    for i in tl.static_range(len(blocks)):
        parts = apart(blocks[i], ACCUMULATOR)
        firsts = firsts + (parts[0],)
        seconds = seconds + parts[1:]
    return firsts + seconds


@triton.jit
def widened(b_row, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """A row [P, G·C] as blocks [P, G, C] in the type of the sums: one, or of pairs the even channels, then the odd."""
    return apart(tl.reshape(b_row, [b_row.shape[0], GROUPS, CHANNELS]), ACCUMULATOR)


@triton.jit
def narrowed(parts, dtype: tl.constexpr):
    """The inverse of ``widened``, for a store: blocks [P, G, C] as one [P, G·C], or [P, G·2C]."""
    b_row = parts[0]
    if len(parts) == 2:
        b_row = tl.join(b_row, parts[1])
    return tl.reshape(b_row.to(dtype), [parts[0].shape[0], parts[0].shape[1] * parts[0].shape[2] * len(parts)])


@triton.jit
def slide(
    sums, rows, taps, SOURCE: tl.constexpr, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add source rows SOURCE … to the sums [P, G, C] of the rows whose windows hold them, weighed by the taps; where
    channels come in pairs, ROWS sums of even ones and as many of odd ones."""
    for i in tl.static_range(len(rows)):
        b_rows = widened(rows[i], GROUPS, CHANNELS, sums[0].dtype)
        for r in tl.static_range(ROWS):
            if tap_of(SOURCE + i, r, WINDOW, pitch(ROWS), TRANSPOSED) >= 0:
                b_tap = taps[tap_of(SOURCE + i, r, WINDOW, pitch(ROWS), TRANSPOSED)]
                for s in tl.static_range(r, len(sums), ROWS):
                    sums = sums[:s] + (sums[s] + b_tap * b_rows[s // ROWS],) + sums[s + 1 :]
    return sums


@triton.constexpr_function
def halvings(*shape):
    """A shape with 2, 2, … for its last axis, a power of two."""
    return [*shape[:-1], *[2] * (shape[-1].bit_length() - 1)]


@triton.jit
def halved(parts):
    """Blocks [..., 2] as blocks [...]: all their firsts, then all their seconds."""
    firsts = ()
    seconds = ()
    for i in tl.static_range(len(parts)):
        b_first, b_second = tl.split(parts[i])
        firsts = firsts + (b_first,)
        seconds = seconds + (b_second,)
    return firsts + seconds


@triton.jit
def unstack(b_taps, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Taps [Q·P, G·S] as Q·S blocks [P, G, 1] in the type of the sums, window rows fastest.

    bfloat16 moves between lanes in pairs, of the first half of the slots and the second.
    """
    if b_taps.dtype == tl.bfloat16 and b_taps.shape[0] > COLUMNS:
        b_taps = tl.reshape(b_taps.to(tl.uint16, bitcast=True), [2, b_taps.shape[0] // 2, GROUPS * STEPS])
        b_first, b_second = tl.split(tl.permute(b_taps, [1, 2, 0]))
        b_taps = (b_first.to(tl.uint32) | (b_second.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
    SLOTS: tl.constexpr = b_taps.shape[0] // COLUMNS  # or pairs of them
    b_taps = tl.permute(tl.reshape(b_taps, [SLOTS, COLUMNS, GROUPS, STEPS]), [1, 2, 0, 3])
    parts = (tl.reshape(b_taps, halvings(COLUMNS, GROUPS, 1, SLOTS * STEPS)),)
    for _ in tl.static_range(len(halvings(SLOTS * STEPS))):
        parts = halved(parts)
    return all_apart(parts, ACCUMULATOR)


@triton.jit
def stack(parts, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr):
    """The inverse of ``unstack``, from blocks [P, G]."""
    SLOTS: tl.constexpr = len(parts) // STEPS
    for _ in tl.static_range(len(halvings(STEPS * SLOTS))):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    b_taps = tl.permute(tl.reshape(parts[0], [COLUMNS, GROUPS, SLOTS, STEPS]), [2, 0, 1, 3])
    return tl.reshape(b_taps, [SLOTS * COLUMNS, GROUPS * STEPS])


def in_pairs(*maps: Tensor) -> bool:
    """Whether kernels take the channels of maps [B, G, C, H, W] two by two, of 16-bit numbers that a float32 begins
    with and that lie side by side at multiples of 4 bytes."""
    return all(
        m.dtype == torch.bfloat16
        and m.stride(2) == 1
        and not any(number % 2 for number in (m.shape[2], *m.stride()[:2], *m.stride()[3:], m.data_ptr() // 2))
        for m in maps
    )


def turned(window: Window, *tensors: Tensor) -> tuple[Window, tuple[Tensor, ...]]:
    """Rows and columns exchanged: of a window, of maps and of dynamic kernels."""
    size, stride, padding, dilation = ((columns, rows) for rows, columns in window[:4])
    maps = (tensor.transpose(-2, -1) for tensor in tensors)
    return Window(size, stride, padding, dilation), tuple(m if m.dim() == 5 else m.transpose(2, 3) for m in maps)


def common_arguments(x: Tensor, outputs: Tensor, window: Window, config: Config) -> tuple[dict[str, Any], int]:
    """What a kernel takes of maps x and ``outputs`` [B, G, C, H, W]; and how many programs share a block of channels.

    A program has several groups only where a group's channels follow the last one's.
    """
    batch, groups, channels, height, width = outputs.shape
    joined = all(tensor.stride(1) == channels * tensor.stride(2) for tensor in (x, outputs))
    block_groups, block_channels = config.block(groups if joined else 1, channels)
    row_tiles = ceil_divide(height, config.rows)
    arguments = {
        "sizes": (batch, groups, channels, *x.shape[3:], height, width), "row_tiles": row_tiles,
        "channel_blocks": ceil_divide(channels, block_channels) if block_groups == 1 else 1,
        "WINDOW": window, "X_LANES": not channels_fastest(x), "PAIRS": block_channels > 1 and in_pairs(x, outputs),
        "ACCUMULATOR": accumulator(x.dtype), "ROWS": config.rows, "COLUMNS": config.columns, "GROUPS": block_groups,
        "CHANNELS": block_channels, "LOADS": config.loads,
    }  # fmt: skip
    return arguments, ceil_divide(groups, block_groups) * row_tiles * ceil_divide(batch * width, config.columns)
