"""Which tile the algebra's kernels work on where windows are zero-padded: the one place where it is decided."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import interpreting, is_hopper
from kernels.launch import ceil_divide, next_power_of_2
from kernels.layout import channels_fastest
from kernels.windows import Pair, Window

LARGEST_KERNEL, LARGEST_STRIDE, LARGEST_DILATION = 16, 4, 8
SHARED_BYTES = (64 if torch.version.hip else 99) * 2**10  # of memory that a program has on the smallest GPU


def slides(window: Window) -> bool:
    """Whether rows can slide over registers, of a large window piece by piece. Beyond these strides and dilations there
    are hardly rows that outputs share, and the eager path computes them."""
    return not window.clamped and max(window.stride) <= LARGEST_STRIDE and max(window.dilation) <= LARGEST_DILATION


def in_one_piece(window: Window) -> bool:
    """Whether registers hold the taps of a whole window."""
    return max(window.kernel_size) <= LARGEST_KERNEL


def pieces(window: Window) -> Iterator[tuple[Window, slice, slice]]:
    """A window in pieces that registers hold, and the rows and columns of each in it."""
    rows, columns = (
        [slice(first, min(first + step, length)) for first in range(0, length, step)]
        for length, step in zip(window.kernel_size, map(_taps, window.kernel_size), strict=True)
    )
    for places in itertools.product(rows, columns):
        size_h, size_w = (place.stop - place.start for place in places)
        padding_h, padding_w = (
            padding - place.start * dilation
            for place, padding, dilation in zip(places, window.padding, window.dilation, strict=True)
        )
        yield window._replace(kernel_size=(size_h, size_w), padding=(padding_h, padding_w)), *places


def phases(window: Window) -> Iterator[tuple[Window, tuple[slice, slice], tuple[slice, slice]]]:
    """A transposed window without its strides: outputs of one remainder by the stride look up the same taps, one input
    apart. For each of these phases its window, the rows and columns of its taps, and those of its outputs."""
    for rows, columns in itertools.product(_phases_along(window, 0), _phases_along(window, 1)):
        size_h, padding_h, dilation_h, taps_h, outputs_h = rows
        size_w, padding_w, dilation_w, taps_w, outputs_w = columns
        phase = Window((size_h, size_w), (1, 1), (padding_h, padding_w), (dilation_h, dilation_w))
        yield phase, (taps_h, taps_w), (outputs_h, outputs_w)


def _phases_along(window: Window, axis: int) -> Iterator[tuple[int, int, int, slice, slice]]:
    """Output j = stride·q + rest looks up tap k of input i = (j + padding − k·dilation) / stride, where that is whole:
    if ``first`` is such a k, then k = first + n·every has the input q + padding' − n·dilation'."""
    size, stride, padding, dilation = (pair[axis] for pair in window[:4])
    common = math.gcd(stride, dilation)
    every = stride // common
    for rest in range(stride):
        first = next((k for k in range(min(every, size)) if (rest + padding - k * dilation) % stride == 0), size)
        number = len(range(first, size, every))
        padding_here = (rest + padding - first * dilation) // stride
        yield number, padding_here, dilation // common, slice(first, size, every), slice(rest, None, stride)


def _taps(length: int) -> int:
    """Of a window's rows or columns, as many as a piece has."""
    return ceil_divide(length, ceil_divide(length, LARGEST_KERNEL))


class Problem(NamedTuple):
    """What the choice depends on, "rows" being those that slide: of the map, or its columns. Batch only repeats it."""

    channels: int  # of a group
    groups: int
    pixels: int
    rows: int
    taps: int  # rows of the window, or of a piece
    transposed: bool  # outputs are looked up by input
    features: int  # that generate the dynamic kernel; 0 where it is read
    channels_fastest: bool  # channels, not pixels, are adjacent in memory
    aligned: bool  # and each pixel's begin at 16 bytes
    padded: bool  # the taps of a step are written at 16 bytes each
    dtype: torch.dtype


def by_columns(kernel: Tensor, x: Tensor) -> bool:
    """Whether columns slide and rows lie side by side: then the taps of a step are adjacent in memory."""
    return channels_fastest(kernel) and channels_fastest(x)


