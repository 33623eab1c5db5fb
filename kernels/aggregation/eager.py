"""The algebra in plain PyTorch, for any device and floating dtype: small banded matrices and matrix products.

Over a tile of outputs the dynamic kernel is a matrix ``band[j, i]`` (input position j, output i), zero but where j is
a neighbour of i, and all three operators are products with it:

    aggregate   y[c, i] = Σ_j x[c, j] · band[j, i]         the kernel is laid into the band, then multiplied
    transpose   x[c, j] = Σ_i g[c, i] · band[j, i]         the same band, from the other side
    correlate   band[j, i] = Σ_c x[c, j] · g[c, i]         multiplied first, then the kernel is picked out of the band

Laying and picking are strided copies, not gathers: along each axis the window of output t begins at an affine function
of t, in one run of outputs (zero-padded rule) or three (clamped rule: both borders stand still, the middle moves), and
so (k, t) has an affine address in the band. A dilated window is an undilated one inside a residue class of pixels.

Cost: a tile of R·T outputs multiplies by (R+K−1)·(T+K−1) positions where K² would do, two to three times too many, but
at a matrix product's rate. Against K² shifted multiply-adds over whole maps that is quicker on all but the largest
maps, many times so on small ones, whose rows are too short for vector loops; it serves both rules, every stride and
every memory layout alike; and the bands of a step, its only large buffer, stay in the processor's cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import groupby, product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.windows import Pair, Window

__all__ = [
    "Bands",
    "Strip",
    "accumulator_dtype",
    "aggregate",
    "as_matrices",
    "correlate",
    "multiply",
    "strips",
    "transpose",
]

# Most band elements in one step: a share of the kernel's own size (lean in memory), within bounds. The upper bound is
# 2 MB in float32 on a CPU, so that a step stays in cache; elsewhere steps should rather be large than many.
STEP_SHARE = 4
STEP_ELEMENTS = {"cpu": 2**19}
STEP_ELEMENTS_ELSEWHERE = 2**24
FEWEST_STEP_ELEMENTS = 2**16
# Costs measured on a CPU in multiply-adds of a matrix product: of a step beyond its arithmetic (a dozen calls), of one
# element of a product's other operand, of one row of a tile when a kernel row is copied.
STEP_COST = 4_000_000
ELEMENT_COST = 16
ROW_COST = 400
# Longest tile worth weighing, in outputs along one axis.
LONGEST_TILE = 64


class Run(NamedTuple):
    """Outputs ``first .. first + count - 1`` of a tile; the window of its t-th begins at ``begin + t * slope``."""

    first: int
    count: int
    begin: int
    slope: int


class Tiles(NamedTuple):
    """Equal tiles side by side along an axis: tile n covers ``span`` positions of its residue class from ``begins[n]``."""

    outputs: slice
    begins: tuple[int, ...]
    span: int
    runs: tuple[Run, ...]

    @property
    def count(self) -> int:
        """Outputs in each tile."""
        return sum(run.count for run in self.runs)


class Segment(NamedTuple):
    """Positions ``begin .. begin + span - 1`` of a residue class; those outside 0..members-1 are padding."""

    residue: int
    dilation: int
    members: int
    begin: int
    span: int

    def slices(self) -> tuple[slice, slice]:
        """The positions that are no padding: as a part of the segment, and on the axis."""
        low = min(max(self.begin, 0), self.members)
        high = max(low, min(self.begin + self.span, self.members))
        axis = slice(self.residue + low * self.dilation, self.residue + high * self.dilation, self.dilation)
        return slice(low - self.begin, high - self.begin), axis


def _runs(begins: list[int]) -> tuple[Run, ...]:
    """Split into arithmetic progressions, each as long as it goes; begins count from the first."""
    runs, first = [], 0
    while first < len(begins):
        last = min(first + 1, len(begins) - 1)
        slope = begins[last] - begins[first]
        while last + 1 < len(begins) and begins[last + 1] - begins[last] == slope:
            last += 1
        runs.append(Run(first, last - first + 1, begins[first] - begins[0], slope))
        first = last + 1
    return tuple(runs)


@functools.lru_cache(maxsize=1024)
def _cut(window: Window, length: int, axis: int, size: int, most: int) -> tuple[tuple[Segment, tuple[Tiles, ...]], ...]:
    """An axis by residue class: the positions its windows cover, and its tiles of ``size`` outputs, equal neighbours
    joined up to ``most`` at a time."""
    kernel_size, dilation = window.kernel_size[axis], window.dilation[axis]
    starts = window.neighbours(length, axis)[:, 0].tolist()
    classes = []
    for residue in range(dilation):
        outputs = [i for i, start in enumerate(starts) if start % dilation == residue]
        if not outputs:
            continue
        begins = [starts[i] // dilation for i in outputs]
        step = outputs[1] - outputs[0] if len(outputs) > 1 else 1
        joined = []
        for runs, equal in groupby(range(0, len(begins), size), lambda first: _runs(begins[first : first + size])):
            firsts = list(equal)
            count, moved = runs[-1].first + runs[-1].count, runs[-1].begin + (runs[-1].count - 1) * runs[-1].slope
            for n in range(0, len(firsts), most):
                members = firsts[n : n + most]
                low, high = outputs[members[0]], outputs[members[-1] + count - 1]
                tile_begins = tuple(begins[first] for first in members)
                joined.append(Tiles(slice(low, high + 1, step), tile_begins, moved + kernel_size, runs))
        span = begins[-1] - begins[0] + kernel_size
        segment = Segment(residue, dilation, (length - residue + dilation - 1) // dilation, begins[0], span)
        classes.append((segment, tuple(joined)))
    return tuple(classes)


@functools.lru_cache(maxsize=1024)
def _tile_size(window: Window, size: Pair, maps: int, channels: int, limit: int) -> tuple[Pair, int]:
    """Outputs per tile (rows, columns), and how many of the ``maps`` (batch · groups) go in one step: the cheapest of
    all even cuts whose bands fit into ``limit``."""

    def cuts(axis: int) -> Iterator[tuple[int, int, int, int, int]]:
        """For every tile length: itself, tiles, steps, and the sums over all tiles of span and of span · outputs."""
        outputs = -(-window.output_length(size[axis], axis) // window.dilation[axis])
        lengths = {-(-outputs // parts) for parts in range(1, outputs + 1)}
        for length in sorted(x for x in lengths if x <= LONGEST_TILE):
            # Rows go one tile at a time, columns all equal tiles together.
            joined = 1 if axis == 0 else outputs
            steps = [tiles for _, tiles in _cut(window, size[axis], axis, length, joined) for tiles in tiles]
            tiles = [step for step in steps for _ in step.begins]
            yield length, len(tiles), len(steps), sum(t.span for t in tiles), sum(t.span * t.count for t in tiles)

    best, chosen = math.inf, ((1, 1), 1)
    for row_cut, column_cut in product(cuts(0), cuts(1)):
        rows, row_tiles, row_steps, row_spans, row_area = row_cut
        columns, column_tiles, column_steps, column_spans, column_area = column_cut
        band = (row_area // row_steps) * (column_area // column_steps)
        if band > limit and (rows, columns) != (1, 1):
            continue
        together = max(1, min(maps, limit // band))
        steps = row_steps * column_steps * -(-maps // together)
        products = channels * (row_area * column_area + ELEMENT_COST * row_spans * column_spans)
        copies = ROW_COST * window.kernel_size[0] * rows * row_tiles * column_tiles
        cost = STEP_COST * steps + maps * (products + copies)
        if cost < best:
            best, chosen = cost, ((rows, columns), together)
    return chosen


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Strip(NamedTuple):
    """Tiles that share their input positions: n tiles of columns side by side, every tile of rows of a residue class,
    for a few batch entries and groups. Its tensors begin with the dimensions [n, b, g]."""

    maps: tuple[slice, slice]
    rows: Segment
    row_tiles: tuple[Tiles, ...]
    columns: tuple[Segment, ...]
    column_tiles: Tiles

    @property
    def leading(self) -> tuple[int, int, int]:
        return len(self.columns), *(part.stop - part.start for part in self.maps)

    def zeros(self, x: Tensor) -> Tensor:
        """[n, b, g, C, rows, span], as wide as an accumulator, channels innermost in memory where they are so in x."""
        sizes, dtype = (self.rows.span, self.columns[0].span), accumulator_dtype(x.dtype)
        if channels_fastest(x):
            return x.new_zeros((*self.leading, *sizes, x.shape[2]), dtype=dtype).movedim(-1, 3)
        return x.new_zeros((*self.leading, x.shape[2], *sizes), dtype=dtype)

    def _parts(self, strip: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same positions in the strip and in x [B, G, C, H, W], tile by tile."""
        row_part, rows = self.rows.slices()
        for tile, segment in zip(strip, self.columns, strict=True):
            column_part, columns = segment.slices()
            yield tile[..., row_part, column_part], x[(*self.maps, slice(None), rows, columns)]

    def load(self, x: Tensor) -> Tensor:
        """The strip's positions of x, zero where they are padding."""
        strip = self.zeros(x)
        for part, pixels in self._parts(strip, x):
            part.copy_(pixels)
        return strip

    def add_to(self, x: Tensor, strip: Tensor) -> None:
        """Add the strip to x at its positions; what fell on padding is dropped."""
        for part, pixels in self._parts(strip, x):
            pixels += part

    def positions(self, strip: Tensor, tile: Tiles) -> Tensor:
        """What the windows of a tile of rows cover: [n, b, g, C, rows, span], a view."""
        begin = tile.begins[0] - self.rows.begin
        return strip[..., begin : begin + tile.span, :]

    def outputs(self, tensor: Tensor, tile: Tiles) -> Tensor:
        """A tile of rows of a tensor over the outputs [B, G, ..., H', W']: [n, b, g, ..., R, T], a view."""
        columns = tensor[(*self.maps, ..., tile.outputs, self.column_tiles.outputs)]
        return columns.unflatten(-1, (len(self.columns), self.column_tiles.count)).movedim(-2, 0)


