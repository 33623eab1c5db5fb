"""The depthwise kernels launched on random inputs of a given problem: how stored configs are checked."""

from typing import Any

import torch
from torch import Tensor

from kernels.depthwise import backward, forward
from kernels.depthwise.configs import Problem


def _feature_map(problem: Problem, device: torch.device) -> Tensor:
    """[B, C, H, W] of about that many pixels, with the problem's tiles: one as wide as the map, or more beside it."""
    width = problem.span if problem.tile_width == problem.span else 2 * problem.span
    height = -(-problem.pixels // width)
    return torch.randn((problem.images, problem.channels, height, width), dtype=problem.dtype, device=device)


@forward.convolve.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    shape = (problem.channels, 1, problem.kernel_size, problem.kernel_size)
    weight = torch.randn(shape, dtype=problem.dtype, device=device)
    return _feature_map(problem, device), weight


@backward.weight_gradient.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    x = _feature_map(problem, device)
    return torch.randn_like(x), x, problem.kernel_size
