"""Outlook attention as two Triton kernels, softmax and overlap-add inside.

A window w holds K² positions; p_w[t, s] = softmax_s(scale · logits_w[t, s]) mixes its sources s into its targets t.

    out[i]       = Σ_{(w,t): pixel(w,t)=i}  Σ_s p_w[t, s] · value[pixel(w, s)]
    dvalue[j]    = Σ_{(w,s): pixel(w,s)=j}  Σ_t p_w[t, s] · dout[pixel(w, t)]
    dlogits_w    = scale · p_w ∘ (dp_w − Σ_s p_w ∘ dp_w),    dp_w[t, s] = Σ_c dout[pixel(w, t), c] · value[pixel(w, s), c]

The first two are one kernel, a gather: a pixel looks up the windows that hold it, and in each the other K² positions. No
atomics, every element written once. Which window positions can hold a pixel depends on its row and column modulo the
stride only, so a program takes pixels of one such *phase* and visits no window in vain: with K = 3, stride 2 a pixel is
in 1, 2 or 4 windows, 2.25 on average, where a search would try 4.

Cost per pixel and head of D = 32 channels at K = 3, stride 2: 2.25·9 = 20 multiply-adds and as many loads, in vectors of
8, a channel (neighbours share them in L1); 20 logits and 41 exponentials. Memory moves 81/4 logits and 2·32 values.
The third kernel forms dp of a window and head as a matrix product [K², D] x [D, K²] on tensor cores; it also leaves
log Σ exp, one number per window, head and target, by which the second knows p without reading its row again.
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

from kernels.aggregation.triton_kernels import precision_arguments, stride_arguments
from kernels.backend import interpreting
from kernels.launch import launch

__all__ = ["CONFIGS", "Config", "Problem", "heuristic", "outlook", "outlook_backward"]


class Problem(NamedTuple):
    """What the choice of a config depends on."""

    items: int  # pixels of a phase, or windows, of all images and heads
    channels: int  # of a head
    kernel_size: int
    grad_logits: bool = False


@dataclass(frozen=True)
class Config:
    """Tile of one program: pixels (or windows) of any image and head, by channels of a head."""

    block_items: int
    block_channels: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """4 to 32 sums a thread (16 to 64 products for the windows), no block more than twice what it covers."""
        tile = self.block_channels
        if problem.grad_logits:
            tile = padded_positions(problem.kernel_size) ** 2
        per_thread = self.block_items * tile / (32 * self.num_warps)
        return (
            (16 <= per_thread <= 64 if problem.grad_logits else 4 <= per_thread <= 32)
            and self.block_items < 2 * max(problem.items, 16)
            and self.block_channels < 2 * max(problem.channels, 16)
        )


CONFIGS = tuple(
    Config(items, channels, warps)
    for items in (1, 2, 4, 8, 16, 32, 64)
    for channels in (16, 32, 64)
    for warps in (1, 2, 4, 8)
)


def padded_positions(kernel_size: int) -> int:
    """K² up to a power of two that a matrix product can reduce over."""
    return max(16, triton.next_power_of_2(kernel_size**2))


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    channels = max(16, min(64, triton.next_power_of_2(problem.channels)))
    if problem.grad_logits:
        tile = padded_positions(problem.kernel_size) ** 2
        if interpreting():
            return Config(max(1, min(triton.next_power_of_2(problem.items), 2**19 // tile)), min(32, channels))
        return Config(max(1, 4096 // tile), min(32, channels), num_warps=min(16, max(4, tile // 2048)))
    if interpreting():
        return Config(min(triton.next_power_of_2(problem.items), 2**18 // channels), channels)
    return Config(1024 // channels, channels)


@triton.jit
def _mix_kernel(
    logits_ptr,  # [B, h, w, heads, K², K²]
    source_ptr,  # [B, H, W, heads, D]: value, or the gradient of out when TRANSPOSED
    statistics_ptr,  # [B, h, w, heads, K²], contiguous: log Σ_s exp, read when TRANSPOSED
    target_ptr,  # [B, H, W, heads, D]
    logits_stride_b, logits_stride_h, logits_stride_w, logits_stride_n, logits_stride_t, logits_stride_s,
    source_stride_b, source_stride_h, source_stride_w, source_stride_n, source_stride_c,
    target_stride_b, target_stride_h, target_stride_w, target_stride_n, target_stride_c,
    items, heads, channels, height, width, windows_h, windows_w, scale: tl.float64,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PHASES: tl.constexpr,
):  # fmt: skip
    if ACCUMULATOR == tl.float32:
        scale = tl.cast(scale, tl.float32)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    i_channel = tl.program_id(0) % channel_blocks
    i_phase = tl.program_id(0) // channel_blocks % (STRIDE * STRIDE // BLOCK_PHASES)
    i_item = tl.program_id(0) // channel_blocks // (STRIDE * STRIDE // BLOCK_PHASES)

    # An item is (image, row, column, head) of the phase's pixels, heads fastest, as they lie in memory.
    o_item = i_item * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    o_cell = o_item // heads
    o_head = (o_item % heads).to(OFFSET)
    o_image = (o_cell // (windows_h * windows_w)).to(OFFSET)
    o_cell_h = o_cell // windows_w % windows_h
    o_cell_w = o_cell % windows_w
    o_channel = i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    p_logits = logits_ptr + o_image * logits_stride_b + o_head * logits_stride_n
    p_source = (
        source_ptr
        + (o_image * source_stride_b + o_head * source_stride_n)[:, None]
        + (o_channel.to(OFFSET) * source_stride_c)[None, :]
    )
    p_target = (
        target_ptr
        + (o_image * target_stride_b + o_head * target_stride_n)[:, None]
        + (o_channel.to(OFFSET) * target_stride_c)[None, :]
    )

    for phase in range(i_phase * BLOCK_PHASES, (i_phase + 1) * BLOCK_PHASES):
        phase_h, phase_w = phase // STRIDE, phase % STRIDE
        o_row = o_cell_h * STRIDE + phase_h
        o_column = o_cell_w * STRIDE + phase_w
        m_item = (o_item < items) & (o_row < height) & (o_column < width)
        # [P, C]
        b_sum = tl.zeros([BLOCK_ITEMS, BLOCK_CHANNELS], ACCUMULATOR)
        for kernel_h in range((phase_h + PADDING) % STRIDE, KERNEL, STRIDE):
            o_window_h = (o_row + PADDING - kernel_h) // STRIDE
            m_row = m_item & (o_row + PADDING >= kernel_h) & (o_window_h < windows_h)
            for kernel_w in range((phase_w + PADDING) % STRIDE, KERNEL, STRIDE):
                o_window_w = (o_column + PADDING - kernel_w) // STRIDE
                m_window = m_row & (o_column + PADDING >= kernel_w) & (o_window_w < windows_w)
                position = kernel_h * KERNEL + kernel_w
                p_row = p_logits + o_window_h.to(OFFSET) * logits_stride_h + o_window_w.to(OFFSET) * logits_stride_w
                if TRANSPOSED:
                    p_row += position * logits_stride_s
                    o_window = (o_image * windows_h + o_window_h) * windows_w + o_window_w
                    p_statistics = statistics_ptr + (o_window * heads + o_head) * (KERNEL * KERNEL)
                else:
                    p_row += position * logits_stride_t
                    b_max = tl.full([BLOCK_ITEMS], float("-inf"), ACCUMULATOR)
                    for source in tl.static_range(KERNEL * KERNEL):
                        b_logit = tl.load(p_row + source * logits_stride_s, mask=m_window, other=0)
                        b_max = tl.maximum(b_max, b_logit.to(ACCUMULATOR) * scale)
                b_total = tl.zeros([BLOCK_ITEMS], ACCUMULATOR)
                b_mixed = tl.zeros([BLOCK_ITEMS, BLOCK_CHANNELS], ACCUMULATOR)
                o_first_h = o_window_h * STRIDE - PADDING
                o_first_w = o_window_w * STRIDE - PADDING
                p_window = p_source + (o_first_h.to(OFFSET) * source_stride_h + o_first_w.to(OFFSET) * source_stride_w)[:, None]
                for other_h in range(KERNEL):
                    m_other_row = m_window & (o_first_h + other_h >= 0) & (o_first_h + other_h < height)
                    for other_w in tl.static_range(KERNEL):
                        other = other_h * KERNEL + other_w
                        if TRANSPOSED:
                            b_logit = tl.load(p_row + other * logits_stride_t, mask=m_window, other=0)
                            b_shift = tl.load(p_statistics + other, mask=m_window, other=0)
                        else:
                            b_logit = tl.load(p_row + other * logits_stride_s, mask=m_window, other=0)
                            b_shift = b_max
                        b_weight = tl.exp2(b_logit.to(ACCUMULATOR) * scale - b_shift)
                        b_total += b_weight
                        m_other = m_other_row & (o_first_w + other_w >= 0) & (o_first_w + other_w < width)
                        # [P, C]
                        b_source = tl.load(
                            p_window + (other_h * source_stride_h + other_w * source_stride_w),
                            mask=m_other[:, None] & m_channel[None, :],
                            other=0,
                        )
                        b_mixed += b_weight[:, None] * b_source.to(ACCUMULATOR)
                if TRANSPOSED:
                    b_sum += b_mixed
                else:
                    b_sum += b_mixed / b_total[:, None]
        o_target = o_row.to(OFFSET) * target_stride_h + o_column.to(OFFSET) * target_stride_w
        tl.store(p_target + o_target[:, None], b_sum.to(target_ptr.dtype.element_ty), mask=m_item[:, None] & m_channel[None, :])


@triton.jit
def _window_pixels(
    o_window_h, o_window_w, o_position, height, width, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr
):
    """Row and column of window positions, and whether they are inside the image."""
    o_row = o_window_h * STRIDE - PADDING + o_position // KERNEL
    o_column = o_window_w * STRIDE - PADDING + o_position % KERNEL
    inside = (o_row >= 0) & (o_row < height) & (o_column >= 0) & (o_column < width) & (o_position < KERNEL * KERNEL)
    return o_row, o_column, inside


@triton.jit
def _grad_logits_kernel(
    grad_ptr,  # [B, H, W, heads, D]
    logits_ptr,  # [B, h, w, heads, K², K²]
    value_ptr,  # [B, H, W, heads, D]
    statistics_ptr,  # [B, h, w, heads, K²], contiguous: log Σ_s exp, written
    target_ptr,  # [B, h, w, heads, K², K²], contiguous: the gradient of logits
    grad_stride_b, grad_stride_h, grad_stride_w, grad_stride_n, grad_stride_c,
    logits_stride_b, logits_stride_h, logits_stride_w, logits_stride_n, logits_stride_t, logits_stride_s,
    value_stride_b, value_stride_h, value_stride_w, value_stride_n, value_stride_c,
    items, heads, channels, height, width, windows_h, windows_w, scale: tl.float64,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WIDEN: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    POSITIONS: tl.constexpr = KERNEL * KERNEL
    if ACCUMULATOR == tl.float32:
        scale = tl.cast(scale, tl.float32)
    # An item is (image, window row, window column, head), as they lie in memory; blocks are [W, T, S].
    o_item = (tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS))[:, None, None]
    m_item = o_item < items
    o_head = (o_item % heads).to(OFFSET)
    o_window_w = o_item // heads % windows_w
    o_window_h = o_item // heads // windows_w % windows_h
    o_image = (o_item // heads // windows_w // windows_h).to(OFFSET)
    o_target = tl.arange(0, BLOCK_POSITIONS)[None, :, None]
    o_source = tl.arange(0, BLOCK_POSITIONS)[None, None, :]
    m_logits = m_item & (o_target < POSITIONS) & (o_source < POSITIONS)
    o_logits = (
        o_image * logits_stride_b
        + o_window_h.to(OFFSET) * logits_stride_h
        + o_window_w.to(OFFSET) * logits_stride_w
        + o_head * logits_stride_n
    )
    b_logits = tl.load(logits_ptr + o_logits + o_target * logits_stride_t + o_source * logits_stride_s, mask=m_logits, other=0)
    b_logits = tl.where(o_source < POSITIONS, b_logits.to(ACCUMULATOR) * scale, float("-inf"))
    b_max = tl.max(b_logits, axis=2)[:, :, None]
    b_weight = tl.exp2(b_logits - b_max)
    b_total = tl.sum(b_weight, axis=2)[:, :, None]
    b_weight = b_weight / b_total
    tl.store(
        statistics_ptr + o_item.to(OFFSET) * POSITIONS + o_target,
        b_max + tl.log2(b_total),
        mask=m_item & (o_target < POSITIONS),
    )

    o_grad_h, o_grad_w, m_grad = _window_pixels(o_window_h, o_window_w, o_target, height, width, KERNEL, STRIDE, PADDING)
    p_grad = grad_ptr + o_image * grad_stride_b + o_head * grad_stride_n + o_grad_h.to(OFFSET) * grad_stride_h + o_grad_w.to(OFFSET) * grad_stride_w
    # [W, 1, S] -> [W, S, 1]
    o_position = tl.arange(0, BLOCK_POSITIONS)[None, :, None]
    o_value_h, o_value_w, m_value = _window_pixels(o_window_h, o_window_w, o_position, height, width, KERNEL, STRIDE, PADDING)
    p_value = value_ptr + o_image * value_stride_b + o_head * value_stride_n + o_value_h.to(OFFSET) * value_stride_h + o_value_w.to(OFFSET) * value_stride_w
    b_grad_weight = tl.zeros([BLOCK_ITEMS, BLOCK_POSITIONS, BLOCK_POSITIONS], ACCUMULATOR)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS))[None, None, :]
        m_channel = m_item & (o_channel < channels)
        # [W, T, C], [W, S, C]
        b_grad = tl.load(p_grad + o_channel.to(OFFSET) * grad_stride_c, mask=m_grad & m_channel, other=0)
        b_value = tl.load(p_value + o_channel.to(OFFSET) * value_stride_c, mask=m_value & m_channel, other=0)
        if WIDEN:
            b_grad, b_value = b_grad.to(ACCUMULATOR), b_value.to(ACCUMULATOR)
        b_grad_weight = tl.dot(b_grad, tl.permute(b_value, [0, 2, 1]), b_grad_weight, input_precision="ieee", out_dtype=ACCUMULATOR)
    b_delta = tl.sum(b_weight * b_grad_weight, axis=2)[:, :, None]
    b_grad_logits = b_weight * (b_grad_weight - b_delta) * (scale * 0.6931471805599453)
    tl.store(
        target_ptr + o_item.to(OFFSET) * (POSITIONS * POSITIONS) + o_target * POSITIONS + o_source,
        b_grad_logits.to(target_ptr.dtype.element_ty),
        mask=m_logits,
    )


def _arguments(logits: Tensor, value: Tensor, tensors: dict[str, Tensor], kernel_size: int, stride: int, padding: int, scale: float, config) -> dict:
    batch, height, width, _ = value.shape
    _, windows_h, windows_w, heads, _, _ = logits.shape
    views = {name: t.unflatten(3, (heads, -1)) for name, t in tensors.items()}
    arguments = {}
    for name, view in views.items():
        arguments |= {f"{name}_ptr": view, **stride_arguments(name, view, "b h w n c")}
    everything = [v.flatten(0,0)[None, None] for v in (logits, *views.values())]
    return {
        **arguments,
        "logits_ptr": logits,
        **stride_arguments("logits", logits, "b h w n t s"),
        "items": batch * windows_h * windows_w * heads,
        "heads": heads,
        "channels": value.shape[3] // heads,
        "height": height,
        "width": width,
        "windows_h": windows_h,
        "windows_w": windows_w,
        "scale": scale * math.log2(math.e),
        "KERNEL": kernel_size,
        "STRIDE": stride,
        "PADDING": padding,
        **precision_arguments(*everything),
        "BLOCK_ITEMS": config.block_items,
        "BLOCK_CHANNELS": config.block_channels,
    }


def _mix(logits, value, source, statistics, transposed, kernel_size, stride, padding, scale, config):
    target = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if target.numel() == 0:
        return target
    items = logits.shape[0] * logits.shape[1] * logits.shape[2] * logits.shape[3]
    channels = value.shape[3] // logits.shape[3]
    config = config or heuristic(Problem(items, channels, kernel_size))
    # One program per (block of channels, phase, block of a phase's pixels and heads).
    grid = (triton.cdiv(channels, config.block_channels) * triton.cdiv(items, config.block_items),)
    arguments = {
        **_arguments(logits, value, {"source": source, "target": target}, kernel_size, stride, padding, scale, config),
        "statistics_ptr": source if statistics is None else statistics,
        "TRANSPOSED": transposed,
        "BLOCK_PHASES": stride**2,
    }
    launch(_mix_kernel, grid, target.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return target


def outlook(logits, value, kernel_size, stride, padding, scale, config=None):
    return _mix(logits, value, value, None, False, kernel_size, stride, padding, scale, config)


def outlook_backward(grad, logits, value, kernel_size, stride, padding, scale, config=None):
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    items = logits.shape[0] * logits.shape[1] * logits.shape[2] * logits.shape[3]
    statistics_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    statistics = torch.empty(logits.shape[:5], dtype=statistics_dtype, device=logits.device)
    if logits.numel():
        c = heuristic(Problem(items, value.shape[3] // logits.shape[3], kernel_size, grad_logits=True))
        grid = (triton.cdiv(items, c.block_items),)
        arguments = {
            **_arguments(logits, value, {"grad": grad, "value": value}, kernel_size, stride, padding, scale, c),
            "statistics_ptr": statistics,
            "target_ptr": grad_logits,
            "WIDEN": interpreting(), "BLOCK_POSITIONS": padded_positions(kernel_size),
        }
        launch(_grad_logits_kernel, grid, logits.device, arguments, num_warps=c.num_warps, num_stages=c.num_stages)
    grad_value = _mix(logits, value, grad, statistics, True, kernel_size, stride, padding, scale, config)
    return grad_logits, grad_value
