"""The end of a residual block, in one pass over channels-last maps: a 1×1 convolution with what stands around it.

    out[b,n,i] = ReLU(Σ_k weight[n,k] · ReLU(scale[k]·x[b,k,i] + shift[k]) + bias[n] + r[b,n,i])
    r[b,n,i]   = skipped[b,n,i], or Σ_l second[n,l] · skipped[b,l,stride·i]

A matrix product reads the residual, or makes it by a second product, where PyTorch writes the product, and reads it
again beside the residual. It is for inference, and a ``triton_op``: Inductor launches the kernel itself.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.backend import is_hopper
from kernels.dtypes import upcast
from kernels.launch import ceil_divide, is_launchable, is_plain, launch
from kernels.products import dot
from kernels.registration import traced_operator
from kernels.tuning import repeated


class Blocks(NamedTuple):
    """A program's pixels and outputs, the channels of one step of its products, and how it is launched."""

    pixels: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int

    def programs(self, pixels: int, outputs: int) -> int:
        return ceil_divide(pixels, self.pixels) * ceil_divide(outputs, self.outputs)


LARGE = Blocks(128, 256, 64, 8, 2)  # less would read x and weights more often than L2 can deliver
# A program of few channels mostly waits for memory. Of these blocks two share the registers of a Hopper's processor, so
# that one computes while the other waits.
FEW_CHANNELS, OF_FEW_CHANNELS = 128, Blocks(128, 128, 64, 8, 2)
# Where large ones keep not even half of a GPU's processors busy, as for a single image: how long a step takes decides.
SMALL = Blocks(32, 64, 64, 4, 4)
LEAST_PROGRAMS = 66  # half of an H200's processors


