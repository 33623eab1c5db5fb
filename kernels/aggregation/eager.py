"""The algebra in plain PyTorch, for any device and floating dtype: small banded matrices and matrix products.

Over a tile of outputs the dynamic kernel is a matrix ``band[i, j]`` (output i, input position j), zero but where j is
a neighbour of i, and all three operators are products with it:

    aggregate   y[c, i] = Σ_j x[c, j] · band[i, j]         the kernel is laid into the band, then multiplied
    transpose   x[c, j] = Σ_i g[c, i] · band[i, j]         the same band, from the other side
    correlate   band[i, j] = Σ_c g[c, i] · x[c, j]         multiplied first, then the kernel is picked out of the band

Cost: a tile of R·T outputs multiplies by (R+K−1)·(T+K−1) positions where K² would do, two to three times too many, but
at a matrix product's rate. Against K² shifted multiply-adds over whole maps that is level on the largest maps and
several times quicker on small ones, whose rows are too short for vector loops; it serves both rules, every stride and
every memory layout alike; and the bands of a step, its only large buffer, stay in the processor's cache.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.aggregation.eager_tiles import Step, steps_of
from kernels.dtypes import accumulator_dtype
from kernels.layout import empty_kernel_layout, empty_like_layout, zero_sums
from kernels.parallel import Part, alone, over_maps
from kernels.windows import Pair, Window


def multiply(a: Tensor, b: Tensor, inside: Callable[[], Tensor]) -> Tensor:
    """a [n, C, J] @ b [n, J, I] with b zero outside of ``inside()`` [J, I]: there a NaN or inf of a does not count.

    Devices whose results would have to be waited for do without the check: a NaN of a then reaches all of a step's
    outputs.
    """
    out = torch.bmm(a, b)
    if out.device.type == "cpu" and not math.isfinite(out.sum().item()):
        out.zero_()
        for j, reached in enumerate(inside()):
            out[:, :, reached] += a[:, :, j, None] * b[:, j, None, reached]
    return out


class Band:
    """The bands of a step, made from its kernel [b, g, n, R, T, Kh, Kw]: [b·g·n, I, J], zero outside the windows."""

    def __init__(self, step: Step, kernel: Tensor) -> None:
        self._shape = step.rows.count * step.columns.count, step.rows.span * step.columns.span
        index = step.index(kernel.device)
        if kernel.stride(-1) > kernel.stride(4):  # rows of a map are read at once, and the tiles in them from the cache
            kernel, index = kernel.clone().permute(0, 1, 2, 5, 6, 3, 4), index.permute(2, 3, 0, 1)
        flat, self._index = kernel.to(accumulator_dtype(kernel.dtype)).flatten(3).flatten(0, 2), index.flatten()
        bands = flat.new_zeros((flat.shape[0], math.prod(self._shape)))
        self._bands = bands.scatter_(1, self._index.expand_as(flat), flat).unflatten(1, self._shape)

    def _inside(self) -> Tensor:
        inside = torch.zeros(math.prod(self._shape), dtype=torch.bool, device=self._index.device)
        return inside.index_fill_(0, self._index, True).view(self._shape)

    def gather(self, pixels: Tensor) -> Tensor:
        """Pixels [b·g·n, C, J] mixed by the bands: [b·g·n, C, I]."""
        return multiply(pixels, self._bands.mT, lambda: self._inside().mT)

    def scatter(self, g: Tensor) -> Tensor:
        """The transpose, from the outputs [b·g·n, C, I] to [b·g·n, C, J]."""
        return multiply(g, self._bands, self._inside)


def pick(step: Step, pixels: Tensor, g: Tensor) -> Tensor:
    """correlate on a step: Σ_c g[c, i] · x[c, nbr(i, k)] for pixels [b·g·n, C, J] and g [b·g·n, C, I], [b, g, n, R, T,
    Kh, Kw]."""
    index, bands = step.index(g.device), torch.bmm(g.mT, pixels)
    return bands.flatten(1).index_select(1, index.flatten()).view(*step.leading, *index.shape)


@alone
def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]: [B,G,Kh,Kw,H',W'] and [B,G,C,H,W] -> [B,G,C,H',W']."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))

    def run(part: Part) -> None:
        weights, features = weight[part], x[part]
        for step in steps_of(window, features):
            target = step.outputs(out[part])
            target.copy_(Band(step, step.kernel(weights)).gather(step.pixels(features)).view(target.shape))

    over_maps(run, x, weight.numel() * x.shape[2])
    return out


@alone
def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]: [B,G,C,H',W'] and [B,G,C,H,W] -> [B,G,Kh,Kw,H',W']."""
    out = empty_kernel_layout(g, window.kernel_size)

    def run(part: Part) -> None:
        for step in steps_of(window, x[part]):
            step.kernel(out[part]).copy_(pick(step, step.pixels(x[part]), step.features(g[part])))

    over_maps(run, x, out.numel() * x.shape[2])
    return out


@alone
def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]:
    [B,G,Kh,Kw,H',W'] and [B,G,C,H',W'] -> [B,G,C,H,W]."""
    total = zero_sums(g, (*g.shape[:3], *input_size))  # where the sums of steps that overlap meet

    def run(part: Part) -> None:
        for step in steps_of(window, g[part], input_size):
            step.add(Band(step, step.kernel(weight[part])).scatter(step.features(g[part])), total[part])

    over_maps(run, g, weight.numel() * g.shape[2])
    return total.to(g.dtype)
