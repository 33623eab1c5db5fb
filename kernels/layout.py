"""Memory order of new outputs: one rule for the kernels and for the fake implementations.

The operators work on views [B, G, channels..., H, W], "channels" being C, or (Kh, Kw) for a dynamic kernel. Three
orders occur in memory: channels first (as the view), heads last (B, G, H, W, channels: neighbourhood attention) and
image last (B, H, W, G, channels: ``torch.channels_last``). An output takes the order of the tensor it resembles, so
that a permuted view handed in comes back as the same permuted view, without a copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype


def channels_fastest(view: Tensor) -> bool:
    """Whether neighbouring addresses hold neighbouring channels (or window positions), not neighbouring pixels."""
    last = view.dim() - 3
    return view.stride(last) == 1 and view.size(last) > 1 and (view.size(-1) > 1 or view.size(-2) > 1)


def _memory_order(view: Tensor) -> tuple[int, ...]:
    rank = view.dim()
    rows, columns, channels = rank - 2, rank - 1, range(2, rank - 2)
    if not channels_fastest(view):
        return tuple(range(rank))
    pixel_stride = view.stride(columns) if view.size(columns) > 1 else view.stride(rows)
    if rank == 4 or (view.size(1) > 1 and view.stride(1) < pixel_stride):  # without groups these are the channels
        return (0, rows, columns, 1, *channels)
    return (0, 1, rows, columns, *channels)


def image_last(view: Tensor) -> bool:
    """Whether an output like this view holds the channels of all groups of a pixel, then those of the next pixel."""
    return _memory_order(view)[1] == view.dim() - 2


def _empty(template: Tensor, shape: Sequence[int], order: tuple[int, ...]) -> Tensor:
    dense = torch.empty([shape[d] for d in order], dtype=template.dtype, device=template.device)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return dense.permute(inverse)


def empty_like_layout(template: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Dense, uninitialised tensor in the memory order of ``template``, of its shape or of one of the same rank."""
    return _empty(template, template.shape if shape is None else shape, _memory_order(template))


def zero_sums(template: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros like ``empty_like_layout``, as wide as an accumulator. ``to`` another type keeps their memory order."""
    return torch.zeros_like(empty_like_layout(template, shape), dtype=accumulator_dtype(template.dtype))


def empty_softmax_outputs(value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised output like value [B, ..., C, H, W], and log Σ exp [B, ..., H, W] as wide as an accumulator."""
    statistics = value.new_empty((*value.shape[:-3], *value.shape[-2:]), dtype=accumulator_dtype(value.dtype))
    return empty_like_layout(value), statistics


def empty_kernel_layout(g: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Uninitialised [B, G, Kh, Kw, H', W'] in the memory order of g [B, G, C, H', W'], (Kh, Kw) in place of C."""
    batch, groups, _, height, width = g.shape
    order = tuple(p for d in _memory_order(g) for p in ((2, 3) if d == 2 else (d + (d > 2),)))
    return _empty(g, (batch, groups, *kernel_size, height, width), order)


def settled(view: Tensor) -> Tensor:
    """``view`` with strides of axes of length 1 that follow from the others.

    After a reshape PyTorch gives such axes other strides under fake tensors, so in compiled code, than in eager mode.
    """
    ones = [axis for axis, length in enumerate(view.shape) if length == 1]
    if ones:
        view = view.squeeze(ones)
        for axis in ones:
            view = view.unsqueeze(axis)
    return view
