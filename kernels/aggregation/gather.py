# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
"""The algebra for windows that do not slide: those too large for ``rows``, and clamped ones (``neighborhood``).

Two kernels: a gather that sums (aggregate, transpose) and one that multiplies (correlate). ``transpose`` is
``aggregate`` read from the other end: each input position looks up the outputs whose windows hold it, so nothing is
atomic, every element is written once, and the same input gives the same bits.

Cost per output pixel and group, in elements: aggregate reads K² weights and C values and writes C; correlate reads 2·C
and writes K²; transpose reads K² weights and C gradients and writes C. Neighbouring pixels share all but a few of
their neighbours, which L1 and L2 serve; the dynamic kernel itself is read exactly once and sets the floor.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation import eager
from kernels.aggregation.configs import GATHERS, Gather, GatherProblem, gather_heuristic, gather_problem
from kernels.dtypes import precision
from kernels.launch import ceil_divide, launch
from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.neighborhood.configs import Weights
from kernels.neighborhood.launchers import correlate as correlate_clamped
from kernels.neighborhood.launchers import mix as mix_clamped
from kernels.neighborhood.launchers import transpose as transpose_clamped
from kernels.tuning import tunable
from kernels.views import at, view
from kernels.windows import Pair, Window
from kernels.windows_triton import inverse_neighbour, neighbour, split_program

KERNEL_AXES = "b g c k h w"


@triton.jit
def _pixels(i_pixel, height, width, BLOCK: tl.constexpr):
    """Rows and columns of a block of pixels, and which there are, [1, P] each."""
    o_pixel = i_pixel * BLOCK + tl.arange(0, BLOCK)
    return (o_pixel // width)[None, :], (o_pixel % width)[None, :], (o_pixel < height * width)[None, :]


@triton.jit
def _entries(kernel, o_kernel_h, o_kernel_w, o_row, o_column, OFFSET: tl.constexpr):
    """[S, P]: pointers to window positions of a dynamic kernel's outputs."""
    p_step = kernel.ptr + o_kernel_h.to(OFFSET) * kernel.c + o_kernel_w.to(OFFSET) * kernel.k
    return p_step + o_row.to(OFFSET) * kernel.h + o_column.to(OFFSET) * kernel.w


