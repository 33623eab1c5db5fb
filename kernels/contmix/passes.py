"""ContMix on Triton kernels: the forward and the backward pass, each kernel size in the form that suits it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contmix import eager
from kernels.contmix.arguments import Targets, Tensors, problem_of
from kernels.contmix.backward_band import backward_band
from kernels.contmix.backward_shared import backward_shared
from kernels.contmix.composed import backward_composed, forward_composed
from kernels.contmix.configs import FILLED_BACKWARD, FILLED_FORWARD, is_band, shares_windows
from kernels.contmix.forward_band import forward_band
from kernels.contmix.forward_shared import forward_shared
from kernels.contmix.tiles import VECTOR
from kernels.dtypes import multiplies
from kernels.layout import empty_like_layout, empty_softmax_outputs
from kernels.reorder import in_channels_last, in_order_of
from kernels.tuning import repeated

Pass = Callable[..., Any]


def as_read(features: Tensor) -> Tensor:
    """[B, ..., C, H, W] as the kernels read it, else its copy: a pixel's channels adjacent in memory, their number and
    all other strides multiples of VECTOR; channels that fill the number up are 0."""
    channels = features.shape[-3]
    # A product of 8 channels of a wider type takes more registers than there are, one of 16 does not.
    vector = VECTOR.value if features.dtype.itemsize == 2 else 16
    strides = [stride for axis, stride in enumerate(features.stride()) if axis != features.ndim - 3]
    if features.stride(-3) == 1 and not any(number % vector for number in (channels, *strides)):
        return features
    if channels % vector == 0 and features.is_contiguous():
        return in_channels_last(features)
    by_pixel = features.movedim((-2, -1, -3), (1, 2, -1))
    return F.pad(by_pixel, (0, -channels % vector)).contiguous().movedim((1, 2, -1), (-2, -1, -3))


def keys_as_read(projected: Tensor, channels: int) -> Tensor:
    """[B, G, Dq, ΣK²] with as many channels, adjacent in memory, as queries that are read."""
    filled = channels - projected.shape[2]
    return F.pad(projected.movedim(2, -1), (0, filled)).movedim(-1, 2) if filled else projected


def as_given(result: Tensor, read: Tensor, given: Tensor) -> Tensor:
    """A result in the memory order of the features that were given, where the kernels read others."""
    if read is given:
        return result
    if result.shape == given.shape:
        return in_order_of(given, result)
    return empty_like_layout(given).copy_(result.narrow(-3, 0, given.shape[-3]))


def _form(tensors: Tensors, filled: float, shared: Pass, band: Pass, composed: Pass) -> Pass:
    """Which of these suits a kernel size."""
    height, width = tensors.value.shape[3:]
    if multiplies(tensors.value.dtype) and shares_windows(height, width, tensors.kernel_size, filled):
        return shared
    return band if is_band(problem_of(tensors)) else composed


@repeated
def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: list[Tensor], value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value; log Σ_k exp [B, M, G, H, W]), of tensors as the kernels read them."""
    out, statistics = empty_softmax_outputs(value)
    for m, part in enumerate(eager.parts(projected, bias, rpb, kernel_sizes)):
        tensors = Tensors(query, *part, value[:, m], out[:, m], statistics[:, m])
        _form(tensors, FILLED_FORWARD, forward_shared, forward_band, forward_composed)(tensors)
    return out, statistics


@repeated
def contmix_backward(
    grad: Tensor,
    query: Tensor,
    projected: Tensor,
    bias: Tensor,
    rpb: list[Tensor],
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    kernel_sizes: list[int],
) -> tuple[Tensor, ...]:
    """Gradients of query, projected, in value's type, bias, value and each rpb, of tensors as the kernels read them."""
    grad_query, grad_value = empty_like_layout(query), empty_like_layout(value)
    batch, groups, channels, positions = projected.shape
    grad_projected = value.new_empty((positions, batch, groups, channels)).permute(1, 2, 3, 0)
    grad_bias, grad_rpb = torch.empty_like(bias), [torch.empty_like(table) for table in rpb]
    previous = None
    gradients = eager.parts(grad_projected, grad_bias, grad_rpb, kernel_sizes)
    for m, (part, grads) in enumerate(zip(eager.parts(projected, bias, rpb, kernel_sizes), gradients, strict=True)):
        tensors = Tensors(query, *part, value[:, m], out[:, m], statistics[:, m], grad[:, m])
        # Query's gradients of all sizes but the last are sums that the next one goes on with.
        last = m == len(kernel_sizes) - 1
        grad_of_size = grad_query if last else torch.empty_like(grad_query, dtype=statistics.dtype)
        targets = Targets(grad_of_size, grad_value[:, m], *grads, previous)
        _form(tensors, FILLED_BACKWARD, backward_shared, backward_band, backward_composed)(tensors, targets)
        previous = grad_of_size
    return grad_query, grad_projected, grad_bias, grad_value, *grad_rpb
