"""The fused softmax's kernels launched on random inputs of a given problem: how stored configs are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.examples import near_square
from kernels.neighborhood import eager
from kernels.neighborhood.configs import OwnProblem, SharedProblem, windows_and_most
from kernels.neighborhood.launchers import OWN, SHARED, Launchers, Softmax
from kernels.windows import Pair, Window

BATCH, HEADS = 2, 2  # the least that shows a stride mistaken


class Saved(NamedTuple):
    """Inputs, what a softmax makes of them, and a gradient."""

    grad: Tensor
    logits: Tensor
    value: Tensor
    rpb: Tensor
    softmax: Softmax


def _saved(
    kernel_size: Pair, size: Pair, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Saved, Window]:
    """On a map that holds the window."""
    height, width = (max(length, kernel) for length, kernel in zip(size, kernel_size, strict=True))

    def draw(*inner: int) -> Tensor:
        drawn = torch.randn(BATCH, HEADS, height, width, *inner, dtype=dtype, device=device)
        return drawn.permute(0, 1, *range(4, drawn.dim()), 2, 3)

    logits, value = draw(*kernel_size), draw(channels)
    table = (HEADS, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
    rpb, window = torch.randn(table, dtype=dtype, device=device), Window.neighborhood(kernel_size)
    out, statistics = eager.softmax_aggregate(logits, value, rpb, window)
    return Saved(torch.randn_like(value), logits, value, rpb, Softmax(logits, rpb, out, statistics)), window


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


def _own(problem: OwnProblem, device: torch.device) -> tuple[Saved, Window]:
    kernel_size = problem.kernel_h, problem.kernel_w
    return _saved(kernel_size, near_square(problem.pixels), problem.channels, problem.dtype, device)


def _register(form: Launchers, draw: Callable[[Any, torch.device], tuple[Saved, Window]]) -> None:
    @form.mix.example
    def _(problem: Any, device: torch.device) -> tuple[Any, ...]:
        saved, window = draw(problem, device)
        return saved.logits, saved.value, window

    @form.softmax_mix.example
    def _(problem: Any, device: torch.device) -> tuple[Any, ...]:
        saved, window = draw(problem, device)
        return saved.logits, saved.value, saved.rpb, window

    @form.transpose.example
    def _(problem: Any, device: torch.device) -> tuple[Any, ...]:
        saved, window = draw(problem, device)
        return saved.grad, saved.softmax if problem.softmax else saved.logits, window

    @form.correlate.example
    def _(problem: Any, device: torch.device) -> tuple[Any, ...]:
        saved, window = draw(problem, device)
        softmax = saved.softmax if problem.softmax else None
        return saved.grad, saved.value, torch.empty_like(saved.logits), window, softmax


_register(OWN, _own)
_register(SHARED, _shared)
