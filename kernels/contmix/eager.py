"""ContMix in plain PyTorch: ``neighborhood.eager`` with logits that are made for one tile at a time.

    logits[n,k] = Σ_c query[c,n] · projected[c,k] + bias[k]

A tile's logits are one matrix product of its queries, as cheap to make again in the backward pass as to store; so
there are never more than a tile of them, a few megabytes at most, whatever the size of the map.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kernels.aggregation.eager import Step, as_matrices
from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout
from kernels.neighborhood.eager import softmax_aggregate_made, softmax_aggregate_made_backward
from kernels.parallel import Part, alone
from kernels.windows import Window


class _MadeLogits:
    """The logits of one kernel size, tile by tile, and what their gradients add up to: those of ``query`` and
    ``projected`` are added to the tensors given."""

    fresh = True

    def __init__(self, query: Tensor, projected: Tensor, bias: Tensor, gradients: tuple[Tensor, ...] = ()) -> None:
        dtype = accumulator_dtype(query.dtype)
        self.query, self.projected, self.bias = query, projected.to(dtype), bias.to(dtype)
        self.side = math.isqrt(bias.shape[0])
        if gradients:
            self.grad_query, self.grad_projected = gradients
            self.grad_bias = torch.zeros_like(self.bias)

    def _queries(self, step: Step) -> Callable[[], Tensor]:
        """[n·b·g, Dq, R·T], as wide as an accumulator."""
        part = step.outputs(self.query)
        return lambda: as_matrices(part.to(self.projected.dtype))

    def _keys(self, step: Step) -> Callable[[], Tensor]:
        """[n·b·g, Dq, K²]"""
        keys = self.projected[step.maps]
        expanded = keys.expand(step.leading[0], *keys.shape)
        return lambda: expanded.flatten(0, 2)

    def reader(self, step: Step) -> Callable[[], Tensor]:
        """[n, b, g, R, T, K, K]"""
        queries, keys = self._queries(step), self._keys(step)
        shape = (*step.shape, self.side, self.side)
        return lambda: torch.baddbmm(self.bias, queries().mT, keys()).view(shape)

    def writer(self, step: Step) -> Callable[[Tensor], object]:
        queries, keys = self._queries(step), self._keys(step)
        grad_projected = self.grad_projected[step.maps]
        grad_query = step.outputs(self.grad_query)

        def write(grad: Tensor) -> None:
            matrices = grad.flatten(3, 4).flatten(0, 2)  # [n·b·g, R·T, K²]
            grad_projected.add_(torch.bmm(queries(), matrices).unflatten(0, step.leading).sum(0))
            self.grad_bias += matrices.sum((0, 1))
            grad_query.add_(torch.bmm(keys(), matrices.mT).view(grad_query.shape))

        return write


def empty_outputs(value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised output, in the memory order of value [B, M, G, Dv, H, W], and log Σ exp [B, M, G, H, W]."""
    statistics = value.new_empty((*value.shape[:3], *value.shape[4:]), dtype=accumulator_dtype(value.dtype))
    return empty_like_layout(value, value.shape), statistics


def parts(
    projected: Tensor, bias: Tensor, rpb: Sequence[Tensor], kernel_sizes: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(projected [B, G, Dq, K²], bias [K²], rpb [G, 2K−1, 2K−1]) of each kernel size."""
    positions = [size**2 for size in kernel_sizes]
    return zip(projected.split(positions, 3), bias.split(positions), rpb, strict=True)


def _heads_last(features: Tensor) -> Tensor:
    """[B, G, C, H, W] with channels innermost in memory, which matrix products on a CPU prefer."""
    return features.movedim(2, -1).contiguous().movedim(-1, 2)


@alone
def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: Sequence[Tensor], value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value; log Σ_k exp [B, M, G, H, W])"""
    out, statistics = empty_outputs(value)
    query = _heads_last(query)
    for m, (keys, biases, table) in enumerate(parts(projected, bias, rpb, kernel_sizes)):

        def made(part: Part, keys: Tensor = keys, biases: Tensor = biases) -> _MadeLogits:
            return _MadeLogits(query[part], keys[part], biases)

        window = Window.neighborhood((kernel_sizes[m], kernel_sizes[m]))
        out[:, m], statistics[:, m] = softmax_aggregate_made(made, _heads_last(value[:, m]), table, window)
    return out, statistics


@alone
def contmix_backward(
    grad: Tensor,
    query: Tensor,
    projected: Tensor,
    bias: Tensor,
    rpb: Sequence[Tensor],
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    kernel_sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Gradients of query, projected, bias, rpb and value, query's and value's in the memory order of their tensors.
    ``out`` and ``statistics`` are not needed here."""
    grad_value, _ = empty_outputs(value)
    # In query's memory order, which ``to`` below keeps.
    grad_query = torch.zeros_like(empty_like_layout(query, query.shape), dtype=accumulator_dtype(query.dtype))
    query = _heads_last(query)
    grad_projected = torch.zeros_like(projected, dtype=grad_query.dtype)
    slices = grad_projected.split([size**2 for size in kernel_sizes], 3)
    grad_bias, grad_rpb = [], []
    for m, (keys, biases, table) in enumerate(parts(projected, bias, rpb, kernel_sizes)):

        def made(part: Part, keys: Tensor = keys, biases: Tensor = biases, sums: Tensor = slices[m]) -> _MadeLogits:
            return _MadeLogits(query[part], keys[part], biases, (grad_query[part], sums[part]))

        window = Window.neighborhood((kernel_sizes[m], kernel_sizes[m]))
        grad_value[:, m], grad_table, found = softmax_aggregate_made_backward(
            _heads_last(grad[:, m]), made, _heads_last(value[:, m]), table, window
        )
        grad_bias.append(torch.stack([logits.grad_bias for logits in found]).sum(0))
        assert grad_table is not None
        grad_rpb.append(grad_table)
    return (
        grad_query.to(query.dtype),
        grad_projected.to(projected.dtype),
        torch.cat(grad_bias).to(bias.dtype),
        grad_rpb,
        grad_value,
    )
