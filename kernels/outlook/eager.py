"""Outlook attention in plain PyTorch: windows copied out a few rows of windows at a time, multiplied, summed back.

    p = softmax_source(scale · logits)      out[j] = Σ_{windows, targets t at j} Σ_s p[t, s] · value[source s]

A step takes as many windows as a cache holds copied out: K²/stride² times their part of the map.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.parallel import Part, alone, over_maps

# Most elements of the windows that a step copies: a share of the arguments' own size (lean in memory), within bounds.
# The upper bound is 2 MB in float32 on a CPU, so that they stay in cache.
BLOCK_SHARE = 2
BLOCK_ELEMENTS = {"cpu": 2**19}
BLOCK_ELEMENTS_ELSEWHERE = 2**24
FEWEST_BLOCK_ELEMENTS = 2**16


class _Area(NamedTuple):
    """Pixels that lie under a step's windows, in memory of its own; beside the image they are zeros."""

    windows: Tensor  # [b, h, w, heads, K, K, D], a view in which they overlap
    inside: Tensor  # those on the image, [b, rows, columns, heads, D], a view
    pixels: Tensor  # the same of the image itself, a view

    def load(self) -> Tensor:
        """A copy of every window, [b·h·w·heads, K², D]."""
        self.inside.copy_(self.pixels)
        return self.windows.clone(memory_format=torch.contiguous_format).flatten(4, 5).flatten(0, 3)

    def add(self, windows: Tensor) -> None:
        """Sum windows [b·h·w·heads, K², D] into the image where they overlap; what falls beside it is dropped."""
        windows = windows.view(self.windows.shape)
        for row, column in product(*map(range, windows.shape[4:6])):  # of which no two overlap
            self.windows[..., row, column, :] += windows[..., row, column, :]
        self.pixels.add_(self.inside)


class _Step(NamedTuple):
    """Some batch entries and rows of windows."""

    entries: slice
    rows: slice
    columns: int  # of windows
    kernel_size: int
    stride: int
    padding: int

    def area(self, image: Tensor) -> _Area:
        """Of an image [B, heads, H, W, D]."""
        pixels = image[self.entries].permute(0, 2, 3, 1, 4)
        batch, length, width, *channels = pixels.shape
        height, least = (
            (n - 1) * self.stride + self.kernel_size for n in (self.rows.stop - self.rows.start, self.columns)
        )
        size = batch, height, max(least, self.padding + width), *channels
        area = torch.zeros(size, dtype=accumulator_dtype(image.dtype), device=image.device)
        windows = area.unfold(1, self.kernel_size, self.stride).unfold(2, self.kernel_size, self.stride)
        windows = windows[:, :, : self.columns].permute(0, 1, 2, 3, 5, 6, 4)
        top = self.rows.start * self.stride - self.padding
        first, last = (min(max(row, 0), length) for row in (top, top + height))
        inside = area[:, first - top : last - top, self.padding : self.padding + width]
        return _Area(windows, inside, pixels[:, first:last])


def _steps(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int) -> list[_Step]:
    """Of logits [B, heads, h, w, K², K²] and value [B, heads, H, W, D]."""
    batch, heads, height, width = logits.shape[:4]
    most = BLOCK_ELEMENTS.get(value.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    limit = min(most, max(FEWEST_BLOCK_ELEMENTS, (logits.numel() + value.numel()) // BLOCK_SHARE))
    row_elements = max(1, width * kernel_size**2 * heads * value.shape[4])
    batch_step = max(1, min(batch, limit // row_elements))
    row_step = max(1, limit // (row_elements * batch_step))
    padding = min(padding, max(height, width) * stride + kernel_size)  # further away no window holds a pixel either
    return [
        _Step(
            slice(first, min(first + batch_step, batch)), slice(row, min(row + row_step, height)),
            width, kernel_size, stride, padding,
        )
        for first in range(0, batch, batch_step)
        for row in range(0, height, row_step)
    ]  # fmt: skip


def _by_head(image: Tensor, heads: int) -> Tensor:
    """[B, H, W, C] as [B, heads, H, W, C/heads]"""
    return image.unflatten(3, (heads, -1)).movedim(3, 1)


def _weights(logits: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax over the sources of logits [b, heads, h, w, K², K²]: [b·h·w·heads, K² targets, K² sources].

    Sources go first in memory for the softmax: over rows as short as 9, PyTorch's CPU kernel is eight times slower.
    """
    sources_first = logits.permute(4, 5, 0, 2, 3, 1).to(dtype) * scale
    return sources_first.softmax(1).permute(2, 3, 4, 5, 0, 1).contiguous().flatten(0, 3)


@alone
def outlook(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    """logits [B,h,w,heads,K²,K²] (target, source), value [B,H,W,C] -> [B,H,W,C], contiguous."""
    out = torch.zeros(value.shape, dtype=accumulator_dtype(value.dtype), device=value.device)
    maps = logits.movedim(3, 1), *(_by_head(image, logits.shape[3]) for image in (value, out))

    def run(part: Part) -> None:
        logits, value, out = (tensor[part] for tensor in maps)
        for step in _steps(logits, value, kernel_size, stride, padding):
            weights = _weights(logits[step.entries, :, step.rows], scale, out.dtype)
            step.area(out).add(torch.bmm(weights, step.area(value).load()))

    over_maps(run, maps[0], logits.numel() * maps[1].shape[4])
    return out.to(value.dtype)


@alone
def outlook_backward(
    grad_out: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    """dvalue[s] = Σ_t p[t,s] · grad_out[t];  dp[t,s] = Σ_c grad_out[t] · value[s];
    dlogits = scale · p · (dp − Σ_s p·dp)."""
    heads = logits.shape[3]
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_value = torch.zeros(value.shape, dtype=accumulator_dtype(value.dtype), device=value.device)
    maps = logits.movedim(3, 1), grad_logits.movedim(3, 1), *(_by_head(t, heads) for t in (grad_out, value, grad_value))

    def run(part: Part) -> None:
        logits, grad_logits, grad_out, value, grad_value = (tensor[part] for tensor in maps)
        for step in _steps(logits, value, kernel_size, stride, padding):
            of_logits, target = (tensor[step.entries, :, step.rows] for tensor in (logits, grad_logits))
            weights, grad = _weights(of_logits, scale, grad_value.dtype), step.area(grad_out).load()
            step.area(grad_value).add(torch.bmm(weights.mT, grad))
            values = step.area(value).load().mT.contiguous()  # bmm is slow on a transpose
            products = torch.bmm(grad, values).mul_(weights)
            products.addcmul_(weights, products.sum(-1, keepdim=True), value=-1).mul_(scale)
            target = target.permute(0, 2, 3, 1, 4, 5)
            target.copy_(products.view(target.shape))

    over_maps(run, maps[0], logits.numel() * maps[3].shape[4])
    return grad_logits, grad_value.to(value.dtype)
