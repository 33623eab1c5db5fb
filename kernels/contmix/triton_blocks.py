# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""What ContMix's kernels do with a tile of outputs: its windows, its logits, values mixed by it, and gradients.

Everything comes in the two formulations of ``triton_tiles``. In a banded step, one row of the windows, the outputs of a
tile row see a *span* of J adjacent inputs, each K of them, one position further than its left neighbour unless clamped:

    weights by window position [P, S]               by input of the span [P, J]: the band
        a b c . . .                                     a b c . . .
        d e f . . .      gathered along the row →       . d e f . .
        g h i . . .                                     . . g h i .

So window positions are what logits and their gradients are products over, and the span what values are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.windows_triton import window_start

__all__ = [
    "TILE_WIDTH",
    "banded",
    "count_tiles",
    "dot",
    "grad_logits",
    "load_pixels",
    "load_values",
    "logits_of_tile",
    "mix",
    "outputs_of_tile",
    "spans_of_tile",
    "step_positions",
    "window_starts",
]

# Adjacent outputs of a tile row, the least that fills a matrix product's rows; constexpr, for kernels to see.
TILE_WIDTH: tl.constexpr = tl.constexpr(16)


@triton.jit
def dot(a, b, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b, summed in the accumulator type; float32 exactly, not in tf32."""
    if UPCAST:
        a, b = a.to(ACCUMULATOR), b.to(ACCUMULATOR)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACCUMULATOR)


@triton.jit
def _outputs_of_start(o_start, length, KERNEL: tl.constexpr):
    """(first, number) of the outputs along an axis whose clamped window begins at ``o_start``."""
    first = tl.where(o_start == 0, 0, o_start + KERNEL // 2)
    last = tl.where(o_start == length - KERNEL, length - 1, o_start + KERNEL // 2)
    return first, last - first + 1


@triton.jit
def count_tiles(height, width, SHARED: tl.constexpr, KERNEL: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """``triton_tiles.tiles_and_windows`` inside a kernel."""
    tiles, windows = tl.cdiv(height, BLOCK_PIXELS // TILE_WIDTH) * tl.cdiv(width, TILE_WIDTH), 1
    if SHARED:
        most_h = tl.where(height == KERNEL, KERNEL, KERNEL // 2 + 1)
        most_w = tl.where(width == KERNEL, KERNEL, KERNEL // 2 + 1)
        tiles, windows = tl.cdiv(most_h * most_w, BLOCK_PIXELS), (height - KERNEL + 1) * (width - KERNEL + 1)
    return tiles, windows


@triton.jit
def outputs_of_tile(
    i_tile, i_window, height, width, SHARED: tl.constexpr, KERNEL: tl.constexpr, BLOCK_PIXELS: tl.constexpr
):
    """Row, column [P] of a tile's outputs, those of one window or tile rows of the map, and which there are; the others
    repeat one that is, so that their softmax is finite."""
    o_output = tl.arange(0, BLOCK_PIXELS)
    if SHARED:
        o_output += i_tile * BLOCK_PIXELS
        windows_w = width - KERNEL + 1
        first_h, outputs_h = _outputs_of_start(i_window // windows_w, height, KERNEL)
        first_w, outputs_w = _outputs_of_start(i_window % windows_w, width, KERNEL)
        o_inside = tl.minimum(o_output, outputs_h * outputs_w - 1)
        o_row, o_column = first_h + o_inside // outputs_w, first_w + o_inside % outputs_w
        m_output = o_output < outputs_h * outputs_w
    else:
        tiles_w = tl.cdiv(width, TILE_WIDTH)
        o_row = i_tile // tiles_w * (BLOCK_PIXELS // TILE_WIDTH) + o_output // TILE_WIDTH
        o_column = i_tile % tiles_w * TILE_WIDTH + o_output % TILE_WIDTH
        m_output = (o_row < height) & (o_column < width)
        o_row, o_column = tl.minimum(o_row, height - 1), tl.minimum(o_column, width - 1)
    return o_row, o_column, m_output


@triton.jit
def window_starts(o_row, o_column, i_window, height, width, SHARED: tl.constexpr, KERNEL: tl.constexpr):
    """Where the windows of a tile's outputs begin: two numbers where they share one, two blocks [P] otherwise."""
    if SHARED:
        windows_w = width - KERNEL + 1
        o_start_h, o_start_w = i_window // windows_w, i_window % windows_w
    else:
        o_start_h, o_start_w = window_start(o_row, height, KERNEL, 1), window_start(o_column, width, KERNEL, 1)
    return o_start_h, o_start_w


@triton.jit
def spans_of_tile(o_start_h, o_start_w, SHARED: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """Where the inputs of a tile begin, of which a step reads those at its kernel row: (row, column), two numbers where
    windows are shared; otherwise rows [R], one of each tile row, and a column."""
    if not SHARED:
        o_start_h = tl.max(tl.reshape(o_start_h, [BLOCK_PIXELS // TILE_WIDTH, TILE_WIDTH]), axis=1)
        o_start_w = tl.min(o_start_w, axis=0)
    return o_start_h, o_start_w


@triton.jit
def load_pixels(pointer, o_channel, m_channel, o_row, o_column, m_pixel, stride_c, stride_h, stride_w, OFFSET):
    """[C, P] of a map [C, H, W]; in this order lanes run along pixels unless channels are adjacent in memory."""
    o_pixel = o_row.to(OFFSET) * stride_h + o_column.to(OFFSET) * stride_w
    return tl.load(
        pointer + (o_channel.to(OFFSET) * stride_c)[:, None] + o_pixel[None, :],
        mask=m_channel[:, None] & m_pixel[None, :],
        other=0,
    )


@triton.jit
def step_positions(i_step, SHARED: tl.constexpr, KERNEL: tl.constexpr, BLOCK_STEPS: tl.constexpr):
    """Kernel rows, kernel columns [S] of the window positions of a step, and which there are: S positions in order
    where windows are shared, one kernel row otherwise."""
    o_step = tl.arange(0, BLOCK_STEPS)
    if SHARED:
        o_step += i_step * BLOCK_STEPS
        o_kernel_h, o_kernel_w, m_step = o_step // KERNEL, o_step % KERNEL, o_step < KERNEL * KERNEL
    else:
        o_kernel_h, o_kernel_w, m_step = i_step + tl.zeros_like(o_step), o_step, o_step < KERNEL
    return o_kernel_h, o_kernel_w, m_step


@triton.jit
def logits_of_tile(
    b_query, p_projected, bias_ptr, p_rpb, o_query, m_query, o_row, o_column, o_start_h, o_start_w,
    o_kernel_h, o_kernel_w, m_step, projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
    KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits [P, S] of a tile's outputs at a step's window positions, and projected [Dq, S]. b_query [P, Dq]."""
    o_position = o_kernel_h * KERNEL + o_kernel_w
    b_projected = tl.load(
        p_projected + (o_query * projected_stride_c)[:, None] + (o_position * projected_stride_k)[None, :],
        mask=m_query[:, None] & m_step[None, :],
        other=0,
    )
    b_bias = tl.load(bias_ptr + o_position * bias_stride_k, mask=m_step, other=0).to(ACCUMULATOR)
    o_relative_h = (o_start_h - o_row + KERNEL - 1)[:, None] + o_kernel_h[None, :]
    o_relative_w = (o_start_w - o_column + KERNEL - 1)[:, None] + o_kernel_w[None, :]
    p_rpb += o_relative_h * rpb_stride_h + o_relative_w * rpb_stride_w
    b_rpb = tl.load(p_rpb, mask=m_step[None, :], other=0).to(ACCUMULATOR)
    return dot(b_query, b_projected, ACCUMULATOR, UPCAST) + b_bias[None, :] + b_rpb, b_projected


@triton.jit
def load_values(
    p_value, o_channel, m_channel, o_span_h, o_span_w, o_kernel_h, o_kernel_w, m_step, i_step, width,
    stride_c, stride_h, stride_w, SHARED: tl.constexpr, OFFSET: tl.constexpr, BLOCK_SPAN: tl.constexpr,
):  # fmt: skip
    """The values that a step mixes: of a shared window [C, S], of the tile rows' spans [R, C, J]."""
    p_channel = p_value + o_channel.to(OFFSET) * stride_c
    if SHARED:
        o_value = (o_span_h + o_kernel_h).to(OFFSET) * stride_h + (o_span_w + o_kernel_w).to(OFFSET) * stride_w
        b_value = tl.load(p_channel[:, None] + o_value[None, :], mask=m_channel[:, None] & m_step[None, :], other=0)
    else:
        o_column = o_span_w + tl.arange(0, BLOCK_SPAN)
        o_value = ((o_span_h + i_step).to(OFFSET) * stride_h)[:, None] + (o_column.to(OFFSET) * stride_w)[None, :]
        m_value = m_channel[None, :, None] & (o_column < width)[None, None, :]
        b_value = tl.load(p_channel[None, :, None] + o_value[:, None, :], mask=m_value, other=0)
    return b_value


@triton.jit
def banded(b_weight, o_shift, KERNEL: tl.constexpr, BLOCK_SPAN: tl.constexpr):
    """Weights [P, S] by kernel column as weights [P, J] by input of the span, 0 outside a window. o_shift [P]: where in
    the span each window begins."""
    o_kernel_w = tl.arange(0, BLOCK_SPAN)[None, :] - o_shift[:, None]
    m_window = (o_kernel_w >= 0) & (o_kernel_w < KERNEL)
    return tl.where(m_window, tl.gather(b_weight, tl.where(m_window, o_kernel_w, 0), 1), 0.0)


@triton.jit
def mix(
    b_weight, b_value, o_shift,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
):  # fmt: skip
    """Σ over a step's window positions of weight · value, [P, C]."""
    b_weight = b_weight.to(b_value.dtype)
    if SHARED:
        b_sum = dot(b_weight, tl.trans(b_value), ACCUMULATOR, UPCAST)
    else:
        b_band = banded(b_weight, o_shift, KERNEL, BLOCK_SPAN)
        b_band = tl.reshape(b_band, [BLOCK_PIXELS // TILE_WIDTH, TILE_WIDTH, BLOCK_SPAN])
        b_sum = dot(b_band, tl.permute(b_value, [0, 2, 1]), ACCUMULATOR, UPCAST)
        b_sum = tl.reshape(b_sum, [BLOCK_PIXELS, BLOCK_CHANNELS])
    return b_sum


@triton.jit
def _correlate(
    b_grad, b_value, o_shift, o_kernel_w,
    SHARED: tl.constexpr, ACCUMULATOR: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
):  # fmt: skip
    """Σ_c grad · value at a step's window positions, [P, S]. b_grad [C, P]."""
    if SHARED:
        b_product = dot(tl.trans(b_grad), b_value, ACCUMULATOR, UPCAST)
    else:
        b_grad = tl.reshape(tl.trans(b_grad), [BLOCK_PIXELS // TILE_WIDTH, TILE_WIDTH, BLOCK_CHANNELS])
        b_product = tl.reshape(dot(b_grad, b_value, ACCUMULATOR, UPCAST), [BLOCK_PIXELS, BLOCK_SPAN])
        o_input = tl.minimum(o_shift[:, None] + o_kernel_w[None, :], BLOCK_SPAN - 1)
        b_product = tl.gather(b_product, o_input, 1)
    return b_product


@triton.jit
def grad_logits(
    b_query, b_grad, b_statistics, b_delta, p_projected, bias_ptr, p_rpb, p_value,
    o_query, m_query, o_channel, m_channel, i_step, width,
    o_row, o_column, o_start_h, o_start_w, o_span_h, o_span_w,
    projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
    value_stride_c, value_stride_h, value_stride_w,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """p · (dp − δ) [P, S] of step ``i_step``, dp = Σ_c grad · value; and projected [Dq, S].

    b_query [P, Dq], b_grad [C, P], b_statistics [P] = log Σ_k exp, b_delta [P] = Σ_c grad · out.
    """
    o_kernel_h, o_kernel_w, m_step = step_positions(i_step, SHARED, KERNEL, BLOCK_STEPS)
    b_logits, b_projected = logits_of_tile(
        b_query, p_projected, bias_ptr, p_rpb, o_query, m_query, o_row, o_column, o_start_h, o_start_w,
        o_kernel_h, o_kernel_w, m_step, projected_stride_c, projected_stride_k, bias_stride_k,
        rpb_stride_h, rpb_stride_w, KERNEL, ACCUMULATOR, UPCAST,
    )  # fmt: skip
    b_weight = tl.where(m_step[None, :], tl.exp(b_logits - b_statistics[:, None]), 0.0)
    b_value = load_values(
        p_value, o_channel, m_channel, o_span_h, o_span_w, o_kernel_h, o_kernel_w, m_step, i_step, width,
        value_stride_c, value_stride_h, value_stride_w, SHARED, OFFSET, BLOCK_SPAN,
    )  # fmt: skip
    b_product = _correlate(
        b_grad, b_value, o_start_w - o_span_w, o_kernel_w,
        SHARED, ACCUMULATOR, UPCAST, BLOCK_PIXELS, BLOCK_CHANNELS, BLOCK_STEPS, BLOCK_SPAN,
    )  # fmt: skip
    return b_weight * (b_product - b_delta[:, None]), b_projected
