# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""Involution with its kernels generated inside: no [B, G, K, K, H', W'] tensor exists.

Per pixel and group of C channels a launch reads R features (shared by all groups, from L2) and C channels and writes C;
the unfused pair of span convolution and aggregate writes and reads K² kernel entries as well: at K = 7, C = 16 and
RedNet's reduction by 4 some 36 elements instead of 130. Multiply-adds: R·K² on tensor cores and C·K² on CUDA cores,
which then set the floor where memory sets the unfused pair's.

A program owns a tile of pixels of one group. A step generates the weights of a block of window positions as a matrix
product [S, R] @ [R, P], gathers the inputs they weigh, [S, C, P], and sums over S in registers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation import eager
from kernels.aggregation import triton_kernels as algebra
from kernels.aggregation.triton_kernels import stride_arguments, window_arguments
from kernels.backend import interpreting
from kernels.dtypes import at_least_float32, precision, upcast
from kernels.involution import generate
from kernels.launch import ceil_divide, launch
from kernels.layout import channels_fastest, empty_like_layout
from kernels.tuning import tunable
from kernels.windows import Window
from kernels.windows_triton import neighbour, split_program

__all__ = ["CONFIGS", "Config", "Problem", "heuristic", "involution_generate"]


class Problem(NamedTuple):
    """What the choice of a config depends on."""

    channels: int
    features: int
    pixels: int
    steps: int
    channels_fastest: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Config:
    """Tile of one program; a step takes ``block_steps`` window positions and ``block_features`` features a product."""

    block_pixels: int
    block_channels: int
    block_steps: int
    block_features: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """At most 64 elements of the largest block a thread, and no block more than twice what it covers."""
        per_thread = self.block_pixels * self.block_channels * self.block_steps / (32 * self.num_warps)
        return (
            4 <= per_thread <= 64
            and self.block_pixels < 2 * max(problem.pixels, 16)
            and self.block_channels < 2 * problem.channels
            and self.block_features < 2 * max(problem.features, 16)
        )


