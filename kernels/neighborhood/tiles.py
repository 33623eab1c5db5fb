"""What the kernels of both forms share."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from kernels.views import View

__all__ = ["LOG2_E", "Sizes", "along_window"]

LOG2_E = tl.constexpr(1.4426950408889634)


class Sizes(NamedTuple):
    """Of the features [B, G, C, H, W]."""

    batch: int
    groups: int
    channels: int
    height: int
    width: int


def along_window(kernel: Tensor) -> View:
    """[B, G, Kh, Kw, H, W] with one stride along its window positions, as [B, G, H, W, K²]."""
    stride_b, stride_g, stride_kh, stride_kw, stride_h, stride_w = kernel.stride()
    stride_k = stride_kw if kernel.shape[3] > 1 else stride_kh
    return View(kernel, b=stride_b, g=stride_g, h=stride_h, w=stride_w, k=stride_k)
