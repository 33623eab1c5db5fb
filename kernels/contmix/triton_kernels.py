"""ContMix on Triton kernels: the forward pass, and what its backward pass is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import interpreting
from kernels.contmix import eager
from kernels.contmix.triton_forward import Inputs, forward
from kernels.contmix.triton_grad_inputs import grad_query, grad_value
from kernels.contmix.triton_grad_parameters import grad_projected, grad_tables
from kernels.contmix.triton_tiles import Saved
from kernels.layout import empty_like_layout

__all__ = ["contmix", "contmix_backward"]


def _no_double_products(value: Tensor) -> bool:
    """There is no float64 matrix product in Triton on a GPU."""
    return value.dtype == torch.float64 and not interpreting()


def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: Tensor, value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value; log Σ_k exp [B, M, G, H, W]); rpb holds all tables side by side, [G, Σ(2K−1)²]."""
    if _no_double_products(value):
        return eager.contmix(query, projected, bias, rpb, value, kernel_sizes)
    out, statistics = eager.empty_outputs(value)
    if value.numel() > 0:
        forward(Inputs(query, projected, bias, rpb, value), out, statistics, kernel_sizes)
    return out, statistics


def contmix_backward(
    grad: Tensor,
    query: Tensor,
    projected: Tensor,
    bias: Tensor,
    rpb: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    kernel_sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, projected, bias, rpb and value; query's and value's in the memory order of their tensors."""
    if _no_double_products(value):
        return eager.contmix_backward(grad, query, projected, bias, rpb, value, out, statistics, kernel_sizes)
    grad_of_query = empty_like_layout(query, query.shape)
    grad_of_value = eager.empty_outputs(value)[0]
    if value.numel() == 0:
        zeros = torch.zeros_like
        return grad_of_query, zeros(projected), zeros(bias), zeros(rpb), grad_of_value
    one = torch.empty_like(grad_of_query)
    delta = torch.empty_like(statistics[:, 0])
    projected_parts, bias_parts, rpb_parts = [], [], []
    for m, part in enumerate(eager.parts(projected, bias, rpb, kernel_sizes)):
        saved = Saved(grad[:, m], query, *part, value[:, m], out[:, m], statistics[:, m])
        grad_query(saved, one if m else grad_of_query, delta)
        if m:
            grad_of_query += one
        grad_value(saved, grad_of_value[:, m])
        projected_parts.append(grad_projected(saved, delta))
        bias_part, rpb_part = grad_tables(saved, delta)
        bias_parts.append(bias_part)
        rpb_parts.append(rpb_part.flatten(1))
    grad_of_projected = torch.cat(projected_parts, 3).to(projected.dtype)
    return (
        grad_of_query,
        grad_of_projected,
        torch.cat(bias_parts).to(bias.dtype),
        torch.cat(rpb_parts, 1),
        grad_of_value,
    )
