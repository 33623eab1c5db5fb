"""The gradients of a depthwise convolution's weight, the products of ``forward`` transposed, and of its bias.

    gradient[c, k] = Σ_{b,i} grad[b, c, i] · x[b, c, i − K//2 + k]        bias: Σ_{b,i} grad[b, c, i]

Gradient tiles are multiplied by the input rows under them, summed over tiles; the gradient's entries are the diagonals
i − r and j − p of the product. A value may reach every entry of its own channel, whether finite or not.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.depthwise import eager
from kernels.depthwise.configs import CONFIGS, Config, heuristic
from kernels.depthwise.forward import SMALL_HEIGHT, common_arguments, extent, in_vectors, problem_of
from kernels.depthwise.rows import check_size, rows_of
from kernels.dtypes import accumulator, accumulator_dtype, multiplies
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.products import dot
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated, tunable

SLOTS = 528  # programs that run at once: four on each of an H200's 132 processors
EPILOGUE = 22  # what a program does once, in steps of its loop


# As in ``forward``, what only bounds loops and masks is no constant.
BOUNDS = ["batch", "channels", "height", "width", "tiles_h", "reach", "reach_w", "chunk_images", "tile_chunks"]


@triton.jit(do_not_specialize=BOUNDS)
def _weight_gradient_kernel(
    grad,  # [B, C, H, W] in rows, like x
    x,  # [B, C, H, W] in rows, its strides but the last divided by VECTOR
    partial_ptr,  # [image chunks, tile chunks, C, rows, TILE_HEIGHT, extent], contiguous
    batch, channels, height, width, tiles_h, tiles_w, step, reach, reach_w, chunk_images, tile_chunks,
    EXTENT_BLOCK: tl.constexpr, IMAGE_TILES: tl.constexpr, VECTOR: tl.constexpr, UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial[i, r, kw] = Σ_{tiles, p} grad[tile, r, p] · x[tile, i, p + kw]: what input row i adds to kh = i − r."""
    MARGIN: tl.constexpr = (SPAN - TILE_WIDTH) // 2
    rows = TILE_HEIGHT + 2 * reach
    TILE: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    i_row = tl.program_id(0) % row_blocks * BLOCK_ROWS
    i_rest = tl.program_id(0) // row_blocks
    i_channel = i_rest % channel_blocks * BLOCK_CHANNELS
    i_partial = i_rest // channel_blocks
    b_sum = tl.zeros([TILE, BLOCK_ROWS * SPAN], ACCUMULATOR)
    o_channel = i_channel.to(tl.int64)
    if BLOCK_CHANNELS > 1:
        o_channel += tl.arange(0, BLOCK_CHANNELS)[:, None, None]
        b_sum = tl.zeros([BLOCK_CHANNELS, TILE, BLOCK_ROWS * SPAN], ACCUMULATOR)

    i_first = i_partial // tile_chunks * chunk_images
    i_last = tl.minimum(i_first + chunk_images, batch)
    # Input rows that no tile of the map has: the sums are 0.
    past = reach + tl.cdiv(height, step)
    if (i_row + BLOCK_ROWS + (tiles_h - 1) * TILE_HEIGHT <= reach) | (i_row >= past):
        i_last = i_first
    tiles = tiles_h * tiles_w * step
    o_block = tl.arange(0, BLOCK_TILES)[:, None]
    o_span = tl.arange(0, BLOCK_ROWS * SPAN)[None, :]
    o_output = tl.arange(0, TILE)[None, :]
    # A block is IMAGE_TILES tiles of as many images as fit, so that going on to the next images divides nothing.
    for i_tile in range(i_partial % tile_chunks * IMAGE_TILES, tiles, tile_chunks * IMAGE_TILES):
        o_tile = i_tile + o_block % IMAGE_TILES
        o_top, o_phase = o_tile // tiles_w // step * TILE_HEIGHT, o_tile // tiles_w % step
        o_left = o_tile % tiles_w * TILE_WIDTH
        m_tile = (o_channel < channels) & (o_tile < tiles)
        o_x_row = (o_top - reach + i_row + o_span // SPAN) * step + o_phase
        o_x_column = o_left - MARGIN + o_span % SPAN
        m_x = m_tile & (o_x_row >= 0) & (o_x_row < height) & (o_x_column >= 0) & (o_x_column < width * VECTOR)
        p_x = x.ptr + (o_channel * x.c + o_x_row.to(OFFSET) * x.h) * VECTOR + o_x_column
        o_row = (o_top + o_output // TILE_WIDTH) * step + o_phase
        o_column = o_left + o_output % TILE_WIDTH
        m_grad = m_tile & (o_row < height) & (o_column < width * VECTOR)
        p_grad = grad.ptr + (o_channel * grad.c + o_row.to(OFFSET) * grad.h) * VECTOR + o_column
        for i_image in range(i_first, i_last, BLOCK_TILES // IMAGE_TILES):
            o_batch = (i_image + o_block // IMAGE_TILES).to(OFFSET)
            # [T, J], [T, N]
            b_x = tl.load(p_x + o_batch * x.b * VECTOR, mask=m_x & (o_batch < i_last), other=0)
            b_grad = tl.load(p_grad + o_batch * grad.b * VECTOR, mask=m_grad & (o_batch < i_last), other=0)
            b_sum = dot(tl.trans(b_grad), b_x, b_sum, UPCAST)

    # [N, BLOCK_ROWS · EXTENT_BLOCK]: every output's sums moved by its column p, which makes diagonals columns.
    o_tap = tl.arange(0, BLOCK_ROWS * EXTENT_BLOCK)[None, :]
    o_shifted = tl.arange(0, TILE)[:, None] % TILE_WIDTH + o_tap % EXTENT_BLOCK + (MARGIN - reach_w)
    m_shifted = (o_shifted >= 0) & (o_shifted < SPAN) & (o_channel < channels)
    o_shifted = tl.minimum(tl.maximum(o_shifted, 0), SPAN - 1) + o_tap // EXTENT_BLOCK * SPAN
    b_sum = tl.gather(b_sum, o_shifted + tl.zeros_like(o_channel).to(tl.int32), len(b_sum.shape) - 1)
    b_sum = tl.where(m_shifted, b_sum, 0.0)
    b_sum = tl.reshape(b_sum, [BLOCK_CHANNELS * TILE_HEIGHT, TILE_WIDTH, BLOCK_ROWS * EXTENT_BLOCK])
    o_channel_row = tl.arange(0, BLOCK_CHANNELS * TILE_HEIGHT)[:, None]
    o_channel = i_channel + o_channel_row // TILE_HEIGHT
    o_row = i_row + o_tap // EXTENT_BLOCK
    o_partial = (i_partial.to(tl.int64) * channels + o_channel) * rows + o_row
    tl.store(
        partial_ptr
        + (o_partial * TILE_HEIGHT + o_channel_row % TILE_HEIGHT) * (2 * reach_w + 1)
        + o_tap % EXTENT_BLOCK,
        tl.sum(b_sum, axis=1),
        mask=(o_channel < channels) & (o_row < rows) & (o_tap % EXTENT_BLOCK <= 2 * reach_w),
    )


@triton.jit(do_not_specialize=["parts", "channels", "row_dilation", "dilation", "size", "extent"])
def _diagonals_kernel(
    partial_ptr,  # [parts, C, rows, TILE_HEIGHT, extent], contiguous
    gradient_ptr,  # [C, size, size], contiguous
    parts, channels, row_dilation, dilation, size, extent,
    TILE_HEIGHT: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row kh of the gradient sums the diagonal i = kh + r, r = 0.. of every part."""
    rows = TILE_HEIGHT + (size - 1) * row_dilation
    blocks = tl.cdiv(size * size, BLOCK)
    i_channel = (tl.program_id(0) // blocks).to(tl.int64)
    o_entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    o_r = tl.arange(0, TILE_HEIGHT)[:, None]
    o_diagonal = ((o_entry // size * row_dilation + o_r) * TILE_HEIGHT + o_r) * extent + o_entry % size * dilation
    m_entry = o_entry < size * size
    p_partial = partial_ptr + i_channel * (rows * TILE_HEIGHT * extent) + o_diagonal
    b_sum = tl.zeros([TILE_HEIGHT, BLOCK], ACCUMULATOR)
    for _ in range(parts):
        b_sum += tl.load(p_partial, mask=m_entry[None, :], other=0)
        p_partial += tl.cast(channels, tl.int64) * (rows * TILE_HEIGHT * extent)
    b_gradient = tl.sum(b_sum, axis=0).to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + i_channel * (size * size) + o_entry, b_gradient, mask=m_entry)


@functools.lru_cache(maxsize=4096)
def _chunks(programs: int, image_blocks: int, tile_blocks: int) -> tuple[int, int]:
    """Into how many chunks the images, and the tiles of an image, are cut: what ends soonest if waves of SLOTS programs
    follow each other, each as long as its steps and EPILOGUE."""
    if interpreting():
        return 1, 1

    def waves(chunks: tuple[int, int]) -> float:
        images, tiles = chunks
        steps = ceil_divide(image_blocks, images) * ceil_divide(tile_blocks, tiles)
        return max(1, programs * images * tiles / SLOTS) * (steps + EPILOGUE)

    images = [ceil_divide(image_blocks, steps) for steps in range(1, image_blocks + 1)]
    tiles = [ceil_divide(tile_blocks, steps) for steps in range(1, tile_blocks + 1)]
    return min(itertools.product(sorted(set(images)), sorted(set(tiles))), key=waves)


def gradient_of_rows(
    x: Tensor, grad_rows: Tensor, x_rows: Tensor, kernel_size: int, dilation: int, config: Config
) -> Tensor:
    """The weight's gradient from rows of x and of the output's gradient: partial sums, then their sum."""
    batch, channels = x.shape[:2]
    kernel_extent = extent(kernel_size, dilation)
    step = dilation if x.shape[2] > SMALL_HEIGHT // 2 else 1
    common = common_arguments(x, (x_rows, grad_rows), kernel_size, dilation, step, config)
    tiles = common["tiles_h"] * common["tiles_w"] * step
    image_tiles = min(config.block_tiles, next_power_of_2(tiles))
    tile_blocks = ceil_divide(tiles, image_tiles)
    rows = config.tile_height + 2 * common["reach"]
    programs = ceil_divide(rows, config.block_rows) * ceil_divide(channels, config.block_channels)
    block_images = config.block_tiles // image_tiles
    image_chunks, tile_chunks = _chunks(programs, ceil_divide(batch, block_images), tile_blocks)
    chunk_images = ceil_divide(ceil_divide(batch, block_images), image_chunks) * block_images
    image_chunks = ceil_divide(batch, chunk_images)
    shape = (image_chunks * tile_chunks, channels, rows, config.tile_height, kernel_extent)
    partial = torch.empty(shape, dtype=accumulator_dtype(x.dtype), device=x.device)
    # One program per (block of input rows, block of channels, chunk of tile blocks, chunk of images), each in order.
    grid = (programs * tile_chunks * image_chunks,)
    arguments = {
        "grad": in_vectors(grad_rows), "x": in_vectors(x_rows), "partial_ptr": partial, **common, "batch": batch,
        "chunk_images": chunk_images, "tile_chunks": tile_chunks, "reach_w": kernel_extent // 2,
        "EXTENT_BLOCK": next_power_of_2(kernel_extent), "IMAGE_TILES": image_tiles,
    }  # fmt: skip
    launch(_weight_gradient_kernel, grid, x.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    gradient = torch.empty((channels, 1, kernel_size, kernel_size), dtype=x.dtype, device=x.device)
    block = next_power_of_2(kernel_size**2) if interpreting() else 128
    arguments = {
        "partial_ptr": partial, "gradient_ptr": gradient, "parts": shape[0], "channels": channels,
        "row_dilation": dilation // step, "dilation": dilation, "size": kernel_size, "extent": kernel_extent,
        "TILE_HEIGHT": config.tile_height, "ACCUMULATOR": accumulator(x.dtype), "BLOCK": block,
    }  # fmt: skip
    grid = (ceil_divide(kernel_size**2, block) * channels,)
    launch(_diagonals_kernel, grid, x.device, arguments, num_warps=4, num_stages=1)
    return gradient


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda grad, x, size, dilation=1: problem_of(x, extent(size, dilation), weight_gradient=True),
    reference=eager.weight_gradient,
    name="depthwise_weight_gradient",
)
def weight_gradient(grad: Tensor, x: Tensor, kernel_size: int, dilation: int = 1, *, config: Config) -> Tensor:
    """gradient[c,0,k] = Σ_{b,i} grad[b,c,i] · x[b,c, i + (k − K//2)·dilation], [C,1,K,K]."""
    if config.library or not multiplies(x.dtype):
        return eager.weight_gradient(grad, x, kernel_size, dilation)
    if x.numel() == 0:
        return torch.zeros((x.shape[1], 1, kernel_size, kernel_size), dtype=x.dtype, device=x.device)
    check_size(x)
    return gradient_of_rows(x, rows_of(grad), rows_of(x), kernel_size, dilation, config)


@repeated
def _sum_channels_last(grad: Tensor) -> Tensor:
    pixels = grad.permute(0, 2, 3, 1).flatten(0, 2)
    number, channels = pixels.shape
    parts = ceil_divide(2 * SLOTS, ceil_divide(channels, 64))
    parts = 1 if interpreting() else min(parts, ceil_divide(number, 64))
    return sum_rows(sum_rows(pixels, parts, accumulator_dtype(grad.dtype)), 1, grad.dtype).flatten()


def bias_gradient(grad: Tensor) -> Tensor:
    """Σ_{b,i} grad[b,c,i], [C]."""
    if grad.numel() == 0 or not grad.is_contiguous(memory_format=torch.channels_last):
        return grad.sum((0, 2, 3))
    return _sum_channels_last(grad)
