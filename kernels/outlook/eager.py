"""Outlook attention in plain PyTorch: windows copied out a few rows of windows at a time, multiplied, summed back.

    p = softmax_source(scale · logits)      out[j] = Σ_{windows, targets t at j} Σ_s p[t, s] · value[source s]

A block of window rows and batch entries keeps the copied windows (K²/stride² times the map, if whole) in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.eager import Scratch
from kernels.dtypes import accumulator_dtype
from kernels.parallel import Part, Work, alone, in_turn, over_maps

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

    def _covered(self, image: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Memory for the covered area; its pixels that exist, there and in the image [B, heads, H, W, D], as
        [b, rows, columns, heads, D]; its overlapping windows [b, h, w, heads, K, K, D], a view."""
        batch, heads, height, width, depth = image[self.batch].shape
        covered = scratch.take(batch, *self.size, heads, depth)
        inside, outside = [], []
        for corner, size, length in zip(self.corner, self.size, (height, width), strict=True):
            low = min(max(corner, 0), length)
            high = max(low, min(corner + size, length))
            inside.append(slice(low - corner, high - corner))
            outside.append(slice(low, high))
        pixels = image[(self.batch, slice(None), *outside)].permute(0, 2, 3, 1, 4)
        entry, row, column, head, channel = covered.stride()
        windows = covered.as_strided(
            (batch, *self.grid, heads, self.kernel_size, self.kernel_size, depth),
            (entry, row * self.stride, column * self.stride, head, row, column, channel),
        )
        return covered, covered[(slice(None), *inside)], pixels, windows

    def reader(self, image: Tensor, scratch: Scratch) -> Callable[[], Tensor]:
        """Copies every window's pixels of image [B, heads, H, W, D], zero outside: [b·h·w·heads, K², D]."""
        covered, part, pixels, windows = self._covered(image, scratch)

        def read() -> Tensor:
            covered.zero_()
            part.copy_(pixels)
            return windows.clone(memory_format=torch.contiguous_format).flatten(4, 5).flatten(0, 3)

        return read

    def writer(self, image: Tensor, scratch: Scratch, windows: Tensor) -> Callable[[], None]:
        """Sums windows [b·h·w·heads, K², D] into image where they overlap; what falls outside is dropped."""
        covered, part, pixels, targets = self._covered(image, scratch)
        windows = windows.view(targets.shape)
        # One position of every window: these never overlap.
        positions = list(product(range(self.kernel_size), repeat=2))
        pairs = [(targets[..., row, column, :], windows[..., row, column, :]) for row, column in positions]

        def write() -> None:
            covered.zero_()
            for target, window in pairs:
                target += window
            pixels.add_(part)

        return write


def _blocks(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int) -> Iterator[_Block]:
    """Of logits [B, heads, h, w, K², K²] and value [B, heads, H, W, D]."""
    batch, heads, height, width = logits.shape[:4]
    most = BLOCK_ELEMENTS.get(value.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    limit = min(most, max(FEWEST_BLOCK_ELEMENTS, (logits.numel() + value.numel()) // BLOCK_SHARE))
    row_elements = max(1, width * kernel_size**2 * heads * value.shape[4])
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


class _Memory:
    """For one block after the other: the areas that windows cover, and the windows' values one by one."""

    def __init__(self, blocks: list[_Block], image: Tensor) -> None:
        heads, depth = image.shape[1], image.shape[4]
        maps = [image[block.batch].shape[0] * heads * depth for block in blocks]
        areas = [count * math.prod(block.size) for count, block in zip(maps, blocks, strict=True)]
        self.loaded, self.sums = Scratch(image, areas), Scratch(image, areas)
        windows = [n * math.prod(block.grid) * block.kernel_size**2 for n, block in zip(maps, blocks, strict=True)]
        self.windows = Scratch(image, windows)


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

    def work(part: Part) -> Work[None]:
        tensors = [tensor[part] for tensor in maps]
        return _outlook(*tensors, kernel_size=kernel_size, stride=stride, padding=padding, scale=scale)

    over_maps(work, maps[0], logits.numel() * maps[1].shape[4])
    return out.to(value.dtype)


def _outlook(
    logits: Tensor, value: Tensor, out: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> Work[None]:
    blocks = list(_blocks(logits, value, kernel_size, stride, padding))
    memory = _Memory(blocks, value)

    def step(block: _Block) -> Work[None]:
        part = logits[block.batch, :, block.window_rows]
        read = block.reader(value, memory.loaded)
        mixed = memory.windows.take(part[..., 0, 0].numel(), kernel_size**2, value.shape[4])
        write = block.writer(out, memory.sums, mixed)
        yield
        torch.bmm(_weights(part, scale, out.dtype), read(), out=mixed)
        write()

    return in_turn([step(block) for block in blocks])


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
        tensors = [tensor[part] for tensor in maps]
        return _outlook_backward(*tensors, kernel_size=kernel_size, stride=stride, padding=padding, scale=scale)

    over_maps(work, maps[0], logits.numel() * maps[3].shape[4])
    return grad_logits, grad_value.to(value.dtype)


def _outlook_backward(
    logits: Tensor,
    grad_logits: Tensor,
    grad_out: Tensor,
    value: Tensor,
    grad_value: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
) -> Work[None]:
    blocks = list(_blocks(logits, value, kernel_size, stride, padding))
    memory = _Memory(blocks, value)

    def step(block: _Block) -> Work[None]:
        part, target = (tensor[block.batch, :, block.window_rows] for tensor in (logits, grad_logits))
        read_grads, read_values = (block.reader(tensor, memory.loaded) for tensor in (grad_out, value))
        mixed = memory.windows.take(part[..., 0, 0].numel(), kernel_size**2, value.shape[4])
        write = block.writer(grad_value, memory.sums, mixed)
        target = target.permute(0, 2, 3, 1, 4, 5)
        yield
        weights, grads = _weights(part, scale, grad_value.dtype), read_grads()
        torch.bmm(weights.mT, grads, out=mixed)
        write()
        sources = read_values().mT.contiguous()  # pays: bmm is slow on a transpose
        products = torch.bmm(grads, sources).mul_(weights)
        products.addcmul_(weights, products.sum(-1, keepdim=True), value=-1)
        target.copy_(products.mul_(scale).view(target.shape))

    return in_turn([step(block) for block in blocks])
