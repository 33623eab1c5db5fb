# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
"""3×3 depthwise convolution of channels-last maps, in one pass with what stands before and after it.

    out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − 1 + k] (+ bias[c]) (+ x[b,c,i])
    or of GELU(x) instead of x, and then also squares[b,c] = Σ_i out[b,c,i]²

``sliding`` has its gradients and the operators. A program keeps COLUMNS outputs of a row in registers and slides down
the map, so that it loads (COLUMNS + 2) / COLUMNS inputs per output and takes as many GELUs. Where images are few, it
slides over a band of their rows only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.launch import ceil_divide, is_launchable, is_plain, launch
from kernels.tuning import repeated

COLUMNS = 7  # divides the maps of images of 224 pixels
BLOCK = 64  # channels of a program, two per lane
PROGRAMS = 2048  # below which a map is cut into bands, of LEAST rows or more: two warps per scheduler of a large GPU
LEAST = 8


@triton.jit
def twice_tail(x):
    """2Φ(−|x|), Φ being the normal distribution's: 2 to the power of a polynomial, to 1e-6, in a third of erf's
    instructions."""
    a = tl.abs(x)
    power = a * (8.507894352e-3 + a * (-9.305259446e-4 + a * (6.159844634e-5 - a * 1.834819841e-6)))
    return tl.exp2(4.7087e-6 + a * (-1.151251078 + a * (-0.4584643841 + a * (-5.396007374e-2 + power))))


@triton.jit
def twice_gelu(x, b_tail):
    """2·GELU(x) = x + |x|·(1 − 2Φ(−|x|)). Only numbers of bfloat16 above 1.7e38 pass float32 here; infinity gives
    infinity, −∞ NaN."""
    return x + tl.abs(x) * (1 - b_tail)


@triton.jit
def twice_gelu_slope(x, b_tail):
    """2·GELU′(x) = 2Φ(x) + 2·x·φ(x). GELU has the sign of x, where it is not 0."""
    b_twice_phi = tl.where(twice_gelu(x, b_tail) > 0, 2 - b_tail, b_tail)
    return b_twice_phi + x * (tl.exp2(x * x * -0.72134752) * 0.797884561)


@triton.jit
def load_row(p_row, m_row, first, width, stride, m_channel, COLUMNS: tl.constexpr):
    """COLUMNS pixels [C] of a row, from column ``first`` on; 0 outside the map."""
    values = ()
    for i in tl.static_range(COLUMNS):
        m_column = m_row & (first + i >= 0) & (first + i < width)
        values = values + (tl.load(p_row + i * stride, mask=m_channel & m_column, other=0),)
    return values


@triton.jit
def _entering(p_row, m_row, first, width, stride, m_channel, GELU: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS + 2 inputs [C] of a row, or twice their GELU, from column ``first`` on; 0 outside the map."""
    values = load_row(p_row, m_row, first, width, stride, m_channel, COLUMNS + 2)
    entering = ()
    for i in tl.static_range(COLUMNS + 2):
        b_x = values[i].to(tl.float32)
        entering = entering + (twice_gelu(b_x, twice_tail(b_x)) if GELU else b_x,)
    return entering


