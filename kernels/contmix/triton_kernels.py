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

The first is chosen where a window serves at least 16 outputs on average, the least that fills a matrix product's rows.
Every kernel size has a launch of its own, since OverLoCK's two want different formulations on the same map.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.tuner import Trial, Tunable, choose
from kernels.aggregation.triton_kernels import at_least_float32, precision_arguments, stride_arguments
from kernels.backend import interpreting
from kernels.contmix import chunked
from kernels.launch import launch
from kernels.neighborhood import eager
from kernels.neighborhood import triton_kernels as neighborhood_kernels
from kernels.windows_triton import split_program, window_start

__all__ = ["CONFIGS", "Config", "Problem", "contmix", "heuristic", "shares_windows"]

OUTPUTS_PER_WINDOW = 16


class Problem(NamedTuple):
    """What the choice of a config depends on."""

    channels: int
    query_channels: int
    pixels: int
    kernel_size: int
    shared: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Config:
    """Pixels of a program, and window positions of one of its steps; channels are never split."""

    block_pixels: int
    block_steps: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """Registers: the widest block, [S, C, P] when gathering and [P, S] when not, at most 64 elements a thread."""
        channels = max(16, triton.next_power_of_2(problem.channels))
        widest = self.block_pixels * max(self.block_steps, channels)
        if not problem.shared:
            widest = self.block_pixels * self.block_steps * channels
        return (
            4 <= widest / (32 * self.num_warps) <= 64
            and self.block_pixels < 2 * max(problem.pixels, 16)
            and self.block_steps < 2 * max(problem.kernel_size**2, 16)
        )


CONFIGS = tuple(
    Config(pixels, steps, warps, stages)
    for pixels in (16, 32, 64, 128)
    for steps in (16, 32, 64)
    for warps in (4, 8)
    for stages in (2, 3)
)


