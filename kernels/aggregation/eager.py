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

from kernels.aggregation.eager_tiles import Run, Tiles, cut, tile_size
from kernels.dtypes import accumulator_dtype
from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.parallel import Work, alone, in_turn, over_maps
from kernels.windows import Pair, Window

# Most elements in one step: a share of the kernel's own size (lean in memory), within bounds (at 7x7 the number of
# steps is what costs). Of float32 the upper bound is 4 MB on a CPU, to stay in cache; elsewhere steps should be large.
STEP_SHARE = 3 / 4
STEP_ELEMENTS = {"cpu": 2**20}
STEP_ELEMENTS_ELSEWHERE = 2**24
FEWEST_STEP_ELEMENTS = 2**15

# The same entries in two tensors, as views.
Pairs = list[tuple[Tensor, Tensor]]


class Scratch:
    """Memory as wide as an accumulator that the steps of some work, of these sizes, use one after the other."""

    def __init__(self, like: Tensor, sizes: Iterable[int]) -> None:
        self._memory = like.new_empty(max(sizes, default=0), dtype=accumulator_dtype(like.dtype))

    def take(self, *shape: int) -> Tensor:
        return self._memory[: math.prod(shape)].view(shape)


class Step(NamedTuple):
    """A tile of rows and n equal tiles of columns side by side, for a few batch entries and groups: [n, b, g, ...]."""

    leading: tuple[int, int, int]
    maps: tuple[slice, slice]
    rows: Tiles
    columns: Tiles

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its outputs, [n, b, g, R, T]."""
        return (*self.leading, self.rows.count, self.columns.count)

    @property
    def positions(self) -> int:
        """Covered by the windows of a tile."""
        return self.rows.span * self.columns.span

    def pixels(self, x: Tensor, scratch: Scratch) -> Tensor:
        """[n, b, g, C, rows, columns] of the scratch, channels innermost in memory where they are so in x."""
        sizes = (self.rows.span, self.columns.span)
        if channels_fastest(x):
            return scratch.take(*self.leading, *sizes, x.shape[2]).movedim(-1, 3)
        return scratch.take(*self.leading, x.shape[2], *sizes)

    def pairs(self, pixels: Tensor, x: Tensor) -> Pairs:
        """The positions that are no padding, in the pixels and in x [B, G, C, H, W], as views."""
        row_part, rows = self.rows.segments[0].slices()
        parts = [segment.slices() for segment in self.columns.segments]
        return [
            (tile[..., row_part, column_part], x[(*self.maps, slice(None), rows, columns)])
            for tile, (column_part, columns) in zip(pixels, parts, strict=True)
        ]

    def outputs(self, tensor: Tensor) -> Tensor:
        """A tensor over the outputs [B, G, ..., H', W'] at the step's: [n, b, g, ..., R, T], a view."""
        part = tensor[(*self.maps, ..., self.rows.outputs, self.columns.outputs)]
        return part.unflatten(-1, (self.leading[0], self.columns.count)).movedim(-2, 0)


def load(pixels: Tensor, pairs: Pairs) -> None:
    pixels.zero_()
    for part, source in pairs:
        part.copy_(source)


def add(pairs: Pairs) -> None:
    """What fell on padding is dropped."""
    for part, target in pairs:
        target += part


