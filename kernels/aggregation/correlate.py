"""correlate for zero-padded windows: rows that slide over registers (see ``tiles``)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation import eager
from kernels.aggregation.configs import (
    CONFIGS,
    Config,
    by_columns,
    correlate_heuristic,
    in_one_piece,
    pieces,
    problem_of,
)
from kernels.aggregation.tiles import (
    across,
    all_apart,
    common_arguments,
    halved,
    halvings,
    load_rows,
    pitch,
    place,
    sources,
    stack,
    tap_of,
    turned,
    wide,
)
from kernels.launch import launch, next_power_of_2
from kernels.layout import channels_fastest, empty_kernel_layout
from kernels.tuning import tunable
from kernels.views import view
from kernels.windows import Window


@triton.jit
def _correlate_kernel(
    g,  # [B, G, C, height, width]
    x,  # [B, G, C, x_height, x_width]
    out,  # [B, G, Kh, Kw, height, width], Kw its channels
    sizes, row_tiles, channel_blocks,
    WINDOW: tl.constexpr, PADDED: tl.constexpr, ALL_CHANNELS: tl.constexpr, X_LANES: tl.constexpr,
    OUT_LANES: tl.constexpr, PAIRS: tl.constexpr, LANE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    batch, groups, channels, x_height, x_width, height, width = sizes
    SLOTS: tl.constexpr = pitch(ROWS)
    STEPS: tl.constexpr = pitch(WINDOW.kernel_size[0])
    END: tl.constexpr = sources(WINDOW, ROWS, False)[1]
    PARTS: tl.constexpr = PAIRS + 1
    BLOCK: tl.constexpr = CHANNELS // PARTS  # of channels, or of pairs
    tile = place(batch, groups, channels // PARTS, width, row_tiles, 1, ROWS, COLUMNS, GROUPS, BLOCK, STEPS)
    first = tile.row * WINDOW.stride[0] - WINDOW.padding[0]
    p_g = g.ptr + tile.group * g.g + across(tile.batch, tile.column, g, X_LANES)
    o_g_channel = (tile.channel.to(tl.int64) * g.c)[None, :]
    o_x_channel = (tile.channel.to(tl.int64) * x.c)[None, :]
    m_g = tile.m_column[:, None]
    # Groups of padded taps are adjacent, known when compiling: 16 bytes per store.
    o_entry = tile.group * out.g + tile.tap_group * (STEPS if PADDED else out.g) + tile.step.to(tl.int64) * out.k
    o_pixel = (tile.row + tile.slot).to(tl.int64) * out.h + across(tile.tap_batch, tile.tap_column, out, OUT_LANES)
    p_out = out.ptr + o_pixel[:, None] + o_entry[None, :]
    i_column = tl.program_id(0) // tl.cdiv(groups, GROUPS) // row_tiles * COLUMNS
    m_pixel = (i_column + tl.arange(0, SLOTS * COLUMNS) % COLUMNS < batch * width) & (tile.slot < ROWS)
    m_entry = (tile.step < (STEPS if PADDED else WINDOW.kernel_size[0])) & (tile.tap_group < groups - tile.group)
    m_out = (m_pixel & (tile.row + tile.slot < height))[:, None] & m_entry[None, :]

    # Where pixels lie across lanes a sum [P, G] is stored as soon as it is there.
    DIRECT: tl.constexpr = ALL_CHANNELS and OUT_LANES
    o_group = tl.arange(0, GROUPS)
    p_direct = out.ptr + (tile.group + o_group)[None, :] * out.g
    p_direct += across(tile.batch, tile.column, out, OUT_LANES)[:, None]
    m_direct = m_g & (o_group < groups - tile.group)[None, :]
    if ALL_CHANNELS:
        grads = load_rows(p_g, o_g_channel, g.h, tile.row, height, m_g & tile.m_channel[None, :], 0, ROWS, PAIRS)
        grads = _all_widened(grads, GROUPS, BLOCK, LANE, ACCUMULATOR)
    for kw in range(WINDOW.kernel_size[1]):
        o_x = tile.column * WINDOW.stride[1] - WINDOW.padding[1] + kw * WINDOW.dilation[1]
        m_x = (tile.m_column & (o_x >= 0) & (o_x < x_width))[:, None]
        p_grad, p_row = p_g, x.ptr + tile.group * x.g + across(tile.batch, o_x, x, X_LANES)
        # S·Q times [P, G]
        sums = (tl.zeros([COLUMNS, GROUPS], ACCUMULATOR),) * (STEPS * SLOTS)
        for i_channel in range(channel_blocks):
            m_channel = tile.m_channel
            if GROUPS == 1:
                m_channel = tile.channel + i_channel * BLOCK < channels // PARTS
            if not ALL_CHANNELS:
                grads = load_rows(p_grad, o_g_channel, g.h, tile.row, height, m_g & m_channel[None, :], 0, ROWS, PAIRS)
                grads = _all_widened(grads, GROUPS, BLOCK, LANE, ACCUMULATOR)
            for source in tl.static_range(0, END, LOADS):
                m_row = m_x & m_channel[None, :]
                rows = load_rows(
                    p_row, o_x_channel, x.h, first, x_height, m_row, source, min(source + LOADS, END), PAIRS
                )
                rows = _all_widened(rows, GROUPS, BLOCK, LANE, ACCUMULATOR)
                for i in tl.static_range(min(LOADS, END - source)):
                    for r in tl.static_range(ROWS):
                        if tap_of(source + i, r, WINDOW, SLOTS, False) >= 0:
                            b_sum = grads[r] * rows[i]
                            for part in tl.static_range(1, len(grads) // ROWS):
                                b_sum += grads[part * ROWS + r] * rows[part * len(rows) * ROWS // len(grads) + i]
                            b_sum = tl.sum(b_sum, axis=2)
                            if DIRECT:
                                o_step = wide(tap_of(source + i, r, WINDOW, SLOTS, False) % STEPS)
                                o_row = (tile.row + r).to(tl.int64) * out.h
                                p_sum = p_direct + (o_row + o_step * out.k + wide(kw) * out.c)
                                m_sum = m_direct & (tile.row + r < height)
                                tl.store(p_sum, b_sum.to(out.ptr.dtype.element_ty), mask=m_sum)
                            else:
                                if not ALL_CHANNELS:
                                    b_sum += sums[tap_of(source + i, r, WINDOW, SLOTS, False)]
                                before = sums[: tap_of(source + i, r, WINDOW, SLOTS, False)]
                                sums = before + (b_sum,) + sums[tap_of(source + i, r, WINDOW, SLOTS, False) + 1 :]
            p_grad += wide(CHANNELS) * g.c
            p_row += wide(CHANNELS) * x.c
        if not DIRECT:
            b_taps = stack(sums, COLUMNS, GROUPS, STEPS)
            tl.store(p_out + wide(kw) * out.c, b_taps.to(out.ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _all_widened(rows, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LANE: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Rows [P, G·C] in the type of the sums, as [P, G, C/LANE]: a lane's channels one by one, each of all rows, so that
    products of theirs are added as they are made."""
    blocks = ()
    for i in tl.static_range(len(rows)):
        blocks = blocks + (tl.reshape(rows[i], halvings(rows[i].shape[0], GROUPS, CHANNELS // LANE, LANE)),)
    parts = all_apart(blocks, ACCUMULATOR)
    for _ in tl.static_range(len(halvings(LANE))):
        parts = halved(parts)
    return parts


def _lane(common: dict[str, Any], x: Tensor, warps: int) -> int:
    """How many adjacent channels, or pairs of them, a lane has: 16 bytes, less of small tiles."""
    if common["X_LANES"]:
        return 1
    number, size = (common["CHANNELS"] // 2, 4) if common["PAIRS"] else (common["CHANNELS"], x.itemsize)
    return max(1, min(16 // size, number, common["COLUMNS"] * common["GROUPS"] * number // (32 * warps)))


def _reference(g: Tensor, x: Tensor, window: Window, padded: bool = False) -> Tensor:
    """The eager path, for the tuner."""
    out = eager.correlate(g, x, window)
    rows = window.kernel_size[0]
    return torch.nn.functional.pad(out, (0,) * 7 + (next_power_of_2(rows) - rows,)) if padded else out


@tunable(
    CONFIGS,
    correlate_heuristic,
    problem=lambda g, x, window, padded=False: problem_of(
        x, g.shape[3:], window, kernel=None if padded else g, padded=padded
    ),
    reference=_reference,
    name="correlate.rows",
)
def correlate(g: Tensor, x: Tensor, window: Window, padded: bool = False, *, config: Config) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H',W'] in the memory order of g.

    ``padded``: Kh is padded with zeros to a power of two, in memory [B, H', W', Kw, G, Kh].
    """
    if padded:
        steps, (batch, groups, _, height, width) = next_power_of_2(window.kernel_size[0]), g.shape
        shape = (batch, height, width, window.kernel_size[1], groups, steps)
        out = torch.empty(shape, dtype=g.dtype, device=g.device).permute(0, 4, 5, 3, 1, 2)
    else:
        out = empty_kernel_layout(g, window.kernel_size)
    whole = [(window, slice(None), slice(None))]  # with its padding, which is written, too
    for piece, rows, columns in whole if in_one_piece(window) else pieces(window):
        _fill(out[:, :, rows, columns], g, x, piece, padded, config)
    return out


def _fill(out: Tensor, g: Tensor, x: Tensor, window: Window, padded: bool, config: Config) -> None:
    if out.numel() == 0:
        return
    target, lanes = out, not padded and not channels_fastest(g)
    if not padded and by_columns(g, x):
        window, (g, x, target) = turned(window, g, x, out)
    common, programs = common_arguments(x, g, window, config)
    arguments = {
        "g": view(g, "b g c h w"), "x": view(x, "b g c h w"), "out": view(target, "b g k c h w"), **common,
        "PADDED": padded, "LANE": _lane(common, x, config.num_warps), "ALL_CHANNELS": common["channel_blocks"] == 1,
        "OUT_LANES": lanes,
    }  # fmt: skip
    # One program per (group block, row tile, columns of all images), fastest first; it walks the channels.
    launch(_correlate_kernel, (programs,), out.device, arguments, num_warps=config.num_warps, num_stages=1)
