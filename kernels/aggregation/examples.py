"""The algebra's kernels launched on random inputs of a given problem: how stored configs are checked."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.aggregation import configs, gather
from kernels.aggregation import rows as sliding
from kernels.aggregation.configs import GatherProblem
from kernels.windows import Pair, Window

BATCH, GROUPS = 2, 2  # the least that shows a stride mistaken


def near_square(number: int, odd: bool = False) -> Pair:
    """(rows, columns) of that product, as near a square as its divisors allow."""
    rows = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0 and not (odd and n % 2 == 0))
    return rows, number // rows


class Drawn(NamedTuple):
    """A zero-padded window of the problem's steps or rows, and random tensors in the problem's memory order."""

    window: Window
    size: Pair  # of the map
    weight: Tensor  # [B, G, Kh, Kw, H', W']
    x: Tensor  # [B, G, C, H, W]
    g: Tensor  # [B, G, C, H', W']


def draw(problem: GatherProblem | configs.Problem, device: torch.device) -> Drawn:
    if isinstance(problem, GatherProblem):
        size, (rows, columns) = near_square(problem.pixels), near_square(problem.steps)
        window = Window((rows, columns), padding=(rows // 2, columns // 2))
        groups, kernel_fastest = GROUPS, problem.kernel_fastest
    else:  # whose rows slide in either memory order of the dynamic kernel
        size = problem.rows, max(1, problem.pixels // problem.rows)
        window = Window((problem.taps, 3), (problem.multiple, 1), (problem.taps // 2, 1))
        groups, kernel_fastest = problem.groups, False

    def random(size: Pair, fastest: bool, *channels: int) -> Tensor:
        shape = (BATCH, *size, groups, *channels) if fastest else (BATCH, groups, *channels, *size)
        drawn = torch.randn(shape, dtype=problem.dtype, device=device)
        return drawn.movedim((1, 2), (-2, -1)) if fastest else drawn

    outputs = window.output_size(*size)
    x, g = (random(each, problem.channels_fastest, problem.channels) for each in (size, outputs))
    return Drawn(window, size, random(outputs, kernel_fastest, *window.kernel_size), x, g)


def _aggregate(problem: GatherProblem | configs.Problem, device: torch.device) -> tuple[Any, ...]:
    drawn = draw(problem, device)
    return drawn.weight, drawn.x, drawn.window


def _transpose(problem: GatherProblem | configs.Problem, device: torch.device) -> tuple[Any, ...]:
    drawn = draw(problem, device)
    return drawn.weight, drawn.g, drawn.size, drawn.window


def _correlate(problem: GatherProblem | configs.Problem, device: torch.device) -> tuple[Any, ...]:
    drawn = draw(problem, device)
    return drawn.g, drawn.x, drawn.window


sliding.aggregate.example(_aggregate)
sliding.transpose.example(_transpose)
sliding.correlate.example(_correlate)
gather.gather_aggregate.example(_aggregate)
gather.gather_transpose.example(_transpose)
gather.gather_correlate.example(_correlate)
