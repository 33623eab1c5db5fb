"""The fused softmax's kernels launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.aggregation.configs import GatherProblem
from kernels.aggregation.examples import near_square
from kernels.layout import empty_like_layout
from kernels.neighborhood import backward, eager, forward, shared
from kernels.neighborhood.backward import Saved
from kernels.neighborhood.configs import SharedProblem, windows_and_most
from kernels.windows import Pair, Window
from kernels.windows_triton import inverse_steps

BATCH, HEADS = 2, 2  # the least that shows a stride mistaken


def _saved(
    kernel_size: Pair, size: Pair, channels: int, dtype: torch.dtype, device: torch.device, heads_last: bool = True
) -> tuple[Saved, Window]:
    """A gradient, inputs and outputs on a map that holds the window."""
    height, width = (max(length, kernel) for length, kernel in zip(size, kernel_size, strict=True))

    def draw(*inner: int) -> Tensor:
        shape = (height, width, *inner) if heads_last else (*inner, height, width)
        drawn = torch.randn(BATCH, HEADS, *shape, dtype=dtype, device=device)
        return drawn.permute(0, 1, *range(4, drawn.dim()), 2, 3) if heads_last else drawn

    logits, value = draw(*kernel_size), draw(channels)
    table = (HEADS, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
    rpb, window = torch.randn(table, dtype=dtype, device=device), Window.neighborhood(kernel_size)
    out, statistics = eager.softmax_aggregate(logits, value, rpb, window)
    return Saved(torch.randn_like(value), logits, value, rpb, out, statistics), window


def _shared(problem: SharedProblem, device: torch.device) -> tuple[Saved, Window]:
    """A map on which as many outputs share the window."""
    kernel_size = near_square(problem.positions, odd=True)
    if problem.outputs == problem.positions:  # the window is the map
        size = kernel_size
    else:
        rest = max(1, problem.pixels // kernel_size[0])
        size = next(
            (s for s in (near_square(problem.pixels), (kernel_size[0], rest), (rest, kernel_size[1]))
             if min(a - b for a, b in zip(s, kernel_size, strict=True)) >= 0
             and windows_and_most(Window.neighborhood(kernel_size), *s)[1] == problem.outputs),
            (kernel_size[0] + 1, kernel_size[1] + 1),
        )  # fmt: skip
    return _saved(kernel_size, size, problem.channels, problem.dtype, device)


def _own(problem: GatherProblem, kernel_size: Pair, size: Pair, device: torch.device) -> tuple[Saved, Window]:
    return _saved(kernel_size, size, problem.channels, problem.dtype, device, problem.kernel_fastest)


@forward.gather.example
def _(problem: GatherProblem, device: torch.device) -> tuple[Any, ...]:
    kernel_size = near_square(problem.steps, odd=True)
    saved, window = _own(problem, kernel_size, near_square(problem.pixels), device)
    return saved.logits, saved.value, saved.rpb, window


@backward.grad_logits.example
def _(problem: GatherProblem, device: torch.device) -> tuple[Any, ...]:
    return _own(problem, near_square(problem.steps, odd=True), near_square(problem.pixels), device)


@backward.grad_value.example
def _(problem: GatherProblem, device: torch.device) -> tuple[Any, ...]:
    """Steps here are the outputs that may reach an input: the square window whose number of them is nearest."""
    side = max(3, round(problem.pixels**0.5))

    def distance(kernel_size: int) -> int:
        window = Window.neighborhood((kernel_size, kernel_size))
        return abs(inverse_steps(window, side, 0) ** 2 - problem.steps)

    nearest = min(range(1, side + 1, 2), key=distance)
    return _own(problem, (nearest, nearest), (side, side), device)


@shared.softmax_mix.example
def _(problem: SharedProblem, device: torch.device) -> tuple[Any, ...]:
    saved, window = _shared(problem, device)
    return saved.logits, saved.value, saved.rpb, window


@shared.mix.example
def _(problem: SharedProblem, device: torch.device) -> tuple[Any, ...]:
    saved, window = _shared(problem, device)
    return saved.logits, saved.value, window


@shared.correlate.example
def _(problem: SharedProblem, device: torch.device) -> tuple[Any, ...]:
    saved, window = _shared(problem, device)
    target = empty_like_layout(saved.logits, saved.logits.shape)
    return saved.grad, saved.value, target, window, shared.Softmax(saved.logits, saved.rpb, saved.out, saved.statistics)


@shared.transpose.example
def _(problem: SharedProblem, device: torch.device) -> tuple[Any, ...]:
    saved, window = _shared(problem, device)
    return saved.logits, saved.grad, window, shared.Softmax(saved.logits, saved.rpb, saved.out, saved.statistics)
