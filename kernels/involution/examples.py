"""Involution's kernel launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

from typing import Any

import torch

from kernels.aggregation import triton_kernels as algebra
from kernels.aggregation.examples import BATCH, GROUPS, features, near_square
from kernels.involution import triton_kernels
from kernels.involution.triton_kernels import Problem
from kernels.windows import Window


@triton_kernels.involution_generate.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=problem.dtype, device=device)

    kernel_size, size = near_square(problem.steps, odd=True), near_square(problem.pixels)
    window = Window(kernel_size, padding=(kernel_size[0] // 2, kernel_size[1] // 2))
    layout = algebra.Problem(
        problem.channels, problem.pixels, problem.steps, channels_fastest=problem.channels_fastest, dtype=problem.dtype
    )
    rows = GROUPS * problem.steps
    return (
        features(layout, size, device),
        random(BATCH, problem.features, *size),
        random(rows, problem.features) / problem.features**0.5,
        random(rows),
        window,
    )
