"""Depthwise convolution as matrix products with banded weights; ``backward`` transposes them for the weight gradient.

A *tile* is TILE_HEIGHT x TILE_WIDTH outputs of one channel, under which lie TILE_HEIGHT + K − 1 input rows of SPAN
columns. Input row i adds to all outputs (r, p) of its tile at once:

    out[tile, (r, p)] += Σ_j x[tile, i, j] · w[i − r, j − p],     w[k, l] = 0 outside the kernel

The tiles of all images of a channel share the weights, so they are the rows of a matrix product. Those of step i lie
side by side, since the *band* holds the kernel's rows in reverse: band[q, j − p] = w[c − q, j − p] with q = c − i + r.
It is stored once per input column of a span, moved by one each time, as the product takes it. Where a tile is as wide
as its span, four times suffice, since windows may begin at multiples of 8 bytes: a quarter of the memory at 28 x 28.

A dilated kernel is one with zeros between its columns and, on small maps, its rows; on others a tile's rows lie as far
apart as the kernel's, and none of its steps is for zeros.

Cost per output at K = 17 (tiles of 8 x 16, a span of 32, 256 tiles a block) against a thread per output:

    elements loaded     24·32/128 = 6 of x, 24·32/256 = 3 of the band     2·289: x and weight
    multiply-adds       24·32 = 768, 38 % of them with weights            289
    cycles of an SM     0.4, its tensor cores doing 2,048 a cycle         2.3, its CUDA cores doing 128 a cycle

A map no wider than a span has one tile across and no halo: at 14 x 14 that halves everything. The loads are 16-byte
vectors which the software pipeline fetches ahead, 8 bytes for the band, so that L1 keeps it. In float32 each product
is three (``products.dot``). Rows must be aligned for this (``rows``): channels-last tensors, and maps with rows of
another length than a multiple of 16 bytes, are copied before and after, two passes over memory where a thread per
output would cost ten; sums, channels first, need no copy where rows are multiples of 8 bytes.

PyTorch's own convolution is a config like the others (``LIBRARY``): tuning always times it, and small problems get it
untuned.

A value of x that is not finite may reach any output of its own image and channel: it meets the band's zeros. It reaches
no other image and no other channel.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.depthwise import eager
from kernels.depthwise.configs import CONFIGS, Config, Problem, heuristic, tile_shape
from kernels.depthwise.rows import are_rows, check_size, in_layout_of, new_rows, rows_of, vector_of
from kernels.dtypes import multiplies, precision
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.products import dot
from kernels.tuning import tunable
from kernels.views import View, view

SMALL_HEIGHT = 16  # of maps on which that would leave tiles half empty


# What only bounds loops and masks is no constant: each of a model's large kernels, and each of their branches, would
# have code of its own, which takes a second to compile.
@triton.jit(do_not_specialize=["channels", "height", "width", "out_width", "tiles", "tiles_h", "reach", "band_rows"])
def _convolution_kernel(
    x,  # [B, C, H, W] in rows, strides but the last and the width divided by VECTOR
    band_ptr,  # [C, COPIES, band_rows, LENGTH], contiguous
    bias,  # [C], not read without HAS_BIAS
    out,  # [B, C, H, W'], strides but the last and out_width divided by OUT_VECTOR
    channels, height, width, out_width, tiles, tiles_h, tiles_w, step, reach, band_rows,
    VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    COPIES: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    MARGIN: tl.constexpr = (SPAN - TILE_WIDTH) // 2
    tile_blocks = tl.cdiv(tiles, BLOCK_TILES)
    i_tile = tl.program_id(0) % tile_blocks
    i_channel = tl.program_id(0) // tile_blocks * BLOCK_CHANNELS
    # Blocks are [T, ...] for one channel and [C, T, ...] for more: a product of two axes is the faster one.
    b_sum = tl.zeros([BLOCK_TILES, TILE_HEIGHT * TILE_WIDTH], ACCUMULATOR)
    o_channel = i_channel.to(tl.int64)
    if BLOCK_CHANNELS > 1:
        o_channel += tl.arange(0, BLOCK_CHANNELS)[:, None, None]
        b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_TILES, TILE_HEIGHT * TILE_WIDTH], ACCUMULATOR)
    m_channel = o_channel < channels

    o_tile = (i_tile * BLOCK_TILES + tl.arange(0, BLOCK_TILES))[:, None]
    # Tiles of one height in all images follow each other, so that a program skips the input rows none of its own has.
    row_tiles = tiles // tiles_h
    first_top = i_tile * BLOCK_TILES // row_tiles * TILE_HEIGHT
    last_top = (tl.minimum((i_tile + 1) * BLOCK_TILES, tiles) - 1) // row_tiles * TILE_HEIGHT
    first_row = tl.maximum(reach - last_top, 0)
    last_row = tl.minimum(reach + tl.cdiv(height, step) - first_top, TILE_HEIGHT + 2 * reach)
    o_image = (o_tile % row_tiles // tiles_w // step).to(OFFSET)
    o_phase = o_tile % row_tiles // tiles_w % step
    o_top = o_tile // row_tiles * TILE_HEIGHT
    o_left = o_tile % tiles_w * TILE_WIDTH
    m_tile = m_channel & (o_tile < tiles)

    # Columns of the product's left factor are (row, column) of a span, [1, J]; they are its right one's rows, [J, 1].
    o_span = tl.arange(0, BLOCK_ROWS * SPAN)
    o_row = (o_top - reach + (o_span // SPAN)[None, :]) * step + o_phase
    o_column = o_left - MARGIN + (o_span % SPAN)[None, :]
    m_span = m_tile & (o_column >= 0) & (o_column < width * VECTOR)
    p_x = x.ptr + (o_channel * x.c + o_image * x.b + o_row.to(OFFSET) * x.h) * VECTOR + o_column
    o_output = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)[None, :]
    o_band_row = o_span % COPIES * band_rows + band_rows - TILE_HEIGHT - o_span // SPAN
    o_band = (o_band_row * LENGTH + (LENGTH - TILE_WIDTH - o_span % SPAN // COPIES * COPIES))[:, None]
    o_band += o_output // 4 * 4 + o_output % 4  # asynchronous copies of 16 bytes would pass L1 by
    o_band += o_output // TILE_WIDTH * (LENGTH - TILE_WIDTH)
    p_band = band_ptr + o_channel * (COPIES * band_rows * LENGTH) + o_band
    for i_row in range(first_row, last_row, BLOCK_ROWS):
        m_row = (o_row + i_row * step >= 0) & (o_row + i_row * step < height)
        o_step = tl.cast(i_row * step, OFFSET) * x.h * VECTOR
        # [T, J], [J, N]
        b_x = tl.load(p_x + o_step, mask=m_span & m_row, other=0)
        b_band = tl.load(p_band - i_row * LENGTH, mask=m_channel, other=0)
        b_sum = dot(b_x, b_band, b_sum, UPCAST)

    if HAS_BIAS:
        b_sum += tl.load(bias.ptr + o_channel * bias.c, mask=m_channel, other=0).to(ACCUMULATOR)
    o_row = (o_top + o_output // TILE_WIDTH) * step + o_phase
    o_column = o_left + o_output % TILE_WIDTH
    o_out = o_channel * out.c + o_image * out.b + o_row.to(OFFSET) * out.h
    m_out = m_tile & (o_row < height) & (o_column < out_width * OUT_VECTOR)
    p_out = out.ptr + o_out * OUT_VECTOR + o_column
    if ADD:
        b_sum += tl.load(p_out, mask=m_out, other=0).to(ACCUMULATOR)
    tl.store(p_out, b_sum.to(out.ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["band_rows", "rows"])
def _band_kernel(
    weight,  # [C, K, K], which spans KERNEL rows and EXTENT columns
    band_ptr,  # [C, COPIES, band_rows, LENGTH], contiguous
    band_rows, rows, row_dilation, dilation,
    KERNEL: tl.constexpr, EXTENT: tl.constexpr, FLIPPED: tl.constexpr, SPAN: tl.constexpr, TILE_WIDTH: tl.constexpr,
    COPIES: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    elements = COPIES * band_rows * LENGTH
    blocks = tl.cdiv(elements, BLOCK)
    i_channel = (tl.program_id(0) // blocks).to(tl.int64)
    o_element = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    o_kernel_h = rows - 1 - o_element // LENGTH % band_rows
    o_column = o_element // LENGTH // band_rows + LENGTH - TILE_WIDTH - o_element % LENGTH
    o_kernel_w = o_column + (EXTENT // 2 - (SPAN - TILE_WIDTH) // 2)
    m_weight = (o_element < elements) & (o_kernel_h >= 0) & (o_kernel_h < KERNEL)
    m_weight &= (o_kernel_w >= 0) & (o_kernel_w < EXTENT)
    m_weight &= (o_kernel_h % row_dilation == 0) & (o_kernel_w % dilation == 0)
    if FLIPPED:
        o_kernel_h, o_kernel_w = KERNEL - 1 - o_kernel_h, EXTENT - 1 - o_kernel_w
    o_weight = o_kernel_h // row_dilation * weight.h + o_kernel_w // dilation * weight.w
    b_weight = tl.load(weight.ptr + i_channel * weight.c + o_weight, mask=m_weight, other=0)
    tl.store(band_ptr + i_channel * elements + o_element, b_weight, mask=o_element < elements)


def band_of(
    weight: Tensor, flipped: bool, dilation: int, step: int, rows: int, config: Config, tile_width: int, span: int
) -> Tensor:
    """band[c, s, q, u] = weight[c, rows − 1 − q, s + length − tile_width − u + K//2 − margin] of the kernel with zeros
    between its columns and, unless rows lie ``step`` apart, its rows; 0 where there is no such weight."""
    copies, length = (4, 2 * tile_width) if span == tile_width else (span, tile_width)
    band_rows = rows + config.tile_height - 1
    shape = (weight.shape[0], copies, band_rows, length)
    band = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    elements = math.prod(shape[1:])
    block = next_power_of_2(elements) if interpreting() else 1024
    arguments = {
        "weight": view(weight[:, 0], "c h w"), "band_ptr": band, "band_rows": band_rows, "rows": rows,
        "row_dilation": dilation // step, "dilation": dilation, "KERNEL": extent(weight.shape[-1], dilation // step),
        "EXTENT": extent(weight.shape[-1], dilation), "FLIPPED": flipped, "SPAN": span, "TILE_WIDTH": tile_width,
        "COPIES": copies, "LENGTH": length, "BLOCK": block,
    }  # fmt: skip
    # One program per (block of the band, channel).
    grid = (ceil_divide(elements, block) * weight.shape[0],)
    launch(_band_kernel, grid, band.device, arguments, num_warps=4, num_stages=1)
    return band


def in_vectors(tensor: Tensor, vector: int = 0) -> View:
    """A view of rows whose strides count vectors, of 16 bytes or as many elements as are said: multiplying by them in a
    kernel tells Triton how accesses align."""
    strides, vector = view(tensor, "b c h w"), vector or vector_of(tensor)
    return strides._replace(b=strides.b // vector, c=strides.c // vector, h=strides.h // vector)


def extent(kernel_size: int, dilation: int) -> int:
    """How many columns a dilated kernel spans."""
    return (kernel_size - 1) * dilation + 1


def problem_of(x: Tensor, kernel_size: int, weight_gradient: bool = False) -> Problem:
    batch, channels, height, width = x.shape
    tile_width, span = tile_shape(kernel_size, width)
    copied = not are_rows(x)
    return Problem(batch, channels, height * width, kernel_size, tile_width, span, x.dtype, weight_gradient, copied)


def common_arguments(
    x: Tensor, rows: Sequence[Tensor], kernel_size: int, dilation: int, step: int, config: Config
) -> dict[str, Any]:
    """What the kernels of both passes take of a map x and two maps in rows; a tile's rows lie ``step`` apart."""
    (height, width), vector = x.shape[2:], vector_of(x)
    tile_width, span = tile_shape(extent(kernel_size, dilation), width)
    return {
        "channels": x.shape[1], "height": height, "width": rows[0].shape[3] // vector,
        "tiles_h": ceil_divide(ceil_divide(height, step), config.tile_height),
        "tiles_w": ceil_divide(width, tile_width), "step": step, "reach": extent(kernel_size, dilation // step) // 2,
        "VECTOR": vector, "UPCAST": interpreting(),  # its product of bfloat16 blocks is wrong
        **precision(*(tensor.transpose(0, 1)[None] for tensor in rows)),
        "TILE_HEIGHT": config.tile_height, "TILE_WIDTH": tile_width, "SPAN": span, "BLOCK_TILES": config.block_tiles,
        "BLOCK_ROWS": config.block_rows, "BLOCK_CHANNELS": config.block_channels,
    }  # fmt: skip


def convolve_rows(
    x: Tensor, source: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None = None, flipped: bool = False,
    dilation: int = 1, *, config: Config, add: bool = False,
) -> None:  # fmt: skip
    """The convolution of ``source``, which has x in rows, into or (``add``) onto the rows ``out``."""
    step = dilation if x.shape[2] > SMALL_HEIGHT else 1
    common = common_arguments(x, (source, out), weight.shape[-1], dilation, step, config)
    tiles = x.shape[0] * step * common["tiles_h"] * common["tiles_w"]
    rows = config.tile_height + 2 * common["reach"] + config.block_rows - 1
    band = band_of(weight, flipped, dilation, step, rows, config, common["TILE_WIDTH"], common["SPAN"])
    out_vector = math.gcd(vector_of(out), out.shape[3])
    # One program per (block of tiles, block of channels), tiles fastest: they share the band.
    grid = (ceil_divide(tiles, config.block_tiles) * ceil_divide(x.shape[1], config.block_channels),)
    arguments = {
        "x": in_vectors(source), "band_ptr": band, "bias": View(out) if bias is None else view(bias, "c"),
        "out": in_vectors(out, out_vector), "out_width": out.shape[3] // out_vector, "OUT_VECTOR": out_vector,
        **common, "tiles": tiles, "COPIES": band.shape[1], "band_rows": band.shape[2], "LENGTH": band.shape[3],
        "HAS_BIAS": bias is not None, "ADD": add,
    }  # fmt: skip
    stages = min(config.num_stages, 3) if torch.version.hip else config.num_stages  # 64 KiB of shared memory on AMD's
    launch(_convolution_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=stages)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda x, weight, _bias=None, _flipped=False, dilation=1: problem_of(x, extent(weight.shape[-1], dilation)),
    reference=eager.convolve,
    name="depthwise",
)
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, flipped: bool = False, dilation: int = 1, *, config: Config
) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c, i + (k − K//2)·dilation] (+ bias[c]), [B,C,H,W] in the memory order of x.

    ``flipped`` takes weight[c, K−1−k] instead: the gradient of x is the flipped convolution of the gradient of out.
    """
    if config.library or not multiplies(x.dtype):
        return eager.convolve(x, weight, bias, flipped, dilation)
    if x.numel() == 0:
        return empty_like_layout(x)
    check_size(x)
    # Rows of 8 bytes can be written to one after another: of a result with channels first, which spares a copy.
    packed = x.shape[3] * x.element_size() % 8 == 0
    out = x.new_empty(x.shape) if packed else new_rows(x)
    convolve_rows(x, rows_of(x), out, weight, bias, flipped, dilation, config=config)
    return in_layout_of(x, out)