@triton.jit
def _gather_sum_kernel(
    weight,  # [B, G, Kh, Kw, H', W'], Kh under ``c`` and Kw under ``k``
    source,  # [B, G, C, source_height, source_width]; the gradient of the output if TRANSPOSED
    out,  # [B, G, C, height, width]
    groups, channels, source_height, source_width, height, width,
    WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    i_pixel, i_channel, i_group, i_batch = split_program(
        tl.cdiv(height * width, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS), groups
    )
    weight, source, out = at(weight, i_batch, i_group), at(source, i_batch, i_group), at(out, i_batch, i_group)
    o_row, o_column, m_pixel = _pixels(i_pixel, height, width, BLOCK_PIXELS)
    o_channel = (i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
    m_channel = o_channel < channels
    p_channel = source.ptr + (o_channel * source.c)[None, :, None]

    # [C, P]
    b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATOR)
    for first_step in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        m_step = m_pixel & (o_step < KERNEL_H * KERNEL_W)
        # Both [S, P]: where the source is, and the output whose dynamic kernel weighs it.
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        if TRANSPOSED:
            o_source_h, m_row = inverse_neighbour(o_row, o_kernel_h, source_height, WINDOW, 0)
            o_source_w, m_column = inverse_neighbour(o_column, o_kernel_w, source_width, WINDOW, 1)
            o_output_h, o_output_w = o_source_h, o_source_w
        else:
            o_source_h, m_row = neighbour(o_row, o_kernel_h, source_height, WINDOW, 0)
            o_source_w, m_column = neighbour(o_column, o_kernel_w, source_width, WINDOW, 1)
            o_output_h, o_output_w = o_row, o_column
        m_step = m_step & m_row & m_column
        # [S, P]
        p_weight = _entries(weight, o_kernel_h, o_kernel_w, o_output_h, o_output_w, OFFSET)
        b_weight = tl.load(p_weight, mask=m_step, other=0)
        o_source = o_source_h.to(OFFSET) * source.h + o_source_w.to(OFFSET) * source.w
        # [S, C, P]
        b_source = tl.load(
            p_channel + o_source[:, None, :], mask=m_step[:, None, :] & m_channel[None, :, None], other=0
        )
        b_sum += tl.sum(b_weight[:, None, :].to(ACCUMULATOR) * b_source.to(ACCUMULATOR), axis=0)

    tl.store(
        out.ptr + (o_channel * out.c)[:, None] + o_row.to(OFFSET) * out.h + o_column.to(OFFSET) * out.w,
        b_sum.to(out.ptr.dtype.element_ty),
        mask=m_channel[:, None] & m_pixel,
    )


@triton.jit
def _correlate_kernel(
    g,  # [B, G, C, height, width]
    x,  # [B, G, C, source_height, source_width]
    out,  # [B, G, Kh, Kw, height, width], Kh under ``c`` and Kw under ``k``
    groups, channels, source_height, source_width, height, width,
    WINDOW: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    i_pixel, _i_channel, i_group, i_batch = split_program(tl.cdiv(height * width, BLOCK_PIXELS), 1, groups)
    g, x, out = at(g, i_batch, i_group), at(x, i_batch, i_group), at(out, i_batch, i_group)
    o_row, o_column, m_pixel = _pixels(i_pixel, height, width, BLOCK_PIXELS)
    o_pixel_g = o_row.to(OFFSET) * g.h + o_column.to(OFFSET) * g.w

    for first_step in range(0, KERNEL_H * KERNEL_W, BLOCK_STEPS):
        o_step = (first_step + tl.arange(0, BLOCK_STEPS))[:, None]
        o_kernel_h, o_kernel_w = o_step // KERNEL_W, o_step % KERNEL_W
        o_input_h, m_row = neighbour(o_row, o_kernel_h, source_height, WINDOW, 0)
        o_input_w, m_column = neighbour(o_column, o_kernel_w, source_width, WINDOW, 1)
        m_step = m_pixel & (o_step < KERNEL_H * KERNEL_W)
        m_input = m_step & m_row & m_column
        o_input = o_input_h.to(OFFSET) * x.h + o_input_w.to(OFFSET) * x.w
        # [S, P]
        b_sum = tl.zeros([BLOCK_STEPS, BLOCK_PIXELS], ACCUMULATOR)
        for first_channel in range(0, channels, BLOCK_CHANNELS):
            o_channel = (first_channel + tl.arange(0, BLOCK_CHANNELS)).to(OFFSET)
            m_channel = o_channel < channels
            # [C, P]
            b_g = tl.load(g.ptr + (o_channel * g.c)[:, None] + o_pixel_g, m_channel[:, None] & m_pixel, other=0)
            # [S, C, P]
            b_x = tl.load(
                x.ptr + (o_channel * x.c)[None, :, None] + o_input[:, None, :],
                mask=m_input[:, None, :] & m_channel[None, :, None],
                other=0,
            )
            b_sum += tl.sum(b_g[None, :, :].to(ACCUMULATOR) * b_x.to(ACCUMULATOR), axis=1)
        p_out = _entries(out, o_kernel_h, o_kernel_w, o_row, o_column, OFFSET)
        tl.store(p_out, b_sum.to(out.ptr.dtype.element_ty), mask=m_step)


def _common_arguments(
    source: Tensor, outputs: Tensor, window: Window, config: Gather, *others: Tensor
) -> dict[str, Any]:
    """What both kernels take alike, of maps [B, G, C, H, W]."""
    _, groups, channels, height, width = outputs.shape
    return {
        "groups": groups, "channels": channels, "source_height": source.shape[3], "source_width": source.shape[4],
        "height": height, "width": width, "WINDOW": window, **config.blocks, **precision(source, outputs, *others),
    }  # fmt: skip


def _gather_sum(
    weight: Tensor, source: Tensor, out: Tensor, window: Window, transposed: bool, config: Gather
) -> Tensor:
    batch, groups, channels, height, width = out.shape
    # One program per (pixel tile, channel block, group, batch entry), on one axis: the others end at 65,535.
    pixel_blocks = ceil_divide(height * width, config.block_pixels)
    grid = (pixel_blocks * ceil_divide(channels, config.block_channels) * groups * batch,)
    arguments = {
        "weight": view(weight, KERNEL_AXES),
        "source": view(source, "b g c h w"),
        "out": view(out, "b g c h w"),
        **_common_arguments(source, out, window, config, weight),
        "TRANSPOSED": transposed,
    }
    launch(_gather_sum_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out


@tunable(
    GATHERS,
    gather_heuristic,
    problem=lambda weight, x, window: gather_problem(weight, x, weight.shape[4:], window.kernel_size),
    reference=eager.aggregate,
    name="gather.aggregate",
)
def gather_aggregate(weight: Tensor, x: Tensor, window: Window, *, config: Gather) -> Tensor:
    """``aggregate`` with every output's own window."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    return _gather_sum(weight, x, out, window, transposed=False, config=config)


@tunable(
    GATHERS,
    gather_heuristic,
    problem=lambda weight, g, size, window: gather_problem(weight, g, size, window.kernel_size),
    reference=eager.transpose,
    name="gather.transpose",
)
def gather_transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window, *, config: Gather) -> Tensor:
    """``transpose`` with every output's own window."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    return _gather_sum(weight, g, out, window, transposed=True, config=config)


def _correlation_problem(g: Tensor, x: Tensor, window: Window) -> GatherProblem:
    """As ``gather_problem``; the dynamic kernel is written in the memory order of g."""
    steps = math.prod(window.kernel_size)
    return GatherProblem(g.shape[2], g.shape[3] * g.shape[4], steps, channels_fastest(g), channels_fastest(x), x.dtype)


@tunable(GATHERS, gather_heuristic, problem=_correlation_problem, reference=eager.correlate, name="gather.correlate")
def gather_correlate(g: Tensor, x: Tensor, window: Window, *, config: Gather) -> Tensor:
    """``correlate`` with every output's own window."""
    out = empty_kernel_layout(g, window.kernel_size)
    batch, groups, _, height, width = g.shape
    # One program per (pixel tile, group, batch entry); it walks the whole window.
    grid = (ceil_divide(height * width, config.block_pixels) * groups * batch,)
    arguments = {
        "g": view(g, "b g c h w"),
        "x": view(x, "b g c h w"),
        "out": view(out, KERNEL_AXES),
        **_common_arguments(x, g, window, config, out),
    }
    launch(_correlate_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out


def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]; [B,G,C,H',W'] in the memory order of x."""
    if x.numel() == 0:
        return empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    if window.clamped:
        return mix_clamped(x, Weights(weight), window)
    return gather_aggregate(weight, x, window)


def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]; [B,G,C,H,W] in the memory order of g."""
    if g.numel() == 0:
        return empty_like_layout(g, (*g.shape[:3], *input_size))
    if window.clamped:
        return transpose_clamped(g, Weights(weight), window)
    return gather_transpose(weight, g, input_size, window)


def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H',W'] in the memory order of g."""
    out = empty_kernel_layout(g, window.kernel_size)
    if g.numel() == 0:
        return out
    if window.clamped:
        return correlate_clamped(g, x, out, window)
    return gather_correlate(g, x, window)
