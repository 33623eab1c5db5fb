"""Channels-last tensors made channels-first and back, tile by tile, so that reads and writes are both contiguous.

PyTorch's own copy between the two orders reads, or writes, one element per 32-byte sector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.triton_kernels import stride_arguments
from kernels.backend import interpreting
from kernels.dtypes import precision
from kernels.launch import ceil_divide, launch
from kernels.layout import channels_fastest, empty_like_layout

__all__ = ["channels_first", "in_layout_of"]

BLOCK_PIXELS, BLOCK_CHANNELS = (1024, 64) if interpreting() else (64, 64)


@triton.jit
def _reorder_kernel(
    source_ptr,  # [B, C, H·W]
    target_ptr,  # [B, C, H·W]
    source_stride_b, source_stride_c, source_stride_p, target_stride_b, target_stride_c, target_stride_p,
    channels, pixels,
    OFFSET: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel_blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    i_pixel = tl.program_id(0) % pixel_blocks
    i_channel = tl.program_id(0) // pixel_blocks % channel_blocks
    i_batch = (tl.program_id(0) // pixel_blocks // channel_blocks).to(tl.int64)
    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    o_channel = i_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[:, None]
    m_block = (o_pixel < pixels) & (o_channel < channels)
    o_pixel, o_channel = o_pixel.to(OFFSET), o_channel.to(OFFSET)
    # [C, P]
    b_block = tl.load(
        source_ptr + i_batch * source_stride_b + o_channel * source_stride_c + o_pixel * source_stride_p, mask=m_block
    )
    tl.store(
        target_ptr + i_batch * target_stride_b + o_channel * target_stride_c + o_pixel * target_stride_p,
        b_block,
        mask=m_block,
    )


def _reorder(source: Tensor, target: Tensor) -> Tensor:
    batch, channels, height, width = source.shape
    if source.numel() == 0:
        return target
    # One program per (block of pixels, block of channels, image).
    grid = (ceil_divide(height * width, BLOCK_PIXELS) * ceil_divide(channels, BLOCK_CHANNELS) * batch,)
    flat_source, flat_target = source.flatten(2), target.flatten(2)
    arguments = {
        "source_ptr": source,
        "target_ptr": target,
        **stride_arguments("source", flat_source, "b c p"),
        **stride_arguments("target", flat_target, "b c p"),
        "channels": channels,
        "pixels": height * width,
        "OFFSET": precision(flat_source[:, None], flat_target[:, None])["OFFSET"],
        "BLOCK_PIXELS": BLOCK_PIXELS,
        "BLOCK_CHANNELS": BLOCK_CHANNELS,
    }
    launch(_reorder_kernel, grid, source.device, arguments, num_warps=4, num_stages=1)
    return target


def channels_first(x: Tensor) -> Tensor:
    """x itself unless its channels are adjacent in memory; then a contiguous copy."""
    if not channels_fastest(x[:, None]):
        return x
    if x.stride(2) != x.shape[3] * x.stride(3):  # rows apart, as in a crop: no single stride over the pixels
        return x.contiguous()
    return _reorder(x, torch.empty(x.shape, dtype=x.dtype, device=x.device))


def in_layout_of(template: Tensor, contiguous: Tensor) -> Tensor:
    """A contiguous tensor itself, or its copy in the memory order of ``template``."""
    target = empty_like_layout(template[:, None], template[:, None].shape)[:, 0]
    return contiguous if target.stride() == contiguous.stride() else _reorder(contiguous, target)
