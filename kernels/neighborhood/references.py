"""What both forms' launchers are checked against, in plain PyTorch, and what a softmax leaves for its backward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.aggregation import eager as algebra
from kernels.dtypes import at_least_float32
from kernels.neighborhood import eager
from kernels.windows import Window

__all__ = ["Softmax", "reference_correlate", "reference_mix", "reference_softmax_mix", "reference_transpose"]


class Softmax(NamedTuple):
    """What the backward pass of a softmax reads besides gradient and value."""

    logits: Tensor  # [B, G, Kh, Kw, H, W]
    rpb: Tensor | None  # [G, 2Kh-1, 2Kw-1]
    out: Tensor  # [B, G, C, H, W]
    statistics: Tensor  # [B, G, H, W]: log Σ_k exp


def reference_softmax_mix(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    logits, value, *table = at_least_float32(logits, value, *([] if rpb is None else [rpb]))
    return eager.softmax_aggregate(logits, value, table[0] if table else None, window)


def reference_mix(weight: Tensor, value: Tensor, window: Window) -> Tensor:
    weight, value = at_least_float32(weight, value)
    return algebra.aggregate(weight, value, window)


def _reference_gradients(grad: Tensor, value: Tensor, window: Window, softmax: Softmax) -> tuple[Tensor, Tensor]:
    grad, value, logits, out = at_least_float32(grad, value, softmax.logits, softmax.out)
    rpb = None if softmax.rpb is None else at_least_float32(softmax.rpb)[0]
    return eager.softmax_aggregate_backward(grad, logits, value, rpb, out, softmax.statistics, window)[:2]


def reference_correlate(
    grad: Tensor, value: Tensor, _target: Tensor, window: Window, softmax: Softmax | None = None
) -> Tensor:
    if softmax is not None:
        return _reference_gradients(grad, value, window, softmax)[0]
    grad, value = at_least_float32(grad, value)
    return algebra.correlate(grad, value, window)


def reference_transpose(weight: Tensor, grad: Tensor, window: Window, softmax: Softmax | None = None) -> Tensor:
    if softmax is not None:  # whose gradient of value does not depend on value
        return _reference_gradients(grad, grad, window, softmax)[1]
    weight, grad = at_least_float32(weight, grad)
    return algebra.transpose(weight, grad, (grad.shape[3], grad.shape[4]), window)
