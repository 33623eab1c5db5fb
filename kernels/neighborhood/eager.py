"""softmax over the window and aggregation, in plain PyTorch: the bands of ``aggregation.eager`` with a softmax before.

    p = softmax_k(logits[i,k] + rpb[(nbr(i,k) − i)/d + K − 1])     out[i] = Σ_k p[i,k] · value[nbr(i,k)]

The only tensor of the logits' size is their gradient: bias, softmax and band exist for one step at a time. The
backward pass runs the softmax again, which costs no more than recovering p from log Σ exp and is more accurate.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aggregation.eager import Band, multiply, pick
from kernels.aggregation.eager_tiles import Step, steps_of
from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_like_layout, empty_softmax_outputs, zero_sums
from kernels.parallel import Part, alone, over_maps
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
        self._rows = _relative(window, height, 0, rpb.device)
        self._columns = _relative(window, width, 1, rpb.device)
        self._spread = rpb.to(accumulator_dtype(rpb.dtype))[:, :, self._columns]
        self.gradient = torch.zeros_like(rpb, dtype=self._spread.dtype)

    def read(self, step: Step) -> Tensor:
        """[1, g, n, R, T, Kh, Kw]"""
        rows, columns = self._rows[step.rows.outputs], self._spread[step.maps[1], :, step.columns.outputs]
        spread = columns.index_select(1, rows.flatten()).unflatten(1, rows.shape)
        return spread.unflatten(3, (step.leading[2], -1)).permute(0, 3, 1, 4, 2, 5).unsqueeze(0)

    def add(self, step: Step, grad: Tensor) -> None:
        """Adds gradients [b, g, n, R, T, Kh, Kw], summed over the batch and the step's pixels."""
        rows, columns = self._rows[step.rows.outputs], self._columns[step.columns.outputs]
        by_rows = grad.sum(0).permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(1, 3)  # [g, n·T·Kw, R·Kh]
        summed = _sum_by_index(by_rows, rows, self.gradient.shape[1])
        self.gradient[step.maps[1]] += _sum_by_index(summed.mT, columns, self.gradient.shape[2])


# Logits of a step of a part of the maps, [b, g, n, R, T, Kh, Kw], and what takes their gradients, as wide as an
# accumulator.
Read = Callable[[Part, Step], Tensor]
Add = Callable[[Part, Step, Tensor], None]


def _softmax(read: Tensor, bias: _PositionBias | None, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The softmax of a step's logits + rpb, and these, [b, g, n, R, T, K²]."""
    biased = (read.to(dtype) if bias is None else read + bias.read(step)).flatten(5)
    return biased.softmax(-1), biased


def _multiply_adds(value: Tensor, window: Window) -> int:
    return math.prod((*value.shape[:2], *value.shape[3:], *window.kernel_size, value.shape[2] + LOGIT_COST))


@alone
def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """out[b,g,d,i] = Σ_k p[i,k] · value[b,g,d,nbr(i,k)], and log Σ_k exp(logits + rpb).

    logits [B,G,Kh,Kw,H,W], value [B,G,D,H,W], rpb [G,2Kh−1,2Kw−1] or None -> out like value, [B,G,H,W] as wide as an
    accumulator.
    """
    return softmax_aggregate_made(lambda part, step: step.kernel(logits[part]), value, rpb, window)


def softmax_aggregate_made(read: Read, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """``softmax_aggregate`` with logits that need not exist all at once."""
    out, log_sum_exp = empty_softmax_outputs(value)

    def run(part: Part) -> None:
        values = value[part]
        bias = None if rpb is None else _PositionBias(rpb[part.groups], window, *value.shape[3:])
        for step in steps_of(window, values):
            weight, biased = _softmax(read(part, step), bias, step, log_sum_exp.dtype)
            # The largest entry tells the normaliser: log Σ exp = max logit − log max p, and max p >= 1/K².
            step.outputs(log_sum_exp[part]).copy_(biased.amax(-1) - weight.amax(-1).log())
            del biased
            band, target = Band(step, weight.unflatten(-1, window.kernel_size)), step.outputs(out[part])
            target.copy_(band.gather(step.pixels(values)).view(target.shape))

    over_maps(run, value, _multiply_adds(value, window))
    return out, log_sum_exp


@alone
def softmax_aggregate_backward(
    grad_out: Tensor,
    logits: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor | None,
    log_sum_exp: Tensor | None,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dlogits = p · (dp − Σ_k p·dp) with dp[i,k] = Σ_d grad_out[i] · value[nbr(i,k)]; dvalue = transpose(p, grad_out);
    drpb sums dlogits over batch and pixels. ``out`` and ``log_sum_exp`` are not needed here."""
    grad_logits = empty_like_layout(logits)

    def add(part: Part, step: Step, grad: Tensor) -> None:
        step.kernel(grad_logits[part]).copy_(grad)

    return grad_logits, *softmax_aggregate_made_backward(
        grad_out, lambda part, step: step.kernel(logits[part]), add, value, rpb, window
    )


def softmax_aggregate_made_backward(
    grad_out: Tensor, read: Read, add: Add, value: Tensor, rpb: Tensor | None, window: Window
) -> tuple[Tensor, Tensor | None]:
    """Gradients of value and rpb; ``add`` takes those of the logits, tile by tile."""
    grad_value = zero_sums(value, value.shape)
    dtype = grad_value.dtype
    grad_rpb = None if rpb is None else torch.zeros_like(rpb, dtype=dtype)

    def run(part: Part) -> Tensor | None:
        values = value[part]
        bias = None if rpb is None else _PositionBias(rpb[part.groups], window, *value.shape[3:])
        for step in steps_of(window, values):
            weight, grads = _softmax(read(part, step), bias, step, dtype)[0], step.features(grad_out[part])
            step.add(Band(step, weight.unflatten(-1, window.kernel_size)).scatter(grads), grad_value[part])
            grad = pick(step, step.pixels(values), grads).flatten(5).mul_(weight)
            grad = grad.addcmul_(weight, grad.sum(-1, keepdim=True), value=-1).unflatten(-1, window.kernel_size)
            add(part, step, grad)
            if bias is not None:
                bias.add(step, grad)
        return None if bias is None else bias.gradient

    for part, grad_table in over_maps(run, value, _multiply_adds(value, window)):
        if grad_rpb is not None and grad_table is not None:
            grad_rpb[part.groups] += grad_table
    return grad_value.to(value.dtype), None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype)
