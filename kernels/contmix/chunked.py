"""ContMix through its logits, a few megabytes of them at a time: the eager path, and the backward pass of every path.

Nothing of size ΣK² per pixel outlives a step. The forward pass keeps log Σ exp, one number per pixel, head and kernel
size; the backward pass computes the logits of a step again by the matrix product they came from (Dq multiply-adds a
logit), hands them to the neighbourhood operators, and multiplies their gradient back. A step's logits are sized to
stay in cache between the product that writes them and the kernels that read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from kernels.windows import Window

__all__ = ["backward", "forward", "tables"]

# Bytes of logits a step may hold: a share of a CPU's last-level cache, half of a data-centre GPU's L2.
STEP_BYTES = {"cpu": 8 * 2**20}
STEP_BYTES_ELSEWHERE = 24 * 2**20


def _steps(query: Tensor, positions: int) -> Iterator[tuple[slice, slice]]:
    """Batch entries and groups, taken together so that a step's logits fit; at least one group of one entry."""
    batch, groups, _, height, width = query.shape
    budget = STEP_BYTES.get(query.device.type, STEP_BYTES_ELSEWHERE)
    bytes_per_logit = 8 if query.dtype == torch.float64 else 4
    images = max(1, budget // (height * width * positions * bytes_per_logit))
    entries, per_entry = (images // groups, groups) if images >= groups else (1, images)
    for first in range(0, batch, entries):
        for group in range(0, groups, per_entry):
            yield slice(first, first + entries), slice(group, group + per_entry)


def _logits(query: Tensor, projected: Tensor, bias: Tensor) -> Tensor:
    """[b, g, H, W, ΣK²] of a step, at least in float32: rounded logits would disagree with the saved statistics."""
    if query.dtype != torch.float64:
        query, projected, bias = query.float(), projected.float(), bias.float()
    entries, groups, _, height, width = query.shape
    pixels = query.flatten(3).transpose(2, 3).flatten(0, 1)
    logits = torch.baddbmm(bias, pixels, projected.flatten(0, 1))
    return logits.view(entries, groups, height, width, -1)


def _kernel_first(logits: Tensor, size: int) -> Tensor:
    """[b, g, H, W, K²] seen as [b, g, K, K, H, W]."""
    return logits.unflatten(-1, (size, size)).permute(0, 1, 4, 5, 2, 3)


def tables(rpb: Tensor, kernel_sizes: list[int]) -> list[Tensor]:
    """[G, Σ(2K−1)²] as one [G, 2K−1, 2K−1] per kernel size."""
    sides = [2 * size - 1 for size in kernel_sizes]
    return [t.unflatten(1, (side, side)) for t, side in zip(rpb.split([s * s for s in sides], 1), sides, strict=True)]


def _heads_last(features: Tensor) -> Tensor:
    """[b, g, C, H, W] with channels innermost in memory, which both the products on a CPU and vector loads prefer."""
    return features.movedim(2, -1).contiguous().movedim(-1, 2)


def forward(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: Tensor, value: Tensor, kernel_sizes: list[int], run: ModuleType
) -> tuple[Tensor, Tensor]:
    """Output like value, contiguous, and log Σ exp [B, M, G, H, W]; ``run`` holds the neighbourhood operators."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    statistics_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    statistics = torch.empty((*value.shape[:3], *value.shape[4:]), dtype=statistics_dtype, device=value.device)
    rpb_tables = tables(rpb, kernel_sizes)
    for entries, groups in _steps(query, projected.shape[3]):
        logits = _logits(query[entries, groups], projected[entries, groups], bias)
        for m, part in enumerate(logits.split([size**2 for size in kernel_sizes], -1)):
            size = kernel_sizes[m]
            out[entries, m, groups], statistics[entries, m, groups] = run.softmax_aggregate(
                _kernel_first(part, size),
                _heads_last(value[entries, m, groups]),
                rpb_tables[m][groups],
                Window.neighborhood((size, size)),
            )
    return out, statistics


def backward(
    grad: Tensor,
    query: Tensor,
    projected: Tensor,
    bias: Tensor,
    rpb: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    kernel_sizes: list[int],
    run: ModuleType,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, projected, bias, rpb and value, contiguous. Sums over pixels run step by step, in order."""
    accumulator = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_query, grad_projected, grad_value = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, projected, value)
    )
    grad_bias, grad_rpb = (torch.zeros(t.shape, dtype=accumulator, device=t.device) for t in (bias, rpb))
    rpb_tables, grad_tables = tables(rpb, kernel_sizes), tables(grad_rpb, kernel_sizes)
    for entries, groups in _steps(query, projected.shape[3]):
        step_query, step_projected = query[entries, groups], projected[entries, groups]
        logits = _logits(step_query, step_projected, bias)
        for m, part in enumerate(logits.split([size**2 for size in kernel_sizes], -1)):
            size = kernel_sizes[m]
            grad_part, grad_value[entries, m, groups], grad_table = run.softmax_aggregate_backward(
                _heads_last(grad[entries, m, groups]),
                _kernel_first(part, size),
                _heads_last(value[entries, m, groups]),
                rpb_tables[m][groups],
                out[entries, m, groups],
                statistics[entries, m, groups].contiguous(),
                Window.neighborhood((size, size)),
            )
            grad_tables[m][groups] += grad_table
            # The logits have been used: their gradient takes their place, and no second buffer is needed.
            part.copy_(grad_part.permute(0, 1, 4, 5, 2, 3).flatten(4))
        # [b, g, N, ΣK²] with [b, g, Dq, ΣK²] and [b, g, Dq, N].
        grad_logits = logits.flatten(2, 3)
        step_query, step_projected = step_query.to(logits.dtype).flatten(3), step_projected.to(logits.dtype)
        grad_query[entries, groups] = (step_projected @ grad_logits.transpose(2, 3)).unflatten(3, query.shape[3:])
        grad_projected[entries, groups] = step_query @ grad_logits
        grad_bias += grad_logits.sum((0, 1, 2))
    return grad_query, grad_projected, grad_bias.to(bias.dtype), grad_rpb.to(rpb.dtype), grad_value
