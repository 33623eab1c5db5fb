# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""ContMix's forward pass as one kernel a kernel size: logits, softmax and sum, and no dynamic kernel in memory.

Per pixel and head a launch reads Dq query and Dv value channels and writes Dv; the projected keys [Dq, K²] are shared
by a whole map and stay in L1. For OverLoCK's K = 5 and 13 and Dq = Dv = 16 that is 2·(16 + 16 + 16) elements, where the
chain matmul → softmax_aggregate moves 194·2 + 2·(16 + 16) + 16 at least; and (Dq + Dv)·K² multiply-adds. Two
formulations:

*Shared windows.* Clamping makes outputs share windows: along an axis of length L there are only L − K + 1 starts, at
14x14 with K = 13 four windows for 196 outputs, at 7x7 with K = 7 one. A program takes the outputs of one window: then

    logits [P, S] = query [P, Dq] @ projected [Dq, S] + bias + rpb,      out [P, Dv] += softmax [P, S] @ value [S, Dv]

are two small matrix products a step, on tensor cores, with an online softmax between them as in flash attention.

*Own windows.* Elsewhere nearly every output has a window of its own. The logits still are a matrix product; the values
are gathered, and summed in registers.

``triton_tiles`` says when which is taken, and holds what the backward kernels share with these. Every kernel size has a
launch of its own, since OverLoCK's two want different formulations on the same map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.tuner import Trial, Tunable, choose
from kernels.aggregation.triton_kernels import at_least_float32
from kernels.backend import interpreting
from kernels.contmix import eager
from kernels.contmix.triton_grad_inputs import grad_query, grad_value
from kernels.contmix.triton_grad_parameters import grad_projected, grad_tables
from kernels.contmix.triton_tiles import (
    CONFIGS,
    Config,
    Problem,
    Saved,
    cost,
    dot,
    heuristic,
    load_pixels,
    outputs_of_tile,
    problem_of,
    tensor_arguments,
    tile_arguments,
    window_starts,
)
from kernels.launch import launch
from kernels.layout import empty_like_layout
from kernels.windows_triton import split_program

__all__ = ["contmix", "contmix_backward", "contmix_one_size"]


@triton.jit
def _shared_windows_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    value_ptr,  # [B, G, Dv, H, W]
    out_ptr,  # [B, G, Dv, H, W]
    statistics_ptr,  # [B, G, H, W]: log Σ_k exp
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    out_stride_b, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    groups, channels, query_channels, height, width, tiles, windows,
    KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g

    o_row, o_column, m_output = outputs_of_tile(i_tile, i_window, height, width, True, KERNEL, BLOCK_PIXELS)
    o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, True, KERNEL)
    o_query = tl.arange(0, BLOCK_QUERY)
    m_query = o_query < query_channels
    o_channel = tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    # [P, Dq]
    b_query = tl.trans(
        load_pixels(
            p_query, o_query, m_query, o_row, o_column, m_output,
            query_stride_c, query_stride_h, query_stride_w, OFFSET,
        )
    )  # fmt: skip
    # Distance of window position (0, 0) from each output, as an index into the bias table, [P]
    o_relative_h = o_start_h - o_row + KERNEL - 1
    o_relative_w = o_start_w - o_column + KERNEL - 1

    # [P], [P], [P, Dv]
    b_max = tl.full([BLOCK_PIXELS], float("-inf"), ACCUMULATOR)
    b_total = tl.zeros([BLOCK_PIXELS], ACCUMULATOR)
    b_sum = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATOR)
    for first_step in range(0, KERNEL * KERNEL, BLOCK_STEPS):
        o_step = first_step + tl.arange(0, BLOCK_STEPS)
        m_step = o_step < KERNEL * KERNEL
        o_kernel_h, o_kernel_w = o_step // KERNEL, o_step % KERNEL
        # [Dq, S]
        b_projected = tl.load(
            p_projected + (o_query * projected_stride_c)[:, None] + (o_step * projected_stride_k)[None, :],
            mask=m_query[:, None] & m_step[None, :],
            other=0,
        )
        b_bias = tl.load(bias_ptr + o_step * bias_stride_k, mask=m_step, other=0).to(ACCUMULATOR)
        # [P, S]
        b_rpb = tl.load(
            rpb_ptr
            + i_group * rpb_stride_g
            + (o_relative_h[:, None] + o_kernel_h[None, :]) * rpb_stride_h
            + (o_relative_w[:, None] + o_kernel_w[None, :]) * rpb_stride_w,
            mask=m_step[None, :],
            other=0,
        ).to(ACCUMULATOR)
        b_logits = dot(b_query, b_projected, ACCUMULATOR, UPCAST) + b_bias[None, :] + b_rpb
        b_logits = tl.where(m_step[None, :], b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=1))
        b_weight = tl.exp(b_logits - b_new_max[:, None])
        b_rescale = tl.exp(b_max - b_new_max)
        b_total = b_total * b_rescale + tl.sum(b_weight, axis=1)
        b_max = b_new_max
        # [Dv, S]
        o_value_h = (o_start_h + o_kernel_h).to(OFFSET) * value_stride_h
        o_value_w = (o_start_w + o_kernel_w).to(OFFSET) * value_stride_w
        b_value = tl.load(
            p_value + (o_channel.to(OFFSET) * value_stride_c)[:, None] + (o_value_h + o_value_w)[None, :],
            mask=m_channel[:, None] & m_step[None, :],
            other=0,
        )
        b_sum = b_sum * b_rescale[:, None] + dot(b_weight.to(b_value.dtype), tl.trans(b_value), ACCUMULATOR, UPCAST)

    tl.store(
        p_out
        + (o_row.to(OFFSET) * out_stride_h + o_column.to(OFFSET) * out_stride_w)[:, None]
        + (o_channel.to(OFFSET) * out_stride_c)[None, :],
        (b_sum / b_total[:, None]).to(out_ptr.dtype.element_ty),
        mask=m_output[:, None] & m_channel[None, :],
    )
    o_statistics = o_row.to(OFFSET) * statistics_stride_h + o_column.to(OFFSET) * statistics_stride_w
    tl.store(p_statistics + o_statistics, b_max + tl.log(b_total), mask=m_output)