def problem_of(
    x: Tensor, size: Pair | torch.Size, window: Window, *, kernel: Tensor | None = None, features: int = 0,
    transposed: bool = False, padded: bool = False,
) -> Problem:  # fmt: skip
    """The problem of a launch over ``size`` = (rows, columns) positions; transposed, of its largest phase."""
    axis = int(kernel is not None and by_columns(kernel, x))
    last, strides, stride = channels_fastest(x), x.stride(), window.stride if transposed else (1, 1)
    rows, columns = ceil_divide(size[0], stride[0]), ceil_divide(size[1], stride[1])
    every = stride[axis] // math.gcd(stride[axis], window.dilation[axis])  # of which taps a phase has one
    # Each pixel's channels begin at 16 bytes, as a compiler sees it.
    aligned = strides[0] % 16 == strides[3] % 16 == strides[4] % 16 == 0 and x.data_ptr() % 16 == 0
    return Problem(
        x.shape[2], x.shape[1], rows * columns, (rows, columns)[axis],
        ceil_divide(_taps(window.kernel_size[axis]), every),
        transposed, features, last, last and aligned, padded, x.dtype,
    )  # fmt: skip


def fits_shared_memory(
    rows: int, columns: int, groups: int, taps: int, features: int, dtype: torch.dtype, copies: int
) -> bool:
    """Whether the operands of the products that generate taps do, with so many copies of a tile's features, and what
    warps exchange."""
    pixels, entries = next_power_of_2(rows) * columns, groups * next_power_of_2(taps)
    return (copies * pixels + entries) * features * dtype.itemsize + 4 * pixels * entries <= SHARED_BYTES


