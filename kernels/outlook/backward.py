# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Gradients of outlook attention: that of value by the forward's kernel transposed, that of the logits by this one.

    dlogits_w = scale · p_w ∘ (dp_w − Σ_s p_w ∘ dp_w),    dp_w[t, s] = Σ_c dout[pixel(w, t), c] · value[pixel(w, s), c]

It leaves log2 Σ_s exp2 of every row, by which the gradient of value knows p from one logit. Up to K = 3 the values of
a window's sources stay in registers while its targets are taken one after the other.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.launch import launch
from kernels.outlook import eager
from kernels.outlook.configs import CONFIGS, Config, heuristic
from kernels.outlook.forward import mix
from kernels.outlook.tiles import (
    Windows,
    block_of,
    by_head,
    common_arguments,
    entries_of,
    inside,
    load_pixels,
    pixel_pointers,
    problem_of,
    softmax,
    tile_of,
)
from kernels.tuning import tunable
from kernels.views import aligned, view


@triton.jit
def _grad_logits_kernel(
    logits_ptr,  # [B, h, w, heads, K², K²], contiguous
    value,  # [B, H, W, heads, D]
    grad,  # [B, H, W, heads, D]
    statistics_ptr,  # [B, h, w, heads, K²], contiguous: log2 Σ_s exp2, written
    target_ptr,  # [B, h, w, heads, K², K²], contiguous: the gradient of logits
    sizes, scale: tl.float64, VALUE_COLUMN: tl.constexpr, GRAD_COLUMN: tl.constexpr, ALIGNED: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, UNROLLED: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """``scale`` is that of exp2: the operator's times log2 e."""
    POSITIONS: tl.constexpr = KERNEL * KERNEL
    BLOCK_POSITIONS: tl.constexpr = triton.next_power_of_2(POSITIONS)
    LN_2: tl.constexpr = 0.6931471805599453
    if tl.float32 == ACCUMULATOR:
        scale = tl.cast(scale, tl.float32)
    value, grad = aligned(value, ALIGNED), aligned(grad, ALIGNED)
    tile = tile_of(sizes, 0, tl.program_id(0), ALIGNED, OFFSET, BLOCK_WINDOWS, BLOCK_HEADS, BLOCK_CHANNELS)
    o_row, o_column = tile.row * STRIDE - PADDING, tile.column * STRIDE - PADDING
    p_value = pixel_pointers(value, tile, o_row, o_column, VALUE_COLUMN, OFFSET)
    p_grad = pixel_pointers(grad, tile, o_row, o_column, GRAD_COLUMN, OFFSET)
    # [P, G, S]
    o_entry = tl.arange(0, BLOCK_POSITIONS)[None, None, :]
    o_item, m_item = tile.item[:, :, None], tile.m_item[:, :, None]
    m_entry = m_item & (o_entry < POSITIONS)
    o_logits = o_item * (POSITIONS * POSITIONS) + o_entry

    if UNROLLED:
        masks, values, statistics = (), (), ()
        for s in tl.static_range(POSITIONS):
            m_row, m_column = inside(o_row + s // KERNEL, sizes.height), inside(o_column + s % KERNEL, sizes.width)
            masks = masks + (tile.m_x & (m_row & m_column)[:, None],)
            p_source = p_value + tl.cast(s // KERNEL, OFFSET) * value.h + (s % KERNEL) * VALUE_COLUMN
            values = values + (load_pixels(p_source, masks[s], ACCUMULATOR, BLOCK_HEADS, BLOCK_CHANNELS),)
        rows, grads = (), ()
        for t in tl.static_range(POSITIONS):
            # Loads do not pass stores: those of the next target come before this one's.
            for ahead in tl.static_range(t + (t > 0), min(t + 2, POSITIONS)):
                rows = rows + (tl.load(logits_ptr + o_logits + ahead * POSITIONS, mask=m_entry, other=0),)
                p_target = p_grad + tl.cast(ahead // KERNEL, OFFSET) * grad.h + (ahead % KERNEL) * GRAD_COLUMN
                grads = grads + (tl.load(p_target, mask=masks[ahead], other=0),)
            b_logits = rows[t].to(ACCUMULATOR) * scale
            b_grad = tl.reshape(grads[t], values[0].shape).to(ACCUMULATOR)
            weights, b_total, b_max = softmax(entries_of(b_logits, POSITIONS))
            statistics = statistics + (b_max + tl.log2(b_total),)
            products, b_delta = (), tl.zeros_like(b_max)
            for s in tl.static_range(POSITIONS):
                b_product = tl.sum(b_grad * values[s], 2, keep_dims=True)
                products, b_delta = products + (b_product,), b_delta + weights[s] * b_product
            b_delta /= b_total
            b_factor, gradients = scale * LN_2 / b_total, ()
            for s in tl.static_range(POSITIONS):
                b_gradient = weights[s] * b_factor * (products[s] - b_delta)
                gradients = gradients + (b_gradient.to(target_ptr.dtype.element_ty),)
            tl.store(target_ptr + o_logits + t * POSITIONS, block_of(gradients, BLOCK_POSITIONS), mask=m_entry)
        tl.store(statistics_ptr + o_item * POSITIONS + o_entry, block_of(statistics, BLOCK_POSITIONS), mask=m_entry)
    else:
        for t in range(POSITIONS):
            b_logits = tl.load(logits_ptr + o_logits + t * POSITIONS, mask=m_entry, other=0).to(ACCUMULATOR) * scale
            b_logits = tl.where(o_entry < POSITIONS, b_logits, float("-inf"))
            b_max = tl.max(b_logits, 2, keep_dims=True)
            b_statistics = b_max + tl.log2(tl.sum(tl.exp2(b_logits - b_max), 2, keep_dims=True))
            tl.store(statistics_ptr + o_item * POSITIONS + t, b_statistics, mask=m_item)
            b_weights = tl.exp2(b_logits - b_statistics)
            m_target = inside(o_row + t // KERNEL, sizes.height) & inside(o_column + t % KERNEL, sizes.width)
            o_target = tl.cast(t // KERNEL, OFFSET) * grad.h + tl.cast(t % KERNEL, OFFSET) * GRAD_COLUMN
            b_products = tl.zeros([BLOCK_WINDOWS, BLOCK_HEADS, BLOCK_POSITIONS], ACCUMULATOR)
            for first in range(0, sizes.channels, BLOCK_CHANNELS):
                m_channel = tile.m_x & (tile.channel + first < sizes.channels)
                o_channel = tl.cast(first, OFFSET)
                b_grad = load_pixels(
                    p_grad + o_target + o_channel * grad.c, m_channel & m_target[:, None],
                    ACCUMULATOR, BLOCK_HEADS, BLOCK_CHANNELS,
                )  # fmt: skip
                for s in range(POSITIONS):
                    m_source = inside(o_row + s // KERNEL, sizes.height) & inside(o_column + s % KERNEL, sizes.width)
                    o_source = tl.cast(s // KERNEL, OFFSET) * value.h + tl.cast(s % KERNEL, OFFSET) * VALUE_COLUMN
                    b_value = load_pixels(
                        p_value + o_source + o_channel * value.c, m_channel & m_source[:, None],
                        ACCUMULATOR, BLOCK_HEADS, BLOCK_CHANNELS,
                    )  # fmt: skip
                    b_products += tl.where(o_entry == s, tl.sum(b_grad * b_value, 2, keep_dims=True), 0.0)
            b_delta = tl.sum(b_weights * b_products, 2, keep_dims=True)
            b_gradients = b_weights * (b_products - b_delta) * (scale * LN_2)
            p_row = target_ptr + o_logits + t * POSITIONS
            tl.store(p_row, b_gradients.to(target_ptr.dtype.element_ty), mask=m_entry)


def _reference_gradients(grad_out: Tensor, logits: Tensor, value: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    return eager.outlook_backward(grad_out, logits, value, *windows)


def _reference_grad_logits(grad_out: Tensor, logits: Tensor, value: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    statistics = torch.logsumexp(logits * windows.scale, -1) * math.log2(math.e)
    return _reference_gradients(grad_out, logits, value, windows)[0], statistics


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda _grad, logits, value, windows: problem_of(logits, value, windows, grad_logits=True),
    reference=_reference_grad_logits,
    name="outlook_grad_logits",
)
def grad_logits(
    grad_out: Tensor, logits: Tensor, value: Tensor, windows: Windows, *, config: Config
) -> tuple[Tensor, Tensor]:
    """scale · p ∘ (dp − Σ_s p ∘ dp) like logits, and log2 Σ_s exp2(scale · log2(e) · logits) [B,h,w,heads,K²]."""
    statistics = torch.empty(logits.shape[:5], dtype=accumulator_dtype(value.dtype), device=value.device)
    target = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    images = by_head(value, logits.shape[3]), by_head(grad_out, logits.shape[3])
    common, programs = common_arguments(logits, value, windows, config, *images)
    arguments = {
        **common, "value": view(images[0], "b h w g c"), "grad": view(images[1], "b h w g c"),
        "statistics_ptr": statistics, "target_ptr": target,
        "VALUE_COLUMN": value.stride(2), "GRAD_COLUMN": grad_out.stride(2),
        "UNROLLED": problem_of(logits, value, windows).unrolled and images[0].shape[4] <= config.block_channels,
    }  # fmt: skip
    # One program per (block of heads, block of windows).
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_logits_kernel, (programs,), value.device, arguments, **options)
    return target, statistics


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda grad_out, logits, _statistics, windows: problem_of(logits, grad_out, windows),
    # The gradient of value does not depend on value.
    reference=lambda grad, logits, _statistics, windows: _reference_gradients(grad, logits, grad, windows)[1],
    name="outlook_grad_value",
)
def grad_value(grad_out: Tensor, logits: Tensor, statistics: Tensor, windows: Windows, *, config: Config) -> Tensor:
    """Σ over the windows that hold j of p[t, j] · grad_out[t], [B,H,W,C], contiguous."""
    return mix(logits, grad_out, statistics, windows, config)


def outlook_backward(
    grad_out: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value, contiguous."""
    if value.numel() == 0:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), torch.empty_like(value)
    windows, logits = Windows(kernel_size, stride, padding, scale), logits.contiguous()
    gradient_of_logits, statistics = grad_logits(grad_out, logits, value, windows)
    return gradient_of_logits, grad_value(grad_out, logits, statistics, windows)
