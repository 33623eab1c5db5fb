"""softmax over the window and aggregation, in plain PyTorch: the bands of ``aggregation.eager`` with a softmax before.

    p = softmax_k(logits[i,k] + rpb[(nbr(i,k) − i)/d + K − 1])     out[i] = Σ_k p[i,k] · value[nbr(i,k)]

No tensor of the size of the logits is made but their gradient: bias, softmax and band exist for one tile at a time. The
backward pass runs the softmax again, which costs no more than recovering p from log Σ exp and is more accurate.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aggregation.eager import Bands, Strip, as_matrices, multiply, strips, tile_of
from kernels.aggregation.eager_tiles import Tiles
from kernels.dtypes import accumulator_dtype
from kernels.layout import channels_fastest, empty_like_layout
from kernels.windows import Window

__all__ = [
    "Logits",
    "softmax_aggregate",
    "softmax_aggregate_backward",
    "softmax_aggregate_made",
    "softmax_aggregate_made_backward",
]


class _PositionBias:
    """rpb [G, 2Kh−1, 2Kw−1] at every (output, window position), and the sum back into that table.

    Columns are spread once for the whole map ([G, 2Kh−1, W, Kw]), rows tile by tile.
    """

    def __init__(self, rpb: Tensor, window: Window, height: int, width: int) -> None:
        self.rpb, self._kernel_size = rpb, window.kernel_size
        indices = []
        for axis, length in enumerate((height, width)):
            query = torch.arange(length, device=rpb.device)[:, None]
            distance = window.neighbours(length, axis, rpb.device) - query
            indices.append(torch.div(distance, window.dilation[axis], rounding_mode="floor"))
        self._rows, self._columns = (i + k - 1 for i, k in zip(indices, window.kernel_size, strict=True))
        self._spread = rpb.to(accumulator_dtype(rpb.dtype))[:, :, self._columns]

    def _rows_of(self, strip: Strip, tile: Tiles) -> Tensor:
        """Row of the table for every row of the tile and of the window, [R, Kh]."""
        return self._rows[strip.output_rows].narrow(0, tile.first, tile.count)

    def tile(self, strip: Strip, tile: Tiles) -> Tensor:
        """[n, 1, g, R, T, Kh, Kw]"""
        rows = self._rows_of(strip, tile)
        bias = self._spread[strip.maps[1], :, strip.output_columns].index_select(1, rows.flatten())
        bias = bias.unflatten(1, rows.shape).unflatten(3, (strip.leading[0], -1))  # [g, R, Kh, n, T, Kw]
        return bias.permute(3, 0, 1, 4, 2, 5).unsqueeze(1)

    def zeros(self) -> Tensor:
        """The gradient of the spread table, to be filled by ``accumulate``."""
        return torch.zeros_like(self._spread)

    def accumulate(self, spread_grad: Tensor, strip: Strip, tile: Tiles, grad: Tensor) -> None:
        """Add grad [n, b, g, R, T, Kh, Kw] over the batch and the tile's rows.

        A product with a one-hot matrix, not index_add: the same bits on every run, on every device.
        """
        rows = F.one_hot(self._rows_of(strip, tile).flatten(), self.rpb.shape[1]).to(grad.dtype)  # [R·Kh, 2Kh−1]
        grad = grad.sum(1).permute(1, 2, 4, 0, 3, 5)  # [g, R, Kh, n, T, Kw]
        summed = rows.mT @ grad.flatten(1, 2).flatten(2)
        spread_grad[strip.maps[1], :, strip.output_columns] += summed.unflatten(2, (-1, self._kernel_size[1]))

    def gradient(self, spread_grad: Tensor) -> Tensor:
        columns = F.one_hot(self._columns.flatten(), self.rpb.shape[2]).to(spread_grad.dtype)  # [W·Kw, 2Kw−1]
        return (spread_grad.flatten(2) @ columns).to(self.rpb.dtype)


def _kernel_last(kernel: Tensor) -> Tensor:
    """[n, b, g, Kh, Kw, R, T] as [n, b, g, R, T, Kh, Kw]"""
    return kernel.permute(0, 1, 2, 5, 6, 3, 4)


def _kernel_first(kernel: Tensor, window: Window) -> Tensor:
    """[n, b, g, R, T, K²] as [n, b, g, Kh, Kw, R, T]"""
    return kernel.unflatten(-1, window.kernel_size).permute(0, 1, 2, 5, 6, 3, 4)


class Logits(Protocol):
    """Logits of a whole map that are read, and their gradients taken, one tile at a time."""

    fresh: bool
    """Whether a tile read is memory of its own, to be written over."""

    def read(self, strip: Strip, tile: Tiles) -> Tensor:
        """[n, b, g, R, T, Kh, Kw], as wide as an accumulator."""
        ...

    def write_gradient(self, strip: Strip, tile: Tiles, grad: Tensor) -> None:
        """[n, b, g, R, T, Kh·Kw], as wide as an accumulator."""
        ...


class _StoredLogits:
    """Logits [B, G, Kh, Kw, H, W], and a tensor for their gradient."""

    fresh = False

    def __init__(self, logits: Tensor, window: Window, gradient: Tensor | None = None) -> None:
        self._logits, self._window, self._gradient = logits, window, gradient

    def read(self, strip: Strip, tile: Tiles) -> Tensor:
        return _kernel_last(tile_of(strip.outputs(self._logits), tile)).to(accumulator_dtype(self._logits.dtype))

    def write_gradient(self, strip: Strip, tile: Tiles, grad: Tensor) -> None:
        assert self._gradient is not None
        tile_of(strip.outputs(self._gradient), tile).copy_(_kernel_first(grad, self._window))


def _biased(logits: Logits, bias: _PositionBias | None, strip: Strip, tile: Tiles) -> Tensor:
    """A tile's logits + rpb, [n, b, g, R, T, K²]; may share memory with the logits."""
    part = logits.read(strip, tile)
    if bias is None:
        return part.flatten(5)
    if logits.fresh:  # the bias is as good as contiguous, and copied once for the whole batch
        return part.flatten(5).add_(bias.tile(strip, tile).flatten(5))
    return (part + bias.tile(strip, tile)).flatten(5)


