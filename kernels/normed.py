"""Backward pass of a batch norm and the GELU after it, on channels-last maps.

    out = GELU(z)   z[b,c,i] = scale[c]·x[b,c,i] + shift[c]   scale = weight·rstd   shift = bias − scale·mean
    g = dout·GELU′(z)   dbias = Σ g   dweight = rstd·Σ g·(x − mean)
    dx = scale·(g − Σ g / n − (x − mean)·rstd²·Σ g·(x − mean) / n)   over the n pixels of all images

What Inductor makes of these formulas writes z or g to memory in float32. Here one launch sums parts of the rows, and
another computes dx: each reads dout and x. It is a ``triton_op``: Inductor launches the kernels itself.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.depthwise.fused import twice_gelu_and_slope
from kernels.launch import ceil_divide, is_plain, launch
from kernels.registration import traced_operator

ROWS, CHANNELS = 64, 32  # of a tile
PARTS = 1056  # of the rows, each summed by one program for each block of channels: 8 for each processor of a large GPU


@triton.jit
def _of_channels(vector, o_channel, channels):
    """[1, C] of a vector over channels, in float32."""
    return tl.load(vector + o_channel, mask=o_channel < channels, other=0)[None, :]


@triton.jit
def _tile(grad, x, b_scale, b_shift, o_row, o_channel, rows, channels):
    """Of a tile [R, C]: g = dout·GELU′(z) and x; where it is, and which there is."""
    o_tile = o_row.to(tl.int64)[:, None] * channels + o_channel[None, :]
    m_tile = (o_row < rows)[:, None] & (o_channel < channels)[None, :]
    b_x = tl.load(x + o_tile, mask=m_tile, other=0).to(tl.float32)
    b_grad = tl.load(grad + o_tile, mask=m_tile, other=0).to(tl.float32)
    return b_grad * (0.5 * twice_gelu_and_slope(b_x * b_scale + b_shift, False)[1]), b_x, o_tile, m_tile


@triton.jit
def normed_sums_kernel(
    grad, x,  # [rows, channels], contiguous
    scale, shift, mean,  # [channels], float32
    sums,  # [2, parts, channels], float32
    rows, channels, parts, tiles,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # One program per (part of the rows, block of channels), channels fastest; a part has so many tiles.
    blocks = tl.cdiv(channels, CHANNELS)
    i_part = tl.program_id(0) // blocks
    o_channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    b_scale, b_shift = _of_channels(scale, o_channel, channels), _of_channels(shift, o_channel, channels)
    b_mean = _of_channels(mean, o_channel, channels)
    b_sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    b_products = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i_tile in range(0, tiles):
        o_row = (i_part * tiles + i_tile) * ROWS + tl.arange(0, ROWS)
        b_g, b_x, _, _ = _tile(grad, x, b_scale, b_shift, o_row, o_channel, rows, channels)
        b_sums += b_g
        b_products += b_g * (b_x - b_mean)
    p_sums, m_channel = sums + i_part * channels + o_channel, o_channel < channels
    tl.store(p_sums, tl.sum(b_sums, 0), mask=m_channel)
    tl.store(p_sums + parts * channels, tl.sum(b_products, 0), mask=m_channel)


@triton.jit
def normed_gradient_kernel(
    grad, x,  # [rows, channels], contiguous
    scale, shift, mean, rstd,  # [channels], float32
    sums,  # [2, channels], float32: Σ g and Σ g·(x − mean)
    out,  # like x
    grad_bias, grad_weight,  # [channels]
    rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # One program per (block of rows, block of channels), channels fastest.
    blocks = tl.cdiv(channels, CHANNELS)
    i_block = tl.program_id(0) // blocks
    o_row = i_block * ROWS + tl.arange(0, ROWS)
    o_channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    b_scale, b_shift = _of_channels(scale, o_channel, channels), _of_channels(shift, o_channel, channels)
    b_mean, b_rstd = _of_channels(mean, o_channel, channels), _of_channels(rstd, o_channel, channels)
    b_sum = _of_channels(sums, o_channel, channels)
    b_product = _of_channels(sums + channels, o_channel, channels) * b_rstd
    if i_block == 0:
        m_first = (o_channel < channels)[None, :]
        tl.store(grad_bias + o_channel[None, :], b_sum.to(grad_bias.dtype.element_ty), mask=m_first)
        tl.store(grad_weight + o_channel[None, :], b_product.to(grad_weight.dtype.element_ty), mask=m_first)
    b_g, b_x, o_tile, m_tile = _tile(grad, x, b_scale, b_shift, o_row, o_channel, rows, channels)
    b_out = b_scale * (b_g - (b_sum + (b_x - b_mean) * (b_rstd * b_product)) / rows)
    tl.store(out + o_tile, b_out.to(out.dtype.element_ty), mask=m_tile)


@traced_operator("normed_gelu_backward")
def normed_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
) -> list[Tensor]:
    """dx, dweight and dbias, like x and weight [C], for dout and x [B, C, H, W] in channels-last memory.

    The other tensors are [C] in float32.
    """
    batch, channels, height, width = x.shape
    rows = batch * height * width
    tiles = ceil_divide(ceil_divide(rows, ROWS), PARTS)
    parts, blocks = ceil_divide(rows, tiles * ROWS), ceil_divide(channels, CHANNELS)
    common: dict[str, Any] = {
        "grad": grad.permute(0, 2, 3, 1), "x": x.permute(0, 2, 3, 1), "scale": scale, "shift": shift, "mean": mean,
        "rows": rows, "channels": channels, "ROWS": ROWS, "CHANNELS": CHANNELS,
    }  # fmt: skip
    sums = x.new_empty((2, parts, channels), dtype=torch.float32)
    grid, arguments = (parts * blocks,), {**common, "sums": sums, "parts": parts, "tiles": tiles}
    if is_plain(x):
        launch(normed_sums_kernel, grid, x.device, arguments, num_warps=4)
    else:
        wrap_triton(normed_sums_kernel)[grid](**arguments, num_warps=4)
    out, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    own = {"rstd": rstd, "sums": sums.sum(1), "grad_weight": grad_weight, "grad_bias": grad_bias}
    grid, arguments = (ceil_divide(rows, ROWS) * blocks,), {**common, **own, "out": out.permute(0, 2, 3, 1)}
    if is_plain(x):
        launch(normed_gradient_kernel, grid, x.device, arguments, num_warps=4)
    else:
        wrap_triton(normed_gradient_kernel)[grid](**arguments, num_warps=4)
    return [out, grad_weight, grad_bias]