@triton.jit
def _own_windows_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    value_ptr,  # [B, G, Dv, H, W]
    out_ptr,  # [B, G, Dv, H, W]
    statistics_ptr,  # [B, G, H, W]: log Σ_k exp
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    out_stride_b, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    groups, channels, query_channels, height, width, tiles, windows,
    KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g

    o_row, o_column, m_pixel = outputs_of_tile(i_tile, i_window, height, width, False, KERNEL, BLOCK_PIXELS)
    o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, False, KERNEL)
    o_query = tl.arange(0, BLOCK_QUERY)
    m_query = o_query < query_channels
    o_channel = tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    # [Dq, P]
    b_query = load_pixels(
        p_query, o_query, m_query, o_row, o_column, m_pixel, query_stride_c, query_stride_h, query_stride_w, OFFSET
    )
    o_relative_h = o_start_h - o_row + KERNEL - 1
    o_relative_w = o_start_w - o_column + KERNEL - 1

    # [P], [P], [Dv, P]
    b_max = tl.full([BLOCK_PIXELS], float("-inf"), ACCUMULATOR)
    b_total = tl.zeros([BLOCK_PIXELS], ACCUMULATOR)
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATOR)
    for first_step in range(0, KERNEL * KERNEL, BLOCK_STEPS):
        o_step = first_step + tl.arange(0, BLOCK_STEPS)
        m_step = o_step < KERNEL * KERNEL
        o_kernel_h, o_kernel_w = o_step // KERNEL, o_step % KERNEL
        # [S, Dq]
        b_projected = tl.load(
            p_projected + (o_step * projected_stride_k)[:, None] + (o_query * projected_stride_c)[None, :],
            mask=m_step[:, None] & m_query[None, :],
            other=0,
        )
        b_bias = tl.load(bias_ptr + o_step * bias_stride_k, mask=m_step, other=0).to(ACCUMULATOR)
        # [S, P]
        b_rpb = tl.load(
            rpb_ptr
            + i_group * rpb_stride_g
            + (o_relative_h[None, :] + o_kernel_h[:, None]) * rpb_stride_h
            + (o_relative_w[None, :] + o_kernel_w[:, None]) * rpb_stride_w,
            mask=m_step[:, None],
            other=0,
        ).to(ACCUMULATOR)
        b_logits = dot(b_projected, b_query, ACCUMULATOR, UPCAST) + b_bias[:, None] + b_rpb
        b_logits = tl.where(m_step[:, None], b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=0))
        b_weight = tl.exp(b_logits - b_new_max[None, :])
        b_rescale = tl.exp(b_max - b_new_max)
        b_total = b_total * b_rescale + tl.sum(b_weight, axis=0)
        b_max = b_new_max
        # [S, Dv, P]
        o_value = (o_start_h[None, :] + o_kernel_h[:, None]).to(OFFSET) * value_stride_h + (
            o_start_w[None, :] + o_kernel_w[:, None]
        ).to(OFFSET) * value_stride_w
        b_value = tl.load(
            p_value + (o_channel.to(OFFSET) * value_stride_c)[None, :, None] + o_value[:, None, :],
            mask=m_step[:, None, None] & m_channel[None, :, None],
            other=0,
        ).to(ACCUMULATOR)
        b_sum = b_sum * b_rescale[None, :] + tl.sum(b_weight[:, None, :] * b_value, axis=0)

    o_out = o_row.to(OFFSET) * out_stride_h + o_column.to(OFFSET) * out_stride_w
    tl.store(
        p_out + (o_channel.to(OFFSET) * out_stride_c)[:, None] + o_out[None, :],
        (b_sum / b_total[None, :]).to(out_ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel[None, :],
    )
    o_statistics = o_row.to(OFFSET) * statistics_stride_h + o_column.to(OFFSET) * statistics_stride_w
    tl.store(p_statistics + o_statistics, b_max + tl.log(b_total), mask=m_pixel)


MODULES = ("kernels.windows_triton", "kernels.contmix.triton_tiles", "kernels.contmix.triton_kernels")
FORWARD = Tunable("contmix", CONFIGS, heuristic, cost, MODULES, Problem, "kernels.contmix.examples:contmix")


def contmix_one_size(
    query: Tensor,
    projected: Tensor,
    bias: Tensor,
    rpb: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    config: Config | None = None,
) -> Tensor:
    """ContMix for one kernel size: fills ``out`` [B,G,Dv,H,W] and ``statistics`` [B,G,H,W], and returns ``out``."""
    problem = problem_of(query, rpb, value)
    if config is None:
        tensors = (query, projected, bias, rpb, value)
        trial = Trial(lambda config: contmix_one_size(*tensors, out, statistics, config), lambda: _reference(*tensors))
        config = choose(FORWARD, problem, value.device, trial)
    arguments = {
        **tensor_arguments(
            query=query, projected=projected, bias=bias, rpb=rpb, value=value, out=out, statistics=statistics
        ),
        **tile_arguments(config, query, rpb, value, out),
    }
    kernel = _shared_windows_kernel if arguments.pop("SHARED") else _own_windows_kernel
    # One program per (tile of a window's outputs or of the map, window, group, batch entry).
    grid = (arguments["tiles"] * arguments["windows"] * value.shape[1] * value.shape[0],)
    launch(kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out


def _reference(query: Tensor, projected: Tensor, bias: Tensor, rpb: Tensor, value: Tensor) -> Tensor:
    """The eager path, for the tuner."""
    query, projected, bias, rpb, value = at_least_float32(query, projected, bias, rpb, value)
    sizes = [(rpb.shape[1] + 1) // 2]
    return eager.contmix(query, projected, bias, rpb.flatten(1), value[:, None], sizes)[0][:, 0]


def _no_double_products(value: Tensor) -> bool:
    """There is no float64 matrix product in Triton on a GPU."""
    return value.dtype == torch.float64 and not interpreting()


def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: Tensor, value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value; log Σ_k exp [B, M, G, H, W]); rpb holds all tables side by side, [G, Σ(2K−1)²]."""
    if _no_double_products(value):
        return eager.contmix(query, projected, bias, rpb, value, kernel_sizes)
    out, statistics = eager.empty_outputs(value)
    if value.numel() == 0:
        return out, statistics
    for m, part in enumerate(eager.parts(projected, bias, rpb, kernel_sizes)):
        contmix_one_size(query, *part, value[:, m], out[:, m], statistics[:, m])
    return out, statistics


def contmix_backward(
    grad: Tensor,
    query: Tensor,
    projected: Tensor,
    bias: Tensor,
    rpb: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    kernel_sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, projected, bias, rpb and value; query's and value's in the memory order of their tensors."""
    if _no_double_products(value):
        return eager.contmix_backward(grad, query, projected, bias, rpb, value, out, statistics, kernel_sizes)
    grad_of_query = empty_like_layout(query, query.shape)
    grad_of_value = eager.empty_outputs(value)[0]
    if value.numel() == 0:
        parameters = (torch.zeros_like(tensor) for tensor in (projected, bias, rpb))
        return (grad_of_query, *parameters, grad_of_value)
    one = torch.empty_like(grad_of_query)
    delta = torch.empty_like(statistics[:, 0])
    projected_parts, bias_parts, rpb_parts = [], [], []
    for m, part in enumerate(eager.parts(projected, bias, rpb, kernel_sizes)):
        saved = Saved(grad[:, m], query, *part, value[:, m], out[:, m], statistics[:, m])
        grad_query(saved, one if m else grad_of_query, delta)
        if m:
            grad_of_query += one
        grad_value(saved, grad_of_value[:, m])
        projected_parts.append(grad_projected(saved, delta))
        bias_part, rpb_part = grad_tables(saved, delta)
        bias_parts.append(bias_part)
        rpb_parts.append(rpb_part.flatten(1))
    grad_of_projected = torch.cat(projected_parts, 3).to(projected.dtype)
    return (
        grad_of_query,
        grad_of_projected,
        torch.cat(bias_parts).to(bias.dtype),
        torch.cat(rpb_parts, 1),
        grad_of_value,
    )
