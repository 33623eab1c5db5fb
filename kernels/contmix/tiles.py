"""What ContMix's kernels share: pixels of a tile, products with projected keys, relative biases.

Projected keys come in float32, for rounding them between the two exchanged linear steps would cost more than the
definition's own rounding; a product of 16-bit numbers takes each key as the sum of two.
"""

import triton
import triton.language as tl

from kernels import views
from kernels.windows_triton import load_pixels, offsets, store_pixels

# What every stride of a map but its channels' is a multiple of: 16 bytes of a 16-bit type.
VECTOR: tl.constexpr = tl.constexpr(8)


@triton.jit
def at_head(view, i_batch, i_head, CHANNELS: tl.constexpr):
    """A map's part of one batch entry and head, of strides that are ``aligned``."""
    return views.at(views.aligned(view, 16 if CHANNELS % 16 == 0 else VECTOR), i_batch, i_head)


@triton.jit
def load_outputs(view, i_batch, i_head, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    """[P, C] of a tile's outputs."""
    part = at_head(view, i_batch, i_head, CHANNELS)
    return load_pixels(part, offsets(part, pixels, OFFSET), pixels.mask, CHANNELS, BLOCK)


@triton.jit
def store_outputs(view, i_batch, i_head, pixels, b_outputs, CHANNELS: tl.constexpr, OFFSET: tl.constexpr):
    """The inverse of ``load_outputs``."""
    part = at_head(view, i_batch, i_head, CHANNELS)
    store_pixels(part, offsets(part, pixels, OFFSET), pixels.mask, b_outputs, CHANNELS)


@triton.jit
def key_scale(dtype: tl.constexpr):
    """What keys are divided by: float16 ends at 65,504, which projected keys may pass where logits do not."""
    return 64.0 if dtype == tl.float16 else 1.0


@triton.jit
def halves(b_keys, dtype: tl.constexpr):
    """Projected keys as a tuple of blocks whose sum they are, but for their scale: two of a 16-bit type, or one of a
    wider type."""
    b_keys = b_keys * (1.0 / key_scale(dtype))
    if dtype.primitive_bitwidth == 16:
        # Cut off where the 16-bit type ends, not rounded: conversions then go two by two.
        MANTISSA: tl.constexpr = 0xFFFFE000 if dtype == tl.float16 else 0xFFFF0000
        b_high = (b_keys.to(tl.uint32, bitcast=True) & MANTISSA).to(b_keys.dtype, bitcast=True)
        return b_high.to(dtype), (b_keys - b_high).to(dtype)
    else:
        return (b_keys.to(dtype),)


@triton.jit
def cut_off(b, dtype: tl.constexpr):
    """float32 in a 16-bit type, cut off where that ends: single numbers of bfloat16 are slow to round."""
    if dtype == tl.bfloat16:
        return (b.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return (b.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def load_keys(projected, o_position, m_position, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """``halves`` of a head's projected keys, [S, Dq]."""
    stride = views.multiple(projected.k, 16 if CHANNELS % 16 == 0 else VECTOR)
    return halves(load_pixels(projected, o_position * stride, m_position, CHANNELS, BLOCK), dtype)


@triton.jit
def load_biases(bias, rpb, o_base, o_position, m_position, KERNEL: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """bias + rpb [..., S] of outputs whose windows begin ``o_base`` [..., 1] entries into rpb; -inf where there is no
    window position."""
    o_relative = o_position // KERNEL * rpb.h + o_position % KERNEL * rpb.w
    b_bias = tl.load(bias.ptr + o_position * bias.k, mask=m_position, other=0).to(ACCUMULATOR)
    b_rpb = tl.load(rpb.ptr + o_base + o_relative, mask=m_position, other=0).to(ACCUMULATOR)
    return tl.where(m_position, b_rpb + b_bias, float("-inf"))
