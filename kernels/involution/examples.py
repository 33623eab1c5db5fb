"""Involution's launchers with random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.aggregation.configs import Problem
from kernels.aggregation.examples import BATCH, random_maps, rows_geometry
from kernels.involution import forward
from kernels.windows import Pair


def _parameters(problem: Problem, columns: int, outputs: Pair, device: torch.device) -> tuple[Tensor, ...]:
    """Features [B, R, H', W'], weight [G·K, R] and bias [G·K]."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=problem.dtype, device=device)

    entries = problem.groups * problem.taps * columns
    weight = random(entries, problem.features) / problem.features**0.5
    return random(BATCH, problem.features, *outputs), weight, random(entries)


@forward.involution_generate.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    window, size = rows_geometry(problem)
    outputs = window.output_size(*size)
    return random_maps(problem, size, device), *_parameters(problem, 3, outputs, device), window


@forward.involution_generate_transpose.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    window, size = rows_geometry(problem)
    outputs = window.output_size(*size)
    x, g = random_maps(problem, size, device), random_maps(problem, outputs, device)
    return g, x, *_parameters(problem, 3, outputs, device), window
