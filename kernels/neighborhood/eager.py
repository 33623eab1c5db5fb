"""softmax over the window and aggregation, in plain PyTorch: the bands of ``aggregation.eager`` with a softmax before.

    p = softmax_k(logits[i,k] + rpb[(nbr(i,k) − i)/d + K − 1])     out[i] = Σ_k p[i,k] · value[nbr(i,k)]

The only tensor of the logits' size is their gradient: bias, softmax and band exist for one step at a time. The
backward pass runs the softmax again, which costs no more than recovering p from log Σ exp and is more accurate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aggregation.eager import Tiled, multiply
from kernels.aggregation.eager_tiles import Step
from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout
from kernels.parallel import Part, Work, alone, in_turn, over_maps
from kernels.windows import Window

# What one logit costs beyond its products, in multiply-adds of a matrix product: bias, exp, sum and copies.
LOGIT_COST = 32


_relative = functools.lru_cache(maxsize=256)(Window.relative)


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
        self._rows = _relative(window, height, 0, rpb.device)
        self._columns = _relative(window, width, 1, rpb.device)
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


def _kernel_last(kernel: Tensor) -> Tensor:
    """[n, b, g, Kh, Kw, R, T] as [n, b, g, R, T, Kh, Kw]"""
    return kernel.permute(0, 1, 2, 5, 6, 3, 4)


def _kernel_first(kernel: Tensor, window: Window) -> Tensor:
    """[n, b, g, R, T, K²] as [n, b, g, Kh, Kw, R, T]"""
    return kernel.unflatten(-1, window.kernel_size).permute(0, 1, 2, 5, 6, 3, 4)


class Logits(Protocol):
    """Logits of a part of the maps that are read, and their gradients taken, one step at a time."""

    def reader(self, step: Step) -> Callable[[Tensor | None], Tensor]:
        """Reads the logits [n, b, g, R, T, K²], as wide as an accumulator, plus a bias [n, 1, g, R, T, Kh, Kw]."""
        ...

    def writer(self, step: Step) -> Callable[[Tensor], object]:
        """Takes gradients [n, b, g, R, T, K²], as wide as an accumulator."""
        ...


class _StoredLogits:
    """Logits [B, G, Kh, Kw, H, W], and a tensor for their gradient."""

    def __init__(self, logits: Tensor, gradient: Tensor | None = None) -> None:
        self._logits, self._gradient = logits, gradient

    def reader(self, step: Step) -> Callable[[Tensor | None], Tensor]:
        part, dtype = _kernel_last(step.outputs(self._logits)), accumulator_dtype(self._logits.dtype)
        return lambda bias: (part.to(dtype) if bias is None else part.to(dtype) + bias).flatten(5)

    def writer(self, step: Step) -> Callable[[Tensor], object]:
        assert self._gradient is not None
        part = _kernel_last(step.outputs(self._gradient))
        return lambda grad: part.copy_(grad.view(part.shape))


def _softmax(logits: Logits, bias: _PositionBias | None, step: Step, weight: Tensor) -> Work[Tensor]:
    """Writes the softmax of a step's logits + rpb to weight [n, b, g, R, T, K²], and gives these logits."""
    read, read_bias = logits.reader(step), None if bias is None else bias.reader(step)

    def run() -> Tensor:
        biased = read(None if read_bias is None else read_bias())
        torch.softmax(biased, -1, out=weight)
        return biased

    return run


def _multiply_adds(value: Tensor, window: Window) -> int:
    return math.prod((*value.shape[:2], *value.shape[3:], *window.kernel_size, value.shape[2] + LOGIT_COST))


@alone
def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """out[b,g,d,i] = Σ_k p[i,k] · value[b,g,d,nbr(i,k)], and log Σ_k exp(logits + rpb).

    logits [B,G,Kh,Kw,H,W], value [B,G,D,H,W], rpb [G,2Kh−1,2Kw−1] or None -> out like value, [B,G,H,W] as wide as an
    accumulator.
    """
    return softmax_aggregate_made(lambda part: _StoredLogits(logits[part]), value, rpb, window)


