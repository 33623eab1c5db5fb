"""How the eager path cuts an operator into tiles and steps: integers, and views of tensors.

Along an axis the window of output t begins at an affine function of t, in one run of outputs (zero-padded rule) or
three (clamped rule: both borders stand still, the middle moves). A dilated window is an undilated one inside a residue
class of positions, so below the dilation is 1 and positions are counted within their class.
"""

import functools
import math
from collections.abc import Iterator
from itertools import groupby, product
from typing import NamedTuple

from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.windows import Pair, Window

# Costs measured on a CPU in multiply-adds of a matrix product: of a step beyond its arithmetic (a dozen calls), of one
# element of a product's smaller operand, of one row of a tile when a kernel row is copied.
STEP_COST = 4_000_000
ELEMENT_COST = 32
ROW_COST = 400
# Longest tile worth weighing, in outputs along one axis.
LONGEST_TILE = 64
# Most elements in one step: a share of the kernel's own size (lean in memory), within bounds (at 7x7 the number of
# steps is what costs). Of float32 the upper bound is 4 MB on a CPU, to stay in cache; elsewhere steps should be large.
STEP_SHARE = 3 / 4
STEP_ELEMENTS = {"cpu": 2**20}
STEP_ELEMENTS_ELSEWHERE = 2**24
FEWEST_STEP_ELEMENTS = 2**15

# The same entries in two tensors, as views.
Pairs = list[tuple[Tensor, Tensor]]


class Run(NamedTuple):
    """Outputs ``first .. first + count - 1`` of a tile; the window of its t-th begins at ``begin + t * slope``."""

    first: int
    count: int
    begin: int
    slope: int


class Segment(NamedTuple):
    """Positions ``begin .. begin + span - 1`` of a residue class; those outside 0..members-1 are padding."""

    residue: int
    dilation: int
    members: int
    begin: int
    span: int

    def slices(self) -> tuple[slice, slice]:
        """The positions that are not padding: as a part of the segment, and on the axis."""
        low = min(max(self.begin, 0), self.members)
        high = max(low, min(self.begin + self.span, self.members))
        axis = slice(self.residue + low * self.dilation, self.residue + high * self.dilation, self.dilation)
        return slice(low - self.begin, high - self.begin), axis


class Tiles(NamedTuple):
    """Equal tiles of an axis side by side, in one residue class: ``outputs`` in tiles of ``count``, whose windows cover
    the positions of ``segments``, ``span`` each."""

    outputs: slice
    count: int
    segments: tuple[Segment, ...]
    span: int
    runs: tuple[Run, ...]


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
def cut(window: Window, length: int, axis: int, size: int, joined: bool) -> tuple[Tiles, ...]:
    """An axis in tiles of ``size`` outputs (the last of a class may be smaller), equal neighbours ``joined`` or not."""
    kernel_size, dilation = window.kernel_size[axis], window.dilation[axis]
    starts = window.neighbours(length, axis)[:, 0].tolist()
    outputs_by_residue: dict[int, list[int]] = {}
    for i, start in enumerate(starts):
        outputs_by_residue.setdefault(start % dilation, []).append(i)
    found = []
    for residue, outputs in sorted(outputs_by_residue.items()):
        begins = [starts[i] // dilation for i in outputs]
        step = outputs[1] - outputs[0] if len(outputs) > 1 else 1
        members = (length - residue + dilation - 1) // dilation
        tiles = [(_runs(begins[first : first + size]), first) for first in range(0, len(begins), size)]
        for group in (
            [list(equal) for _, equal in groupby(tiles, lambda tile: tile[0])] if joined else [[t] for t in tiles]
        ):
            runs, first = group[0]
            count = sum(run.count for run in runs)
            span = runs[-1].begin + (runs[-1].count - 1) * runs[-1].slope + kernel_size
            segments = tuple(Segment(residue, dilation, members, begins[start], span) for _, start in group)
            start = outputs[first]
            found.append(Tiles(slice(start, start + len(group) * count * step, step), count, segments, span, runs))
    return tuple(found)


class _Cut(NamedTuple):
    """An axis in tiles of ``size`` outputs, and what a cut costs: sums over all tiles, and the largest step's."""

    size: int
    tiles: int
    steps: int
    spans: int
    areas: int
    largest_span: int
    largest_area: int


def _cuts(window: Window, length: int, axis: int) -> Iterator[_Cut]:
    """Every even tile length. An area is span · outputs; a step takes one tile of rows, all equal tiles of columns."""
    outputs = -(-window.output_length(length, axis) // window.dilation[axis])
    for size in sorted({-(-outputs // parts) for parts in range(1, outputs + 1)}):
        if size > LONGEST_TILE:
            break
        steps = cut(window, length, axis, size, axis == 1)
        spans = [len(step.segments) * step.span for step in steps]
        areas = [span * step.count for span, step in zip(spans, steps, strict=True)]
        tiles = sum(len(step.segments) for step in steps)
        yield _Cut(size, tiles, len(steps), sum(spans), sum(areas), max(spans), max(areas))


@functools.lru_cache(maxsize=1024)
def tile_size(window: Window, size: Pair, maps: int, channels: int, limit: int) -> tuple[Pair, int]:
    """Outputs per tile (rows, columns), and how many of the ``maps`` (batch · groups) go in one step: the cheapest of
    all even cuts whose steps (bands of outputs times positions, pixels, a product) keep within a limit, in elements."""
    best, chosen = math.inf, ((1, 1), 1)
    for rows, columns in product(*(list(_cuts(window, size[axis], axis)) for axis in (0, 1))):
        pixels = channels * rows.largest_span * columns.largest_span
        elements = rows.largest_area * columns.largest_area + 2 * pixels
        if elements > limit and (rows.size, columns.size) != (1, 1):
            continue
        together = max(1, min(maps, limit // elements))
        steps = rows.steps * columns.steps * -(-maps // together)
        products = channels * (rows.areas * columns.areas + ELEMENT_COST * rows.spans * columns.spans)
        copies = ROW_COST * window.kernel_size[0] * rows.size * rows.tiles * columns.tiles
        cost = STEP_COST * steps + maps * (products + copies)
        if cost < best:
            best, chosen = cost, ((rows.size, columns.size), together)
    return chosen


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

    def pairs(self, pixels: Tensor, x: Tensor) -> Pairs:
        """The positions that are not padding, in the pixels and in x [B, G, C, H, W], as views."""
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


def steps_of(window: Window, x: Tensor, input_size: Pair | None = None) -> list[Step]:
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
