"""Gradients of bias and rpb: those of the logits, summed over images in parts, folded onto positions in a window and
relative positions."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.bands import first_seen
from kernels.dtypes import accumulator
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.views import View, view
from kernels.windows_triton import window_start


@triton.jit
def _first_row(i_class, length, KERNEL: tl.constexpr, LAST: tl.constexpr):
    """The first row, or the LAST, that lies ``i_class`` rows into its window."""
    return tl.where(i_class < KERNEL // 2 + 1 - LAST, i_class, i_class + length - KERNEL)


@triton.jit
def _fold_kernel(
    sums,  # [N, G, rows, W, S]: Σ of ds over the images of a part
    totals,  # [M, S]: Σ of ds over several outputs
    bias,  # [K²]: written
    rpb,  # [G, 2K-1, 2K-1]: written
    pieces,  # [I, E]: parts of one more gradient
    total,  # [E]: written, their sum
    parts, groups, height, width, first_row, last_row, places, count, elements,
    KERNEL: tl.constexpr, PITCH: tl.constexpr, SEEN: tl.constexpr, TILE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ITEMS: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr, RELATIVE: tl.constexpr, PLACES: tl.constexpr,
    POSITIONS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """A program takes a row of a head's table, or of a window, and adds rows of the map, several at a time; or a block
    of the other gradient."""
    ENTRIES: tl.constexpr = 2 * KERNEL - 1
    i_program = tl.program_id(0)
    if i_program < ENTRIES * groups:
        i_relative, i_group = i_program % ENTRIES, (i_program // ENTRIES).to(tl.int64)
        # The rows whose windows have one at that distance.
        begin = tl.maximum(_first_row(tl.maximum(KERNEL - 1 - i_relative, 0), height, KERNEL, 0), first_row)
        end = tl.minimum(_first_row(tl.minimum(2 * KERNEL - 2 - i_relative, KERNEL - 1), height, KERNEL, 1), last_row)
        # Several parts at a time, with some columns each; rows, too, where all parts are.
        o_flat, o_relative = tl.arange(0, ITEMS * COLUMNS), tl.arange(0, RELATIVE)
        o_item = (o_flat // COLUMNS)[:, None]
        b_sum = tl.zeros([ITEMS * COLUMNS, RELATIVE], ACCUMULATOR)
        for i_column in range(0, width, COLUMNS):
            o_column = (i_column + o_flat % COLUMNS)[:, None]
            # The number of a window's row at a distance.
            o_first = first_seen(o_column, width, KERNEL, TILE) if TILE > 0 else 0
            o_kernel = o_relative[None, :] + o_column - o_first - (KERNEL - 1)
            mask = (o_column < width) & (o_kernel >= 0) & (o_kernel < SEEN)
            o_sum = o_item.to(tl.int64) * sums.b + (o_column * sums.w + o_kernel)
            for i_row in range(begin, end + 1, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    row = i_row + i
                    kernel_h = i_relative - (window_start(row, height, KERNEL, 1) - row + KERNEL - 1)
                    o_row = (row - first_row) * sums.h + kernel_h * PITCH
                    if AT_ONCE > 1:
                        p_item = sums.ptr + (i_group * sums.g + o_row)
                        b_sum += tl.load(p_item + o_sum, mask=mask & (o_item < parts) & (row <= end), other=0)
                    else:
                        for i_item in range(0, parts, ITEMS):
                            p_item = sums.ptr + (i_group * sums.g + tl.cast(i_item, tl.int64) * sums.b + o_row)
                            b_sum += tl.load(p_item + o_sum, mask=mask & (i_item + o_item < parts), other=0)
        b_rpb = tl.sum(b_sum, 0)
        p_rpb = rpb.ptr + i_group * rpb.g + i_relative * rpb.h + o_relative * rpb.w
        tl.store(p_rpb, b_rpb.to(rpb.ptr.dtype.element_ty), mask=o_relative < ENTRIES)
    elif i_program < ENTRIES * groups + KERNEL:
        kernel_h = i_program - ENTRIES * groups
        o_kernel = tl.arange(0, POSITIONS)
        p_totals = totals.ptr + kernel_h * PITCH + o_kernel
        b_total = tl.zeros([PLACES, POSITIONS], ACCUMULATOR)
        for i_place in range(0, places, PLACES):
            o_place = i_place + tl.arange(0, PLACES)
            mask = (o_place < places)[:, None] & (o_kernel < KERNEL)[None, :]
            b_total += tl.load(p_totals[None, :] + (o_place.to(tl.int64) * totals.h)[:, None], mask=mask, other=0)
        p_bias = bias.ptr + (kernel_h * KERNEL + o_kernel) * bias.k
        tl.store(p_bias, tl.sum(b_total, 0).to(bias.ptr.dtype.element_ty), mask=o_kernel < KERNEL)
    else:
        o_element = (i_program - ENTRIES * groups - KERNEL) * ELEMENTS + tl.arange(0, ELEMENTS)
        b_element = tl.zeros([ELEMENTS], ACCUMULATOR)
        for i in range(count):
            b_element += tl.load(pieces.ptr + i * pieces.b + o_element, mask=o_element < elements, other=0)
        tl.store(total.ptr + o_element, b_element.to(total.ptr.dtype.element_ty), mask=o_element < elements)


class Sums(NamedTuple):
    """What bias' and rpb's gradients are summed from, and parts of projected keys'."""

    sums: Tensor  # [N, G, rows, W, S]
    totals: Tensor  # [N, G, M, S], at the same distance from each other throughout
    pitch: int  # from a row of a window to the next, in S
    seen: int  # numbers of such a row: as many as a window's, or what a tile of outputs sees
    tile: int  # columns of outputs that see the same; 0: all do
    rows: tuple[int, int, int]  # the first and the last row of outputs, and the map's height
    pieces: Tensor | None = None  # [I, ...]