@dataclass(frozen=True)
class Config:
    """``rows`` by ``columns`` by ``channels``, of several groups where they fit; ``loads`` rows are loaded at once."""

    rows: int
    columns: int
    channels: int
    loads: int = 16
    num_warps: int = 2

    def block(self, groups: int, channels: int) -> tuple[int, int]:
        """Groups, and channels of each, in a program: several groups only where whole ones fill a power of two."""
        if channels == next_power_of_2(channels) <= self.channels:
            return min(self.channels // channels, next_power_of_2(groups)), channels
        return 1, min(next_power_of_2(channels), self.channels)

    def fits(self, problem: Problem) -> bool:
        """Whether shared memory holds all features of the tile, which stay there while taps are generated."""
        if not problem.features or problem.transposed or interpreting():
            return True
        groups, _ = self.block(problem.groups, problem.channels)
        dtype, features = problem.dtype, problem.features
        copies = 2 if dtype == torch.float32 else 1  # a product takes two parts of each number
        return fits_shared_memory(self.rows, self.columns, groups, problem.taps, features, dtype, copies)

    def valid(self, problem: Problem) -> bool:
        """Taps that fit the registers of a thread, features that fit shared memory."""
        slots, steps = next_power_of_2(self.rows), next_power_of_2(problem.taps)
        return (
            (slots * steps <= 64 or self.rows == 1)
            and self.channels < 2 * next_power_of_2(problem.channels * problem.groups)
            and (self.columns >= 32 or problem.channels_fastest or problem.features > 0 or interpreting())
            and (self.columns < 32 or not problem.channels_fastest or problem.channels * problem.groups < 64)
            and self.fits(problem)
        )


# Four channels a lane leave registers for twice the warps that eight do, and take half as much with each load.
CONFIGS = tuple(
    Config(rows, *tile)
    for tile, most in (
        ((8, 64), (8, 7, 4)),
        ((4, 64), (7, 4)),
        ((4, 64, 8), (8, 7, 4)),
        ((4, 64, 7, 1), (8, 7)),
        ((8, 64, 16, 4), (7,)),
        ((8, 64, 5), (8, 4)),
        ((32, 16, 4), (8, 7, 4)),
        ((32, 16, 1, 1), (8, 7, 4)),
    )
    for rows in most
)


def _rows(problem: Problem, most: int) -> int:
    """Rows of a tile that waste least at the map's edge, where a tile also loads the rows around it."""
    most = max(1, min(most, 64 // next_power_of_2(problem.taps)))
    return min(range(most, 0, -1), key=lambda n: ceil_divide(problem.rows, n) * (n + problem.taps / 2))


def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned, with fewer columns, groups or rows where many features would not fit."""
    config = _of_few_features(problem)
    while not config.fits(problem) and config.rows * config.columns > 1:
        groups, channels = config.block(problem.groups, problem.channels)
        if groups > 1 and groups * next_power_of_2(problem.taps) > next_power_of_2(config.rows) * config.columns:
            config = replace(config, channels=groups // 2 * channels)
        elif config.columns > 2 or config.rows == 1:
            config = replace(config, columns=config.columns // 2)
        else:
            config = replace(config, rows=config.rows // 2)
    return config


def _of_few_features(problem: Problem) -> Config:
    """The config where all fits.

    Lanes take 8 adjacent channels (16 bytes; 4 of 32 bits) where they are aligned, one otherwise: a lane has the taps
    of all its groups in registers. Pixels lie across lanes where they are adjacent, 32 at a time.
    """
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return Config(_rows(problem, 8), 64, 64)
    size, products = problem.dtype.itemsize, problem.features and problem.transposed
    if products:  # whose operands fill registers; and a small window's rows share few loads
        most = 7 if problem.taps > 4 else 4
    else:
        most = 4 if size > 4 else 8
    if not problem.channels_fastest:
        if problem.transposed and not problem.features:
            most = min(most, 7 if size == 2 and is_hopper() else 6)  # elsewhere registers would be spilled
        channels = min(16, next_power_of_2(problem.channels))
        return Config(_rows(problem, most), 32, channels, 4, 2 if channels > 4 else 1)
    whole = problem.channels == next_power_of_2(problem.channels)
    channels = min(64, next_power_of_2(problem.channels * problem.groups if whole else problem.channels))
    lane = min(4 if size > 2 else 8, problem.channels) if problem.aligned and whole else 1
    config = Config(_rows(problem, most), max(2, 64 * lane // channels), channels)
    if not whole:  # channels are taken in pairs at most, of which a lane has two
        config = replace(config, columns=max(2, 128 // channels), num_warps=1)
    # Four warps share the operands of a product in float32, as far as those fit a small GPU's shared memory.
    if size == lane == 4 and 0 < problem.features <= 64:
        config = replace(config, columns=2 * config.columns, num_warps=4)
    if lane == 8:
        return _of_vectors(problem, config)
    return replace(config, loads=7) if products else config


def _of_vectors(problem: Problem, config: Config) -> Config:
    """The config where lanes take 16 bytes of 16-bit channels: what an H200 found fastest, but for generated kernels of
    few window rows, transposed, where it is what is predicted to be.

    Of large maps one warp generates taps, and few rows that read them take half the registers, so that twice the warps
    hide more of the loads' latency.
    """
    few = replace(config, columns=max(2, config.columns // 2))
    if problem.features and not problem.transposed:
        return replace(few, num_warps=1) if problem.rows > 16 else config
    if problem.features and problem.taps > 4:
        return replace(few, rows=_rows(problem, 8 if problem.features <= 16 else 7), loads=7, num_warps=1)
    if problem.features or (problem.transposed and problem.rows > 32):
        return replace(config, rows=_rows(problem, 7), num_warps=4)
    if problem.rows > (16 if problem.transposed else 7):
        return replace(config, rows=_rows(problem, 4))
    return replace(few, rows=_rows(problem, 7))


def correlate_heuristic(problem: Problem) -> Config:
    """As above, with one warp where pixels lie across lanes: a sum over channels must not cross warps."""
    config = heuristic(problem)
    if interpreting():
        return config
    if problem.channels_fastest:
        if config.channels == 64 and problem.aligned and problem.dtype.itemsize == 2:  # what an H200 found fastest
            if problem.padded:
                large = Config(_rows(problem, 7), 4, 64, 7, 1)
                return large if problem.rows > 16 else Config(_rows(problem, 7), 8, 64)
            if problem.rows > 32:
                return Config(_rows(problem, 7), 4, 64)
            return Config(_rows(problem, 8), 4, 64, 8) if problem.rows > 7 else Config(_rows(problem, 4), 8, 64)
        return replace(config, rows=_rows(problem, 4 if problem.dtype.itemsize > 4 else 8), loads=8)
    return replace(config, rows=_rows(problem, 4 if problem.dtype.itemsize > 2 else 7), loads=1, num_warps=1)
