# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""ContMix's gradients that sum over pixels: of the projected keys, of bias and rpb. Two stages, no atomics.

With ds[n,k], the logits' gradient of ``triton_grad_inputs``, computed again here:

    grad_projected   Σ_n ds[n,k] · query[n,:]    a program per block of window positions and chunk of tiles of outputs
    grad_tables      Σ_b ds[n,k]                 a program per block of window positions, tile and chunk of images

Each chunk leaves a partial sum; the partial sums are added in a fixed order. There are only as many chunks as make
a thousand programs, so that all of them together stay at a few megabytes.

The gradients of bias and rpb need ds summed over images and pixels. At a given pixel, window position k always meets
the same entry of rpb; and all pixels at least K//2 away from the borders meet one entry. So grad_tables first adds up
images, folding rows that are away from the borders onto 16 of them and tiles of columns onto one. What it leaves is the
gradient of logits of a small map, from which the bias gradient of ``neighborhood`` makes the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.contmix.triton_blocks import (
    TILE_WIDTH,
    dot,
    grad_logits,
    load_pixels,
    outputs_of_tile,
    spans_of_tile,
    step_positions,
    window_starts,
)
from kernels.contmix.triton_grad_inputs import backward_heuristic, reference_gradients
from kernels.contmix.triton_tiles import (
    CONFIGS,
    ONE_SIZE,
    Config,
    Problem,
    Saved,
    tensor_arguments,
    tile_arguments,
)
from kernels.launch import ceil_divide, launch
from kernels.neighborhood.triton_kernels import grad_rpb
from kernels.tuning import tunable
from kernels.windows import Window
from kernels.windows_triton import split_program

__all__ = ["grad_projected", "grad_tables"]

# Rows that those away from the borders are folded onto.
FOLDED = 16
# Sums are cut into chunks until there are this many programs: with two or three at a time on a GPU's 132 processors, a
# few waves.
PROGRAMS = 1 if interpreting() else 1024


@triton.jit
def _grad_projected_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    value_ptr,  # [B, G, Dv, H, W]
    statistics_ptr,  # [B, G, H, W]: log Σ_k exp
    delta_ptr,  # [B, G, H, W]: Σ_c grad · out
    grad_ptr,  # [B, G, Dv, H, W]
    partial_ptr,  # [chunks, B, G, Dq, K²], contiguous
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    delta_stride_b, delta_stride_g, delta_stride_h, delta_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    batch, groups, channels, query_channels, height, width, tiles, windows, chunks,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_step, i_chunk, i_group, i_batch = split_program(STEPS, chunks, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g
    p_delta = delta_ptr + i_batch * delta_stride_b + i_group * delta_stride_g
    p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g

    o_query, o_channel = tl.arange(0, BLOCK_QUERY), tl.arange(0, BLOCK_CHANNELS)
    m_query, m_channel = o_query < query_channels, o_channel < channels
    # [Dq, S]
    b_sum = tl.zeros([BLOCK_QUERY, BLOCK_STEPS], ACCUMULATOR)
    for i_place in range(i_chunk, tiles * windows, chunks):
        i_window = i_place // tiles
        o_row, o_column, m_output = outputs_of_tile(
            i_place % tiles, i_window, height, width, SHARED, KERNEL, BLOCK_PIXELS
        )
        o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, SHARED, KERNEL)
        o_span_h, o_span_w = spans_of_tile(o_start_h, o_start_w, SHARED, BLOCK_PIXELS)
        # [Dq, P], [C, P]; without query an output that is not there adds nothing
        b_query = load_pixels(
            p_query, o_query, m_query, o_row, o_column, m_output, query_stride_c, query_stride_h, query_stride_w, OFFSET
        )
        b_grad = load_pixels(
            p_grad, o_channel, m_channel, o_row, o_column, m_output, grad_stride_c, grad_stride_h, grad_stride_w, OFFSET
        )
        o_row, o_column = o_row.to(OFFSET), o_column.to(OFFSET)
        b_statistics = tl.load(p_statistics + o_row * statistics_stride_h + o_column * statistics_stride_w)
        b_delta = tl.load(p_delta + o_row * delta_stride_h + o_column * delta_stride_w)
        # [P, S]
        b_grad_logits, _b_projected = grad_logits(
            tl.trans(b_query), b_grad, b_statistics, b_delta, p_projected, bias_ptr, p_rpb, p_value,
            o_query, m_query, o_channel, m_channel, i_step, width,
            o_row, o_column, o_start_h, o_start_w, o_span_h, o_span_w,
            projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
            value_stride_c, value_stride_h, value_stride_w,
            SHARED, KERNEL, ACCUMULATOR, OFFSET, UPCAST,
            BLOCK_PIXELS, BLOCK_STEPS, BLOCK_SPAN, BLOCK_CHANNELS,
        )  # fmt: skip
        b_sum += dot(b_query, b_grad_logits.to(b_query.dtype), ACCUMULATOR, UPCAST)

    o_kernel_h, o_kernel_w, m_step = step_positions(i_step, SHARED, KERNEL, BLOCK_STEPS)
    o_step = o_kernel_h * KERNEL + o_kernel_w
    p_partial = partial_ptr + ((i_chunk * batch + i_batch) * groups + i_group) * query_channels * KERNEL * KERNEL
    o_partial = (o_query * KERNEL * KERNEL)[:, None] + o_step[None, :]
    tl.store(p_partial + o_partial, b_sum, mask=m_query[:, None] & m_step[None, :])


