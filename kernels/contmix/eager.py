"""ContMix in plain PyTorch: ``neighborhood.eager`` with logits that are made for one tile at a time.

    logits[n,k] = Σ_c query[c,n] · projected[c,k] + bias[k]

A tile's logits are one matrix product of its queries, as cheap to compute again in the backward pass as to store. So at
most one tile of them exists at a time, a few megabytes, whatever the size of the map. The bias is one more channel of
``projected``; its query is 1.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aggregation.eager_tiles import Step
from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout, empty_softmax_outputs, zero_sums
from kernels.neighborhood.eager import softmax_aggregate_made, softmax_aggregate_made_backward
from kernels.parallel import Part, alone
from kernels.windows import Window


class _MadeLogits(NamedTuple):
    """The logits of one kernel size, tile by tile; their gradients are added to ``grad_query`` and ``grad_keys``."""

    query: Tensor  # [B, G, Dq + 1, H, W]
    keys: Tensor  # [B, G, Dq + 1, K²], as wide as an accumulator
    grad_query: Tensor  # [B, G, Dq, H, W]
    grad_keys: Tensor  # like keys

    def _factors(self, part: Part, step: Step) -> tuple[Tensor, Tensor]:
        """Of a step: queries [b·g·n, Dq + 1, R·T] and keys [b·g·n, Dq + 1, K²]."""
        keys = self.keys[part][step.maps].unsqueeze(2)
        return step.features(self.query[part]), keys.expand(-1, -1, step.leading[2], -1, -1).flatten(0, 2)

    def read(self, part: Part, step: Step) -> Tensor:
        queries, keys = self._factors(part, step)
        side = math.isqrt(keys.shape[-1])
        return torch.bmm(queries.mT, keys).view(*step.leading, step.rows.count, step.columns.count, side, side)

    def add(self, part: Part, step: Step, grad: Tensor) -> None:
        queries, keys = self._factors(part, step)
        matrices, grad_query = grad.flatten(5).flatten(3, 4).flatten(0, 2), step.outputs(self.grad_query[part])
        self.grad_keys[part][step.maps].add_(torch.bmm(queries, matrices).unflatten(0, step.leading).sum(2))
        grad_query += torch.bmm(keys[:, :-1], matrices.mT).view(grad_query.shape)


def parts(
    projected: Tensor, bias: Tensor, rpb: Sequence[Tensor], kernel_sizes: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(projected [B, G, Dq, K²], bias [K²], rpb [G, 2K−1, 2K−1]) of each kernel size."""
    positions = [size**2 for size in kernel_sizes]
    return zip(projected.split(positions, 3), bias.split(positions), rpb, strict=True)


def factors(query: Tensor, projected: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Query and a channel of ones, [B, G, Dq + 1, H, W]; projected and the bias, [B, G, Dq + 1, ΣK²]."""
    ones = F.pad(query.movedim(2, -1), (0, 1), value=1).movedim(-1, 2)
    keys = torch.cat((projected, bias.expand(*projected.shape[:2], 1, -1)), 2)
    return ones, keys.to(accumulator_dtype(query.dtype))


@alone
def contmix(
    query: Tensor, projected: Tensor, bias: Tensor, rpb: Sequence[Tensor], value: Tensor, kernel_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(out like value; log Σ_k exp [B, M, G, H, W])"""
    out, statistics = empty_softmax_outputs(value)
    query, keys = factors(query, projected, bias)
    for m, of_size in enumerate(keys.split([size**2 for size in kernel_sizes], 3)):
        logits = _MadeLogits(query, of_size, query, of_size)  # whose gradients nobody adds
        window = Window.neighborhood((kernel_sizes[m], kernel_sizes[m]))
        out[:, m], statistics[:, m] = softmax_aggregate_made(logits.read, value[:, m], rpb[m], window)
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
    grad_value, grad_rpb = empty_like_layout(value), []
    grad_query = zero_sums(query, query.shape)
    query, keys = factors(query, projected, bias)
    grad_keys, sizes = torch.zeros_like(keys), [size**2 for size in kernel_sizes]
    for m, (of_size, sums) in enumerate(zip(keys.split(sizes, 3), grad_keys.split(sizes, 3), strict=True)):
        logits = _MadeLogits(query, of_size, grad_query, sums)
        window = Window.neighborhood((kernel_sizes[m], kernel_sizes[m]))
        grad_value[:, m], grad_table = softmax_aggregate_made_backward(
            grad[:, m], logits.read, logits.add, value[:, m], rpb[m], window
        )
        grad_rpb.append(grad_table)
    grad_bias = grad_keys[:, :, -1].sum((0, 1)).to(bias.dtype)
    return grad_query.to(query.dtype), grad_keys[:, :, :-1].to(projected.dtype), grad_bias, grad_rpb, grad_value