def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """out[b,g,d,i] = Σ_k p[i,k] · value[b,g,d,nbr(i,k)], and log Σ_k exp(logits + rpb).

    logits [B,G,Kh,Kw,H,W], value [B,G,D,H,W], rpb [G,2Kh−1,2Kw−1] or None -> out like value, [B,G,H,W] as wide as an
    accumulator.
    """
    return softmax_aggregate_made(_StoredLogits(logits, window), value, rpb, window)


def softmax_aggregate_made(logits: Logits, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """``softmax_aggregate`` with logits that need not exist all at once."""
    batch, groups, _, height, width = value.shape
    out = empty_like_layout(value, value.shape)
    statistics_dtype = accumulator_dtype(value.dtype)
    log_sum_exp = torch.empty((batch, groups, height, width), dtype=statistics_dtype, device=value.device)
    bias = None if rpb is None else _PositionBias(rpb, window, height, width)
    bands = Bands(value, window.kernel_size, input_major=not channels_fastest(value))
    for strip in strips(window, value):
        pixels = as_matrices(strip.load(value))
        target, statistics = strip.outputs(out), strip.outputs(log_sum_exp)
        for tile in strip.row_tiles:
            biased = _biased(logits, bias, strip, tile)
            weight = biased.softmax(-1)
            # The largest entry tells the normaliser: log Σ exp = max logit − log max p, and max p >= 1/K².
            tile_of(statistics, tile).copy_(biased.amax(-1) - weight.amax(-1).log())
            band = bands.select(strip, tile)
            bands.lay(_kernel_first(weight, window))
            part = tile_of(target, tile)
            part.copy_(multiply(strip.covered(pixels, tile), band).view(part.shape))
        del pixels  # before the next strip is loaded
    return out, log_sum_exp


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
    stored = _StoredLogits(logits, window, grad_logits)
    grad_value, grad_rpb = softmax_aggregate_made_backward(grad_out, stored, value, rpb, window)
    return grad_logits, grad_value, grad_rpb


def softmax_aggregate_made_backward(
    grad_out: Tensor, logits: Logits, value: Tensor, rpb: Tensor | None, window: Window
) -> tuple[Tensor, Tensor | None]:
    """Gradients of value and rpb; those of the logits are handed over tile by tile."""
    height, width = value.shape[3:]
    dtype = accumulator_dtype(value.dtype)
    grad_value = empty_like_layout(value, value.shape)
    total = (grad_value if grad_value.dtype == dtype else torch.empty_like(grad_value, dtype=dtype)).zero_()
    bias = None if rpb is None else _PositionBias(rpb, window, height, width)
    grad_spread = None if bias is None else bias.zeros()
    bands = Bands(value, window.kernel_size, input_major=channels_fastest(value))
    grad_bands = Bands(value, window.kernel_size, input_major=True)
    for strip in strips(window, value):
        pixels, sums = as_matrices(strip.load(value)), strip.zeros(value)
        matrices = as_matrices(sums)
        strip_grad = strip.outputs(grad_out)
        for tile in strip.row_tiles:
            grad = as_matrices(tile_of(strip_grad, tile).to(dtype))
            weight = _biased(logits, bias, strip, tile).softmax(-1)

            band = bands.select(strip, tile)
            bands.lay(_kernel_first(weight, window))
            covered = strip.covered(matrices, tile)
            covered += multiply(grad, band.mT)

            torch.bmm(strip.covered(pixels, tile).mT, grad, out=grad_bands.select(strip, tile))
            grad_biased = torch.empty_like(weight)
            grad_bands.pick(_kernel_first(grad_biased, window))
            grad_biased *= weight
            grad_biased.addcmul_(weight, grad_biased.sum(-1, keepdim=True), value=-1)
            logits.write_gradient(strip, tile, grad_biased)
            if bias is not None and grad_spread is not None:
                bias.accumulate(grad_spread, strip, tile, grad_biased.unflatten(-1, window.kernel_size))
        strip.add_to(total, sums)
        del pixels, sums, matrices, covered  # before the next strip is loaded
    if total is not grad_value:
        grad_value.copy_(total)
    grad_rpb = None if bias is None or grad_spread is None else bias.gradient(grad_spread)
    return grad_value, grad_rpb
