# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
"""3×3 depthwise convolution of channels-last maps, in one pass with what stands before and after it.

    out[b,c,i] = Σ_k weight[c,k] · x[b,c, i − 1 + k] (+ bias[c]) (+ x[b,c,i])
    or of GELU(x) instead of x, and then also squares[b,c] = Σ_i out[b,c,i]²

``sliding`` has its gradients and the operators. A program keeps COLUMNS outputs of a row in registers and slides down
the map, so that it loads (COLUMNS + 2) / COLUMNS inputs per output and takes as many GELUs. The rows that come next are
on their way to shared memory meanwhile: registers would hold few of them, and few programs. Where images are few, a
program slides over a band of their rows only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.launch import ceil_divide, is_launchable, is_plain, launch
from kernels.tuning import repeated

# What an H200 ran fastest. Both divide the maps of images of 224 pixels; the gradients have registers for 7 alone.
COLUMNS, WIDE = 7, 14
STAGES = 3  # rows of a program that are in use or on their way
BLOCK = 64  # channels of a program, two per lane
PROGRAMS, FEW = 3072, 1024  # below which a map is cut into bands of LEAST rows or more, and of half as many
LEAST = 14


@triton.jit
def twice_tail(x, COARSE: tl.constexpr):
    """2Φ(−|x|), Φ being the normal distribution's: 2 to the power of a polynomial, to 1e-6, in a third of erf's
    instructions; where COARSE, for numbers of 16 bits, to 1e-4."""
    a = tl.abs(x)
    if COARSE:
        power = a * (-4.811806386e-2 + a * (5.792341623e-3 - a * 3.169749775e-4))
        return tl.exp2(-1.262192583e-4 + a * (-1.149099713 + a * (-0.4642838840 + power)))
    power = a * (8.507894352e-3 + a * (-9.305259446e-4 + a * (6.159844634e-5 - a * 1.834819841e-6)))
    return tl.exp2(4.7087e-6 + a * (-1.151251078 + a * (-0.4584643841 + a * (-5.396007374e-2 + power))))


@triton.jit
def twice_gelu(x, COARSE: tl.constexpr):
    """2·GELU(x) = x + |x|·(1 − 2Φ(−|x|)). Only numbers of bfloat16 above 1.7e38 pass float32 here; infinity gives
    infinity, −∞ NaN."""
    return x + tl.abs(x) * (1 - twice_tail(x, COARSE))


@triton.jit
def twice_gelu_and_slope(x, COARSE: tl.constexpr):
    """2·GELU(x) = 2Φ(x)·x and its derivative, 2Φ(x) + 2·x·φ(x)."""
    b_tail = twice_tail(x, COARSE)
    b_twice_phi = tl.where(x > 0, 2 - b_tail, b_tail)
    return b_twice_phi * x, b_twice_phi + x * tl.exp2(x * x * -0.72134752 - 0.32574807)


@triton.jit
def load_row(
    p_row, m_row, m_left, m_right, o_column, width,
    CHANNELS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The pixels [BLOCK] of a strip, from column FIRST to LAST, -1 and COLUMNS being neighbours; 0 outside the map.

    ``p_row`` points to the strip's first column, ``o_column`` in a row of ``width``. WHOLE strips end where rows do.
    """
    values = ()
    for i in tl.static_range(FIRST, LAST + 1):
        m_column = m_row
        if i < 0:
            m_column = m_row & m_left
        elif i == COLUMNS:
            m_column = m_row & m_right
        elif not WHOLE:
            m_column = m_row & (o_column + i < width)
        values = values + (tl.load(p_row + i * CHANNELS, mask=m_column, other=0),)
    return values


