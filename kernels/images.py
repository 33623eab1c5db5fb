"""The convolution by which images enter a network: three channels are too few for a GPU's matrix units by themselves.

    out[b,n,i] = Σ_{c,k} weight[n,c,k] · x[b, c, i·stride − padding + k] + bias[n], then ReLU if asked for

In channels-last memory the K·C taps of one row of a window lie side by side. So the sum is K small products, of rows
[pixels, K·C] with weights [K·C, outputs], and nothing is padded in memory. It is a ``triton_op``: Inductor launches the
kernel itself.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from torch.nn.grad import conv2d_input, conv2d_weight

from kernels.dtypes import upcast
from kernels.launch import ceil_divide, is_launchable, is_plain, launch, next_power_of_2
from kernels.products import dot
from kernels.registration import traced_operator
from kernels.tuning import repeated

ROWS, COLUMNS = 8, 16  # of a program's outputs, which divide the maps of images of 224 pixels
OUTPUTS = 64  # most channels of a program's outputs
LONGEST = 64  # rows of taps are shorter


@triton.jit
def image_kernel(
    x,  # [B, height, width, CHANNELS]
    weight,  # [outputs, KERNEL, KERNEL, CHANNELS]
    bias,  # [outputs], not read without HAS_BIAS
    out,  # [B, out_height, out_width, outputs]
    height, width, out_height, out_width, outputs,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    FIRST: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # One program per (image, block of its rows and columns, block of outputs), outputs fastest. All are contiguous.
    # TAPS is a power of two. A row of taps begins at FIRST, 0 or 1: at 1 where that lets threads load pairs of numbers,
    # which begin at even places.
    blocks, across, down = tl.cdiv(outputs, OUTPUTS), tl.cdiv(out_width, COLUMNS), tl.cdiv(out_height, ROWS)
    o_output = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    m_output = o_output < outputs
    i_tile = tl.program_id(0) // blocks
    i_image = (i_tile // (across * down)).to(tl.int64)
    o_pixel = tl.arange(0, ROWS * COLUMNS)
    o_row = i_tile // across % down * ROWS + o_pixel // COLUMNS
    o_column = i_tile % across * COLUMNS + o_pixel % COLUMNS
    m_pixel = (o_row < out_height) & (o_column < out_width)

    LAST: tl.constexpr = FIRST + KERNEL * CHANNELS
    pitch = width * CHANNELS
    o_slot = tl.arange(0, TAPS)
    o_entry = (o_column * (STRIDE * CHANNELS) - (PADDING * CHANNELS + FIRST))[:, None] + o_slot[None, :]
    m_entry = (o_entry >= 0) & (o_entry < pitch) & (o_slot < LAST)[None, :]
    m_weight = ((o_slot >= FIRST) & (o_slot < LAST))[:, None] & m_output[None, :]
    p_weight = weight + ((o_slot - FIRST)[:, None] + o_output[None, :] * (KERNEL * KERNEL * CHANNELS))
    weights = ()
    for k in tl.static_range(KERNEL):
        weights = weights + (tl.load(p_weight + k * (KERNEL * CHANNELS), mask=m_weight, other=0),)
    p_x = x + i_image * height * pitch
    b_out = tl.zeros([ROWS * COLUMNS, OUTPUTS], tl.float32)
    if HAS_BIAS:
        b_out += tl.load(bias + o_output, mask=m_output, other=0).to(tl.float32)[None, :]
    for k in tl.static_range(KERNEL):
        o_line = o_row * STRIDE + (k - PADDING)
        m_line = m_pixel & (o_line >= 0) & (o_line < height)
        b_x = tl.load(p_x + ((o_line * pitch)[:, None] + o_entry), mask=m_line[:, None] & m_entry, other=0)
        if FIRST > 0:  # what stands beside the window may be NaN
            b_x = tl.where((o_slot >= FIRST)[None, :], b_x, 0)
        b_out = dot(b_x, weights[k], b_out, UPCAST)
    if RELU:
        b_out = tl.maximum(b_out, 0, propagate_nan=tl.PropagateNan.ALL)
    o_out = (o_row * out_width + o_column)[:, None] * outputs + o_output[None, :]
    p_out = out + i_image * out_height * out_width * outputs + o_out
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_pixel[:, None] & m_output[None, :])


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the operator takes x [B, C, H, W] and weight [N, C, K, K]: channels-last images, short rows of taps."""
    (images, channels, height, width), (outputs, inputs, kernel_size, _) = x.shape, weight.shape
    if channels != inputs or kernel_size * channels >= LONGEST or images == 0 or min(height, width) < kernel_size:
        return False
    small = height * width * max(channels, outputs) < 2**31  # offsets inside an image
    of_floats = x.is_floating_point() and x.itemsize <= 4 and x.device == weight.device
    return small and of_floats and is_launchable(x) and x.permute(0, 2, 3, 1).is_contiguous()


