"""The depthwise kernels launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.depthwise import triton_kernels
from kernels.depthwise.triton_tiles import Problem


def _feature_map(problem: Problem, device: torch.device) -> Tensor:
    """[B, C, H, W] of that many pixels, near a square, whose rows are aligned to ``problem.vector`` elements."""
    widths = [w for w in range(1, problem.pixels + 1) if problem.pixels % w == 0 and w % problem.vector == 0]
    width = min(widths, key=lambda w: abs(w * w - problem.pixels), default=problem.pixels)
    # A wider row than the map is aligned to no more than asked for.
    row = width + problem.vector
    shape = (problem.images, problem.channels, problem.pixels // width, row)
    return torch.randn(shape, dtype=problem.dtype, device=device)[..., :width]


@triton_kernels.convolve.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    shape = (problem.channels, 1, problem.kernel_size, problem.kernel_size)
    weight = torch.randn(shape, dtype=problem.dtype, device=device)
    return _feature_map(problem, device), weight


@triton_kernels.weight_gradient.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    x = _feature_map(problem, device)
    return torch.randn_like(x), x, problem.kernel_size
