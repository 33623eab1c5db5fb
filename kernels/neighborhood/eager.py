"""softmax over the window and aggregation, in plain PyTorch: the bands of ``aggregation.eager`` with a softmax before.

    p = softmax_k(logits[i,k] + rpb[(nbr(i,k) − i)/d + K − 1])     out[i] = Σ_k p[i,k] · value[nbr(i,k)]

No tensor of the size of the logits is made but their gradient: bias, softmax and band exist for one step at a time. The
backward pass runs the softmax again, which costs no more than recovering p from log Σ exp and is more accurate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aggregation.eager import (
    Bands,
    Scratch,
    Step,
    add,
    as_matrices,
    load,
    multiply,
    pixel_scratch,
    steps_of,
)
from kernels.dtypes import accumulator_dtype
from kernels.layout import channels_fastest, empty_like_layout
from kernels.parallel import Part, Work, alone, in_turn, over_maps
from kernels.windows import Window

# What one logit costs beyond its products, in multiply-adds of a matrix product: bias, exp, sum and copies.
LOGIT_COST = 32


@functools.lru_cache(maxsize=256)
def _table_indices(window: Window, length: int, axis: int, device: torch.device) -> Tensor:
    """Where the relative position of every neighbour stands in a bias table, [L, K]."""
    query = torch.arange(length, device=device)[:, None]
    distance = window.neighbours(length, axis, device) - query
    return torch.div(distance, window.dilation[axis], rounding_mode="floor") + window.kernel_size[axis] - 1


def _sum_by_index(grad: Tensor, index: Tensor, length: int) -> Tensor:
    """out[g,m,t] = Σ_{n: index[n]=t} grad[g,m,n]: [G, M, N] -> [G, M, length].

    A product with a one-hot matrix, not index_add: the same bits on every run, on every device.
    """
    one_hot = F.one_hot(index.flatten(), length).to(grad.dtype)
    return multiply(grad, one_hot.expand(grad.shape[0], *one_hot.shape), one_hot.bool)


class _PositionBias:
    """rpb [G, 2Kh−1, 2Kw−1] at every (output, window position), and the sum of gradients back into that table.

    Columns are spread once for the whole map ([G, 2Kh−1, W, Kw]), rows tile by tile.
    """

    def __init__(self, rpb: Tensor, window: Window, height: int, width: int) -> None:
        self._kernel_size = window.kernel_size
        self._rows = _table_indices(window, height, 0, rpb.device)
        self._columns = _table_indices(window, width, 1, rpb.device)
        self._spread = rpb.to(accumulator_dtype(rpb.dtype))[:, :, self._columns]
        self._gradient = torch.zeros_like(self._spread)

    def reader(self, step: Step) -> Callable[[], Tensor]:
        """Makes a step's biases [n, 1, g, R, T, Kh, Kw]."""
        columns, rows = self._spread[step.maps[1], :, step.columns.outputs], self._rows_of(step)
        shape = (-1, step.rows.count, self._kernel_size[0], step.leading[0], step.columns.count, self._kernel_size[1])
        return lambda: columns.index_select(1, rows).view(shape).permute(3, 0, 1, 4, 2, 5).unsqueeze(1)

    def _rows_of(self, step: Step) -> Tensor:
        """Row of the table for every row of the tile and of the window, [R·Kh]."""
        return self._rows[step.rows.outputs].flatten()

    def writer(self, step: Step) -> Callable[[Tensor], object]:
        """Adds a step's gradients [n, b, g, R, T, K²], summed over the batch and the step's rows."""
        rows, target = self._rows_of(step), self._gradient[step.maps[1], :, step.columns.outputs]

        def write(grad: Tensor) -> None:
            # [g, n, T, Kw, R, Kh]
            by_rows = grad.sum(1).unflatten(-1, self._kernel_size).permute(1, 0, 3, 5, 2, 4)
            summed = _sum_by_index(by_rows.flatten(4).flatten(1, 3), rows, self._spread.shape[1])
            target.add_(summed.mT.unflatten(2, (-1, self._kernel_size[1])))

        return write

    def gradient(self) -> Tensor:
        """[G, 2Kh−1, 2Kw−1], as wide as an accumulator."""
        return _sum_by_index(self._gradient.flatten(2), self._columns, 2 * self._kernel_size[1] - 1)


def _kernel_scratch(steps: list[Step], value: Tensor, window: Window) -> Scratch:
    """For a step's weights."""
    return Scratch(value, (math.prod((*step.shape, *window.kernel_size)) for step in steps))


def _kernel_last(kernel: Tensor) -> Tensor:
    """[n, b, g, Kh, Kw, R, T] as [n, b, g, R, T, Kh, Kw]"""
    return kernel.permute(0, 1, 2, 5, 6, 3, 4)


