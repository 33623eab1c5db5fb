"""Depthwise convolution as matrix products with banded weights; its weight gradient as the same products transposed.

A *tile* is TILE_HEIGHT x TILE_WIDTH outputs of one channel, under which lie TILE_HEIGHT + K − 1 input rows of SPAN
columns. Input row i adds to all outputs (r, p) of its tile at once:

    out[tile, (r, p)] += Σ_j x[tile, i, j] · band[i − r, j, p],     band[k, j, p] = weight[k, j − p], 0 outside 0..K−1

The tiles of all images of a channel share one band, so they are the rows of a matrix product. The weight gradient
multiplies gradient tiles by the same spans, and sums the diagonals j − p and i − r of the product.

Cost per output at K = 17 (tiles of 4 x 16, a span of 32, 128 tiles a block) against a thread per output:

    elements loaded     20·32/64 = 10 of x, 20·32/128 = 5 of the band     2·289: x and weight
    multiply-adds       20·32 = 640, 45 % of them with weights            289
    cycles of an SM     0.3, its tensor cores doing 2,048 a cycle         2.3, its CUDA cores doing 128 a cycle

The loads are 16-byte vectors which the software pipeline fetches ahead. Float32 runs the same products on CUDA cores,
exactly, a shared-memory load to ten multiply-adds or more. Rows must be contiguous for this: channels-last tensors are
reordered before and after (``triton_reorder``), two passes over memory where a thread per output would cost ten.

PyTorch's own convolution is a config like the others (``triton_tiles.LIBRARY``): tuning always times it, and small
problems get it untuned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.grad import conv2d_weight

from kernels import reference
from kernels.backend import interpreting
from kernels.depthwise.triton_reorder import channels_first, in_layout_of
from kernels.depthwise.triton_tiles import (
    CONFIGS,
    Config,
    geometry,
    heuristic,
    problem_of,
    tile_width,
)
from kernels.dtypes import accumulator_dtype, at_least_float32
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.tuning import tunable

__all__ = ["convolve", "weight_gradient"]

GRADIENT_PROGRAMS = 2048  # wanted at least, by cutting the batch into chunks: a few waves on any GPU


@triton.jit
def _convolution_kernel(
    x_ptr,  # [B, C, H, W]
    band_ptr,  # [C, BAND_ROWS, SPAN, TILE_WIDTH], contiguous
    bias_ptr,  # [C], not read without HAS_BIAS
    out_ptr,  # [B, C, H, W]
    x_stride_b, x_stride_c, x_stride_h, x_stride_w, bias_stride_c,
    out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    channels, height, width, tiles, tiles_h, tiles_w, first_row, last_row,
    KERNEL: tl.constexpr, BAND_ROWS: tl.constexpr, VECTOR: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Strides but the last, and the width, come divided by VECTOR: multiplying here tells Triton how loads align."""
    SPAN: tl.constexpr = 2 * TILE_WIDTH
    MARGIN: tl.constexpr = TILE_WIDTH // 2
    BAND: tl.constexpr = SPAN * TILE_WIDTH
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
    o_image = (o_tile // (tiles_h * tiles_w)).to(OFFSET)
    o_top = o_tile // tiles_w % tiles_h * TILE_HEIGHT
    o_left = o_tile % tiles_w * TILE_WIDTH
    m_tile = m_channel & (o_tile < tiles)

    # Columns of the product's left factor are (row, column) of a span, [1, J]; they are its right one's rows, [J, 1].
    o_span = tl.arange(0, BLOCK_ROWS * SPAN)
    o_row = o_top - KERNEL // 2 + (o_span // SPAN)[None, :]
    o_column = o_left - MARGIN + (o_span % SPAN)[None, :]
    m_span = m_tile & (o_column >= 0) & (o_column < width * VECTOR)
    p_x = (
        x_ptr
        + o_channel * x_stride_c * VECTOR
        + o_image * x_stride_b * VECTOR
        + o_row.to(OFFSET) * x_stride_h * VECTOR
        + o_column.to(OFFSET) * x_stride_w
    )
    o_output = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)[None, :]
    o_band_row = (o_span // SPAN)[:, None] - o_output // TILE_WIDTH + (TILE_HEIGHT - 1)
    o_band = o_band_row * BAND + (o_span % SPAN)[:, None] * TILE_WIDTH + o_output % TILE_WIDTH
    p_band = band_ptr + o_channel * BAND_ROWS * BAND + o_band
    for i_row in range(first_row, last_row, BLOCK_ROWS):
        m_row = (o_row + i_row >= 0) & (o_row + i_row < height)
        o_step = tl.cast(i_row, OFFSET) * x_stride_h * VECTOR  # pyright: ignore[reportArgumentType]
        # [T, J], [J, N]
        b_x = tl.load(p_x + o_step, mask=m_span & m_row, other=0)
        b_band = tl.load(p_band + i_row * BAND, mask=m_channel, other=0)
        if WIDEN:
            b_x, b_band = b_x.to(ACCUMULATOR), b_band.to(ACCUMULATOR)
        b_sum = tl.dot(b_x, b_band, b_sum, input_precision="ieee", out_dtype=ACCUMULATOR)

    if HAS_BIAS:
        b_sum += tl.load(bias_ptr + o_channel * bias_stride_c, mask=m_channel, other=0).to(ACCUMULATOR)
    o_row = o_top + o_output // TILE_WIDTH
    o_column = o_left + o_output % TILE_WIDTH
    p_out = (
        out_ptr
        + o_channel * out_stride_c * VECTOR
        + o_image * out_stride_b * VECTOR
        + o_row.to(OFFSET) * out_stride_h * VECTOR
        + o_column.to(OFFSET) * out_stride_w
    )
    tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), mask=m_tile & (o_row < height) & (o_column < width * VECTOR))


