# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""What the kernels for windows of their own share: the logits of a block, and how tensors are passed to them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.views import View, view
from kernels.windows_triton import relative_position

__all__ = ["LOG2_E", "features_view", "kernel_view", "load_logits", "table_view"]

LOG2_E = tl.constexpr(1.4426950408889634)


def kernel_view(kernel: Tensor) -> View:
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


@triton.jit
def load_logits(
    logits, rpb, o_kernel_h, o_kernel_w, o_row, o_column, o_input_h, o_input_w, m_step,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_RPB: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """logits + rpb of a block [S, P], −inf where ``m_step`` is off."""
    o_pixel = o_row.to(OFFSET) * logits.h + o_column.to(OFFSET) * logits.w
    o_position = (o_kernel_h * KERNEL_W + o_kernel_w).to(OFFSET) * logits.k
    b_logits = tl.load(logits.ptr + o_pixel + o_position, mask=m_step, other=float("-inf")).to(ACCUMULATOR)
    if HAS_RPB:
        o_relative_h = relative_position(o_row, o_input_h, KERNEL_H, DILATION_H)
        o_relative_w = relative_position(o_column, o_input_w, KERNEL_W, DILATION_W)
        p_rpb = rpb.ptr + o_relative_h * rpb.h + o_relative_w * rpb.w
        b_logits += tl.load(p_rpb, mask=m_step, other=0).to(ACCUMULATOR)
    return b_logits
