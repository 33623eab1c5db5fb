"""ContMix on Triton kernels: the forward and the backward pass, each kernel size in the form that suits it."""

from __future__ import annotations

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

__all__ = ["contmix", "contmix_backward"]


def _no_double_products(value: Tensor) -> bool:
    """There is no float64 matrix product in Triton on a GPU."""
    return value.dtype == torch.float64 and not interpreting()


def _channels_last(features: Tensor) -> Tensor:
    """[B, ..., C, H, W] with a pixel's channels adjacent in memory, as the kernels read them; else copied."""
    if features.stride(-3) == 1:
        return features
    return features.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))


def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: list[Tensor], value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value; log Σ_k exp [B, M, G, H, W])"""
    if _no_double_products(value):
        return eager.contmix(query, projected, bias, rpb, value, kernel_sizes)
    result, statistics = eager.empty_outputs(value)
    query, value = _channels_last(query), _channels_last(value)
    out = _channels_last(result)
    for m, part in enumerate(eager.parts(projected, bias, rpb, kernel_sizes) if value.numel() > 0 else ()):
        forward = forward_shared if shares_windows(value.shape[4], value.shape[5], kernel_sizes[m]) else forward_own
        forward(Inputs(query, *part, value[:, m]), out[:, m], statistics[:, m])
    return result if out is result else result.copy_(out), statistics


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
    """Gradients of query, projected, bias, rpb and value; query's and value's in the memory order of their tensors."""
    if _no_double_products(value):
        return eager.contmix_backward(grad, query, projected, bias, rpb, value, out, statistics, kernel_sizes)
    results = empty_like_layout(query, query.shape), eager.empty_outputs(value)[0]
    if value.numel() == 0:
        zeros = torch.zeros_like
        return results[0], zeros(projected), zeros(bias), [zeros(table) for table in rpb], results[1]
    grad_query, grad_value = map(_channels_last, results)
    query, value, grad, out = map(_channels_last, (query, value, grad, out))
    grad_projected, previous = torch.empty_like(projected), None
    parts_of_projected = grad_projected.split([size**2 for size in kernel_sizes], 3)
    bias_parts, rpb_parts = [], []
    for m, part in enumerate(eager.parts(projected, bias, rpb, kernel_sizes)):
        saved = Saved(query, *part, value[:, m], grad[:, m], out[:, m], statistics[:, m])
        # Query's gradients of all sizes but the last are sums that the next one goes on with.
        last = m == len(kernel_sizes) - 1
        grad_of_size = grad_query if last else torch.empty_like(grad_query, dtype=statistics.dtype)
        targets = Targets(grad_of_size, parts_of_projected[m], grad_value[:, m], previous)
        if shares_windows(value.shape[4], value.shape[5], kernel_sizes[m]):
            delta = torch.empty_like(statistics[:, m])
            grad_inputs_shared(saved, targets, delta)
            bias_part, rpb_part = grad_tables_shared(saved, delta)
        else:
            bias_part, rpb_part = grad_own(saved, targets)
        previous = grad_of_size
        bias_parts.append(bias_part)
        rpb_parts.append(rpb_part.to(rpb[m].dtype))
    for result, ours in zip(results, (grad_query, grad_value), strict=True):
        if ours is not result:
            result.copy_(ours)
    return results[0], grad_projected, torch.cat(bias_parts).to(bias.dtype), rpb_parts, results[1]
