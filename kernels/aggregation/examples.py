"""The algebra's kernels launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.aggregation import configs, gather, rows
from kernels.aggregation.configs import GatherProblem
from kernels.windows import Pair, Window

BATCH, GROUPS = 2, 2  # the least that shows a stride mistaken


def near_square(number: int, odd: bool = False) -> Pair:
    """(rows, columns) of that product, as near a square as its divisors allow."""
    rows = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0 and not (odd and n % 2 == 0))
    return rows, number // rows


def features(problem: GatherProblem, size: Pair, device: torch.device) -> Tensor:
    """[B, G, C, H, W] in the problem's memory order."""
    if problem.channels_fastest:
        shape = (BATCH, *size, GROUPS, problem.channels)
        return torch.randn(shape, dtype=problem.dtype, device=device).permute(0, 3, 4, 1, 2)
    return torch.randn((BATCH, GROUPS, problem.channels, *size), dtype=problem.dtype, device=device)


def kernel(problem: GatherProblem, kernel_size: Pair, size: Pair, device: torch.device) -> Tensor:
    """[B, G, Kh, Kw, H', W'] in the problem's memory order."""
    if problem.kernel_fastest:
        shape = (BATCH, *size, GROUPS, *kernel_size)
        return torch.randn(shape, dtype=problem.dtype, device=device).permute(0, 3, 4, 5, 1, 2)
    return torch.randn((BATCH, GROUPS, *kernel_size, *size), dtype=problem.dtype, device=device)


def _geometry(problem: GatherProblem) -> tuple[Window, Pair, Pair]:
    """A zero-padded window of that many steps, the map, and the map of its outputs."""
    kernel_size, size = near_square(problem.steps), near_square(problem.pixels)
    window = Window(kernel_size, padding=(kernel_size[0] // 2, kernel_size[1] // 2))
    return window, size, window.output_size(*size)


def rows_geometry(problem: configs.Problem) -> tuple[Window, Pair]:
    """A window with that many rows, and the map whose rows slide."""
    window = Window((problem.taps, 3), (problem.multiple, 1), (problem.taps // 2, 1))
    return window, (problem.rows, max(1, problem.pixels // problem.rows))


def random_maps(problem: configs.Problem, size: Pair, device: torch.device) -> Tensor:
    """[B, G, C, H, W] in the problem's memory order."""
    shape = BATCH, problem.groups * problem.channels, *size
    maps = torch.randn(shape, dtype=problem.dtype, device=device)
    if problem.channels_fastest:
        maps = maps.to(memory_format=torch.channels_last)
    return maps.unflatten(1, (problem.groups, problem.channels))


def _random_kernel(problem: configs.Problem, window: Window, size: Pair, device: torch.device) -> Tensor:
    """[B, G, Kh, Kw, H', W'], whose rows slide in either memory order of the maps."""
    shape = BATCH, problem.groups, *window.kernel_size, *size
    return torch.randn(shape, dtype=problem.dtype, device=device)


@rows.aggregate.example
def _(problem: configs.Problem, device: torch.device) -> tuple[Any, ...]:
    window, size = rows_geometry(problem)
    return _random_kernel(problem, window, size, device), random_maps(problem, size, device), window


@rows.transpose.example
def _(problem: configs.Problem, device: torch.device) -> tuple[Any, ...]:
    window, size = rows_geometry(problem)
    outputs = window.output_size(*size)
    kernel = _random_kernel(problem, window, outputs, device)
    return kernel, random_maps(problem, outputs, device), size, window


@rows.correlate.example
def _(problem: configs.Problem, device: torch.device) -> tuple[Any, ...]:
    window, size = rows_geometry(problem)
    return random_maps(problem, size, device), random_maps(problem, size, device), window


@gather.gather_aggregate.example
def _(problem: GatherProblem, device: torch.device) -> tuple[Any, ...]:
    window, size, output_size = _geometry(problem)
    weight = kernel(problem, window.kernel_size, output_size, device)
    return weight, features(problem, size, device), window


@gather.gather_transpose.example
def _(problem: GatherProblem, device: torch.device) -> tuple[Any, ...]:
    window, size, output_size = _geometry(problem)
    weight = kernel(problem, window.kernel_size, output_size, device)
    return weight, features(problem, output_size, device), size, window


@gather.gather_correlate.example
def _(problem: GatherProblem, device: torch.device) -> tuple[Any, ...]:
    window, size, output_size = _geometry(problem)
    return features(problem, output_size, device), features(problem, size, device), window