@triton.jit
def slide(values, above, here, w, b_bias, COLUMNS: tl.constexpr):
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
def store_row(
    p_out, done, m_out, o_column, width,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores a strip's outputs, the first at ``o_column``, as far as the map goes; gives the sum of their squares."""
    b_sum = tl.zeros_like(done[0])
    for i in tl.static_range(COLUMNS):
        m_column = m_out if WHOLE else m_out & (o_column + i < width)
        tl.store(p_out + i * CHANNELS, done[i].to(p_out.dtype.element_ty), mask=m_column)
        b_done = done[i] if WHOLE else tl.where(m_column, done[i], 0)
        b_sum += b_done * b_done
    return b_sum


@triton.jit
def fused_kernel(
    x,  # [B, H, W, C], contiguous
    weight,  # [C, 3, 3], contiguous
    bias,  # [C], not read without HAS_BIAS
    out,  # like x
    squares,  # [B, bands · strips, C], not written without GELU
    height, width, rows, bands, strips, blocks, CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (image, band of rows, BLOCK of its strips' channels), channels fastest. A constant CHANNELS makes
    # the offsets of columns parts of instructions.
    i_part = tl.program_id(0) // blocks  # image and band
    top = i_part % bands * rows
    first_row, last_row = tl.maximum(top - 1, 0), tl.minimum(top + rows, height)
    o_lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_lane = o_lane < strips * CHANNELS
    o_column, o_channel = o_lane // CHANNELS * COLUMNS, o_lane % CHANNELS
    m_left, m_right = m_lane & (o_column > 0), m_lane & (o_column + COLUMNS < width)
    pitch = width * CHANNELS
    o_first = ((i_part // bands).to(tl.int64) * height + first_row) * pitch + (o_column * CHANNELS + o_channel)
    p_x = x + o_first
    p_out = out + o_first - pitch  # of the row above the one that is read
    w = ()
    for k in tl.static_range(9):
        b_weight = tl.load(weight + o_channel * 9 + k, mask=m_lane, other=0).to(tl.float32)
        if RESIDUAL and k == 4:
            b_weight += 1
        w = w + (b_weight * 0.5 if GELU else b_weight,)
    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + o_channel, mask=m_lane, other=0).to(tl.float32)
    b_squares = tl.zeros([BLOCK], tl.float32)
    above = (b_bias,) * COLUMNS  # the row above the one that is read: only its last kernel row is missing
    here = (b_bias,) * COLUMNS
    for i_row in tl.range(first_row, last_row + 1, num_stages=STAGES):
        m_row = m_lane & (i_row < height)
        loaded = load_row(p_x, m_row, m_left, m_right, o_column, width, CHANNELS, -1, COLUMNS, COLUMNS, WHOLE)
        values = ()
        for i in tl.static_range(COLUMNS + 2):
            b_x = loaded[i].to(tl.float32)
            values = values + (twice_gelu(b_x, x.dtype.element_ty.primitive_bitwidth == 16) if GELU else b_x,)
        done, left, below = slide(values, above, here, w, b_bias, COLUMNS)
        m_out = m_lane & (i_row > top)
        b_sum = store_row(p_out, done, m_out, o_column, width, CHANNELS, COLUMNS, WHOLE)
        if GELU:
            b_squares += tl.where(m_out, b_sum, 0)
        above, here = left, below
        p_x += pitch
        p_out += pitch
    if GELU:
        o_part = i_part.to(tl.int64) * strips + o_lane // CHANNELS
        tl.store(squares + o_part * CHANNELS + o_channel, b_squares, mask=m_lane)


def fits(x: Tensor) -> bool:
    """Whether the operator takes x [B, C, H, W]: channels-last memory, an even number of channels."""
    last = is_launchable(x) and x.permute(0, 2, 3, 1).is_contiguous()
    return last and x.shape[1] % 2 == 0 and x.numel() > 0 and math.prod(x.shape[1:]) < 2**31


def cut(x: Tensor, columns: int) -> dict[str, int]:
    """A map's sizes as kernels take them: into strips of columns, blocks of a row of strips' channels, and bands of
    rows where there are few programs."""
    batch, channels, height, width = x.shape
    strips = ceil_divide(width, columns)
    blocks = ceil_divide(strips * channels, BLOCK)
    wanted, most = ceil_divide(PROGRAMS, batch * blocks), height // LEAST
    if batch * blocks * most < FEW:
        most = 2 * height // LEAST
    rows = ceil_divide(height, max(1, min(wanted, most)))
    sizes = {"height": height, "width": width, "rows": rows, "bands": ceil_divide(height, rows)}
    return sizes | {"strips": strips, "blocks": blocks}


@repeated
def convolve_maps(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool) -> tuple[Tensor, Tensor]:
    """The output and, with GELU, partial sums of squares [B, parts, C]."""
    batch, channels = x.shape[:2]
    columns = WIDE if x.shape[3] % WIDE == 0 else COLUMNS
    out, sizes = torch.empty_like(x), cut(x, columns)
    bands, strips = sizes["bands"], sizes["strips"]
    parts = x.new_empty((batch, bands * strips, channels) if gelu else (1,), dtype=torch.float32)
    arguments = {
        "x": x.permute(0, 2, 3, 1), "weight": weight.contiguous(),
        "bias": weight if bias is None else bias.contiguous(), "out": out.permute(0, 2, 3, 1), "squares": parts,
        **sizes, "CHANNELS": channels, "HAS_BIAS": bias is not None, "RESIDUAL": residual, "GELU": gelu,
        "COLUMNS": columns, "WHOLE": x.shape[3] % columns == 0, "STAGES": STAGES, "BLOCK": BLOCK,
    }  # fmt: skip
    grid = (batch * bands * sizes["blocks"],)
    if is_plain(x):
        launch(fused_kernel, grid, x.device, arguments, num_warps=1)
    else:
        wrap_triton(fused_kernel)[grid](**arguments, num_warps=1)
    return out, parts
