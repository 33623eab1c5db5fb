"""ContMix's kernels launched on random inputs of a given problem: how stored configs are checked."""

from typing import Any

import torch
from torch import Tensor

from kernels.aggregation.examples import near_square
from kernels.contmix import eager
from kernels.contmix.backward_own import grad_logits_own, rows_of
from kernels.contmix.backward_shared import Targets, backward_shared
from kernels.contmix.configs import Inputs, Problem, Saved, shares_windows
from kernels.contmix.forward_own import forward_own
from kernels.contmix.forward_shared import forward_shared
from kernels.contmix.passes import as_read, keys_as_read
from kernels.dtypes import accumulator_dtype
from kernels.windows import Pair


def _size(problem: Problem, shared: bool) -> Pair:
    """A map of about that many pixels that holds the window, and on which windows are shared or not as asked for."""
    kernel_size = problem.kernel_size
    height, width = (max(length, kernel_size) for length in near_square(problem.pixels))
    if shared and not shares_windows(height, width, kernel_size):
        return kernel_size, kernel_size
    while not shared and shares_windows(height, width, kernel_size):
        height, width = height + 1, width + 1
    return height, width


def _inputs(problem: Problem, device: torch.device, shared: bool) -> tuple[Inputs, Tensor, Tensor]:
    """Inputs of one kernel size, and what the forward pass fills."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=problem.dtype, device=device)

    (height, width), relative = _size(problem, shared), 2 * problem.kernel_size - 1
    leading = problem.batch, problem.groups
    projected = random(problem.kernel_size**2, *leading, problem.query_channels).permute(1, 2, 3, 0)
    query = as_read(random(*leading, problem.query_channels, height, width) / problem.query_channels**0.5)
    inputs = Inputs(
        query,
        keys_as_read(projected.to(accumulator_dtype(problem.dtype)), query.shape[2]),
        random(problem.kernel_size**2),
        random(problem.groups, relative, relative),
        as_read(random(*leading, problem.channels, height, width)),
    )
    out, statistics = eager.empty_outputs(inputs.value[:, None])
    return inputs, out[:, 0], statistics[:, 0]


def _saved(problem: Problem, device: torch.device, shared: bool) -> tuple[Saved, Targets]:
    """What a backward kernel reads, a gradient and the outputs of the forward pass among it, and what it fills."""
    inputs, *_ = _inputs(problem, device, shared)
    query, projected, bias, rpb, value = inputs
    sizes = [problem.kernel_size]
    out, statistics = eager.contmix(query, projected, bias, [rpb], value[:, None], sizes)
    empty = torch.empty_like
    targets = Targets(empty(query), empty(value), empty(projected), empty(bias), empty(rpb), None)
    return Saved(*inputs, torch.randn_like(value), out[:, 0], statistics[:, 0]), targets


@forward_shared.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    return _inputs(problem, device, shared=True)


@forward_own.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    return _inputs(problem, device, shared=False)


@backward_shared.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    return _saved(problem, device, shared=True)


@grad_logits_own.example
def _(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    saved, targets = _saved(problem, device, shared=False)
    return saved, targets.query, None, rows_of(saved, 0, saved.value.shape[3] - 1)
