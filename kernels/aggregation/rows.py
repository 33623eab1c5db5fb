# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker; a tuple takes no star there.
"""aggregate, transpose and correlate for zero-padded windows: rows that slide over registers (see ``tiles``).

aggregate and transpose are one kernel. The dynamic kernel is read from memory, or generated (``involution.forward``):
the taps of a step are then a matrix product of features [Q·P, R] with one column of the windows' weights [R, G·S].

Per output pixel and group aggregate reads K² weights and C values and writes C, generated R/G and C values; a warp
issues C·K²/32 multiply-adds for it and half as many conversions, loads and moves, which bind where memory does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation import eager
from kernels.aggregation.configs import CONFIGS, Config, Problem, correlate_heuristic, heuristic
from kernels.aggregation.tiles import across, load_rows, pitch, place, slide, sources, stack, tap_of, unstack, wide
from kernels.dtypes import accumulator, at_least_float32, precision, upcast
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.tuning import tunable
from kernels.views import View, view
from kernels.windows import Pair, Window

FEATURES = 128  # in one product; more are summed over several


@triton.jit
def _generate(
    features, p_features, m_features, p_span, stride_r, m_step,
    R: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Taps [Q·P, G·S] from features at ``p_features`` and one column of the windows' weights at ``p_span``."""
    b_taps = tl.zeros([p_features.shape[0], p_span.shape[1]], ACCUMULATOR)
    for first in tl.static_range(0, R, BLOCK):
        o_feature = first + tl.arange(0, BLOCK)
        b_features = tl.load(
            p_features + (o_feature.to(tl.int64) * features.c)[None, :],
            mask=m_features & (o_feature < R)[None, :],
            other=0,
        )
        b_span = tl.load(p_span + (o_feature * stride_r)[:, None], mask=(o_feature < R)[:, None] & m_step, other=0)
        if UPCAST:
            b_features, b_span = b_features.to(ACCUMULATOR), b_span.to(ACCUMULATOR)
        b_taps = tl.dot(b_features, b_span, b_taps, input_precision="ieee", out_dtype=ACCUMULATOR)
    return b_taps


