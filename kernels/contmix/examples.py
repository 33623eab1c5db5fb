"""ContMix's kernels launched on random inputs of a given problem: how ``autotune verify`` checks stored configs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.aggregation.examples import BATCH, GROUPS, near_square
from kernels.contmix import eager, triton_grad_inputs, triton_grad_parameters, triton_kernels
from kernels.contmix.triton_tiles import Problem, Saved, shares_windows
from kernels.windows import Pair

__all__ = ["contmix", "grad_projected", "grad_query", "grad_tables", "grad_value"]


def _size(problem: Problem) -> Pair:
    """A map of about that many pixels that holds the window, and on which windows are shared or not as asked for."""
    kernel_size = problem.kernel_size
    height, width = (max(length, kernel_size) for length in near_square(problem.pixels))
    if problem.shared and not shares_windows(height, width, kernel_size):
        return kernel_size, kernel_size
    while not problem.shared and shares_windows(height, width, kernel_size):
        height, width = height + 1, width + 1
    return height, width


def _inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, projected keys, bias, rpb and value of one kernel size."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=problem.dtype, device=device)

    size, relative = _size(problem), 2 * problem.kernel_size - 1
    return (
        random(BATCH, GROUPS, problem.query_channels, *size) / problem.query_channels**0.5,
        random(BATCH, GROUPS, problem.query_channels, problem.kernel_size**2),
        random(problem.kernel_size**2),
        random(GROUPS, relative, relative),
        random(BATCH, GROUPS, problem.channels, *size),
    )


def _saved(problem: Problem, device: torch.device) -> Saved:
    """What a backward kernel reads: a gradient, the inputs, and the outputs of the forward pass."""
    query, projected, bias, rpb, value = _inputs(problem, device)
    sizes = [problem.kernel_size]
    out, statistics = eager.contmix(query, projected, bias, rpb.flatten(1), value[:, None], sizes)
    return Saved(torch.randn_like(value), query, projected, bias, rpb, value, out[:, 0], statistics[:, 0])


def _delta(saved: Saved) -> Tensor:
    return (saved.grad.to(saved.statistics.dtype) * saved.out.to(saved.statistics.dtype)).sum(2)


def contmix(problem: Problem, device: torch.device) -> None:
    query, projected, bias, rpb, value = _inputs(problem, device)
    triton_kernels.contmix(query, projected, bias, rpb.flatten(1), value[:, None], [problem.kernel_size])


def grad_query(problem: Problem, device: torch.device) -> None:
    saved = _saved(problem, device)
    triton_grad_inputs.grad_query(saved, torch.empty_like(saved.query), torch.empty_like(saved.statistics))


def grad_value(problem: Problem, device: torch.device) -> None:
    saved = _saved(problem, device)
    triton_grad_inputs.grad_value(saved, torch.empty_like(saved.value))


def grad_projected(problem: Problem, device: torch.device) -> None:
    saved = _saved(problem, device)
    triton_grad_parameters.grad_projected(saved, _delta(saved))


def grad_tables(problem: Problem, device: torch.device) -> None:
    saved = _saved(problem, device)
    triton_grad_parameters.grad_tables(saved, _delta(saved))
