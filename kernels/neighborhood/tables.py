"""Gradients of rpb, and of what is added to all logits at a position of their windows: the logits' gradients, summed
over images in parts, folded onto relative positions, and onto positions in a window."""

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.dtypes import accumulator
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.views import View, view
from kernels.windows import Pair
from kernels.windows_triton import first_seen


@triton.jit
def _before(o_output, length, KERNEL: tl.constexpr, DILATION: tl.constexpr, TILE: tl.constexpr):
    """How many positions before an output what it sees begins: its window, or where TILE > 1 what a tile of as many
    outputs sees."""
    members = (length - o_output % DILATION + DILATION - 1) // DILATION
    return o_output // DILATION - first_seen(o_output // DILATION, members, KERNEL, TILE)


@triton.jit
def _fold_kernel(
    sums,  # [N, G, H, W, S]: Σ of ds over the images of a part
    totals,  # [M, S]: Σ of ds over several outputs
    bias,  # [Kh·Kw]: written
    rpb,  # [G, 2Kh-1, 2Kw-1]: written
    pieces,  # [I, E]: parts of one more gradient
    total,  # [E]: written, their sum
    parts, groups, height, width, places, count, elements,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SEEN: tl.constexpr, TILE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ITEMS: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr, RELATIVE: tl.constexpr, PLACES: tl.constexpr,
    POSITIONS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """A program takes a row of a head's table, or of a window, and adds rows of the map, several at a time; or a block
    of the other gradient."""
    TABLES: tl.constexpr = 2 * KERNEL_H - 1
    i_program = tl.program_id(0)
    if i_program < TABLES * groups:
        i_relative, i_group = i_program % TABLES, (i_program // TABLES).to(tl.int64)
        # Several parts at a time, with some columns each; rows, too, where all parts are.
        o_flat, o_relative = tl.arange(0, ITEMS * COLUMNS), tl.arange(0, RELATIVE)
        o_item = (o_flat // COLUMNS)[:, None]
        b_sum = tl.zeros([ITEMS * COLUMNS, RELATIVE], ACCUMULATOR)
        for i_column in range(0, width, COLUMNS):
            o_column = (i_column + o_flat % COLUMNS)[:, None]
            # The number of a window's row at a distance.
            o_before = _before(o_column, width, KERNEL_W, DILATION_W, TILE) if TILE > 0 else o_column
            o_kernel = o_relative[None, :] + o_before - (KERNEL_W - 1)
            mask = (o_column < width) & (o_kernel >= 0) & (o_kernel < SEEN)
            o_sum = o_item.to(tl.int64) * sums.b + (o_column.to(tl.int64) * sums.w + o_kernel.to(tl.int64) * sums.k)
            for i_row in range(0, height, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    row = i_row + i
                    kernel_h = i_relative + _before(row, height, KERNEL_H, DILATION_H, 1) - (KERNEL_H - 1)
                    m_row = mask & (kernel_h >= 0) & (kernel_h < KERNEL_H) & (row < height)
                    o_row = tl.cast(row, tl.int64) * sums.h + tl.cast(kernel_h * SEEN, tl.int64) * sums.k
                    if AT_ONCE > 1:
                        p_item = sums.ptr + (i_group * sums.g + o_row)
                        b_sum += tl.load(p_item + o_sum, mask=m_row & (o_item < parts), other=0)
                    else:
                        for i_item in range(0, parts, ITEMS):
                            p_item = sums.ptr + (i_group * sums.g + tl.cast(i_item, tl.int64) * sums.b + o_row)
                            b_sum += tl.load(p_item + o_sum, mask=m_row & (i_item + o_item < parts), other=0)
        b_rpb = tl.sum(b_sum, 0)
        p_rpb = rpb.ptr + i_group * rpb.g + i_relative * rpb.h + o_relative * rpb.w
        tl.store(p_rpb, b_rpb.to(rpb.ptr.dtype.element_ty), mask=o_relative < 2 * KERNEL_W - 1)
    elif i_program < TABLES * groups + KERNEL_H:
        kernel_h = i_program - TABLES * groups
        o_kernel = tl.arange(0, POSITIONS)
        p_totals = totals.ptr + kernel_h * SEEN + o_kernel
        b_total = tl.zeros([PLACES, POSITIONS], ACCUMULATOR)
        for i_place in range(0, places, PLACES):
            o_place = i_place + tl.arange(0, PLACES)
            mask = (o_place < places)[:, None] & (o_kernel < KERNEL_W)[None, :]
            b_total += tl.load(p_totals[None, :] + (o_place.to(tl.int64) * totals.h)[:, None], mask=mask, other=0)
        p_bias = bias.ptr + (kernel_h * KERNEL_W + o_kernel) * bias.k
        tl.store(p_bias, tl.sum(b_total, 0).to(bias.ptr.dtype.element_ty), mask=o_kernel < KERNEL_W)
    else:
        o_element = (i_program - TABLES * groups - KERNEL_H) * ELEMENTS + tl.arange(0, ELEMENTS)
        b_element = tl.zeros([ELEMENTS], ACCUMULATOR)
        for i in range(count):
            b_element += tl.load(pieces.ptr + i * pieces.b + o_element, mask=o_element < elements, other=0)
        tl.store(total.ptr + o_element, b_element.to(total.ptr.dtype.element_ty), mask=o_element < elements)


def fold(
    sums: Tensor,
    rpb: Tensor,
    *,
    totals: Tensor | None = None,
    bias: Tensor | None = None,
    pieces: Tensor | None = None,
    total: Tensor | None = None,
    seen: int,
    height: int,
    tile: int = 1,
    dilation: Pair = (1, 1),
) -> None:
    """Fills ``rpb`` [G, 2Kh-1, 2Kw-1] from ``sums`` of gradients of logits [N, G, H, W, S]; ``bias`` [Kh·Kw], if given,
    from ``totals`` [N, G, M, S], at the same distance from each other throughout; and ``total`` from its ``pieces``
    [I, ...], if there are any, which lie in memory one after the other as it does.

    A row of a window is ``seen`` of S: its own positions, or what a tile of ``tile`` columns of outputs sees; 0: what
    all outputs see. ``height`` is that of the map.
    """
    parts, groups, _, width, _ = sums.shape
    kernel_h, kernel_w = ((entries + 1) // 2 for entries in rpb.shape[1:])
    columns, relative = next_power_of_2(min(width, 16)), next_power_of_2(rpb.shape[2])
    positions = next_power_of_2(kernel_w)
    programs = rpb.shape[1] * groups + (0 if bias is None else kernel_h)
    # What is not there has a spare pointer.
    totals = sums[:, :, 0] if totals is None else totals
    if pieces is None or total is None:
        pieces, total, elements = totals, rpb, 0
    else:
        elements = total.numel()
    items = max(1, min(next_power_of_2(parts), 8192 // (columns * relative)))
    arguments = {
        "sums": view(sums, "b g h w k"), "totals": view(totals, "b g h k"), "rpb": view(rpb, "g h w"),
        "bias": View(rpb) if bias is None else view(bias, "k"), "pieces": View(pieces, pieces.stride(0)),
        "total": View(total), "parts": parts, "groups": groups, "height": height,
        "width": width, "places": math.prod(totals.shape[:3]), "count": pieces.shape[0], "elements": elements,
        "KERNEL_H": kernel_h, "KERNEL_W": kernel_w, "DILATION_H": dilation[0], "DILATION_W": dilation[1],
        "SEEN": seen, "TILE": tile, "ACCUMULATOR": accumulator(sums.dtype),
        # Numbers of some blocks: 32 of a thread, all of which are on their way at the same time.
        "ITEMS": items, "AT_ONCE": max(1, min(8, 8192 // (items * columns * relative))) if items >= parts else 1,
        "COLUMNS": columns, "RELATIVE": relative, "PLACES": max(1, 8192 // positions), "POSITIONS": positions,
        "ELEMENTS": 1024,
    }  # fmt: skip
    # One program per row of a table and group, one per row of a window, and one per block of the other gradient.
    launch(_fold_kernel, (programs + ceil_divide(elements, 1024),), sums.device, arguments, num_warps=8, num_stages=2)
