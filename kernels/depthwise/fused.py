# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
"""3×3 depthwise convolution of channels-last maps, in one pass with what stands before and after it, and its gradients.

    out[i] = Σ_k w[k] · y[i − 1 + k] (+ bias) (+ y[i]),  y = x or GELU(x),  squares = Σ_i out[i]²     per channel
    dout'[i] = dout[i] + 2·out[i]·dsquares
    dx[j] = y'[j] · (Σ_k w[k] · dout'[j + 1 − k] (+ dout'[j]))
    dw[k] = Σ_j y[j] · dout'[j + 1 − k]        dbias = Σ_i dout'[i]

A program slides down a strip of a map with three rows of y or, for all gradients, of dout' in registers. So every map
is read once, COLUMNS pixels of a row and two neighbours, and what training would otherwise write between GELU,
convolution and response norm is never stored. The rows that come next are on their way to shared memory meanwhile:
registers would hold few of them, and few programs. Where images are few, a program slides over a band of their rows.
``sliding`` has the operators.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.launch import ceil_divide, is_launchable, is_plain, launch
from kernels.sum_rows import sum_rows
from kernels.tuning import repeated

# Columns of a strip: what an H200 ran fastest. Both divide the maps of images of 224 pixels; gradients have registers
# for 7 alone.
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
def _convolved(b_sum, rows, w, I_COLUMN: tl.constexpr, FIRST: tl.constexpr):
    """Adds to an output what rows under the kernel's rows from FIRST on give; they begin one column before it."""
    for k in tl.static_range(3 * len(rows)):
        b_sum += w[3 * FIRST + k] * rows[k // 3][I_COLUMN + k % 3]
    return b_sum


@triton.jit
def _row(
    p_source, p_outputs, b_factor, m_row, m_left, m_right, o_column, width,
    CHANNELS: tl.constexpr, GELU: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """COLUMNS + 2 values [BLOCK] of a row in float32, from the strip's left neighbour on: y, twice that with GELU, or
    the gradients dout'; 0 outside the map."""
    loaded = load_row(p_source, m_row, m_left, m_right, o_column, width, CHANNELS, -1, COLUMNS, COLUMNS, WHOLE)
    outputs, values = loaded, ()
    if GRADIENT and GELU:
        outputs = load_row(p_outputs, m_row, m_left, m_right, o_column, width, CHANNELS, -1, COLUMNS, COLUMNS, WHOLE)
    for i in tl.static_range(COLUMNS + 2):
        b_value = loaded[i].to(tl.float32)
        if GRADIENT and GELU:
            b_value += b_factor * outputs[i].to(tl.float32)
        elif GELU:
            b_value = twice_gelu(b_value, loaded[i].dtype.primitive_bitwidth == 16)
        values = values + (b_value,)
    return values


@triton.jit
def _kept(row):
    """The row itself, as computed values: where a loop that loads ahead passes on a value as it came, Triton loads
    nothing ahead, or passes on a wrong one."""
    kept = ()
    for i in tl.static_range(len(row)):
        kept = kept + (row[i].to(tl.int32, bitcast=True).to(tl.float32, bitcast=True),)
    return kept


@triton.jit
def sliding_kernel(
    source,  # [B, H, W, C], contiguous: x, or the gradient of the output if GRADIENT
    weight,  # [C, 3, 3], contiguous
    bias,  # [C], not read without HAS_BIAS
    out,  # like source: the output, or the gradient of x
    x, outputs,  # like source, read if GRADIENT, outputs with GELU only
    grad_squares,  # [B, C], contiguous, read like outputs
    sums,  # [B · bands · strips, C]: of squares, with GELU; or [.., C·9 + C]: gradients of the weight, then of the bias
    height, width, rows, bands, strips, blocks, CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr, GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per (image, band of rows, BLOCK of its strips' channels), channels fastest. A constant CHANNELS makes
    # the offsets of columns parts of instructions.
    i_part = tl.program_id(0) // blocks  # image and band
    i_image = i_part // bands
    top = i_part % bands * rows
    last_row = tl.minimum(top + rows, height)
    o_lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_lane = o_lane < strips * CHANNELS
    o_column, o_channel = o_lane // CHANNELS * COLUMNS, o_lane % CHANNELS
    m_left, m_right = m_lane & (o_column > 0), m_lane & (o_column + COLUMNS < width)
    pitch = width * CHANNELS
    w = ()
    for k in tl.static_range(9):
        o_weight = o_channel * 9 + (8 - k if GRADIENT else k)
        b_weight = tl.load(weight + o_weight, mask=m_lane, other=0).to(tl.float32)
        if RESIDUAL and k == 4:
            b_weight += 1
        w = w + (b_weight * 0.5 if GELU else b_weight,)
    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + o_channel, mask=m_lane, other=0).to(tl.float32)
    b_factor = tl.zeros([BLOCK], tl.float32)
    if GRADIENT and GELU:
        b_factor = 2 * tl.load(grad_squares + i_image * CHANNELS + o_channel, mask=m_lane, other=0)
    b_sum = tl.zeros([BLOCK], tl.float32)
    weights = (tl.zeros([BLOCK], tl.float32),) * 9
    o_first = (i_image.to(tl.int64) * height + top) * pitch + (o_column * CHANNELS + o_channel)
    p_source, p_outputs = source + o_first - pitch, outputs + o_first - pitch
    p_x, p_out = x + o_first, out + o_first
    # The rows above the one that is computed, beside it and below.
    above = _row(
        p_source, p_outputs, b_factor, m_lane & (top > 0), m_left, m_right, o_column, width,
        CHANNELS, GELU, GRADIENT, COLUMNS, WHOLE,
    )  # fmt: skip
    p_source, p_outputs = p_source + pitch, p_outputs + pitch
    here = _row(
        p_source, p_outputs, b_factor, m_lane, m_left, m_right, o_column, width,
        CHANNELS, GELU, GRADIENT, COLUMNS, WHOLE,
    )  # fmt: skip
    p_source, p_outputs = p_source + pitch, p_outputs + pitch
    begun = ()  # outputs without the row below: what is kept of the row above, unless weights' gradients read it
    for i in tl.static_range(COLUMNS):
        begun = begun + (_convolved(b_bias, (above, here), w, i, 0),)
    for i_row in tl.range(top, last_row, num_stages=STAGES):
        below = _row(
            p_source, p_outputs, b_factor, m_lane & (i_row + 1 < height), m_left, m_right, o_column, width,
            CHANNELS, GELU, GRADIENT, COLUMNS, WHOLE,
        )  # fmt: skip
        following = ()
        if GRADIENT:
            around = (above, here, below)
            values = load_row(p_x, m_lane, m_left, m_right, o_column, width, CHANNELS, 0, COLUMNS - 1, COLUMNS, WHOLE)
        for i in tl.static_range(COLUMNS):
            m_column = m_lane if WHOLE else m_lane & (o_column + i < width)
            if GRADIENT:
                b_out = _convolved(b_bias, around, w, i, 0)
                b_x = values[i].to(tl.float32)
                if GELU:
                    b_x, b_slope = twice_gelu_and_slope(b_x, x.dtype.element_ty.primitive_bitwidth == 16)
                    b_out *= b_slope
                b_sum += here[i + 1]
                added = ()
                for k in tl.static_range(9):
                    added = added + (weights[k] + b_x * around[2 - k // 3][i + 2 - k % 3],)
                weights = added
            else:
                b_out = _convolved(begun[i], (below,), w, i, 2)
                following = following + (_convolved(b_bias, (here, below), w, i, 0),)
                if GELU:
                    b_sum += b_out * b_out if WHOLE else tl.where(m_column, b_out * b_out, 0)
            tl.store(p_out + i * CHANNELS, b_out.to(out.dtype.element_ty), mask=m_column)
        if GRADIENT:
            above = _kept(here)
        else:
            begun = following
        here = below
        p_source, p_outputs = p_source + pitch, p_outputs + pitch
        p_x, p_out = p_x + pitch, p_out + pitch
    o_part = i_part.to(tl.int64) * strips + o_lane // CHANNELS
    if GRADIENT:
        p_sums = sums + o_part * (CHANNELS * 10)
        for k in tl.static_range(9):
            tl.store(p_sums + o_channel * 9 + k, weights[k] * (0.5 if GELU else 1.0), mask=m_lane)
        tl.store(p_sums + CHANNELS * 9 + o_channel, b_sum, mask=m_lane)
    elif GELU:
        tl.store(sums + o_part * CHANNELS + o_channel, b_sum, mask=m_lane)


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
def slid(
    source: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool, x: Tensor | None = None,
    outputs: Tensor | None = None, grad_squares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output for x and, with ``gelu``, sums of squares [B · parts, C]. Or, for its gradient and x, the gradient of
    x, and those of weight and bias in a row of C·9 + C; traced, in rows to be summed."""
    gradient = x is not None
    batch, channels, _, width = source.shape
    columns = WIDE if width % WIDE == 0 and not gradient else COLUMNS
    out, sizes = torch.empty_like(source), cut(source, columns)
    parts, per_channel = batch * sizes["bands"] * sizes["strips"], 10 if gradient else int(gelu)
    sums = source.new_empty((parts, channels * per_channel) if per_channel else (1, 1), dtype=torch.float32)
    maps = {"source": source, "out": out, "x": x, "outputs": outputs}
    arguments = {
        **{name: (source if each is None else each).permute(0, 2, 3, 1) for name, each in maps.items()},
        "weight": weight.contiguous(), "bias": weight if bias is None else bias.contiguous(),
        "grad_squares": weight if grad_squares is None else grad_squares.contiguous(), "sums": sums, **sizes,
        "CHANNELS": channels, "HAS_BIAS": bias is not None, "RESIDUAL": residual, "GELU": gelu, "GRADIENT": gradient,
        "COLUMNS": columns, "WHOLE": width % columns == 0, "STAGES": STAGES, "BLOCK": BLOCK,
    }  # fmt: skip
    grid = (batch * sizes["bands"] * sizes["blocks"],)
    if not is_plain(source):
        wrap_triton(sliding_kernel)[grid](**arguments, num_warps=1)
        return out, sums
    launch(sliding_kernel, grid, source.device, arguments, num_warps=1)
    return out, sum_rows(sum_rows(sums, 64, torch.float32), 1, source.dtype) if gradient else sums
