"""softmax over the window and aggregation, in plain PyTorch: the bands of ``aggregation.eager`` with a softmax before.

    p = softmax_k(logits[i,k] + rpb[(nbr(i,k) − i)/d + K − 1])     out[i] = Σ_k p[i,k] · value[nbr(i,k)]

No tensor of the size of the logits is made but their gradient: bias, softmax and band exist for one tile at a time. The
backward pass runs the softmax again, which costs no more than recovering p from log Σ exp and is more accurate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aggregation.eager import Bands, Strip, Tiles, accumulator_dtype, as_matrices, multiply, strips
from kernels.layout import channels_fastest, empty_like_layout
from kernels.windows import Window

__all__ = ["softmax_aggregate", "softmax_aggregate_backward"]


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

    def tile(self, strip: Strip, tile: Tiles) -> Tensor:
        """[n, 1, g, R, T, Kh, Kw]"""
        rows, columns = self._rows[tile.outputs], strip.column_tiles.outputs
        bias = self._spread[strip.maps[1], :, columns].index_select(1, rows.flatten())
        bias = bias.unflatten(1, rows.shape).unflatten(3, (len(strip.columns), -1))  # [g, R, Kh, n, T, Kw]
        return bias.permute(3, 0, 1, 4, 2, 5).unsqueeze(1)

    def zeros(self) -> Tensor:
        """The gradient of the spread table, to be filled by ``accumulate``."""
        return torch.zeros_like(self._spread)

    def accumulate(self, spread_grad: Tensor, strip: Strip, tile: Tiles, grad: Tensor) -> None:
        """Add grad [n, b, g, R, T, Kh, Kw] over the batch and the tile's rows.

        A product with a one-hot matrix, not index_add: the same bits on every run, on every device.
        """
        rows = F.one_hot(self._rows[tile.outputs].flatten(), self.rpb.shape[1]).to(grad.dtype)  # [R·Kh, 2Kh−1]
        grad = grad.sum(1).permute(1, 2, 4, 0, 3, 5)  # [g, R, Kh, n, T, Kw]
        summed = rows.mT @ grad.flatten(1, 2).flatten(2)
        spread_grad[strip.maps[1], :, strip.column_tiles.outputs] += summed.unflatten(2, (-1, self._kernel_size[1]))

    def gradient(self, spread_grad: Tensor) -> Tensor:
        columns = F.one_hot(self._columns.flatten(), self.rpb.shape[2]).to(spread_grad.dtype)  # [W·Kw, 2Kw−1]
        return (spread_grad.flatten(2) @ columns).to(self.rpb.dtype)


def _biased(logits: Tensor, bias: _PositionBias | None, strip: Strip, tile: Tiles) -> Tensor:
    """A tile's logits + rpb, [n, b, g, R, T, K²], as wide as an accumulator; may share memory with the logits."""
    part = strip.outputs(logits, tile).permute(0, 1, 2, 5, 6, 3, 4).to(accumulator_dtype(logits.dtype))
    if bias is not None:
        part = part + bias.tile(strip, tile)
    return part.flatten(5)


def softmax_aggregate(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """out[b,g,d,i] = Σ_k p[i,k] · value[b,g,d,nbr(i,k)], and log Σ_k exp(logits + rpb).

    logits [B,G,Kh,Kw,H,W], value [B,G,D,H,W], rpb [G,2Kh−1,2Kw−1] or None -> out like value, [B,G,H,W] in float32 (float64
    for float64).
    """
    batch, groups, _, height, width = value.shape
    out = empty_like_layout(value, value.shape)
    log_sum_exp = value.new_empty((batch, groups, height, width), dtype=accumulator_dtype(value.dtype))
    bias = None if rpb is None else _PositionBias(rpb, window, height, width)
    bands = Bands(value, window.kernel_size, input_major=not channels_fastest(value))
    for strip in strips(window, value):
        pixels = strip.load(value)
        for tile in strip.row_tiles:
            biased = _biased(logits, bias, strip, tile)
            weight = biased.softmax(-1)
            # The largest entry tells the normaliser: log Σ exp = max logit − log max p, and max p >= 1/K².
            strip.outputs(log_sum_exp, tile).copy_(biased.amax(-1) - weight.amax(-1).log())
            band = bands.select(strip, tile)
            bands.lay(weight.unflatten(-1, window.kernel_size).permute(0, 1, 2, 5, 6, 3, 4))
            sums = multiply(as_matrices(strip.positions(pixels, tile)), band)
            target = strip.outputs(out, tile)
            target.copy_(sums.unflatten(0, strip.leading).unflatten(-1, target.shape[4:]))
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
    height, width = value.shape[3:]
    grad_logits, grad_value = empty_like_layout(logits, logits.shape), empty_like_layout(value, value.shape)
    dtype = accumulator_dtype(value.dtype)
    total = (grad_value if grad_value.dtype == dtype else torch.empty_like(grad_value, dtype=dtype)).zero_()
    bias = None if rpb is None else _PositionBias(rpb, window, height, width)
    grad_spread = None if bias is None else bias.zeros()
    bands = Bands(value, window.kernel_size, input_major=channels_fastest(value))
    grad_bands = Bands(value, window.kernel_size, input_major=True)
    for strip in strips(window, value):
        pixels = strip.load(value)
        grad_pixels = torch.zeros_like(pixels)
        for tile in strip.row_tiles:
            grad = as_matrices(strip.outputs(grad_out, tile).to(dtype))
            weight = _biased(logits, bias, strip, tile).softmax(-1)

            band = bands.select(strip, tile)
            bands.lay(weight.unflatten(-1, window.kernel_size).permute(0, 1, 2, 5, 6, 3, 4))
            positions = strip.positions(grad_pixels, tile)
            positions += multiply(grad, band.mT).unflatten(0, strip.leading).unflatten(-1, positions.shape[4:])

            grad_band = grad_bands.select(strip, tile)
            torch.bmm(as_matrices(strip.positions(pixels, tile)).mT, grad, out=grad_band)
            grad_weight = torch.empty_like(weight).unflatten(-1, window.kernel_size)
            grad_bands.pick(grad_weight.permute(0, 1, 2, 5, 6, 3, 4))
            grad_weight = grad_weight.flatten(5)
            grad_biased = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, dtype)
            grad_biased = grad_biased.unflatten(-1, window.kernel_size)
            strip.outputs(grad_logits, tile).copy_(grad_biased.permute(0, 1, 2, 5, 6, 3, 4))
            if bias is not None and grad_spread is not None:
                bias.accumulate(grad_spread, strip, tile, grad_biased)
        strip.add_to(total, grad_pixels)
    if total is not grad_value:
        grad_value.copy_(total)
    grad_rpb = None if bias is None or grad_spread is None else bias.gradient(grad_spread)
    return grad_logits, grad_value, grad_rpb
