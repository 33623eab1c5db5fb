# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""Outlook attention in one Triton kernel, softmax and overlap-add inside.

A window w holds K² positions; p_w[t, s] = softmax_s(scale · logits_w[t, s]) mixes its sources s into its targets t.

    out[i]    = Σ_{(w,t): pixel(w,t)=i} Σ_s p_w[t, s] · value[pixel(w, s)]
    dvalue[j] = Σ_{(w,s): pixel(w,s)=j} Σ_t p_w[t, s] · dout[pixel(w, t)]

Both are a gather, by *cells* of stride x stride pixels: a cell's pixels are held by windows at fixed places around it,
K² pairs of window and position in all. So nothing is added atomically, and every element is written once.

Up to K = 3 a cell's K⁴ weights stay in registers. Those that overlapping windows have for the same pair of pixels are
added first, and every pixel around the cell is loaded once for all: with K = 3 and stride 2, 64 multiply-adds a channel
and 25 loads for four pixels instead of 81 each; with stride 1, 25 for one. Larger windows are taken one by one, and of
each a row of the kernel at a time.

A value reaches the outputs of the windows that hold its pixel, of its own head and channel, and nothing else; so does
one that is not finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import ceil_divide, launch
from kernels.outlook import eager
from kernels.outlook.configs import CONFIGS, Config, heuristic
from kernels.outlook.tiles import (
    Windows,
    by_head,
    common_arguments,
    entries_of,
    inside,
    load_pixels,
    pixel_pointers,
    problem_of,
    sizes_of,
    softmax,
    tile_of,
)
from kernels.tuning import tunable
from kernels.views import aligned, view


