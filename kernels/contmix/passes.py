"""ContMix on Triton kernels: the forward and the backward pass, each kernel size in the form that suits it."""

import torch
from torch import Tensor

from kernels.backend import interpreting
from kernels.contmix import eager
from kernels.contmix.backward_own import grad_own
from kernels.contmix.backward_shared import Targets, grad_inputs_shared, grad_tables_shared
from kernels.contmix.configs import Inputs, Saved, shares_windows
from kernels.contmix.forward_own import forward_own
from kernels.contmix.forward_shared import forward_shared
from kernels.layout import empty_like_layout
from kernels.tuning import repeated


def _no_double_products(value: Tensor) -> bool:
    """There is no float64 matrix product in Triton on a GPU."""
    return value.dtype == torch.float64 and not interpreting()


def _channels_last(features: Tensor) -> Tensor:
    """[B, ..., C, H, W] with a pixel's channels adjacent in memory, as the kernels read them; else copied."""
    if features.stride(-3) == 1:
        return features
    return features.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))


def _as_given(result: Tensor, read: Tensor, given: Tensor) -> Tensor:
    """A result in the memory order of the features that were given, where the kernels read others."""
    return result if read is given else empty_like_layout(given, given.shape).copy_(result)


def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: list[Tensor], value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value; log Σ_k exp [B, M, G, H, W])"""
    if _no_double_products(value):
        return eager.contmix(query, projected, bias, rpb, value, kernel_sizes)
    if value.numel() == 0:
        return eager.empty_outputs(value)
    read = _channels_last(value)
    out, statistics = _forward(_channels_last(query), projected, bias, rpb, read, kernel_sizes)
    return _as_given(out, read, value), statistics


@repeated
def _forward(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: list[Tensor], value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    out, statistics = eager.empty_outputs(value)
    for m, part in enumerate(eager.parts(projected, bias, rpb, kernel_sizes)):
        forward = forward_shared if shares_windows(value.shape[4], value.shape[5], kernel_sizes[m]) else forward_own
        forward(Inputs(query, *part, value[:, m]), out[:, m], statistics[:, m])
    return out, statistics


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
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Gradients of query, projected, in value's type, bias, rpb and value; query's and value's in the memory order of
    their tensors."""
    if _no_double_products(value):
        return eager.contmix_backward(grad, query, projected, bias, rpb, value, out, statistics, kernel_sizes)
    if value.numel() == 0:
        zeros = torch.zeros_like
        return zeros(query), zeros(projected), zeros(bias), [zeros(table) for table in rpb], zeros(value)
    read_query, read_value = _channels_last(query), _channels_last(value)
    grad, out = _channels_last(grad), _channels_last(out)
    grad_query, grad_value, grad_projected, grad_bias, *grad_rpb = _backward(
        grad, read_query, read_value, out, projected, bias, rpb, statistics, kernel_sizes
    )
    grad_query, grad_value = _as_given(grad_query, read_query, query), _as_given(grad_value, read_value, value)
    return grad_query, grad_projected, grad_bias, grad_rpb, grad_value


@repeated
def _backward(
    grad: Tensor,
    query: Tensor,
    value: Tensor,
    out: Tensor,
    projected: Tensor,
    bias: Tensor,
    rpb: list[Tensor],
    statistics: Tensor,
    kernel_sizes: list[int],
) -> tuple[Tensor, ...]:
    """Gradients of query, value, projected, bias and each rpb."""
    grad_query, grad_value = empty_like_layout(query, query.shape), eager.empty_outputs(value)[0]
    grad_projected = torch.empty_like(projected, dtype=value.dtype)
    grad_bias, grad_rpb = torch.empty_like(bias), [torch.empty_like(table) for table in rpb]
    previous = None
    gradients = eager.parts(grad_projected, grad_bias, grad_rpb, kernel_sizes)
    for m, (part, grads) in enumerate(zip(eager.parts(projected, bias, rpb, kernel_sizes), gradients, strict=True)):
        saved = Saved(query, *part, value[:, m], grad[:, m], out[:, m], statistics[:, m])
        # Query's gradients of all sizes but the last are sums that the next one goes on with.
        last = m == len(kernel_sizes) - 1
        grad_of_size = grad_query if last else torch.empty_like(grad_query, dtype=statistics.dtype)
        targets = Targets(grad_of_size, grad_value[:, m], *grads, previous)
        if shares_windows(value.shape[4], value.shape[5], kernel_sizes[m]):
            delta = torch.empty_like(statistics[:, m])
            grad_inputs_shared(saved, targets, delta)
            grad_tables_shared(saved, delta, targets.bias, targets.rpb)
        else:
            grad_own(saved, targets)
        previous = grad_of_size
    return grad_query, grad_value, grad_projected, grad_bias, *grad_rpb
