# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""The algebra as two Triton kernels: a gather that sums (aggregate, transpose) and one that multiplies (correlate).

``transpose`` is ``aggregate`` read from the other end: each input position looks up the outputs whose windows hold it.
So there are no atomics, every element is written once, and the same input gives the same bits.

Cost per output pixel and group, in elements: aggregate reads K² weights and C values and writes C; correlate reads 2·C
and writes K²; transpose reads K² weights and C gradients and writes C. Neighbouring pixels share all but a few of
their neighbours, which L1 and L2 serve; the dynamic kernel itself is read exactly once and sets the floor.

Blocks are [steps, channels, pixels] in this order, because Triton breaks ties of contiguity towards the last axis:
lanes then run along channels where those are contiguous, along pixels otherwise, and never along the steps, so that
the sum over steps stays inside a thread.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation import eager
from kernels.backend import interpreting
from kernels.dtypes import at_least_float32, precision
from kernels.launch import ceil_divide, launch
from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.tuning import tunable
from kernels.windows import Pair, Window
from kernels.windows_triton import inverse_neighbour, inverse_steps, neighbour, split_program

__all__ = [
    "CONFIGS",
    "Config",
    "Problem",
    "aggregate",
    "block_arguments",
    "correlate",
    "heuristic",
    "stride_arguments",
    "transpose",
    "window_arguments",
]


class Problem(NamedTuple):
    """What the choice of a config depends on. Batch and groups only repeat it."""

    channels: int
    pixels: int
    steps: int
    kernel_fastest: bool = False  # window positions, not pixels, are adjacent in the memory of the dynamic kernel
    channels_fastest: bool = False  # channels, not pixels, are adjacent in the memory of the features
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Config:
    """Tile of one program. ``block_steps`` 1 walks the window position by position; more reads whole kernel rows."""

    block_pixels: int
    block_channels: int
    block_steps: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """At most 64 elements of the largest block a thread, and no block more than twice what it covers."""
        per_thread = self.block_pixels * self.block_channels * self.block_steps / (32 * self.num_warps)
        return (
            per_thread <= 64
            and self.block_pixels < 2 * max(problem.pixels, 16)
            and self.block_channels < 2 * problem.channels
            and self.block_steps < 2 * problem.steps
        )


