"""Where outputs have windows of their own: what a program owns, and the taps that it meets on one row of the map.

A program owns R rows of P columns. The columns of all images and heads lie on one axis, so that no width wastes lanes.
Its rows belong to one residue class of the dilation; rows and columns are counted as *members* of their classes, in
which windows are dense. The program walks over the *source* rows that its own rows meet, loads each once, and uses it
for all of its rows that see it.

What weighs a source row is one block of *taps* [R, P, S]: own rows, columns, and window columns, padded to a power of
two. Own rows of a tile are few and the same for all lanes; so whether a row sees a source row is a branch.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.windows_triton import window_start


class Rows(NamedTuple):
    """The rows that a program owns."""

    first: Any  # member that the tile begins with
    members: Any  # of the residue class, of which there may be fewer than the tile's end
    residue: Any
    begin: Any  # source members from here
    end: Any  # to here, exclusively


class Columns(NamedTuple):
    """Columns that a program owns, [P] each."""

    column: Any
    group: Any
    batch: Any
    mask: Any  # which there are; the others repeat one that is
    residue: Any
    member: Any
    members: Any
    first: Any  # source members from here
    last: Any  # to here


class Taps(NamedTuple):
    """Where the weights of a source row are, but for what depends on that row."""

    p_weight: Any  # [R, P, S]
    o_rpb: Any  # [R, P, S]
    p_statistics: Any  # [R, P, 1]; [1, P, S] if TRANSPOSED
    mask: Any  # [1, 1, S]; [1, P, S] if TRANSPOSED
    own: Any  # [R, P, 1]: which own rows and columns there are; the others repeat one that is
    row: Any  # [R, 1, 1]: what ``window_row`` adds to, to find an own row's window row


@triton.jit
def _sources(top, bottom, members, KERNEL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(first, last) of the inputs in the windows of members ``top`` to ``bottom``; if TRANSPOSED of the outputs whose
    windows hold one of them."""
    if TRANSPOSED:
        first = tl.where(top < KERNEL, 0, top - KERNEL // 2)
        last = tl.where(bottom >= members - KERNEL, members - 1, bottom + KERNEL // 2)
    else:
        first = window_start(top, members, KERNEL, 1)
        last = window_start(bottom, members, KERNEL, 1) + KERNEL - 1
    return first, last


@triton.jit
def rows_of(i_tile, height, ROWS: tl.constexpr, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Tile ``i_tile`` of the rows. Sources are inputs; outputs if TRANSPOSED."""
    DILATION: tl.constexpr = WINDOW.dilation[0]
    residue, first = i_tile % DILATION, i_tile // DILATION * ROWS
    members = (height - residue + DILATION - 1) // DILATION
    top, bottom = tl.minimum(first, members - 1), tl.minimum(first + ROWS, members) - 1
    begin, last = _sources(top, bottom, members, WINDOW.kernel_size[0], TRANSPOSED)
    return Rows(first, members, residue, begin, last + 1)


@triton.jit
def columns_of(o_column, batch, groups, width, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Positions on the axis of all images' columns."""
    DILATION: tl.constexpr = WINDOW.dilation[1]
    o_inside = tl.minimum(o_column, batch * groups * width - 1)
    column, i_image = o_inside % width, o_inside // width
    residue, member = column % DILATION, column // DILATION
    members = (width - residue + DILATION - 1) // DILATION
    first, last = _sources(member, member, members, WINDOW.kernel_size[1], TRANSPOSED)
    group, batch = (i_image % groups).to(tl.int64), (i_image // groups).to(tl.int64)
    return Columns(column, group, batch, o_column == o_inside, residue, member, members, first, last)


@triton.jit
def image_of(tensor, columns):
    """Pointers to the images that columns belong to, [P]."""
    return tensor.ptr + columns.batch * tensor.b + columns.group * tensor.g


@triton.jit
def window_row(rows, source, KERNEL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What is added to an own row's ``Taps.row``: the window row in which it meets a source row."""
    if TRANSPOSED:
        return -window_start(source, rows.members, KERNEL, 1)
    return source


@triton.jit
def taps_of(
    weight, rpb, statistics, rows, columns, first_step, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The taps of a tile: outputs' weights, at own rows or, if TRANSPOSED, at source rows."""
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    o_slot = tl.arange(0, ROWS)[:, None, None]
    o_row = tl.minimum(rows.first + o_slot, rows.members - 1)
    o_member, last = columns.member[None, :, None], columns.last[None, :, None]
    o_source = columns.first[None, :, None] + first_step + tl.arange(0, STEPS)[None, None, :]
    if TRANSPOSED:
        mask = o_source <= last
        o_output = tl.minimum(o_source, last)
        o_kernel = o_member - window_start(o_output, columns.members[None, :, None], KERNEL_W, 1)
        o_start, o_relative_h, o_relative_w = o_row, o_row, o_member - o_output
    else:
        o_kernel = tl.arange(0, STEPS)[None, None, :]
        mask = o_kernel < KERNEL_W
        o_output = o_member
        o_start = -window_start(o_row, rows.members, KERNEL_H, 1)
        o_relative_h, o_relative_w = -o_row, o_source - o_member
    o_output = (o_output * WINDOW.dilation[1] + columns.residue[None, :, None]).to(OFFSET)
    o_weight = o_output * weight.w + o_kernel.to(OFFSET) * weight.k + o_start.to(OFFSET) * weight.c
    o_statistics = o_output * statistics.w
    if not TRANSPOSED:
        o_output_row = (o_row * WINDOW.dilation[0] + rows.residue).to(OFFSET)
        o_weight += o_output_row * weight.h
        o_statistics += o_output_row * statistics.h
    o_rpb = (o_relative_h + KERNEL_H - 1) * rpb.h + (o_relative_w + KERNEL_W - 1) * rpb.w
    return Taps(
        image_of(weight, columns)[None, :, None] + o_weight,
        columns.group.to(tl.int32)[None, :, None] * rpb.g + o_rpb,
        image_of(statistics, columns)[None, :, None] + o_statistics,
        mask,
        columns.mask[None, :, None] & (rows.first + o_slot < rows.members),
        o_start,
    )


@triton.jit
def load_taps(
    taps, weight, rpb, rows, source, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """[R, P, S] of a source row: weights, or logits + rpb with SOFTMAX; 0, or −inf, where none."""
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    shift = window_row(rows, source, KERNEL_H, TRANSPOSED)
    m_tap = taps.mask & (taps.row + shift >= 0) & (taps.row + shift < KERNEL_H)
    o_source = tl.cast(shift, OFFSET) * weight.c
    if TRANSPOSED:
        o_source += tl.cast(source * WINDOW.dilation[0] + rows.residue, OFFSET) * weight.h
    b_taps = tl.load(taps.p_weight + o_source, mask=m_tap, other=float("-inf") if SOFTMAX else 0)
    if SOFTMAX:
        b_taps = b_taps.to(ACCUMULATOR)
        if HAS_RPB:
            o_relative = (-source if TRANSPOSED else source) * rpb.h
            b_taps += tl.load(rpb.ptr + taps.o_rpb + o_relative, mask=m_tap, other=0).to(ACCUMULATOR)
    return b_taps
