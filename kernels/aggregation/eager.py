"""The algebra in plain PyTorch, for any device and floating dtype: small banded matrices and matrix products.

Over a tile of outputs the dynamic kernel is a matrix ``band[j, i]`` (input position j, output i), zero but where j is
a neighbour of i, and all three operators are products with it:

    aggregate   y[c, i] = Σ_j x[c, j] · band[j, i]         the kernel is laid into the band, then multiplied
    transpose   x[c, j] = Σ_i g[c, i] · band[j, i]         the same band, from the other side
    correlate   band[j, i] = Σ_c x[c, j] · g[c, i]         multiplied first, then the kernel is picked out of the band

Laying and picking are strided copies, not gathers: where windows begin at an affine function of the output (see
``eager_tiles``), kernel position k of output t has an affine address in the band.

Cost: a tile of R·T outputs multiplies by (R+K−1)·(T+K−1) positions where K² would do, two to three times too many, but
at a matrix product's rate. Against K² shifted multiply-adds over whole maps that is level on the largest maps and
several times quicker on small ones, whose rows are too short for vector loops; it serves both rules, every stride and
every memory layout alike; and the bands of a step, its only large buffer, stay in the processor's cache.
"""

import functools
import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.eager_tiles import Pairs, Run, Step, steps_of
from kernels.dtypes import accumulator_dtype
from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.parallel import Part, Work, alone, in_turn, over_maps
from kernels.windows import Pair, Window


class Scratch:
    """Memory as wide as an accumulator that the steps of some work, of these sizes, use one after the other."""

    def __init__(self, like: Tensor, sizes: Iterable[int]) -> None:
        self._like, self._sizes = like, sizes

    @functools.cached_property
    def _memory(self) -> Tensor:
        return self._like.new_empty(max(self._sizes, default=0), dtype=accumulator_dtype(self._like.dtype))

    def take(self, *shape: int) -> Tensor:
        return self._memory[: math.prod(shape)].view(shape)


def load(pixels: Tensor, pairs: Pairs) -> None:
    pixels.zero_()
    for part, source in pairs:
        part.copy_(source)


def as_matrices(pixels: Tensor) -> Tensor:
    """[n, b, g, C, rows, columns] as [n·b·g, C, rows·columns], without a copy where the memory allows."""
    if channels_fastest(pixels[0]):
        return pixels.movedim(3, -1).flatten(0, 2).flatten(1, 2).mT
    return pixels.flatten(4).flatten(0, 2)


def multiply(a: Tensor, b: Tensor, inside: Callable[[], Tensor]) -> Tensor:
    """a [n, C, J] @ b [n, J, I] with b zero outside of ``inside()`` [J, I]: there a NaN or inf of a does not count.

    The transposes are multiplied if that is how they lie in memory: on a CPU several times quicker. Devices whose
    results would have to be waited for do without the check: a NaN of a then reaches all of a step's outputs.
    """
    out = torch.bmm(a, b) if b.stride(-1) == 1 else torch.bmm(b.mT, a.mT).mT
    if out.device.type == "cpu" and not math.isfinite(out.sum().item()):
        out.zero_()
        for j, reached in enumerate(inside()):
            out[:, :, reached] += a[:, :, j, None] * b[:, j, None, reached]
    return out


class Band(NamedTuple):
    """The bands [n·b·g, J, I] of a tile, zero outside the windows; ``clear``: they hold another tile's until then."""

    bands: Tensor
    windows: list[tuple[Tensor, Run, Run]]  # [n, b, g, Kh, Kw, h, w] inside the bands for each pair of runs, views
    clear: bool = False

    def pairs(self, kernel: Tensor) -> Pairs:
        """The same entries in the bands and in a step's kernel [n, b, g, Kh, Kw, R, T]."""
        return [(view, kernel.narrow(-2, r.first, r.count).narrow(-1, c.first, c.count)) for view, r, c in self.windows]

    def lay(self, pairs: Pairs) -> None:
        """Put a kernel into the bands."""
        if self.clear:
            self.bands.zero_()
        for view, kernel in pairs:
            view.copy_(kernel)

    def _inside(self) -> Tensor:
        """Where the bands hold a kernel, [J, I]."""
        inside = torch.zeros_like(self.bands, dtype=torch.bool)
        for view, _, _ in self.windows:
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        return inside[0]

    def gather(self, pixels: Tensor) -> Tensor:
        """Pixels [n·b·g, C, J] mixed by the bands: [n·b·g, C, I]."""
        return multiply(pixels, self.bands, self._inside)

    def scatter(self, grad: Tensor) -> Tensor:
        """The transpose, from the outputs [n·b·g, C, I] to [n·b·g, C, J]."""
        return multiply(grad, self.bands.mT, lambda: self._inside().mT)


class Bands:
    """Makes the bands of one step after the other in the same memory.

    ``input_major`` says which index of band[j, i] is the slow one.
    """

    def __init__(self, scratch: Scratch, kernel_size: Pair, input_major: bool) -> None:
        self._scratch, self._kernel_size, self._input_major = scratch, kernel_size, input_major
        self._geometry: object = None

    def select(self, step: Step) -> Band:
        leading, rows, columns = step.leading, step.rows, step.columns
        geometry = leading, rows.span, rows.runs, columns.span, columns.runs
        if geometry == self._geometry:
            return self._band
        maps, outputs = math.prod(leading), rows.count * columns.count
        if self._input_major:
            bands = self._scratch.take(maps, step.positions, outputs)
        else:
            bands = self._scratch.take(maps, outputs, step.positions).mT
        (each, j, i), (_, batch, groups), windows = bands.stride(), leading, []
        for r, c in product(rows.runs, columns.runs):
            size = *leading, *self._kernel_size, r.count, c.count
            steps = r.slope * columns.span * j + columns.count * i, c.slope * j + i
            strides = batch * groups * each, groups * each, each, columns.span * j, j, *steps
            begin = (r.begin * columns.span + c.begin) * j + (r.first * columns.count + c.first) * i
            windows.append((bands.as_strided(size, strides, begin), r, c))
        self._geometry, self._band = geometry, Band(bands, windows)
        return self._band._replace(clear=True)