@repeated
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, relu: bool) -> Tensor:
    (batch, channels, height, width), (outputs, _, kernel_size, _) = x.shape, weight.shape
    out_height, out_width = ((size + 2 * padding - kernel_size) // stride + 1 for size in (height, width))
    out = x.new_empty((batch, out_height, out_width, outputs))
    first = padding * channels % 2
    block = min(OUTPUTS, max(16, next_power_of_2(outputs)))
    arguments = {
        "x": x.permute(0, 2, 3, 1), "weight": weight.permute(0, 2, 3, 1).contiguous(),
        "bias": weight if bias is None else bias.contiguous(), "out": out,
        "height": height, "width": width, "out_height": out_height, "out_width": out_width, "outputs": outputs,
        "CHANNELS": channels, "KERNEL": kernel_size, "STRIDE": stride, "PADDING": padding, "FIRST": first,
        "TAPS": max(16, next_power_of_2(first + kernel_size * channels)), "HAS_BIAS": bias is not None, "RELU": relu,
        "ROWS": ROWS, "COLUMNS": COLUMNS, "OUTPUTS": block, "UPCAST": upcast(x.dtype),
    }  # fmt: skip
    grid = (batch * ceil_divide(out_height, ROWS) * ceil_divide(out_width, COLUMNS) * ceil_divide(outputs, block),)
    if is_plain(x):
        launch(image_kernel, grid, x.device, arguments, num_warps=4)
    else:
        wrap_triton(image_kernel)[grid](**arguments, num_warps=4)
    return out.permute(0, 3, 1, 2)


def _flops(x: Any, weight: Any, _bias: Any, stride: int, padding: int, _relu: bool) -> int:
    """Two per multiply-add of the convolution."""
    sizes = [(size + 2 * padding - weight[2]) // stride + 1 for size in x[2:]]
    return 2 * x[0] * weight[0] * weight[1] * weight[2] ** 2 * sizes[0] * sizes[1]


@traced_operator("image_conv2d", flops=_flops)
def image_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, relu: bool) -> Tensor:
    """The formula above, for images and weights that ``fits``: x [B, C, H, W], weight [N, C, K, K], bias [N] or None ->
    [B, N, H', W'] in channels-last memory, H' = ⌊(H + 2·padding − K) / stride⌋ + 1 and W' likewise."""
    return _convolve(x, weight, bias, stride, padding, relu)


def _entering(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """The gradient of what ReLU takes; whether that was positive is computed again."""
    return torch.where(image_conv2d(x, weight, bias, *options) > 0, grad, 0) if options[2] else grad


image_conv2d.differentiable(
    lambda grad, x, weight, bias, *options: conv2d_input(
        x.shape, weight, _entering(grad, x, weight, bias, *options), *options[:2]
    ),
    lambda grad, x, weight, bias, *options: conv2d_weight(
        x, weight.shape, _entering(grad, x, weight, bias, *options), *options[:2]
    ),
    lambda *arguments: _entering(*arguments).sum((0, 2, 3)),
)
