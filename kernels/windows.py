"""The two window rules: which input positions an output position sums over.

Per axis, output position ``i`` has the neighbours ``k = 0..K-1``:

=============  ========================================================  =====================================
rule           neighbour                                                 out of range
=============  ========================================================  =====================================
zero-padded    ``i*stride - padding + k*dilation``                       reads 0
clamped        ``start(i) + k*dilation``                                 never: the window slides inward
=============  ========================================================  =====================================

with ``start(i) = clamp(i - K//2, 0, L - K)`` for dilation 1. Dilation ``d`` splits an axis into residue classes
``i mod d``; class ``r`` has ``ceil((L - r)/d)`` members and the same clamp runs inside the class, so a clamped
window needs ``K*d <= L``. The clamped rule is the border rule of neighbourhood attention (arXiv 2204.07143).

``windows_triton`` states the clamped rule for kernels; those of the other walk it (``aggregation.tiles``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

Pair = tuple[int, int]


class Window(NamedTuple):
    """A two-dimensional window; every field but the last is (rows, columns)."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    clamped: bool = False

    @classmethod
    def neighborhood(cls, kernel_size: Pair, dilation: Pair = (1, 1)) -> Window:
        return cls(kernel_size, dilation=dilation, clamped=True)

    def output_length(self, length: int, axis: int) -> int:
        """Number of outputs along ``axis`` (0 rows, 1 columns) for an input of ``length``; may be <= 0."""
        if self.clamped:
            return length
        span = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (length + 2 * self.padding[axis] - span) // self.stride[axis] + 1

    def output_size(self, height: int, width: int) -> Pair:
        return self.output_length(height, 0), self.output_length(width, 1)

    def neighbours(self, length: int, axis: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Index of every neighbour, [L', K]; values outside 0..L-1 mean "reads 0" (zero-padded rule only)."""
        kernel_size, dilation = self.kernel_size[axis], self.dilation[axis]
        i = torch.arange(self.output_length(length, axis), device=device)
        if self.clamped:
            residue = i % dilation
            members = (length - residue + dilation - 1) // dilation
            start = torch.minimum((i // dilation - kernel_size // 2).clamp(min=0), members - kernel_size)
            start = start * dilation + residue
        else:
            start = i * self.stride[axis] - self.padding[axis]
        return start[:, None] + torch.arange(kernel_size, device=device) * dilation

    def relative(self, length: int, axis: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Where the distance of every neighbour of a clamped window stands in a table of 2K − 1 distances, [L, K]."""
        distance = self.neighbours(length, axis, device) - torch.arange(length, device=device)[:, None]
        return distance // self.dilation[axis] + self.kernel_size[axis] - 1


def windows_and_most(kernel_size: Pair, height: int, width: int) -> Pair:
    """How many undilated clamped windows a map has, and how many outputs share the one that most do.

    Along an axis at most K//2 + 1 outputs share a start, or all of them where the window is as long as the axis.
    """
    (kernel_h, kernel_w), lengths = kernel_size, (height, width)
    rows, columns = (n if n == k else k // 2 + 1 for n, k in zip(lengths, kernel_size, strict=True))
    return (height - kernel_h + 1) * (width - kernel_w + 1), rows * columns
