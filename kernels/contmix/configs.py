"""Which of ContMix's forms a kernel size takes, how its kernels cut the work, and what they read.

*Shared windows.* Clamping makes outputs share windows: along an axis of length L there are only L − K + 1 starts, at
14x14 with K = 13 four windows for 196 outputs, at 7x7 with K = 7 one. A tile holds outputs of one window, and every sum
over window positions is a matrix product.

*Bands.* Elsewhere nearly every output has a window of its own. Weights of 16 outputs are a banded matrix over all
inputs that these see, and all sums are matrix products again. That takes numbers of 16 bits.

*Composed.* What fits neither, of wider numbers above all, stores its logits and is left to neighbourhood attention.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kernels.backend import interpreting, is_hopper
from kernels.launch import ceil_divide, next_power_of_2
from kernels.windows import windows_and_most

# How much of its tiles of 16 outputs a window must fill, on average, for kernels of shared windows to be worth it.
FILLED_FORWARD, FILLED_BACKWARD = 1 / 2, 1 / 3


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


def shares_windows(height: int, width: int, kernel_size: int, filled: float) -> bool:
    """Whether tiles of 16 outputs of one window each, as many as the window with the most takes, are ``filled``."""
    windows, most = windows_and_most((kernel_size, kernel_size), height, width)
    return height * width >= filled * windows * ceil_divide(most, 16) * 16


def is_band(problem: Problem) -> bool:
    """Whether windows fit a banded matrix: registers hold 15 rows of a window, and weights are packed in pairs."""
    channels = max(problem.channels, problem.query_channels)
    return problem.dtype.itemsize == 2 and 1 < problem.kernel_size < 16 and channels <= 64


def tile_of(problem: Problem) -> tuple[int, int]:
    """(columns of inputs that 16 outputs of a band see, or a few more; how many of the outputs stand side by side).

    The more do the fewer rows they see, but the longer is the query with its zeros: 64 numbers at most.
    """
    seen = next_power_of_2(problem.kernel_size + 1)
    most = min(seen - problem.kernel_size + 1, 64 // block(problem.query_channels))
    return seen, max(columns for columns in (1, 2, 4) if columns <= most)


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

    def block_of(self, columns: int, height: int, width: int) -> tuple[int, int, int]:
        """(blocks that cover a map, their rows, their columns): the widest of which there are hardly more than of
        others, for tiles side by side see much the same. A tile is ``columns`` wide."""
        shapes = [(16 * self.tiles // columns >> i, columns << i) for i in range(self.tiles.bit_length())]
        blocks = [(ceil_divide(height, rows) * ceil_divide(width, wide), rows, wide) for rows, wide in shapes]
        return next(block for block in reversed(blocks) if 8 * block[0] <= 9 * min(blocks)[0])

    @property
    def most_registers(self) -> int:
        """Of a thread in the forward pass, so that three programs of 4 warps share a processor, where it has shared
        memory for them; 0: as many as it takes."""
        return 168 if self.programs == 396 and is_hopper() else 0


SHARED = tuple(
    Shared(pixels, steps, images, warps, stages)
    for pixels, steps, images, warps, stages in (
        (64, 64, 1, 4, 2), (64, 64, 4, 4, 3), (64, 64, 8, 4, 3), (64, 64, 16, 4, 3), (64, 64, 1, 8, 2),
        (64, 64, 8, 8, 2), (64, 32, 1, 4, 2), (64, 32, 8, 4, 3), (32, 64, 1, 4, 2), (32, 64, 8, 4, 3),
        (32, 64, 8, 8, 2), (32, 32, 1, 4, 2), (32, 32, 8, 4, 3), (16, 64, 1, 4, 2), (16, 64, 8, 4, 3),
        (16, 16, 1, 1, 2),
    )
)  # fmt: skip
TILES = tuple(
    Tiles(tiles, programs, tiles, stages)
    for tiles, programs, stages in (
        (4, 132, 1), (4, 264, 1), (4, 396, 1), (4, 528, 1), (4, 1 << 20, 1), (4, 264, 2), (4, 528, 2),
        (8, 132, 1), (8, 132, 2), (8, 264, 1), (8, 528, 1), (8, 1 << 20, 1),
    )
)  # fmt: skip


def _images(problem: Problem, programs: int, most: int) -> int:
    """Images that a program walks over, such that so many programs, as a GPU runs at a time, see all of them."""
    return min(most, ceil_divide(problem.batch * problem.groups * max(1, problem.pixels // 49), programs))


def shared_heuristic(problem: Problem) -> Shared:
    """A window's 64 outputs by 64 positions, of more warps or fewer outputs where its blocks of bias are many."""
    blocks, steps = ceil_divide(problem.kernel_size**2, 64), min(64, block(problem.kernel_size**2))
    # Four programs for each of a GPU's processors, or two whose blocks of bias take twice the registers.
    images = 8 if interpreting() else _images(problem, 264 if blocks > 1 else 528, 16)
    if problem.dtype.itemsize > 2 and not interpreting():
        small = Shared(32, min(32, steps), images, num_warps=2)
        return small if small.valid(problem) else Shared(16, steps, images)
    if problem.outputs < 16 and blocks <= 2:
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
        config = replace(config, steps=min(64, block(problem.kernel_size**2)), num_warps=4)
    return replace(config, images=_images(problem, 264, 32))


def tiles_heuristic(problem: Problem) -> Tiles:
    """One round of programs: as many for each of a GPU's processors, 2 to 4, as windows leave them registers."""
    if interpreting():
        return Tiles(4 * next_power_of_2(ceil_divide(problem.pixels, 64)), 1)
    if problem.kernel_size <= 7:
        return Tiles(4, 528)
    few = max(problem.channels, problem.query_channels) <= 16
    return Tiles(4, 396 if problem.kernel_size <= 13 and few and is_hopper() else 264)


def grad_tiles_heuristic(problem: Problem) -> Tiles:
    """One round of programs, as many for each of a GPU's processors as registers allow; fewer whose loads are on their
    way early serve larger windows better, where shared memory holds those of 8 tiles. A small window's keys are quick
    to load: a program for each block needs the fewest registers."""
    if interpreting():
        return tiles_heuristic(problem)
    early = max(problem.channels, problem.query_channels) <= 16  # of more, shared memory does not hold two steps' loads
    if problem.kernel_size > 7:
        return Tiles(8, 132, 8, 2) if early and is_hopper() else Tiles(4, 264)
    return Tiles(4, 264, 4, 2 if early else 1) if problem.kernel_size > 5 or problem.pixels < 128 else Tiles(4, 1 << 20)