@triton.jit
def _weight(
    rows, pixel: tl.constexpr, source: tl.constexpr, FIRST: tl.constexpr, AREA: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Sum of the weights that all windows have from a source of the cell's surroundings to its pixel, or None."""
    # The pixel's smallest position in a window, and how far the source lies from it.
    H: tl.constexpr = (pixel // STRIDE + PADDING) % STRIDE
    W: tl.constexpr = (pixel % STRIDE + PADDING) % STRIDE
    AWAY_H: tl.constexpr = FIRST + source // AREA - pixel // STRIDE
    AWAY_W: tl.constexpr = FIRST + source % AREA - pixel % STRIDE
    b_weight = None
    for h in tl.static_range(H, KERNEL, STRIDE):
        for w in tl.static_range(W, KERNEL, STRIDE):
            if (h + AWAY_H >= 0) & (h + AWAY_H < KERNEL) & (w + AWAY_W >= 0) & (w + AWAY_W < KERNEL):
                b_term = rows[h * KERNEL + w][(h + AWAY_H) * KERNEL + w + AWAY_W]
                b_weight = b_term if b_weight is None else b_weight + b_term
    return b_weight


@triton.jit
def _window_of(
    tile, sizes, pixel_h, pixel_w, kernel_h, kernel_w, STRIDE: tl.constexpr, PADDING: tl.constexpr
):  # fmt: skip
    """The window that has a pixel of the cell at a position: how many items on it is, and whether it exists [P, G]."""
    step_h, step_w = (pixel_h + PADDING - kernel_h) // STRIDE, (pixel_w + PADDING - kernel_w) // STRIDE  # exact
    m_window = inside(tile.row + step_h, sizes.windows_h) & inside(tile.column + step_w, sizes.windows_w)
    return (step_h * sizes.windows_w + step_w) * sizes.heads, tile.m_item & m_window[:, None]


@triton.jit
def _mix_kernel(
    logits_ptr,  # [B, h, w, heads, K², K²], contiguous
    statistics_ptr,  # [B, h, w, heads, K²], contiguous: log2 Σ_s exp2, read when TRANSPOSED
    source,  # [B, H, W, heads, D]: value, or the gradient of out when TRANSPOSED
    target,  # [B, H, W, heads, D]
    sizes, reach_h, reach_w, scale: tl.float64, SOURCE_COLUMN: tl.constexpr, ALIGNED: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
    UNROLLED: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """``scale`` is that of exp2: the operator's times log2 e. Beyond row or column ``reach`` lies no window."""
    POSITIONS: tl.constexpr = KERNEL * KERNEL
    # A pixel has a row of logits to itself in every window; transposed, a column.
    OWN: tl.constexpr = 1 if TRANSPOSED else POSITIONS
    OTHER: tl.constexpr = POSITIONS if TRANSPOSED else 1
    if tl.float32 == ACCUMULATOR:
        scale = tl.cast(scale, tl.float32)
    source, target = aligned(source, ALIGNED), aligned(target, ALIGNED)
    channel_blocks = tl.cdiv(sizes.channels, BLOCK_CHANNELS)
    tile = tile_of(
        sizes, tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks,
        ALIGNED, OFFSET, BLOCK_WINDOWS, BLOCK_HEADS, BLOCK_CHANNELS,
    )  # fmt: skip
    # [P, G, S]
    o_entry = tl.arange(0, triton.next_power_of_2(POSITIONS))[None, None, :]
    o_item = tile.item[:, :, None]
    b_zeros = tl.zeros([BLOCK_WINDOWS, BLOCK_HEADS, BLOCK_CHANNELS], ACCUMULATOR)

    if UNROLLED:
        STEPS_BACK: tl.constexpr = (KERNEL - 1 - PADDING) // STRIDE
        FIRST: tl.constexpr = -STEPS_BACK * STRIDE - PADDING  # row and column of the surroundings, from the cell's own
        AREA: tl.constexpr = (STEPS_BACK + (STRIDE - 1 + PADDING) // STRIDE) * STRIDE + KERNEL
        p_logits = logits_ptr + o_item * (POSITIONS * POSITIONS) + o_entry * OTHER
        # All rows are on their way before the first is needed.
        loaded, masks, statistics = (), (), ()
        for t in tl.static_range(POSITIONS):
            o_step, m_row = _window_of(
                tile, sizes, (t // KERNEL - PADDING) % STRIDE, (t % KERNEL - PADDING) % STRIDE, t // KERNEL, t % KERNEL,
                STRIDE, PADDING,
            )  # fmt: skip
            m_entry = m_row[:, :, None] & (o_entry < POSITIONS)
            b_logits = tl.load(p_logits + o_step * (POSITIONS * POSITIONS) + t * OWN, mask=m_entry, other=0)
            loaded, masks = loaded + (b_logits,), masks + (m_row[:, :, None],)
            if TRANSPOSED:
                p_statistics = statistics_ptr + (o_item + o_step) * POSITIONS + o_entry
                statistics = statistics + (tl.load(p_statistics, mask=m_entry, other=0),)
        rows = ()
        for t in tl.static_range(POSITIONS):
            b_logits = loaded[t].to(ACCUMULATOR) * scale
            if TRANSPOSED:
                b_weights = tl.where(masks[t], tl.exp2(b_logits - statistics[t]), 0.0)
                rows = rows + (entries_of(b_weights, POSITIONS),)
            else:
                weights, b_total, _ = softmax(entries_of(b_logits, POSITIONS))
                b_factor, row = tl.where(masks[t], 1 / b_total, 0.0), ()
                for s in tl.static_range(POSITIONS):
                    row = row + (weights[s] * b_factor,)
                rows = rows + (row,)

        o_row, o_column = tile.row * STRIDE + FIRST, tile.column * STRIDE + FIRST
        p_source = pixel_pointers(source, tile, o_row, o_column, SOURCE_COLUMN, OFFSET)
        m_rows, m_columns, sums = (), (), ()
        for i in tl.static_range(AREA):
            m_rows = m_rows + (tile.m_x & inside(o_row + i, reach_h)[:, None],)
            m_columns = m_columns + (inside(o_column + i, reach_w)[:, None],)
        for _ in tl.static_range(STRIDE * STRIDE):
            sums = sums + (b_zeros,)
        for i in tl.static_range(AREA * AREA):
            p_pixel = p_source + tl.cast(i // AREA, OFFSET) * source.h + (i % AREA) * SOURCE_COLUMN
            m_pixel = m_rows[i // AREA] & m_columns[i % AREA]
            b_source = load_pixels(p_pixel, m_pixel, ACCUMULATOR, BLOCK_HEADS, BLOCK_CHANNELS)
            for pixel in tl.static_range(STRIDE * STRIDE):
                b_weight = _weight(rows, pixel, i, FIRST, AREA, KERNEL, STRIDE, PADDING)
                if b_weight is not None:
                    sums = sums[:pixel] + (sums[pixel] + b_weight * b_source,) + sums[pixel + 1 :]
        for pixel in tl.static_range(STRIDE * STRIDE):
            _store_pixel(
                target, tile, sizes, sums[pixel], pixel // STRIDE, pixel % STRIDE, reach_h, reach_w,
                KERNEL, STRIDE, PADDING, OFFSET,
            )  # fmt: skip
    else:
        STEPS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
        o_kernel_w = tl.arange(0, triton.next_power_of_2(KERNEL))[None, None, :]
        for pixel in range(STRIDE * STRIDE):
            b_sum = b_zeros
            # Loops of constant length, since AMD's compiler takes others for very long ones; the branch costs nothing.
            for step in range(STEPS * STEPS):
                kernel_h = (pixel // STRIDE + PADDING) % STRIDE + step // STEPS * STRIDE
                kernel_w = (pixel % STRIDE + PADDING) % STRIDE + step % STEPS * STRIDE
                if (kernel_h < KERNEL) & (kernel_w < KERNEL):
                    o_step, m_row = _window_of(
                        tile, sizes, pixel // STRIDE, pixel % STRIDE, kernel_h, kernel_w, STRIDE, PADDING
                    )
                    o_window, m_row = o_item + o_step, m_row[:, :, None]
                    p_own = logits_ptr + o_window * (POSITIONS * POSITIONS) + (kernel_h * KERNEL + kernel_w) * OWN
                    b_statistics = tl.zeros([BLOCK_WINDOWS, BLOCK_HEADS, 1], ACCUMULATOR)
                    if not TRANSPOSED:
                        b_own = tl.load(p_own + o_entry, mask=m_row & (o_entry < POSITIONS), other=0)
                        b_own = tl.where(o_entry < POSITIONS, b_own.to(ACCUMULATOR) * scale, float("-inf"))
                        b_max = tl.max(b_own, 2, keep_dims=True)
                        b_statistics = b_max + tl.log2(tl.sum(tl.exp2(b_own - b_max), 2, keep_dims=True))
                    o_row = tile.row * STRIDE + pixel // STRIDE - kernel_h
                    o_column = tile.column * STRIDE + pixel % STRIDE - kernel_w
                    for other_h in range(KERNEL):
                        m_entry = m_row & (o_kernel_w < KERNEL)
                        o_other = other_h * KERNEL + o_kernel_w
                        b_logits = tl.load(p_own + o_other * OTHER, mask=m_entry, other=0).to(ACCUMULATOR) * scale
                        if TRANSPOSED:
                            p_statistics = statistics_ptr + o_window * POSITIONS + o_other
                            b_weights = tl.exp2(b_logits - tl.load(p_statistics, mask=m_entry, other=0))
                        else:
                            b_weights = tl.exp2(b_logits - b_statistics)
                        weights = entries_of(tl.where(m_entry, b_weights, 0.0), KERNEL)
                        for other_w in tl.static_range(KERNEL):
                            p_pixel = pixel_pointers(
                                source, tile, o_row + other_h, o_column + other_w, SOURCE_COLUMN, OFFSET
                            )
                            m_pixel = inside(o_row + other_h, reach_h) & inside(o_column + other_w, reach_w)
                            b_sum += weights[other_w] * load_pixels(
                                p_pixel, tile.m_x & m_pixel[:, None], ACCUMULATOR, BLOCK_HEADS, BLOCK_CHANNELS
                            )
            _store_pixel(
                target, tile, sizes, b_sum, pixel // STRIDE, pixel % STRIDE, reach_h, reach_w,
                KERNEL, STRIDE, PADDING, OFFSET,
            )  # fmt: skip


@triton.jit
def _store_pixel(
    target, tile, sizes, b_sum, pixel_h, pixel_w, reach_h, reach_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    o_row, o_column = tile.row * STRIDE + pixel_h, tile.column * STRIDE + pixel_w
    m_pixel = tile.m_x & ((o_row < sizes.height) & (o_column < sizes.width))[:, None]
    b_pixel = tl.reshape(b_sum, m_pixel.shape).to(target.ptr.dtype.element_ty)
    if KERNEL - PADDING < STRIDE:  # there may be pixels that no window holds, not even with a weight of 0
        b_pixel = tl.where(((o_row < reach_h) & (o_column < reach_w))[:, None], b_pixel, 0.0)
    tl.store(pixel_pointers(target, tile, o_row, o_column, target.w, OFFSET), b_pixel, mask=m_pixel)


def mix(logits: Tensor, source: Tensor, statistics: Tensor | None, windows: Windows, config: Config) -> Tensor:
    """Sums over windows of p times source, or of p transposed where the logits' statistics are given."""
    target = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    images = by_head(source, logits.shape[3]), by_head(target, logits.shape[3])
    common, programs = common_arguments(logits, source, windows, config, *images)
    (kernel_size, stride, padding, _), sizes = windows, common["sizes"]
    arguments = {
        **common, "statistics_ptr": source if statistics is None else statistics,
        "source": view(images[0], "b h w g c"), "target": view(images[1], "b h w g c"),
        "reach_h": min(sizes.height, (sizes.windows_h - 1) * stride - padding + kernel_size),
        "reach_w": min(sizes.width, (sizes.windows_w - 1) * stride - padding + kernel_size),
        "SOURCE_COLUMN": source.stride(2), "TRANSPOSED": statistics is not None,
        "UNROLLED": problem_of(logits, source, windows).unrolled,
    }  # fmt: skip
    # One program per (block of channels, block of heads, block of cells).
    grid = (programs * ceil_divide(sizes.channels, config.block_channels),)
    launch(_mix_kernel, grid, target.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return target


@tunable(
    CONFIGS,
    heuristic,
    problem=problem_of,
    reference=lambda logits, value, windows: eager.outlook(logits, value, *windows),
    name="outlook",
)
def forward(logits: Tensor, value: Tensor, windows: Windows, *, config: Config) -> Tensor:
    """``outlook`` for contiguous logits."""
    return mix(logits, value, None, windows, config)


def outlook(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    """logits [B,h,w,heads,K²,K²] (target, source), value [B,H,W,C] -> [B,H,W,C], contiguous."""
    if value.numel() == 0:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    sizes_of(logits, value)
    return forward(logits.contiguous(), value, Windows(kernel_size, stride, padding, scale))
