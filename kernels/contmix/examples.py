"""ContMix's kernel launched on random inputs of a given problem: how ``autotune verify`` checks stored configs."""

from __future__ import annotations

import torch

from kernels.aggregation.examples import BATCH, GROUPS, near_square
from kernels.contmix import triton_kernels
from kernels.contmix.triton_kernels import Problem, shares_windows
from kernels.windows import Pair

__all__ = ["contmix"]


def _size(problem: Problem) -> Pair:
    """A map of about that many pixels that holds the window, and on which windows are shared or not as asked for."""
    kernel_size = problem.kernel_size
    height, width = (max(length, kernel_size) for length in near_square(problem.pixels))
    if problem.shared and not shares_windows(height, width, kernel_size):
        return kernel_size, kernel_size
    while not problem.shared and shares_windows(height, width, kernel_size):
        height, width = height + 1, width + 1
    return height, width


def contmix(problem: Problem, device: torch.device) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=problem.dtype, device=device)

    size, relative = _size(problem), 2 * problem.kernel_size - 1
    query = random(BATCH, GROUPS, problem.query_channels, *size) / problem.query_channels**0.5
    value = random(BATCH, GROUPS, problem.channels, *size)
    statistics_dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    triton_kernels.contmix_one_size(
        query,
        random(BATCH, GROUPS, problem.query_channels, problem.kernel_size**2),
        random(problem.kernel_size**2),
        random(GROUPS, relative, relative),
        value,
        torch.empty_like(value),
        torch.empty((BATCH, GROUPS, *size), dtype=statistics_dtype, device=device),
    )
