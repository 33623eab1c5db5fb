"""Outlook attention in plain PyTorch: windows copied out a few rows of windows at a time, multiplied, summed back.

    p = softmax_source(scale · logits)      out[j] = Σ_{windows, targets t at j} Σ_s p[t, s] · value[source s]

A step takes as many windows as a cache holds copied out: K²/stride² times their part of the map.
"""

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.eager import Scratch
from kernels.dtypes import accumulator_dtype
from kernels.parallel import Part, Work, alone, in_turn, over_maps

# Most elements of the windows that a step copies: a share of the arguments' own size (lean in memory), within bounds.
# The upper bound is 2 MB in float32 on a CPU, so that they stay in cache.
BLOCK_SHARE = 2
BLOCK_ELEMENTS = {"cpu": 2**19}
BLOCK_ELEMENTS_ELSEWHERE = 2**24
FEWEST_BLOCK_ELEMENTS = 2**16


class _Step(NamedTuple):
    """Some batch entries and rows of windows."""

    entries: slice
    rows: slice
    columns: int  # of windows
    kernel_size: int
    stride: int
    padding: int

    def area(self, image: Tensor) -> tuple[int, ...]:
        """Of the pixels under its windows, [b, rows, columns, heads, D], for an image [B, heads, H, W, D]."""
        _, heads, _, width, channels = image.shape
        rows, columns = self.rows.stop - self.rows.start, self.columns
        height, least = ((count - 1) * self.stride + self.kernel_size for count in (rows, columns))
        return self.entries.stop - self.entries.start, height, max(least, self.padding + width), heads, channels

    def matrices(self, image: Tensor) -> tuple[int, int, int]:
        """Of its windows, [b·h·w·heads, K², D]."""
        entries, rows = self.entries.stop - self.entries.start, self.rows.stop - self.rows.start
        return entries * rows * self.columns * image.shape[1], self.kernel_size**2, image.shape[4]


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


class _Area:
    """The pixels of an image [B, heads, H, W, D] that lie under a step's windows, and zeros beside the image.

    Attributes:
        windows: [b, h, w, heads, K, K, D], a view in which they overlap.
    """

    def __init__(self, image: Tensor, step: _Step, scratch: Scratch) -> None:
        self._all = scratch.take(*step.area(image))
        top, (length, width) = step.rows.start * step.stride - step.padding, image.shape[2:4]
        first, last = (min(max(row, 0), length) for row in (top, top + self._all.shape[1]))
        self._inside = self._all[:, first - top : last - top, step.padding : step.padding + width]
        self._pixels = image[step.entries, :, first:last].permute(0, 2, 3, 1, 4)
        windows = self._all.unfold(1, step.kernel_size, step.stride).unfold(2, step.kernel_size, step.stride)
        self.windows = windows[:, :, : step.columns].permute(0, 1, 2, 3, 5, 6, 4)

    def load(self) -> Tensor:
        """A copy of every window, [b·h·w·heads, K², D]."""
        self._all.zero_()
        self._inside.copy_(self._pixels)
        return self.windows.clone(memory_format=torch.contiguous_format).flatten(4, 5).flatten(0, 3)

    def add(self, windows: Tensor) -> None:
        """Sum windows [b·h·w·heads, K², D] into the image where they overlap; what falls beside it is dropped."""
        self._all.zero_()
        windows = windows.view(self.windows.shape)
        for row, column in product(*map(range, windows.shape[4:6])):  # of which no two overlap
            self.windows[..., row, column, :] += windows[..., row, column, :]
        self._pixels += self._inside


def _by_head(image: Tensor, heads: int) -> Tensor:
    """[B, H, W, C] as [B, heads, H, W, C/heads]"""
    return image.unflatten(3, (heads, -1)).movedim(3, 1)


def _weights(logits: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax over the sources of logits [b, heads, h, w, K², K²]: [b·h·w·heads, K² targets, K² sources].

    Sources go first in memory for the softmax: over rows as short as 9, PyTorch's CPU kernel is eight times slower.
    """
    sources_first = logits.permute(4, 5, 0, 2, 3, 1).to(dtype) * scale
    return sources_first.softmax(1).permute(2, 3, 4, 5, 0, 1).contiguous().flatten(0, 3)


def _memory(steps: list[_Step], image: Tensor) -> tuple[Scratch, Scratch, Scratch]:
    """For one step after the other: an area that is loaded, one that is summed into, and its windows."""
    areas = [math.prod(step.area(image)) for step in steps]
    return Scratch(image, areas), Scratch(image, areas), Scratch(image, (math.prod(s.matrices(image)) for s in steps))


@alone
def outlook(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    """logits [B,h,w,heads,K²,K²] (target, source), value [B,H,W,C] -> [B,H,W,C], contiguous."""
    out = torch.zeros(value.shape, dtype=accumulator_dtype(value.dtype), device=value.device)
    maps = logits.movedim(3, 1), *(_by_head(image, logits.shape[3]) for image in (value, out))

    def work(part: Part) -> Work[None]:
        logits, value, out = (tensor[part] for tensor in maps)
        steps = _steps(logits, value, kernel_size, stride, padding)
        loaded, sums, windows = _memory(steps, value)

        def one(step: _Step) -> Work[None]:
            part = logits[step.entries, :, step.rows]
            source, target = _Area(value, step, loaded), _Area(out, step, sums)
            mixed = windows.take(*step.matrices(value))
            yield
            target.add(torch.bmm(_weights(part, scale, out.dtype), source.load(), out=mixed))

        return in_turn(map(one, steps))

    over_maps(work, maps[0], logits.numel() * maps[1].shape[4])
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

    def work(part: Part) -> Work[None]:
        logits, grad_logits, grad_out, value, grad_value = (tensor[part] for tensor in maps)
        steps = _steps(logits, value, kernel_size, stride, padding)
        loaded, sums, windows = _memory(steps, value)

        def one(step: _Step) -> Work[None]:
            part, target = (tensor[step.entries, :, step.rows] for tensor in (logits, grad_logits))
            target = target.permute(0, 2, 3, 1, 4, 5)
            grads, values = _Area(grad_out, step, loaded), _Area(value, step, loaded)
            sources = _Area(grad_value, step, sums)
            mixed = windows.take(*step.matrices(value))
            yield
            weights, grad = _weights(part, scale, grad_value.dtype), grads.load()
            sources.add(torch.bmm(weights.mT, grad, out=mixed))
            products = torch.bmm(grad, values.load().mT.contiguous()).mul_(weights)  # bmm is slow on a transpose
            products.addcmul_(weights, products.sum(-1, keepdim=True), value=-1)
            target.copy_(products.mul_(scale).view(target.shape))

        return in_turn(map(one, steps))

    over_maps(work, maps[0], logits.numel() * maps[3].shape[4])
    return grad_logits, grad_value.to(value.dtype)
