"""Passes that store logits or weights: some heads of some images at a time, so that no tensor comes near all logits."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from kernels.contmix.arguments import Targets, Tensors
from kernels.launch import ceil_divide

# Numbers of one kind that are stored at a time, or as many as value has, or those of one head: 32 MB of 16 bits.
MOST_STORED = 1 << 24

Parts = TypeVar("Parts", Tensors, Targets)


def part_of(tensors: Parts, images: slice, heads: slice) -> Parts:
    """Those of some batch entries and groups."""
    maps = {name: tensor for name, tensor in tensors._asdict().items() if tensor is not None and tensor.dim() > 3}
    return tensors._replace(rpb=tensors.rpb[heads], **{name: each[images, heads] for name, each in maps.items()})


def parts_of(tensors: Tensors, stored: int) -> Iterator[tuple[slice, slice]]:
    """Batch entries and groups that are computed together, where an output leaves so many numbers."""
    batch, groups, _, height, width = tensors.value.shape
    most = max(1, max(MOST_STORED, tensors.value.numel()) // (height * width * stored))
    # Parts of nearly the same size, for a small last one would leave a GPU idle.
    images, heads = (
        ceil_divide(size, ceil_divide(size, part))
        for size, part in ((batch, max(1, min(batch, most // groups))), (groups, min(groups, most)))
    )
    for i_batch in range(0, batch, images):
        for i_group in range(0, groups, heads):
            yield slice(i_batch, i_batch + images), slice(i_group, i_group + heads)


def by_parts(tensors: Tensors, targets: Targets, stored: int, fill: Callable[[Tensors, Targets], object]) -> None:
    """Fills the targets with what ``fill`` gives of each part: gradients of its own, and terms of bias' and rpb's."""
    parts = list(parts_of(tensors, stored))
    if len(parts) == 1:
        fill(tensors, targets)
        return
    bias, rpb = (torch.zeros_like(of, dtype=tensors.statistics.dtype) for of in (targets.bias, targets.rpb))
    for images, heads in parts:
        into = part_of(targets, images, heads)
        projected, of_bias, of_rpb = map(torch.empty_like, (into.projected, bias, rpb[heads]))
        fill(part_of(tensors, images, heads), into._replace(projected=projected, bias=of_bias, rpb=of_rpb))
        into.projected.copy_(projected)
        bias += of_bias
        rpb[heads] += of_rpb
    targets.bias.copy_(bias)
    targets.rpb.copy_(rpb)
