"""ContMix's kernels launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.aggregation.examples import BATCH, GROUPS, near_square
from kernels.contmix import eager, triton_forward, triton_grad_inputs, triton_grad_parameters
from kernels.contmix.triton_tiles import Problem, Saved, shares_windows
from kernels.windows import Pair


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


@triton_forward.forward_of_one_size.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    query, projected, bias, rpb, value = _inputs(problem, device)
    inputs = triton_forward.Inputs(query, projected, bias, rpb.flatten(1), value[:, None])
    return inputs, *eager.empty_outputs(inputs.value), [problem.kernel_size], 0


@triton_grad_inputs.grad_query.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    saved = _saved(problem, device)
    return saved, torch.empty_like(saved.query), torch.empty_like(saved.statistics)


@triton_grad_inputs.grad_value.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    saved = _saved(problem, device)
    return saved, torch.empty_like(saved.value)


@triton_grad_parameters.grad_projected.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    saved = _saved(problem, device)
    return saved, _delta(saved)


@triton_grad_parameters.grad_tables.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    saved = _saved(problem, device)
    return saved, _delta(saved)
