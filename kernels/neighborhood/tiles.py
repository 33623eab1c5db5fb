"""How tensors are passed to the kernels of both forms."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from kernels.views import View, view

__all__ = ["LOG2_E", "along_window", "features_view", "kernel_view", "table_view"]

LOG2_E = tl.constexpr(1.4426950408889634)


def kernel_view(kernel: Tensor) -> View:
    """[B, G, Kh, Kw, H, W], Kh under ``c`` and Kw under ``k``."""
    return view(kernel, "b g c k h w")


def along_window(kernel: Tensor) -> View:
    """[B, G, Kh, Kw, H, W] with one stride along its window positions, as [B, G, H, W, K²]."""
    stride_b, stride_g, stride_kh, stride_kw, stride_h, stride_w = kernel.stride()
    stride_k = stride_kw if kernel.shape[3] > 1 else stride_kh
    return View(kernel, b=stride_b, g=stride_g, h=stride_h, w=stride_w, k=stride_k)


def features_view(features: Tensor) -> View:
    """[B, G, C, H, W]"""
    return view(features, "b g c h w")


def table_view(rpb: Tensor | None, stand_in: Tensor) -> View:
    """rpb [G, 2Kh-1, 2Kw-1], or a tensor in its place that the kernel never reads."""
    return View(stand_in) if rpb is None else view(rpb, "g h w")