CONFIGS = tuple(
    Config(pixels, channels, steps, warps)
    for pixels in (16, 32, 64, 128)
    for channels in (16, 32)
    for steps in (1, 16)
    for warps in (4, 8)
    if 4 <= pixels * channels * steps / (32 * warps) <= 64
)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned.

    A dynamic kernel with adjacent window positions is read 16 at a time (32 bytes in bf16, a DRAM sector); one with
    adjacent pixels plane by plane. Channels: all of a group up to 32. Pixels: what gives 128 threads 16 to 64 elements.
    """
    channels = min(triton.next_power_of_2(problem.channels), 32)
    steps = min(triton.next_power_of_2(problem.steps), 16) if problem.kernel_fastest else 1
    pixels = min(128, max(16, 4096 // (channels * steps)), max(16, triton.next_power_of_2(problem.pixels)))
    if interpreting():  # cost there is per block operation, whatever the size of the block
        channels = min(triton.next_power_of_2(problem.channels), 64)
        pixels = min(triton.next_power_of_2(problem.pixels), 2**16 // channels)
        steps = max(1, min(triton.next_power_of_2(problem.steps), 2**19 // (channels * pixels)))
    return Config(pixels, channels, steps)


@triton.jit
def _gather_sum_kernel(
    weight_ptr,  # [B, G, Kh, Kw, H', W']
    source_ptr,  # [B, G, C, source_height, source_width]: x, or the gradient of the output when TRANSPOSED
    target_ptr,  # [B, G, C, target_height, target_width]
    weight_stride_b, weight_stride_g, weight_stride_kh, weight_stride_kw, weight_stride_h, weight_stride_w,
    source_stride_b, source_stride_g, source_stride_c, source_stride_h, source_stride_w,
    target_stride_b, target_stride_g, target_stride_c, target_stride_h, target_stride_w,
    groups, channels, source_height, source_width, target_height, target_width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CLAMPED: tl.constexpr, TRANSPOSED: tl.constexpr, STEPS_H: tl.constexpr, STEPS_W: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, i_channel, i_group, i_batch = split_program(
        tl.cdiv(target_height * target_width, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS), groups
    )
    p_weight = weight_ptr + i_batch * weight_stride_b + i_group * weight_stride_g
    p_source = source_ptr + i_batch * source_stride_b + i_group * source_stride_g
    p_target = target_ptr + i_batch * target_stride_b + i_group * target_stride_g

    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_channel = (i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
    o_row = (o_pixel // target_width)[None, :]
    o_column = (o_pixel % target_width)[None, :]
    m_pixel = (o_pixel < target_height * target_width)[None, :]
    m_channel = o_channel < channels
    p_channel = p_source + (o_channel * source_stride_c)[None, :, None]

    # [C, P]
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATOR)
    for first_step in range(0, STEPS_H * STEPS_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        m_step = m_pixel & (o_step < STEPS_H * STEPS_W)
        # Both [S, P]: where the source is, and the dynamic kernel's entry that weighs it.
        if TRANSPOSED:
            o_source_h, o_kernel_h, m_row = inverse_neighbour(
                o_row,
                o_step // STEPS_W,
                target_height,
                source_height,
                KERNEL_H,
                STRIDE_H,
                PADDING_H,
                DILATION_H,
                CLAMPED,
            )
            o_source_w, o_kernel_w, m_column = inverse_neighbour(
                o_column,
                o_step % STEPS_W,
                target_width,
                source_width,
                KERNEL_W,
                STRIDE_W,
                PADDING_W,
                DILATION_W,
                CLAMPED,
            )
            o_output_h, o_output_w = o_source_h, o_source_w
        else:
            o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
            o_source_h, m_row = neighbour(
                o_row, o_kernel_h, source_height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, CLAMPED
            )
            o_source_w, m_column = neighbour(
                o_column, o_kernel_w, source_width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, CLAMPED
            )
            o_output_h, o_output_w = o_row, o_column
        m_step = m_step & m_row & m_column
        # [S, P]
        b_weight = tl.load(
            p_weight
            + o_kernel_h.to(OFFSET) * weight_stride_kh
            + o_kernel_w.to(OFFSET) * weight_stride_kw
            + o_output_h.to(OFFSET) * weight_stride_h
            + o_output_w.to(OFFSET) * weight_stride_w,
            mask=m_step,
            other=0,
        )
        o_source = o_source_h.to(OFFSET) * source_stride_h + o_source_w.to(OFFSET) * source_stride_w
        # [S, C, P]
        b_source = tl.load(
            p_channel + o_source[:, None, :], mask=m_step[:, None, :] & m_channel[None, :, None], other=0
        )
        b_sum += tl.sum(b_weight[:, None, :].to(ACCUMULATOR) * b_source.to(ACCUMULATOR), axis=0)

    tl.store(
        p_target
        + (o_channel * target_stride_c)[:, None]
        + o_row.to(OFFSET) * target_stride_h
        + o_column.to(OFFSET) * target_stride_w,
        b_sum.to(target_ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel,
    )


@triton.jit
def _correlate_kernel(
    g_ptr,  # [B, G, C, H', W']
    x_ptr,  # [B, G, C, H, W]
    out_ptr,  # [B, G, Kh, Kw, H', W']
    g_stride_b, g_stride_g, g_stride_c, g_stride_h, g_stride_w,
    x_stride_b, x_stride_g, x_stride_c, x_stride_h, x_stride_w,
    out_stride_b, out_stride_g, out_stride_kh, out_stride_kw, out_stride_h, out_stride_w,
    groups, channels, height, width, output_height, output_width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CLAMPED: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    i_pixel, _i_channel, i_group, i_batch = split_program(
        tl.cdiv(output_height * output_width, BLOCK_PIXELS), 1, groups
    )
    p_g = g_ptr + i_batch * g_stride_b + i_group * g_stride_g
    p_x = x_ptr + i_batch * x_stride_b + i_group * x_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g

    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_row = (o_pixel // output_width)[None, :]
    o_column = (o_pixel % output_width)[None, :]
    m_pixel = (o_pixel < output_height * output_width)[None, :]
    o_pixel_g = o_row.to(OFFSET) * g_stride_h + o_column.to(OFFSET) * g_stride_w

    for first_step in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        o_input_h, m_row = neighbour(o_row, o_kernel_h, height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, CLAMPED)
        o_input_w, m_column = neighbour(o_column, o_kernel_w, width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, CLAMPED)
        m_step = m_pixel & (o_step < KERNEL_H * KERNEL_W)
        m_input = m_step & m_row & m_column
        o_input = o_input_h.to(OFFSET) * x_stride_h + o_input_w.to(OFFSET) * x_stride_w
        # [S, P]
        b_sum = tl.zeros([BLOCK_STEPS, BLOCK_PIXELS], ACCUMULATOR)
        for first_channel in range(0, channels, BLOCK_CHANNELS):
            o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
            m_channel = o_channel < channels
            # [C, P]
            b_g = tl.load(p_g + (o_channel * g_stride_c)[:, None] + o_pixel_g, m_channel[:, None] & m_pixel, other=0)
            # [S, C, P]
            b_x = tl.load(
                p_x + (o_channel * x_stride_c)[None, :, None] + o_input[:, None, :],
                mask=m_input[:, None, :] & m_channel[None, :, None],
                other=0,
            )
            b_sum += tl.sum(b_g[None, :, :].to(ACCUMULATOR) * b_x.to(ACCUMULATOR), axis=1)
        tl.store(
            p_out
            + o_kernel_h.to(OFFSET) * out_stride_kh
            + o_kernel_w.to(OFFSET) * out_stride_kw
            + o_row.to(OFFSET) * out_stride_h
            + o_column.to(OFFSET) * out_stride_w,
            b_sum.to(out_ptr.dtype.element_ty),
            mask=m_step,
        )


@functools.lru_cache(maxsize=4096)
def window_arguments(window: Window) -> dict[str, int | bool]:
    """A window as the compile-time arguments every kernel takes."""
    per_axis = {"KERNEL": 0, "STRIDE": 1, "PADDING": 2, "DILATION": 3}
    arguments: dict[str, int | bool] = {}
    for name, field in per_axis.items():
        arguments[f"{name}_H"], arguments[f"{name}_W"] = window[field]  # pyright: ignore[reportGeneralTypeIssues]
    return arguments | {"CLAMPED": window.clamped}


def stride_arguments(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """Strides of ``tensor`` under the names a kernel gives them: ``axes`` "b g c h w" for [B, G, C, H, W]."""
    return dict(zip(_stride_names(name, axes), tensor.stride(), strict=True))


@functools.cache
def _stride_names(name: str, axes: str) -> tuple[str, ...]:
    return tuple(f"{name}_stride_{axis}" for axis in axes.split())


def block_arguments(config: Config) -> dict[str, int]:
    return {
        "BLOCK_PIXELS": config.block_pixels,
        "BLOCK_CHANNELS": config.block_channels,
        "BLOCK_STEPS": config.block_steps,
    }


def problem_of(kernel: Tensor, features: Tensor, size: Pair | torch.Size, steps: int) -> Problem:
    """The problem of a launch over ``size`` = (rows, columns) positions and ``steps`` window steps."""
    return Problem(
        features.shape[2],
        size[0] * size[1],
        steps,
        channels_fastest(kernel),
        channels_fastest(features),
        features.dtype,
    )


def _gather_sum(
    weight: Tensor, source: Tensor, target: Tensor, window: Window, steps: Pair, transposed: bool, config: Config
) -> Tensor:
    batch, groups, channels, height, width = target.shape
    # One program per (pixel tile, channel block, group, batch entry), on one axis: the others end at 65,535.
    pixel_blocks = ceil_divide(height * width, config.block_pixels)
    grid = (pixel_blocks * ceil_divide(channels, config.block_channels) * groups * batch,)
    arguments = {
        "weight_ptr": weight,
        "source_ptr": source,
        "target_ptr": target,
        **stride_arguments("weight", weight, "b g kh kw h w"),
        **stride_arguments("source", source, "b g c h w"),
        **stride_arguments("target", target, "b g c h w"),
        "groups": groups,
        "channels": channels,
        "source_height": source.shape[3],
        "source_width": source.shape[4],
        "target_height": height,
        "target_width": width,
        **window_arguments(window),
        "TRANSPOSED": transposed,
        "STEPS_H": steps[0],
        "STEPS_W": steps[1],
        **precision(weight, source, target),
        **block_arguments(config),
    }
    launch(_gather_sum_kernel, grid, target.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return target


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda weight, x, window: problem_of(weight, x, weight.shape[4:], math.prod(window.kernel_size)),
    reference=lambda weight, x, window: eager.aggregate(*at_least_float32(weight, x), window),
)
def aggregate(weight: Tensor, x: Tensor, window: Window, *, config: Config) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]; [B,G,C,H',W'] in the memory order of x."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    if out.numel() == 0:
        return out
    return _gather_sum(weight, x, out, window, window.kernel_size, transposed=False, config=config)


def _candidates(window: Window, size: Pair) -> Pair:
    """Outputs to be tried per input along each axis."""
    return inverse_steps(window, size[0], 0), inverse_steps(window, size[1], 1)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda weight, g, size, window: problem_of(weight, g, size, math.prod(_candidates(window, size))),
    reference=lambda weight, g, size, window: eager.transpose(*at_least_float32(weight, g), size, window),
)
def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window, *, config: Config) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]; [B,G,C,H,W] in the memory order of g."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    if out.numel() == 0:
        return out
    return _gather_sum(weight, g, out, window, _candidates(window, input_size), transposed=True, config=config)


def _correlation_problem(g: Tensor, x: Tensor, window: Window) -> Problem:
    """As ``problem_of``; the dynamic kernel is written in the memory order of g."""
    steps = math.prod(window.kernel_size)
    return Problem(g.shape[2], g.shape[3] * g.shape[4], steps, channels_fastest(g), channels_fastest(x), x.dtype)


@tunable(
    CONFIGS,
    heuristic,
    problem=_correlation_problem,
    reference=lambda g, x, window: eager.correlate(*at_least_float32(g, x), window),
)
def correlate(g: Tensor, x: Tensor, window: Window, *, config: Config) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H',W'] in the memory order of g."""
    out = empty_kernel_layout(g, window.kernel_size)
    batch, groups, channels, height, width = g.shape
    if out.numel() == 0:
        return out
    # One program per (pixel tile, group, batch entry); it walks the whole window.
    grid = (ceil_divide(height * width, config.block_pixels) * groups * batch,)
    arguments = {
        "g_ptr": g,
        "x_ptr": x,
        "out_ptr": out,
        **stride_arguments("g", g, "b g c h w"),
        **stride_arguments("x", x, "b g c h w"),
        **stride_arguments("out", out, "b g kh kw h w"),
        "groups": groups,
        "channels": channels,
        "height": x.shape[3],
        "width": x.shape[4],
        "output_height": height,
        "output_width": width,
        **window_arguments(window),
        **precision(g, x, out),
        **block_arguments(config),
    }
    launch(_correlate_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out
