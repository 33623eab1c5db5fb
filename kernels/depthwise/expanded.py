# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
"""``fused``'s convolution with the 1×1 convolution before it in the same pass: the hidden maps are written once.

    out[b,c,i] = Σ_k weight[c,k] · y[b,c, i − 1 + k] + bias[c] (+ y[b,c,i]),  squares[b,c] = Σ_i out[b,c,i]²
    y[b,c,i]   = GELU(Σ_l expand[c,l] · x[b,l,i] + shift[c]), 0 outside the map

A program has STRIPS strips of COLUMNS outputs, each with its two neighbours, 64 pixels: one tile of a Hopper's matrix
units for each row of the map. Every warp has the pixels of one strip, hands each of its threads all those of two
channels, and slides down as ``fused``'s kernel does. It is for inference: training needs y's argument.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.backend import exporting, is_hopper
from kernels.depthwise.fused import LEAST, WIDE, fits, twice_gelu
from kernels.dtypes import upcast
from kernels.launch import ceil_divide, is_plain, launch, next_power_of_2
from kernels.products import dot
from kernels.registers import unstack
from kernels.registration import traced_operator
from kernels.tuning import repeated

STRIPS, BLOCK = 4, 64  # of a program: strips, and the channels that it computes of each
INPUTS = 64  # most of them: with more, weights and rows leave shared memory for too few programs
# Where there are fewer programs than the first, maps are cut into bands of LEAST rows or more. Where there are fewer
# than the second even so, the operator is not used.
PROGRAMS, FEW = 924, 264


@triton.jit
def _slide(values, above, here, w, b_bias, COLUMNS: tl.constexpr):
    """Adds what a row of inputs, ``values`` [COLUMNS + 2], gives to three rows of outputs: the one above it, which is
    complete then, the one beside it, and the one below, which begins with the bias."""
    done, left, below = (), (), ()
    for i in tl.static_range(COLUMNS):
        x0, x1, x2 = values[i], values[i + 1], values[i + 2]
        done = done + (above[i] + w[6] * x0 + w[7] * x1 + w[8] * x2,)
        left = left + (here[i] + w[3] * x0 + w[4] * x1 + w[5] * x2,)
        below = below + (b_bias + w[0] * x0 + w[1] * x1 + w[2] * x2,)
    return done, left, below


@triton.jit
def expanded_kernel(
    x,  # [B, H, W, inputs], contiguous
    expand,  # [C, inputs], contiguous
    shift,  # [C]
    weight,  # [C, 3, 3], contiguous
    bias,  # [C]
    out,  # [B, H, W, C], contiguous
    squares,  # [B, bands · strips, C]
    items, height, width, rows, bands, strips, blocks,
    INPUTS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, RESIDUAL: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # One program per (STRIPS of the items, block of channels), channels fastest; an item is a strip of a band of an
    # image's rows. INNER is a power of two.
    WIDTH: tl.constexpr = COLUMNS + 2
    LANES: tl.constexpr = STRIPS * BLOCK
    first_item, first_channel = tl.program_id(0) // blocks * STRIPS, tl.program_id(0) % blocks * BLOCK
    o_pixel, o_input = tl.arange(0, STRIPS * WIDTH), tl.arange(0, INNER)
    o_item = first_item + o_pixel // WIDTH
    o_part = o_item // strips  # image and band
    o_column = o_item % strips * COLUMNS + o_pixel % WIDTH - 1
    m_pixel = (o_item < items) & (o_column >= 0) & (o_column < width)
    o_top = o_part % bands * rows
    o_first = ((o_part // bands).to(tl.int64) * height + o_top) * width + o_column
    p_pixel = x + o_first * INPUTS
    m_input = o_input < INPUTS
    o_output = first_channel + tl.arange(0, BLOCK)
    m_output = o_output < CHANNELS
    p_expand = expand + o_output[None, :] * INPUTS + o_input[:, None]
    b_expand = tl.load(p_expand, mask=m_input[:, None] & m_output[None, :], other=0)
    b_shift = tl.load(shift + o_output, mask=m_output, other=0).to(tl.float32)

    o_lane = tl.arange(0, LANES)
    o_item, o_channel = first_item + o_lane // BLOCK, first_channel + o_lane % BLOCK
    m_lane = (o_item < items) & (o_channel < CHANNELS)
    o_part, o_left = o_item // strips, o_item % strips * COLUMNS
    top = o_part % bands * rows
    o_first = ((o_part // bands).to(tl.int64) * height + top) * width + o_left
    p_out = out + o_first * CHANNELS + o_channel
    w = ()
    for k in tl.static_range(9):
        b_weight = tl.load(weight + o_channel * 9 + k, mask=m_lane, other=0).to(tl.float32)
        if RESIDUAL and k == 4:
            b_weight += 1
        w = w + (b_weight * 0.5,)
    b_bias = tl.load(bias + o_channel, mask=m_lane, other=0).to(tl.float32)
    b_squares = tl.zeros([LANES], tl.float32)
    above = (b_bias,) * COLUMNS  # the row above the one that is computed: only its last kernel row is missing
    here = (b_bias,) * COLUMNS
    for i_row in tl.range(-1, rows + 1, num_stages=3):
        m_row = m_pixel & (o_top + i_row >= 0) & (o_top + i_row < height)
        p_x = p_pixel[:, None] + i_row * width * INPUTS + o_input[None, :]
        b_x = tl.load(p_x, mask=m_row[:, None] & m_input[None, :], other=0)
        # Outside of the map the sum is 0, and so is GELU.
        b_y = dot(b_x, b_expand, tl.where(m_row[:, None], b_shift[None, :], 0), UPCAST).to(x.dtype.element_ty)
        b_y = tl.permute(tl.reshape(b_y, [STRIPS, WIDTH, BLOCK]), (0, 2, 1))
        row, values = unstack(tl.reshape(b_y, [LANES, WIDTH])), ()
        for i in tl.static_range(WIDTH):
            b_value = tl.reshape(row[i], [LANES]).to(tl.float32)
            values = values + (twice_gelu(b_value, x.dtype.element_ty.primitive_bitwidth == 16),)
        done, left, below = _slide(values, above, here, w, b_bias, COLUMNS)
        m_out = m_lane & (i_row > 0) & (top + i_row <= height)
        p_row = p_out + (i_row - 1) * width * CHANNELS
        b_sum = tl.zeros([LANES], tl.float32)
        for i in tl.static_range(COLUMNS):
            m_column = m_out if WHOLE else m_out & (o_left + i < width)
            tl.store(p_row + i * CHANNELS, done[i].to(out.dtype.element_ty), mask=m_column)
            b_done = done[i] if WHOLE else tl.where(m_column, done[i], 0)
            b_sum += b_done * b_done
        b_squares += tl.where(m_out, b_sum, 0)
        above, here = left, below
    o_part = o_part.to(tl.int64) * strips + o_item % strips
    tl.store(squares + o_part * CHANNELS + o_channel, b_squares, mask=m_lane)


def _bands(batch: int, outputs: int, height: int, width: int) -> int:
    """Into how many a map is cut; 0 where even LEAST rows give too few programs."""
    programs = ceil_divide(batch * ceil_divide(width, WIDE), STRIPS) * ceil_divide(outputs, BLOCK)
    bands = max(1, min(height // LEAST, ceil_divide(PROGRAMS, programs)))
    return bands if bands * programs >= FEW else 0


def takes(x: Tensor, outputs: int) -> bool:
    """Whether the operator is for x [B, C, H, W] and so many outputs: large maps of few channels, that ``fused`` could
    take, on a Hopper. It is not for what is exported, which may run with other batches and on other GPUs."""
    batch, channels, height, width = x.shape
    if exporting() or not isinstance(batch, int) or not is_hopper():
        return False
    if channels > INPUTS or x.itemsize > 2 or not fits(x):
        return False
    return outputs % 2 == 0 and outputs * height * width < 2**31 and _bands(batch, outputs, height, width) > 0


@repeated
def _convolve(
    x: Tensor, expand: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    (batch, inputs, height, width), channels = x.shape, expand.shape[0]
    bands, strips = _bands(batch, channels, height, width), ceil_divide(width, WIDE)
    rows = ceil_divide(height, bands)
    bands = ceil_divide(height, rows)
    items, blocks = batch * bands * strips, ceil_divide(channels, BLOCK)
    out = x.new_empty((batch, height, width, channels))
    parts = x.new_empty((batch, bands * strips, channels), dtype=torch.float32)
    arguments = {
        "x": x.permute(0, 2, 3, 1), "expand": expand.contiguous(), "shift": shift.contiguous(),
        "weight": weight.contiguous(), "bias": bias.contiguous(), "out": out, "squares": parts,
        "items": items, "height": height, "width": width, "rows": rows, "bands": bands, "strips": strips,
        "blocks": blocks, "INPUTS": inputs, "INNER": max(16, next_power_of_2(inputs)), "CHANNELS": channels,
        "RESIDUAL": residual, "WHOLE": width % WIDE == 0, "COLUMNS": WIDE, "STRIPS": STRIPS, "BLOCK": BLOCK,
        "UPCAST": upcast(x.dtype),
    }  # fmt: skip
    grid = (ceil_divide(items, STRIPS) * blocks,)
    if is_plain(x):
        launch(expanded_kernel, grid, x.device, arguments, num_warps=4)
    else:
        wrap_triton(expanded_kernel)[grid](**arguments, num_warps=4)
    return out.permute(0, 3, 1, 2), parts


def _flops(x: Any, expand: Any, *_: Any) -> int:
    """Two per multiply-add of both convolutions."""
    return 2 * x[0] * math.prod(x[2:]) * expand[0] * (expand[1] + 9)


@traced_operator("expanded_depthwise_conv2d", flops=_flops)
def expanded_convolve(
    x: Tensor, expand: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    """The formula above, for maps that it ``takes``.

    x [B, L, H, W], expand [C, L], shift [C], weight [C, 1, 3, 3], bias [C], whether to add y -> out [B, C, H, W] in
    channels-last memory, and squares [B, C] in float32.
    """
    out, parts = _convolve(x, expand, shift, weight, bias, residual)
    return out, parts.sum(1)