CONFIGS = tuple(
    Config(pixels, channels, 16, features, warps)
    for pixels in (16, 32, 64)
    for channels in (4, 8, 16)
    for features in (16, 32, 64)
    for warps in (4, 8)
    if 4 <= pixels * channels * 16 / (32 * warps) <= 64
)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned: a group's channels up to 16, 32 elements a thread, all features up to 64."""
    features = max(16, min(triton.next_power_of_2(problem.features), 64))
    channels = min(triton.next_power_of_2(problem.channels), 16)
    if interpreting():  # cost there is per block operation, whatever the size of the block
        pixels = min(max(16, triton.next_power_of_2(problem.pixels)), 1024)
        return Config(pixels, channels, 16, features)
    pixels = min(64, max(16, 4096 // (16 * channels)), max(16, triton.next_power_of_2(problem.pixels)))
    return Config(pixels, channels, 16, features)


@triton.jit
def _involution_generate_kernel(
    x_ptr,  # [B, G, C, H, W]
    features_ptr,  # [B, R, H', W']
    weight_ptr,  # [G·Kh·Kw, R]
    bias_ptr,  # [G·Kh·Kw], not read without HAS_BIAS
    out_ptr,  # [B, G, C, H', W']
    x_stride_b, x_stride_g, x_stride_c, x_stride_h, x_stride_w,
    features_stride_b, features_stride_r, features_stride_h, features_stride_w,
    weight_stride_k, weight_stride_r, bias_stride_k,
    out_stride_b, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    groups, channels, features, height, width, output_height, output_width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CLAMPED: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    i_pixel, i_channel, i_group, i_batch = split_program(
        tl.cdiv(output_height * output_width, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS), groups
    )
    STEPS: tl.constexpr = KERNEL_H * KERNEL_W
    p_x = x_ptr + i_batch * x_stride_b + i_group * x_stride_g
    p_features = features_ptr + i_batch * features_stride_b
    p_weight = weight_ptr + i_group * STEPS * weight_stride_k
    p_bias = bias_ptr + i_group * STEPS * bias_stride_k
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g

    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_channel = (i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
    o_row = (o_pixel // output_width)[None, :]
    o_column = (o_pixel % output_width)[None, :]
    m_pixel = (o_pixel < output_height * output_width)[None, :]
    m_channel = o_channel < channels
    o_pixel_features = o_row.to(OFFSET) * features_stride_h + o_column.to(OFFSET) * features_stride_w

    # [C, P]
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATOR)
    for first_step in range(0, STEPS, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        # The dynamic kernel's entries of this step, [S, P]
        b_kernel = tl.zeros([BLOCK_STEPS, BLOCK_PIXELS], ACCUMULATOR)
        for first_feature in range(0, features, BLOCK_FEATURES):
            o_feature = first_feature + tl.arange(0, BLOCK_FEATURES)
            # [S, R]
            b_weight = tl.load(
                p_weight + o_step * weight_stride_k + (o_feature * weight_stride_r)[None, :],
                mask=(o_step < STEPS) & (o_feature < features)[None, :],
                other=0,
            )
            # [R, P]
            b_features = tl.load(
                p_features + (o_feature.to(OFFSET) * features_stride_r)[:, None] + o_pixel_features,
                mask=(o_feature < features)[:, None] & m_pixel,
                other=0,
            )
            if UPCAST:
                b_weight, b_features = b_weight.to(ACCUMULATOR), b_features.to(ACCUMULATOR)
            b_kernel += tl.dot(b_weight, b_features, input_precision="ieee", out_dtype=ACCUMULATOR)
        if HAS_BIAS:
            b_kernel += tl.load(p_bias + o_step * bias_stride_k, mask=o_step < STEPS, other=0).to(ACCUMULATOR)
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        o_input_h, m_row = neighbour(o_row, o_kernel_h, height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, CLAMPED)
        o_input_w, m_column = neighbour(o_column, o_kernel_w, width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, CLAMPED)
        m_input = m_pixel & (o_step < STEPS) & m_row & m_column
        o_input = o_input_h.to(OFFSET) * x_stride_h + o_input_w.to(OFFSET) * x_stride_w
        # [S, C, P]
        b_x = tl.load(
            p_x + (o_channel * x_stride_c)[None, :, None] + o_input[:, None, :],
            mask=m_input[:, None, :] & m_channel[None, :, None],
            other=0,
        ).to(ACCUMULATOR)
        b_sum += tl.sum(b_kernel[:, None, :] * b_x, axis=0)

    tl.store(
        p_out
        + (o_channel * out_stride_c)[:, None]
        + o_row.to(OFFSET) * out_stride_h
        + o_column.to(OFFSET) * out_stride_w,
        b_sum.to(out_ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel,
    )


def _reference(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The eager path, for the tuner."""
    x, features, weight = at_least_float32(x, features, weight)
    bias = None if bias is None else at_least_float32(bias)[0]
    return generate.forward(x, features, weight, bias, window, eager)


def _problem(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Problem:
    pixels, steps = features.shape[2] * features.shape[3], window.kernel_size[0] * window.kernel_size[1]
    return Problem(x.shape[2], features.shape[1], pixels, steps, channels_fastest(x), x.dtype)


@tunable(CONFIGS, heuristic, problem=_problem, reference=_reference)
def involution_generate(
    x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window, *, config: Config
) -> Tensor:
    """[B, G, C, H', W'] in the memory order of x [B, G, C, H, W]."""
    if x.dtype == torch.float64 and not interpreting():  # no float64 matrix product in Triton on a GPU
        return generate.forward(x, features, weight, bias, window, algebra)
    batch, groups, channels, height, width = x.shape
    output_height, output_width = features.shape[2:]
    out = empty_like_layout(x, (batch, groups, channels, output_height, output_width))
    if out.numel() == 0:
        return out
    # One program per (pixel tile, channel block, group, batch entry).
    pixel_blocks = ceil_divide(output_height * output_width, config.block_pixels)
    grid = (pixel_blocks * ceil_divide(channels, config.block_channels) * groups * batch,)
    arguments = {
        "x_ptr": x,
        "features_ptr": features,
        "weight_ptr": weight,
        "bias_ptr": weight if bias is None else bias,
        "out_ptr": out,
        **stride_arguments("x", x, "b g c h w"),
        **stride_arguments("features", features, "b r h w"),
        **stride_arguments("weight", weight, "k r"),
        "bias_stride_k": 0 if bias is None else bias.stride(0),
        **stride_arguments("out", out, "b g c h w"),
        "groups": groups,
        "channels": channels,
        "features": features.shape[1],
        "height": height,
        "width": width,
        "output_height": output_height,
        "output_width": output_width,
        **window_arguments(window),
        "HAS_BIAS": bias is not None,
        **precision(x, out, features[:, None]),
        "UPCAST": upcast(x.dtype),
        "BLOCK_PIXELS": config.block_pixels,
        "BLOCK_CHANNELS": config.block_channels,
        "BLOCK_STEPS": config.block_steps,
        "BLOCK_FEATURES": config.block_features,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_involution_generate_kernel, grid, out.device, arguments, **options)
    return out