@triton.jit
def _product(
    b_out,  # [P, N]
    p_pixel, m_pixel,  # [P]
    weight,  # [outputs, channels]
    o_output,  # [N], each one that there is: a mask would cost registers
    scale, shift,  # [channels], not read without NORM
    channels,
    NORM: tl.constexpr, CHANNELS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """b_out + Σ_k weight[n, k] · f(pixel[k]), where f is ReLU(scale·x + shift) with NORM."""
    for first in range(0, channels, CHANNELS):
        o_channel = first + tl.arange(0, CHANNELS)
        m_channel = o_channel < channels
        b_x = tl.load(p_pixel[:, None] + o_channel[None, :], mask=m_pixel[:, None] & m_channel[None, :], other=0)
        p_weight = weight + o_output[None, :] * channels + o_channel[:, None]
        b_weight = tl.load(p_weight, mask=m_channel[:, None], other=0)  # [K, N]
        if NORM:
            b_scale = tl.load(scale + o_channel, mask=m_channel, other=0).to(tl.float32)[None, :]
            b_shift = tl.load(shift + o_channel, mask=m_channel, other=0).to(tl.float32)[None, :]
            b_x = tl.maximum(b_x * b_scale + b_shift, 0, propagate_nan=tl.PropagateNan.ALL).to(b_weight.dtype)
        b_out = dot(b_x, b_weight, b_out, UPCAST)
    return b_out


@triton.jit
def residual_kernel(
    x,  # [B, height, width, channels]
    scale, shift,  # [channels]
    weight,  # [outputs, channels]
    bias,  # [outputs]
    skipped,  # [B, skipped_height, skipped_width, skipped_channels]
    second,  # [outputs, skipped_channels], not read without SECOND
    out,  # [B, height, width, outputs]
    pixels, height, width, channels, outputs, skipped_height, skipped_width, skipped_channels, stride,
    SECOND: tl.constexpr, WHOLE: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # One program per (block of pixels of all images, block of outputs), outputs fastest. All tensors are contiguous.
    blocks = tl.cdiv(outputs, OUTPUTS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * PIXELS
    o_tile = tl.arange(0, PIXELS)
    m_pixel = o_tile < (pixels - first).to(tl.int32)
    o_output = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    o_out = o_tile[:, None] * outputs + o_output[None, :]  # from the program's first pixel on
    m_out = m_pixel[:, None]
    if not WHOLE:
        m_out &= (o_output < outputs)[None, :]
        o_output = tl.minimum(o_output, outputs - 1)
    b_out = tl.zeros([PIXELS, OUTPUTS], tl.float32)
    if SECOND:
        o_pixel = first + o_tile
        o_row, o_column = o_pixel // width, o_pixel % width * stride
        o_row = o_row // height * skipped_height + o_row % height * stride
        p_skipped = skipped + (o_row * skipped_width + o_column) * skipped_channels
        b_out = _product(
            b_out, p_skipped, m_pixel, second, o_output, scale, shift, skipped_channels, False, CHANNELS, UPCAST
        )  # fmt: skip
    p_x = x + first * channels + o_tile * channels
    b_out = _product(b_out, p_x, m_pixel, weight, o_output, scale, shift, channels, True, CHANNELS, UPCAST)
    b_out += tl.load(bias + o_output).to(tl.float32)[None, :]
    if not SECOND:
        b_out += tl.load(skipped + first * outputs + o_out, mask=m_out, other=0).to(tl.float32)
    b_out = tl.maximum(b_out, 0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + first * outputs + o_out, b_out.to(out.dtype.element_ty), mask=m_out)


def fits(*maps: Tensor) -> bool:
    """Whether the operator takes maps [B, C, H, W]: plain channels-last memory."""
    return is_launchable(*maps) and all(
        x.dim() == 4 and x.numel() > 0 and x.permute(0, 2, 3, 1).is_contiguous() for x in maps
    )


def blocks_of(pixels: int, outputs: int, channels: int, itemsize: int) -> Blocks:
    """The blocks for a problem of so many channels, those of the second product among them; not the small ones where
    PyTorch traces a number of pixels that it does not know."""
    if isinstance(pixels, int) and LARGE.programs(pixels, outputs) < LEAST_PROGRAMS:
        return SMALL
    if itemsize > 2 or not is_hopper():
        return LARGE
    return OF_FEW_CHANNELS if channels <= FEW_CHANNELS else LARGE._replace(num_stages=3)


@repeated
def _convolve(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, skipped: Tensor, second: Tensor | None,
    stride: int,
) -> Tensor:  # fmt: skip
    (batch, channels, height, width), outputs = x.shape, weight.shape[0]
    out = x.new_empty((batch, height, width, outputs))
    pixels = batch * height * width
    blocks = blocks_of(pixels, outputs, channels + (0 if second is None else second.shape[1]), x.element_size())
    arguments = {
        "x": x.permute(0, 2, 3, 1), "scale": scale, "shift": shift, "weight": weight.contiguous(),
        "bias": bias,
        "skipped": skipped.permute(0, 2, 3, 1), "second": weight if second is None else second.contiguous(), "out": out,
        "pixels": pixels, "height": height, "width": width, "channels": channels, "outputs": outputs,
        "skipped_height": skipped.shape[2], "skipped_width": skipped.shape[3], "skipped_channels": skipped.shape[1],
        "stride": stride, "SECOND": second is not None, "WHOLE": outputs % blocks.outputs == 0,
        "PIXELS": blocks.pixels, "OUTPUTS": blocks.outputs, "CHANNELS": blocks.channels, "UPCAST": upcast(x.dtype),
    }  # fmt: skip
    grid = (blocks.programs(pixels, outputs),)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    if is_plain(x):
        launch(residual_kernel, grid, x.device, arguments, **options)
    else:
        wrap_triton(residual_kernel)[grid](**arguments, **options)
    return out.permute(0, 3, 1, 2)


def _flops(x: Any, _scale: Any, _shift: Any, weight: Any, _bias: Any, _skipped: Any, *second: Any) -> int:
    """Two per multiply-add of the products."""
    channels = weight[1] + (second[0][1] if second and second[0] is not None else 0)
    return 2 * x[0] * math.prod(x[2:]) * weight[0] * channels


@traced_operator("residual_pointwise_conv2d", flops=_flops)
def residual_pointwise_conv2d(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, skipped: Tensor,
    second: Tensor | None = None, stride: int = 1,
) -> Tensor:  # fmt: skip
    """The formula above, for maps that ``fits``.

    x [B, K, H, W], scale and shift [K], weight [N, K], bias [N] and skipped [B, N, H, W], or second [N, L] and skipped
    [B, L, H', W'] with H = ⌈H' / stride⌉ and W likewise -> [B, N, H, W] in channels-last memory.
    """
    return _convolve(x, scale, shift, weight, bias, skipped, second, stride)
