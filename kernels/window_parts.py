"""Value's gradient where outputs share clamped windows: the parts that tiles of outputs left, one per window position,
summed where their windows lie on top of each other."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dtypes import precision
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.views import aligned, alignment, at, multiple, view
from kernels.windows_triton import store_pixels


@triton.jit
def _sum_parts_kernel(
    parts,  # [B, G, C, tiles · windows, K²]; FILLED channels, where these are more
    target,  # [B, G, C, H, W]: written
    groups, channels, height, width, tiles, windows, blocks, ALIGNED: tl.constexpr, FILLED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    channels, target = multiple(channels, ALIGNED), aligned(target, ALIGNED)
    parts = aligned(parts, 8 if FILLED else ALIGNED)
    i_block, i_image = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    parts, target = at(parts, i_image // groups, i_image % groups), at(target, i_image // groups, i_image % groups)
    o_pixel, o_channel = i_block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS), tl.arange(0, BLOCK_CHANNELS)
    o_row, o_column = o_pixel // width, o_pixel % width
    m_pixel, m_channel = o_pixel < height * width, (o_channel < (FILLED if FILLED else channels))[None, :]
    # [P, C]
    b_sum = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATOR)
    for i_window in tl.range(windows, disable_licm=True):
        o_kernel_h = o_row - i_window // (width - KERNEL_W + 1)
        o_kernel_w = o_column - i_window % (width - KERNEL_W + 1)
        m_part = m_pixel & (o_kernel_h >= 0) & (o_kernel_h < KERNEL_H) & (o_kernel_w >= 0) & (o_kernel_w < KERNEL_W)
        o_part = (o_kernel_h * KERNEL_W + o_kernel_w).to(OFFSET) * parts.w
        p_part = parts.ptr + o_part[:, None] + (o_channel.to(OFFSET) * parts.c)[None, :]
        for i_tile in range(tiles):
            p_tile = p_part + tl.cast(i_window * tiles + i_tile, OFFSET) * parts.h
            b_sum += tl.load(p_tile, mask=m_part[:, None] & m_channel, other=0).to(ACCUMULATOR)
    o_target = o_row.to(OFFSET) * target.h + o_column.to(OFFSET) * target.w
    store_pixels(target, o_target, m_pixel, b_sum, channels)


def sum_parts(parts: Tensor, target: Tensor, kernel_size: tuple[int, int], tiles: int = 1) -> None:
    """Fills ``target`` [B, G, C, H, W] from ``parts`` [B, G, C, tiles · windows, Kh · Kw], of which the tiles of a
    window follow each other. Parts may have more channels than the target: a multiple of 8."""
    batch, groups, channels, height, width = target.shape
    blocks = ceil_divide(height * width, 64)
    views = {name: view(maps, "b g c h w") for name, maps in (("parts", parts), ("target", target))}
    arguments = {
        **views, "ALIGNED": alignment(channels, *views.values()),
        "FILLED": parts.shape[2] if parts.shape[2] > channels else 0, "groups": groups, "channels": channels,
        "height": height, "width": width, "tiles": tiles, "windows": parts.shape[3] // tiles, "blocks": blocks,
        "KERNEL_H": kernel_size[0], "KERNEL_W": kernel_size[1], **precision(target, parts), "BLOCK_PIXELS": 64,
        "BLOCK_CHANNELS": max(8, next_power_of_2(channels)),
    }  # fmt: skip
    # One program per (block of pixels, group, batch entry).
    launch(_sum_parts_kernel, (blocks * groups * batch,), target.device, arguments, num_warps=4, num_stages=2)
