"""The algebra's kernels launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.aggregation import triton_kernels
from kernels.aggregation.triton_kernels import Problem
from kernels.windows import Pair, Window

__all__ = ["features", "kernel", "near_square"]

BATCH, GROUPS = 2, 2  # the least that shows a stride mistaken


def near_square(number: int, odd: bool = False) -> Pair:
    """(rows, columns) of that product, as near a square as its divisors allow."""
    rows = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0 and not (odd and n % 2 == 0))
    return rows, number // rows


def features(problem: Problem, size: Pair, device: torch.device) -> Tensor:
    """[B, G, C, H, W] in the problem's memory order."""
    if problem.channels_fastest:
        shape = (BATCH, *size, GROUPS, problem.channels)
        return torch.randn(shape, dtype=problem.dtype, device=device).permute(0, 3, 4, 1, 2)
    return torch.randn((BATCH, GROUPS, problem.channels, *size), dtype=problem.dtype, device=device)


def kernel(problem: Problem, kernel_size: Pair, size: Pair, device: torch.device) -> Tensor:
    """[B, G, Kh, Kw, H', W'] in the problem's memory order."""
    if problem.kernel_fastest:
        shape = (BATCH, *size, GROUPS, *kernel_size)
        return torch.randn(shape, dtype=problem.dtype, device=device).permute(0, 3, 4, 5, 1, 2)
    return torch.randn((BATCH, GROUPS, *kernel_size, *size), dtype=problem.dtype, device=device)


def _geometry(problem: Problem) -> tuple[Window, Pair, Pair]:
    """A zero-padded window of that many steps, the map, and the map of its outputs."""
    kernel_size, size = near_square(problem.steps), near_square(problem.pixels)
    window = Window(kernel_size, padding=(kernel_size[0] // 2, kernel_size[1] // 2))
    return window, size, window.output_size(*size)


@triton_kernels.aggregate.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    window, size, output_size = _geometry(problem)
    weight = kernel(problem, window.kernel_size, output_size, device)
    return weight, features(problem, size, device), window


@triton_kernels.transpose.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    window, size, output_size = _geometry(problem)
    weight = kernel(problem, window.kernel_size, output_size, device)
    return weight, features(problem, output_size, device), size, window


@triton_kernels.correlate.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    window, size, output_size = _geometry(problem)
    return features(problem, output_size, device), features(problem, size, device), window
