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

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.eager_tiles import Run, Segment, Tiles, cut, tile_size
from kernels.dtypes import accumulator_dtype
from kernels.layout import channels_fastest, empty_kernel_layout, empty_like_layout
from kernels.parallel import Work, alone, in_turn, over_maps
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


class Scratch:
    """Memory as wide as an accumulator that the steps of some work, of these sizes, use one after the other."""

    def __init__(self, like: Tensor, sizes: Iterable[int]) -> None:
        self._memory = like.new_empty(max(sizes, default=0), dtype=accumulator_dtype(like.dtype))

    def take(self, *shape: int) -> Tensor:
        return self._memory[: math.prod(shape)].view(shape)


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

    def positions(self) -> int:
        return math.prod(self.leading) * self.rows.span * self.column_tiles.span

    def tile_shape(self, tile: Tiles) -> tuple[int, ...]:
        """[n, b, g, R, T]"""
        return (*self.leading, tile.count, self.column_tiles.count)

    def pixels(self, x: Tensor, scratch: Scratch) -> Tensor:
        """[n, b, g, C, rows, span] of the scratch, channels innermost in memory where they are so in x."""
        sizes = (self.rows.span, self.column_tiles.span)
        if channels_fastest(x):
            return scratch.take(*self.leading, *sizes, x.shape[2]).movedim(-1, 3)
        return scratch.take(*self.leading, x.shape[2], *sizes)

    def _parts(self, strip: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same positions in the strip and in x [B, G, C, H, W], tile by tile."""
        row_part, rows = self.rows.slices()
        for tile, segment in zip(strip, self.columns, strict=True):
            column_part, columns = segment.slices()
            yield tile[..., row_part, column_part], x[(*self.maps, slice(None), rows, columns)]

    def load(self, strip: Tensor, x: Tensor) -> Work[None]:
        """The strip's positions of x, zero where they are padding."""
        parts = list(self._parts(strip, x))
        yield
        strip.zero_()
        for part, pixels in parts:
            part.copy_(pixels)

    def add_to(self, x: Tensor, strip: Tensor) -> Work[None]:
        """Add the strip to x at its positions; what fell on padding is dropped."""
        parts = list(self._parts(strip, x))
        yield
        for part, pixels in parts:
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


def pixel_scratch(found: list[Strip], x: Tensor) -> Scratch:
    return Scratch(x, (strip.positions() * x.shape[2] for strip in found))


def clear(tensor: Tensor) -> Work[None]:
    yield
    tensor.zero_()


def strips(window: Window, x: Tensor, input_size: Pair | torch.Size | None = None) -> list[Strip]:
    """Cut an operator with input x [B, G, C, H, W], of ``input_size`` if x is its output."""
    batch, groups, channels = x.shape[:3]
    height, width = x.shape[3:] if input_size is None else input_size
    kernel_elements = math.prod((batch, groups, *window.kernel_size, *window.output_size(height, width)))
    most = STEP_ELEMENTS.get(x.device.type, STEP_ELEMENTS_ELSEWHERE)
    band_limit = min(most, max(FEWEST_STEP_ELEMENTS, kernel_elements // STEP_SHARE))
    strip_limit = min(most, max(FEWEST_STEP_ELEMENTS, (kernel_elements + x.numel()) // STRIP_SHARE))
    maps = batch * groups
    (rows, columns), together = tile_size(window, (height, width), maps, channels, band_limit, strip_limit)
    # The whole batch first: what depends on the group alone (a relative position bias) is then read once.
    batch_step = max(1, min(batch, together))
    group_step = max(1, min(groups, together // batch_step))
    row_classes, column_classes = cut(window, height, 0, rows, False), cut(window, width, 1, columns, True)
    found = []
    for b, g in product(range(0, batch, batch_step), range(0, groups, group_step)):
        maps = slice(b, min(b + batch_step, batch)), slice(g, min(g + group_step, groups))
        for row_class, column_class in product(row_classes, column_classes):
            for tiles in column_class.tiles:
                strip = Strip(
                    (len(tiles.begins), maps[0].stop - b, maps[1].stop - g),
                    maps,
                    row_class.outputs,
                    column_class.outputs_of(tiles),
                    row_class.segment,
                    row_class.tiles,
                    tuple(column_class.segment._replace(begin=begin, span=tiles.span) for begin in tiles.begins),
                    tiles,
                )
                found.append(strip)
    return found


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

    def pairs(self, kernel: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same entries in the bands and in a tile's kernel [n, b, g, Kh, Kw, R, T], as views."""
        return [(view, kernel.narrow(-2, r.first, r.count).narrow(-1, c.first, c.count)) for view, r, c in self.windows]

    def lay(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Put a kernel into the bands."""
        if self.clear:
            self.bands.zero_()
        for view, kernel in pairs:
            view.copy_(kernel)

    def pick(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
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

    def __init__(self, found: list[Strip], like: Tensor, kernel_size: Pair, input_major: bool) -> None:
        self._kernel_size, self._input_major = kernel_size, input_major
        sizes = (
            math.prod(strip.tile_shape(tile)) * tile.span * strip.column_tiles.span
            for strip in found
            for tile in strip.row_tiles
        )
        self._scratch = Scratch(like, sizes)
        self._geometry: object = None

    def select(self, strip: Strip, tile: Tiles) -> Band:
        columns = strip.column_tiles
        geometry = (strip.leading, tile.span, tile.runs, columns.span, columns.runs)
        same = geometry == self._geometry
        if not same:
            self._geometry = geometry
            maps, positions, outputs = math.prod(strip.leading), tile.span * columns.span, tile.count * columns.count
            if self._input_major:
                bands = self._scratch.take(maps, positions, outputs)
            else:
                bands = self._scratch.take(maps, outputs, positions).mT
            views = functools.partial(self._views, leading=strip.leading, rows=tile, columns=columns)
            self._band = Band(bands, views, views(bands), clear=False)
        return self._band if same else self._band._replace(clear=True)

    def _views(
        self, bands: Tensor, leading: tuple[int, int, int], rows: Tiles, columns: Tiles
    ) -> list[tuple[Tensor, Run, Run]]:
        """[n, b, g, Kh, Kw, h, w] inside the bands for each pair of runs."""
        each, j, i = bands.stride()
        _, batch, groups = leading
        return [
            (
                bands.as_strided(
                    (*leading, *self._kernel_size, r.count, c.count),
                    (
                        *(batch * groups * each, groups * each, each),
                        *(columns.span * j, j),
                        *(r.slope * columns.span * j + columns.count * i, c.slope * j + i),
                    ),
                    bands.storage_offset()
                    + (r.begin * columns.span + c.begin) * j
                    + (r.first * columns.count + c.first) * i,
                ),
                r,
                c,
            )
            for r, c in product(rows.runs, columns.runs)
        ]


@alone
def aggregate(weight: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,c,i] = Σ_k weight[b,g,k,i] · x[b,g,c,nbr(i,k)]: [B,G,Kh,Kw,H',W'] and [B,G,C,H,W] -> [B,G,C,H',W']."""
    out = empty_like_layout(x, (*x.shape[:3], *weight.shape[4:]))
    over_maps(lambda part: _aggregate(weight[part], x[part], window, out[part]), x, weight.numel() * x.shape[2])
    return out


def _aggregate(weight: Tensor, x: Tensor, window: Window, out: Tensor) -> Work[None]:
    found, steps = strips(window, x), []
    scratch, bands = pixel_scratch(found, x), Bands(found, x, window.kernel_size, not channels_fastest(x))
    for strip in found:
        pixels, kernel, target = strip.pixels(x, scratch), strip.outputs(weight), strip.outputs(out)
        steps.append(strip.load(pixels, x))
        matrices = as_matrices(pixels)
        for tile in strip.row_tiles:
            band = bands.select(strip, tile)
            steps.append(
                mix(band, band.pairs(tile_of(kernel, tile)), strip.covered(matrices, tile), tile_of(target, tile))
            )
    return in_turn(steps)


def mix(band: Band, pairs: list[tuple[Tensor, Tensor]], pixels: Tensor, out: Tensor) -> Work[None]:
    """out = pixels mixed by a kernel that is laid into the band."""
    yield
    band.lay(pairs)
    out.copy_(band.gather(pixels).view(out.shape))


@alone
def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]: [B,G,C,H',W'] and [B,G,C,H,W] -> [B,G,Kh,Kw,H',W']."""
    out = empty_kernel_layout(g, window.kernel_size)
    over_maps(lambda part: _correlate(g[part], x[part], window, out[part]), x, out.numel() * x.shape[2])
    return out


def _correlate(g: Tensor, x: Tensor, window: Window, out: Tensor) -> Work[None]:
    found, steps = strips(window, x), []
    scratch, bands = pixel_scratch(found, x), Bands(found, x, window.kernel_size, input_major=True)

    def step(band: Band, pixels: Tensor, grad: Tensor, target: Tensor) -> Work[None]:
        pairs = band.pairs(target)
        yield
        torch.bmm(pixels, as_matrices(grad.to(pixels.dtype)), out=band.bands)
        band.pick(pairs)

    for strip in found:
        pixels, grad, target = strip.pixels(x, scratch), strip.outputs(g), strip.outputs(out)
        steps.append(strip.load(pixels, x))
        matrices = as_matrices(pixels)
        for tile in strip.row_tiles:
            covered = strip.covered(matrices, tile).mT
            steps.append(step(bands.select(strip, tile), covered, tile_of(grad, tile), tile_of(target, tile)))
    return in_turn(steps)


@alone
def transpose(weight: Tensor, g: Tensor, input_size: Pair, window: Window) -> Tensor:
    """out[b,g,c,j] = Σ_{(i,k): nbr(i,k)=j} weight[b,g,k,i] · g[b,g,c,i]:
    [B,G,Kh,Kw,H',W'] and [B,G,C,H',W'] -> [B,G,C,H,W]."""
    out = empty_like_layout(g, (*g.shape[:3], *input_size))
    # Strips overlap: their sums meet in one tensor as wide as the accumulators.
    total = (out if out.dtype == accumulator_dtype(g.dtype) else torch.empty_like(out, dtype=torch.float32)).zero_()
    over_maps(lambda part: _transpose(weight[part], g[part], window, total[part]), g, weight.numel() * g.shape[2])
    return out if total is out else out.copy_(total)


def _transpose(weight: Tensor, g: Tensor, window: Window, total: Tensor) -> Work[None]:
    found, steps = strips(window, g, total.shape[3:]), []
    scratch, bands = pixel_scratch(found, g), Bands(found, g, window.kernel_size, channels_fastest(g))

    def step(band: Band, kernel: Tensor, grad: Tensor, sums: Tensor) -> Work[None]:
        pairs = band.pairs(kernel)
        yield
        band.lay(pairs)
        sums += band.scatter(as_matrices(grad.to(sums.dtype)))

    for strip in found:
        sums, kernel, grad = strip.pixels(g, scratch), strip.outputs(weight), strip.outputs(g)
        matrices = as_matrices(sums)
        steps.append(clear(sums))
        for tile in strip.row_tiles:
            band, covered = bands.select(strip, tile), strip.covered(matrices, tile)
            steps.append(step(band, tile_of(kernel, tile), tile_of(grad, tile), covered))
        steps.append(strip.add_to(total, sums))
    return in_turn(steps)
