# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
"""rpb's gradient: the logits' gradients, already summed over images, folded onto relative positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.views import view
from kernels.windows_triton import window_start

__all__ = ["fold"]


@triton.jit
def _fold_kernel(
    sums,  # [G, rows, W, K / ROWS · S]: Σ over images of ds
    partial,  # [tiles, G, 2K-1, 2K-1]: written
    groups, height, width, first_row, last_row,
    KERNEL: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_RELATIVE: tl.constexpr,
):  # fmt: skip
    """A program takes a row of the table and a tile of columns, and adds over the rows of the map."""
    RELATIVE: tl.constexpr = 2 * KERNEL - 1
    i_relative, i_group = tl.program_id(0) % RELATIVE, tl.program_id(0) // RELATIVE % groups
    i_tile = tl.program_id(0) // (RELATIVE * groups)
    o_column = i_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    o_relative = tl.arange(0, BLOCK_RELATIVE)
    # [R, C]
    o_kernel = o_relative[:, None] - (window_start(o_column, width, KERNEL, 1) - o_column + KERNEL - 1)[None, :]
    m_kernel = (o_kernel >= 0) & (o_kernel < KERNEL) & (o_column < width)[None, :]
    p_sums = sums.ptr + i_group * sums.g + o_column[None, :] * sums.w + o_kernel
    b_sum = tl.zeros([BLOCK_RELATIVE, BLOCK_COLUMNS], ACCUMULATOR)
    for row in range(first_row, last_row + 1):
        kernel_h = i_relative - (window_start(row, height, KERNEL, 1) - row + KERNEL - 1)
        o_row = (row - first_row) * sums.h + kernel_h // ROWS * STEPS + kernel_h % ROWS * KERNEL
        m_row = (kernel_h >= 0) & (kernel_h < KERNEL)
        b_sum += tl.load(p_sums + o_row, mask=m_kernel & m_row, other=0)
    p_partial = partial.ptr + i_tile * partial.b + i_group * partial.g + i_relative * partial.h
    tl.store(p_partial + o_relative, tl.sum(b_sum, 1), mask=o_relative < RELATIVE)


def fold(sums: Tensor, rpb: Tensor, step: tuple[int, int], rows: tuple[int, int, int]) -> Tensor:
    """Σ of ``sums`` [G, rows, W, K / ROWS · S] over all that meets an entry of rpb [G, 2K-1, 2K-1]; ``step`` holds ROWS
    and S, ``rows`` the first and the last row of outputs and the map's height."""
    groups, _, width, _ = sums.shape
    relative, columns = rpb.shape[1], 16
    tiles = ceil_divide(width, columns)
    partial = sums.new_empty((tiles, *rpb.shape))
    first_row, last_row, height = rows
    arguments = {
        "sums": view(sums, "g h w k"),
        "partial": view(partial, "b g h w"),
        "groups": groups,
        "height": height,
        "width": width,
        "first_row": first_row,
        "last_row": last_row,
        "KERNEL": (relative + 1) // 2,
        "ROWS": step[0],
        "STEPS": step[1],
        "ACCUMULATOR": tl.float64 if sums.dtype == torch.float64 else tl.float32,
        "BLOCK_COLUMNS": columns,
        "BLOCK_RELATIVE": next_power_of_2(relative),
    }
    # One program per (row of the table, group, tile of columns).
    launch(_fold_kernel, (relative * groups * tiles,), sums.device, arguments, num_warps=4, num_stages=2)
    return partial[0] if tiles == 1 else partial.sum(0)