def softmax_aggregate_made(
    make_logits: Callable[[Part], Logits], value: Tensor, rpb: Tensor | None, window: Window
) -> tuple[Tensor, Tensor]:
    """``softmax_aggregate`` with logits, of a part of the maps, that need not exist all at once."""
    out, dtype = empty_like_layout(value, value.shape), accumulator_dtype(value.dtype)
    log_sum_exp = torch.empty((*value.shape[:2], *value.shape[3:]), dtype=dtype, device=value.device)
    positions = math.prod(window.kernel_size)

    def prepare(part: Part) -> Work[None]:
        logits, values, target, statistics = make_logits(part), value[part], out[part], log_sum_exp[part]
        bias = None if rpb is None else _PositionBias(rpb[part.groups], window, *value.shape[3:])
        tiled = Tiled(window, values)
        weights = tiled.scratch(lambda step: math.prod(step.shape) * positions)

        def prepare_step(step: Step) -> Work[None]:
            weight = weights.take(*step.shape, positions)
            softmax, of_step = _softmax(logits, bias, step, weight), step.outputs(statistics)
            aggregate = tiled.aggregate(step, _kernel_first(weight, window), values, target)

            def run() -> None:
                biased = softmax()
                # The largest entry tells the normaliser: log Σ exp = max logit − log max p, and max p >= 1/K².
                of_step.copy_(biased.amax(-1) - weight.amax(-1).log())
                del biased
                aggregate()

            return run

        return in_turn(map(prepare_step, tiled.steps))

    over_maps(prepare, value, _multiply_adds(value, window))
    return out, log_sum_exp


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
    return grad_logits, *softmax_aggregate_made_backward(
        grad_out, lambda part: _StoredLogits(logits[part], grad_logits[part]), value, rpb, window
    )


def softmax_aggregate_made_backward(
    grad_out: Tensor, make_logits: Callable[[Part], Logits], value: Tensor, rpb: Tensor | None, window: Window
) -> tuple[Tensor, Tensor | None]:
    """Gradients of value and rpb; the logits made take theirs, tile by tile."""
    dtype, positions = accumulator_dtype(value.dtype), math.prod(window.kernel_size)
    grad_value = empty_like_layout(value, value.shape)
    total = (grad_value if grad_value.dtype == dtype else torch.empty_like(grad_value, dtype=dtype)).zero_()
    grad_rpb = None if rpb is None else torch.zeros_like(rpb, dtype=dtype)

    def prepare(part: Part) -> Work[Tensor | None]:
        logits, values, grads, sums = make_logits(part), value[part], grad_out[part], total[part]
        bias = None if rpb is None else _PositionBias(rpb[part.groups], window, *value.shape[3:])
        tiled = Tiled(window, values, transposed=True)
        scratches = [tiled.scratch(lambda step: math.prod(step.shape) * positions) for _ in range(2)]

        def prepare_step(step: Step) -> Work[None]:
            weight, grad = (scratch.take(*step.shape, positions) for scratch in scratches)
            softmax, outputs = _softmax(logits, bias, step, weight), tiled.outputs(step, grads)
            transpose = tiled.transpose(step, _kernel_first(weight, window), sums)
            correlate = tiled.correlate(step, values, _kernel_first(grad, window))
            writes = [taker.writer(step) for taker in (logits, bias) if taker is not None]

            def run() -> None:
                softmax()
                of_outputs = outputs()
                transpose(of_outputs)
                correlate(of_outputs)
                grad.mul_(weight).addcmul_(weight, grad.sum(-1, keepdim=True), value=-1)
                for write in writes:
                    write(grad)

            return run

        steps = in_turn(map(prepare_step, tiled.steps))

        def run() -> Tensor | None:
            steps()
            return None if bias is None else bias.gradient()

        return run

    for part, grad_table in over_maps(prepare, value, _multiply_adds(value, window)):
        if grad_rpb is not None and grad_table is not None:
            grad_rpb[part.groups] += grad_table
    if total is not grad_value:
        grad_value.copy_(total)
    return grad_value, None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype)
