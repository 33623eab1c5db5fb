"""Outlook's kernels launched on random inputs of a given problem: how stored configs are checked."""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.aggregation.examples import near_square
from kernels.dtypes import at_least_float32
from kernels.outlook import backward, forward
from kernels.outlook.configs import Problem
from kernels.outlook.tiles import Windows

BATCH, HEADS = 2, 2  # the least that shows a stride mistaken


def _inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Windows]:
    height, width = near_square(problem.pixels)
    windows_h, windows_w = -(-height // problem.stride), -(-width // problem.stride)
    positions = problem.kernel_size**2
    logits = torch.randn(BATCH, windows_h, windows_w, HEADS, positions, positions, dtype=problem.dtype, device=device)
    value = torch.randn(BATCH, height, width, HEADS * problem.channels, dtype=problem.dtype, device=device)
    return logits, value, Windows(problem.kernel_size, problem.stride, problem.kernel_size // 2, 0.5)


@forward.forward.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    return _inputs(problem, device)


@backward.grad_logits.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    logits, value, windows = _inputs(problem, device)
    return torch.randn_like(value), logits, value, windows


@backward.grad_value.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    logits, value, windows = _inputs(problem, device)
    statistics = torch.logsumexp(at_least_float32(logits)[0] * windows.scale, -1) * math.log2(math.e)
    return value, logits, statistics, windows
