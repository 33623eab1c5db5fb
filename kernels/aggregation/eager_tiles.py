"""How the eager path cuts an operator into tiles: integers only.

Along an axis the window of output t begins at an affine function of t, in one run of outputs (zero-padded rule) or
three (clamped rule: both borders stand still, the middle moves). A dilated window is an undilated one inside a residue
class of positions, so below the dilation is 1 and positions are counted within their class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import groupby, product
from typing import NamedTuple

from kernels.windows import Pair, Window

__all__ = ["ResidueClass", "Run", "Segment", "Tiles", "cut", "tile_size"]

# Costs measured on a CPU in multiply-adds of a matrix product: of a step beyond its arithmetic (a dozen calls), of one
# element of a product's smaller operand, of one row of a tile when a kernel row is copied.
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
    """Equal tiles side by side in a residue class: tile n holds ``count`` of its outputs from ``first + n * count`` on,
    whose windows cover ``span`` positions from ``begins[n]`` on."""

    first: int
    count: int
    begins: tuple[int, ...]
    span: int
    runs: tuple[Run, ...]


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


class ResidueClass(NamedTuple):
    """Outputs of an axis whose windows lie in one residue class of positions: all those positions, and the tiles."""

    outputs: slice
    segment: Segment
    tiles: tuple[Tiles, ...]

    def outputs_of(self, tiles: Tiles) -> slice:
        start = self.outputs.start + tiles.first * self.outputs.step
        return slice(start, start + len(tiles.begins) * tiles.count * self.outputs.step, self.outputs.step)


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
def cut(window: Window, length: int, axis: int, size: int, joined: bool) -> tuple[ResidueClass, ...]:
    """An axis in tiles of ``size`` outputs (the last of a class may be smaller), equal neighbours ``joined`` or not."""
    kernel_size, dilation = window.kernel_size[axis], window.dilation[axis]
    starts = window.neighbours(length, axis)[:, 0].tolist()
    classes, outputs_by_residue = [], {}
    for i, start in enumerate(starts):
        outputs_by_residue.setdefault(start % dilation, []).append(i)
    for residue, outputs in sorted(outputs_by_residue.items()):
        begins = [starts[i] // dilation for i in outputs]
        step = outputs[1] - outputs[0] if len(outputs) > 1 else 1
        alike = [(_runs(begins[first : first + size]), first) for first in range(0, len(begins), size)]
        groups = [list(equal) for _, equal in groupby(alike, lambda tile: tile[0])] if joined else [[t] for t in alike]
        tiles = []
        for group in groups:
            runs, first = group[0]
            count = sum(run.count for run in runs)
            span = runs[-1].begin + (runs[-1].count - 1) * runs[-1].slope + kernel_size
            tiles.append(Tiles(first, count, tuple(begins[start] for _, start in group), span, runs))
        members = (length - residue + dilation - 1) // dilation
        segment = Segment(residue, dilation, members, begins[0], begins[-1] - begins[0] + kernel_size)
        classes.append(ResidueClass(slice(outputs[0], outputs[-1] + 1, step), segment, tuple(tiles)))
    return tuple(classes)


def _weighed_cuts(window: Window, length: int, axis: int) -> Iterator[tuple[int, int, int, int, int]]:
    """For every even tile length: itself, tiles, steps, and the sums over all tiles of span and of span · outputs.

    A step takes one tile of rows and all equal tiles of columns.
    """
    outputs = -(-window.output_length(length, axis) // window.dilation[axis])
    for size in sorted({-(-outputs // parts) for parts in range(1, outputs + 1)}):
        if size > LONGEST_TILE:
            break
        steps = [tiles for found in cut(window, length, axis, size, axis == 1) for tiles in found.tiles]
        tiles = [step for step in steps for _ in step.begins]
        yield size, len(tiles), len(steps), sum(t.span for t in tiles), sum(t.span * t.count for t in tiles)


@functools.lru_cache(maxsize=1024)
def tile_size(
    window: Window, size: Pair, maps: int, channels: int, band_limit: int, strip_limit: int
) -> tuple[Pair, int]:
    """Outputs per tile (rows, columns), and how many of the ``maps`` (batch · groups) go in one step: the cheapest of
    all even cuts whose bands (outputs times positions) and input positions keep within the limits, in elements."""
    best, chosen = math.inf, ((1, 1), 1)
    for by_rows, by_columns in product(*(list(_weighed_cuts(window, size[axis], axis)) for axis in (0, 1))):
        rows, row_tiles, row_steps, row_spans, row_area = by_rows
        columns, column_tiles, column_steps, column_spans, column_area = by_columns
        band = (row_area // row_steps) * (column_area // column_steps)
        if band > band_limit and (rows, columns) != (1, 1):
            continue
        strip = channels * (size[0] + window.kernel_size[0]) * column_spans
        together = max(1, min(maps, band_limit // band, strip_limit // strip))
        steps = row_steps * column_steps * -(-maps // together)
        products = channels * (row_area * column_area + ELEMENT_COST * row_spans * column_spans)
        copies = ROW_COST * window.kernel_size[0] * rows * row_tiles * column_tiles
        cost = STEP_COST * steps + maps * (products + copies)
        if cost < best:
            best, chosen = cost, ((rows, columns), together)
    return chosen
