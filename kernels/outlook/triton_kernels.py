# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""Outlook attention as two Triton kernels, softmax and overlap-add inside.

A window w holds K² positions; p_w[t, s] = softmax_s(scale · logits_w[t, s]) mixes its sources s into its targets t.

    out[i]    = Σ_{(w,t): pixel(w,t)=i} Σ_s p_w[t, s] · value[pixel(w, s)]
    dvalue[j] = Σ_{(w,s): pixel(w,s)=j} Σ_t p_w[t, s] · dout[pixel(w, t)]
    dlogits_w = scale · p_w ∘ (dp_w − Σ_s p_w ∘ dp_w),    dp_w[t, s] = Σ_c dout[pixel(w, t), c] · value[pixel(w, s), c]

The first two are one kernel, a gather: a pixel looks up the windows that hold it, and in each the other K² positions.
No atomics, every element written once. Which window positions can hold a pixel depends on its row and column modulo the
stride alone, so pixels are taken by such *phases* and visit no window in vain: with K = 3 and stride 2 a pixel is in 1,
2 or 4 windows, 2.25 on average, where a search would try 4.

Cost per pixel and head of 32 channels at K = 3, stride 2: 20 multiply-adds a channel; as many loads, vectors of eight
channels served by L1, where neighbouring pixels share them; 60 loads of logits and 40 exponentials, once a pixel: a
thread owns one. That is 105 instructions of a warp (a third of them multiply-adds, a third conversions from bfloat16),
70 µs for VOLO-D1's 128 x 28² pixels on an H200, whose memory would need 24 µs for 81/4 logits and 2·32 values each.

Weighed and left: to make the logits inside too, from pooled tokens. At that shape it would spare writing and reading
486 logits a window, 49 MB or 11 µs of an H200's memory; but a pixel is in 2.25 windows on average, so that a kernel
that gathers would make each window's logits twice. Four layers of a model that takes milliseconds: below 1 %.

The third line is a kernel of its own, three small matrices a window and head: dp is the product of [K², D] and [D, K²]
on tensor cores. It leaves log2 Σ_s exp2 of every row, by which the second line knows p from one logit.
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

from kernels.aggregation.triton_kernels import stride_arguments
from kernels.backend import interpreting
from kernels.dtypes import accumulator_dtype, at_least_float32, precision
from kernels.launch import ceil_divide, launch
from kernels.outlook import eager
from kernels.tuning import tunable

__all__ = ["CONFIGS", "Config", "Problem", "heuristic", "outlook", "outlook_backward"]


class Problem(NamedTuple):
    """What the choice of a config depends on. Batch and heads only repeat it."""

    channels: int
    pixels: int
    kernel_size: int
    stride: int
    dtype: torch.dtype
    grad_logits: bool = False


@dataclass(frozen=True)
class Config:
    """Tile of one program: items, which are cells of stride x stride pixels or windows, of a head, by its channels."""

    block_items: int
    block_channels: int
    num_warps: int = 4
    num_stages: int = 2

    def per_thread(self, problem: Problem) -> float:
        """Sums a thread has: channels of its pixels, or entries of its windows' logits."""
        columns = padded_positions(problem.kernel_size) ** 2 if problem.grad_logits else self.block_channels
        return self.block_items * columns / (32 * self.num_warps)

    def valid(self, problem: Problem) -> bool:
        """As many sums a thread as registers hold, and no more channels than its products' operands leave room for."""
        most = min(most_channels(problem), 2 * max(problem.channels, 16) - 1)
        return self.per_thread(problem) == sums(problem) and self.block_channels <= most


def sums(problem: Problem) -> int:
    """Sums a thread is to have: fewer leave threads to repeat each other's weights, more leave no registers."""
    most = 16 if problem.grad_logits else 32
    return most if problem.dtype.itemsize == 2 else most // 2


def most_channels(problem: Problem) -> int:
    """Channels a step: float32 products of windows run on CUDA cores, a thread of which holds whole rows of both."""
    return 16 if problem.grad_logits and problem.dtype.itemsize > 2 else 64


CONFIGS = tuple(
    Config(items, channels, warps)
    for items in (1, 2, 4, 8, 16, 32, 64, 128)
    for channels in (16, 32, 64)
    for warps in (2, 4, 8)
)