@triton.jit
def _unfold(o_folded, repeat, folded, length, low, high):
    """The ``repeat``-th place of those folded onto ``o_folded``, and whether there is one: all but the first ``low``
    and the last ``high`` of ``length`` are folded onto those in the middle of ``folded``."""
    inner = folded - low - high
    m_inner = (o_folded >= low) & (o_folded < folded - high)
    o_inner = o_folded + repeat * inner
    o_border = tl.where(o_folded < low, o_folded, o_folded + length - folded)
    o_place = tl.where(m_inner, tl.minimum(o_inner, length - 1), o_border)
    return o_place, tl.where(m_inner, o_inner < length - high, repeat == 0)


@triton.jit
def _grad_tables_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    value_ptr,  # [B, G, Dv, H, W]
    statistics_ptr,  # [B, G, H, W]: log Σ_k exp
    delta_ptr,  # [B, G, H, W]: Σ_c grad · out
    grad_ptr,  # [B, G, Dv, H, W]
    partial_ptr,  # [chunks, G, K, K, folded_height, folded_width], contiguous
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    delta_stride_b, delta_stride_g, delta_stride_h, delta_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    batch, groups, channels, query_channels, height, width, tiles, windows, chunks,
    folded_height, folded_width, repeats_h, repeats_w,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_step, i_place, i_group, i_chunk = split_program(STEPS, tiles * windows, groups)
    i_window = i_place // tiles
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    o_query, o_channel = tl.arange(0, BLOCK_QUERY), tl.arange(0, BLOCK_CHANNELS)
    m_query, m_channel = o_query < query_channels, o_channel < channels
    o_folded_row, o_folded_column, m_folded = outputs_of_tile(
        i_place % tiles, i_window, folded_height, folded_width, SHARED, KERNEL, BLOCK_PIXELS
    )
    # [P, S]
    b_sum = tl.zeros([BLOCK_PIXELS, BLOCK_STEPS], ACCUMULATOR)
    for i_term in range(i_chunk, batch * repeats_h * repeats_w, chunks):
        i_batch = (i_term // (repeats_h * repeats_w)).to(tl.int64)
        i_repeat = i_term % (repeats_h * repeats_w)
        p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
        p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
        p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
        p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g
        p_delta = delta_ptr + i_batch * delta_stride_b + i_group * delta_stride_g
        p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g

        o_row, o_column, m_output = o_folded_row, o_folded_column, m_folded
        if not SHARED:
            o_row, m_row = _unfold(o_row, i_repeat // repeats_w, folded_height, height, KERNEL // 2, KERNEL // 2)
            tiles_w, folded_w = tl.cdiv(width, TILE_WIDTH), tl.cdiv(folded_width, TILE_WIDTH)
            high = tiles_w - (width - KERNEL // 2) // TILE_WIDTH
            o_tile, m_tile = _unfold(
                o_column // TILE_WIDTH, i_repeat % repeats_w, folded_w, tiles_w, tl.cdiv(KERNEL // 2, TILE_WIDTH), high
            )
            o_column = o_tile * TILE_WIDTH + o_column % TILE_WIDTH
            m_output = m_output & m_row & m_tile
        o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, SHARED, KERNEL)
        o_span_h, o_span_w = spans_of_tile(o_start_h, o_start_w, SHARED, BLOCK_PIXELS)
        # [Dq, P], [C, P]; without gradient and δ an output that is not there adds nothing
        b_query = load_pixels(
            p_query, o_query, m_query, o_row, o_column, m_output, query_stride_c, query_stride_h, query_stride_w, OFFSET
        )
        b_grad = load_pixels(
            p_grad, o_channel, m_channel, o_row, o_column, m_output, grad_stride_c, grad_stride_h, grad_stride_w, OFFSET
        )
        o_row, o_column = o_row.to(OFFSET), o_column.to(OFFSET)
        p_statistics += o_row * statistics_stride_h + o_column * statistics_stride_w
        b_statistics = tl.load(p_statistics, mask=m_output, other=float("inf"))
        b_delta = tl.load(p_delta + o_row * delta_stride_h + o_column * delta_stride_w, mask=m_output, other=0)
        b_grad_logits, _b_projected = grad_logits(
            tl.trans(b_query), b_grad, b_statistics, b_delta, p_projected, bias_ptr, p_rpb, p_value,
            o_query, m_query, o_channel, m_channel, i_step, width,
            o_row, o_column, o_start_h, o_start_w, o_span_h, o_span_w,
            projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
            value_stride_c, value_stride_h, value_stride_w,
            SHARED, KERNEL, ACCUMULATOR, OFFSET, UPCAST,
            BLOCK_PIXELS, BLOCK_STEPS, BLOCK_SPAN, BLOCK_CHANNELS,
        )  # fmt: skip
        b_sum += b_grad_logits

    o_kernel_h, o_kernel_w, m_step = step_positions(i_step, SHARED, KERNEL, BLOCK_STEPS)
    o_step = o_kernel_h * KERNEL + o_kernel_w
    pixels = folded_height * folded_width
    p_partial = partial_ptr + (i_chunk * groups + i_group) * KERNEL * KERNEL * pixels
    # [S, P]: pixels are adjacent in memory
    o_partial = (o_step * pixels)[:, None] + (o_folded_row * folded_width + o_folded_column)[None, :]
    tl.store(p_partial + o_partial, tl.trans(b_sum), mask=m_step[:, None] & m_folded[None, :])


def _chunks(terms: int, programs: int) -> int:
    return max(1, min(terms, PROGRAMS // programs))


def _folded(length: int, low: int, high: int, middle: int) -> tuple[int, int]:
    """Length of an axis of which all but the first ``low`` and the last ``high`` are folded onto ``middle``, and how
    many onto the fullest."""
    inner = length - low - high
    return (length, 1) if inner <= middle else (low + middle + high, ceil_divide(inner, middle))


def _folded_map(height: int, width: int, kernel_size: int) -> tuple[int, int, int, int]:
    """(height, width, repeats along each) of a map folded where no window is clamped: rows onto ``FOLDED``, columns by
    whole tiles onto one."""
    border, tile = kernel_size // 2, TILE_WIDTH.value
    tiles = ceil_divide(width, tile)
    folded_tiles, repeats_w = _folded(tiles, ceil_divide(border, tile), tiles - (width - border) // tile, 1)
    folded_height, repeats_h = _folded(height, border, border, FOLDED)
    return folded_height, width - (tiles - folded_tiles) * tile, repeats_h, repeats_w


def _arguments(saved: Saved, problem: Problem, delta: Tensor, config: Config) -> dict[str, Any]:
    """What both kernels take but for their chunks."""
    return {
        **tensor_arguments(ONE_SIZE, **saved.but("out"), delta=delta),
        **tile_arguments(problem, config, saved.query, saved.value, saved.grad),
        "batch": saved.value.shape[0],
    }


@tunable(
    CONFIGS,
    backward_heuristic,
    problem=lambda saved, _: saved.problem(),
    reference=lambda saved, _: reference_gradients(saved)[1],
    name="contmix.grad_projected",
)
def grad_projected(saved: Saved, delta: Tensor, *, config: Config) -> Tensor:
    """Σ_n query[n,:] · ds[n,k] for one kernel size, [B, G, Dq, K²] in the accumulator's type."""
    problem = saved.problem()
    batch, groups = saved.projected.shape[:2]
    arguments = _arguments(saved, problem, delta, config)
    programs = arguments["STEPS"] * groups * batch
    chunks = _chunks(arguments["tiles"] * arguments["windows"], programs)
    partial = torch.empty((chunks, *saved.projected.shape), dtype=delta.dtype, device=delta.device)
    # One program per (block of window positions, chunk of tiles, group, batch entry).
    arguments |= {"partial_ptr": partial, "chunks": chunks}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_projected_kernel, (programs * chunks,), delta.device, arguments, **options)
    return partial[0] if chunks == 1 else partial.sum(0)


@tunable(
    CONFIGS,
    backward_heuristic,
    problem=lambda saved, _: saved.problem(),
    reference=lambda saved, _: reference_gradients(saved)[2:4],
    name="contmix.grad_tables",
)
def grad_tables(saved: Saved, delta: Tensor, *, config: Config) -> tuple[Tensor, Tensor]:
    """Σ ds over all that meets an entry of bias [K²] and of rpb [G, 2K−1, 2K−1], for one kernel size."""
    problem = saved.problem()
    batch, groups, _, height, width = saved.value.shape
    size = problem.kernel_size
    arguments = _arguments(saved, problem, delta, config)
    folded_height, folded_width, repeats_h, repeats_w = height, width, 1, 1
    if not problem.shared:
        folded_height, folded_width, repeats_h, repeats_w = _folded_map(height, width, size)
        rows = config.block_pixels // TILE_WIDTH.value
        arguments["tiles"] = ceil_divide(folded_height, rows) * ceil_divide(folded_width, TILE_WIDTH.value)
    programs = arguments["STEPS"] * arguments["tiles"] * arguments["windows"] * groups
    chunks = _chunks(batch * repeats_h * repeats_w, programs)
    shape = (chunks, groups, size, size, folded_height, folded_width)
    partial = torch.empty(shape, dtype=delta.dtype, device=delta.device)
    arguments |= {
        "partial_ptr": partial,
        "chunks": chunks,
        "folded_height": folded_height,
        "folded_width": folded_width,
        "repeats_h": repeats_h,
        "repeats_w": repeats_w,
    }
    # One program per (block of window positions, tile of a window or of the folded map, group, chunk of images).
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_tables_kernel, (programs * chunks,), delta.device, arguments, **options)
    return partial.sum((0, 1, 4, 5)).flatten(), grad_rpb(partial, saved.rpb, Window.neighborhood((size, size)))
