"""Outlook attention in plain PyTorch: windows copied out a few rows of windows at a time, multiplied, summed back.

    p = softmax_source(scale · logits)      out[j] = Σ_{windows, targets t at j} Σ_s p[t, s] · value[source s]

A block of window rows and batch entries keeps the copied windows (K²/stride² times the map, if whole) in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["outlook", "outlook_backward"]

# Most elements of one block's copied windows: a share of the arguments' own size (lean in memory), within bounds. The
# upper bound is 2 MB in float32 on a CPU, so that they stay in cache.
BLOCK_SHARE = 2
BLOCK_ELEMENTS = {"cpu": 2**19}
BLOCK_ELEMENTS_ELSEWHERE = 2**24
FEWEST_BLOCK_ELEMENTS = 2**16


class _Block(NamedTuple):
    """Some batch entries and rows of windows, and the pixels they cover: ``size`` of them from ``corner`` on."""

    batch: slice
    window_rows: slice
    corner: tuple[int, int]
    size: tuple[int, int]
    grid: tuple[int, int]
    kernel_size: int
    stride: int

    def _parts(self, covered: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels that exist: in the covered area [b, rows, columns, C], and in the image [B, H, W, C]."""
        inside, outside = [], []
        for corner, size, length in zip(self.corner, self.size, image.shape[1:3], strict=True):
            low = min(max(corner, 0), length)
            high = max(low, min(corner + size, length))
            inside.append(slice(low - corner, high - corner))
            outside.append(slice(low, high))
        return covered[(slice(None), *inside)], image[(self.batch, *outside)]

    def _covered(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        return image.new_zeros((image[self.batch].shape[0], *self.size, image.shape[3]), dtype=dtype)

    def _windows_of(self, covered: Tensor, heads: int) -> Tensor:
        """[b, h, w, heads, K, K, D]: overlapping windows as a view."""
        batch, _, _, channels = covered.shape
        entry, row, column, channel = covered.stride()
        depth = channels // heads
        return covered.as_strided(
            (batch, *self.grid, heads, self.kernel_size, self.kernel_size, depth),
            (entry, row * self.stride, column * self.stride, channel * depth, row, column, channel),
        )

    def windows(self, image: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """Every window's pixels of image [B, H, W, C], zero outside: [b·h·w·heads, K², D]."""
        covered = self._covered(image, dtype)
        part, pixels = self._parts(covered, image)
        part.copy_(pixels)
        return self._windows_of(covered, heads).flatten(4, 5).flatten(0, 3)

    def add_to(self, image: Tensor, windows: Tensor, heads: int) -> None:
        """Sum windows [b·h·w·heads, K², D] into image [B, H, W, C] where they overlap; the outside is dropped."""
        covered = self._covered(image, image.dtype)
        targets = self._windows_of(covered, heads)
        windows = windows.view(targets.shape)
        for row in range(self.kernel_size):
            for column in range(self.kernel_size):
                # One position of every window: these never overlap.
                targets[..., row, column, :] += windows[..., row, column, :]
        part, pixels = self._parts(covered, image)
        pixels += part


def _blocks(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int) -> Iterator[_Block]:
    batch, height, width = logits.shape[:3]
    most = BLOCK_ELEMENTS.get(value.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    limit = min(most, max(FEWEST_BLOCK_ELEMENTS, (logits.numel() + value.numel()) // BLOCK_SHARE))
    row_elements = max(1, width * kernel_size**2 * value.shape[3])
    batch_step = max(1, min(batch, limit // row_elements))
    row_step = max(1, limit // (row_elements * batch_step))
    for first in range(0, batch, batch_step):
        for row in range(0, height, row_step):
            rows = min(row_step, height - row)
            yield _Block(
                slice(first, first + batch_step),
                slice(row, row + rows),
                (row * stride - padding, -padding),
                ((rows - 1) * stride + kernel_size, (width - 1) * stride + kernel_size),
                (rows, width),
                kernel_size,
                stride,
            )


def _accumulator(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


def _weights(logits: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax over the sources of logits [b, h, w, heads, K², K²]: [b·h·w·heads, K² targets, K² sources].

    Sources go first in memory for the softmax: over rows as short as 9, PyTorch's CPU kernel is eight times slower.
    """
    sources_first = logits.permute(4, 5, 0, 1, 2, 3).to(dtype) * scale
    return sources_first.softmax(1).permute(2, 3, 4, 5, 0, 1).contiguous().flatten(0, 3)


def outlook(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    """logits [B,h,w,heads,K²,K²] (target, source), value [B,H,W,C] -> [B,H,W,C], contiguous."""
    heads = logits.shape[3]
    out = _accumulator(value)
    for block in _blocks(logits, value, kernel_size, stride, padding):
        weights = _weights(logits[block.batch, block.window_rows], scale, out.dtype)
        block.add_to(out, torch.bmm(weights, block.windows(value, heads, out.dtype)), heads)
    return out.to(value.dtype)


def outlook_backward(
    grad_out: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    """dvalue[s] = Σ_t p[t,s] · grad_out[t];  dp[t,s] = Σ_c grad_out[t] · value[s];
    dlogits = scale · p · (dp − Σ_s p·dp)."""
    heads = logits.shape[3]
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_value = _accumulator(value)
    for block in _blocks(logits, value, kernel_size, stride, padding):
        part = logits[block.batch, block.window_rows]
        weights = _weights(part, scale, grad_value.dtype)
        grads = block.windows(grad_out, heads, grad_value.dtype)
        block.add_to(grad_value, torch.bmm(weights.mT, grads), heads)
        sources = block.windows(value, heads, grad_value.dtype).mT.contiguous()  # pays: bmm is slow on a transpose
        products = torch.bmm(grads, sources).mul_(weights)
        products.addcmul_(weights, products.sum(-1, keepdim=True), value=-1)
        grad_logits[block.batch, block.window_rows] = products.mul_(scale).view(part.shape)
    return grad_logits, grad_value.to(value.dtype)