@triton.jit
def _weight_gradient_kernel(
    grad_ptr,  # [B, C, H, W]
    x_ptr,  # [B, C, H, W]
    partial_ptr,  # [chunks, tile blocks, C, ROWS, TILE_HEIGHT, KERNEL], contiguous
    grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w, x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    batch, channels, height, width, tiles_h, tiles_w, chunk_images, first_row, last_row,
    KERNEL: tl.constexpr, KERNEL_BLOCK: tl.constexpr, IMAGE_TILES: tl.constexpr, VECTOR: tl.constexpr,
    WIDEN: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial[i, r, kw] = Σ_{tiles, p} grad[tile, r, p] · x[tile, i, p + kw]: what input row i adds to kh = i − r."""
    SPAN: tl.constexpr = 2 * TILE_WIDTH
    MARGIN: tl.constexpr = TILE_WIDTH // 2
    ROWS: tl.constexpr = TILE_HEIGHT + KERNEL - 1
    TILE: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    row_blocks = tl.cdiv(ROWS, BLOCK_ROWS)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    tile_blocks = tl.cdiv(tiles_h * tiles_w, IMAGE_TILES)
    i_row = tl.program_id(0) % row_blocks * BLOCK_ROWS
    i_rest = tl.program_id(0) // row_blocks
    i_channel = i_rest % channel_blocks * BLOCK_CHANNELS
    i_partial = i_rest // channel_blocks
    b_sum = tl.zeros([TILE, BLOCK_ROWS * SPAN], ACCUMULATOR)
    o_channel = i_channel.to(tl.int64)
    if BLOCK_CHANNELS > 1:
        o_channel += tl.arange(0, BLOCK_CHANNELS)[:, None, None]
        b_sum = tl.zeros([BLOCK_CHANNELS, TILE, BLOCK_ROWS * SPAN], ACCUMULATOR)

    # A block is IMAGE_TILES tiles of as many images as fit, so that going on to the next images divides nothing.
    o_block = tl.arange(0, BLOCK_TILES)[:, None]
    o_tile = i_partial % tile_blocks * IMAGE_TILES + o_block % IMAGE_TILES
    o_image = o_block // IMAGE_TILES
    o_top = o_tile // tiles_w * TILE_HEIGHT
    o_left = o_tile % tiles_w * TILE_WIDTH
    m_tile = (o_channel < channels) & (o_tile < tiles_h * tiles_w)

    o_span = tl.arange(0, BLOCK_ROWS * SPAN)[None, :]
    o_x_row = o_top - KERNEL // 2 + i_row + o_span // SPAN
    o_x_column = o_left - MARGIN + o_span % SPAN
    m_x = m_tile & (o_x_row >= 0) & (o_x_row < height) & (o_x_column >= 0) & (o_x_column < width * VECTOR)
    p_x = (
        x_ptr
        + o_channel * x_stride_c * VECTOR
        + o_x_row.to(OFFSET) * x_stride_h * VECTOR
        + o_x_column.to(OFFSET) * x_stride_w
    )
    o_output = tl.arange(0, TILE)[None, :]
    o_row = o_top + o_output // TILE_WIDTH
    o_column = o_left + o_output % TILE_WIDTH
    m_grad = m_tile & (o_row < height) & (o_column < width * VECTOR)
    p_grad = (
        grad_ptr
        + o_channel * grad_stride_c * VECTOR
        + o_row.to(OFFSET) * grad_stride_h * VECTOR
        + o_column.to(OFFSET) * grad_stride_w
    )

    i_first = i_partial // tile_blocks * chunk_images
    i_last = tl.minimum(i_first + chunk_images, batch)
    if (i_row >= last_row) | (i_row + BLOCK_ROWS <= first_row):  # no tile has these input rows: the sums are 0
        i_last = i_first
    for i_image in range(i_first, i_last, BLOCK_TILES // IMAGE_TILES):
        o_batch = (o_image + i_image).to(OFFSET)
        # [T, J], [T, N]
        b_x = tl.load(p_x + o_batch * x_stride_b * VECTOR, mask=m_x & (o_batch < i_last), other=0)
        b_grad = tl.load(p_grad + o_batch * grad_stride_b * VECTOR, mask=m_grad & (o_batch < i_last), other=0)
        if WIDEN:
            b_x, b_grad = b_x.to(ACCUMULATOR), b_grad.to(ACCUMULATOR)
        b_sum = tl.dot(tl.trans(b_grad), b_x, b_sum, input_precision="ieee", out_dtype=ACCUMULATOR)

    # [N, BLOCK_ROWS · KERNEL_BLOCK]: every output's sums moved by its column p, which makes diagonals columns.
    o_tap = tl.arange(0, BLOCK_ROWS * KERNEL_BLOCK)[None, :]
    o_shifted = tl.arange(0, TILE)[:, None] % TILE_WIDTH + o_tap % KERNEL_BLOCK + (MARGIN - KERNEL // 2)
    o_shifted = tl.minimum(o_shifted, SPAN - 1) + o_tap // KERNEL_BLOCK * SPAN
    b_sum = tl.gather(b_sum, o_shifted + tl.zeros_like(o_channel).to(tl.int32), len(b_sum.shape) - 1)
    b_sum = tl.reshape(b_sum, [BLOCK_CHANNELS * TILE_HEIGHT, TILE_WIDTH, BLOCK_ROWS * KERNEL_BLOCK])
    o_channel_row = tl.arange(0, BLOCK_CHANNELS * TILE_HEIGHT)[:, None]
    o_channel = i_channel + o_channel_row // TILE_HEIGHT
    o_row = i_row + o_tap // KERNEL_BLOCK
    o_partial = (i_partial.to(tl.int64) * channels + o_channel) * ROWS + o_row
    tl.store(
        partial_ptr + (o_partial * TILE_HEIGHT + o_channel_row % TILE_HEIGHT) * KERNEL + o_tap % KERNEL_BLOCK,
        tl.sum(b_sum, axis=1),
        mask=(o_channel < channels) & (o_row < ROWS) & (o_tap % KERNEL_BLOCK < KERNEL),
    )


def _band(weight: Tensor, flipped: bool, config: Config) -> Tensor:
    """band[c, TILE_HEIGHT − 1 + k, j, p] = weight[c, k, j − p + K//2 − margin], 0 where there is no such weight."""
    kernel_size = weight.shape[-1]
    width = tile_width(kernel_size)
    kernel = weight[:, 0].flip(1, 2) if flipped else weight[:, 0]
    rows = ceil_divide(config.tile_height + kernel_size - 1, config.block_rows) * config.block_rows
    left = width - 1 + width // 2 - kernel_size // 2
    right = 3 * width - 1 - left - kernel_size
    padded = F.pad(kernel, (left, right, config.tile_height - 1, rows - kernel_size))
    return padded.unfold(2, width, 1).flip(3)


def _library_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool) -> Tensor:
    """PyTorch's own convolution, in the memory order of x."""
    out = reference.depthwise_conv2d(x, weight.flip(2, 3) if flipped else weight, bias)
    target = empty_like_layout(x[:, None], x[:, None].shape)[:, 0]
    return out if out.stride() == target.stride() else target.copy_(out)


def _library_weight_gradient(grad: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    shape = (x.shape[1], 1, kernel_size, kernel_size)
    return conv2d_weight(x, shape, grad, padding=kernel_size // 2, groups=x.shape[1])


def _convolve_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, flipped: bool = False) -> Tensor:
    """PyTorch's own in at least float32, for the tuner."""
    x, weight, *biases = at_least_float32(x, weight, *([] if bias is None else [bias]))
    return _library_convolve(x, weight, biases[0] if biases else None, flipped)


def _weight_gradient_reference(grad: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    grad, x = at_least_float32(grad, x)
    return _library_weight_gradient(grad, x, kernel_size)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda x, weight, *_: problem_of(x, x, weight.shape[-1], weight_gradient=False),
    reference=_convolve_reference,
    name="depthwise",
)
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, flipped: bool = False, *, config: Config) -> Tensor:
    """out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − K//2 + k] (+ bias[c]), [B,C,H,W] in the memory order of x.

    ``flipped`` takes weight[c, K−1−k] instead: the gradient of x is the flipped convolution of the gradient of out.
    """
    batch, channels, height, width = x.shape
    kernel_size = weight.shape[-1]
    if x.dtype == torch.float64 and not interpreting():  # no float64 matrix product in Triton on every GPU
        return _library_convolve(x, weight, bias, flipped)
    if x.numel() == 0:
        return empty_like_layout(x[:, None], x[:, None].shape)[:, 0]
    if config.library:
        return _library_convolve(x, weight, bias, flipped)
    source, out = channels_first(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    band = _band(weight, flipped, config)
    tiles_h, tiles_w = config.tiles(height, width, kernel_size)
    tiles = batch * tiles_h * tiles_w
    # One program per (block of tiles, block of channels), tiles fastest: they share the band.
    grid = (ceil_divide(tiles, config.block_tiles) * ceil_divide(channels, config.block_channels),)
    arguments = {
        "x_ptr": source,
        "band_ptr": band,
        "bias_ptr": x if bias is None else bias,
        "out_ptr": out,
        "bias_stride_c": 0 if bias is None else bias.stride(0),
        "channels": channels,
        "tiles": tiles,
        "BAND_ROWS": band.shape[1],
        "HAS_BIAS": bias is not None,
        **geometry({"x": source, "out": out}, kernel_size, config),
    }
    launch(_convolution_kernel, grid, out.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return in_layout_of(x, out)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda grad, x, kernel_size: problem_of(grad, x, kernel_size, weight_gradient=True),
    reference=_weight_gradient_reference,
    name="depthwise_weight_gradient",
)
def weight_gradient(grad: Tensor, x: Tensor, kernel_size: int, *, config: Config) -> Tensor:
    """gradient[c,0,k] = Σ_{b,i} grad[b,c,i] · x[b,c, i − K//2 + k], [C,1,K,K]: partial sums, then their sum."""
    batch, channels, height, width = x.shape
    if x.dtype == torch.float64 and not interpreting():
        return _library_weight_gradient(grad, x, kernel_size)
    if x.numel() == 0:
        return torch.zeros((channels, 1, kernel_size, kernel_size), dtype=x.dtype, device=x.device)
    if config.library:
        return _library_weight_gradient(grad, x, kernel_size)
    grad, x = channels_first(grad), channels_first(x)
    tiles_h, tiles_w = config.tiles(height, width, kernel_size)
    image_tiles = min(config.block_tiles, next_power_of_2(tiles_h * tiles_w))
    tile_blocks = ceil_divide(tiles_h * tiles_w, image_tiles)
    rows = config.tile_height + kernel_size - 1
    programs = ceil_divide(rows, config.block_rows) * ceil_divide(channels, config.block_channels) * tile_blocks
    block_images = config.block_tiles // image_tiles
    chunks = 1 if interpreting() else min(ceil_divide(GRADIENT_PROGRAMS, programs), ceil_divide(batch, block_images))
    chunk_images = ceil_divide(ceil_divide(batch, block_images), chunks) * block_images
    chunks = ceil_divide(batch, chunk_images)
    shape = (chunks * tile_blocks, channels, rows, config.tile_height, kernel_size)
    partial = torch.empty(shape, dtype=accumulator_dtype(x.dtype), device=x.device)
    # One program per (block of input rows, block of channels, block of tiles, chunk of images), each in order.
    grid = (programs * chunks,)
    arguments = {
        "grad_ptr": grad,
        "x_ptr": x,
        "partial_ptr": partial,
        "batch": batch,
        "channels": channels,
        "chunk_images": chunk_images,
        "KERNEL_BLOCK": next_power_of_2(kernel_size),
        "IMAGE_TILES": image_tiles,
        **geometry({"grad": grad, "x": x}, kernel_size, config),
    }
    launch(_weight_gradient_kernel, grid, x.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    # Row kh of the gradient sums the diagonal i = kh + r, r = 0.. : a step along it is a step along both.
    stride_part, stride_channel, stride_row, stride_r, _ = partial.stride()
    diagonals = partial.as_strided(
        (shape[0], channels, kernel_size, config.tile_height, kernel_size),
        (stride_part, stride_channel, stride_row, stride_row + stride_r, 1),
    )
    return diagonals.sum((0, 3))[:, None].to(x.dtype)