def cost(problem: Problem, config: Config) -> float:
    """Estimate of a launch, up to a factor: multiply-adds including those past the edges of map and window."""
    steps = triton.cdiv(problem.kernel_size**2, config.block_steps) * config.block_steps
    pixels = triton.cdiv(problem.pixels, config.block_pixels) * config.block_pixels
    return pixels * steps * (problem.channels + problem.query_channels) * (1 + 4 / config.block_steps)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned: 64 outputs of a window by 32 positions; gathering, 8192 elements a step."""
    channels = max(16, triton.next_power_of_2(problem.channels))
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return Config(128 if problem.shared else 256, 64)
    if problem.shared:
        config = Config(64, 32)
    else:
        config = Config(max(16, 8192 // (16 * channels)), 16, 8 if channels > 32 else 4)
    return config if config.valid(problem) else next(c for c in CONFIGS if c.valid(problem))


def shares_windows(height: int, width: int, kernel_size: int) -> bool:
    """Whether a clamped window serves at least 16 outputs on average."""
    return height * width >= OUTPUTS_PER_WINDOW * (height - kernel_size + 1) * (width - kernel_size + 1)


@triton.jit
def _first_output(o_start, KERNEL: tl.constexpr):
    """First output along an axis whose clamped window begins at ``o_start``."""
    return tl.where(o_start == 0, 0, o_start + KERNEL // 2)


@triton.jit
def _last_output(o_start, length, KERNEL: tl.constexpr):
    return tl.where(o_start == length - KERNEL, length - 1, o_start + KERNEL // 2)


@triton.jit
def _dot(a, b, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b, summed in the accumulator type; float32 exactly, not in tf32."""
    if UPCAST:
        a, b = a.to(ACCUMULATOR), b.to(ACCUMULATOR)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACCUMULATOR)


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
    groups, channels, query_channels, height, width, tiles,
    KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    windows_w = width - KERNEL + 1
    i_tile, i_window, i_group, i_batch = split_program(tiles, (height - KERNEL + 1) * windows_w, groups)
    o_start_h, o_start_w = i_window // windows_w, i_window % windows_w
    first_h, first_w = _first_output(o_start_h, KERNEL), _first_output(o_start_w, KERNEL)
    outputs_h = _last_output(o_start_h, height, KERNEL) - first_h + 1
    outputs_w = _last_output(o_start_w, width, KERNEL) - first_w + 1
    if i_tile * BLOCK_PIXELS >= outputs_h * outputs_w:  # the windows in the middle serve fewer outputs
        return
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g

    o_output = i_tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    m_output = o_output < outputs_h * outputs_w
    # Rows past the window's outputs repeat its last one: their softmax stays finite, and they are not stored.
    o_inside = tl.minimum(o_output, outputs_h * outputs_w - 1)
    o_row = first_h + o_inside // outputs_w
    o_column = first_w + o_inside % outputs_w
    o_query = tl.arange(0, BLOCK_QUERY)
    m_query = o_query < query_channels
    o_channel = tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    # [P, Dq]
    b_query = tl.load(
        p_query
        + (o_row.to(OFFSET) * query_stride_h + o_column.to(OFFSET) * query_stride_w)[:, None]
        + (o_query.to(OFFSET) * query_stride_c)[None, :],
        mask=m_query[None, :],
        other=0,
    )
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
        b_logits = _dot(b_query, b_projected, ACCUMULATOR, UPCAST) + b_bias[None, :] + b_rpb
        b_logits = tl.where(m_step[None, :], b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=1))
        b_weight = tl.exp(b_logits - b_new_max[:, None])
        b_rescale = tl.exp(b_max - b_new_max)
        b_total = b_total * b_rescale + tl.sum(b_weight, axis=1)
        b_max = b_new_max
        # [S, Dv]
        o_value = (o_start_h + o_kernel_h).to(OFFSET) * value_stride_h + (o_start_w + o_kernel_w).to(
            OFFSET
        ) * value_stride_w
        b_value = tl.load(
            p_value + o_value[:, None] + (o_channel.to(OFFSET) * value_stride_c)[None, :],
            mask=m_step[:, None] & m_channel[None, :],
            other=0,
        )
        b_sum = b_sum * b_rescale[:, None] + _dot(b_weight.to(b_value.dtype), b_value, ACCUMULATOR, UPCAST)

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
    groups, channels, query_channels, height, width, tiles,
    KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_tile, _i_window, i_group, i_batch = split_program(tiles, 1, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g

    o_pixel = i_tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    m_pixel = o_pixel < height * width
    # Pixels past the map repeat its last one: their softmax stays finite, and they are not stored.
    o_inside = tl.minimum(o_pixel, height * width - 1)
    o_row, o_column = o_inside // width, o_inside % width
    o_start_h, o_start_w = window_start(o_row, height, KERNEL, 1), window_start(o_column, width, KERNEL, 1)
    o_query = tl.arange(0, BLOCK_QUERY)
    m_query = o_query < query_channels
    o_channel = tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    # [Dq, P]
    b_query = tl.load(
        p_query
        + (o_query.to(OFFSET) * query_stride_c)[:, None]
        + (o_row.to(OFFSET) * query_stride_h + o_column.to(OFFSET) * query_stride_w)[None, :],
        mask=m_query[:, None],
        other=0,
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
        b_logits = _dot(b_projected, b_query, ACCUMULATOR, UPCAST) + b_bias[:, None] + b_rpb
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


MODULES = ("kernels.windows_triton", "kernels.contmix.triton_kernels")
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
    batch, groups, channels, height, width = value.shape
    kernel_size = (rpb.shape[1] + 1) // 2
    shared = shares_windows(height, width, kernel_size)
    if config is None:
        problem = Problem(channels, query.shape[2], height * width, kernel_size, shared, value.dtype)
        arguments = (query, projected, bias, rpb, value)
        trial = Trial(
            lambda config: contmix_one_size(*arguments, out, statistics, config),
            lambda: _reference(*arguments),
        )
        config = choose(FORWARD, problem, value.device, trial)
    if shared:
        # One program per (tile of a window's outputs, window, group, batch entry). At most K//2 + 1 outputs along an
        # axis share a start, or all of them where the window is as long as the axis.
        most = [length if length == kernel_size else kernel_size // 2 + 1 for length in (height, width)]
        tiles = triton.cdiv(most[0] * most[1], config.block_pixels)
        windows = (height - kernel_size + 1) * (width - kernel_size + 1)
    else:
        # One program per (pixel tile, group, batch entry).
        tiles, windows = triton.cdiv(height * width, config.block_pixels), 1
    arguments = {
        "query_ptr": query,
        "projected_ptr": projected,
        "bias_ptr": bias,
        "rpb_ptr": rpb,
        "value_ptr": value,
        "out_ptr": out,
        "statistics_ptr": statistics,
        **stride_arguments("query", query, "b g c h w"),
        **stride_arguments("projected", projected, "b g c k"),
        **stride_arguments("bias", bias, "k"),
        **stride_arguments("rpb", rpb, "g h w"),
        **stride_arguments("value", value, "b g c h w"),
        **stride_arguments("out", out, "b g c h w"),
        **stride_arguments("statistics", statistics, "b g h w"),
        "groups": groups,
        "channels": channels,
        "query_channels": query.shape[2],
        "height": height,
        "width": width,
        "tiles": tiles,
        "KERNEL": kernel_size,
        **precision_arguments(value, query, out),
        # The interpreter's dot returns garbage for bfloat16 operands.
        "UPCAST": interpreting() and value.dtype == torch.bfloat16,
        "BLOCK_PIXELS": config.block_pixels,
        "BLOCK_STEPS": config.block_steps,
        "BLOCK_CHANNELS": max(16, triton.next_power_of_2(channels)),
        "BLOCK_QUERY": max(16, triton.next_power_of_2(query.shape[2])),
    }
    kernel = _shared_windows_kernel if shared else _own_windows_kernel
    grid = (tiles * windows * groups * batch,)
    launch(kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out


def _reference(query: Tensor, projected: Tensor, bias: Tensor, rpb: Tensor, value: Tensor) -> Tensor:
    """The eager path, for the tuner."""
    query, projected, bias, rpb, value = at_least_float32(query, projected, bias, rpb, value)
    sizes = [(rpb.shape[1] + 1) // 2]
    return chunked.forward(query, projected, bias, rpb.flatten(1), value[:, None], sizes, eager)[0][:, 0]


def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: Tensor, value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value, contiguous; log Σ_k exp [B, M, G, H, W]); rpb holds all tables side by side, [G, Σ(2K−1)²]."""
    if value.dtype == torch.float64 and not interpreting():  # no float64 matrix product in Triton on a GPU
        return chunked.forward(query, projected, bias, rpb, value, kernel_sizes, neighborhood_kernels)
    statistics_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    statistics = torch.empty((*value.shape[:3], *value.shape[4:]), dtype=statistics_dtype, device=value.device)
    if value.numel() == 0:
        return out, statistics
    positions = [size**2 for size in kernel_sizes]
    parts = zip(chunked.tables(rpb, kernel_sizes), projected.split(positions, 3), bias.split(positions), strict=True)
    for m, (table, keys, biases) in enumerate(parts):
        contmix_one_size(query, keys, biases, table, value[:, m], out[:, m], statistics[:, m])
    return out, statistics
