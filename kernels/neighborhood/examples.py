"""The fused softmax's kernels launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.aggregation.examples import GROUPS, features, kernel, near_square
from kernels.aggregation.triton_kernels import Problem
from kernels.neighborhood import eager, triton_kernels
from kernels.windows import Pair, Window
from kernels.windows_triton import inverse_steps


def _inputs(
    problem: Problem, kernel_size: Pair, size: Pair, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Window]:
    """logits, value, rpb and the window, on a map that holds it."""
    size = max(size[0], kernel_size[0]), max(size[1], kernel_size[1])
    table = (GROUPS, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
    rpb = torch.randn(table, dtype=problem.dtype, device=device)
    window = Window.neighborhood(kernel_size)
    return kernel(problem, kernel_size, size, device), features(problem, size, device), rpb, window


@triton_kernels.softmax_aggregate.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    kernel_size = near_square(problem.steps, odd=True)
    return _inputs(problem, kernel_size, near_square(problem.pixels), device)


@triton_kernels.grad_logits.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    kernel_size = near_square(problem.steps, odd=True)
    logits, value, rpb, window = _inputs(problem, kernel_size, near_square(problem.pixels), device)
    saved = eager.softmax_aggregate(logits, value, rpb, window)
    return torch.randn_like(value), logits, value, rpb, *saved, window


@triton_kernels.grad_value.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    """Steps here are the outputs that may reach an input: the square window whose number of them is nearest."""
    side = max(3, round(problem.pixels**0.5))

    def distance(kernel_size: int) -> int:
        window = Window.neighborhood((kernel_size, kernel_size))
        return abs(inverse_steps(window, side, 0) ** 2 - problem.steps)

    nearest = min(range(1, side + 1, 2), key=distance)
    logits, value, rpb, window = _inputs(problem, (nearest, nearest), (side, side), device)
    saved = eager.softmax_aggregate(logits, value, rpb, window)
    return torch.randn_like(value), logits, value, rpb, *saved, window
