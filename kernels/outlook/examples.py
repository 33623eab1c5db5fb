"""Outlook's kernels launched on random inputs of a given problem: how ``autotune verify`` checks stored configs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.aggregation.examples import near_square
from kernels.outlook import triton_kernels
from kernels.outlook.triton_kernels import Problem, Windows

__all__ = ["outlook", "outlook_grad_logits", "outlook_grad_value"]

BATCH, HEADS = 2, 2  # the least that shows a stride mistaken


def _inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Windows]:
    height, width = near_square(problem.pixels)
    windows_h, windows_w = -(-height // problem.stride), -(-width // problem.stride)
    positions = problem.kernel_size**2
    logits = torch.randn(BATCH, windows_h, windows_w, HEADS, positions, positions, dtype=problem.dtype, device=device)
    value = torch.randn(BATCH, height, width, HEADS * problem.channels, dtype=problem.dtype, device=device)
    return logits, value, Windows(problem.kernel_size, problem.stride, problem.kernel_size // 2, 0.5)


def outlook(problem: Problem, device: torch.device) -> None:
    logits, value, windows = _inputs(problem, device)
    triton_kernels.outlook(logits, value, *windows)


def outlook_grad_logits(problem: Problem, device: torch.device) -> None:
    logits, value, windows = _inputs(problem, device)
    triton_kernels.grad_logits(torch.randn_like(value), logits, value, windows)


def outlook_grad_value(problem: Problem, device: torch.device) -> None:
    logits, value, windows = _inputs(problem, device)
    scaled = logits.float() * windows.scale * torch.tensor(2.0).log().reciprocal().item()
    statistics = torch.logsumexp(scaled * torch.tensor(2.0).log().item(), -1) / torch.tensor(2.0).log().item()
    triton_kernels.grad_value(value, logits, statistics, windows)