def _kernel_first(kernel: Tensor, window: Window) -> Tensor:
    """[n, b, g, R, T, K²] as [n, b, g, Kh, Kw, R, T]"""
    return kernel.unflatten(-1, window.kernel_size).permute(0, 1, 2, 5, 6, 3, 4)


class Logits(Protocol):
    """Logits that are read, and their gradients taken, one step at a time."""

    fresh: bool
    """Whether a tile read is memory of its own, to be written over."""

    def reader(self, step: Step) -> Callable[[], Tensor]:
        """Reads [n, b, g, R, T, Kh, Kw], as wide as an accumulator."""
        ...

    def writer(self, step: Step) -> Callable[[Tensor], object]:
        """Takes gradients [n, b, g, R, T, Kh·Kw], as wide as an accumulator."""
        ...


SomeLogits = TypeVar("SomeLogits", bound=Logits)


class _StoredLogits:
    """Logits [B, G, Kh, Kw, H, W], and a tensor for their gradient."""

    fresh = False

    def __init__(self, logits: Tensor, window: Window, gradient: Tensor | None = None) -> None:
        self._logits, self._window, self._gradient = logits, window, gradient

    def reader(self, step: Step) -> Callable[[], Tensor]:
        part = _kernel_last(step.outputs(self._logits))
        return lambda: part.to(accumulator_dtype(part.dtype))

    def writer(self, step: Step) -> Callable[[Tensor], object]:
        assert self._gradient is not None
        part = _kernel_last(step.outputs(self._gradient))
        return lambda grad: part.copy_(grad.view(part.shape))


def _softmax(logits: Logits, bias: _PositionBias | None, step: Step, weight: Tensor) -> Callable[[], Tensor]:
    """Writes the softmax of a step's logits + rpb to weight [n, b, g, R, T, K²], and gives these logits."""
    read, read_bias = logits.reader(step), None if bias is None else bias.reader(step)

    def run() -> Tensor:
        biased = read()
        if read_bias is None:
            biased = biased.flatten(5)
        elif logits.fresh:  # the bias is as good as contiguous, and copied once for the whole batch
            biased = biased.flatten(5).add_(read_bias().flatten(5))
        else:
            biased = (biased + read_bias()).flatten(5)
        torch.softmax(biased, -1, out=weight)
        return biased

    return run


@alone
def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """out[b,g,d,i] = Σ_k p[i,k] · value[b,g,d,nbr(i,k)], and log Σ_k exp(logits + rpb).

    logits [B,G,Kh,Kw,H,W], value [B,G,D,H,W], rpb [G,2Kh−1,2Kw−1] or None -> out like value, [B,G,H,W] as wide as an
    accumulator.
    """
    return softmax_aggregate_made(lambda part: _StoredLogits(logits[part], window), value, rpb, window)


def _multiply_adds(value: Tensor, window: Window) -> int:
    return math.prod((*value.shape[:2], *value.shape[3:], *window.kernel_size, value.shape[2] + LOGIT_COST))


def softmax_aggregate_made(
    make_logits: Callable[[Part], Logits], value: Tensor, rpb: Tensor | None, window: Window
) -> tuple[Tensor, Tensor]:
    """``softmax_aggregate`` with logits, of a part of the maps, that need not exist all at once."""
    batch, groups, _, height, width = value.shape
    out = empty_like_layout(value, value.shape)
    statistics_dtype = accumulator_dtype(value.dtype)
    log_sum_exp = torch.empty((batch, groups, height, width), dtype=statistics_dtype, device=value.device)

    def work(part: Part) -> Work[None]:
        table = None if rpb is None else rpb[part.groups]
        return _softmax_aggregate(make_logits(part), value[part], table, window, out[part], log_sum_exp[part])

    over_maps(work, value, _multiply_adds(value, window))
    return out, log_sum_exp


def _softmax_aggregate(
    logits: Logits, value: Tensor, rpb: Tensor | None, window: Window, out: Tensor, log_sum_exp: Tensor
) -> Work[None]:
    bias = None if rpb is None else _PositionBias(rpb, window, *value.shape[3:])
    steps = steps_of(window, value)
    scratch, weights = pixel_scratch(steps, value), _kernel_scratch(steps, value, window)
    bands = Bands(steps, value, window.kernel_size, not channels_fastest(value))

    def work(step: Step) -> Work[None]:
        pixels, band = step.pixels(value, scratch), bands.select(step)
        weight = weights.take(*step.shape, math.prod(window.kernel_size))
        softmax, pairs = _softmax(logits, bias, step, weight), band.pairs(_kernel_first(weight, window))
        sources, matrices = step.pairs(pixels, value), as_matrices(pixels)
        target, statistics = step.outputs(out), step.outputs(log_sum_exp)
        yield
        biased = softmax()
        # The largest entry tells the normaliser: log Σ exp = max logit − log max p, and max p >= 1/K².
        statistics.copy_(biased.amax(-1) - weight.amax(-1).log())
        del biased
        load(pixels, sources)
        band.lay(pairs)
        target.copy_(band.gather(matrices).view(target.shape))

    return in_turn(map(work, steps))


