# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""What ContMix's kernels share: tiles of outputs, the logits and softmax weights of a tile, the choice of a config.

Two formulations of everything, chosen by ``SHARED``:

*Shared windows.* Clamping makes outputs share windows: along an axis of length L there are only L − K + 1 starts, at
14x14 with K = 13 four windows for 196 outputs, at 7x7 with K = 7 one. A tile holds outputs of one window, and every
sum over window positions is a small matrix product, on tensor cores.

*Own windows.* Elsewhere nearly every output has a window of its own. The logits still are a matrix product, because the
projected keys are the same for all pixels; values are gathered, and summed in registers.

The first is taken where a window serves at least 16 outputs on average, the least that fills a matrix product's rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.triton_kernels import precision_arguments, stride_arguments
from kernels.backend import interpreting
from kernels.launch import ceil_divide
from kernels.windows_triton import window_start

__all__ = [
    "CONFIGS",
    "Config",
    "Problem",
    "Saved",
    "cost",
    "dot",
    "grad_logits",
    "heuristic",
    "load_pixels",
    "outputs_of_tile",
    "problem_of",
    "shares_windows",
    "tensor_arguments",
    "tile_arguments",
    "tiles_and_windows",
    "weights_of_tile",
    "window_starts",
]

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
        """Registers: the widest block, [S, C, P] when gathering, at most 64 elements a thread, and [P, S] when not, at
        most 32: products keep both their operands too."""
        channels = max(16, triton.next_power_of_2(problem.channels))
        widest = self.block_pixels * max(self.block_steps, channels)
        if not problem.shared:
            widest = self.block_pixels * self.block_steps * channels
        return (
            4 <= widest / (32 * self.num_warps) <= (32 if problem.shared else 64)
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
    steps = ceil_divide(problem.kernel_size**2, config.block_steps) * config.block_steps
    pixels = ceil_divide(problem.pixels, config.block_pixels) * config.block_pixels
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


def tiles_and_windows(height: int, width: int, kernel_size: int, block_pixels: int) -> tuple[int, int]:
    """How many tiles a window's outputs fill, or the map where windows are not shared; and how many windows there are.

    At most K//2 + 1 outputs along an axis share a start, or all of them where the window is as long as the axis.
    """
    if not shares_windows(height, width, kernel_size):
        return ceil_divide(height * width, block_pixels), 1
    most = [length if length == kernel_size else kernel_size // 2 + 1 for length in (height, width)]
    return ceil_divide(most[0] * most[1], block_pixels), (height - kernel_size + 1) * (width - kernel_size + 1)


def problem_of(query: Tensor, rpb: Tensor, value: Tensor) -> Problem:
    channels, height, width = value.shape[2:]
    kernel_size = (rpb.shape[1] + 1) // 2
    shared = shares_windows(height, width, kernel_size)
    return Problem(channels, query.shape[2], height * width, kernel_size, shared, value.dtype)


AXES = {
    "query": "b g c h w",
    "projected": "b g c k",
    "bias": "k",
    "rpb": "g h w",
    "value": "b g c h w",
    "out": "b g c h w",
    "statistics": "b g h w",
    "grad": "b g c h w",
    "delta": "b g h w",
    "target": "b g c h w",
}


def tensor_arguments(**tensors: Tensor) -> dict[str, Any]:
    """Pointers and strides of a kernel's tensors, under the names that all ContMix kernels give them."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        arguments[f"{name}_ptr"] = tensor
        arguments |= stride_arguments(name, tensor, AXES[name])
    return arguments


class Saved(NamedTuple):
    """What the backward pass of one kernel size reads: the output's gradient, the inputs, and what forward left."""

    grad: Tensor  # [B, G, Dv, H, W]
    query: Tensor  # [B, G, Dq, H, W]
    projected: Tensor  # [B, G, Dq, K²]
    bias: Tensor  # [K²]
    rpb: Tensor  # [G, 2K-1, 2K-1]
    value: Tensor  # [B, G, Dv, H, W]
    out: Tensor  # [B, G, Dv, H, W]
    statistics: Tensor  # [B, G, H, W]: log Σ_k exp

    def but(self, *names: str) -> dict[str, Tensor]:
        """Its tensors by name, those called so left out."""
        return {name: tensor for name, tensor in self._asdict().items() if name not in names}


def tile_arguments(config: Config, query: Tensor, rpb: Tensor, value: Tensor, *others: Tensor) -> dict[str, Any]:
    """The arguments of every ContMix kernel but its tensors and their strides; all tensors decide the offsets' type."""
    problem = problem_of(query, rpb, value)
    height, width = value.shape[3:]
    tiles, windows = tiles_and_windows(height, width, problem.kernel_size, config.block_pixels)
    return {
        "groups": value.shape[1],
        "channels": problem.channels,
        "query_channels": problem.query_channels,
        "height": height,
        "width": width,
        "tiles": tiles,
        "windows": windows,
        "SHARED": problem.shared,
        "KERNEL": problem.kernel_size,
        **precision_arguments(value, query, *others),
        # The interpreter's dot returns garbage for bfloat16 operands.
        "UPCAST": interpreting() and value.dtype == torch.bfloat16,
        "BLOCK_PIXELS": config.block_pixels,
        "BLOCK_STEPS": config.block_steps,
        "BLOCK_CHANNELS": max(16, triton.next_power_of_2(problem.channels)),
        "BLOCK_QUERY": max(16, triton.next_power_of_2(problem.query_channels)),
    }


@triton.jit
def dot(a, b, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b, summed in the accumulator type; float32 exactly, not in tf32."""
    if UPCAST:
        a, b = a.to(ACCUMULATOR), b.to(ACCUMULATOR)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACCUMULATOR)


@triton.jit
def _outputs_of_start(o_start, length, KERNEL: tl.constexpr):
    """(first, number) of the outputs along an axis whose clamped window begins at ``o_start``."""
    first = tl.where(o_start == 0, 0, o_start + KERNEL // 2)
    last = tl.where(o_start == length - KERNEL, length - 1, o_start + KERNEL // 2)
    return first, last - first + 1


@triton.jit
def outputs_of_tile(
    i_tile, i_window, height, width, SHARED: tl.constexpr, KERNEL: tl.constexpr, BLOCK_PIXELS: tl.constexpr
):
    """Row, column [P] of a tile's outputs, those of one window or of the map, and which there are; the others repeat
    the last one, so that their softmax is finite."""
    o_output = i_tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    first_h, first_w, outputs_h, outputs_w = 0, 0, height, width
    if SHARED:
        windows_w = width - KERNEL + 1
        first_h, outputs_h = _outputs_of_start(i_window // windows_w, height, KERNEL)
        first_w, outputs_w = _outputs_of_start(i_window % windows_w, width, KERNEL)
    o_inside = tl.minimum(o_output, outputs_h * outputs_w - 1)
    return first_h + o_inside // outputs_w, first_w + o_inside % outputs_w, o_output < outputs_h * outputs_w


@triton.jit
def window_starts(o_row, o_column, i_window, height, width, SHARED: tl.constexpr, KERNEL: tl.constexpr):
    """Where the windows of a tile's outputs begin: two numbers where they share one, two blocks [P] otherwise."""
    if SHARED:
        windows_w = width - KERNEL + 1
        o_start_h, o_start_w = i_window // windows_w, i_window % windows_w
    else:
        o_start_h, o_start_w = window_start(o_row, height, KERNEL, 1), window_start(o_column, width, KERNEL, 1)
    return o_start_h, o_start_w


@triton.jit
def load_pixels(pointer, o_channel, m_channel, o_row, o_column, m_pixel, stride_c, stride_h, stride_w, OFFSET):
    """[C, P] of a map [C, H, W]; in this order lanes run along pixels unless channels are adjacent in memory."""
    o_pixel = o_row.to(OFFSET) * stride_h + o_column.to(OFFSET) * stride_w
    return tl.load(
        pointer + (o_channel.to(OFFSET) * stride_c)[:, None] + o_pixel[None, :],
        mask=m_channel[:, None] & m_pixel[None, :],
        other=0,
    )


@triton.jit
def weights_of_tile(
    b_query, b_statistics, p_projected, bias_ptr, p_rpb, o_query, m_query, o_step, m_step, o_rpb,
    projected_stride_c, projected_stride_k, bias_stride_k, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The softmax [P, S] of a tile's outputs at window positions ``o_step`` [S], 0 where ``m_step`` is off, recovered
    from b_statistics [P] = log Σ_k exp; and the projected keys [Dq, S].

    b_query [P, Dq]; o_rpb [P, S]: offsets into the bias table.
    """
    b_projected = tl.load(
        p_projected + (o_query * projected_stride_c)[:, None] + (o_step * projected_stride_k)[None, :],
        mask=m_query[:, None] & m_step[None, :],
        other=0,
    )
    b_bias = tl.load(bias_ptr + o_step * bias_stride_k, mask=m_step, other=0).to(ACCUMULATOR)
    b_rpb = tl.load(p_rpb + o_rpb, mask=m_step[None, :], other=0).to(ACCUMULATOR)
    b_logits = dot(b_query, b_projected, ACCUMULATOR, UPCAST) + b_bias[None, :] + b_rpb
    return tl.where(m_step[None, :], tl.exp(b_logits - b_statistics[:, None]), 0.0), b_projected


@triton.jit
def grad_logits(
    b_query, b_grad, b_statistics, b_delta, p_projected, bias_ptr, p_rpb, p_value,
    o_query, m_query, o_channel, m_channel, first_step, o_row, o_column, o_start_h, o_start_w,
    projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
    value_stride_c, value_stride_h, value_stride_w,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    """p · (dp − δ) [P, S] at window positions from ``first_step`` on, dp = Σ_c grad · value; and projected [Dq, S].

    b_query [P, Dq], b_grad [C, P], b_statistics [P] = log Σ_k exp, b_delta [P] = Σ_c grad · out.
    """
    o_step = first_step + tl.arange(0, BLOCK_STEPS)
    m_step = o_step < KERNEL * KERNEL
    o_kernel_h, o_kernel_w = o_step // KERNEL, o_step % KERNEL
    o_rpb_h = (o_start_h - o_row + KERNEL - 1)[:, None] + o_kernel_h[None, :]
    o_rpb_w = (o_start_w - o_column + KERNEL - 1)[:, None] + o_kernel_w[None, :]
    b_weight, b_projected = weights_of_tile(
        b_query, b_statistics, p_projected, bias_ptr, p_rpb, o_query, m_query, o_step, m_step,
        o_rpb_h * rpb_stride_h + o_rpb_w * rpb_stride_w,
        projected_stride_c, projected_stride_k, bias_stride_k, ACCUMULATOR, UPCAST,
    )  # fmt: skip
    p_channel = p_value + o_channel.to(OFFSET) * value_stride_c
    if SHARED:
        # [C, S]
        o_value_h = (o_start_h + o_kernel_h).to(OFFSET) * value_stride_h
        o_value_w = (o_start_w + o_kernel_w).to(OFFSET) * value_stride_w
        m_value = m_channel[:, None] & m_step[None, :]
        b_value = tl.load(p_channel[:, None] + (o_value_h + o_value_w)[None, :], mask=m_value, other=0)
        b_product = dot(tl.trans(b_grad), b_value, ACCUMULATOR, UPCAST)
    else:
        # [S, C, P]: lanes along pixels or channels, never along the steps
        o_value_h = (o_start_h[None, :] + o_kernel_h[:, None]).to(OFFSET) * value_stride_h
        o_value_w = (o_start_w[None, :] + o_kernel_w[:, None]).to(OFFSET) * value_stride_w
        m_value = m_step[:, None, None] & m_channel[None, :, None]
        b_value = tl.load(p_channel[None, :, None] + (o_value_h + o_value_w)[:, None, :], mask=m_value, other=0)
        b_product = tl.trans(tl.sum(b_value.to(ACCUMULATOR) * b_grad.to(ACCUMULATOR)[None, :, :], axis=1))
    return b_weight * (b_product - b_delta[:, None]), b_projected
