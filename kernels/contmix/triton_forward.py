# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""ContMix's forward pass in one kernel: logits, softmax and sum of every kernel size, no dynamic kernel in memory.

Per pixel and head a kernel size reads Dq query and Dv value channels and writes Dv; the projected keys [Dq, K²] are
shared by a whole map and stay in L1. For OverLoCK's K = 5 and 13 and Dq = Dv = 16 that is 2·(16 + 16 + 16) elements,
where the chain matmul → softmax_aggregate moves 194·2 + 2·(16 + 16) + 16 at least; and (Dq + Dv)·K² multiply-adds.

A program takes a tile of outputs and one kernel size, and walks over its window in steps:

    logits [P, S] = query [P, Dq] @ projected [Dq, S] + bias + rpb,      out [P, Dv] += softmax [P, S] · values

two matrix products a step, on tensor cores, with an online softmax between them as in flash attention. ``triton_tiles``
says how tiles and steps are cut, each kernel size its own way. Programs of all sizes run in one launch, those with the
largest windows first, so that short ones fill the processors at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix import eager
from kernels.contmix.triton_blocks import (
    count_tiles,
    load_pixels,
    load_values,
    logits_of_tile,
    mix,
    outputs_of_tile,
    spans_of_tile,
    step_positions,
    window_starts,
)
from kernels.contmix.triton_tiles import (
    CONFIGS,
    SIDE_BY_SIDE,
    Config,
    block_arguments,
    heuristic,
    problem_of,
    size_arguments,
    tensor_arguments,
    tiles_and_windows,
)
from kernels.dtypes import at_least_float32
from kernels.launch import launch
from kernels.tuning import tunable

__all__ = ["Inputs", "forward", "forward_of_one_size"]


@triton.jit
def _tile(
    p_query, p_projected, p_bias, p_rpb, p_value, p_out, p_statistics,
    query_stride_c, query_stride_h, query_stride_w,
    projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
    value_stride_c, value_stride_h, value_stride_w,
    out_stride_c, out_stride_h, out_stride_w,
    statistics_stride_h, statistics_stride_w,
    i_tile, i_window, channels, query_channels, height, width,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    """One tile of one kernel size; pointers are at its batch entry and group."""
    o_row, o_column, m_output = outputs_of_tile(i_tile, i_window, height, width, SHARED, KERNEL, BLOCK_PIXELS)
    o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, SHARED, KERNEL)
    o_span_h, o_span_w = spans_of_tile(o_start_h, o_start_w, SHARED, BLOCK_PIXELS)
    o_query, o_channel = tl.arange(0, BLOCK_QUERY), tl.arange(0, BLOCK_CHANNELS)
    m_query, m_channel = o_query < query_channels, o_channel < channels
    b_query = load_pixels(
        p_query, o_query, m_query, o_row, o_column, m_output, query_stride_c, query_stride_h, query_stride_w, OFFSET
    )
    b_query = tl.trans(b_query)  # [P, Dq]

    # [P], [P], [P, Dv]
    b_max = tl.full([BLOCK_PIXELS], float("-inf"), ACCUMULATOR)
    b_total = tl.zeros([BLOCK_PIXELS], ACCUMULATOR)
    b_sum = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATOR)
    for i_step in range(STEPS):
        o_kernel_h, o_kernel_w, m_step = step_positions(i_step, SHARED, KERNEL, BLOCK_STEPS)
        b_logits, _b_projected = logits_of_tile(
            b_query, p_projected, p_bias, p_rpb, o_query, m_query, o_row, o_column, o_start_h, o_start_w,
            o_kernel_h, o_kernel_w, m_step, projected_stride_c, projected_stride_k, bias_stride_k,
            rpb_stride_h, rpb_stride_w, KERNEL, ACCUMULATOR, UPCAST,
        )  # fmt: skip
        b_logits = tl.where(m_step[None, :], b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=1))
        b_weight = tl.exp(b_logits - b_new_max[:, None])
        b_rescale = tl.exp(b_max - b_new_max)
        b_total = b_total * b_rescale + tl.sum(b_weight, axis=1)
        b_max = b_new_max
        b_value = load_values(
            p_value, o_channel, m_channel, o_span_h, o_span_w, o_kernel_h, o_kernel_w, m_step, i_step, width,
            value_stride_c, value_stride_h, value_stride_w, SHARED, OFFSET, BLOCK_SPAN,
        )  # fmt: skip
        b_mixed = mix(
            b_weight, b_value, o_start_w - o_span_w,
            SHARED, KERNEL, ACCUMULATOR, UPCAST, BLOCK_PIXELS, BLOCK_CHANNELS, BLOCK_SPAN,
        )  # fmt: skip
        b_sum = b_sum * b_rescale[:, None] + b_mixed

    o_out = o_row.to(OFFSET) * out_stride_h + o_column.to(OFFSET) * out_stride_w
    tl.store(
        p_out + o_out[:, None] + (o_channel.to(OFFSET) * out_stride_c)[None, :],
        (b_sum / b_total[:, None]).to(p_out.dtype.element_ty),
        mask=m_output[:, None] & m_channel[None, :],
    )
    o_statistics = o_row.to(OFFSET) * statistics_stride_h + o_column.to(OFFSET) * statistics_stride_w
    tl.store(p_statistics + o_statistics, b_max + tl.log(b_total), mask=m_output)