class Tiled:
    """The three operators on one step after the other, in memory that the steps share.

    Each takes a kernel of the step alone, [n, b, g, Kh, Kw, R, T], and features of all maps. It makes the views that it
    needs, and returns the function that then computes.
    """

    def __init__(self, window: Window, x: Tensor, input_size: Pair | None = None, transposed: bool = False) -> None:
        """For features like x [B, G, C, H, W], or of ``input_size`` if x is an output."""
        self.steps, self._x = steps_of(window, x, input_size), x
        self._pixels = self.scratch(lambda step: math.prod(step.leading) * step.positions * x.shape[2])
        self._laid, self._picked = (
            Bands(self.scratch(lambda step: math.prod(step.shape) * step.positions), window.kernel_size, input_major)
            for input_major in (channels_fastest(x) == transposed, True)
        )

    def scratch(self, size: Callable[[Step], int]) -> Scratch:
        """Memory for so many elements of a step."""
        return Scratch(self._x, map(size, self.steps))

    def _take(self, step: Step) -> Tensor:
        """Pixels [n, b, g, C, rows, columns] of the shared memory, channels innermost where they are so in x."""
        sizes, channels = (step.rows.span, step.columns.span), self._x.shape[2]
        if channels_fastest(self._x):
            return self._pixels.take(*step.leading, *sizes, channels).movedim(-1, 3)
        return self._pixels.take(*step.leading, channels, *sizes)

    def aggregate(self, step: Step, weight: Tensor, x: Tensor, out: Tensor) -> Work[None]:
        pixels, band, target = self._take(step), self._laid.select(step), step.outputs(out)
        pairs, sources, matrices = band.pairs(weight), step.pairs(pixels, x), as_matrices(pixels)

        def run() -> None:
            load(pixels, sources)
            band.lay(pairs)
            target.copy_(band.gather(matrices).view(target.shape))

        return run

    def correlate(self, step: Step, x: Tensor, out: Tensor) -> Callable[[Tensor], None]:
        """The function takes g's ``outputs``; ``out`` is the step's kernel."""
        pixels, band = self._take(step), self._picked.select(step)
        pairs, sources, matrices = band.pairs(out), step.pairs(pixels, x), as_matrices(pixels).mT

        def run(g: Tensor) -> None:
            load(pixels, sources)
            torch.bmm(matrices, g, out=band.bands)
            for view, kernel in pairs:
                kernel.copy_(view)

        return run

    def transpose(self, step: Step, weight: Tensor, total: Tensor) -> Callable[[Tensor], None]:
        """The function takes g's ``outputs``, and adds to ``total`` [B, G, C, H, W], for steps overlap."""
        sums, band = self._take(step), self._laid.select(step)
        pairs, targets, matrices = band.pairs(weight), step.pairs(sums, total), as_matrices(sums)

        def run(g: Tensor) -> None:
            band.lay(pairs)
            matrices.copy_(band.scatter(g))
            for part, target in targets:  # what fell on padding is dropped
                target += part

        return run

    def outputs(self, step: Step, g: Tensor) -> Work[Tensor]:
        """g [B, G, C, H', W'] at a step's outputs, as matrices [n·b·g, C, R·T]."""
        part, dtype = step.outputs(g), accumulator_dtype(g.dtype)
        return lambda: as_matrices(part.to(dtype))


@alone
def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]: [B,G,Kh,Kw,H',W'] and [B,G,C,H,W] -> [B,G,C,H',W']."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))

    def prepare(part: Part) -> Work[None]:
        weights, features, target = weight[part], x[part], out[part]
        tiled = Tiled(window, features)
        return in_turn(tiled.aggregate(step, step.outputs(weights), features, target) for step in tiled.steps)

    over_maps(prepare, x, weight.numel() * x.shape[2])
    return out


@alone
def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]: [B,G,C,H',W'] and [B,G,C,H,W] -> [B,G,Kh,Kw,H',W']."""
    out = empty_kernel_layout(g, window.kernel_size)

    def prepare(part: Part) -> Work[None]:
        grads, features, target = g[part], x[part], out[part]
        tiled = Tiled(window, features)

        def prepare_step(step: Step) -> Work[None]:
            grad, run = tiled.outputs(step, grads), tiled.correlate(step, features, step.outputs(target))
            return lambda: run(grad())

        return in_turn(map(prepare_step, tiled.steps))

    over_maps(prepare, x, out.numel() * x.shape[2])
    return out


@alone
def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]:
    [B,G,Kh,Kw,H',W'] and [B,G,C,H',W'] -> [B,G,C,H,W]."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    # Steps overlap: their sums meet in one tensor as wide as the accumulators.
    total = (out if out.dtype == accumulator_dtype(g.dtype) else torch.empty_like(out, dtype=torch.float32)).zero_()

    def prepare(part: Part) -> Work[None]:
        weights, grads, sums = weight[part], g[part], total[part]
        tiled = Tiled(window, grads, input_size, transposed=True)

        def prepare_step(step: Step) -> Work[None]:
            grad, run = tiled.outputs(step, grads), tiled.transpose(step, step.outputs(weights), sums)
            return lambda: run(grad())

        return in_turn(map(prepare_step, tiled.steps))

    over_maps(prepare, g, weight.numel() * g.shape[2])
    return out if total is out else out.copy_(total)