def padded_positions(kernel_size: int) -> int:
    """K² up to a power of two that a matrix product can reduce over."""
    return max(16, triton.next_power_of_2(kernel_size**2))


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned: all channels of a head up to 64, and two warps, four for windows."""
    channels = max(16, min(64, triton.next_power_of_2(problem.channels)))
    entries = padded_positions(problem.kernel_size) ** 2
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return Config(max(1, 2**19 // entries) if problem.grad_logits else 2**18 // channels, min(channels, 32))
    warps = min(16, max(4, entries // (32 * sums(problem)))) if problem.grad_logits else 2
    columns = entries if problem.grad_logits else channels
    return Config(
        max(1, 32 * warps * sums(problem) // columns),
        min(channels, 32, most_channels(problem)) if problem.grad_logits else channels,
        warps,
    )


@triton.jit
def inside(o_position, length):
    """Whether 0 <= o_position < length, in one comparison: a negative number is a large unsigned one."""
    return o_position.to(tl.uint32, bitcast=True) < length


@triton.jit
def _mix_kernel(
    logits_ptr,  # [B, h, w, heads, K², K²], contiguous
    source_ptr,  # [B, H, W, heads, D]: value, or the gradient of out when TRANSPOSED
    statistics_ptr,  # [B, h, w, heads, K²], contiguous: log2 Σ_s exp2, read when TRANSPOSED
    target_ptr,  # [B, H, W, heads, D]
    source_stride_b, source_stride_h, source_stride_n, source_stride_c,
    target_stride_b, target_stride_h, target_stride_w, target_stride_n, target_stride_c,
    items, heads, channels, height, width, windows_h, windows_w, scale: tl.float64, source_stride_w: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """``scale`` is that of exp2: the operator's times log2 e."""
    POSITIONS: tl.constexpr = KERNEL * KERNEL
    STEPS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    # A pixel has a row of logits to itself in every window; transposed, a column.
    OWN: tl.constexpr = 1 if TRANSPOSED else POSITIONS
    OTHER: tl.constexpr = POSITIONS if TRANSPOSED else 1
    if tl.float32 == ACCUMULATOR:
        scale = tl.cast(scale, tl.float32)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    i_channel = tl.program_id(0) % channel_blocks
    i_item = tl.program_id(0) // channel_blocks
    # An item is (image, cell row, cell column, head), heads fastest as in memory; a cell has one pixel of every phase.
    o_item = i_item * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    o_head = (o_item % heads).to(OFFSET)
    o_cell_w = o_item // heads % windows_w
    o_cell_h = o_item // heads // windows_w % windows_h
    o_image = (o_item // heads // windows_w // windows_h).to(OFFSET)
    o_channel = (i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    m_channel = o_channel < channels
    o_channel = o_channel.to(OFFSET)

    for phase in range(STRIDE * STRIDE):
        o_row = o_cell_h * STRIDE + phase // STRIDE
        o_column = o_cell_w * STRIDE + phase % STRIDE
        m_pixel = (o_item < items) & (o_row < height) & (o_column < width)
        # [P, C]
        b_sum = tl.zeros([BLOCK_ITEMS, BLOCK_CHANNELS], ACCUMULATOR)
        # Loops of constant length, since AMD's compiler takes others for very long ones; the branch costs nothing.
        for step_h in range(STEPS):
            for step_w in range(STEPS):
                kernel_h = (phase // STRIDE + PADDING) % STRIDE + step_h * STRIDE
                kernel_w = (phase % STRIDE + PADDING) % STRIDE + step_w * STRIDE
                if (kernel_h < KERNEL) & (kernel_w < KERNEL):
                    # The window that holds this pixel at (kernel_h, kernel_w); both divisions are exact.
                    o_window_h = (o_row + PADDING - kernel_h) // STRIDE
                    o_window_w = (o_column + PADDING - kernel_w) // STRIDE
                    m_window = m_pixel & (o_row + PADDING >= kernel_h) & (o_window_h < windows_h)
                    m_window &= (o_column + PADDING >= kernel_w) & (o_window_w < windows_w)
                    o_window = ((o_image * windows_h + o_window_h) * windows_w + o_window_w) * heads + o_head
                    p_logits = logits_ptr + o_window * (POSITIONS * POSITIONS) + (kernel_h * KERNEL + kernel_w) * OWN
                    # [P]
                    b_statistics = tl.zeros([BLOCK_ITEMS], ACCUMULATOR)
                    if not TRANSPOSED:
                        b_max = tl.full([BLOCK_ITEMS], float("-inf"), ACCUMULATOR)
                        for other_h in range(KERNEL):
                            for other_w in tl.static_range(KERNEL):
                                b_logit = tl.load(p_logits + other_h * KERNEL + other_w, mask=m_window, other=0)
                                b_max = tl.maximum(b_max, b_logit.to(ACCUMULATOR) * scale)
                        for other_h in range(KERNEL):
                            for other_w in tl.static_range(KERNEL):
                                b_logit = tl.load(p_logits + other_h * KERNEL + other_w, mask=m_window, other=0)
                                b_statistics += tl.exp2(b_logit.to(ACCUMULATOR) * scale - b_max)
                        b_statistics = b_max + tl.log2(b_statistics)

                    o_other_h = o_window_h * STRIDE - PADDING
                    o_other_w = o_window_w * STRIDE - PADDING
                    o_source = (
                        o_image * source_stride_b
                        + o_other_h.to(OFFSET) * source_stride_h
                        + o_other_w.to(OFFSET) * source_stride_w
                        + o_head * source_stride_n
                    )
                    p_source = source_ptr + o_source[:, None] + o_channel * source_stride_c
                    for other_h in range(KERNEL):
                        m_row = m_window & inside(o_other_h + other_h, height)
                        for other_w in tl.static_range(KERNEL):
                            other = other_h * KERNEL + other_w
                            b_logit = tl.load(p_logits + other * OTHER, mask=m_window, other=0).to(ACCUMULATOR)
                            if TRANSPOSED:
                                p_statistics = statistics_ptr + o_window * POSITIONS + other
                                b_statistics = tl.load(p_statistics, mask=m_window, other=0)
                            b_weight = tl.exp2(b_logit * scale - b_statistics)
                            m_other = m_row & inside(o_other_w + other_w, width)
                            # [P, C]
                            p_other = p_source + other_h * source_stride_h + other_w * source_stride_w
                            b_source = tl.load(p_other, mask=m_other[:, None] & m_channel, other=0)
                            b_sum += b_weight[:, None] * b_source.to(ACCUMULATOR)
        o_target = (
            o_image * target_stride_b
            + o_row.to(OFFSET) * target_stride_h
            + o_column.to(OFFSET) * target_stride_w
            + o_head * target_stride_n
        )
        p_target = target_ptr + o_target[:, None] + o_channel * target_stride_c
        tl.store(p_target, b_sum.to(target_ptr.dtype.element_ty), mask=m_pixel[:, None] & m_channel)


@triton.jit
def _load_windows(
    p_image, o_window_h, o_window_w, o_position, m_block, stride_h, stride_w, height, width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Pixels at window positions ``o_position``, 0 where there are none."""
    o_row = o_window_h * STRIDE - PADDING + o_position // KERNEL
    o_column = o_window_w * STRIDE - PADDING + o_position % KERNEL
    m_block &= (o_row >= 0) & (o_row < height) & (o_column >= 0) & (o_column < width) & (o_position < KERNEL * KERNEL)
    return tl.load(p_image + o_row.to(OFFSET) * stride_h + o_column.to(OFFSET) * stride_w, mask=m_block, other=0)


@triton.jit
def _grad_logits_kernel(
    logits_ptr,  # [B, h, w, heads, K², K²], contiguous
    value_ptr,  # [B, H, W, heads, D]
    grad_ptr,  # [B, H, W, heads, D]
    statistics_ptr,  # [B, h, w, heads, K²], contiguous: log2 Σ_s exp2, written
    target_ptr,  # [B, h, w, heads, K², K²], contiguous: the gradient of logits
    value_stride_b, value_stride_h, value_stride_w, value_stride_n, value_stride_c,
    grad_stride_b, grad_stride_h, grad_stride_w, grad_stride_n, grad_stride_c,
    items, heads, channels, height, width, windows_h, windows_w, scale: tl.float64,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
    WIDEN: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """``scale`` is that of exp2: the operator's times log2 e."""
    POSITIONS: tl.constexpr = KERNEL * KERNEL
    LN_2: tl.constexpr = 0.6931471805599453
    if tl.float32 == ACCUMULATOR:
        scale = tl.cast(scale, tl.float32)
    # An item is (image, window row, window column, head), as they lie in memory. Blocks are [W, T, S].
    o_item = (tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS))[:, None, None]
    m_item = o_item < items
    o_head = (o_item % heads).to(OFFSET)
    o_window_w = o_item // heads % windows_w
    o_window_h = o_item // heads // windows_w % windows_h
    o_image = (o_item // heads // windows_w // windows_h).to(OFFSET)
    o_position = tl.arange(0, BLOCK_POSITIONS)[None, :, None]
    o_source = tl.arange(0, BLOCK_POSITIONS)[None, None, :]
    m_logits = m_item & (o_position < POSITIONS) & (o_source < POSITIONS)
    o_logits = (o_item.to(OFFSET) * POSITIONS + o_position) * POSITIONS + o_source
    b_logits = tl.load(logits_ptr + o_logits, mask=m_logits, other=0).to(ACCUMULATOR) * scale
    b_logits = tl.where(o_source < POSITIONS, b_logits, float("-inf"))
    # [W, T, 1]
    b_max = tl.max(b_logits, axis=2, keep_dims=True)
    b_weight = tl.exp2(b_logits - b_max)
    b_total = tl.sum(b_weight, axis=2, keep_dims=True)
    b_weight /= b_total
    p_statistics = statistics_ptr + o_item.to(OFFSET) * POSITIONS + o_position
    tl.store(p_statistics, b_max + tl.log2(b_total), mask=m_item & (o_position < POSITIONS))

    b_grad_weight = tl.zeros([BLOCK_ITEMS, BLOCK_POSITIONS, BLOCK_POSITIONS], ACCUMULATOR)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS))[None, None, :]
        m_channel = m_item & (o_channel < channels)
        o_channel = o_channel.to(OFFSET)
        # [W, T, C], [W, S, C]
        p_grad = grad_ptr + o_image * grad_stride_b + o_head * grad_stride_n + o_channel * grad_stride_c
        b_grad = _load_windows(
            p_grad, o_window_h, o_window_w, o_position, m_channel, grad_stride_h, grad_stride_w, height, width,
            KERNEL, STRIDE, PADDING, OFFSET,
        )  # fmt: skip
        p_value = value_ptr + o_image * value_stride_b + o_head * value_stride_n + o_channel * value_stride_c
        b_value = _load_windows(
            p_value, o_window_h, o_window_w, o_position, m_channel, value_stride_h, value_stride_w, height, width,
            KERNEL, STRIDE, PADDING, OFFSET,
        )  # fmt: skip
        if WIDEN:
            b_grad, b_value = b_grad.to(ACCUMULATOR), b_value.to(ACCUMULATOR)
        b_value = tl.permute(b_value, [0, 2, 1])
        b_grad_weight = tl.dot(b_grad, b_value, b_grad_weight, input_precision="ieee", out_dtype=ACCUMULATOR)
    b_delta = tl.sum(b_weight * b_grad_weight, axis=2, keep_dims=True)
    b_target = b_weight * (b_grad_weight - b_delta) * (scale * LN_2)
    tl.store(target_ptr + o_logits, b_target.to(target_ptr.dtype.element_ty), mask=m_logits)


class Windows(NamedTuple):
    """The operator's numbers, in the order of its schema."""

    kernel_size: int
    stride: int
    padding: int
    scale: float


def _arguments(logits: Tensor, features: dict[str, Tensor], windows: Windows, config: Config) -> dict[str, object]:
    """What both kernels take; ``features`` are [B, H, W, C] by name."""
    batch, windows_h, windows_w, heads = logits.shape[:4]
    views = {name: tensor.unflatten(3, (heads, -1)) for name, tensor in features.items()}
    _, height, width, _, channels = next(iter(views.values())).shape
    items = batch * windows_h * windows_w * heads
    strides: dict[str, object] = {}
    for name, view in views.items():
        strides |= {f"{name}_ptr": view, **stride_arguments(name, view, "b h w n c")}
    return {
        "logits_ptr": logits,
        **strides,
        "items": items,
        "heads": heads,
        "channels": channels,
        "height": height,
        "width": width,
        "windows_h": windows_h,
        "windows_w": windows_w,
        "scale": windows.scale * math.log2(math.e),
        "KERNEL": windows.kernel_size,
        "STRIDE": windows.stride,
        "PADDING": windows.padding,
        **precision(*(tensor[None, None] for tensor in (logits, *views.values()))),
        "BLOCK_ITEMS": min(config.block_items, triton.next_power_of_2(items)),
        "BLOCK_CHANNELS": config.block_channels,
    }


def _problem(logits: Tensor, value: Tensor, windows: Windows, grad_logits: bool = False) -> Problem:
    _, height, width, channels = value.shape
    channels //= logits.shape[3]
    return Problem(channels, height * width, windows.kernel_size, windows.stride, value.dtype, grad_logits)


def _mix(logits: Tensor, source: Tensor, statistics: Tensor | None, windows: Windows, config: Config) -> Tensor:
    """Sums over windows of p times source, or of p transposed where the logits' statistics are given."""
    target = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    arguments = {
        **_arguments(logits, {"source": source, "target": target}, windows, config),
        "statistics_ptr": source if statistics is None else statistics,
        "TRANSPOSED": statistics is not None,
    }
    # One program per (block of channels, block of cells); it takes the cells' phases one after the other.
    channel_blocks = ceil_divide(arguments["channels"], config.block_channels)
    grid = (channel_blocks * ceil_divide(arguments["items"], arguments["BLOCK_ITEMS"]),)
    launch(_mix_kernel, grid, target.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return target


def outlook(
    logits: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
) -> Tensor:
    """logits [B,h,w,heads,K²,K²] (target, source), value [B,H,W,C] -> [B,H,W,C], contiguous."""
    if value.numel() == 0:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return forward(logits.contiguous(), value, Windows(kernel_size, stride, padding, scale))


@tunable(
    CONFIGS,
    heuristic,
    problem=_problem,
    reference=lambda logits, value, windows: eager.outlook(*at_least_float32(logits, value), *windows),
    name="outlook",
)
def forward(logits: Tensor, value: Tensor, windows: Windows, *, config: Config) -> Tensor:
    """``outlook`` for contiguous logits."""
    return _mix(logits, value, None, windows, config)


def _reference_gradients(grad_out: Tensor, logits: Tensor, value: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    return eager.outlook_backward(*at_least_float32(grad_out, logits, value), *windows)


def _reference_grad_logits(grad_out: Tensor, logits: Tensor, value: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    statistics = torch.logsumexp(at_least_float32(logits)[0] * windows.scale, -1) * math.log2(math.e)
    return _reference_gradients(grad_out, logits, value, windows)[0], statistics


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda _grad, logits, value, windows: _problem(logits, value, windows, grad_logits=True),
    reference=_reference_grad_logits,
    name="outlook_grad_logits",
)
def grad_logits(
    grad_out: Tensor, logits: Tensor, value: Tensor, windows: Windows, *, config: Config
) -> tuple[Tensor, Tensor]:
    """scale · p ∘ (dp − Σ_s p ∘ dp) like logits, and log2 Σ_s exp2(scale · log2(e) · logits) [B,h,w,heads,K²]."""
    statistics = torch.empty(logits.shape[:5], dtype=accumulator_dtype(value.dtype), device=value.device)
    target = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    arguments = {
        **_arguments(logits, {"value": value, "grad": grad_out}, windows, config),
        "statistics_ptr": statistics,
        "target_ptr": target,
        "BLOCK_POSITIONS": padded_positions(windows.kernel_size),
        "WIDEN": interpreting(),  # its product of bfloat16 blocks is wrong
    }
    # One program per block of windows and heads.
    grid = (ceil_divide(arguments["items"], arguments["BLOCK_ITEMS"]),)
    launch(_grad_logits_kernel, grid, value.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return target, statistics


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda grad_out, logits, _statistics, windows: _problem(logits, grad_out, windows),
    # The gradient of value does not depend on value.
    reference=lambda grad, logits, _statistics, windows: _reference_gradients(grad, logits, grad, windows)[1],
    name="outlook_grad_value",
)
def grad_value(grad_out: Tensor, logits: Tensor, statistics: Tensor, windows: Windows, *, config: Config) -> Tensor:
    """Σ over the windows that hold j of p[t, j] · grad_out[t], [B,H,W,C], contiguous."""
    return _mix(logits, grad_out, statistics, windows, config)


def outlook_backward(
    grad_out: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value, contiguous."""
    windows = Windows(kernel_size, stride, padding, scale)
    if value.dtype == torch.float64 and not interpreting():  # no float64 matrix product in Triton on every GPU
        return eager.outlook_backward(grad_out, logits, value, *windows)
    if value.numel() == 0:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), torch.empty_like(value)
    logits = logits.contiguous()
    gradient_of_logits, statistics = grad_logits(grad_out, logits, value, windows)
    return gradient_of_logits, grad_value(grad_out, logits, statistics, windows)
