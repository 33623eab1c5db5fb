"""What ``compile`` builds: every kernel's launcher on meta tensors, at a shape of the models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.windows import Window

Launches = Iterator[Callable[[], object]]
K7 = Window((7, 7), padding=(3, 3))


def _meta(dtype: torch.dtype, channels_last: bool = False) -> Callable[..., Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return functools.partial(torch.empty, dtype=dtype, device="meta", memory_format=layout)


def _algebra(dtype: torch.dtype, channels_last: bool) -> Launches:
    from kernels.aggregation import rows as kernels

    # RedNet-50's second stage: 128 channels in 8 groups at 28x28, K = 7.
    maps = _meta(dtype, channels_last)
    weight, x = maps(128, 8 * 49, 28, 28).unflatten(1, (8, 7, 7)), maps(128, 128, 28, 28).unflatten(1, (8, 16))
    yield lambda: kernels.aggregate(weight, x, K7)
    yield lambda: kernels.correlate(torch.empty_like(x), x, K7)
    yield lambda: kernels.transpose(weight, x, (28, 28), K7)


def _large_windows(dtype: torch.dtype) -> Launches:
    from kernels.aggregation import gather as kernels

    window, meta = Window((17, 17), padding=(8, 8)), _meta(dtype)  # too large for rows to slide
    weight, x = meta(2, 8, 17, 17, 28, 28), meta(2, 8, 16, 28, 28)
    yield lambda: kernels.aggregate(weight, x, window)
    yield lambda: kernels.correlate(x, x, window)
    yield lambda: kernels.transpose(weight, x, (28, 28), window)


def _generate(dtype: torch.dtype) -> Launches:
    from kernels.aggregation.rows import correlate
    from kernels.involution import forward

    # RedNet-50's second stage: kernels of 128 channels from 32 features.
    meta, maps = _meta(dtype), _meta(dtype, channels_last=True)
    x, weight = maps(128, 128, 28, 28).unflatten(1, (8, 16)), meta(8 * 49, 32)
    inputs = (x, maps(128, 32, 28, 28), weight, meta(8 * 49), K7)
    yield lambda: forward.involution_generate(*inputs)
    yield lambda: forward.involution_generate_transpose(x, *inputs)
    yield lambda: correlate(x, x, K7, padded=True)


def _neighborhood(dtype: torch.dtype, length: int, kernel_size: int, dilation: int = 1) -> Launches:
    from kernels.aggregation import gather as algebra
    from kernels.neighborhood.passes import softmax_aggregate, softmax_aggregate_backward

    # OverLoCK-T: 16 value channels per head.
    meta, window = _meta(dtype), Window.neighborhood((kernel_size, kernel_size), (dilation, dilation))
    logits = meta(128, 8, length, length, kernel_size, kernel_size).permute(0, 1, 4, 5, 2, 3)
    value, rpb = meta(128, 8, 16, length, length), meta(8, 2 * kernel_size - 1, 2 * kernel_size - 1)
    statistics = _meta(torch.float32)(128, 8, length, length)
    heads_last = meta(128, 8, length, length, 16).permute(0, 1, 4, 2, 3)
    yield lambda: softmax_aggregate(logits, value, rpb, window)
    yield lambda: softmax_aggregate_backward(value, logits, value, rpb, value, statistics, window)
    yield lambda: algebra.aggregate(logits, heads_last, window)
    yield lambda: algebra.correlate(heads_last, heads_last, window)
    yield lambda: algebra.transpose(logits, heads_last, (length, length), window)


def _contmix(
    dtype: torch.dtype, length: int, kernel_sizes: list[int], heads: int = 8, channels: int = 16, batch: int = 128
) -> Launches:
    from kernels.contmix import op

    meta, exact, positions = _meta(dtype), _meta(torch.float32), sum(size**2 for size in kernel_sizes)
    query, key = meta(batch, heads, channels, length, length), meta(batch, heads, channels, 49)
    rpb = [meta(heads, 2 * size - 1, 2 * size - 1) for size in kernel_sizes]
    value = meta(batch, len(kernel_sizes), heads, channels, length, length)
    inputs = (query, key, meta(positions, 49), meta(positions), rpb, value, kernel_sizes, "triton")
    statistics = exact(batch, len(kernel_sizes), heads, length, length)
    projected = exact(positions, batch, heads, channels).permute(1, 2, 3, 0)
    yield lambda: op._contmix.function(*inputs)
    yield lambda: op._contmix_backward.function(value, *inputs, value, statistics, projected)


def _outlook(dtype: torch.dtype) -> Launches:
    from kernels.outlook import backward, forward

    # VOLO-D1: 6 heads of 32 channels.
    logits, value = _meta(dtype)(128, 14, 14, 6, 9, 9), _meta(dtype)(128, 28, 28, 192)
    yield lambda: forward.outlook(logits, value, 3, 2, 1, 32**-0.5)
    yield lambda: backward.outlook_backward(value, logits, value, 3, 2, 1, 32**-0.5)


def _depthwise(
    dtype: torch.dtype, channels: int, length: int, kernel_size: int, channels_last: bool = False
) -> Launches:
    from kernels.depthwise import backward, forward

    meta, x = _meta(dtype), _meta(dtype, channels_last)(128, channels, length, length)
    weight, bias = meta(channels, 1, kernel_size, kernel_size), meta(channels)
    yield lambda: forward.convolve(x, weight, bias)
    yield lambda: backward.weight_gradient(x, x, kernel_size)
    if channels_last:  # else it is PyTorch's sum
        yield lambda: backward.bias_gradient(x)


def cases(dtype: torch.dtype) -> dict[str, Launches]:
    """Launcher calls at the models' own shapes, by name."""
    return {
        "involution 128@28 K=7, channels first": _algebra(dtype, channels_last=False),
        "involution 128@28 K=7, channels last": _algebra(dtype, channels_last=True),
        "involution 2x8x16@28 K=17": _large_windows(dtype),
        "involution, kernels generated, 128@28 K=7": _generate(dtype),
        "neighborhood 8x16@14 K=13": _neighborhood(dtype, 14, 13),
        "neighborhood 8x16@56 K=7 d=2": _neighborhood(dtype, 56, 7, dilation=2),
        "outlook 6x32@28 K=3 s=2": _outlook(dtype),
        "depthwise 64@56 K=17": _depthwise(dtype, 64, 56, 17),
        "depthwise 256@14 K=13, channels last": _depthwise(dtype, 256, 14, 13, channels_last=True),
        "contmix 8x16@14 K=5, 13": _contmix(dtype, 14, [5, 13]),
        "contmix 8x16@56 K=13": _contmix(dtype, 56, [13], batch=8),
        "contmix 32x8@7 K=5, 7": _contmix(dtype, 7, [5, 7], 32, 8),  # OverLoCK-S
    }