def fold(found: Sums, bias: Tensor, rpb: Tensor, total: Tensor | None = None) -> None:
    """Fills ``bias`` [K²] and ``rpb`` [G, 2K-1, 2K-1]; and ``total`` from its pieces, which lie in memory one after the
    other as it does."""
    sums, totals, pitch, seen, tile, (first_row, last_row, height), pieces = found
    parts, groups, _, width, _ = sums.shape
    entries = rpb.shape[1]
    kernel_size = (entries + 1) // 2
    columns, relative = next_power_of_2(min(width, 16)), next_power_of_2(entries)
    positions = next_power_of_2(kernel_size)
    items = max(1, min(next_power_of_2(parts), 8192 // (columns * relative)))
    if pieces is None or total is None:
        pieces, total, elements = totals, bias, 0
    else:
        elements = total.numel()
    arguments = {
        "sums": view(sums, "b g h w k"),
        "totals": view(totals, "b g h k"),
        "bias": view(bias, "k"),
        "rpb": view(rpb, "g h w"),
        "pieces": View(pieces, pieces.stride(0)),
        "total": View(total),
        "parts": parts,
        "groups": groups,
        "height": height,
        "width": width,
        "first_row": first_row,
        "last_row": last_row,
        "places": math.prod(totals.shape[:3]),
        "count": pieces.shape[0],
        "elements": elements,
        "KERNEL": kernel_size,
        "PITCH": pitch,
        "SEEN": seen,
        "TILE": tile,
        "ACCUMULATOR": accumulator(sums.dtype),
        # Numbers of some blocks: 32 of a thread, all of which are on their way at the same time.
        "ITEMS": items,
        "AT_ONCE": max(1, min(8, 8192 // (items * columns * relative))) if items >= parts else 1,
        "COLUMNS": columns,
        "RELATIVE": relative,
        "PLACES": max(1, 8192 // positions),
        "POSITIONS": positions,
        "ELEMENTS": 1024,
    }
    # One program per row of a table and group, one per row of a window, and one per block of the other gradient.
    grid = (entries * groups + kernel_size + ceil_divide(elements, 1024),)
    launch(_fold_kernel, grid, sums.device, arguments, num_warps=8, num_stages=2)
