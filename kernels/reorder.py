"""Maps copied between channels first and channels last, tile by tile, so that reads and writes are both contiguous.

PyTorch's own copy reads, or writes, one element per 32-byte sector.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.dtypes import precision
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import channels_fastest, empty_like_layout
from kernels.tuning import repeated
from kernels.views import view

# Pixels by channels of a tile; more pixels of a map with fewer channels.
BLOCK_PIXELS, BLOCK_CHANNELS = (1024, 64) if interpreting() else (64, 64)


@triton.jit
def _copy_kernel(
    rows_ptr,  # [B, C, H, pitch], contiguous
    features,  # [B, C, H, W], strides but that of C divided by STEP
    channel_steps, height, width, vectors,
    TO_ROWS: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The pitch is ``vectors`` · VECTOR, and there are ``channel_steps`` · STEP channels: multiplying here tells Triton
    how rows, and a pixel's channels, align."""
    channels = channel_steps * STEP
    pixel_blocks, channel_blocks = tl.cdiv(height * vectors * VECTOR, BLOCK_PIXELS), tl.cdiv(channels, BLOCK_CHANNELS)
    i_pixel = tl.program_id(0) % pixel_blocks
    i_channel = tl.program_id(0) // pixel_blocks % channel_blocks
    i_batch = (tl.program_id(0) // pixel_blocks // channel_blocks).to(tl.int64)
    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    o_channel = i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[:, None]
    o_row, o_column = o_pixel // (vectors * VECTOR), o_pixel % (vectors * VECTOR)
    m_rows = (o_channel < channels) & (o_pixel < height * vectors * VECTOR)
    # [C, P]
    p_rows = rows_ptr + (i_batch * channels + o_channel) * tl.cast(height * vectors, tl.int64) * VECTOR + o_pixel
    o_features = (o_row.to(OFFSET) * features.h + o_column.to(OFFSET) * features.w) * STEP
    p_features = features.ptr + i_batch * features.b * STEP + o_features + o_channel.to(OFFSET) * features.c
    if TO_ROWS:
        tl.store(p_rows, tl.load(p_features, mask=m_rows & (o_column < width), other=0), mask=m_rows)
    else:
        tl.store(p_features, tl.load(p_rows, mask=m_rows, other=0), mask=m_rows & (o_column < width))


def copy_rows(rows: Tensor, features: Tensor, to_rows: bool) -> None:
    """Copies features [B, C, H, W] of any strides to, or from, rows [B, C, H, pitch], which are contiguous; columns of
    rows beyond W become zeros."""
    if rows.shape[3] == features.shape[3] and features.stride(2) == features.shape[3] * features.stride(3):
        rows, features = rows.flatten(2)[:, :, None], features.flatten(2)[:, :, None]  # one row, which ends once
    batch, channels, height, width = features.shape
    pitch = rows.shape[3]
    most = 16 // rows.element_size()
    strides, vector = view(features, "b c h w"), math.gcd(pitch, most)
    step = math.gcd(channels, strides.b, strides.h, strides.w, most) if strides.c == 1 else 1
    strides = strides._replace(b=strides.b // step, h=strides.h // step, w=strides.w // step)
    block_channels = min(BLOCK_CHANNELS, next_power_of_2(channels))
    block_pixels = min(BLOCK_PIXELS * BLOCK_CHANNELS // block_channels, 8 * BLOCK_PIXELS)
    # One program per (block of pixels, block of channels, image).
    grid = (ceil_divide(height * pitch, block_pixels) * ceil_divide(channels, block_channels) * batch,)
    arguments = {
        "rows_ptr": rows, "features": strides, "channel_steps": channels // step, "height": height, "width": width,
        "vectors": pitch // vector,
        "TO_ROWS": to_rows, "VECTOR": vector, "STEP": step, "OFFSET": precision(features[None])["OFFSET"],
        "BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels,
    }  # fmt: skip
    launch(_copy_kernel, grid, rows.device, arguments, num_warps=4, num_stages=1)


def _empty_last(maps: Tensor) -> Tensor:
    batch, *channels, height, width = maps.shape
    return maps.new_empty((batch, height, width, *channels)).movedim((1, 2), (-2, -1))


def in_channels_last(maps: Tensor) -> Tensor:
    """Maps [B, ..., H, W] with a pixel's channels adjacent in memory: themselves, or a copy."""
    if channels_fastest(maps) or maps.movedim((-2, -1), (1, 2)).is_contiguous():  # groups of one channel, or one pixel
        return maps
    return _to_last(maps) if maps.is_contiguous() and maps.numel() > 0 else _empty_last(maps).copy_(maps)


@repeated
def _to_last(maps: Tensor) -> Tensor:
    last = _empty_last(maps)
    copy_rows(maps.flatten(1, -3), last.flatten(1, -3), to_rows=False)
    return last


def in_order_of(given: Tensor, last: Tensor) -> Tensor:
    """``last``, which is as ``in_channels_last(given)``, in the memory order of ``given``."""
    if channels_fastest(given) or given.numel() == 0:
        return empty_like_layout(given, last.shape).copy_(last)
    return _to_first(last)


@repeated
def _to_first(last: Tensor) -> Tensor:
    first = last.new_empty(last.shape)
    copy_rows(first.flatten(1, -3), last.flatten(1, -3), to_rows=True)
    return first
