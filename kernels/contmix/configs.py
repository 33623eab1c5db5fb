"""Which of ContMix's forms a kernel size takes, how its kernels cut the work, and what they read.

*Shared windows.* Clamping makes outputs share windows: along an axis of length L there are only L − K + 1 starts, at
14x14 with K = 13 four windows for 196 outputs, at 7x7 with K = 7 one. A tile holds outputs of one window, and every sum
over window positions is a matrix product.

*Own windows.* Elsewhere nearly every output has a window of its own. A tile holds adjacent outputs of several heads,
whose channels are adjacent in memory. Forward, sums over window positions run in registers, for pairs of outputs;
backward, products with all inputs that a tile sees are matrix products, of which each output takes its own.

*Bands.* Where such windows are large and their numbers have 16 bits, weights of 16 outputs are a banded matrix over all
inputs that these see, and all sums are matrix products; backward, on large maps, windows of 5 are taken so, too.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kernels.backend import interpreting, is_hopper
from kernels.launch import ceil_divide, next_power_of_2
from kernels.windows import windows_and_most

OUTPUTS_PER_WINDOW = 16


class Problem(NamedTuple):
    """What the choice of a config depends on."""

    batch: int
    groups: int
    channels: int
    query_channels: int
    pixels: int
    kernel_size: int
    dtype: torch.dtype
    outputs: int  # of a window, on average


def block(size: int) -> int:
    """A block that holds ``size`` elements and is a side of a matrix product."""
    return max(16, next_power_of_2(size))


def shares_windows(height: int, width: int, kernel_size: int) -> bool:
    """Whether a clamped window serves at least 16 outputs on average, the least that fills a matrix product's rows; or
    tiles of 16 outputs are half full of those of a window that takes more than one step elsewhere."""
    windows, most = windows_and_most((kernel_size, kernel_size), height, width)
    half_full = kernel_size > 5 and 2 * height * width >= OUTPUTS_PER_WINDOW * ceil_divide(most, 16) * windows
    return half_full or height * width >= OUTPUTS_PER_WINDOW * windows


def is_band(problem: Problem, least: int = 7) -> bool:
    """Whether own windows are worth a banded matrix, and fit it: registers hold 15 rows of a window."""
    channels = max(problem.channels, problem.query_channels)
    return problem.dtype.itemsize == 2 and least <= problem.kernel_size < 16 and channels <= 64


def is_band_backward(problem: Problem) -> bool:
    """The same of the backward pass, where smaller windows are worth it, too, on maps of which borders are a small
    part."""
    return is_band(problem, 5 if problem.pixels >= 1000 else 7)


def tile_of(problem: Problem) -> tuple[int, int]:
    """(columns of inputs that 16 outputs of a band see, or a few more; how many of the outputs stand side by side).

    The more do the fewer rows they see, but the longer is the query with its zeros: 64 numbers at most.
    """
    seen = next_power_of_2(problem.kernel_size + 1)
    most = min(seen - problem.kernel_size + 1, 64 // block(problem.query_channels))
    return seen, max(columns for columns in (1, 2, 4) if columns <= most)


def steps_of_own(kernel_size: int) -> tuple[int, int]:
    """(rows of a window in a step, block of their positions): a small window in one step, a large one row by row."""
    rows = kernel_size if kernel_size <= 5 else 1
    return rows, block(rows * kernel_size)


@dataclass(frozen=True)
class Shared:
    """Outputs of a tile, window positions of a block, images that a program walks over."""

    pixels: int
    steps: int
    images: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """Registers of a thread: at most 64 numbers of a block of logits, 128 of all blocks of a window."""
        threads = 32 * self.num_warps
        blocks = ceil_divide(problem.kernel_size**2, self.steps)
        logits = self.pixels * self.steps / threads
        wide = problem.dtype.itemsize // 2  # products of wider types keep their operands in registers
        return 4 <= logits <= 64 // wide and blocks * logits <= 128 and self.steps < 2 * block(problem.kernel_size**2)


@dataclass(frozen=True)
class Tiles:
    """Tiles of 16 outputs that a program works on at a time; and how many programs a launch may have, before a head has
    more than one of them: a program keeps its head's keys while it walks over the map."""

    tiles: int
    programs: int
    num_warps: int = 4
    num_stages: int = 1

    def valid(self, problem: Problem) -> bool:
        """A warp for each tile, and not twice the tiles that there are."""
        return self.tiles == self.num_warps and 16 * self.tiles < max(128, 2 * problem.pixels)

    def block_of(self, columns: int) -> tuple[int, int]:
        """(rows, columns) of outputs that the tiles cover, a square or nearly, where a tile is ``columns`` wide."""
        columns = min(self.tiles * columns, next_power_of_2(math.isqrt(16 * self.tiles - 1) + 1))
        return 16 * self.tiles // columns, columns


@dataclass(frozen=True)
class Own:
    """Pairs of outputs of a tile, heads side by side, images that a program walks over."""

    pairs: int
    heads: int
    images: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """Registers of a thread: at most 16 numbers of one output's channels, and 32 of the logits."""
        threads = 32 * self.num_warps
        logits = 2 * self.pairs * self.heads * steps_of_own(problem.kernel_size)[1] / threads
        channels = self.pairs * self.heads * block(problem.channels) / threads
        return self.heads < 2 * next_power_of_2(problem.groups) and 1 <= channels <= 16 and logits <= 64


