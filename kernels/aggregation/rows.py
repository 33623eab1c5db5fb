"""aggregate and transpose for zero-padded windows: rows that slide over registers (see ``tiles``).

They are one kernel. The dynamic kernel is read from memory, or generated (``involution.forward``): the taps of a step
are then a matrix product of features [Q·P, R] with one column of the windows' weights [R, G·S].

Per output pixel and group aggregate reads K² weights and C values and writes C, generated R/G and C values; a warp
issues C·K²/32 multiply-adds for it and about as many conversions, loads and moves, which bind where memory does not.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation import bands, eager
from kernels.aggregation.configs import (
    CONFIGS,
    Config,
    by_columns,
    fits_shared_memory,
    heuristic,
    in_one_piece,
    phases,
    pieces,
    problem_of,
)
from kernels.aggregation.correlate import correlate as correlate_rows
from kernels.aggregation.tiles import (
    across,
    common_arguments,
    load_rows,
    narrowed,
    pitch,
    place,
    slide,
    sources,
    turned,
    unstack,
)
from kernels.dtypes import accumulator_dtype, precision, upcast
from kernels.launch import launch, next_power_of_2
from kernels.layout import channels_fastest, empty_like_layout
from kernels.products import dot
from kernels.tuning import repeated, tunable
from kernels.views import View, view
from kernels.windows import Pair, Window

# Features in one product, and in a transposed one, whose operands fill registers; more are summed over several.
FEATURES, TRANSPOSED_FEATURES = 128, 32


@triton.jit
def _generate(
    features, p_features, m_features, p_span, m_span, stride_r,
    R: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Taps [Q·P, G·S] from features at ``p_features`` and one column of the windows' weights at ``p_span``."""
    b_taps = tl.zeros([p_features.shape[0], p_span.shape[1]], ACCUMULATOR)
    for first in tl.static_range(0, R, BLOCK):
        o_feature = first + tl.arange(0, BLOCK)
        m_feature = o_feature < R
        p_feature = p_features + (o_feature.to(tl.int64) * features.c)[None, :]
        if ALIGNED:
            p_feature = tl.multiple_of(p_feature, [ALIGNED, ALIGNED])
        b_features = tl.load(p_feature, mask=m_features & m_feature[None, :], other=0)
        b_span = tl.load(p_span + (o_feature * stride_r)[:, None], mask=m_feature[:, None] & m_span, other=0)
        b_taps = dot(b_features, b_span, b_taps, UPCAST)
    return b_taps