@triton.jit
def _contmix_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, ΣK²]
    bias_ptr,  # [ΣK²]
    rpb_ptr,  # [G, Σ(2K-1)²]
    value_ptr,  # [B, M, G, Dv, H, W]
    out_ptr,  # [B, M, G, Dv, H, W]
    statistics_ptr,  # [B, M, G, H, W]: log Σ_k exp
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_k,
    value_stride_b, value_stride_m, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    out_stride_b, out_stride_m, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    statistics_stride_b, statistics_stride_m, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    batch, groups, channels, query_channels, height, width,
    INDEX: tl.constexpr, FIRST_POSITION: tl.constexpr, FIRST_RELATIVE: tl.constexpr, SHARED: tl.constexpr,
    KERNEL: tl.constexpr, STEPS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
    BLOCK_SPAN: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    """INDEX to BLOCK_SPAN are tuples: of each size, which it is, where its positions and biases begin, its cut."""
    i_program = tl.program_id(0)
    for m in tl.static_range(len(INDEX)):
        # Programs of this size: (tile, window, group, batch entry), tiles fastest.
        tiles, windows = count_tiles(height, width, SHARED[m], KERNEL[m], BLOCK_PIXELS[m])
        programs = tiles * windows * groups * batch
        if (i_program >= 0) & (i_program < programs):
            i_image = i_program // (tiles * windows)
            i_group, i_batch = (i_image % groups).to(tl.int64), (i_image // groups).to(tl.int64)
            i_size = tl.full([], INDEX[m], tl.int64)
            _tile(
                query_ptr + i_batch * query_stride_b + i_group * query_stride_g,
                projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
                + FIRST_POSITION[m] * projected_stride_k,
                bias_ptr + FIRST_POSITION[m] * bias_stride_k,
                rpb_ptr + i_group * rpb_stride_g + FIRST_RELATIVE[m] * rpb_stride_k,
                value_ptr + i_batch * value_stride_b + i_size * value_stride_m + i_group * value_stride_g,
                out_ptr + i_batch * out_stride_b + i_size * out_stride_m + i_group * out_stride_g,
                statistics_ptr + i_batch * statistics_stride_b + i_size * statistics_stride_m
                + i_group * statistics_stride_g,
                query_stride_c, query_stride_h, query_stride_w,
                projected_stride_c, projected_stride_k, bias_stride_k,
                (2 * KERNEL[m] - 1) * rpb_stride_k, rpb_stride_k,
                value_stride_c, value_stride_h, value_stride_w,
                out_stride_c, out_stride_h, out_stride_w,
                statistics_stride_h, statistics_stride_w,
                i_program % tiles, i_program // tiles % windows, channels, query_channels, height, width,
                SHARED[m], KERNEL[m], STEPS[m], ACCUMULATOR, OFFSET, UPCAST,
                BLOCK_PIXELS[m], BLOCK_STEPS[m], BLOCK_SPAN[m], BLOCK_CHANNELS, BLOCK_QUERY,
            )  # fmt: skip
        i_program -= programs


class Inputs(NamedTuple):
    """What the forward pass reads, of all kernel sizes side by side."""

    query: Tensor  # [B, G, Dq, H, W]
    projected: Tensor  # [B, G, Dq, ΣK²]
    bias: Tensor  # [ΣK²]
    rpb: Tensor  # [G, Σ(2K−1)²]
    value: Tensor  # [B, M, G, Dv, H, W]


def forward(
    inputs: Inputs, out: Tensor, statistics: Tensor, kernel_sizes: list[int], configs: dict[int, Config] | None = None
) -> None:
    """Fills ``out`` [B,M,G,Dv,H,W] and ``statistics`` [B,M,G,H,W], those of the kernel sizes that ``configs`` names by
    their index; by default all. One launch, or one for each number of warps and stages that the configs ask for."""
    query, value = inputs.query, inputs.value
    problems = [problem_of(query, size, value) for size in kernel_sizes]
    if configs is None:
        configs = {
            m: forward_of_one_size.choose(inputs, out, statistics, kernel_sizes, m) for m in range(len(kernel_sizes))
        }
    shared_arguments = {
        **tensor_arguments(SIDE_BY_SIDE, **inputs._asdict(), out=out, statistics=statistics),
        **size_arguments(query, value, out),
        "batch": value.shape[0],
    }
    height, width = value.shape[4:]
    for warps, stages in dict.fromkeys((config.num_warps, config.num_stages) for config in configs.values()):
        members = [m for m, config in configs.items() if (config.num_warps, config.num_stages) == (warps, stages)]
        members.sort(key=lambda m: -kernel_sizes[m])
        blocks = [block_arguments(problems[m], configs[m]) for m in members]
        places = (tiles_and_windows(height, width, kernel_sizes[m], configs[m].block_pixels) for m in members)
        arguments = {
            **shared_arguments,
            "INDEX": tuple(members),
            "FIRST_POSITION": tuple(sum(size**2 for size in kernel_sizes[:m]) for m in members),
            "FIRST_RELATIVE": tuple(sum((2 * size - 1) ** 2 for size in kernel_sizes[:m]) for m in members),
            **{name: tuple(block[name] for block in blocks) for name in blocks[0]},
        }
        grid = (sum(tiles * windows for tiles, windows in places) * value.shape[0] * value.shape[2],)
        launch(_contmix_kernel, grid, out.device, arguments, num_warps=warps, num_stages=stages)


def _reference(inputs: Inputs, _out: Tensor, _statistics: Tensor, kernel_sizes: list[int], m: int) -> Tensor:
    query, projected, bias, rpb, value = at_least_float32(*inputs)
    keys, biases, table = list(eager.parts(projected, bias, rpb, kernel_sizes))[m]
    one = eager.contmix(query, keys, biases, table.flatten(1), value[:, m : m + 1], [kernel_sizes[m]])
    return one[0][:, 0]


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda inputs, out, statistics, sizes, m: problem_of(inputs.query, sizes[m], inputs.value),
    reference=_reference,
    name="contmix",
)
def forward_of_one_size(
    inputs: Inputs, out: Tensor, statistics: Tensor, kernel_sizes: list[int], m: int, *, config: Config
) -> Tensor:
    """Kernel size m alone, as the tuner tries it."""
    forward(inputs, out, statistics, kernel_sizes, {m: config})
    return out[:, m]
