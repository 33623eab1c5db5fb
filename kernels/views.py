"""A tensor as a kernel sees it: one argument that holds a pointer and a stride for each axis it names."""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class View(NamedTuple):
    """Axes: batch entry, group, channel, row, column, window position; 0 where a tensor has no such axis."""

    ptr: Any
    b: int = 0
    g: int = 0
    c: int = 0
    h: int = 0
    w: int = 0
    k: int = 0


def view(tensor: Tensor, axes: str) -> View:
    """``view(query, "b g c h w")``: the tensor's strides under the names of its axes, one letter each."""
    return View(tensor, **dict(zip(axes.split(), tensor.stride(), strict=True)))


def alignment(channels: int, *maps: View) -> int:
    """The largest number up to 16 that divides ``channels`` and all strides of maps but their channels', which is 1."""
    if any(tensor.c != 1 for tensor in maps):
        return 1
    return math.gcd(16, channels, *(stride for tensor in maps for stride in (tensor.b, tensor.g, tensor.h, tensor.w)))


@triton.jit
def multiple(number, ALIGNED: tl.constexpr):
    """The same multiple of ALIGNED: divided and multiplied again, which tells Triton how accesses align. Of arguments
    that 16 divides it knows that."""
    if ALIGNED < 16:
        number = number // ALIGNED * ALIGNED
    return number


@triton.jit
def aligned(tensor, ALIGNED: tl.constexpr):
    """A view whose strides, but its channels', are ``multiple``."""
    return View(
        tensor.ptr,
        multiple(tensor.b, ALIGNED),
        multiple(tensor.g, ALIGNED),
        tensor.c,
        multiple(tensor.h, ALIGNED),
        multiple(tensor.w, ALIGNED),
        tensor.k,
    )


@triton.jit
def at(tensor, i_batch, i_group):
    """A tensor's part of one batch entry and group."""
    p_part = tensor.ptr + i_batch * tensor.b + i_group * tensor.g
    return View(p_part, tensor.b, tensor.g, tensor.c, tensor.h, tensor.w, tensor.k)
