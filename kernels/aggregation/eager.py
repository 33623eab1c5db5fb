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

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.eager_tiles import Run, Segment, Tiles, cut, tile_size
from kernels.dtypes import accumulator_dtype
from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.windows import Pair, Window

__all__ = [
    "Bands",
    "Strip",
    "aggregate",
    "as_matrices",
    "correlate",
    "multiply",
    "strips",
    "tile_of",
    "transpose",
]

# Most input elements in a strip: a share of the operator's inputs (lean in memory).
STRIP_SHARE = 3
# Most band elements in one step: a share of the kernel's own size, within bounds (at 7x7 the number of steps is what
# costs). The upper bound is 2 MB in float32 on a CPU, so that a step stays in cache; elsewhere steps should be large.
STEP_SHARE = 2
STEP_ELEMENTS = {"cpu": 2**19}
STEP_ELEMENTS_ELSEWHERE = 2**24
FEWEST_STEP_ELEMENTS = 2**15


class Strip(NamedTuple):
    """Tiles that share their input positions: n tiles of columns side by side, every tile of rows of a residue class,
    for a few batch entries and groups. Its tensors begin with ``leading`` = [n, b, g]."""

    leading: tuple[int, int, int]
    maps: tuple[slice, slice]
    output_rows: slice
    output_columns: slice
    rows: Segment
    row_tiles: tuple[Tiles, ...]
    columns: tuple[Segment, ...]
    column_tiles: Tiles

    def zeros(self, x: Tensor) -> Tensor:
        """[n, b, g, C, rows, span], as wide as an accumulator, channels innermost in memory where they are so in x."""
        sizes, dtype = (self.rows.span, self.column_tiles.span), accumulator_dtype(x.dtype)
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

    def covered(self, strip: Tensor, tile: Tiles) -> Tensor:
        """The positions that a tile's windows cover, out of a strip as matrices [n·b·g, C, rows·span]: a view."""
        span = self.column_tiles.span
        return strip.narrow(2, (tile.begins[0] - self.rows.begin) * span, tile.span * span)

    def outputs(self, tensor: Tensor) -> Tensor:
        """A tensor over the outputs [B, G, ..., H', W'] at the strip's: [n, b, g, ..., rows, T], a view."""
        columns = tensor[(*self.maps, ..., self.output_rows, self.output_columns)]
        return columns.unflatten(-1, (self.leading[0], self.column_tiles.count)).movedim(-2, 0)


def tile_of(outputs: Tensor, tile: Tiles) -> Tensor:
    """A tile of rows [n, b, g, ..., R, T] out of a strip's outputs: a view."""
    return outputs.narrow(-2, tile.first, tile.count)