def steps_of(window: Window, x: Tensor, input_size: Pair | torch.Size | None = None) -> list[Step]:
    """Cut an operator with input x [B, G, C, H, W], of ``input_size`` if x is its output."""
    batch, groups, channels = x.shape[:3]
    height, width = x.shape[3:] if input_size is None else input_size
    kernel_elements = math.prod((batch, groups, *window.kernel_size, *window.output_size(height, width)))
    most = STEP_ELEMENTS.get(x.device.type, STEP_ELEMENTS_ELSEWHERE) * 4 // accumulator_dtype(x.dtype).itemsize
    limit = min(most, max(FEWEST_STEP_ELEMENTS, int(kernel_elements * STEP_SHARE)))
    (rows, columns), together = tile_size(window, (height, width), batch * groups, channels, limit)
    # The whole batch first: what depends on the group alone (a relative position bias) is then read once.
    batch_step = max(1, min(batch, together))
    group_step = max(1, min(groups, together // batch_step))
    cuts = product(cut(window, height, 0, rows, False), cut(window, width, 1, columns, True))
    found = []
    for (b, g), (row, column) in product(product(range(0, batch, batch_step), range(0, groups, group_step)), cuts):
        maps = slice(b, min(b + batch_step, batch)), slice(g, min(g + group_step, groups))
        leading = len(column.segments), maps[0].stop - b, maps[1].stop - g
        found.append(Step(leading, maps, row, column))
    return found


def pixel_scratch(steps: list[Step], x: Tensor) -> Scratch:
    return Scratch(x, (math.prod(step.leading) * step.positions * x.shape[2] for step in steps))


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
    """The bands [n·b·g, J, I] of a tile: zero outside the windows, and once ``cleared``, whatever was there inside."""

    bands: Tensor
    views: Callable[[Tensor], list[tuple[Tensor, Run, Run]]]
    windows: list[tuple[Tensor, Run, Run]]
    clear: bool

    def pairs(self, kernel: Tensor) -> Pairs:
        """The same entries in the bands and in a step's kernel [n, b, g, Kh, Kw, R, T]."""
        return [(view, kernel.narrow(-2, r.first, r.count).narrow(-1, c.first, c.count)) for view, r, c in self.windows]

    def lay(self, pairs: Pairs) -> None:
        """Put a kernel into the bands."""
        if self.clear:
            self.bands.zero_()
        for view, kernel in pairs:
            view.copy_(kernel)

    def pick(self, pairs: Pairs) -> None:
        """Take a kernel out of the bands."""
        for view, kernel in pairs:
            kernel.copy_(view)

    def _inside(self) -> Tensor:
        """Where the bands hold a kernel, [J, I]."""
        inside = torch.zeros_like(self.bands, dtype=torch.bool)
        for view, _, _ in self.views(inside):
            view.fill_(True)
        return inside[0]

    def gather(self, pixels: Tensor) -> Tensor:
        """Pixels [n·b·g, C, J] mixed by the bands: [n·b·g, C, I]."""
        return multiply(pixels, self.bands, self._inside)

    def scatter(self, grad: Tensor) -> Tensor:
        """The transpose, from the outputs [n·b·g, C, I] to [n·b·g, C, J]."""
        return multiply(grad, self.bands.mT, lambda: self._inside().mT)


class Bands:
    """Makes the bands of one tile after the other in the same memory.

    ``input_major`` says which index of band[j, i] is the slow one.
    """

    def __init__(self, steps: list[Step], like: Tensor, kernel_size: Pair, input_major: bool) -> None:
        self._kernel_size, self._input_major = kernel_size, input_major
        self._scratch = Scratch(like, (math.prod(step.shape) * step.positions for step in steps))
        self._geometry: object = None

    def select(self, step: Step) -> Band:
        rows, columns = step.rows, step.columns
        geometry = (step.leading, rows.span, rows.runs, columns.span, columns.runs)
        same = geometry == self._geometry
        if not same:
            self._geometry = geometry
            maps, outputs = math.prod(step.leading), rows.count * columns.count
            if self._input_major:
                bands = self._scratch.take(maps, step.positions, outputs)
            else:
                bands = self._scratch.take(maps, outputs, step.positions).mT
            views = functools.partial(self._views, leading=step.leading, rows=rows, columns=columns)
            self._band = Band(bands, views, views(bands), clear=False)
        return self._band if same else self._band._replace(clear=True)

    def _views(
        self, bands: Tensor, leading: tuple[int, int, int], rows: Tiles, columns: Tiles
    ) -> list[tuple[Tensor, Run, Run]]:
        """[n, b, g, Kh, Kw, h, w] inside the bands for each pair of runs."""
        (each, j, i), (_, batch, groups), found = bands.stride(), leading, []
        for r, c in product(rows.runs, columns.runs):
            size = *leading, *self._kernel_size, r.count, c.count
            steps = r.slope * columns.span * j + columns.count * i, c.slope * j + i
            strides = batch * groups * each, groups * each, each, columns.span * j, j, *steps
            begin = (r.begin * columns.span + c.begin) * j + (r.first * columns.count + c.first) * i
            found.append((bands.as_strided(size, strides, bands.storage_offset() + begin), r, c))
        return found


@alone
def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]: [B,G,Kh,Kw,H',W'] and [B,G,C,H,W] -> [B,G,C,H',W']."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    over_maps(lambda part: _aggregate(weight[part], x[part], window, out[part]), x, weight.numel() * x.shape[2])
    return out


def _aggregate(weight: Tensor, x: Tensor, window: Window, out: Tensor) -> Work[None]:
    steps = steps_of(window, x)
    scratch, bands = pixel_scratch(steps, x), Bands(steps, x, window.kernel_size, not channels_fastest(x))

    def work(step: Step) -> Work[None]:
        pixels, band, target = step.pixels(x, scratch), bands.select(step), step.outputs(out)
        pairs, sources, matrices = band.pairs(step.outputs(weight)), step.pairs(pixels, x), as_matrices(pixels)
        yield
        load(pixels, sources)
        band.lay(pairs)
        target.copy_(band.gather(matrices).view(target.shape))

    return in_turn(map(work, steps))


@alone
def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]: [B,G,C,H',W'] and [B,G,C,H,W] -> [B,G,Kh,Kw,H',W']."""
    out = empty_kernel_layout(g, window.kernel_size)
    over_maps(lambda part: _correlate(g[part], x[part], window, out[part]), x, out.numel() * x.shape[2])
    return out


def _correlate(g: Tensor, x: Tensor, window: Window, out: Tensor) -> Work[None]:
    steps = steps_of(window, x)
    scratch, bands = pixel_scratch(steps, x), Bands(steps, x, window.kernel_size, input_major=True)

    def work(step: Step) -> Work[None]:
        pixels, band, grad = step.pixels(x, scratch), bands.select(step), step.outputs(g)
        pairs, sources, matrices = band.pairs(step.outputs(out)), step.pairs(pixels, x), as_matrices(pixels).mT
        yield
        load(pixels, sources)
        torch.bmm(matrices, as_matrices(grad.to(pixels.dtype)), out=band.bands)
        band.pick(pairs)

    return in_turn(map(work, steps))


@alone
def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]:
    [B,G,Kh,Kw,H',W'] and [B,G,C,H',W'] -> [B,G,C,H,W]."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    # Steps overlap: their sums meet in one tensor as wide as the accumulators.
    total = (out if out.dtype == accumulator_dtype(g.dtype) else torch.empty_like(out, dtype=torch.float32)).zero_()
    over_maps(lambda part: _transpose(weight[part], g[part], window, total[part]), g, weight.numel() * g.shape[2])
    return out if total is out else out.copy_(total)


def _transpose(weight: Tensor, g: Tensor, window: Window, total: Tensor) -> Work[None]:
    steps = steps_of(window, g, total.shape[3:])
    scratch, bands = pixel_scratch(steps, g), Bands(steps, g, window.kernel_size, channels_fastest(g))

    def work(step: Step) -> Work[None]:
        sums, band, grad = step.pixels(g, scratch), bands.select(step), step.outputs(g)
        pairs, targets, matrices = band.pairs(step.outputs(weight)), step.pairs(sums, total), as_matrices(sums)
        yield
        band.lay(pairs)
        matrices.copy_(band.scatter(as_matrices(grad.to(sums.dtype))))
        add(targets)

    return in_turn(map(work, steps))
