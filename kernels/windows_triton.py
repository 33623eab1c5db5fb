"""The clamped rule of ``windows`` as Triton helpers.

Vocabulary of every kernel in this repository:

======  =====================================================================================
``i_``  a program's own index (batch entry, group, tile)
``o_``  offsets: positions, channels or window steps that a program covers
``m_``  masks
``p_``  pointers
``b_``  blocks of values, their shape in a comment above
======  =====================================================================================
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def split_program(pixel_blocks, channel_blocks, groups):
    """The one grid axis taken apart: (pixel block, channel block, group, batch entry), pixel blocks fastest.

    One axis, because the second and third of a grid end at 65,535; group and batch entry come as 64-bit numbers.
    """
    i_program = tl.program_id(0)
    i_rest = i_program // pixel_blocks
    i_image = i_rest // channel_blocks
    return (
        i_program % pixel_blocks,
        i_rest % channel_blocks,
        (i_image % groups).to(tl.int64),
        (i_image // groups).to(tl.int64),
    )


@triton.jit
def _clamped_start(o_member, members, KERNEL: tl.constexpr):
    """First window member of a member of a residue class with ``members`` members."""
    return tl.minimum(tl.maximum(o_member - KERNEL // 2, 0), members - KERNEL)


@triton.jit
def window_start(o_output, length, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """First input of the clamped window of output ``o_output``."""
    if DILATION == 1:
        o_start = _clamped_start(o_output, length, KERNEL)
    else:
        residue = o_output % DILATION
        members = (length - residue + DILATION - 1) // DILATION
        o_start = _clamped_start(o_output // DILATION, members, KERNEL) * DILATION + residue
    return o_start


@triton.jit
def first_block(i_tile, length, KERNEL: tl.constexpr, TILE: tl.constexpr):
    """Of blocks of TILE inputs along an axis, which begin KERNEL // 2 before the map, the first that outputs of a tile
    of as many may see. Their windows begin 0 to TILE - 1 after it does."""
    return tl.minimum(tl.maximum(i_tile, KERNEL // 2 // TILE), (length - KERNEL + KERNEL // 2) // TILE)


@triton.jit
def first_seen(o_output, length, KERNEL: tl.constexpr, TILE: tl.constexpr):
    """The first input of that block, which may be less than 0; the window's first where TILE is 1."""
    return first_block(o_output // TILE, length, KERNEL, TILE) * TILE - KERNEL // 2


class Pixels(NamedTuple):
    """Outputs of a tile: row, column, which there are (the others repeat one that is), where their windows begin."""

    row: Any
    column: Any
    mask: Any
    start_h: Any
    start_w: Any


@triton.jit
def _outputs_of_start(o_start, length, KERNEL: tl.constexpr):
    """(first, number) of the outputs along an axis whose clamped window begins at ``o_start``."""
    first = tl.where(o_start == 0, 0, o_start + KERNEL // 2)
    last = tl.where(o_start == length - KERNEL, length - 1, o_start + KERNEL // 2)
    return first, last - first + 1


@triton.jit
def pixels_of_window(
    i_tile, i_window, height, width, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of the outputs that share a window; the window's start is two numbers."""
    windows_w = width - KERNEL_W + 1
    start_h, start_w = i_window // windows_w, i_window % windows_w
    first_h, outputs_h = _outputs_of_start(start_h, height, KERNEL_H)
    first_w, outputs_w = _outputs_of_start(start_w, width, KERNEL_W)
    o_output = i_tile * BLOCK + tl.arange(0, BLOCK)
    o_inside = tl.minimum(o_output, outputs_h * outputs_w - 1)
    # One division per tile, and for each output a product with the reciprocal in units of 2^-32, which is exact here.
    reciprocal = tl.full([], 0xFFFFFFFF, tl.uint32) // outputs_w.to(tl.uint32) + 1
    o_row = tl.umulhi(o_inside.to(tl.uint32), reciprocal.to(tl.uint32)).to(tl.int32)
    o_row = tl.where(outputs_w == 1, o_inside, o_row)
    row, column = first_h + o_row, first_w + o_inside - o_row * outputs_w
    return Pixels(row, column, o_output < outputs_h * outputs_w, start_h, start_w)


@triton.jit
def offsets(view, pixels, OFFSET: tl.constexpr):
    """Where a tile's pixels are, from a view's pointer."""
    return pixels.row.to(OFFSET) * view.h + pixels.column.to(OFFSET) * view.w


@triton.jit
def load_pixels(view, o_pixel, m_pixel, channels, BLOCK: tl.constexpr):
    """[P, C] of a map [C, ...]: the pixels at these offsets, zeros where there are none."""
    o_channel = tl.arange(0, BLOCK)
    p_pixel = view.ptr + o_pixel[:, None] + (o_channel.to(o_pixel.dtype) * view.c)[None, :]
    return tl.load(p_pixel, mask=m_pixel[:, None] & (o_channel < channels)[None, :], other=0)


@triton.jit
def store_pixels(view, o_pixel, m_pixel, b_pixels, channels):
    """The inverse of ``load_pixels``."""
    o_channel = tl.arange(0, b_pixels.shape[1])
    p_pixel = view.ptr + o_pixel[:, None] + (o_channel.to(o_pixel.dtype) * view.c)[None, :]
    mask = m_pixel[:, None] & (o_channel < channels)[None, :]
    tl.store(p_pixel, b_pixels.to(view.ptr.dtype.element_ty), mask=mask)


@triton.jit
def rpb_base(rpb, pixels, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    """Where in relative biases [2Kh-1, 2Kw-1] the windows of a tile's outputs begin."""
    o_row = pixels.start_h - pixels.row + KERNEL_H - 1
    return o_row * rpb.h + (pixels.start_w - pixels.column + KERNEL_W - 1) * rpb.w
