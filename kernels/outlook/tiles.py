"""What the kernels of outlook attention share: a program's tile, and rows of weights taken apart into registers."""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.dtypes import precision
from kernels.launch import ceil_divide, next_power_of_2
from kernels.outlook.configs import Config, Problem
from kernels.registers import stack, unstack
from kernels.views import alignment, multiple, view

MARGIN = 2**16  # what blocks reach beyond the last window, and windows beyond the last pixel


class Windows(NamedTuple):
    """The operator's numbers, in the order of its schema."""

    kernel_size: int
    stride: int
    padding: int
    scale: float


class Sizes(NamedTuple):
    windows: int  # of all images
    heads: int
    channels: int  # of a head
    height: int
    width: int
    windows_h: int
    windows_w: int


class Tile(NamedTuple):
    """A program's part: P windows of all images in one row, G heads of each, C channels of a head.

    X = G·C is the axis of heads and channels as one: adjacent in memory, it is loaded as one.
    """

    image: Any  # [P]
    row: Any  # [P], of windows
    column: Any  # [P]
    item: Any  # [P, G]: number among all windows and heads
    m_item: Any  # [P, G]
    head: Any  # [1, X]
    channel: Any  # [1, X]
    m_x: Any  # [P, X]


@triton.jit
def tile_of(
    sizes, i_channel, i_item, ALIGNED: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_WINDOWS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    head_blocks = tl.cdiv(sizes.heads, BLOCK_HEADS)
    i_head, i_window = i_item % head_blocks, i_item // head_blocks
    o_window = i_window * BLOCK_WINDOWS + tl.arange(0, BLOCK_WINDOWS)
    o_head = i_head * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[None, :]
    o_x = tl.arange(0, BLOCK_HEADS * BLOCK_CHANNELS)[None, :]
    x_head, x_channel = i_head * BLOCK_HEADS + o_x // BLOCK_CHANNELS, i_channel * BLOCK_CHANNELS + o_x % BLOCK_CHANNELS
    return Tile(
        (o_window // sizes.windows_w // sizes.windows_h).to(OFFSET),
        o_window // sizes.windows_w % sizes.windows_h,
        o_window % sizes.windows_w,
        o_window.to(OFFSET)[:, None] * sizes.heads + o_head,
        (o_window < sizes.windows)[:, None] & (o_head < sizes.heads),
        x_head.to(OFFSET),
        x_channel.to(OFFSET),
        (o_window < sizes.windows)[:, None] & (x_head < sizes.heads) & (x_channel < multiple(sizes.channels, ALIGNED)),
    )


@triton.jit
def inside(o_position, length):
    """Whether 0 <= o_position < length."""
    return (o_position >= 0) & (o_position < length)


@triton.jit
def pixel_pointers(features, tile, o_row, o_column, COLUMN: tl.constexpr, OFFSET: tl.constexpr):
    """[P, X]: the tile's channels of features [B, H, W, heads, D] at one pixel for each window."""
    o_pixel = tile.image * features.b + o_row.to(OFFSET) * features.h + o_column.to(OFFSET) * COLUMN
    return features.ptr + o_pixel[:, None] + (tile.head * features.g + tile.channel * features.c)


@triton.jit
def load_pixels(p_pixels, mask, ACCUMULATOR: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """[P, G, C] from pointers [P, X], 0 outside ``mask``."""
    b_pixels = tl.load(p_pixels, mask=mask, other=0)
    return tl.reshape(b_pixels, [p_pixels.shape[0], BLOCK_HEADS, BLOCK_CHANNELS]).to(ACCUMULATOR)


@triton.jit
def entries_of(block, COUNT: tl.constexpr):
    """The first COUNT columns [P, G, 1] of a block [P, G, N]."""
    return unstack(block)[:COUNT]


@triton.jit
def block_of(entries, COUNT: tl.constexpr):
    """[P, G, COUNT] of at most COUNT blocks [P, G, 1], zeros beyond them."""
    for _ in tl.static_range(len(entries), COUNT):
        entries = entries + (tl.zeros_like(entries[0]),)
    return stack(entries)


@triton.jit
def softmax(logits):
    """exp2(logits − max) of a tuple of blocks, their sum, and the maximum."""
    b_max = logits[0]
    for i in tl.static_range(1, len(logits)):
        b_max = tl.maximum(b_max, logits[i])
    weights, b_total = (), tl.zeros_like(b_max)
    for i in tl.static_range(len(logits)):
        b_weight = tl.exp2(logits[i] - b_max)
        weights, b_total = weights + (b_weight,), b_total + b_weight
    return weights, b_total, b_max


def problem_of(logits: Tensor, value: Tensor, windows: Windows, grad_logits: bool = False) -> Problem:
    _, height, width, channels = value.shape
    channels //= logits.shape[3]
    return Problem(channels, height * width, windows.kernel_size, windows.stride, value.dtype, grad_logits)


def sizes_of(logits: Tensor, value: Tensor) -> Sizes:
    """What the kernels count, each below 2^31."""
    (batch, windows_h, windows_w, heads), (_, height, width, channels) = logits.shape[:4], value.shape
    sizes = Sizes(batch * windows_h * windows_w, heads, channels // heads, height, width, windows_h, windows_w)
    if max(sizes.windows, height, width) >= 2**31 - MARGIN:
        raise ValueError(f"value must have fewer than 2^31 rows, columns and windows, got {list(value.shape)}")
    return sizes


def by_head(image: Tensor, heads: int) -> Tensor:
    """[B, H, W, C] as [B, H, W, heads, C/heads]."""
    return image.unflatten(3, (heads, -1))


def common_arguments(
    logits: Tensor, value: Tensor, windows: Windows, config: Config, *images: Tensor
) -> tuple[dict[str, Any], int]:
    """What the kernels take of logits and images [B, H, W, heads, D], and how many programs share the channels."""
    sizes = sizes_of(logits, value)
    heads = min(config.block_heads, next_power_of_2(sizes.heads))
    block = min(config.block_items // heads, next_power_of_2(sizes.windows))
    arguments = {
        "logits_ptr": logits, "sizes": sizes, "scale": windows.scale * math.log2(math.e),
        "ALIGNED": alignment(sizes.channels, *(view(image, "b h w g c") for image in images)),
        "KERNEL": windows.kernel_size, "STRIDE": windows.stride, "PADDING": windows.padding,
        **precision(*(tensor[None, None] for tensor in (logits, *images))), "BLOCK_WINDOWS": block,
        "BLOCK_HEADS": heads, "BLOCK_CHANNELS": config.block_channels,
    }  # fmt: skip
    return arguments, ceil_divide(sizes.windows, block) * ceil_divide(sizes.heads, heads)