def strips(window: Window, x: Tensor, input_size: Pair | torch.Size | None = None) -> Iterator[Strip]:
    """Cut an operator with input x [B, G, C, H, W], of ``input_size`` if x is its output."""
    batch, groups, channels = x.shape[:3]
    height, width = x.shape[3:] if input_size is None else input_size
    kernel_elements = math.prod((batch, groups, *window.kernel_size, *window.output_size(height, width)))
    most = STEP_ELEMENTS.get(x.device.type, STEP_ELEMENTS_ELSEWHERE)
    limit = min(most, max(FEWEST_STEP_ELEMENTS, kernel_elements // STEP_SHARE))
    (rows, columns), together = _tile_size(window, (height, width), batch * groups, channels, limit)
    # The whole batch first: what depends on the group alone (a relative position bias) is then read once.
    batch_step = max(1, min(batch, together))
    group_step = max(1, min(groups, together // batch_step))
    row_classes, column_classes = _cut(window, height, 0, rows, 1), _cut(window, width, 1, columns, width)
    for b, g in product(range(0, batch, batch_step), range(0, groups, group_step)):
        maps = slice(b, min(b + batch_step, batch)), slice(g, min(g + group_step, groups))
        for (row_segment, row_tiles), (column_segment, column_groups) in product(row_classes, column_classes):
            for tiles in column_groups:
                segments = tuple(column_segment._replace(begin=begin, span=tiles.span) for begin in tiles.begins)
                yield Strip(maps, row_segment, row_tiles, segments, tiles)


def as_matrices(pixels: Tensor) -> Tensor:
    """[n, b, g, C, rows, columns] as [n·b·g, C, rows·columns], without a copy where the memory allows."""
    if channels_fastest(pixels[0]):
        return pixels.movedim(3, -1).flatten(0, 2).flatten(1, 2).mT
    return pixels.flatten(4).flatten(0, 2)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, or the same from the transposes if that is how they lie in memory: on a CPU several times quicker."""
    return torch.bmm(a, b) if b.stride(-1) == 1 else torch.bmm(b.mT, a.mT).mT


class Bands:
    """One reused buffer for the bands of a step, and the windows in which they hold the kernel.

    ``input_major`` says which index of band[j, i] is the slow one in memory.
    """

    def __init__(self, like: Tensor, kernel_size: Pair, input_major: bool) -> None:
        self._kernel_size, self._input_major = kernel_size, input_major
        self._buffer = like.new_empty(0, dtype=accumulator_dtype(like.dtype))
        self._geometry: object = None

    def select(self, strip: Strip, tile: Tiles) -> Tensor:
        """Bands [n·b·g, J, I] of a tile: zero outside the windows, inside them whatever was there before."""
        columns, leading = strip.column_tiles, strip.leading
        geometry = (leading, tile.span, tile.runs, columns.span, columns.runs)
        if geometry != self._geometry:
            self._geometry = geometry
            positions, outputs = tile.span * columns.span, tile.count * columns.count
            elements = math.prod(leading) * positions * outputs
            if elements > self._buffer.numel():
                self._buffer = self._buffer.new_empty(elements)
            buffer = self._buffer[:elements].zero_()
            if self._input_major:
                self._bands = buffer.view(-1, positions, outputs)
            else:
                self._bands = buffer.view(-1, outputs, positions).mT
            self._windows = list(self._views(leading, tile, columns))
        return self._bands

    def _views(
        self, leading: tuple[int, int, int], rows: Tiles, columns: Tiles
    ) -> Iterator[tuple[Tensor, slice, slice]]:
        """[n, b, g, Kh, Kw, h, w] inside the bands for each pair of runs, and the tile's rows and columns they are."""
        each, j, i = self._bands.stride()
        _, batch, groups = leading
        for r, c in product(rows.runs, columns.runs):
            view = self._bands.as_strided(
                (*leading, *self._kernel_size, r.count, c.count),
                (
                    *(batch * groups * each, groups * each, each),
                    *(columns.span * j, j),
                    *(r.slope * columns.span * j + columns.count * i, c.slope * j + i),
                ),
                (r.begin * columns.span + c.begin) * j + (r.first * columns.count + c.first) * i,
            )
            yield view, slice(r.first, r.first + r.count), slice(c.first, c.first + c.count)

    def lay(self, kernel: Tensor) -> None:
        """Put a tile's kernel [n, b, g, Kh, Kw, R, T] into the selected bands."""
        for view, rows, columns in self._windows:
            view.copy_(kernel[..., rows, columns])

    def pick(self, kernel: Tensor) -> None:
        """Take a tile's kernel [n, b, g, Kh, Kw, R, T] out of the selected bands."""
        for view, rows, columns in self._windows:
            kernel[..., rows, columns].copy_(view)


def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]: weight [B,G,Kh,Kw,H',W'], x [B,G,C,H,W] -> [B,G,C,H',W']."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    bands = Bands(x, window.kernel_size, input_major=not channels_fastest(x))
    for strip in strips(window, x):
        pixels = strip.load(x)
        for tile in strip.row_tiles:
            band = bands.select(strip, tile)
            bands.lay(strip.outputs(weight, tile))
            sums = multiply(as_matrices(strip.positions(pixels, tile)), band)
            target = strip.outputs(out, tile)
            target.copy_(sums.unflatten(0, strip.leading).unflatten(-1, target.shape[4:]))
    return out


def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]: g [B,G,C,H',W'], x [B,G,C,H,W] -> [B,G,Kh,Kw,H',W']."""
    out = empty_kernel_layout(g, window.kernel_size)
    bands = Bands(x, window.kernel_size, input_major=True)
    for strip in strips(window, x):
        pixels = strip.load(x)
        for tile in strip.row_tiles:
            band = bands.select(strip, tile)
            grad = as_matrices(strip.outputs(g, tile).to(pixels.dtype))
            torch.bmm(as_matrices(strip.positions(pixels, tile)).mT, grad, out=band)
            bands.pick(strip.outputs(out, tile))
    return out


def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]: g [B,G,C,H',W'] -> [B,G,C,H,W]."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    # Strips overlap: their sums meet in one tensor as wide as the accumulators.
    total = (out if out.dtype == accumulator_dtype(g.dtype) else torch.empty_like(out, dtype=torch.float32)).zero_()
    bands = Bands(g, window.kernel_size, input_major=channels_fastest(g))
    for strip in strips(window, g, input_size):
        pixels = strip.zeros(g)
        for tile in strip.row_tiles:
            band = bands.select(strip, tile)
            bands.lay(strip.outputs(weight, tile))
            sums = multiply(as_matrices(strip.outputs(g, tile).to(pixels.dtype)), band.mT)
            positions = strip.positions(pixels, tile)
            positions += sums.unflatten(0, strip.leading).unflatten(-1, positions.shape[4:])
        strip.add_to(total, pixels)
    return out if total is out else out.copy_(total)
