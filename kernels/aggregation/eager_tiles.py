"""How the eager path cuts an operator into tiles and steps: integers, and views of tensors.

A window rule treats rows and columns alike and apart. Along an axis the windows of a tile's outputs cover one span of
positions, and a table says which of them each neighbour is; tiles with equal tables are done together. A dilated window
is an undilated one among every dilation-th position, so a tile's outputs are those whose windows lie in one such class.
"""

import functools
import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dtypes import accumulator_dtype
from kernels.layout import channels_fastest
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
STEP_SHARE = 6 / 5
STEP_ELEMENTS = {"cpu": 2**20}
STEP_ELEMENTS_ELSEWHERE = 2**24
FEWEST_STEP_ELEMENTS = 2**15

Index = tuple[tuple[int, ...], ...]


class Tiles(NamedTuple):
    """Equal tiles of an axis side by side: ``outputs`` in tiles of ``count``. The windows of each cover ``span``
    positions, every ``dilation``-th from one of ``begins`` on; neighbour k of output t is the one at index[t][k]."""

    outputs: slice
    count: int
    begins: list[int]
    span: int
    dilation: int
    index: Index

    def inside(self, length: int) -> Iterator[tuple[slice, slice]]:
        """Of each tile the positions that are not padding: among those of its span, and on the axis."""
        for begin in self.begins:
            low = max(0, -(begin // self.dilation))
            high = max(low, min(self.span, -((begin - length) // self.dilation)))
            first, end = (begin + at * self.dilation for at in (low, high))
            yield slice(low, high), slice(first, end, self.dilation)


@functools.lru_cache(maxsize=1024)
def cut(window: Window, length: int, axis: int, size: int, joined: bool) -> list[Tiles]:
    """An axis in tiles of ``size`` outputs (the last of a class may be smaller), equal neighbours ``joined`` or not."""
    dilation, neighbours = window.dilation[axis], window.neighbours(length, axis).tolist()
    classes: dict[int, list[int]] = {}
    for output, positions in enumerate(neighbours):
        classes.setdefault(positions[0] % dilation, []).append(output)
    found: list[Tiles] = []
    for outputs in classes.values():
        step = outputs[1] - outputs[0] if len(outputs) > 1 else 1
        for first in range(0, len(outputs), size):
            covered = [neighbours[output] for output in outputs[first : first + size]]
            begin, count = covered[0][0], len(covered)
            index = tuple(tuple((position - begin) // dilation for position in each) for each in covered)
            taken, begins = slice(outputs[first], outputs[first] + count * step, step), [begin]
            if joined and first > 0 and found[-1].index == index:
                last = found.pop()
                taken, begins = slice(last.outputs.start, taken.stop, step), [*last.begins, begin]
            found.append(Tiles(taken, count, begins, index[-1][-1] + 1, dilation, index))
    return found


@functools.lru_cache(maxsize=1024)
def tile_size(window: Window, size: Pair, maps: int, channels: int, limit: int) -> tuple[Pair, int]:
    """Outputs per tile (rows, columns), and how many of the ``maps`` (batch · groups) go in one step: the cheapest of
    all even cuts whose steps (bands of outputs times positions, pixels, a product) keep within a limit, in elements."""

    def cuts(axis: int) -> Iterator[tuple[int, int, int, int]]:
        """Outputs of a tile, positions under their windows, the number of tiles, and of those at the borders that are
        unlike each other."""
        length, dilation, reach = size[axis], window.dilation[axis], window.kernel_size[axis] // 2
        outputs = -(-window.output_length(length, axis) // dilation)
        for count in sorted({-(-outputs // parts) for parts in range(1, outputs + 1)}):
            span, tiles, unlike = (count - 1) * window.stride[axis] + window.kernel_size[axis], -(-outputs // count), 0
            if window.clamped:
                span, unlike = min(span, -(-length // dilation)), min(tiles - 1, 2 * -(-reach // count))
            if count <= LONGEST_TILE:
                yield count, span, tiles * dilation, unlike * dilation

    best, chosen = math.inf, ((1, 1), 1)
    for (rows, row_span, row_tiles, _), (columns, column_span, column_tiles, unlike) in product(cuts(0), cuts(1)):
        outputs, positions = rows * columns, row_span * column_span
        joined = (column_tiles - unlike) // window.dilation[1]
        elements = joined * positions * (outputs + 2 * channels)
        if elements > limit and outputs > 1:
            continue
        together = max(1, min(maps, limit // elements))
        steps = row_tiles * (unlike + window.dilation[1]) * -(-maps // together)
        products, copies = channels * positions * (outputs + ELEMENT_COST), ROW_COST * window.kernel_size[0] * rows
        cost = STEP_COST * steps + maps * row_tiles * column_tiles * (products + copies)
        if cost < best:
            best, chosen = cost, ((rows, columns), together)
    return chosen


class Step(NamedTuple):
    """A tile of rows and n equal tiles of columns side by side, for a few batch entries and groups: [b, g, n, ...]."""

    leading: tuple[int, int, int]
    maps: tuple[slice, slice]
    rows: Tiles
    columns: Tiles

    def outputs(self, tensor: Tensor) -> Tensor:
        """A tensor over the outputs [B, G, ..., H', W'] at the step's: [b, g, n, ..., R, T], a view."""
        part = tensor[(*self.maps, ..., self.rows.outputs, self.columns.outputs)]
        return part.unflatten(-1, (self.leading[2], self.columns.count)).movedim(-2, 2)

    def kernel(self, tensor: Tensor) -> Tensor:
        """A dynamic kernel [B, G, Kh, Kw, H', W'] at the step's outputs: [b, g, n, R, T, Kh, Kw], a view."""
        return self.outputs(tensor).permute(0, 1, 2, 5, 6, 3, 4)

    def features(self, g: Tensor) -> Tensor:
        """g [B, G, C, H', W'] at the step's outputs, as matrices [b·g·n, C, R·T] as wide as an accumulator."""
        return _as_matrices(self.outputs(g).to(accumulator_dtype(g.dtype)))

    def _places(self, x: Tensor, pixels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The positions that are not padding, in the pixels [b, g, n, C, rows, columns] and in x, as views."""
        ((row_part, rows),) = self.rows.inside(x.shape[-2])
        for tile, (column_part, columns) in zip(pixels.unbind(2), self.columns.inside(x.shape[-1]), strict=True):
            yield tile[..., row_part, column_part], x[(*self.maps, slice(None), rows, columns)]

    def pixels(self, x: Tensor) -> Tensor:
        """x [B, G, C, H, W] under the windows, padding as zeros: matrices [b·g·n, C, J], J the positions of a tile."""
        size, channels, dtype = (self.rows.span, self.columns.span), x.shape[2], accumulator_dtype(x.dtype)
        if channels_fastest(x):
            pixels = x.new_zeros((*self.leading, *size, channels), dtype=dtype).movedim(-1, 3)
        else:
            pixels = x.new_zeros((*self.leading, channels, *size), dtype=dtype)
        for tile, source in self._places(x, pixels):
            tile.copy_(source)
        return _as_matrices(pixels)

    def add(self, sums: Tensor, total: Tensor) -> None:
        """Add what fell on positions [b·g·n, C, J] to ``total`` [B, G, C, H, W]: steps overlap. Padding is dropped."""
        pixels = sums.unflatten(0, self.leading).unflatten(-1, (self.rows.span, self.columns.span))
        for tile, target in self._places(total, pixels):
            target += tile

    def index(self, device: torch.device) -> Tensor:
        """Where the kernel [R, T, Kh, Kw] lies in a band [R·T, J]."""
        return _index(self.rows.index, self.columns.index, self.rows.span, self.columns.span, device)


@functools.lru_cache(maxsize=32)
def _index(rows: Index, columns: Index, height: int, width: int, device: torch.device) -> Tensor:
    at_rows, at_columns = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
    outputs = torch.arange(len(rows) * len(columns), device=device).view(len(rows), len(columns), 1, 1)
    return (outputs * height + at_rows[:, None, :, None]) * width + at_columns[None, :, None, :]


def _as_matrices(pixels: Tensor) -> Tensor:
    """[b, g, n, C, rows, columns] as [b·g·n, C, rows·columns], without a copy where the memory allows."""
    if channels_fastest(pixels[0]):
        return pixels.movedim(3, -1).flatten(0, 2).flatten(1, 2).mT
    return pixels.flatten(4).flatten(0, 2)


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
        found.append(Step((maps[0].stop - b, maps[1].stop - g, len(column.begins)), maps, row, column))
    return found