SHARED = tuple(
    Shared(pixels, steps, images, warps, stages)
    for pixels, steps, images, warps, stages in (
        (64, 64, 1, 4, 2), (64, 64, 4, 4, 3), (64, 64, 8, 4, 3), (64, 64, 16, 4, 3), (64, 64, 1, 8, 2),
        (64, 64, 8, 8, 2), (64, 32, 1, 4, 2), (64, 32, 8, 4, 3), (32, 64, 1, 4, 2), (32, 64, 8, 4, 3),
        (32, 64, 8, 8, 2), (32, 32, 1, 4, 2), (32, 32, 8, 4, 3), (16, 64, 1, 4, 2), (16, 64, 8, 4, 3),
        (16, 16, 1, 1, 2),
    )
)  # fmt: skip
OWN = tuple(
    Own(pairs, heads, images, warps, stages)
    for pairs, heads, images, warps, stages in (
        (16, 4, 1, 4, 2), (16, 4, 2, 4, 2), (16, 4, 4, 4, 2), (16, 4, 4, 4, 1), (16, 4, 8, 4, 2), (32, 4, 1, 8, 2),
        (16, 2, 1, 2, 2), (16, 2, 2, 2, 2), (16, 2, 4, 2, 2), (16, 1, 1, 1, 2), (16, 1, 4, 1, 2), (32, 2, 1, 4, 2),
        (8, 4, 1, 4, 1), (8, 4, 1, 4, 2), (8, 2, 1, 2, 1), (8, 1, 1, 1, 1),
    )
)  # fmt: skip
TILES = tuple(
    Tiles(tiles, programs, tiles, stages)
    for tiles, programs, stages in (
        (4, 132, 1), (4, 264, 1), (4, 396, 1), (4, 528, 1), (4, 1056, 1), (4, 1 << 20, 1), (4, 264, 2), (4, 528, 2),
        (8, 132, 1), (8, 132, 2), (8, 264, 1), (8, 528, 1), (8, 1 << 20, 1),
    )
)  # fmt: skip


def _images(problem: Problem, programs: int, most: int) -> int:
    """Images that a program walks over, so that enough programs, two for each of a GPU's processors, stay busy."""
    return max(1, min(most, problem.batch * problem.groups * programs // 264))


def shared_heuristic(problem: Problem) -> Shared:
    """A window's 64 outputs by 64 positions, of more warps or fewer outputs where its blocks of bias are many."""
    images = 8 if interpreting() else _images(problem, max(1, problem.pixels // 49), 8)
    if problem.dtype.itemsize > 2 and not interpreting():
        small = Shared(32, 32, images, num_warps=2)
        return small if small.valid(problem) else Shared(16, 64, images)
    blocks, steps = ceil_divide(problem.kernel_size**2, 64), min(64, block(problem.kernel_size**2))
    if problem.outputs < OUTPUTS_PER_WINDOW and blocks <= 2:
        return Shared(16, steps, images, num_warps=1, num_stages=3)
    if blocks <= 3:
        return Shared(64, steps, images, num_stages=3)
    return Shared(64 if blocks <= 8 else 32, steps, images, num_warps=8)


def backward_heuristic(problem: Problem) -> Shared:
    """As the forward pass, with as many images as leave one round of programs, two for each of a GPU's processors."""
    config = shared_heuristic(problem)
    if interpreting():
        return config
    if config.num_warps == 2:  # in float32, which has more products here
        config = replace(config, steps=64, num_warps=4)
    tiles = problem.batch * problem.groups * max(1, problem.pixels // 49)
    return replace(config, images=min(32, ceil_divide(tiles, 264)))


def tiles_heuristic(problem: Problem) -> Tiles:
    """One round of programs: 2 for each of a GPU's processors, or 4 where a smaller window leaves registers."""
    if interpreting():
        return Tiles(4 * next_power_of_2(ceil_divide(problem.pixels, 64)), 1)
    return Tiles(4, 264 if problem.kernel_size > 7 else 528)


def grad_tiles_heuristic(problem: Problem) -> Tiles:
    """One round of programs, as many for each of a GPU's processors as registers allow; fewer whose loads are on their
    way early serve larger windows better, where shared memory holds those of 8 tiles."""
    if interpreting():
        return tiles_heuristic(problem)
    if problem.kernel_size > 7:
        return Tiles(8, 132, 8, 2) if is_hopper() else Tiles(4, 264)
    return Tiles(4, 264, 4, 2) if problem.kernel_size > 5 else Tiles(4, 396)


def own_heuristic(problem: Problem) -> Own:
    """64 channels side by side, 128 bytes of 16-bit numbers, and 16 pairs of outputs, or 8 of a wider type."""
    if interpreting():
        return Own(64, next_power_of_2(problem.groups), 8)
    heads = min(max(1, 64 // block(problem.channels)), next_power_of_2(problem.groups))
    tiles = ceil_divide(problem.pixels, 32)
    images = _images(problem, ceil_divide(tiles, heads), 4) if problem.kernel_size <= 5 else 1
    warps = max(1, heads * block(problem.channels) // 16)
    return Own(16, heads, images, warps) if problem.dtype.itemsize == 2 else Own(8, heads, 1, warps, num_stages=1)


def grad_own_heuristic(problem: Problem) -> Own:
    """16 outputs of one image; of a large window 32 that share its keys, or 16 of a wider type, which takes as much."""
    config = own_heuristic(problem)
    if interpreting():
        return config
    large = problem.kernel_size > 5 and problem.dtype.itemsize == 2
    return replace(config, pairs=16 if large else 8, images=1, num_stages=2 if large else 1)
