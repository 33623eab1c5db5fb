"""A tensor as a kernel sees it: one argument that holds a pointer and a stride for each axis it names."""

from typing import Any, NamedTuple

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it in every module that holds a kernel)
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


@triton.jit
def at(tensor, i_batch, i_group):
    """A tensor's part of one batch entry and group."""
    p_part = tensor.ptr + i_batch * tensor.b + i_group * tensor.g
    return View(p_part, tensor.b, tensor.g, tensor.c, tensor.h, tensor.w, tensor.k)
