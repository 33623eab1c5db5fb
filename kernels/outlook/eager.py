"""Outlook attention in plain PyTorch: windows copied out a few rows of windows at a time, multiplied, summed back.

    p = softmax_source(scale · logits)      out[j] = Σ_{windows, targets t at j} Σ_s p[t, s] · value[source s]

A step takes as many windows as a cache holds copied out: K²/stride² times their part of the map.
"""

from collections.abc import Iterator
from itertools import product

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


def _steps(logits: Tensor, value: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Of logits [B, heads, h, w, K², K²] and value [B, heads, H, W, D]: some batch entries, all heads, some rows."""
    batch, heads, height, width, positions = logits.shape[:5]
    most = BLOCK_ELEMENTS.get(value.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    limit = min(most, max(FEWEST_BLOCK_ELEMENTS, (logits.numel() + value.numel()) // BLOCK_SHARE))
    row_elements = max(1, width * positions * heads * value.shape[4])
    batch_step = max(1, min(batch, limit // row_elements))
    row_step = max(1, limit // (row_elements * batch_step))
    for entry, row in product(range(0, batch, batch_step), range(0, height, row_step)):
        yield slice(entry, entry + batch_step), slice(None), slice(row, row + row_step)


def _padded(image: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Zeros for an image [B, heads, H, W, D] and what lies around it under windows: the image's part and the windows
    [B, heads, h, w, K, K, D], views in which these overlap."""
    (batch, heads, height, width, channels), (rows, columns) = image.shape, logits.shape[2:4]
    padding = min(padding, max(rows, columns) * stride + kernel_size)  # further away no window holds a pixel either
    spans = ((rows, height), (columns, width))
    size = (max((windows - 1) * stride + kernel_size, padding + length) for windows, length in spans)
    memory = image.new_zeros((batch, heads, *size, channels), dtype=accumulator_dtype(image.dtype))
    windows = memory.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride)[:, :, :rows, :columns]
    return memory[:, :, padding : padding + height, padding : padding + width], windows.movedim(4, -1)


def _windows(image: Tensor, logits: Tensor, *sizes: int) -> Tensor:
    """Those of an image itself."""
    inside, windows = _padded(image, logits, *sizes)
    inside.copy_(image)
    return windows


def _load(windows: Tensor) -> Tensor:
    """A copy of every window, [b·heads·h·w, K², D]."""
    return windows.clone(memory_format=torch.contiguous_format).flatten(4, 5).flatten(0, 3)


def _add(found: Tensor, windows: Tensor) -> None:
    """Sum [b·heads·h·w, K², D] into the windows where they overlap."""
    found = found.view(windows.shape)
    for row, column in product(*map(range, windows.shape[4:6])):  # of which no two overlap
        windows[..., row, column, :] += found[..., row, column, :]


def _by_head(image: Tensor, heads: int) -> Tensor:
    """[B, H, W, C] as [B, heads, H, W, C/heads]"""
    return image.unflatten(3, (heads, -1)).movedim(3, 1)


def _weights(logits: Tensor, scale: float) -> Tensor:
    """softmax over the sources of logits [b, heads, h, w, K², K²]: [b·heads·h·w, K² targets, K² sources].

    Sources go first in memory for the softmax: over rows as short as 9, PyTorch's CPU kernel is eight times slower.
    """
    sources_first = logits.movedim((4, 5), (0, 1)).to(accumulator_dtype(logits.dtype)) * scale
    return sources_first.softmax(1).movedim((0, 1), (4, 5)).contiguous().flatten(0, 3)


@alone
def outlook(logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    """logits [B,h,w,heads,K²,K²] (target, source), value [B,H,W,C] -> [B,H,W,C], contiguous."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    maps = logits.movedim(3, 1), *(_by_head(image, logits.shape[3]) for image in (value, out))

    def run(part: Part) -> None:
        logits, value, out = (tensor[part] for tensor in maps)
        geometry = logits, kernel_size, stride, padding
        values, (inside, sums) = _windows(value, *geometry), _padded(value, *geometry)
        for step in _steps(logits, value):
            _add(torch.bmm(_weights(logits[step], scale), _load(values[step])), sums[step])
        out.copy_(inside)

    over_maps(run, maps[0], logits.numel() * maps[1].shape[4])
    return out


@alone
def outlook_backward(
    grad_out: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    """dvalue[s] = Σ_t p[t,s] · grad_out[t];  dp[t,s] = Σ_c grad_out[t] · value[s];
    dlogits = scale · p · (dp − Σ_s p·dp)."""
    grad_logits, grad_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (logits, value))
    by_head = (_by_head(image, logits.shape[3]) for image in (grad_out, value, grad_value))
    maps = logits.movedim(3, 1), grad_logits.movedim(3, 1), *by_head

    def run(part: Part) -> None:
        logits, grad_logits, grad_out, value, grad_value = (tensor[part] for tensor in maps)
        geometry = logits, kernel_size, stride, padding
        grads, values = (_windows(image, *geometry) for image in (grad_out, value))
        inside, sums = _padded(value, *geometry)
        for step in _steps(logits, value):
            weights, grad = _weights(logits[step], scale), _load(grads[step])
            _add(torch.bmm(weights.mT, grad), sums[step])
            products = torch.bmm(grad, _load(values[step]).mT.contiguous()).mul_(weights)  # bmm is slow on a transpose
            products.addcmul_(weights, products.sum(-1, keepdim=True), value=-1).mul_(scale)
            grad_logits[step] = products.view(grad_logits[step].shape)
        grad_value.copy_(inside)

    over_maps(run, maps[0], logits.numel() * maps[3].shape[4])
    return grad_logits, grad_value