def strips(window: Window, x: Tensor, input_size: Pair | torch.Size | None = None) -> Iterator[Strip]:
    """Cut an operator with input x [B, G, C, H, W], of ``input_size`` if x is its output."""
    batch, groups, channels = x.shape[:3]
    height, width = x.shape[3:] if input_size is None else input_size
    kernel_elements = math.prod((batch, groups, *window.kernel_size, *window.output_size(height, width)))
    strip_limit = max(FEWEST_STEP_ELEMENTS, (kernel_elements + x.numel()) // STRIP_SHARE)
    most = STEP_ELEMENTS.get(x.device.type, STEP_ELEMENTS_ELSEWHERE)
    band_limit = min(most, max(FEWEST_STEP_ELEMENTS, kernel_elements // STEP_SHARE))
    maps = batch * groups
    (rows, columns), together = tile_size(window, (height, width), maps, channels, band_limit, strip_limit)
    # The whole batch first: what depends on the group alone (a relative position bias) is then read once.
    batch_step = max(1, min(batch, together))
    group_step = max(1, min(groups, together // batch_step))
    row_classes, column_classes = cut(window, height, 0, rows, False), cut(window, width, 1, columns, True)
    for b, g in product(range(0, batch, batch_step), range(0, groups, group_step)):
        maps = slice(b, min(b + batch_step, batch)), slice(g, min(g + group_step, groups))
        for row_class, column_class in product(row_classes, column_classes):
            for tiles in column_class.tiles:
                yield Strip(
                    (len(tiles.begins), maps[0].stop - b, maps[1].stop - g),
                    maps,
                    row_class.outputs,
                    column_class.outputs_of(tiles),
                    row_class.segment,
                    row_class.tiles,
                    tuple(column_class.segment._replace(begin=begin, span=tiles.span) for begin in tiles.begins),
                    tiles,
                )


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
        columns = strip.column_tiles
        geometry = (strip.leading, tile.span, tile.runs, columns.span, columns.runs)
        if geometry != self._geometry:
            self._geometry = geometry
            positions, outputs = tile.span * columns.span, tile.count * columns.count
            elements = math.prod(strip.leading) * positions * outputs
            if elements > self._buffer.numel():
                self._buffer = self._buffer.new_empty(elements)
            buffer = self._buffer[:elements].zero_()
            if self._input_major:
                self._bands = buffer.view(-1, positions, outputs)
            else:
                self._bands = buffer.view(-1, outputs, positions).mT
            self._windows = list(self._views(strip.leading, tile, columns))
        return self._bands

    def _views(self, leading: tuple[int, int, int], rows: Tiles, columns: Tiles) -> Iterator[tuple[Tensor, Run, Run]]:
        """[n, b, g, Kh, Kw, h, w] inside the bands for each pair of runs."""
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
            yield view, r, c

    def lay(self, kernel: Tensor) -> None:
        """Put a tile's kernel [n, b, g, Kh, Kw, R, T] into the selected bands."""
        for view, r, c in self._windows:
            view.copy_(kernel.narrow(-2, r.first, r.count).narrow(-1, c.first, c.count))

    def pick(self, kernel: Tensor) -> None:
        """Take a tile's kernel [n, b, g, Kh, Kw, R, T] out of the selected bands."""
        for view, r, c in self._windows:
            kernel.narrow(-2, r.first, r.count).narrow(-1, c.first, c.count).copy_(view)


def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]: [B,G,Kh,Kw,H',W'] and [B,G,C,H,W] -> [B,G,C,H',W']."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    bands = Bands(x, window.kernel_size, input_major=not channels_fastest(x))
    for strip in strips(window, x):
        pixels, kernel, target = as_matrices(strip.load(x)), strip.outputs(weight), strip.outputs(out)
        for tile in strip.row_tiles:
            band = bands.select(strip, tile)
            bands.lay(tile_of(kernel, tile))
            part = tile_of(target, tile)
            part.copy_(multiply(strip.covered(pixels, tile), band).view(part.shape))
        del pixels  # before the next strip is loaded
    return out


def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]: [B,G,C,H',W'] and [B,G,C,H,W] -> [B,G,Kh,Kw,H',W']."""
    out = empty_kernel_layout(g, window.kernel_size)
    bands = Bands(x, window.kernel_size, input_major=True)
    for strip in strips(window, x):
        pixels, grad, target = as_matrices(strip.load(x)), strip.outputs(g), strip.outputs(out)
        for tile in strip.row_tiles:
            band = bands.select(strip, tile)
            torch.bmm(strip.covered(pixels, tile).mT, as_matrices(tile_of(grad, tile).to(pixels.dtype)), out=band)
            bands.pick(tile_of(target, tile))
        del pixels  # before the next strip is loaded
    return out


def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]:
    [B,G,Kh,Kw,H',W'] and [B,G,C,H',W'] -> [B,G,C,H,W]."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    # Strips overlap: their sums meet in one tensor as wide as the accumulators.
    total = (out if out.dtype == accumulator_dtype(g.dtype) else torch.empty_like(out, dtype=torch.float32)).zero_()
    bands = Bands(g, window.kernel_size, input_major=channels_fastest(g))
    for strip in strips(window, g, input_size):
        sums, kernel, grad = strip.zeros(g), strip.outputs(weight), strip.outputs(g)
        matrices = as_matrices(sums)
        for tile in strip.row_tiles:
            band = bands.select(strip, tile)
            bands.lay(tile_of(kernel, tile))
            covered = strip.covered(matrices, tile)
            covered += multiply(as_matrices(tile_of(grad, tile).to(sums.dtype)), band.mT)
        strip.add_to(total, sums)
        del sums, matrices, covered  # before the next strip is made
    return out if total is out else out.copy_(total)