@triton.jit
def weighted_sum_kernel(
    x,  # [B, G, C, x_height, x_width]; the gradient of the output if TRANSPOSED
    weight,  # [B, G, Kh, Kw, H', W'], Kw its channels; features [B, R, H', W'] if there are FEATURES
    span,  # [G·Kh·Kw, R], not read without FEATURES
    bias,  # [G·Kh·Kw], not read without HAS_BIAS
    out,  # [B, G, C, height, width]
    batch, groups, channels, x_height, x_width, height, width, row_tiles, channel_blocks,
    WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr, X_LANES: tl.constexpr, WEIGHT_LANES: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    STRIDE_H: tl.constexpr = WINDOW.stride[0]
    STRIDE_W: tl.constexpr = WINDOW.stride[1]
    STEPS: tl.constexpr = pitch(KERNEL_H)
    SLOTS: tl.constexpr = pitch(ROWS)
    FIRST: tl.constexpr = sources(WINDOW, ROWS, TRANSPOSED)[0]
    END: tl.constexpr = sources(WINDOW, ROWS, TRANSPOSED)[1]
    tile = place(batch, groups, channels, width, row_tiles, channel_blocks, ROWS, COLUMNS, GROUPS, CHANNELS, STEPS)
    m_step = ((tile.step < KERNEL_H) & (tile.tap_group < groups - tile.group))[None, :]
    o_slot = tile.slot[:, None]
    # ``first`` is source row 0 of the tile. The rows of the taps: [Q·P, 1], or [Q·P, G·S] if TRANSPOSED.
    if TRANSPOSED:
        row = tile.row - WINDOW.padding[0] % STRIDE_H
        first = (row + WINDOW.padding[0]) // STRIDE_H
        o_turned = o_slot + tile.step[None, :] * WINDOW.dilation[0]
        o_distance = o_turned % SLOTS - tile.step[None, :] * WINDOW.dilation[0]
        o_tap_row = first + o_distance // STRIDE_H
        m_tap = (o_turned % SLOTS < ROWS) & (o_distance % STRIDE_H == 0) & (o_tap_row >= 0) & (o_tap_row < x_height)
    else:
        row = tile.row
        first = row * STRIDE_H - WINDOW.padding[0]
        o_tap_row = row + o_slot
        m_tap = (o_slot < ROWS) & (o_tap_row < height)

    o_channel = (tile.channel.to(tl.int64) * x.c)[None, :]
    # ROWS times [P, G, C]
    sums = (tl.zeros([COLUMNS, GROUPS, CHANNELS], ACCUMULATOR),) * ROWS
    for kw in range(KERNEL_W):
        # The source's columns, and those of the outputs whose windows they are in.
        if TRANSPOSED:
            o_scaled = tile.column + WINDOW.padding[1] - kw * WINDOW.dilation[1]
            o_x = o_scaled // STRIDE_W
            m_x = tile.m_column & (o_scaled >= 0) & (o_scaled % STRIDE_W == 0) & (o_x < x_width)
            o_scaled = tile.tap_column + WINDOW.padding[1] - kw * WINDOW.dilation[1]
            o_tap_column = o_scaled // STRIDE_W
            m_tap_column = ((o_scaled >= 0) & (o_scaled % STRIDE_W == 0) & (o_tap_column < x_width))[:, None]
        else:
            o_x = tile.column * STRIDE_W - WINDOW.padding[1] + kw * WINDOW.dilation[1]
            m_x = tile.m_column & (o_x >= 0) & (o_x < x_width)
            o_tap_column = tile.tap_column
            m_tap_column = (o_tap_column >= 0)[:, None]
        p_column = x.ptr + tile.group * x.g + across(tile.batch, o_x, x, X_LANES)
        m_column = m_x[:, None] & tile.m_channel[None, :]
        rows = load_rows(p_column, o_channel, x.h, first, x_height, m_column, FIRST, min(FIRST + LOADS, END))
        # [Q·P, G·S]
        p_pixel = weight.ptr + tile.group * weight.g + across(tile.tap_batch, o_tap_column, weight, False)[:, None]
        if FEATURES:
            o_span = ((tile.group + tile.tap_group) * KERNEL_H + tile.step) * KERNEL_W + kw
            p_span = span.ptr + (o_span * span.k)[None, :]
            b_bias = tl.zeros([1, GROUPS * STEPS], ACCUMULATOR)
            if HAS_BIAS:
                b_bias = tl.load(bias.ptr + (o_span * bias.k)[None, :], mask=m_step, other=0).to(ACCUMULATOR)
            if TRANSPOSED:
                b_taps = tl.zeros([SLOTS * COLUMNS, GROUPS * STEPS], ACCUMULATOR)
                for turn in tl.static_range((SLOTS - 1 + (KERNEL_H - 1) * WINDOW.dilation[0]) // SLOTS + 1):
                    o_back = o_slot - turn * SLOTS
                    o_row = first + o_back // STRIDE_H
                    m_row = (o_back % STRIDE_H == 0) & (o_row >= 0) & (o_row < x_height) & m_tap_column
                    b_turn = _generate(
                        weight, p_pixel + o_row.to(tl.int64) * weight.h, m_row, p_span, span.c, m_step,
                        FEATURES, BLOCK_FEATURES, ACCUMULATOR, UPCAST,
                    )  # fmt: skip
                    b_taps = tl.where(m_row & (o_turned // SLOTS == turn), b_turn + b_bias, b_taps)
            else:
                b_taps = b_bias + _generate(
                    weight, p_pixel + o_tap_row.to(tl.int64) * weight.h, m_tap, p_span, span.c, m_step,
                    FEATURES, BLOCK_FEATURES, ACCUMULATOR, UPCAST,
                )  # fmt: skip
        else:
            o_entry = tile.tap_group.to(OFFSET) * weight.g + tile.step.to(OFFSET) * weight.k
            o_entry += tl.full([], kw, OFFSET) * weight.c
            p_tap = p_pixel + (o_tap_row.to(OFFSET) * weight.h + o_entry[None, :])
            # As in ``across``: what lies across lanes.
            p_tap = tl.max_contiguous(tl.multiple_of(p_tap, [1, 1]), [8, 1] if WEIGHT_LANES else [1, 8])
            b_taps = tl.load(p_tap, mask=m_tap & m_tap_column & m_step, other=0)
        taps = unstack(b_taps, COLUMNS, GROUPS, STEPS)
        sums = slide(sums, rows, taps, FIRST, WINDOW, TRANSPOSED, GROUPS, CHANNELS)
        for source in tl.static_range(FIRST + LOADS, END, LOADS):
            rows = load_rows(p_column, o_channel, x.h, first, x_height, m_column, source, min(source + LOADS, END))
            sums = slide(sums, rows, taps, source, WINDOW, TRANSPOSED, GROUPS, CHANNELS)

    p_out = out.ptr + tile.group * out.g + across(tile.batch, tile.column, out, X_LANES)[:, None]
    p_out += (tile.channel.to(tl.int64) * out.c)[None, :]
    m_out = tile.m_column[:, None] & tile.m_channel[None, :]
    for r in tl.static_range(ROWS):
        b_out = tl.reshape(sums[r].to(out.ptr.dtype.element_ty), [COLUMNS, GROUPS * CHANNELS])
        tl.store(p_out + (row + r).to(tl.int64) * out.h, b_out, mask=m_out & (row + r >= 0) & (row + r < height))


@triton.jit
def _correlate_kernel(
    g,  # [B, G, C, height, width]
    x,  # [B, G, C, x_height, x_width]
    out,  # [B, G, Kh, Kw, height, width], Kw its channels
    batch, groups, channels, x_height, x_width, height, width, row_tiles, channel_blocks,
    WINDOW: tl.constexpr, PADDED: tl.constexpr, ALL_CHANNELS: tl.constexpr, X_LANES: tl.constexpr,
    OUT_LANES: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = pitch(ROWS)
    STEPS: tl.constexpr = pitch(WINDOW.kernel_size[0])
    END: tl.constexpr = sources(WINDOW, ROWS, False)[1]
    tile = place(batch, groups, channels, width, row_tiles, 1, ROWS, COLUMNS, GROUPS, CHANNELS, STEPS)
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
        grads = load_rows(p_g, o_g_channel, g.h, tile.row, height, m_g & tile.m_channel[None, :], 0, ROWS)
        grads = _widened(grads, GROUPS, CHANNELS, ACCUMULATOR)
    for kw in range(WINDOW.kernel_size[1]):
        o_x = tile.column * WINDOW.stride[1] - WINDOW.padding[1] + kw * WINDOW.dilation[1]
        m_x = (tile.m_column & (o_x >= 0) & (o_x < x_width))[:, None]
        p_grad, p_row = p_g, x.ptr + tile.group * x.g + across(tile.batch, o_x, x, X_LANES)
        # S·Q times [P, G]
        sums = (tl.zeros([COLUMNS, GROUPS], ACCUMULATOR),) * (STEPS * SLOTS)
        for i_channel in range(channel_blocks):
            m_channel = tile.m_channel
            if GROUPS == 1:
                m_channel = tile.channel + i_channel * CHANNELS < channels
            if not ALL_CHANNELS:
                grads = load_rows(p_grad, o_g_channel, g.h, tile.row, height, m_g & m_channel[None, :], 0, ROWS)
                grads = _widened(grads, GROUPS, CHANNELS, ACCUMULATOR)
            for source in tl.static_range(0, END, LOADS):
                m_row = m_x & m_channel[None, :]
                rows = load_rows(p_row, o_x_channel, x.h, first, x_height, m_row, source, min(source + LOADS, END))
                rows = _widened(rows, GROUPS, CHANNELS, ACCUMULATOR)
                for i in tl.static_range(len(rows)):
                    for r in tl.static_range(ROWS):
                        if tap_of(source + i, r, WINDOW, SLOTS, False) >= 0:
                            b_sum = tl.sum(grads[r] * rows[i], axis=2)
                            if DIRECT:
                                o_step = wide(tap_of(source + i, r, WINDOW, SLOTS, False) // SLOTS)
                                o_row = (tile.row + r).to(tl.int64) * out.h
                                p_sum = p_direct + (o_row + o_step * out.k + wide(kw) * out.c)
                                m_sum = m_direct & (tile.row + r < height)
                                tl.store(p_sum, b_sum.to(out.ptr.dtype.element_ty), mask=m_sum)
                            else:
                                b_sum += sums[tap_of(source + i, r, WINDOW, SLOTS, False)]
                                before = sums[: tap_of(source + i, r, WINDOW, SLOTS, False)]
                                sums = before + (b_sum,) + sums[tap_of(source + i, r, WINDOW, SLOTS, False) + 1 :]
            p_grad += wide(CHANNELS) * g.c
            p_row += wide(CHANNELS) * x.c
        if not DIRECT:
            b_taps = stack(sums, COLUMNS, GROUPS, STEPS)
            tl.store(p_out + wide(kw) * out.c, b_taps.to(out.ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _widened(rows, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Rows [P, G·C] as [P, G, C] in the type of the sums."""
    wide = ()
    for i in tl.static_range(len(rows)):
        wide = wide + (tl.reshape(rows[i], [rows[i].shape[0], GROUPS, CHANNELS]).to(ACCUMULATOR),)
    return wide


def _by_columns(kernel: Tensor, x: Tensor) -> bool:
    """Whether columns slide and rows lie side by side: then the taps of a step are adjacent in memory."""
    return channels_fastest(kernel) and channels_fastest(x)


def _turned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows and columns exchanged: of maps, and of windows too where there are."""
    return tuple(t.transpose(-2, -1) if t.dim() == 5 else t.transpose(-2, -1).transpose(2, 3) for t in tensors)


def _turned_window(window: Window) -> Window:
    size, stride, padding, dilation = ((columns, rows) for rows, columns in window[:4])
    return Window(size, stride, padding, dilation)


def _aligned(tensor: Tensor) -> bool:
    """Whether each pixel's channels begin at 16 bytes, as a compiler sees it."""
    strides = tensor.stride()
    return strides[0] % 16 == strides[3] % 16 == strides[4] % 16 == 0 and tensor.data_ptr() % 16 == 0


def _block(config: Config, *tensors: Tensor) -> Pair:
    """Groups and channels of each in a program; one group where a group's channels do not follow the last one's."""
    _, groups, channels, *_ = tensors[0].shape
    joined = all(tensor.stride(1) == channels * tensor.stride(2) for tensor in tensors)
    return config.block(groups if joined else 1, channels)


def problem_of(
    x: Tensor, size: Pair | torch.Size, window: Window, *, kernel: Tensor | None = None, features: int = 0,
    transposed: bool = False,
) -> Problem:  # fmt: skip
    """The problem of a launch over ``size`` = (rows, columns) positions."""
    axis = int(kernel is not None and _by_columns(kernel, x))
    last = channels_fastest(x)
    multiple = window.stride[axis] if transposed else 1
    return Problem(
        x.shape[2], x.shape[1], size[0] * size[1], size[axis], window.kernel_size[axis], multiple, transposed,
        features,
        last, last and _aligned(x), x.dtype,
    )  # fmt: skip


def weighted_sum(
    x: Tensor,
    kernel: Tensor,
    span: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    window: Window,
    config: Config,
    transposed: bool,
) -> Tensor:
    """Launch the kernel of aggregate or, ``transposed``, of transpose; with a span, ``kernel`` holds features."""
    if out.numel() == 0:
        return out
    target, kernel_axes = out, "b c h w" if span is not None else "b g k c h w"
    weight_lanes = span is None and not channels_fastest(kernel)
    if span is None and _by_columns(kernel, x):
        (x, target, kernel), window = _turned(x, out, kernel), _turned_window(window)
    batch, groups, channels, height, width = target.shape
    block_groups, block_channels = _block(config, x, target)
    channel_blocks = ceil_divide(channels, block_channels) if block_groups == 1 else 1
    # A tile's first row has window row 0 in a source row.
    row_tiles = ceil_divide(height + (window.padding[0] % window.stride[0] if transposed else 0), config.rows)
    # One program per (group block, channel block, row tile, columns of all images), fastest first.
    grid = (
        ceil_divide(groups, block_groups) * channel_blocks * row_tiles * ceil_divide(batch * width, config.columns),
    )
    features = kernel.shape[1] if span is not None else 0
    unused = View(x)
    arguments = {
        "x": view(x, "b g c h w"),
        "weight": view(kernel, kernel_axes),
        "span": unused if span is None else view(span, "k c"),
        "bias": unused if bias is None else view(bias, "k"),
        "out": view(target, "b g c h w"),
        "batch": batch,
        "groups": groups,
        "channels": channels,
        "x_height": x.shape[3],
        "x_width": x.shape[4],
        "height": height,
        "width": width,
        "row_tiles": row_tiles,
        "channel_blocks": channel_blocks,
        "WINDOW": window,
        "TRANSPOSED": transposed,
        "FEATURES": features,
        "BLOCK_FEATURES": min(FEATURES, max(16, next_power_of_2(features))),
        "HAS_BIAS": bias is not None,
        "X_LANES": not channels_fastest(x),
        "WEIGHT_LANES": weight_lanes,
        **precision(kernel[:, None]),
        "UPCAST": upcast(x.dtype),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "GROUPS": block_groups,
        "CHANNELS": block_channels,
        "LOADS": config.loads,
    }
    launch(weighted_sum_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=1)
    return out


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda weight, x, window: problem_of(x, weight.shape[4:], window, kernel=weight),
    reference=lambda weight, x, window: eager.aggregate(*at_least_float32(weight, x), window),
    name="aggregate.rows",
)
def aggregate(weight: Tensor, x: Tensor, window: Window, *, config: Config) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]; [B,G,C,H',W'] in the memory order of x."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    return weighted_sum(x, weight, None, None, out, window, config, transposed=False)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda weight, g, size, window: problem_of(g, size, window, kernel=weight, transposed=True),
    reference=lambda weight, g, size, window: eager.transpose(*at_least_float32(weight, g), size, window),
    name="transpose.rows",
)
def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window, *, config: Config) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]; [B,G,C,H,W] in the memory order of g."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    return weighted_sum(g, weight, None, None, out, window, config, transposed=True)


def _reference(g: Tensor, x: Tensor, window: Window, padded: bool = False) -> Tensor:
    """The eager path, for the tuner."""
    out = eager.correlate(*at_least_float32(g, x), window)
    rows = window.kernel_size[0]
    return torch.nn.functional.pad(out, (0,) * 7 + (next_power_of_2(rows) - rows,)) if padded else out


@tunable(
    CONFIGS,
    correlate_heuristic,
    problem=lambda g, x, window, padded=False: problem_of(x, g.shape[3:], window, kernel=None if padded else g),
    reference=_reference,
    name="correlate.rows",
)
def correlate(g: Tensor, x: Tensor, window: Window, padded: bool = False, *, config: Config) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H',W'] in the memory order of g.

    ``padded``: Kh is padded with zeros to a power of two, in memory [B, H', W', Kw, G, Kh].
    """
    batch, groups, channels, height, width = g.shape
    if padded:
        steps = next_power_of_2(window.kernel_size[0])
        shape = (batch, height, width, window.kernel_size[1], groups, steps)
        out = torch.empty(shape, dtype=g.dtype, device=g.device).permute(0, 4, 5, 3, 1, 2)
    else:
        out = empty_kernel_layout(g, window.kernel_size)
    if out.numel() == 0:
        return out
    target = out
    if not padded and _by_columns(g, x):
        (g, x, target), window = _turned(g, x, out), _turned_window(window)
        height, width = width, height
    block_groups, block_channels = _block(config, x, g)
    channel_blocks = ceil_divide(channels, block_channels) if block_groups == 1 else 1
    row_tiles = ceil_divide(height, config.rows)
    # One program per (group block, row tile, columns of all images), fastest first; it walks the channels.
    grid = (ceil_divide(groups, block_groups) * row_tiles * ceil_divide(batch * width, config.columns),)
    arguments = {
        "g": view(g, "b g c h w"),
        "x": view(x, "b g c h w"),
        "out": view(target, "b g k c h w"),
        "batch": batch,
        "groups": groups,
        "channels": channels,
        "x_height": x.shape[3],
        "x_width": x.shape[4],
        "height": height,
        "width": width,
        "row_tiles": row_tiles,
        "channel_blocks": channel_blocks,
        "WINDOW": window,
        "PADDED": padded,
        "ALL_CHANNELS": channel_blocks == 1,
        "X_LANES": not channels_fastest(x),
        "OUT_LANES": not padded and not channels_fastest(g),
        "ACCUMULATOR": accumulator(x.dtype),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "GROUPS": block_groups,
        "CHANNELS": block_channels,
        "LOADS": config.loads,
    }
    launch(_correlate_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=1)
    return out
