# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""The weight's gradient of a 3×3 depthwise convolution of channels-last maps.

    gradient[c, k] = Σ_{b,i} grad[b,c,i] · x[b,c, i − 1 + k]

A program slides down a strip of maps as that of ``fused`` does, with three rows of gradients and one of inputs in
registers, and adds up the nine sums of its channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise.fused import BLOCK, COLUMNS, PROGRAMS, cut, load_row
from kernels.launch import ceil_divide, launch
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated


@triton.jit
def _gradient_kernel(
    grad,  # [B, H, W, C], contiguous
    x,  # like grad
    parts,  # [chunks of images · bands · strips, C, 3, 3], contiguous
    batch, height, width, rows, half_channels, bands, strips, blocks, images,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (chunk of images, band of rows, strip of columns, block of channels), channels fastest.
    i_block = tl.program_id(0) % blocks
    i_part = tl.program_id(0) // blocks  # chunk, band and strip
    i_strip = i_part % strips
    i_chunk = i_part // strips // bands
    top = i_part // strips % bands * rows
    last_row = tl.minimum(top + rows, height)
    channels = half_channels * 2  # the compiler then knows that it is even
    o_channel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    first = i_strip * COLUMNS
    tops = (tl.zeros([BLOCK], tl.float32),) * 3  # sums of the kernel's rows
    middles = (tl.zeros([BLOCK], tl.float32),) * 3
    bottoms = (tl.zeros([BLOCK], tl.float32),) * 3
    for i_image in range(i_chunk * images, tl.minimum((i_chunk + 1) * images, batch)):
        o_first = tl.cast(i_image, tl.int64) * height * width * channels + ((top - 1) * width + first) * channels
        p_x, p_grad = x + o_first - channels + o_channel, grad + o_first + width * channels + o_channel
        # Gradients of the rows above the input row that is read, beside it and below; a band has those of its own.
        above = (tl.zeros([BLOCK], tl.float32),) * COLUMNS
        here = (tl.zeros([BLOCK], tl.float32),) * COLUMNS
        for i_row in range(top - 1, last_row + 1):
            values = load_row(p_x, (i_row >= 0) & (i_row < height), first - 1, width, channels, m_channel, COLUMNS + 2)
            below = load_row(p_grad, i_row + 1 < last_row, first, width, channels, m_channel, COLUMNS)
            for k in tl.static_range(3):
                b_top, b_middle, b_bottom = tops[k], middles[k], bottoms[k]
                for i in tl.static_range(COLUMNS):
                    b_top += below[i] * values[i + k]
                    b_middle += here[i] * values[i + k]
                    b_bottom += above[i] * values[i + k]
                tops = tops[:k] + (b_top,) + tops[k + 1 :]
                middles = middles[:k] + (b_middle,) + middles[k + 1 :]
                bottoms = bottoms[:k] + (b_bottom,) + bottoms[k + 1 :]
            above, here = here, below
            p_x += width * channels
            p_grad += width * channels
    sums = tops + middles + bottoms
    for k in tl.static_range(9):
        tl.store(parts + (i_part.to(tl.int64) * channels + o_channel) * 9 + k, sums[k], mask=m_channel)


@repeated
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[C, 1, 3, 3], of maps [B, C, H, W] that ``fits`` of ``fused`` takes."""
    batch, channels = x.shape[:2]
    sizes = cut(x)
    others = sizes["bands"] * sizes["strips"]
    images = max(1, batch * others * sizes["blocks"] // (2 * PROGRAMS))
    chunks = ceil_divide(batch, images)
    parts = torch.empty((chunks * others, channels * 9), dtype=torch.float32, device=x.device)
    arguments = {
        "grad": grad.permute(0, 2, 3, 1),
        "x": x.permute(0, 2, 3, 1),
        "parts": parts,
        "batch": batch,
        **sizes,
        "images": images,
        "COLUMNS": COLUMNS,
        "BLOCK": BLOCK,
    }
    launch(_gradient_kernel, (chunks * others * sizes["blocks"],), x.device, arguments, num_warps=1)
    return sum_rows(sum_rows(parts, 64, torch.float32), 1, x.dtype).view(channels, 1, 3, 3)