@triton.jit
def weighted_sum_kernel(
    x,  # [B, G, C, x_height, x_width]; the gradient of the output if TRANSPOSED
    weight,  # [B, G, Kh, Kw, H', W'], Kw its channels; features [B, R, H', W'] if there are FEATURES
    span,  # [G·Kh·Kw, R], not read without FEATURES
    bias,  # [G·Kh·Kw], not read without HAS_BIAS
    out,  # [B, G, C, height, width]
    sizes, row_tiles, channel_blocks,
    WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, X_LANES: tl.constexpr, WEIGHT_LANES: tl.constexpr,
    PAIRS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    batch, groups, channels, x_height, x_width, height, width = sizes
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    PARTS: tl.constexpr = PAIRS + 1
    BLOCK: tl.constexpr = CHANNELS // PARTS  # of channels, or of pairs
    REPEATED: tl.constexpr = TRANSPOSED + WEIGHT_LANES == 0
    STEPS: tl.constexpr = pitch(KERNEL_H)
    SLOTS: tl.constexpr = pitch(ROWS)
    FIRST: tl.constexpr = sources(WINDOW, ROWS, TRANSPOSED)[0]
    END: tl.constexpr = sources(WINDOW, ROWS, TRANSPOSED)[1]
    tile = place(
        batch, groups, channels // PARTS, width, row_tiles, channel_blocks, ROWS, COLUMNS, GROUPS, BLOCK, STEPS
    )
    o_slot = tile.slot[:, None]
    # ``first`` is source row 0 of the tile. The rows of the taps: [Q·P, 1], or [Q·P, G·S] if TRANSPOSED.
    o_step, o_tap_group = tile.step, tile.tap_group
    m_step = ((o_step < KERNEL_H) & (o_tap_group < groups - tile.group))[None, :]
    if TRANSPOSED:
        first = tile.row + WINDOW.padding[0]
        o_turned = o_slot + o_step[None, :] * WINDOW.dilation[0]
        o_distance = o_turned % SLOTS - o_step[None, :] * WINDOW.dilation[0]
        o_tap_row = first + o_distance
        m_tap = (o_turned % SLOTS < ROWS) & (o_tap_row >= 0) & (o_tap_row < x_height)
    else:
        first = tile.row * WINDOW.stride[0] - WINDOW.padding[0]
        o_tap_row = tile.row + o_slot
        m_tap = (o_slot < ROWS) & (o_tap_row < height)
        if REPEATED:
            # Taps beyond the window, the groups and the map repeat the last: nothing that is stored reads them, and
            # masks, which are true now, would take an instruction or two for every tap that a lane loads.
            o_step, o_tap_group = tl.minimum(o_step, KERNEL_H - 1), tl.minimum(o_tap_group, groups - 1 - tile.group)
            o_tap_row = tl.minimum(o_tap_row, height - 1)
            m_step, m_tap = (o_step >= 0)[None, :], o_tap_row >= 0

    o_channel = (tile.channel.to(tl.int64) * x.c)[None, :]
    # ROWS times [P, G, C], of pairs ROWS more
    sums = (tl.zeros([COLUMNS, GROUPS, BLOCK], ACCUMULATOR),) * (ROWS * PARTS)
    for kw in range(KERNEL_W):
        # The source's columns, and those of the outputs whose windows they are in.
        if TRANSPOSED:
            o_x = tile.column + WINDOW.padding[1] - kw * WINDOW.dilation[1]
            m_x = tile.m_column & (o_x >= 0) & (o_x < x_width)
            o_tap_column = tile.tap_column + WINDOW.padding[1] - kw * WINDOW.dilation[1]
            m_tap_column = ((o_tap_column >= 0) & (o_tap_column < x_width))[:, None]
        else:
            o_x = tile.column * WINDOW.stride[1] - WINDOW.padding[1] + kw * WINDOW.dilation[1]
            m_x = tile.m_column & (o_x >= 0) & (o_x < x_width)
            o_tap_column = tile.tap_column
            m_tap_column = (o_tap_column >= 0)[:, None]
        p_column = x.ptr + tile.group * x.g + across(tile.batch, o_x, x, X_LANES)
        m_column = m_x[:, None] & tile.m_channel[None, :]
        rows = load_rows(p_column, o_channel, x.h, first, x_height, m_column, FIRST, min(FIRST + LOADS, END), PAIRS)
        # [Q·P, G·S]
        p_pixel = weight.ptr + tile.group * weight.g + across(tile.tap_batch, o_tap_column, weight, False)[:, None]
        if FEATURES:
            o_span = ((tile.group + o_tap_group) * KERNEL_H + o_step) * KERNEL_W + kw
            p_span = span.ptr + (o_span * span.k)[None, :]
            b_bias = tl.zeros([1, GROUPS * STEPS], ACCUMULATOR)
            if HAS_BIAS:
                b_bias = tl.load(bias.ptr + (o_span * bias.k)[None, :], mask=m_step, other=0).to(ACCUMULATOR)
            if TRANSPOSED:
                b_taps = tl.zeros([SLOTS * COLUMNS, GROUPS * STEPS], ACCUMULATOR)
                for turn in tl.static_range((SLOTS - 1 + (KERNEL_H - 1) * WINDOW.dilation[0]) // SLOTS + 1):
                    o_back = o_slot - turn * SLOTS
                    o_row = first + o_back
                    m_row = (o_row >= 0) & (o_row < x_height) & m_tap_column
                    b_turn = _generate(
                        weight, p_pixel + o_row.to(tl.int64) * weight.h, m_row, p_span, m_step, span.c,
                        FEATURES, BLOCK_FEATURES, ALIGNED, ACCUMULATOR, UPCAST,
                    )  # fmt: skip
                    b_taps = tl.where(m_row & (o_turned // SLOTS == turn), b_turn + b_bias, b_taps)
            else:
                b_taps = b_bias + _generate(
                    weight, p_pixel + o_tap_row.to(tl.int64) * weight.h, m_tap, p_span, m_step, span.c,
                    FEATURES, BLOCK_FEATURES, ALIGNED, ACCUMULATOR, UPCAST,
                )  # fmt: skip
        else:
            o_entry = o_tap_group.to(OFFSET) * weight.g + o_step.to(OFFSET) * weight.k
            o_entry += tl.full([], kw, OFFSET) * weight.c
            p_tap = p_pixel + (o_tap_row.to(OFFSET) * weight.h + o_entry[None, :])
            # As in ``across``: what lies across lanes.
            p_tap = tl.max_contiguous(tl.multiple_of(p_tap, [1, 1]), [8, 1] if WEIGHT_LANES else [1, 8])
            b_taps = tl.load(p_tap) if REPEATED else tl.load(p_tap, mask=m_tap & m_tap_column & m_step, other=0)
        taps = unstack(b_taps, COLUMNS, GROUPS, STEPS, ACCUMULATOR)
        sums = slide(sums, rows, taps, FIRST, WINDOW, TRANSPOSED, GROUPS, BLOCK, ROWS)
        for source in tl.static_range(FIRST + LOADS, END, LOADS):
            rows = load_rows(
                p_column, o_channel, x.h, first, x_height, m_column, source, min(source + LOADS, END), PAIRS
            )
            sums = slide(sums, rows, taps, source, WINDOW, TRANSPOSED, GROUPS, BLOCK, ROWS)

    o_channel = tl.arange(0, GROUPS * CHANNELS)
    p_out = out.ptr + tile.group * out.g + across(tile.batch, tile.column, out, X_LANES)[:, None]
    p_out += ((tile.first_channel * PARTS + o_channel).to(tl.int64) * out.c)[None, :]
    m_out = tile.m_column[:, None] & (o_channel < tile.channels * PARTS)[None, :]
    for r in tl.static_range(ROWS):
        b_out = narrowed(sums[r::ROWS], out.ptr.dtype.element_ty)
        tl.store(p_out + (tile.row + r).to(tl.int64) * out.h, b_out, mask=m_out & (tile.row + r < height))


def weighted_sum(
    x: Tensor, kernel: Tensor, span: Tensor | None, bias: Tensor | None, out: Tensor, window: Window, config: Config,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """Fills ``out`` with aggregate or, ``transposed``, transpose; with a span, ``kernel`` holds features."""
    if out.numel() == 0:
        return out
    # Of the whole kernel, for a phase's positions are not adjacent in memory, but lie between those of others.
    target, weight_lanes = out, span is None and not channels_fastest(kernel)
    if span is None and by_columns(kernel, x):
        window, (x, target, kernel) = turned(window, x, out, kernel)
    if not transposed:
        _launch_sum(x, kernel, span, bias, target, window, config, transposed, weight_lanes)
        return out
    for phase, (rows, columns), outputs in phases(window):
        part = target[(..., *outputs)]
        if 0 in phase.kernel_size:
            part.zero_()
        elif part.numel() > 0:
            taps = kernel[:, :, rows, columns] if span is None else kernel
            part_span, part_bias = (_part(each, out.shape[1], window, rows, columns) for each in (span, bias))
            _launch_sum(x, taps, part_span, part_bias, part, phase, config, transposed, weight_lanes)
    return out


def _launch_sum(
    x: Tensor, kernel: Tensor, span: Tensor | None, bias: Tensor | None, out: Tensor, window: Window, config: Config,
    transposed: bool, weight_lanes: bool,
) -> None:  # fmt: skip
    """One launch, of transpose without a stride; ``weight_lanes``: of a kernel that is read, pixels are adjacent."""
    kernel_axes = "b c h w" if span is not None else "b g k c h w"
    common, programs = common_arguments(x, out, window, config)
    features, unused = kernel.shape[1] if span is not None else 0, View(x)
    most = TRANSPOSED_FEATURES if transposed else FEATURES
    # The largest power of two that divides their number, so that no block is partly empty; of fewer than 16 one is.
    block_features = max(16, min(most, features & -features))
    aligned = 0
    if 0 < features < 16:  # bytes; strides of 16 numbers and more tell Triton themselves how accesses align
        strides = kernel.stride()
        aligned = math.gcd(16, kernel.data_ptr(), *(kernel.itemsize * strides[axis] for axis in (0, 2, 3)))
    arguments = {
        "x": view(x, "b g c h w"), "weight": view(kernel, kernel_axes),
        "span": unused if span is None else view(span, "k c"), "bias": unused if bias is None else view(bias, "k"),
        "out": view(out, "b g c h w"), **common,
        "TRANSPOSED": transposed, "FEATURES": features, "BLOCK_FEATURES": block_features, "ALIGNED": aligned,
        "HAS_BIAS": bias is not None, "WEIGHT_LANES": weight_lanes, "OFFSET": precision(kernel[:, None])["OFFSET"],
        "UPCAST": upcast(x.dtype),
    }  # fmt: skip
    # One program per (group block, channel block, row tile, columns of all images), fastest first.
    grid = (programs * common["channel_blocks"],)
    # The next step's operands of a product are copied to shared memory while this step's taps are used, unless features
    # leave a block partly empty or, transposed, do not fit. AMD's compiler would hold them in registers.
    ahead = features > 0 and features % block_features == 0 and not torch.version.hip
    if ahead and transposed:
        slots, taps = next_power_of_2(config.rows), window.kernel_size[0]
        turns = (slots - 1 + (taps - 1) * window.dilation[0]) // slots + 1
        ahead = fits_shared_memory(slots, config.columns, common["GROUPS"], taps, features, x.dtype, turns)
    stages = 2 if ahead else 1
    launch(weighted_sum_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=stages)


def _part(entries: Tensor | None, groups: int, window: Window, rows: slice, columns: slice) -> Tensor | None:
    """Some rows and columns of the windows of entries [G·Kh·Kw, ...]."""
    if entries is None:
        return None
    return entries.unflatten(0, (groups, *window.kernel_size))[:, rows, columns].flatten(0, 2)


def _read(x: Tensor, weight: Tensor, out: Tensor, window: Window, config: Config, transposed: bool) -> Tensor:
    """``weighted_sum`` with a dynamic kernel that is read; the sums of a window's pieces meet in their own type."""
    if in_one_piece(window):
        return weighted_sum(x, weight, None, None, out, window, config, transposed)
    total = torch.zeros_like(out, dtype=accumulator_dtype(out.dtype))
    for piece, rows, columns in pieces(window):
        part = weight[:, :, rows, columns]
        total += weighted_sum(x, part, None, None, torch.empty_like(total), piece, config, transposed)
    return out.copy_(total)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda weight, x, window: problem_of(x, weight.shape[4:], window, kernel=weight),
    reference=eager.aggregate,
    name="aggregate.rows",
)
def aggregate(weight: Tensor, x: Tensor, window: Window, *, config: Config) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]; [B,G,C,H',W'] in the memory order of x."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    return _read(x, weight, out, window, config, transposed=False)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda weight, g, size, window: problem_of(g, size, window, kernel=weight, transposed=True),
    reference=eager.transpose,
    name="transpose.rows",
)
def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window, *, config: Config) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]; [B,G,C,H,W] in the memory order of g."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    return _read(g, weight, out, window, config, transposed=True)


@repeated
def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H',W'] in the memory order of g."""
    return bands.correlate(g, x, window) if bands.fits(g, x, window) else correlate_rows(g, x, window)
