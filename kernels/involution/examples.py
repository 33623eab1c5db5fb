"""Involution's launchers with random inputs of a given problem: how stored configs are checked."""

import math
from typing import Any

import torch

from kernels.aggregation.configs import Problem
from kernels.aggregation.examples import BATCH, Drawn, draw
from kernels.involution import forward


def _inputs(problem: Problem, device: torch.device) -> tuple[Drawn, tuple[Any, ...]]:
    """What the algebra takes; features [B, R, H', W'], weight [G·K², R], bias [G·K²] and the window."""
    drawn = draw(problem, device)
    entries = problem.groups * math.prod(drawn.window.kernel_size)
    shapes = (BATCH, problem.features, *drawn.g.shape[3:]), (entries, problem.features), (entries,)
    features, weight, bias = (torch.randn(shape, dtype=problem.dtype, device=device) for shape in shapes)
    return drawn, (features, weight / problem.features**0.5, bias, drawn.window)


@forward.involution_generate.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    drawn, inputs = _inputs(problem, device)
    return drawn.x, *inputs


@forward.involution_generate_transpose.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    drawn, inputs = _inputs(problem, device)
    return drawn.g, drawn.x, *inputs