@alone
def softmax_aggregate_backward(
    grad_out: Tensor,
    logits: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dlogits = p · (dp − Σ_k p·dp) with dp[i,k] = Σ_d grad_out[i] · value[nbr(i,k)]; dvalue = transpose(p, grad_out);
    drpb sums dlogits over batch and pixels. ``out`` and ``log_sum_exp`` are not needed here."""
    grad_logits = empty_like_layout(logits, logits.shape)
    grad_value, grad_rpb, _ = softmax_aggregate_made_backward(
        grad_out, lambda part: _StoredLogits(logits[part], window, grad_logits[part]), value, rpb, window
    )
    return grad_logits, grad_value, grad_rpb


def softmax_aggregate_made_backward(
    grad_out: Tensor, make_logits: Callable[[Part], SomeLogits], value: Tensor, rpb: Tensor | None, window: Window
) -> tuple[Tensor, Tensor | None, list[SomeLogits]]:
    """Gradients of value and rpb; those of the logits were handed, tile by tile, to the logits made, returned too."""
    dtype = accumulator_dtype(value.dtype)
    grad_value = empty_like_layout(value, value.shape)
    total = (grad_value if grad_value.dtype == dtype else torch.empty_like(grad_value, dtype=dtype)).zero_()
    made: list[SomeLogits] = []

    def work(part: Part) -> Work[Tensor | None]:
        made.append(make_logits(part))
        table = None if rpb is None else rpb[part.groups]
        return _softmax_aggregate_backward(grad_out[part], made[-1], value[part], table, window, total[part])

    results = over_maps(work, value, _multiply_adds(value, window))
    if total is not grad_value:
        grad_value.copy_(total)
    if rpb is None:
        return grad_value, None, made
    grad_rpb = torch.zeros_like(rpb, dtype=dtype)
    for part, grad_table in results:
        assert grad_table is not None
        grad_rpb[part.groups] += grad_table
    return grad_value, grad_rpb.to(rpb.dtype), made


def _softmax_aggregate_backward(
    grad_out: Tensor, logits: Logits, value: Tensor, rpb: Tensor | None, window: Window, total: Tensor
) -> Work[Tensor | None]:
    """Adds to the gradient of value, and gives that of rpb."""
    bias = None if rpb is None else _PositionBias(rpb, window, *value.shape[3:])
    steps = steps_of(window, value)
    scratch, sum_scratch = (pixel_scratch(steps, value) for _ in range(2))
    weights, grad_weights = (_kernel_scratch(steps, value, window) for _ in range(2))
    bands = Bands(steps, value, window.kernel_size, channels_fastest(value))
    grad_bands = Bands(steps, value, window.kernel_size, input_major=True)

    def work(step: Step) -> Work[None]:
        pixels, sums = step.pixels(value, scratch), step.pixels(value, sum_scratch)
        weight, grad_biased = (w.take(*step.shape, math.prod(window.kernel_size)) for w in (weights, grad_weights))
        softmax, write = _softmax(logits, bias, step, weight), logits.writer(step)
        write_bias = None if bias is None else bias.writer(step)
        band, grad_band = bands.select(step), grad_bands.select(step)
        pairs, grad_pairs = (b.pairs(_kernel_first(w, window)) for b, w in ((band, weight), (grad_band, grad_biased)))
        sources, targets = step.pairs(pixels, value), step.pairs(sums, total)
        matrices, sum_matrices, grad_view = as_matrices(pixels).mT, as_matrices(sums), step.outputs(grad_out)
        yield
        softmax()
        grad = as_matrices(grad_view.to(total.dtype))
        band.lay(pairs)
        sum_matrices.copy_(band.scatter(grad))
        add(targets)
        load(pixels, sources)
        torch.bmm(matrices, grad, out=grad_band.bands)
        grad_band.pick(grad_pairs)
        grad_biased *= weight
        grad_biased.addcmul_(weight, grad_biased.sum(-1, keepdim=True), value=-1)
        write(grad_biased)
        if write_bias is not None:
            write_bias(grad_biased)

    yield from in_turn(map(work, steps))
    return None if bias is None else bias.gradient()
