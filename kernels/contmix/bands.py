"""Softmax weights of 16 bits as a banded matrix: rows of windows as blocks [M, S / 2], moved to where windows begin.

Two adjacent weights are one number of 32 bits. Nothing here leaves a thread's registers.
"""

import triton
import triton.language as tl

from kernels.registers import shifted, together
from kernels.windows_triton import Pixels, first_seen, window_start


@triton.jit
def packed(b, dtype: tl.constexpr):
    """float32 [M, S], from 0 to ``largest(dtype)``, as pairs of ``dtype`` [M, S / 2], whose first is the lower half;
    cut off where that ends."""
    even, odd = tl.split(tl.reshape(b, [b.shape[0], b.shape[1] // 2, 2]))
    even, odd = even.to(tl.int32, bitcast=True), odd.to(tl.int32, bitcast=True)
    # By hand: a GPU has few units for the instruction that converts a single number.
    if dtype == tl.bfloat16:
        return ((even >> 16) & 0xFFFF) | (odd & -0x10000)
    else:
        # An exponent of 8 bits becomes one of 5, which begins 112 powers of two higher; less than that is 0.
        even, odd = (even >> 13) - (112 << 10), (odd >> 13) - (112 << 10)
        return tl.maximum(even, 0) | (tl.maximum(odd, 0) << 16)


@triton.jit
def lost(dtype: tl.constexpr):
    """log2 of how many times smaller a number is on average when it is cut off: a half of its last digit."""
    return 0.00048 if dtype == tl.float16 else 0.0039


@triton.jit
def largest(dtype: tl.constexpr):
    """log2 of the largest weight: what is more than 2^29 times smaller is 0 in float16."""
    return (15 if dtype == tl.float16 else 0) + lost(dtype)


@triton.jit
def unpacked(b, dtype: tl.constexpr):
    """The inverse of ``packed``."""
    even, odd = b.to(tl.uint16).to(dtype, bitcast=True), (b >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(even, odd), [b.shape[0], b.shape[1] * 2])


@triton.jit
def moved(rows, o_moved, MOST: tl.constexpr):
    """A tuple of rows [M, S], MOST - 1 longer: entry m of row r becomes that of row r + o_moved[m], 0 to MOST - 1.

    MOST is 1, 2, 4, 8 or 16. What no entry comes to is 0.
    """
    nothing = ()
    for _ in tl.static_range(MOST - 1):
        nothing = nothing + (tl.zeros_like(rows[0]),)
    return shifted(nothing + rows + nothing, o_moved, MOST, False)


@triton.constexpr_function
def rows_of_block(kernel_size, rows, seen, i_block):
    """How many rows a block of a window has: ``rows``, or the power of two that holds what is left for the last, and
    at least the 16 numbers of ``seen`` in a row that a product takes."""
    return min(rows, max(16 // seen, 1 << (kernel_size - i_block * rows - 1).bit_length()))


@triton.jit
def seen_by_tile(i_tile, row, column, height, width, KERNEL: tl.constexpr, ACROSS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of the first input that a tile of a block sees; the column may be less than 0."""
    ROWS: tl.constexpr = 16 // COLUMNS
    o_row, o_column = row + i_tile // ACROSS * ROWS, column + i_tile % ACROSS * COLUMNS
    return window_start(o_row, height, KERNEL, 1), first_seen(o_column, width, KERNEL, COLUMNS)


@triton.jit
def outputs_of_block(
    i_block, height, width, KERNEL: tl.constexpr, TILES: tl.constexpr, ACROSS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The outputs of a block of TILES tiles, ACROSS of them side by side, COLUMNS outputs each; behind the block's own
    first row and column. Of a block that is not there none are."""
    ROWS: tl.constexpr = 16 // COLUMNS
    blocks_w = tl.cdiv(width, ACROSS * COLUMNS)
    blocks = blocks_w * tl.cdiv(height, TILES // ACROSS * ROWS)
    i_inside = tl.minimum(i_block, blocks - 1)
    row = i_inside // blocks_w * (TILES // ACROSS * ROWS)
    column = i_inside % blocks_w * (ACROSS * COLUMNS)
    o_output = tl.arange(0, 16 * TILES)
    o_row = row + o_output // 16 // ACROSS * ROWS + o_output % 16 // COLUMNS
    o_column = column + o_output // 16 % ACROSS * COLUMNS + o_output % COLUMNS
    mask = (i_block < blocks) & (o_row < height) & (o_column < width)
    o_row, o_column = tl.minimum(o_row, height - 1), tl.minimum(o_column, width - 1)
    start_h, start_w = window_start(o_row, height, KERNEL, 1), window_start(o_column, width, KERNEL, 1)
    return row, column, Pixels(o_row, o_column, mask, start_h, start_w)


@triton.jit
def load_moved(view, o_pixel, m_pixel, right, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """[M, COLUMNS · C] of a map [C, ...]: each pixel's channels in the place of column ``right``, zeros elsewhere."""
    o_flat = tl.arange(0, COLUMNS * BLOCK)
    o_channel = (o_flat % BLOCK).to(o_pixel.dtype)
    m_flat = m_pixel[:, None] & (right[:, None] == (o_flat // BLOCK)[None, :]) & (o_channel < CHANNELS)[None, :]
    return tl.load(view.ptr + o_pixel[:, None] + (o_channel * view.c)[None, :], mask=m_flat, other=0)


@triton.jit
def as_left_side(blocks, dtype: tl.constexpr):
    """Blocks of pairs as the left side of a matrix product, of every 16 terms the pairs 0, 4, 1, 5, 2, 6, 3, 7.

    Where Triton sees the joining of pairs behind a product, it asks for operands of which a thread has four terms side
    by side; of another product's result it has two, and the two that are eight on.
    """
    b = unpacked(together(blocks), dtype)
    b = tl.permute(tl.reshape(b, [b.shape[0], b.shape[1] // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(b, [b.shape[0], b.shape[1] * 16])


@triton.jit
def as_right_side(b_pairs, dtype: tl.constexpr):
    """Pairs of terms [..., S / 2, C] as the right side [..., S, C]."""
    even, odd = b_pairs.to(tl.uint16).to(dtype, bitcast=True), (b_pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    b = tl.permute(tl.join(even, odd), [0, 1, 3, 2])
    return tl.reshape(b, [b.shape[0], b.shape[1] * 2, b.shape[3]])