@triton.jit
def fused_kernel(
    x,  # [B, H, W, C], contiguous
    weight,  # [C, 3, 3], contiguous
    bias,  # [C], not read without HAS_BIAS
    out,  # like x
    squares,  # [B, bands · strips, C], not written without GELU
    height, width, rows, half_channels, bands, strips, blocks,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (image, band of rows, strip of columns, block of channels), channels fastest.
    i_block = tl.program_id(0) % blocks
    i_part = tl.program_id(0) // blocks  # image, band and strip
    i_strip = i_part % strips
    i_image = i_part // strips // bands
    top = i_part // strips % bands * rows
    first_row, last_row = tl.maximum(top - 1, 0), tl.minimum(top + rows, height)
    channels = half_channels * 2  # the compiler then knows that it is even
    o_channel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    first = i_strip * COLUMNS - 1
    o_first = i_image.to(tl.int64) * height * width * channels + (first_row * width + first) * channels
    p_x = x + o_first + o_channel
    p_out = out + o_first + channels + o_channel - width * channels  # of the row above the one that is read
    w = ()
    for k in tl.static_range(9):
        b_weight = tl.load(weight + o_channel * 9 + k, mask=m_channel, other=0).to(tl.float32)
        if RESIDUAL and k == 4:
            b_weight += 1
        w = w + (b_weight * 0.5 if GELU else b_weight,)
    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + o_channel, mask=m_channel, other=0).to(tl.float32)
    b_squares = tl.zeros([BLOCK], tl.float32)
    above = (b_bias,) * COLUMNS  # the row above the one that is read: only its last kernel row is missing
    here = (b_bias,) * COLUMNS
    values = _entering(p_x, height > 0, first, width, channels, m_channel, GELU, COLUMNS)
    for i_row in range(first_row, last_row + 1):
        p_x += width * channels
        following = _entering(p_x, i_row + 1 < height, first, width, channels, m_channel, GELU, COLUMNS)
        done, left, below = (), (), ()
        for i in tl.static_range(COLUMNS):
            x0, x1, x2 = values[i], values[i + 1], values[i + 2]
            done = done + (above[i] + w[6] * x0 + w[7] * x1 + w[8] * x2,)
            left = left + (here[i] + w[3] * x0 + w[4] * x1 + w[5] * x2,)
            below = below + (b_bias + w[0] * x0 + w[1] * x1 + w[2] * x2,)
        for i in tl.static_range(COLUMNS):
            m_out = m_channel & (i_row > top) & (first + 1 + i < width)
            tl.store(p_out + i * channels, done[i].to(out.dtype.element_ty), mask=m_out)
            if GELU:
                b_squares += tl.where(m_out, done[i] * done[i], 0)
        values, above, here = following, left, below
        p_out += width * channels
    if GELU:
        p_squares = squares + i_part.to(tl.int64) * channels + o_channel
        tl.store(p_squares, b_squares, mask=m_channel)


def fits(x: Tensor) -> bool:
    """Whether the operator takes x [B, C, H, W]: channels-last memory, an even number of channels."""
    last = is_launchable(x) and x.permute(0, 2, 3, 1).is_contiguous()
    return last and x.shape[1] % 2 == 0 and x.numel() > 0 and math.prod(x.shape[1:]) < 2**31


def cut(x: Tensor) -> dict[str, int]:
    """A map's sizes as kernels take them: into strips of columns, blocks of channels, and bands of so many rows."""
    batch, channels, height, width = x.shape
    strips, blocks = ceil_divide(width, COLUMNS), ceil_divide(channels, BLOCK)
    bands = min(ceil_divide(PROGRAMS, batch * strips * blocks), ceil_divide(height, LEAST))
    rows = ceil_divide(height, bands)
    sizes = {"height": height, "width": width, "rows": rows, "half_channels": channels // 2}
    return sizes | {"bands": ceil_divide(height, rows), "strips": strips, "blocks": blocks}


@repeated
def convolve_maps(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool) -> tuple[Tensor, Tensor]:
    """The output and, with GELU, partial sums of squares [B, parts, C]."""
    batch, channels = x.shape[:2]
    out, sizes = torch.empty_like(x), cut(x)
    bands, strips = sizes["bands"], sizes["strips"]
    parts = x.new_empty((batch, bands * strips, channels) if gelu else (1,), dtype=torch.float32)
    arguments = {
        "x": x.permute(0, 2, 3, 1),
        "weight": weight.contiguous(),
        "bias": weight if bias is None else bias.contiguous(),
        "out": out.permute(0, 2, 3, 1),
        "squares": parts,
        **sizes,
        "HAS_BIAS": bias is not None,
        "RESIDUAL": residual,
        "GELU": gelu,
        "COLUMNS": COLUMNS,
        "BLOCK": BLOCK,
    }
    grid = (batch * bands * strips * sizes["blocks"],)
    if is_plain(x):
        launch(fused_kernel, grid, x.device, arguments, num_warps=1)
    else:
        wrap_triton(fused_kernel)[grid](**arguments, num_warps=1)
    return out, parts
